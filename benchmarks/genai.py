"""How near the images that OpenVINO GenAI draws with an exported pipeline are to tfmq's own.

    tfmq quantize text --scheme quick_w8a8 --output-dir DIR
    tfmq export DIR --to openvino-genai --output-dir EXPORTED
    python benchmarks/genai.py DIR EXPORTED --num-images 16 --steps 20

Both draw the same prompts from the same latents, with the same scheduler, guidance and steps: tfmq in its
simulation, GenAI in a process of its own that has no torch. Prints dB of PSNR of its 8-bit images.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

# Latents of an image, and a guidance that a pipeline brings or diffusers' own.
GUIDANCE = 7.5


def draw_with_genai(exported: Path, order: Path, images: Path) -> None:
    """Draw what `order` says with OpenVINO GenAI and write uint8 `[N, H, W, 3]`; no torch is imported."""
    import openvino_genai

    class Given(openvino_genai.Generator):
        """Hands out latents that are there already."""

        def __init__(self, values: np.ndarray) -> None:
            super().__init__()
            self.values = iter(values.ravel().tolist())

        def next(self) -> float:
            return next(self.values)

        def seed(self, new_seed: int) -> None:
            raise AssertionError("nothing is random here")

    asked = json.loads(order.read_text())
    pipeline = openvino_genai.Text2ImagePipeline(exported, asked["device"], **asked["properties"])
    drawn = [
        pipeline.generate(prompt, generator=Given(noise), **asked["options"]).data[0].copy()
        for prompt, noise in zip(asked["prompts"], np.load(order.with_suffix(".npy")), strict=True)
    ]
    assert "torch" not in sys.modules
    np.save(images, np.stack(drawn))


def genai_images(
    exported: Path,
    prompts: list[str],
    latents: np.ndarray,
    *,
    options: dict[str, Any],
    device: str = "CPU",
    precision: str | None = "f32",
) -> np.ndarray:
    """Return the images uint8 `[N, H, W, 3]` that GenAI draws in a process of its own from latents
    `[N, C, H, W]`.
    """
    properties = {"INFERENCE_PRECISION_HINT": precision} if precision else {}
    with tempfile.TemporaryDirectory() as folder:
        order, images = Path(folder, "order.json"), Path(folder, "images.npy")
        order.write_text(
            json.dumps({"prompts": prompts, "options": options, "device": device, "properties": properties})
        )
        np.save(order.with_suffix(".npy"), latents)
        command = [sys.executable, __file__, "--draw", str(exported), str(order), str(images)]
        done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr else str(done.returncode))
        return np.load(images)


def tfmq_images(
    pipeline: Any, prompts: list[str], latents: np.ndarray, *, options: dict[str, Any]
) -> np.ndarray:
    """Return the images `[N, H, W, 3]` in [0, 255] that a pipeline draws from latents, one at a time as GenAI
    does.
    """
    import torch

    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        drawn = [
            pipeline(prompt, latents=torch.from_numpy(noise[None]), output_type="np", **options).images[0]
            for prompt, noise in zip(prompts, latents, strict=True)
        ]
    return np.stack(drawn) * 255


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("exported", type=Path)
    parser.add_argument("--num-images", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, help="Default: that of the calibration.")
    parser.add_argument("--device", default="CPU", help="Of OpenVINO GenAI.")
    parser.add_argument(
        "--precision", default="f32", help="Of what is not in integers; empty for the device's own."
    )
    parser.add_argument("--backend", default="simulated", help="What computes tfmq's images.")
    asked = parser.parse_args()

    import tfmq
    from tfmq.evaluation.paired import psnr
    from tfmq.integrations.diffusers.quiet import quiet
    from tfmq.targets import open_sampler

    with quiet():
        sampler: Any = open_sampler(asked.model)
        tfmq.execute(sampler.pipeline, asked.backend)
        prompts = sampler.prompts_of(range(asked.num_images))
        guidance = asked.guidance or sampler.options.get("guidance_scale", GUIDANCE)
        options = {"num_inference_steps": asked.steps, "guidance_scale": guidance}
        shape = sampler.example().sample.shape[1:]
        latents = np.random.default_rng(0).standard_normal((asked.num_images, *shape)).astype(np.float32)
        own = tfmq_images(sampler.pipeline, prompts, latents, options=options)
    images = genai_images(
        asked.exported, prompts, latents, options=options, device=asked.device, precision=asked.precision
    )
    values = psnr(own, images)
    print(
        f"{asked.num_images} images, {asked.steps} steps, guidance {guidance:g}, {asked.backend} against "
        f"GenAI on {asked.device} ({asked.precision or 'its own precision'}): PSNR {values.mean():.1f} dB, "
        f"worst {values.min():.1f}"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--draw"]:
        draw_with_genai(*map(Path, sys.argv[2:5]))
    else:
        main()
