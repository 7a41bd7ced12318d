from dataclasses import replace

import pytest

from tfmq.recipes.presets import PRESETS, brecq, rtn, scheme, tfmq_w4a8
from tfmq.recipes.recipe import Recipe, Rescaling

VARIANTS = ("fast", "transformer", "quick", "tuned", "smooth", "rotate")


def ends(recipe: Recipe) -> list[tuple[str, int | None, int | None]]:
    return [(rule.match, rule.weights["bits"], rule.activations.get("bits")) for rule in recipe.rules]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_goes_by_its_name(name: str) -> None:
    assert PRESETS[name]().name == name
    assert scheme(name) == PRESETS[name]()


def test_the_presets_are_these() -> None:
    general = [
        f"{method}_{name}" for method in ("tfmq", "rtn", "brecq") for name in ("w4a8", "w8a8", "w4a32")
    ]
    both = [f"{kind}_{name}" for kind in VARIANTS for name in ("w4a8", "w8a8")]
    assert sorted(PRESETS) == sorted(
        [*general, *both, "group_w4a8", "group_w4a4", "fp4_w4a8", "svd_w4a4", "svd_w4a8", "cluster_w4a4"]
    )


@pytest.mark.parametrize(
    ("name", "base", "weights"),
    [
        ("group_w4a8", "w4a8", {"group": 128, "groups": (64, 32)}),
        ("group_w4a4", "w4a4", {"group": 128, "groups": (64, 32)}),
        ("fp4_w4a8", "w4a8", {"grids": ("e2m1", "e3m0")}),
    ],
)
def test_schemes_with_measured_grids_are_those_of_transformers_otherwise(
    name: str, base: str, weights: dict[str, object]
) -> None:
    plain = scheme(base)
    assert scheme(name) == replace(
        plain,
        name=name,
        weights=replace(plain.weights, **weights),
        activations=replace(plain.activations, tokens="measured"),
    )


def test_the_svd_schemes_are_smooth_ones_with_a_branch() -> None:
    recipe, smooth = scheme("svd_w4a8"), scheme("smooth_w4a8")
    assert recipe.weights == replace(smooth.weights, rank=16) and recipe.branch.dtype == "int8"
    assert all(rule.weights["rank"] == 0 for rule in recipe.rules), "first and last layer have none"
    rules = smooth.rules
    assert (
        replace(recipe, name=smooth.name, weights=smooth.weights, branch=smooth.branch, rules=rules) == smooth
    )
    clustered = scheme("cluster_w4a4")
    four = scheme("svd_w4a4")
    assert clustered.activations == replace(four.activations, clusters=4)
    assert clustered.branch == replace(four.branch, dtype="int8_weight_only")
    assert replace(clustered, name=four.name, activations=four.activations, branch=four.branch) == four
    assert (four.weights.bits, four.activations.bits, four.branch.dtype) == (4, 4, "float16")
    assert not four.activations.products and four.temporal == recipe.temporal


def test_the_quick_schemes_search_where_bits_are_few() -> None:
    assert scheme("quick_w8a8").weights == replace(scheme("w8a8").weights, ranges="min_max")
    assert scheme("quick_w4a8").weights == scheme("w4a8").weights
    assert {scheme(f"quick_{name}").rounding.solver for name in ("w4a8", "w8a8")} == {"nearest"}


@pytest.mark.parametrize("name", ["w4a8", "w8a8"])
def test_the_transformer_schemes_differ_in_the_grids_of_tokens_alone(name: str) -> None:
    recipe = scheme(f"transformer_{name}")
    assert recipe.activations.tokens == "measured"
    assert replace(
        recipe, name=f"tfmq_{name}", activations=replace(recipe.activations, tokens="static")
    ) == scheme(name)


@pytest.mark.parametrize("name", ["w4a8", "w8a8"])
@pytest.mark.parametrize(
    ("kind", "rescaling"),
    [("smooth", Rescaling(equalizers=("ranges",))), ("rotate", Rescaling(rotation=256))],
)
def test_schemes_that_transform_inputs_are_those_of_transformers_otherwise(
    kind: str, rescaling: Rescaling, name: str
) -> None:
    recipe = scheme(f"{kind}_{name}")
    assert recipe.rescaling == rescaling
    assert replace(recipe, name=f"transformer_{name}", rescaling=Rescaling()) == scheme(f"transformer_{name}")


@pytest.mark.parametrize("name", ["w4a8", "w8a8"])
def test_the_fast_schemes_differ_in_how_many_grids_they_have_alone(name: str) -> None:
    recipe = scheme(f"fast_{name}")
    assert (recipe.activations.per_step, recipe.activations.zero_points, recipe.activations.split) == (
        "measured",
        "shared",
        "direct",
    )
    slow = replace(recipe.activations, per_step="all", zero_points="per_step", split=True)
    assert replace(recipe, name=f"tfmq_{name}", activations=slow) == scheme(name)


@pytest.mark.parametrize(
    ("name", "bits", "per_step", "rules"),
    [
        ("w4a8", (4, 8), "all", [("role:first", 8, 8), ("role:last", 8, 8)]),
        ("w8a8", (8, 8), "all", []),
        ("w4a32", (4, None), "none", [("role:first", 8, None), ("role:last", 8, None)]),
    ],
)
def test_the_schemes_are_the_papers(
    name: str, bits: tuple[int, int | None], per_step: str, rules: list
) -> None:
    recipe = scheme(name)
    assert (recipe.weights.bits, recipe.activations.bits) == bits and recipe.activations.per_step == per_step
    assert (
        recipe.temporal.maintenance == "cache" and ends(recipe) == rules and recipe.rounding.solver == "gptq"
    )


@pytest.mark.parametrize("name", ["w4a8", "w8a8", "w4a32"])
def test_baselines_differ_from_the_method_in_what_they_leave_out_alone(name: str) -> None:
    method = scheme(name)
    nearest, block = rtn(method), brecq(method)
    for recipe in (nearest, block):
        assert recipe.temporal.maintenance == "none" and recipe.activations.per_step == "none"
        calibration = replace(recipe.calibration, judged=method.calibration.judged)
        assert (recipe.weights, recipe.rules, calibration) == (
            method.weights,
            method.rules,
            method.calibration,
        )
        assert recipe.activations.bits == method.activations.bits
    assert (nearest.rounding.solver, block.rounding.solver) == (
        "nearest",
        "adaround",
    ) and block.learning == method.learning
    assert (nearest, block) == (scheme(f"rtn_{name}"), scheme(f"brecq_{name}"))


@pytest.mark.parametrize("text", ["w3a6", "w2a2", "w8a4", "w5a16", "w6a32"])
def test_any_bits_make_a_scheme(text: str) -> None:
    weight, activation = (int(bits) for bits in text[1:].split("a"))
    recipe = scheme(text)
    assert recipe.name == f"tfmq_{text}" and recipe.weights.bits == weight
    full = activation > 8
    assert recipe.activations.bits == (None if full else activation)
    assert recipe.activations.products is not full and (recipe.activations.per_step == "none") is full
    assert all(rule.activations == ({} if full else {"bits": 8}) for rule in recipe.rules)


@pytest.mark.parametrize(
    "text", ["", "w4", "a8", "w4a", "w1a8", "w4a9", "w4a64", "W4A8", "w4a8 ", "xw4a8", "tfmq_w9a9", "w-4a8"]
)
def test_an_unknown_scheme_is_refused_by_its_name_with_the_known_ones(text: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s)unknown scheme {text!r}.*w4a8.*brecq_w4a32"):
        scheme(text)


@pytest.mark.parametrize("text", ["w16a8", "w32a32", "w32a8"])
def test_full_precision_weights_are_refused_with_the_reason(text: str) -> None:
    with pytest.raises(ValueError, match=rf"{text}.*full-precision weights"):
        scheme(text)


def test_presets_are_made_anew() -> None:
    assert tfmq_w4a8() == tfmq_w4a8() and tfmq_w4a8() is not tfmq_w4a8()
