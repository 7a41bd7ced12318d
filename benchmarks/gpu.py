"""Check, time and weigh the cuda backend on the GPU at hand, in one call of less than ten minutes.

    python benchmarks/gpu.py --output gpu.json

In this order, each part written to the output as soon as it is finished:

1. `checks`: every Triton kernel against the operator's definition on the CPU. Products must be equal to the
bit, normalised codes may differ by one. 2. `ceilings`: what the device reaches in int8, in bfloat16 and in
copying, by the library's own kernels. 3. `kernels`: each operator at shapes of real denoisers, beside
bfloat16, with its share of the ceilings. 4. `parity`: the images of a short trajectory, by the cuda and by
the reference backend. 5. `models`: one denoising step of real architectures with random weights, in bfloat16
by torch.compile, by the cuda backend, and by the peers that
   are installed (torchao, SDNQ); the variants of a row take turns, medians of CUDA events; memory of the
   weights and of a step.

What has not begun when `--seconds` have passed is left out and named (a model takes minutes, most of them its
compilers'); a call with the same output goes on there. `--dry-run` goes through all of it on any machine with
tiny models and the operators' definitions: it shows that the script works, and its times mean nothing.
"""

import argparse
import copy
import gc
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

import tfmq
from tfmq.backends.backend import Options
from tfmq.backends.execution import execute
from tfmq.kernels.operators.multiply import convolution_codes, linear_codes, linear_weight_only
from tfmq.kernels.operators.norms import group_norm_codes, layer_norm_codes
from tfmq.kernels.operators.product import product_codes
from tfmq.kernels.operators.quantize import quantize_codes, quantize_tokens
from tfmq.kernels.operators.weights import half_packed, integers_of
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.sampler import LoopSampler
from tfmq.models.trace import trace
from tfmq.nn.plan import calibrated_layers, pack_all, prepare
from tfmq.numerics.ranges import min_max
from tfmq.quantizers.steps import StepContext
from tfmq.recipes.plan import make_plan

TIMESTEPS = torch.arange(0, 1000, 100)
ROUNDS = 15


@dataclass(frozen=True)
class Setting:
    """Where everything runs, and for how long."""

    device: str
    backend: str
    tiny: bool
    until: float

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    def compiled(self, module: nn.Module) -> Any:
        """Return a module that torch's compiler runs, with CUDA graphs."""
        return torch.compile(module, dynamic=False, mode="reduce-overhead") if self.cuda else module


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---- time ----


def once(step: Callable[[], object], calls: int, *, cuda: bool) -> float:
    """Return seconds a call."""
    if not cuda:
        began = time.perf_counter()
        for _ in range(calls):
            step()
        return (time.perf_counter() - began) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def taken_turns(
    steps: Mapping[str, Callable[[], object]], setting: Setting, rounds: int = ROUNDS
) -> dict[str, float]:
    """Return median seconds of each step; every round starts with another one."""
    rounds = 1 if setting.tiny else rounds
    calls = {}
    for name, step in steps.items():
        for _ in range(1 if setting.tiny else 3):
            step()
        calls[name] = max(1, min(200, int(0.02 / max(1e-6, once(step, 1, cuda=setting.cuda)))))
    names, seen = list(steps), {name: [] for name in steps}
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            seen[name].append(once(steps[name], calls[name], cuda=setting.cuda))
    return {name: statistics.median(values) for name, values in seen.items()}


# ---- operands ----


def grid(samples: int, device: str, *, segments: tuple[int, ...] = ()) -> tuple[Any, ...]:
    shape = (len(TIMESTEPS), max(1, len(segments)))
    scale, zero = 0.01 + torch.rand(shape) / 20, torch.randint(100, 156, shape).to(torch.uint8)
    return scale.to(device), zero.to(device), (torch.arange(samples) % shape[0]).to(device), list(segments)


def weight(
    shape: tuple[int, ...], device: str, *, segments: tuple[int, ...] = (), nibbles: bool = False
) -> tuple[Any, ...]:
    groups = max(1, len(segments))
    zero = torch.randint(0, 16, (shape[0], groups)).to(torch.int8) if nibbles else None
    values = (
        half_packed(torch.randint(16, shape), segments)
        if nibbles
        else torch.randint(-128, 128, shape).to(torch.int8)
    )
    parts = integers_of(values, zero, segments, shape[-1]).split(segments or (shape[-1],), dim=-1)
    sums = torch.stack([part.flatten(1).sum(dim=1) for part in parts], dim=1).to(torch.int32)
    found = values, zero, 0.001 * (1 + torch.rand(shape[0], groups)), sums, torch.randn(shape[0])
    return tuple(None if tensor is None else tensor.to(device) for tensor in found)


def codes(shape: tuple[int, ...], device: str) -> Tensor:
    return torch.randint(-128, 128, shape).to(torch.int8).to(device)


def moved(arguments: tuple[Any, ...], device: str) -> list[Any]:
    return [value.to(device) if isinstance(value, Tensor) else value for value in arguments]


# ---- 1: checks ----


def check_cases() -> Iterator[tuple[str, Any, tuple[Any, ...], float]]:
    """Yield name, operator, arguments on the CPU, and the allowed difference (of the output's largest
    magnitude; of codes: 1).
    """
    split = (40, 24)
    for nibbles in (False, True):
        for segments in ((), split):
            name = f"{'w4' if nibbles else 'w8'}a8{' split' if segments else ''}"
            tokens = weight((72, 64), "cpu", segments=segments, nibbles=nibbles)
            yield (
                f"linear {name}",
                linear_codes,
                (
                    codes((3, 50, 64), "cpu"),
                    *grid(3, "cpu", segments=segments),
                    *tokens,
                    "",
                    None,
                    torch.float32,
                ),
                0,
            )
            windows = weight((72, 3, 3, 64), "cpu", segments=segments, nibbles=nibbles)
            images = (codes((3, 17, 19, 64), "cpu"), *grid(3, "cpu", segments=segments), *windows)
            for stride in (1, 2):
                more = ([stride, stride], [1, 1], "", None, torch.float32)
                yield f"convolution {name} stride {stride}", convolution_codes, (*images, *more), 0
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                only = (torch.randn(5, 64).to(dtype), list(segments), *tokens[:3], tokens[4])
                yield (
                    f"weight-only {name[:2]} {dtype}{' split' if segments else ''}",
                    linear_weight_only,
                    only,
                    max(1e-5, 4 * torch.finfo(dtype).eps),
                )
    for activation in ("silu", "gelu", "gelu_tanh"):
        end = (activation, torch.randn(3, 50, 72).bfloat16(), torch.bfloat16)
        yield (
            f"epilogue {activation}",
            linear_codes,
            (codes((3, 50, 64), "cpu"), *grid(3, "cpu"), *weight((72, 64), "cpu"), *end),
            0.01,
        )
    for padding in ([], [1, 1, 1, 1], [0, 0, 1, 2]):
        x = torch.randn(3, 17, 19, 64).bfloat16()
        yield f"quantize {padding}", quantize_codes, (x, *grid(3, "cpu", segments=split), 256, padding), 0
        norm = (
            x,
            8,
            torch.rand(64),
            torch.randn(64),
            1e-5,
            "silu",
            *grid(3, "cpu", segments=split),
            256,
            padding,
        )
        yield f"group norm {padding}", group_norm_codes, norm, 1
    yield "quantize tokens", quantize_tokens, (torch.randn(3, 50, 300).bfloat16(),), 0
    rows = (torch.randn(3, 300), torch.randn(3, 300))
    yield (
        "layer norm",
        layer_norm_codes,
        (torch.randn(3, 50, 300).bfloat16(), None, None, 1e-5, *rows, *grid(3, "cpu"), 256),
        1,
    )
    factors = (torch.rand(3) / 20, torch.randint(256, (3,)).to(torch.uint8), 256)
    yield (
        "product",
        product_codes,
        (torch.randn(3, 4, 50, 40), *factors, torch.randn(3, 4, 40, 50), *factors),
        0,
    )


def checked(setting: Setting) -> dict[str, Any]:
    """Return for each operator the largest difference from its definition, and whether that is allowed."""
    torch.manual_seed(0)
    found = {}
    for name, operator, arguments, allowed in check_cases():
        expected, got = operator(*arguments), operator(*moved(arguments, setting.device))
        pairs = zip(
            *(value if isinstance(value, tuple) else (value,) for value in (expected, got)), strict=True
        )
        worst = 0.0
        for left, right in pairs:
            difference = float((left.double() - right.cpu().double()).abs().max())
            worst = max(
                worst,
                difference if left.dtype == torch.int8 else difference / float(left.double().abs().max()),
            )
        found[name] = {"difference": worst, "allowed": allowed, "ok": worst <= allowed}
        if worst > allowed:
            note(f"NOT AS DEFINED: {name}: {worst:g}, allowed {allowed:g}")
    return found


# ---- 2: ceilings ----


def ceilings(setting: Setting) -> dict[str, float]:
    """Return operations a second of large products, a multiplication and its addition being two, and bytes a
    second of a copy.
    """
    side = 128 if setting.tiny else 8192
    floats = [torch.randn(side, side, device=setting.device).bfloat16() for _ in range(2)]
    integers = [codes((side, side), setting.device) for _ in range(2)]
    right = integers[1].t().contiguous().t()
    source = torch.randn(1 << (16 if setting.tiny else 28), device=setting.device)
    target = torch.empty_like(source)
    steps = {
        "bf16": lambda: floats[0] @ floats[1],
        "int8": lambda: torch._int_mm(integers[0], right),
        "copy": lambda: target.copy_(source),
    }
    seconds = taken_turns(steps, setting)
    return {
        "bf16": 2 * side**3 / seconds["bf16"],
        "int8": 2 * side**3 / seconds["int8"],
        "bytes": 2 * source.nbytes / seconds["copy"],
    }


# ---- 3: kernels ----


def kernel_shapes(setting: Setting) -> Iterator[tuple[str, int, int, int, int]]:
    """Yield layers of SD 1.5, SDXL and DiT-XL/2: kind, batch, side of the image or tokens, channels in and
    out.
    """
    if setting.tiny:
        yield from (("convolution", 1, 8, 32, 32), ("linear", 1, 16, 32, 64))
        return
    yield from (
        ("convolution", batch, side, into, out)
        for batch in (1, 4, 16)
        for side, into, out in ((64, 320, 320), (32, 640, 640), (8, 2560, 1280))
    )
    yield from (
        ("convolution", 1, side, into, out) for side, into, out in ((128, 320, 320), (32, 1280, 1280))
    )
    yield from (
        ("linear", batch, 256, into, out)
        for batch in (1, 4, 16)
        for into, out in ((1152, 1152), (1152, 4608), (4608, 1152))
    )
    yield from (("linear", batch, 1, 1280, 1280) for batch in (1, 4))


@dataclass(frozen=True)
class Layer:
    """One shape: the float operands, the codes, the weights of both widths, and what the operators take
    besides.
    """

    kind: str
    batch: int
    side: int
    into: int
    out: int

    @property
    def image(self) -> bool:
        return self.kind == "convolution"

    @property
    def rows(self) -> int:
        return self.batch * self.side * (self.side if self.image else 1)

    @property
    def window(self) -> tuple[int, ...]:
        return (3, 3) if self.image else ()

    def __str__(self) -> str:
        return (
            f"{self.kind} "
            f"{self.batch}x{self.side}{f'x{self.side}' if self.image else ''}x{self.into}->{self.out}"
        )

    def steps(self, device: str) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
        """Return the operators to time, and the bytes that each must move."""
        x = torch.randn(
            (self.batch, *[self.side] * (2 if self.image else 1), self.into), device=device
        ).bfloat16()
        where, padding = grid(self.batch, device), [1, 1, 1, 1] if self.image else []
        quantized = quantize_codes(x, *where, 256, padding)
        w8, w4 = (
            weight((self.out, *self.window, self.into), device, nibbles=nibbles) for nibbles in (False, True)
        )
        full = torch.randn(self.out, self.into, *self.window, device=device).bfloat16()
        written = 2 * self.rows * self.out
        steps: dict[str, Callable[[], object]] = {"quantize": lambda: quantize_codes(x, *where, 256, padding)}
        traffic = {"quantize": x.nbytes + quantized.nbytes, "bf16": x.nbytes + full.nbytes + written}
        traffic |= {
            f"{name}a8": quantized.nbytes + stored[0].nbytes + written
            for name, stored in (("w8", w8), ("w4", w4))
        }
        end = ("", None, torch.bfloat16)
        if self.image:
            last, laid = x.movedim(-1, 1), full.contiguous(memory_format=torch.channels_last)
            one, zero = torch.ones(self.into, device=device), torch.zeros(self.into, device=device)
            steps["bf16"] = lambda: F.conv2d(last, laid, padding=1)
            steps["w8a8"] = lambda: convolution_codes(quantized, *where, *w8, [1, 1], [1, 1], *end)
            steps["w4a8"] = lambda: convolution_codes(quantized, *where, *w4, [1, 1], [1, 1], *end)
            steps["norm"] = lambda: group_norm_codes(x, 32, one, zero, 1e-5, "silu", *where, 256, padding)
            return steps, traffic | {"norm": 2 * x.nbytes + quantized.nbytes}
        steps["bf16"] = lambda: F.linear(x, full)
        steps["w8a8"] = lambda: linear_codes(quantized, *where, *w8, *end)
        steps["w4a8"] = lambda: linear_codes(quantized, *where, *w4, *end)
        steps["w4a16"] = lambda: linear_weight_only(x, [], *w4[:3], w4[4])
        steps["norm"] = lambda: layer_norm_codes(x, None, None, 1e-6, None, None, *where, 256)
        return steps, traffic | {
            "norm": x.nbytes + quantized.nbytes,
            "w4a16": x.nbytes + w4[0].nbytes + written,
        }


def kernel_rows(setting: Setting, ceiling: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    for shape in kernel_shapes(setting):
        layer = Layer(*shape)
        steps, traffic = layer.steps(setting.device)
        operations = 2 * layer.rows * layer.into * layer.out * math.prod(layer.window)
        for name, seconds in taken_turns(steps, setting, rounds=5).items():
            share = {"bytes": traffic[name] / seconds / ceiling["bytes"]}
            if name not in ("quantize", "norm"):
                share["operations"] = (
                    operations / seconds / ceiling["int8" if name.endswith("a8") else "bf16"]
                )
            yield {"shape": str(layer), "operator": name, "microseconds": 1e6 * seconds, "share": share}


# ---- models ----


def make_cifar(tiny: bool) -> tuple[nn.Module, tuple[int, ...], dict[str, Tensor]]:
    wide = (16, 32, 32, 32) if tiny else (128, 256, 256, 256)
    kinds = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")}
    kinds["up_block_types"] = ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    module = UNet2DModel(
        sample_size=32,
        block_out_channels=wide,
        norm_num_groups=8 if tiny else 32,
        attention_head_dim=None,
        **kinds,
    )
    return module, (3, 8, 8) if tiny else (3, 32, 32), {}


def make_sd15(tiny: bool) -> tuple[nn.Module, tuple[int, ...], dict[str, Tensor]]:
    context = 16 if tiny else 768
    small: dict[str, Any] = {
        "block_out_channels": (16, 32, 32, 32),
        "norm_num_groups": 8,
        "attention_head_dim": 2,
        "layers_per_block": 1,
    }
    module = UNet2DConditionModel(sample_size=64, cross_attention_dim=context, **(small if tiny else {}))
    return module, (4, 8, 8) if tiny else (4, 64, 64), {"encoder_hidden_states": torch.randn(1, 77, context)}


def make_sdxl(tiny: bool) -> tuple[nn.Module, tuple[int, ...], dict[str, Any]]:
    context, pooled, ids = (16, 16, 8) if tiny else (2048, 1280, 256)
    kinds: dict[str, Any] = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    }
    kinds["up_block_types"] = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    sizes: dict[str, Any] = {
        "block_out_channels": (320, 640, 1280),
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
    }
    if tiny:
        sizes = {
            "block_out_channels": (16, 32, 32),
            "attention_head_dim": 2,
            "norm_num_groups": 8,
            "layers_per_block": 1,
        }
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": ids,
        "projection_class_embeddings_input_dim": pooled + 6 * ids,
    }
    module = UNet2DConditionModel(
        sample_size=128, cross_attention_dim=context, use_linear_projection=True, **kinds, **sizes, **added
    )
    conditions = {
        "encoder_hidden_states": torch.randn(1, 77, context),
        "added_cond_kwargs": {"text_embeds": torch.randn(1, pooled)},
    }
    conditions["added_cond_kwargs"]["time_ids"] = torch.rand(1, 6)
    return module, (4, 8, 8) if tiny else (4, 128, 128), conditions


def make_dit(tiny: bool) -> tuple[nn.Module, tuple[int, ...], dict[str, Tensor]]:
    size = (
        {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
        if tiny
        else {"num_attention_heads": 16, "attention_head_dim": 72}
    )
    module = DiTTransformer2DModel(
        sample_size=8 if tiny else 32, out_channels=8, **({} if tiny else {"num_layers": 28}), **size
    )
    return module, (4, 8, 8) if tiny else (4, 32, 32), {"class_labels": torch.tensor([207])}


MAKERS: dict[str, Any] = {
    "dit-xl-2-256": make_dit,
    "sd15-unet": make_sd15,
    "ddpm-cifar10-32": make_cifar,
    "sdxl-unet": make_sdxl,
}
# In the order of their worth, should the time run out.
RUNS = (
    ("dit-xl-2-256", 16),
    ("sd15-unet", 4),
    ("ddpm-cifar10-32", 256),
    ("sdxl-unet", 1),
    ("sd15-unet", 16),
    ("sd15-unet", 1),
)


def made(name: str, batch: int, setting: Setting, dtype: torch.dtype) -> tuple[nn.Module, Inputs]:
    """Return an architecture with random weights and a call of it."""
    torch.manual_seed(0)
    with torch.device(setting.device):
        module, shape, conditions = MAKERS[name](setting.tiny)
        example = Inputs(torch.randn(1, *shape), TIMESTEPS[3:4].to(setting.device), conditions)
    module = module.eval().requires_grad_(False).to(dtype).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for weights in module.parameters():
            # Layers that start as zero would make products of zeros.
            if not bool(weights.any()):
                weights.normal_(std=0.02)
    call = example.resized(batch).map(
        lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor
    )
    return module, Inputs(torch.randn_like(call.sample), call.timestep, call.conditions)


@torch.no_grad()
def quantize(module: nn.Module, call: Inputs, scheme: str) -> nn.Module:
    """Quantize in place: weights to their extremes, inputs to those of one call, a table row for every
    timestep; attention in floating point.
    """
    recipe = tfmq.scheme(scheme)
    activations = replace(recipe.activations, products=False, ranges="min_max")
    recipe = replace(recipe, weights=replace(recipe.weights, ranges="min_max"), activations=activations)
    denoiser, first = Denoiser(module), call.rows(0, 1)
    plan = make_plan(recipe, trace(denoiser, first))
    prepare(module, plan, StepContext(TIMESTEPS).to(call.sample.device), timestep=denoiser.timestep)

    def fit(layer: Any, arguments: tuple[Tensor, ...]) -> None:
        quantizer = layer.input_quantizer
        parts = (
            arguments[0].split(quantizer.segments, dim=quantizer.axis)
            if quantizer.segments
            else arguments[:1]
        )
        grids = [min_max(part.float().reshape(1, -1), quantizer.format) for part in parts]
        scale, zero = (torch.cat([pair[which].reshape(1) for pair in grids]) for which in range(2))
        quantizer.fit(scale.expand_as(quantizer.scale), zero.expand_as(quantizer.zero_point))

    hooks = [layer.register_forward_pre_hook(fit) for layer in calibrated_layers(module).values()]
    denoiser(first)
    for hook in hooks:
        hook.remove()
    pack_all(module)
    return module


# ---- 4: parity ----


def parity(setting: Setting) -> dict[str, Any]:
    """Return PSNR in dB of final latents against the reference backend's, peak to peak of the reference,
    after ten steps in float32.
    """
    found = {}
    for name in ("ddpm-cifar10-32", "sd15-unet"):
        module, call = made(name, 2, setting, torch.float32)
        quantize(module, call, "rtn_w8a8")
        shape, conditions = tuple(call.sample.shape[1:]), call.rows(0, 1).conditions
        sampler = LoopSampler(Denoiser(module), DDIMScheduler(), shape=shape, conditions=conditions)
        drawn = {}
        for backend in ("reference", setting.backend):
            execute(module, backend)
            with torch.no_grad():
                drawn[backend] = sampler.run(range(2), steps=2 if setting.tiny else 10, seed=0).double().cpu()
        exact = drawn["reference"]
        error = float((exact - drawn[setting.backend]).square().mean())
        found[name] = None if error == 0 else 10 * math.log10(float(exact.max() - exact.min()) ** 2 / error)
        note(f"parity of {name}: {'equal' if error == 0 else f'{found[name]:.1f} dB'}")
        release_memory()
    return found


# ---- 5: models ----


def allocated(setting: Setting) -> int:
    return torch.cuda.memory_allocated() if setting.cuda else 0


def release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


Prepared = tuple[Callable[[Inputs], Any], nn.Module]


def bf16(base: nn.Module, call: Inputs, setting: Setting) -> Prepared:
    module = copy.deepcopy(base)
    return Denoiser(setting.compiled(module)), module


def ours(scheme: str, options: Options) -> Callable[[nn.Module, Inputs, Setting], Prepared]:
    def prepare_ours(base: nn.Module, call: Inputs, setting: Setting) -> Prepared:
        module = quantize(copy.deepcopy(base), call, scheme)
        execute(module, setting.backend, options=options)
        return Denoiser(module), module

    return prepare_ours


def torchao_int8(base: nn.Module, call: Inputs, setting: Setting) -> Prepared:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    module = copy.deepcopy(base)
    quantize_(module, Int8DynamicActivationInt8WeightConfig())
    return Denoiser(setting.compiled(module)), module


def sdnq_int8(base: nn.Module, call: Inputs, setting: Setting) -> Prepared:
    import sdnq

    products = {"use_quantized_matmul": True, "use_quantized_matmul_conv": True}
    module = sdnq.sdnq_post_load_quant(
        copy.deepcopy(base), weights_dtype="int8", quant_conv=True, torch_dtype=torch.bfloat16, **products
    )
    return Denoiser(module), module


VARIANTS: dict[str, tuple[str | None, Callable[[nn.Module, Inputs, Setting], Prepared]]] = {
    "bf16-compile": (None, bf16),
    "tfmq-w8a8-compile": (None, ours("rtn_w8a8", Options(compile=True))),
    "tfmq-w8a8": (None, ours("rtn_w8a8", Options())),
    "tfmq-w4a8-packed": (None, ours("rtn_w4a8", Options(weights="packed"))),
    "torchao-int8-compile": ("torchao", torchao_int8),
    "sdnq-int8": ("sdnq", sdnq_int8),
}


@contextmanager
def weighed(setting: Setting, row: dict[str, Any]) -> Iterator[None]:
    before = allocated(setting)
    yield
    release_memory()
    row["weights_bytes"] = allocated(setting) - before


def model_row(name: str, batch: int, setting: Setting) -> dict[str, Any]:
    """Return times and memory of every variant for one model and batch."""
    base, call = made(name, batch, setting, torch.bfloat16)
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], object]] = {}
    with torch.no_grad():
        for variant, (needs, build) in VARIANTS.items():
            if needs and importlib.util.find_spec(needs) is None:
                rows[variant] = {"skipped": f"{needs} is not installed"}
                continue
            row: dict[str, Any] = {}
            began = time.perf_counter()
            try:
                with weighed(setting, row):
                    step, _ = build(base, call, setting)
                if setting.cuda:
                    torch.cuda.reset_peak_memory_stats()
                resting = allocated(setting)
                step(call)
                row["step_bytes"] = torch.cuda.max_memory_allocated() - resting if setting.cuda else 0
            except Exception as error:
                # Another library's failure is a result, and no reason to lose the others.
                rows[variant] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
                note(f"{name} {variant}: {rows[variant]['failed']}")
                continue
            row["prepare_s"] = time.perf_counter() - began
            rows[variant] = row
            steps[variant] = partial(step, call)
            note(f"{name} batch {batch}: {variant} ready after {row['prepare_s']:.0f} s")
        for variant, seconds in taken_turns(steps, setting).items():
            rows[variant]["milliseconds"] = 1e3 * seconds
    floor = rows["bf16-compile"]
    for row in rows.values():
        if "milliseconds" in row and "milliseconds" in floor:
            row["speedup"] = floor["milliseconds"] / row["milliseconds"]
            row["memory"] = row["weights_bytes"] / floor["weights_bytes"] if floor["weights_bytes"] else None
    torch._dynamo.reset()
    release_memory()
    return rows


# ---- all of it ----


def parts(setting: Setting, result: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield name and work of each part, in order."""
    yield "checks", lambda: checked(setting)
    yield "ceilings", lambda: ceilings(setting)
    yield "kernels", lambda: list(kernel_rows(setting, result.get("ceilings") or ceilings(setting)))
    for name, batch in RUNS:
        yield (
            f"model {name} batch {1 if setting.tiny else batch}",
            lambda name=name, batch=batch: model_row(name, 1 if setting.tiny else batch, setting),
        )  # type: ignore[misc]
        if name == RUNS[0][0]:
            yield "parity", lambda: parity(setting)


def machine(setting: Setting) -> dict[str, Any]:
    names = ("torch", "triton", "diffusers", "torchao", "sdnq")
    versions = {
        name: getattr(sys.modules.get(name), "__version__", None)
        for name in names
        if importlib.util.find_spec(name)
    }
    return {
        "device": torch.cuda.get_device_name() if setting.cuda else "cpu",
        "versions": versions,
        "tfmq": tfmq.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="JSON file; what it holds already is not measured again"
    )
    parser.add_argument("--seconds", type=float, default=330, help="begin nothing after so many")
    parser.add_argument("--only", default="", help="only parts whose name contains this")
    parser.add_argument("--dry-run", action="store_true", help="tiny models and no kernels, on any machine")
    options = parser.parse_args()
    began = time.monotonic()
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("error: torch finds no CUDA device; --dry-run goes through the script without one")
    setting = Setting(
        "cpu" if options.dry_run else "cuda",
        "operators" if options.dry_run else "cuda",
        options.dry_run,
        began + options.seconds,
    )
    if setting.cuda:
        import tfmq.kernels.gpu.register  # noqa: F401 - the checks call operators before any model does
    result: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}
    for name, work in parts(setting, result):
        if name in result or options.only not in name:
            continue
        if time.monotonic() > setting.until:
            note(f"not measured for want of time: {name}; call again with the same output")
            continue
        note(f"{time.monotonic() - began:.0f} s: {name}")
        result[name] = work()
        result["machine"] = machine(setting)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    if not all(entry["ok"] for entry in result.get("checks", {}).values()):
        raise SystemExit("error: some operators are not as defined; see `checks`")


if __name__ == "__main__":
    main()
