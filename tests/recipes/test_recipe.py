import dataclasses
from typing import Any

import pytest

from tfmq.numerics.grids import IntegerFormat, Table
from tfmq.recipes.recipe import Activations, Calibration, Recipe, Rule, Temporal, Weights


@pytest.mark.parametrize(
    ("build", "values", "message"),
    [
        (Weights, {"bits": 1}, r"2\.\.8, got 1"),
        (Weights, {"bits": 32}, r"2\.\.8, got 32"),
        (Weights, {"grid": "e9m9"}, r"weights\.grid is 'e9m9'.*uniform, .*e2m1"),
        (Weights, {"ranges": "guess"}, r"weights\.ranges is 'guess'.*search, min_max"),
        (Activations, {"bits": 9}, r"2\.\.8, got 9"),
        (Activations, {"ranges": "guess"}, r"activations\.ranges is 'guess'"),
        (
            Activations,
            {"per_step": "some"},
            r"activations\.per_step is 'some'.*none, temporal, measured, all",
        ),
        (Temporal, {"maintenance": "hope"}, r"temporal\.maintenance is 'hope'.*none, block, cache, selected"),
        (Temporal, {"table": "int4"}, r"temporal\.table is 'int4'.*int8, float16"),
        (Temporal, {"scope": "all"}, r"temporal\.scope is 'all'.*key, feature, step, global"),
        (Calibration, {"samples": 0}, r"calibration\.samples must be at least 1, got 0"),
        (Calibration, {"steps": -3}, r"calibration\.steps must be at least 1, got -3"),
        (Calibration, {"interval": 0}, r"calibration\.interval .* got 0"),
        (Calibration, {"learned": 0}, r"calibration\.learned .* got 0"),
        (Calibration, {"batch_size": 0}, r"calibration\.batch_size .* got 0"),
        (
            Rule,
            {"match": "role:middle", "weights": {"bits": 8}, "activations": {"bits": 8}},
            r"'role:middle'.*role:first, role:last, role:temporal",
        ),
        (Rule, {"match": "*", "weights": {"bits": 1}, "activations": {"bits": 8}}, r"2\.\.8, got 1"),
        (Rule, {"match": "*", "weights": {"bits": None}, "activations": {"bits": 16}}, r"2\.\.8, got 16"),
    ],
)
def test_a_wrong_value_is_refused_with_the_allowed_ones(
    build: Any, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(**values)


def test_weights_are_symmetric_at_eight_bits_unless_told() -> None:
    assert Weights(bits=8).format() == IntegerFormat(8, symmetric=True)
    assert Weights(bits=4).format() == Weights(bits=8).uniform(4) == IntegerFormat(4)
    assert Weights(bits=8, symmetric=False).format() == IntegerFormat(8)
    assert Weights(bits=4, symmetric=True).format() == IntegerFormat(4, symmetric=True)
    assert Weights(bits=None).format() is None and Activations(bits=None).format() is None
    assert Activations(bits=6, symmetric=True).format() == IntegerFormat(6, symmetric=True)


def test_a_table_is_the_grid_of_the_layers_that_have_its_bits() -> None:
    ends = Rule(match="role:first", weights={"bits": 8})
    recipe = Recipe(name="r", weights=Weights(bits=4, grid="e2m1"), rules=(ends,))
    inner, first = (recipe.scheme("x", roles)[0] for roles in (frozenset(), frozenset({"role:first"})))
    assert inner.format() == Table("e2m1", (-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12))
    assert first.format() == IntegerFormat(8, symmetric=True)
    with pytest.raises(ValueError, match=r"e2m1 has 4 bits, and weights\.bits is 8"):
        Recipe(name="r", weights=Weights(bits=8, grid="e2m1"))


def test_the_first_rule_that_matches_wins() -> None:
    rules = (
        Rule(match="role:first", weights={"bits": 8}, activations={"bits": 8}),
        Rule(match="down.*.conv", weights={"bits": None}, activations={"bits": None}),
        Rule(match="down.*", weights={"bits": 3}, activations={"bits": 6}),
    )
    recipe = Recipe(name="r", weights=Weights(bits=4), activations=Activations(bits=5), rules=rules)

    def bits(name: str, roles: frozenset[str]) -> tuple[int | None, int | None]:
        weights, activations, _ = recipe.scheme(name, roles)
        return weights.bits, activations.bits

    assert bits("down.0.conv", frozenset({"role:first"})) == (8, 8)
    assert bits("down.0.conv", frozenset()) == (None, None)
    assert bits("down.0.linear", frozenset({"role:last"})) == (3, 6)
    assert bits("up.0.conv", frozenset()) == (4, 5)


def test_patterns_tell_case_and_whole_names() -> None:
    rule = Rule(match="*.attn1.to_[qk]", weights={"bits": 8}, activations={"bits": 8})
    assert rule.matches("blocks.0.attn1.to_q", frozenset()) and not rule.matches(
        "blocks.0.attn1.to_v", frozenset()
    )
    assert not rule.matches("Blocks.0.ATTN1.to_q", frozenset()) and not rule.matches(
        "blocks.0.attn1.to_q.lora", frozenset()
    )
    assert not Rule(match="role:first", weights={"bits": 8}, activations={"bits": 8}).matches(
        "role:firs", frozenset({"role:last"})
    )


@pytest.mark.parametrize("part", [Weights(), Activations(), Temporal(), Calibration(), Recipe(name="r")])
def test_recipes_are_frozen_values_with_keyword_fields(part: Any) -> None:
    name = dataclasses.fields(part)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(part, name, None)
    with pytest.raises(TypeError):
        type(part)(getattr(part, name))
    assert part == dataclasses.replace(part) and hash(part) == hash(dataclasses.replace(part))


@pytest.mark.parametrize(
    ("given", "turns"),
    [({}, 2), ({"steps": 20}, 1), ({"samples": 256}, 13), ({"interval": 1}, 4), ({"learned": None}, 1)],
)
def test_samples_take_turns_where_weights_would_learn_from_more_than_enough(
    given: dict[str, Any], turns: int
) -> None:
    assert Calibration(**given).turns == turns
