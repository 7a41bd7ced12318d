"""A process that draws pictures with one variant of a text-to-image pipeline, whenever it is told to.
`pipeline.py` starts it.

It takes one JSON object as its argument, and answers each line of JSON on its input with one on its output:
first when it is ready, then after each picture.
"""

import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()
# Parts of a pipeline that are timed, by the method that computes them.
PARTS = {"text_encoder": "forward", "unet": "forward", "transformer": "forward", "vae": "decode"}


@dataclass(frozen=True)
class Job:
    """What to draw with.

    Args:
        variant: one of `VARIANTS`.
        original: directory of the full-precision pipeline.
        quantized: directory of what `tfmq quantize` made of it.
        exported: directory of what another library made of it; written if it is not there.
        size: side of a picture in pixels; the width of its latents is a part of it.
        prompts: some texts that a library may calibrate on; the first one is drawn.
    """

    variant: str
    original: str
    quantized: str
    exported: str
    size: int
    prompts: tuple[str, ...]


def _stock(dtype: str) -> Callable[[Job], Any]:
    def opened(job: Job) -> Any:
        import diffusers
        import torch

        return diffusers.DiffusionPipeline.from_pretrained(job.original, torch_dtype=getattr(torch, dtype))

    return opened


def _ours(backend: str) -> Callable[[Job], Any]:
    def opened(job: Job) -> Any:
        import tfmq

        return tfmq.load(job.quantized, backend=backend)

    return opened


def _optimum(hybrid: bool) -> Callable[[Job], Any]:
    def opened(job: Job) -> Any:
        from optimum.intel import OVStableDiffusionPipeline, OVWeightQuantizationConfig

        if not Path(job.exported).exists():
            config = OVWeightQuantizationConfig(
                bits=8, quant_method="hybrid", dataset=list(job.prompts), num_samples=len(job.prompts)
            )
            made = OVStableDiffusionPipeline.from_pretrained(
                job.original,
                export=True,
                compile=False,
                **({"quantization_config": config} if hybrid else {"load_in_8bit": False}),
            )
            made.save_pretrained(job.exported)
        settings = {"INFERENCE_PRECISION_HINT": "f32", "CACHE_DIR": f"{job.exported}/cache"}
        return OVStableDiffusionPipeline.from_pretrained(job.exported, ov_config=settings)

    return opened


VARIANTS: dict[str, Callable[[Job], Any]] = {
    "diffusers float32": _stock("float32"),
    "diffusers bfloat16": _stock("bfloat16"),
    "tfmq torch": _ours("torch"),
    "tfmq openvino": _ours("openvino"),
    "optimum-intel float32": _optimum(hybrid=False),
    "optimum-intel hybrid": _optimum(hybrid=True),
}


def peak_bytes() -> int:
    """Return the most memory that this process has held (Linux)."""
    # An interpreter with other libraries has no tfmq to ask.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


class Painter:
    """Draws with a pipeline, and times it and its parts."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.pipeline = VARIANTS[job.variant](job)
        self.pipeline.set_progress_bar_config(disable=True)
        self.spent: dict[str, float] = {}
        for part, method in PARTS.items():
            if (owner := getattr(self.pipeline, part, None)) is not None:
                setattr(owner, method, self._timed(part, getattr(owner, method)))

    def _timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.spent[part] = self.spent.get(part, 0.0) + time.perf_counter() - began

        return timed

    def draw(self, steps: int, guidance: float, path: str) -> dict[str, Any]:
        """Draw one picture into a file, and return the seconds that it took, and its parts."""
        import numpy as np
        import torch

        self.spent.clear()
        side = self.job.size // self.pipeline.vae_scale_factor
        shape = 1, self.pipeline.unet.config["in_channels"], side, side
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        began = time.perf_counter()
        image = self.pipeline(
            self.job.prompts[0],
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=self.job.size,
            width=self.job.size,
            latents=noise.to(getattr(self.pipeline.unet, "dtype", torch.float32)),
            output_type="np",
        ).images[0]
        seconds = time.perf_counter() - began
        np.save(path, np.asarray(image, dtype=np.float32))
        return {"seconds": seconds, "parts": dict(self.spent), "peak_bytes": peak_bytes()}


def answer(**values: Any) -> None:
    """Write one line of JSON."""
    print(json.dumps(values), file=OUTPUT, flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    # Libraries print on the standard output too.
    OUTPUT, sys.stdout = sys.stdout, sys.stderr
    values = json.loads(sys.argv[1])
    painter = Painter(Job(**{**values, "prompts": tuple(values["prompts"])}))
    answer(ready=time.perf_counter() - BEGAN, peak_bytes=peak_bytes())
    for line in sys.stdin:
        answer(**painter.draw(**json.loads(line)))
