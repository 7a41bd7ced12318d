"""How far the images of each backend are from the reference backend's, after a whole sampling run from the
same noise.

    python3 tasks.py demo && python benchmarks/parity.py runs/demo/model

Prints one JSON object: PSNR mean and minimum, SSIM, and seconds of sampling, by backend.
"""

import argparse
import json
import time

import torch

import tfmq
from tfmq.backends.backend import Options
from tfmq.backends.execution import BACKENDS
from tfmq.cli.models import default_steps
from tfmq.errors import MissingExtraError
from tfmq.evaluation.paired import paired_fidelity
from tfmq.evaluation.sampling import draw
from tfmq.integrations.diffusers.quiet import quiet
from tfmq.targets import open_sampler

COMPILED = "torch-compile"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", help="what tfmq quantize wrote")
    parser.add_argument("--num-images", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    result = {}
    with quiet():
        sampler = open_sampler(options.directory)
        images = {}
        for variant in ("reference", *sorted(set(BACKENDS) - {"reference"}), COMPILED):
            try:
                tfmq.execute(
                    sampler.denoiser.module,
                    variant.removesuffix("-compile"),
                    options=Options(compile=variant == COMPILED),
                )
            except (MissingExtraError, ValueError) as error:
                result[variant] = {"skipped": str(error)}
                continue
            began = time.perf_counter()
            images[variant] = draw(
                sampler,
                options.num_images,
                steps=default_steps(sampler),
                seed=options.seed,
                batch_size=options.num_images,
            )
            seconds = time.perf_counter() - began
            fidelity = paired_fidelity(images["reference"], images[variant])
            result[variant] = {
                "psnr_db": fidelity.mean_psnr_db,
                "psnr_min_db": fidelity.min_psnr_db,
                "ssim": fidelity.mean_ssim,
                "seconds": seconds,
            }
    print(
        json.dumps(
            {"threads": torch.get_num_threads(), "torch": torch.__version__, "backends": result}, indent=1
        )
    )


if __name__ == "__main__":
    main()
