"""Which layers are spared: those with too large an error, then the worst until the output is near enough."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tfmq.calibration.ranges import collect, fit_site
from tfmq.calibration.spared import full_outputs, layer_errors, network_error, spare
from tfmq.models.denoiser import Inputs, Timeless
from tfmq.models.trace import trace
from tfmq.nn.plan import activation_sites, calibrated_layers, prepare
from tfmq.nn.swap import precision
from tfmq.quantizers.steps import StepContext
from tfmq.recipes.networks import image_w8a8
from tfmq.recipes.plan import make_plan


class Outliers(nn.Module):
    """Three convolutions; what the last one reads has a channel a thousand times as large as the others,
    which it does not heed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Conv2d(3, 8, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.exit = nn.Conv2d(8, 3, 1)
        with torch.no_grad():
            self.middle.weight[0] *= 1000
            self.exit.weight[:, 0] = 0

    def forward(self, latent: Tensor) -> Tensor:
        hidden: Tensor = self.exit(self.middle(torch.tanh(self.entry(latent))))
        return hidden


def quantized() -> tuple[Timeless, list[Inputs]]:
    """Return the network with fitted grids, and calls of it."""
    network = Timeless(Outliers().eval().requires_grad_(False))
    calls = [Inputs(torch.randn(1, 3, 8, 8), torch.zeros(1)) for _ in range(4)]
    steps = StepContext(torch.zeros(1))
    prepare(network.module, make_plan(image_w8a8(), trace(network, calls[0])), steps, timestep=None)
    sites = activation_sites(network.module)
    with precision(network.module, weights="full", inputs="quantized"):
        seen = collect(network, sites, steps, calls, calls=len(calls), advance=lambda amount=1: None)
    for name, site in sites.items():
        fit_site(site, seen[name], method="min_max")
    return network, calls


def test_the_layer_that_reads_an_outlier_has_the_largest_error() -> None:
    network, calls = quantized()
    errors = layer_errors(network, calibrated_layers(network.module), calls)
    assert errors["exit"] > 100 * max(errors["entry"], errors["middle"])
    assert (
        0.1 * errors["exit"]
        < network_error(network, calls, full_outputs(network, calls))
        < 10 * errors["exit"]
    )


def test_an_error_is_that_of_the_output_itself() -> None:
    network, calls = quantized()
    layer = calibrated_layers(network.module)["entry"]
    x = torch.cat([call.sample for call in calls])
    assert layer.input_quantizer is not None
    exact = nn.functional.conv2d(x, layer.weight, padding=1)
    found = nn.functional.conv2d(layer.input_quantizer(x), layer.quantized_weight(), padding=1)
    expected = float((found - exact).square().sum() / exact.square().sum())
    assert abs(layer_errors(network, {"entry": layer}, calls)["entry"] / expected - 1) < 1e-4


ERRORS = {"a": 0.5, "b": 1e-4, "c": 1e-2, "d": 0.0}


def test_layers_beyond_their_bound_are_spared_and_then_the_worst_until_the_output_is_near() -> None:
    asked: list[Sequence[str]] = []

    def measure(names: Sequence[str]) -> float:
        asked.append(tuple(names))
        return 1.0 - 0.25 * sum(map(len, asked))

    found = spare(ERRORS, layer=0.1, output=0.5, measure=measure, rounds=4)
    assert asked == [(), ("a",), ("c",)]
    assert found.names == ("a", "c") and (found.before, found.after) == (1.0, 0.5)


def test_nothing_is_spared_within_the_bounds() -> None:
    found = spare(ERRORS, layer=1.0, output=0.5, measure=lambda names: 0.4)
    assert found.names == () and found.before == found.after == 0.4


def test_all_are_spared_where_no_output_is_near_enough() -> None:
    found = spare(ERRORS, layer=1.0, output=0.5, measure=lambda names: float("inf"), rounds=2)
    assert found.names == ("a", "c", "b", "d")
