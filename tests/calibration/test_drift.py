from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tfmq.calibration.drift import GridExtremes, LayerDrift, complaint, drift, extremes
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.nn.operation import operation_of
from tfmq.nn.packed_layer import PackedLayer
from tfmq.numerics.grids import IntegerFormat
from tfmq.quantizers.activation import ActivationQuantizer
from tfmq.quantizers.steps import StepContext

TIMESTEPS = torch.tensor([2.0, 300.0])


def quantizer(
    *, per_step: bool, segments: tuple[int, ...] = (), axis: int = 1
) -> tuple[StepContext, ActivationQuantizer]:
    """A quantizer whose every grid covers -1 to 1.55."""
    steps = StepContext(TIMESTEPS)
    made = ActivationQuantizer(
        IntegerFormat(8), steps=steps if per_step else None, segments=segments, axis=axis
    )
    made.fit(torch.full(made.scale.shape, 0.01), torch.full(made.scale.shape, 100.0))
    return steps, made


def reading(source: nn.Conv2d, quantizer: ActivationQuantizer) -> PackedLayer:
    """A layer whose input is quantized so."""
    return PackedLayer(
        operation_of(source),
        IntegerFormat(8),
        tuple(source.weight.shape),
        bias=None,
        input_quantizer=quantizer,
    )


@pytest.mark.parametrize("per_step", [True, False])
def test_extremes_are_those_of_the_inputs_at_the_nearest_step(
    build: Callable[..., Any], per_step: bool
) -> None:
    denoiser, _ = build("plain")
    steps, exit_quantizer = quantizer(per_step=per_step, segments=(8, 8))
    inputs: list[Tensor] = []
    handle = denoiser.module.exit.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with (
        extremes(denoiser, {"exit": reading(denoiser.module.exit, exit_quantizer)}, steps) as seen,
        torch.no_grad(),
    ):
        for timestep in ([2, 290], [310, 1]):
            denoiser(Inputs(torch.randn(2, 2, 8, 8), torch.tensor(timestep)))
    handle.remove()
    first, second = inputs
    at = (
        [torch.stack([first[0], second[1]]), torch.stack([first[1], second[0]])]
        if per_step
        else [torch.cat(inputs)]
    )
    for step, values in enumerate(at):
        for segment, part in enumerate(values.split(8, dim=1)):
            assert float(seen["exit"].low[step, segment]) == min(0.0, float(part.min()))
            assert float(seen["exit"].high[step, segment]) == max(0.0, float(part.max()))


def ends(low: list[float], high: list[float]) -> dict[str, GridExtremes]:
    return {"layer": GridExtremes(torch.tensor(low)[:, None], torch.tensor(high)[:, None])}


@pytest.mark.parametrize(
    ("base", "changed", "excess", "timestep"),
    [
        (([-1.0, 0.0], [1.0, 1.0]), ([-1.0, 0.0], [1.55, 1.0]), None, None),  # to the very end of the range
        (([-1.0, 0.0], [1.0, 1.0]), ([-1.0, 0.0], [1.0, 2.825]), 0.5, 300.0),
        (([-1.0, 0.0], [1.0, 1.0]), ([-3.55, 0.0], [1.0, 1.8]), 1.0, 2.0),
        (
            ([-3.55, 0.0], [1.0, 1.0]),
            ([-3.55, 0.0], [1.0, 1.0]),
            None,
            None,
        ),  # cut off by calibration already
        (([-3.55, 0.0], [1.0, 1.0]), ([-6.10, 0.0], [1.0, 1.0]), 1.0, 2.0),
    ],
)
def test_the_drift_is_what_lies_beyond_range_and_base_in_widths(
    base: Any, changed: Any, excess: float | None, timestep: float | None
) -> None:
    steps, layer = quantizer(per_step=True)
    found = drift({"layer": layer}, steps, ends(*base), ends(*changed))
    assert len(found) == (excess is not None)
    for entry in found:
        assert (
            entry.name == "layer"
            and entry.excess == pytest.approx(excess, rel=1e-5)
            and entry.timestep == timestep
        )


def test_the_furthest_comes_first_and_a_static_range_has_no_timestep() -> None:
    steps, layer = quantizer(per_step=False)
    base = {name: GridExtremes(torch.zeros(1, 1), torch.zeros(1, 1)) for name in ("near", "far")}
    changed = {
        "near": GridExtremes(torch.zeros(1, 1), torch.full((1, 1), 2.0)),
        "far": GridExtremes(torch.full((1, 1), -9.0), torch.zeros(1, 1)),
    }
    found = drift({"near": layer, "far": layer}, steps, base, changed)
    assert [entry.name for entry in found] == ["far", "near"] and found[0].timestep is None


def test_the_complaint_has_the_figures_and_is_silent_about_little() -> None:
    assert complaint([]) == "" and complaint([LayerDrift("a", 0.04, 1.0)]) == ""
    text = complaint(
        [
            LayerDrift(name, excess, 1.0)
            for name, excess in (("a", 0.5), ("b", 0.25), ("c", 0.2), ("d", 0.1), ("e", 0.01))
        ]
    )
    assert text == (
        "leaves the calibrated range of 4 layers, furthest a by 50% of its "
        "range, b by 25% of its range, c by 20% of its range"
    )


def test_hooks_are_gone_afterwards(build: Callable[..., Any]) -> None:
    denoiser: Denoiser = build("plain")[0]
    steps, layer = quantizer(per_step=True)
    with extremes(denoiser, {"entry": reading(denoiser.module.entry, layer)}, steps):
        pass
    assert not denoiser.module._forward_pre_hooks and not denoiser.module.entry._forward_pre_hooks


@torch.no_grad()
def test_a_rescaled_input_is_held_against_the_range_it_is_quantized_in(build: Callable[..., Any]) -> None:
    denoiser: Denoiser = build("plain")[0]
    steps, exit_quantizer = quantizer(per_step=False)
    plain, rescaled = (reading(denoiser.module.exit, exit_quantizer) for _ in range(2))
    rescaled.factor = torch.full((denoiser.module.exit.in_channels,), 4.0)
    found = []
    for layer in (plain, rescaled):
        torch.manual_seed(0)
        with extremes(denoiser, {"exit": layer}, steps) as seen:
            denoiser(Inputs(torch.randn(2, 2, 8, 8), torch.tensor([2, 290])))
        found.append(seen["exit"].high)
    assert torch.equal(found[1], 4 * found[0]) and float(found[0]) > 0
