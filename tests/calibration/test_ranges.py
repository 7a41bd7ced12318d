from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tfmq.calibration import ranges as module_under_test
from tfmq.calibration.ranges import SiteStatistics, collect, fit_site, observed
from tfmq.calibration.trajectory import CalibrationError
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.trace import trace
from tfmq.nn.plan import activation_sites, prepare
from tfmq.nn.swap import precision
from tfmq.numerics.affine import fake_quantize
from tfmq.numerics.grids import IntegerFormat
from tfmq.numerics.ranges import from_range, search
from tfmq.quantizers.activation import ActivationQuantizer
from tfmq.quantizers.steps import StepContext
from tfmq.recipes.plan import make_plan
from tfmq.recipes.recipe import Activations, Recipe

TIMESTEPS = torch.tensor([2.0, 300.0, 800.0])


def batches(channels: int, *, mixed: bool) -> list[Inputs]:
    """Two calls that see every timestep twice, of very different spread."""
    order = [[0, 1, 2, 0], [2, 1, 1, 2]] if mixed else [[0] * 4, [1] * 4, [2] * 4, [0] * 4]
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.3, 1.0, 4.0])
    return [
        Inputs(
            torch.randn(4, channels, 8, 8, generator=generator) * spread[steps].view(4, 1, 1, 1),
            TIMESTEPS[steps].long(),
        )
        for steps in map(torch.tensor, order)
    ]


def prepared(
    build: Callable[..., Any], name: str, **activations: Any
) -> tuple[Denoiser, StepContext, dict[str, ActivationQuantizer]]:
    denoiser, example = build(name)
    steps = StepContext(TIMESTEPS)
    plan = make_plan(Recipe(name="r", activations=Activations(**activations)), trace(denoiser, example))
    prepare(denoiser.module, plan, steps, timestep=denoiser.timestep)
    return denoiser, steps, activation_sites(denoiser.module)


def statistics(
    denoiser: Denoiser, sites: dict[str, ActivationQuantizer], steps: StepContext, data: list[Inputs]
) -> dict[str, SiteStatistics]:
    with precision(denoiser.module, weights="full", inputs="quantized"):
        return collect(denoiser, sites, steps, data, calls=len(data), advance=lambda amount=1: None)


def seen(
    denoiser: Denoiser, sites: dict[str, ActivationQuantizer], data: list[Inputs]
) -> dict[str, list[tuple[float, Tensor]]]:
    """Every `(timestep, input)` of every site in the stock model, by hooks of the test's own."""
    log: dict[str, list[tuple[float, Tensor]]] = {name: [] for name in sites}
    current: list[Inputs] = []
    handles = []
    for name, site in sites.items():

        def hook(_: Any, args: Any, name: str = name) -> None:
            folded = args[0].shape[0] // len(current[-1])
            for row, value in enumerate(args[0]):
                log[name].append((float(current[-1].timestep[row // folded]), value.clone()))

        handles.append(site.register_forward_pre_hook(hook))
    with (
        observed(sites, denoiser.module.tfmq_steps, 1),
        precision(denoiser.module, weights="full", inputs="quantized"),
        torch.no_grad(),
    ):
        for inputs in data:
            current.append(inputs)
            denoiser(inputs)
    for handle in handles:
        handle.remove()
    return log


@pytest.mark.parametrize("mixed", [False, True])
def test_extremes_are_exact_for_each_step_and_segment(build: Callable[..., Any], mixed: bool) -> None:
    denoiser, steps, sites = prepared(build, "plain")
    data = batches(2, mixed=mixed)
    found, inputs = statistics(denoiser, sites, steps, data), seen(denoiser, sites, data)
    for name, site in sites.items():
        fit_site(site, found[name], method="min_max")
        for index, timestep in enumerate(TIMESTEPS.tolist()):
            values = [value for at, value in inputs[name] if at == timestep]
            for segment in range(site.scale.shape[1]):
                parts = [
                    value.split(site.segments, dim=0)[segment] if site.segments else value for value in values
                ]
                low, high = (torch.stack([bound(part) for part in parts]) for bound in (torch.min, torch.max))
                scale, zero = from_range(low.min()[None], high.max()[None], site.format)
                assert torch.equal(site.scale[index, segment], scale[0]) and int(
                    site.zero_point[index, segment]
                ) == int(zero)


@pytest.mark.parametrize("method", ["search", "min_max"])
def test_shared_zero_points_cover_what_those_of_each_step_do(build: Callable[..., Any], method: Any) -> None:
    denoiser, steps, sites = prepared(build, "plain")
    found = statistics(denoiser, sites, steps, batches(2, mixed=False))
    for name, site in sites.items():
        fit_site(site, found[name], method=method)
        scale, zero, top = site.scale.clone(), site.zero_point.float(), site.format.levels - 1
        fit_site(site, found[name], method=method, shared=range(site.format.levels))
        assert (site.zero_point == site.zero_point[:1]).all()
        chosen = site.zero_point.float()
        assert (chosen * site.scale >= zero * scale * 0.999999).all() and (
            (top - chosen) * site.scale >= (top - zero) * scale * 0.999999
        ).all()


def test_a_static_range_covers_all_steps(build: Callable[..., Any]) -> None:
    denoiser, steps, sites = prepared(build, "plain", per_step="none")
    data = batches(2, mixed=True)
    found, inputs = statistics(denoiser, sites, steps, data), seen(denoiser, sites, data)
    for name, site in sites.items():
        assert site.scale.shape[0] == 1
        if not site.segments:
            everything = torch.stack([value for _, value in inputs[name]])
            assert float(found[name].low) == min(0.0, float(everything.min())) and float(
                found[name].high
            ) == max(0.0, float(everything.max()))


def test_per_step_grids_err_no_more_than_a_shared_one_at_any_temporal_site(build: Callable[..., Any]) -> None:
    data = batches(3, mixed=False)
    errors, worst, step = {}, {}, {}
    for per_step in ("temporal", "none"):
        denoiser, steps, sites = prepared(build, "unet", per_step=per_step)
        temporal = {name: site for name, site in sites.items() if "time_emb" in name}
        assert len(temporal) == 10
        found = statistics(denoiser, sites, steps, data)
        inputs = seen(denoiser, temporal, data)
        for name, site in temporal.items():
            fit_site(site, found[name], method="min_max")
            differences = []
            for timestep, value in inputs[name]:
                with steps.at(torch.tensor(timestep)):
                    differences.append(site(value[None])[0] - value)
            errors[per_step, name] = float(sum(difference.square().sum() for difference in differences))
            worst[per_step, name] = float(max(difference.abs().max() for difference in differences))
            step[per_step, name] = float(site.scale.max())
    # Half a step is all that a grid which clips nothing leaves; by how much the sum of squares falls is luck
    # where the ranges are nearly equal.
    assert all(worst["temporal", name] <= 0.5001 * step["temporal", name] for name in temporal)
    assert all(step["temporal", name] <= step["none", name] for name in temporal)
    assert min(errors["temporal", name] / errors["none", name] for name in temporal) < 0.9


def test_searched_grids_are_those_of_the_kept_values_within_the_exact_range() -> None:
    site = SiteStatistics(torch.zeros(2, 1), torch.zeros(2, 1))
    heavy = torch.randn(500, generator=torch.Generator().manual_seed(1)).pow(3)
    site.update(0, 0, heavy, 10**6)
    site.update(1, 0, heavy * 10, 10**6)
    quantizer = ActivationQuantizer(IntegerFormat(4), steps=StepContext(torch.tensor([1.0, 2.0])))
    fit_site(quantizer, site, method="search")
    for step, values in enumerate((heavy, heavy * 10)):
        scale, zero = search(values[None], IntegerFormat(4), shrinks=40)
        assert torch.equal(quantizer.scale[step], scale) and float(quantizer.zero_point[step]) == float(zero)
    fitted = fake_quantize(heavy, quantizer.scale[0], quantizer.zero_point[0].float(), 16)
    extreme = from_range(heavy.min(), heavy.max(), IntegerFormat(4))
    assert (fitted - heavy).abs().pow(2.4).mean() < (fake_quantize(heavy, *extreme, 16) - heavy).abs().pow(
        2.4
    ).mean()


def few(rows: int, steps: int) -> tuple[SiteStatistics, Tensor]:
    """What a site saw of the same distribution at each step, `rows` rows of 4 channels, and all of it."""
    site = SiteStatistics(torch.zeros(steps, 1), torch.zeros(steps, 1))
    values = torch.randn(steps, rows, 4)
    for step, part in enumerate(values):
        site.update(step, 0, part, 10**6)
    return site, values


@pytest.mark.parametrize(
    ("fewest", "first", "middle"),
    [
        (0, range(1), range(12, 13)),
        (32, range(1), range(12, 13)),
        (33, range(2), range(11, 14)),
        (97, range(4), range(10, 15)),
        (10**6, range(4), range(9, 16)),
    ],
)
def test_a_step_takes_in_no_more_neighbours_than_its_range_needs_and_none_from_afar(
    fewest: int, first: range, middle: range
) -> None:
    site, values = few(8, 24)
    near = site.neighbours(fewest)
    assert (near[0], near[12], len(near)) == (first, middle, 24)
    together = site.pooled(near)
    for step, steps in enumerate(near):
        seen = values[steps.start : steps.stop]
        assert float(together.low[step]) == float(seen.min()) < 0 < float(together.high[step])
        assert float(together.high[step]) == float(seen.max())
        assert torch.equal(torch.cat(together.values[step, 0]).sort().values, seen.flatten().sort().values)


def test_pooling_keeps_no_more_values_than_a_site_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "KEPT", 100)
    site, _ = few(8, 24)
    together = site.pooled(site.neighbours(160))
    assert 50 <= sum(len(part) for parts in together.values.values() for part in parts) <= 200
    assert float(together.high.max()) == float(site.high.max()), "extremes stay exact"


def test_ranges_that_rest_on_neighbours_fit_values_that_were_not_seen() -> None:
    site, _ = few(4, 40)
    fresh, errors = torch.randn(40, 500), {}
    for fewest in (0, 256):
        quantizer = ActivationQuantizer(
            IntegerFormat(8), steps=StepContext(torch.arange(40, dtype=torch.float32))
        )
        assert fit_site(quantizer, site, method="search", fewest=fewest) == (11 if fewest else 1)
        fitted = fake_quantize(fresh, quantizer.scale, quantizer.zero_point.float(), 256)
        errors[fewest] = float((fitted - fresh).square().mean())
    # Sixteen values show less of the tails than 11 times as many: what lies beyond is cut off.
    assert errors[256] < errors[0] / 4


def test_extremes_stay_exact_where_values_are_thinned_out() -> None:
    site = SiteStatistics(torch.zeros(1, 1), torch.zeros(1, 1))
    values = torch.zeros(1000)
    values[137], values[731] = 5.0, -7.0
    site.update(0, 0, values, 10)
    assert (float(site.low), float(site.high)) == (-7.0, 5.0)
    assert len(site.values[0, 0][0]) <= 10


def test_kept_values_of_a_site_fit_the_budget(
    build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_under_test, "KEPT", 600)
    denoiser, steps, sites = prepared(build, "plain")
    found = statistics(denoiser, sites, steps, batches(2, mixed=False))
    kept = {
        name: sum(len(part) for parts in site.values.values() for part in parts)
        for name, site in found.items()
    }
    assert all(0 < count <= 600 for count in kept.values())


def test_observing_passes_the_input_through_and_leaves_no_hook(build: Callable[..., Any]) -> None:
    denoiser, steps, sites = prepared(build, "plain")
    (inputs, *_) = batches(2, mixed=True)
    stock = denoiser(inputs)
    with precision(denoiser.module, weights="full", inputs="quantized"):
        with observed(sites, steps, 1), torch.no_grad():
            assert torch.equal(denoiser(inputs), stock)
        assert not torch.allclose(denoiser(inputs), stock)
    assert not any(site._forward_hooks for site in sites.values())


@pytest.mark.parametrize("name", ["stages.1.shift", "exit"])
def test_a_site_that_sees_nan_is_named_with_its_timestep(build: Callable[..., Any], name: str) -> None:
    denoiser, steps, sites = prepared(build, "plain")
    poisoned = denoiser.module.get_submodule(name)

    def poison(_: Any, args: Any) -> Any:
        bad = args[0].clone()
        bad[2] = torch.nan
        return (bad,)

    handle = poisoned.register_forward_pre_hook(poison)
    with pytest.raises(CalibrationError, match=rf"input of {name} .*timestep 800\b"):
        statistics(denoiser, sites, steps, batches(2, mixed=True)[:1])
    handle.remove()


@pytest.mark.parametrize(("factor", "rows"), [(1.0, 1), (1.05, 1), (2.0, 2)])
def test_one_grid_serves_all_steps_where_it_leaves_little_more_error(factor: float, rows: int) -> None:
    noise = torch.randn(4000, generator=torch.Generator().manual_seed(2))
    seen_at = noise, noise * factor
    site = SiteStatistics(torch.zeros(2, 1), torch.zeros(2, 1))
    for step, values in enumerate(seen_at):
        site.update(step, 0, values, 10**6)
    chosen, each, one = (
        ActivationQuantizer(IntegerFormat(8), steps=StepContext(torch.tensor([1.0, 2.0]))) for _ in range(3)
    )
    fit_site(chosen, site, method="min_max", measured=True)
    fit_site(each, site, method="min_max")
    low, high = torch.aminmax(torch.cat(seen_at))
    one.fit(*(grid[:, None] for grid in from_range(low[None], high[None], one.format)))

    def error(quantizer: ActivationQuantizer) -> float:
        """The relative error in float64, a mean over timesteps."""
        grids = zip(
            quantizer.scale.double().expand(2, 1), quantizer.zero_point.double().expand(2, 1), strict=True
        )
        found = [
            fake_quantize(values.double(), *grid, 256) for values, grid in zip(seen_at, grids, strict=True)
        ]
        return (
            sum(float((a - b).square().sum() / b.square().sum()) for a, b in zip(found, seen_at, strict=True))
            / 2
        )

    assert (error(one) <= 10**0.1 * error(each)) is (rows == 1)
    expected = {1: one, 2: each}[rows]
    assert torch.equal(chosen.scale, expected.scale) and torch.equal(chosen.zero_point, expected.zero_point)
    assert chosen.per_step is (rows == 2)


def test_quantizers_that_are_watched_or_passed_do_not_run(
    build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser, steps, sites = prepared(build, "unet")
    monkeypatch.setattr(ActivationQuantizer, "rows", lambda *_: pytest.fail("a quantizer ran"))
    name = next(iter(sites))
    others = [quantizer for other, quantizer in sites.items() if other != name]
    data = batches(3, mixed=False)
    with precision(denoiser.module, weights="full", inputs="quantized"):
        found = collect(
            denoiser, {name: sites[name]}, steps, data, calls=4, advance=lambda amount=1: None, passing=others
        )
    assert float(found[name].high.max()) > 0
    assert all("forward" not in vars(site) for site in sites.values())
