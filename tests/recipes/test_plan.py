import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tfmq.models.program import Trace
from tfmq.models.trace import trace
from tfmq.nn.scheme import LayerScheme
from tfmq.numerics.grids import IntegerFormat
from tfmq.recipes.plan import make_plan
from tfmq.recipes.presets import tfmq_w4a8, tfmq_w4a32
from tfmq.recipes.recipe import Activations, Recipe, Rule, Temporal, Weights

TEMPORAL = ["embed", "stages.0.shift", "stages.1.shift"]
OTHERS = ["entry", "stages.0.block", "stages.1.block", "exit"]


@pytest.fixture
def plain(build: Callable[..., Any]) -> Trace:
    return trace(*build("plain"))


def entry(plan: LayerScheme) -> tuple[str, str]:
    assert plan.input is not None
    return plan.input.key, plan.input.ranges


def rule(match: str, weight_bits: int | None = None, activation_bits: int | None = None) -> Rule:
    return Rule(match=match, weights={"bits": weight_bits}, activations={"bits": activation_bits})


def test_every_layer_gets_the_recipes_bits_and_the_ends_their_own(plain: Trace) -> None:
    layers = make_plan(tfmq_w4a8(), plain).layers
    assert list(layers) == [layer.name for layer in plain.layers]
    eight = IntegerFormat(8, symmetric=True)
    assert {name: plan.weight.grid for name, plan in layers.items()} == {
        name: eight if name in ("entry", "exit") else IntegerFormat(4) for name in [*TEMPORAL, *OTHERS]
    }
    assert all(plan.input is not None and plan.input.grid == IntegerFormat(8) for plan in layers.values())
    assert layers["exit"].weight.segments == (8, 8) and layers["entry"].weight.segments == ()


@pytest.mark.parametrize(
    ("per_step", "maintenance", "temporal", "others"),
    [
        ("all", "cache", ("timestep", "min_max"), ("timestep", "search")),
        ("temporal", "block", ("timestep", "min_max"), ("none", "search")),
        ("none", "cache", ("none", "min_max"), ("none", "search")),
        ("temporal", "none", ("timestep", "search"), ("none", "search")),
        ("all", "none", ("timestep", "search"), ("timestep", "search")),
        ("measured", "cache", ("timestep", "min_max"), ("measured", "search")),
    ],
)
def test_finite_set_calibration_reaches_its_scope(
    plain: Trace, per_step: str, maintenance: str, temporal: Any, others: Any
) -> None:
    recipe = Recipe(
        name="r", activations=Activations(per_step=per_step), temporal=Temporal(maintenance=maintenance)
    )  # type: ignore[arg-type]
    plan = make_plan(recipe, plain)
    assert {entry(plan.layers[name]) for name in TEMPORAL} == {temporal}
    assert {entry(plan.layers[name]) for name in OTHERS} == {others}
    sites, product = plan.products[""]
    assert sites == 2 and product is not None and product.key == others[0]


def test_switches_turn_products_and_splitting_off(plain: Trace) -> None:
    plan = make_plan(Recipe(name="r", activations=Activations(products=False, split=False)), plain)
    assert dict(plan.products) == {"": (2, None)} and plan.layers["exit"].weight.segments == ()
    plan = make_plan(tfmq_w4a32(), plain)
    assert all(layer.input is None for layer in plan.layers.values()) and dict(plan.products) == {
        "": (2, None)
    }


def test_a_number_is_no_switch() -> None:
    with pytest.raises(ValueError, match=r"activations\.split is 1; it must be one of True, False, direct"):
        Activations(split=1)  # type: ignore[arg-type]


def test_concatenations_are_split_where_they_are_read_directly(build: Callable[..., Any]) -> None:
    traced = trace(*build("unet"))

    def split(where: Any) -> set[str]:
        layers = make_plan(Recipe(name="r", activations=Activations(split=where)), traced).layers
        return {name for name, layer in layers.items() if layer.weight.segments}

    assert split("direct") == {name for name in split(True) if name.endswith("conv_shortcut")}
    assert len(split("direct")) == 4 and len(split(True)) == 8 and not split(False)


@pytest.mark.parametrize(
    ("zero_points", "layers", "products"),
    [("per_step", False, False), ("products", False, True), ("shared", True, True)],
)
def test_zero_points_are_shared_by_the_grids_of_every_quantizer_of_products_or_of_none(
    plain: Trace, zero_points: Any, layers: bool, products: bool
) -> None:
    plan = make_plan(Recipe(name="r", activations=Activations(zero_points=zero_points)), plain)
    inputs = [layer.input for layer in plan.layers.values()]
    assert {entry is not None and entry.shared for entry in inputs} == {layers}
    assert {entry is not None and entry.shared for _, entry in plan.products.values()} == {products}


def test_layers_that_a_rule_keeps_in_full_precision_are_not_planned(plain: Trace) -> None:
    recipe = replace(tfmq_w4a8(), rules=(rule("*.block"), rule("role:temporal", 8, None)))
    layers = make_plan(recipe, plain).layers
    assert sorted(layers) == sorted(["entry", "exit", *TEMPORAL])
    assert all(
        layers[name].input is None and layers[name].weight.grid == IntegerFormat(8, symmetric=True)
        for name in TEMPORAL
    )


def test_earlier_rules_win(plain: Trace) -> None:
    recipe = Recipe(name="r", rules=(rule("stages.0.*", 2, 2), rule("role:temporal", 3, 3), rule("*", 5, 5)))
    layers = make_plan(recipe, plain).layers
    assert {name: plan.weight.grid.bits for name, plan in layers.items()} == {
        "stages.0.shift": 2,
        "stages.0.block": 2,
        "embed": 3,
        "stages.1.shift": 3,
        "entry": 5,
        "stages.1.block": 5,
        "exit": 5,
    }


def test_rules_change_any_field_and_the_first_that_has_one_decides_on_it(plain: Trace) -> None:
    rules = (
        Rule(match="stages.0.*", weights={"ranges": "min_max"}, activations={"bits": None}),
        Rule(match="*.block", weights={"bits": 3, "ranges": "search"}, activations={"per_step": "none"}),
        Rule(match="exit", activations={"split": False, "zero_points": "shared", "ranges": "min_max"}),
        Rule(match="", activations={"products": False}),
    )
    plan = make_plan(Recipe(name="r", rules=rules), plain)
    first, second = plan.layers["stages.0.block"], plan.layers["stages.1.block"]
    assert (first.weight.grid.bits, first.weight.ranges, first.input) == (3, "min_max", None)
    assert (second.weight.grid.bits, second.weight.ranges) == (3, "search")
    assert second.input is not None and second.input.key == "none"
    last = plan.layers["exit"].input
    assert last is not None and (last.segments, last.shared, last.ranges) == ((), True, "min_max")
    assert plan.layers["exit"].weight.segments == () and plan.products[""] == (2, None)
    entry = plan.layers["entry"].input
    assert entry is not None and (entry.key, entry.shared, entry.ranges) == ("timestep", False, "search")


def test_a_rule_about_an_owner_decides_its_products(build: Callable[..., Any]) -> None:
    found = trace(*build("unet"))
    recipe = Recipe(name="r", rules=(rule("mid_block.attentions.0", None, None), rule("up_blocks.*", 4, 6)))
    plan = make_plan(recipe, found)
    bits = {owner: product.grid.bits if product else None for owner, (_, product) in plan.products.items()}
    assert bits == {
        "down_blocks.1.attentions.0": 8,
        "mid_block.attentions.0": None,
        "up_blocks.0.attentions.0": 6,
        "up_blocks.0.attentions.1": 6,
    }
    assert "mid_block.attentions.0.to_q" in plan.layers, "the rule names the owner, not its layers"


@pytest.mark.parametrize("match", ["*.conv_out", "ENTRY", "stages.2.*", "entry "])
def test_a_rule_that_matches_nothing_is_an_error_that_names_it(plain: Trace, match: str) -> None:
    with pytest.raises(ValueError, match="matches no layer") as caught:
        make_plan(Recipe(name="mine", rules=(rule(match, 8, 8),)), plain)
    assert repr(match) in str(caught.value) and "mine" in str(caught.value)


def test_a_rule_that_gives_inputs_of_full_precision_layers_bits_warns(plain: Trace) -> None:
    with pytest.warns(UserWarning, match=r"'entry' of recipe mine leaves its layers in full precision"):
        make_plan(Recipe(name="mine", rules=(rule("entry", None, 8),)), plain)
    with warnings.catch_warnings(action="error"):
        # The products of the model itself, whose name is empty, have these bits.
        make_plan(Recipe(name="mine", rules=(rule("", None, 8), rule("entry", None, None))), plain)


def test_a_rule_behind_others_that_match_all_its_layers_warns(plain: Trace) -> None:
    with pytest.warns(UserWarning, match=r"'entry' of recipe mine has no effect"):
        plan = make_plan(Recipe(name="mine", rules=(rule("e*", 8, 8), rule("entry", 3, 8))), plain)
    assert plan.layers["entry"].weight.grid.bits == 8


def test_a_recipe_that_quantizes_nothing_is_an_error(plain: Trace) -> None:
    for recipe in (Recipe(name="mine", weights=Weights(bits=None)), Recipe(name="mine", rules=(rule("*"),))):
        with pytest.raises(ValueError, match="mine quantizes no layer"):
            make_plan(recipe, plain)


@pytest.mark.parametrize("tokens", ["dynamic", "measured"])
def test_the_linear_layers_outside_of_the_temporal_block_get_the_grids_of_tokens(
    build: Callable[..., Any], tokens: str
) -> None:
    traced = trace(*build("dit"))
    plan = make_plan(Recipe(name="r", activations=Activations(tokens=tokens)), traced)  # type: ignore[arg-type]
    kinds = {name: layer.input.tokens for name, layer in plan.layers.items() if layer.input}
    assert kinds["pos_embed.proj"] == "static", "a convolution sums over places"
    assert {kinds[layer.name] for layer in traced.temporal} == {"static"}
    others = {layer.name for layer in traced.layers if not layer.temporal} - {"pos_embed.proj"}
    assert len(others) > 10 and {kinds[name] for name in others} == {tokens}
    assert all(product is not None and product.tokens == "static" for _, product in plan.products.values())


def test_groups_of_inputs_are_those_of_linear_layers_outside_of_the_temporal_block(
    build: Callable[..., Any],
) -> None:
    found = trace(*build("dit"))
    grouped = make_plan(Recipe(name="r", activations=Activations(group=8)), found).layers
    for layer in found.layers:
        plan = grouped[layer.name]
        expected = (8,) * (layer.channels // 8) if layer.tokenwise and not layer.temporal else ()
        assert plan.weight.segments == (expected if len(expected) > 1 else ())
        assert plan.input is not None and plan.input.segments == plan.weight.segments
    assert any(len(plan.weight.segments) == 8 for plan in grouped.values())
    assert make_plan(Recipe(name="r"), found).layers.keys() == grouped.keys()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"bits": 8, "group": 64}, "weights.group needs a grid of small integers.*uniform of 8 bits"),
        ({"bits": 4, "grid": "e3m0", "group": 64}, "e3m0 of 4 bits leaves no room"),
        ({"group": 4}, "weights.group must be 0 or at least 8 channels, got 4"),
        ({"groups": (64, 4)}, "weights.groups must be 0 or at least 8 channels, got 4"),
        ({"grids": ("e9",)}, "weights.grids is 'e9'"),
    ],
)
def test_groups_that_no_layer_could_have_are_refused(weights: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(name="r", weights=Weights(**weights))
    if "groups" not in weights:
        with pytest.raises(ValueError, match=message):
            Rule(match="*", weights=weights)
    with pytest.raises(ValueError, match=r"activations\.group must be 0 or at least 8 channels, got 2"):
        Activations(group=2)
    with pytest.raises(ValueError, match=r"activations\.clusters must not be negative, got -1"):
        Activations(clusters=-1)
    with pytest.raises(
        ValueError, match=r"activations\.group and activations\.clusters both part the channels"
    ):
        Activations(group=32, clusters=2)
    # A rule of other bits than the recipe's says nothing of groups: its layers have none.
    assert Recipe(name="r", weights=Weights(group=64), rules=(rule("*", 8, 8),)).weights.group == 64
