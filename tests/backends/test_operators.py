"""The cuda backend's plumbing without a GPU: its operators by their definitions, through whole models."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import tfmq
from tfmq.backends import fusion
from tfmq.backends.auto import candidates
from tfmq.backends.backend import Options, release
from tfmq.backends.execution import execute
from tfmq.backends.operators import Program, attach_operators, build
from tfmq.kernels.device import OperatorKernel, WeightOnlyKernel
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.sampler import LoopSampler
from tfmq.nn.packed_layer import PackedLayer
from tfmq.nn.plan import packed_layers
from tfmq.recipes.recipe import Activations, Calibration
from tfmq.storage.digest import tensor_digest

STEPS = 3
NAMES = ("unet", "dit", "conditional")
Made = Callable[[str], LoopSampler]


@pytest.fixture(scope="module")
def made(rounded: Callable[..., LoopSampler]) -> Made:
    """Return a function that gives a sampler of a W4A8 model, in simulated arithmetic, without any of its
    kernels.
    """
    kept: dict[str, LoopSampler] = {}

    def give(name: str) -> LoopSampler:
        if name not in kept:
            kept[name] = rounded(name)
        execute(kept[name].denoiser.module, "simulated")
        return kept[name]

    return give


def example(sampler: LoopSampler, batch: int = 2) -> Inputs:
    first = sampler.example()
    conditions = {name: value.expand(batch, *value.shape[1:]) for name, value in first.conditions.items()}
    steps = sampler.denoiser.module.tfmq_steps.timesteps
    noise = torch.randn(batch, *first.sample.shape[1:], generator=torch.Generator().manual_seed(0))
    return Inputs(noise, steps[[0, 2]][:batch].long(), conditions)


@torch.no_grad()
def outputs(module: nn.Module, inputs: Inputs) -> Tensor:
    return Denoiser(module)(inputs)


def peak_signal_to_noise(exact: Tensor, other: Tensor) -> float:
    """Return the PSNR in dB of images or latents whose peak is that of `exact`; infinite where they are
    equal.
    """
    error = (exact.double() - other.double()).square().mean()
    return float(10 * torch.log10(exact.double().abs().max() ** 2 / error))


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_the_images_are_the_references(made: Made, name: str) -> None:
    sampler = made(name)
    drawn = {}
    for backend in ("reference", "operators"):
        execute(sampler.denoiser.module, backend)
        drawn[backend] = sampler.run(range(2), steps=STEPS, seed=0)
    assert peak_signal_to_noise(drawn["reference"], drawn["operators"]) >= 40


@pytest.mark.parametrize("name", NAMES)
def test_fused_graphs_compute_the_same_bits(made: Made, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, counts = made(name), []

    def counted(program: torch.fx.GraphModule) -> torch.fx.GraphModule:
        before = len(calls(program, "tfmq.quantize_codes"))
        program = fuse(program)
        kinds = ("tfmq.quantize_codes", "tfmq.group_norm_codes", "tfmq.layer_norm_codes")
        counts.append((before, *(len(calls(program, kind)) for kind in kinds)))
        return program

    fuse = fusion.fuse
    monkeypatch.setattr(fusion, "fuse", counted)
    module, inputs = sampler.denoiser.module, example(sampler)
    execute(module, "operators")
    expected = outputs(module, inputs)
    execute(module, "operators", options=Options(compile=True))
    assert torch.equal(outputs(module, inputs), expected)
    ((before, alone, *normed),) = counts
    assert before > alone + sum(normed) and sum(normed) > 0


def test_a_fused_model_compiles_as_one_graph_for_all_timesteps(made: Made) -> None:
    sampler = made("dit")
    module, inputs = copy.deepcopy(sampler.denoiser.module), example(sampler)
    del module.transformer_blocks[1:]
    execute(module, "operators")
    steps = module.tfmq_steps.timesteps
    others = [
        Inputs(inputs.sample, steps[rows].long(), inputs.conditions) for rows in ([0, 2], [1, 1], [2, 0])
    ]
    expected = [outputs(module, other) for other in others]
    programs = []

    def compiled(program: Program) -> Program:
        programs.append(program)
        return torch.compile(program, fullgraph=True, dynamic=False, backend="aot_eager")

    attach_operators(module, Options(compile=True), build(compiled))
    assert all(
        torch.equal(outputs(module, other), exact) for other, exact in zip(others, expected, strict=True)
    )
    assert len(programs) == 1


def calls(program: torch.fx.GraphModule, name: str) -> list[torch.fx.Node]:
    return [node for node in program.graph.nodes if str(node.target).startswith(name)]


def test_packed_weights_take_half_and_compute_the_same(made: Made) -> None:
    sampler = made("unet")
    module, inputs = sampler.denoiser.module, example(sampler)
    sizes, results = {}, {}
    for weights in ("unpacked", "packed"):
        execute(module, "operators", options=Options(weights=weights))  # type: ignore[arg-type]
        results[weights] = outputs(module, inputs)
        kernels = [layer.kernel for layer in packed_layers(module).values()]
        sizes[weights] = sum(kernel.weight.nbytes for kernel in kernels if isinstance(kernel, OperatorKernel))
    assert torch.equal(results["packed"], results["unpacked"])
    assert sizes["packed"] < 0.6 * sizes["unpacked"]


def test_weight_only_linear_layers_have_a_kernel_too(sampler: Callable[..., LoopSampler]) -> None:
    drawn = sampler("dit")
    recipe = replace(
        tfmq.scheme("rtn_w4a8"),
        activations=Activations(bits=None),
        rules=(),
        calibration=Calibration(samples=1, steps=STEPS),
    )
    tfmq.quantize(drawn, recipe)
    module, inputs = drawn.denoiser.module, example(drawn)
    expected = outputs(module, inputs)
    coverage = execute(module, "operators", options=Options(weights="packed"))
    assert not coverage.integer and set(coverage.floating.values()) == {"its input is not quantized"}
    assert any(isinstance(layer.kernel, WeightOnlyKernel) for layer in packed_layers(module).values())
    torch.testing.assert_close(outputs(module, inputs), expected, rtol=1e-4, atol=1e-4)


def test_kernels_follow_the_model_and_packed_codes_stay(made: Made) -> None:
    """Offloading moves a model with `.to`: what a kernel computes with goes along, what only a checkpoint
    needs does not.
    """
    module = copy.deepcopy(made("unet").denoiser.module)
    digest = tensor_digest(module.state_dict())
    execute(module, "operators")
    assert tensor_digest(module.state_dict()) == digest
    module.to("meta")
    layers = packed_layers(module).values()
    assert layers and all(buffer.is_meta for layer in layers for buffer in layer.kernel.buffers())  # type: ignore[union-attr]
    assert all(layer.scale.is_meta and not layer.packed.is_meta for layer in layers)


def test_group_offloading_moves_what_kernels_compute_with(made: Made) -> None:
    from diffusers.hooks import apply_group_offloading

    sampler = made("unet")
    module, inputs = copy.deepcopy(sampler.denoiser.module), example(sampler)
    execute(module, "operators")
    expected = outputs(module, inputs)
    here = torch.device("cpu")
    apply_group_offloading(module, onload_device=here, offload_device=here, offload_type="leaf_level")
    assert torch.equal(outputs(module, inputs), expected)


def test_release_brings_packed_codes_back(made: Made) -> None:
    module = copy.deepcopy(made("unet").denoiser.module)
    execute(module, "operators")
    release(module)
    module.to("meta")
    assert all(
        layer.packed.is_meta and layer.kernel is None
        for layer in module.modules()
        if isinstance(layer, PackedLayer)
    )


def test_another_kind_of_kernel_takes_the_place_of_a_module(made: Made) -> None:
    sampler = made("unet")
    module, inputs = sampler.denoiser.module, example(sampler)
    results = []
    for backend in ("reference", "operators", "reference"):
        execute(module, backend)
        results.append(outputs(module, inputs))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_cuda_says_what_else_there_is(made: Made) -> None:
    pytest.importorskip("triton")
    with pytest.raises(
        ValueError,
        match=(
            'the backend cuda needs a CUDA device, and this torch finds none; "operators" computes the same'
        ),
    ):
        execute(made("unet").denoiser.module, "cuda")


def test_auto_tries_cuda_where_the_model_is(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    module, there = made("unet").denoiser.module, torch.device("cuda")
    monkeypatch.setattr("tfmq.backends.operators.Cuda.missing", lambda self: "")
    assert list(candidates(module, there, Options(), judged=False)[0]) == ["float", "cuda"]
    assert "cuda" not in candidates(module, torch.device("cpu"), Options(), judged=False)[0]
    monkeypatch.setattr("tfmq.backends.operators.Cuda.missing", lambda self: "a device")
    assert list(candidates(module, there, Options(), judged=True)[0]) == ["simulated"]
