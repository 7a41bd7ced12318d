"""Branches chosen for planted layers: a direction that stands out has to be found, and where none does no
layer has a branch.
"""

from math import log10

import pytest
import torch
from torch import Tensor, nn

from tfmq.calibration.rescaling import Reader, Seen, best_transform, observed, output_error
from tfmq.calibration.splitting import WORTH, Split, best_split, branch_of, halves, pays
from tfmq.nn.branch import BranchType
from tfmq.nn.layer import CalibratedLayer, pack
from tfmq.nn.operation import operation_of, weight_of
from tfmq.nn.transform import Transform
from tfmq.numerics.grids import IntegerFormat
from tfmq.numerics.low_rank import SPLITTERS
from tfmq.quantizers.dynamic import DynamicQuantizer
from tfmq.quantizers.input import InputQuantizer
from tfmq.quantizers.steps import StepContext
from tfmq.quantizers.weight import fit_grid

STEPS = StepContext(torch.tensor([1.0, 5.0, 9.0]))
CHANNELS, OUTLIER, SIZE = 64, 3, 16.0


def layer_of(source: nn.Module, quantizer: InputQuantizer | None = None) -> CalibratedLayer:
    """A layer of 4-bit weights."""
    operation = operation_of(source)
    assert operation is not None
    grid = fit_grid(weight_of(source).detach(), IntegerFormat(4), method="min_max")
    return CalibratedLayer(source, operation, grid, quantizer)


def read(layer: CalibratedLayer, inputs: list[Tensor]) -> Seen:
    with observed({"layer": layer}, STEPS, len(inputs), most=1024) as seen:
        for number, x in enumerate(inputs):
            with STEPS.at_bins(torch.tensor([number % 3])):
                layer(x)
    return seen["layer"]


def split(
    layer: CalibratedLayer,
    seen: Seen,
    *,
    rank: int = 1,
    splitters: tuple[str, ...] = ("weighted", "plain"),
    equalizers: tuple[str, ...] = (),
    dtype: BranchType = "float16",
) -> Split | None:
    reader = Reader(layer, seen, "min_max")
    return best_split(reader, equalizers=equalizers, splitters=splitters, rank=rank, dtype=dtype)


@torch.no_grad()
def error(layer: CalibratedLayer, found: Split, inputs: list[Tensor], dtype: BranchType = "float16") -> float:
    """Return the squared error of a layer's output, packed as it was found, on other inputs."""
    exact = [layer(x) for x in inputs]
    if found.transform != Transform():
        layer.transform(found.transform, ranges="min_max")
    if found.factors is not None:
        layer.split(branch_of(layer, found.factors, dtype), ranges="min_max")
    packed = pack(layer)
    return sum(float((packed(x) - y).double().square().sum()) for x, y in zip(inputs, exact, strict=True))


def planted() -> nn.Linear:
    """Each row is plus or minus 16 times the same signs, beside values of -1 to 1."""
    source = nn.Linear(CHANNELS, 48, bias=False)
    with torch.no_grad():
        direction = torch.randn(48, 1).sign() @ torch.randn(1, CHANNELS).sign()
        source.weight.copy_(SIZE * direction + 2 * torch.rand(48, CHANNELS) - 1)
    return source


@pytest.mark.parametrize("name", SPLITTERS)
def test_a_planted_direction_goes_into_the_branch(name: str) -> None:
    """Codes have to cover -17 to 17, and then little more than -1 to 1: at most 1.6, with what the direction
    is off by (see the test of the factors). Their error is that of the range, 20 dB less.
    """
    source = planted()
    inputs, others = ([torch.randn(4, 32, CHANNELS) for _ in range(count)] for count in (8, 2))
    layer = layer_of(source)
    found = split(layer, read(layer, inputs), splitters=(name,))
    assert found is not None and found.factors is not None and found.factors.down.shape == (1, 1, CHANNELS)
    gain = error(layer_of(source), Split(), others) / error(layer_of(source), found, others)
    assert 10 * log10(gain) > 20 * log10(17 / 1.6)


@pytest.mark.parametrize("name", ["convolution", "groups", "transposed"])
def test_convolutions_have_branches_too(name: str) -> None:
    options = {"groups": 2} if name == "groups" else {}
    source = (nn.ConvTranspose2d if name == "transposed" else nn.Conv2d)(16, 24, 3, padding=1, **options)
    with torch.no_grad():
        source.weight.copy_(torch.rand_like(source.weight) - 0.5)
        source.weight += 8 * torch.randn(len(source.weight), 1, 1, 1).sign()
    inputs, others = ([torch.randn(2, 16, 8, 8) for _ in range(count)] for count in (6, 2))
    layer = layer_of(source)
    found = split(layer, read(layer, inputs), rank=2)
    assert found is not None
    assert error(layer_of(source), found, others) < error(layer_of(source), Split(), others) / 10


def test_where_no_direction_stands_out_no_branch_pays() -> None:
    """All singular values of an orthogonal matrix are the same: rank 2 of 64 takes away 1/32 of the energy,
    less than it has to.
    """
    source = nn.Linear(CHANNELS, CHANNELS)
    nn.init.orthogonal_(source.weight)
    layer = layer_of(source, DynamicQuantizer(IntegerFormat(4)))
    seen = read(layer, [torch.randn(4, 32, CHANNELS) for _ in range(6)])
    assert WORTH > 1 / 32 and split(layer, seen, rank=2) is None


def test_a_branch_as_large_as_the_weight_pays_nothing() -> None:
    layer = layer_of(planted())
    assert pays(layer, 27) and not pays(layer, 28) and not pays(layer, 0)
    assert split(layer, read(layer, [torch.randn(4, 32, CHANNELS)]), rank=28) is None


def test_factors_are_judged_on_inputs_that_they_were_not_fitted_to() -> None:
    """Where the calls that decide are empty no branch gains, however much it would on those that fit."""
    fitting, deciding = halves([torch.zeros(1, 3, 2), torch.zeros(1, 2, 2), torch.zeros(1, 1, 2)])
    assert fitting.tolist() == [0, 1, 2, 5] and deciding.tolist() == [3, 4]
    assert [part.tolist() for part in halves([torch.zeros(1, 4, 2)])] == [[0, 1], [2, 3]]
    inputs = [torch.randn(4, 32, CHANNELS) for _ in range(6)]
    layer = layer_of(planted())
    for empty, gains in ((1, False), (0, True)):
        calls = [x * (number % 2 != empty) for number, x in enumerate(inputs)]
        assert (split(layer, read(layer, calls)) is not None) == gains


def difficult() -> nn.Linear:
    """A layer whose fourth channel of the input is 64 times as large as the others, and counts no less."""
    source = nn.Linear(CHANNELS, 48, bias=False)
    with torch.no_grad():
        source.weight.copy_(2 * torch.rand(48, CHANNELS) - 1)
    return source


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_rescaled_outlier_needs_the_branch(dtype: BranchType) -> None:
    """A factor takes the outlier from the range of the input and gives it to the weight, where it is a column
    of rank one: SVDQuant's figure 1. Each alone leaves one of the two ranges 64 times as wide, as a square
    root they share it, which is 18 dB on either side; together they leave none, if the branch reads more than
    four bits.
    """
    source = difficult()

    def outlying(count: int) -> list[Tensor]:
        found = [torch.randn(4, 32, CHANNELS) for _ in range(count)]
        for x in found:
            x[..., OUTLIER] *= 64.0
        return found

    inputs, others = outlying(8), outlying(2)
    errors = {}
    for name in ("neither", "rescaled", "branch", "both"):
        layer = layer_of(source, DynamicQuantizer(IntegerFormat(4)))
        seen = read(layer, inputs)
        equalizers = ("ranges",) if name in ("rescaled", "both") else ()
        alone = Split(best_transform([Reader(layer, seen, "min_max")], equalizers=equalizers))
        found = split(layer, seen, equalizers=equalizers, dtype=dtype) if name in ("branch", "both") else None
        errors[name] = error(layer, found or alone, others, dtype)
    assert errors["rescaled"] < errors["neither"]
    if dtype == "float16":
        assert errors["both"] < min(errors["rescaled"], errors["branch"]) / 10
    else:
        # Codes of four bits are what the branch reads here: no more than they know can be had of it.
        assert errors["both"] <= errors["rescaled"] * 1.01


@torch.no_grad()
def test_the_error_of_no_branch_is_that_of_the_transform() -> None:
    layer = layer_of(difficult(), DynamicQuantizer(IntegerFormat(4)))
    inputs = [torch.randn(4, 32, CHANNELS)]
    seen = read(layer, inputs)
    found = error(layer, Split(), [seen.rows[0][0]])
    layer.weight_precision = layer.input_precision = "full"
    assert output_error(layer, seen, Transform(), ranges="min_max") == pytest.approx(found, rel=1e-4)
