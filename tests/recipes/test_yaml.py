import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfmq.recipes.networks import image_w8a8, network_recipe, text_w8a8
from tfmq.recipes.presets import PRESETS, tfmq_w4a8
from tfmq.recipes.recipe import Activations, Calibration, Recipe, Rule, Temporal, Weights
from tfmq.recipes.yaml import dumps, from_dict, load, to_dict
from tfmq.reconstruction.learning import Learning
from tfmq.reconstruction.solvers import Rounding

yaml = pytest.importorskip("yaml")

BITS = st.none() | st.integers(2, 8)
RANGES = st.sampled_from(["search", "min_max"])
learnings = st.builds(
    Learning,
    iterations=st.integers(0, 10**6),
    learning_rate=st.floats(1e-9, 1.0),
    batch_size=st.integers(1, 999),
    penalty=st.floats(0.0, 10.0),
    beta_start=st.floats(2.0, 40.0),
    beta_end=st.floats(1.0, 2.0),
    warmup=st.floats(0.0, 0.99),
)
recipes = st.builds(
    Recipe,
    name=st.text(max_size=20),
    weights=st.builds(Weights, bits=BITS, symmetric=st.none() | st.booleans(), ranges=RANGES),
    activations=st.builds(
        Activations,
        bits=BITS,
        symmetric=st.booleans(),
        ranges=RANGES,
        per_step=st.sampled_from(["none", "temporal", "measured", "all"]),
        products=st.booleans(),
        zero_points=st.sampled_from(["per_step", "products", "shared"]),
        split=st.booleans() | st.just("direct"),
    ),
    temporal=st.builds(
        Temporal,
        maintenance=st.sampled_from(["none", "block", "cache", "selected"]),
        table=st.sampled_from(["int8", "float16"]),
        scope=st.sampled_from(["key", "feature", "step", "global"]),
        learning=learnings,
    ),
    rounding=st.builds(
        Rounding,
        solver=st.sampled_from(["nearest", "adaround", "gptq"]),
        damping=st.floats(1e-9, 10.0),
        **{name: st.integers(1, 999) for name in ("positions", "sweeps", "widest")},
    ),
    learning=learnings,
    calibration=st.builds(
        Calibration,
        **{name: st.integers(1, 999) for name in ("samples", "steps", "interval", "batch_size")},
        learned=st.none() | st.integers(1, 999),
        **{name: st.none() | st.floats(0.0, 20.0) for name in ("eta", "guidance_scale")},
    ),
    rules=st.lists(
        st.builds(
            Rule,
            match=st.sampled_from(["role:first", "role:temporal", "*.conv?", "a[b]", "näme"]),
            weights=st.fixed_dictionaries({"bits": BITS}, optional={"ranges": st.just("min_max")}),
            activations=st.fixed_dictionaries({}, optional={"bits": BITS, "tokens": st.just("dynamic")}),
        )
    ).map(tuple),
)


def test_recipes_of_components_are_part_of_the_file() -> None:
    recipe = Recipe(name="r", components={"vae": image_w8a8(), "text_*": text_w8a8()})
    assert from_dict(yaml.safe_load(dumps(recipe))) == recipe
    assert recipe.of_network("vae.decoder") == image_w8a8() and recipe.of_network("unet") is None
    assert network_recipe(recipe, "vae.decoder", tokens=True) == image_w8a8()
    assert network_recipe(recipe, "other", tokens=True) == text_w8a8()


@given(recipes)
def test_every_recipe_survives_yaml_and_json(recipe: Recipe) -> None:
    assert from_dict(yaml.safe_load(dumps(recipe))) == recipe
    assert from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_a_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(dumps(PRESETS[name]()))
    assert load(path) == PRESETS[name]()


def test_the_file_has_the_fields_in_their_order_and_nothing_else() -> None:
    values = yaml.safe_load(dumps(tfmq_w4a8()))
    assert list(values) == [field.name for field in dataclasses.fields(Recipe)]
    assert values["rules"][0] == {
        "match": "role:first",
        "weights": {"bits": 8},
        "activations": {"bits": 8},
        "rescaling": {},
    }


def test_rules_of_earlier_files_have_bits_under_names_of_their_own() -> None:
    rule = {"match": "*.conv_shortcut", "weight_bits": 8, "activation_bits": None}
    found = from_dict({"name": "r", "rules": [rule]}).rules
    assert found == (Rule(match="*.conv_shortcut", weights={"bits": 8}, activations={"bits": None}),)


def test_fields_left_out_take_their_defaults_and_integers_serve_as_floats() -> None:
    recipe = from_dict({"name": "r", "weights": {"bits": None}, "learning": {"penalty": 1}})
    assert recipe == Recipe(name="r", weights=Weights(bits=None), learning=Learning(penalty=1.0))
    assert type(recipe.learning.penalty) is float


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"wieghts": {}}, r"unknown key wieghts; a recipe has name, weights"),
        ({"weights": {"bit": 4}}, r"unknown key weights\.bit; weights has bits, grid, symmetric, ranges"),
        ({"temporal": {"learning": {"epochs": 4}}}, r"unknown key temporal\.learning\.epochs"),
        (
            {"rules": [{"match": "*", "weights": {"bits": 8}, "why": 1}]},
            r"unknown key rules\[0\]\.why; rules\[0\] has match",
        ),
        (
            {"rules": [{"match": 3, "weights": {"bits": 8}}]},
            r"rules\[0\]\.match must be of type str; got 3",
        ),
        ({"rules": {"match": "*"}}, r"rules must be a list; got"),
        (
            {"rules": [{"match": "*", "weights": {"bit": 4}}]},
            r"unknown key rules\[0\]\.weights\.bit; rules\[0\]\.weights has bits, grid, symmetric",
        ),
        (
            {"rules": [{"match": "*", "activations": {"bits": "8"}}]},
            r"rules\[0\]\.activations\.bits must be of type int or NoneType; got '8'",
        ),
        ({"rules": [{"match": "*", "activations": 8}]}, r"rules\[0\]\.activations must be a mapping of bits"),
        ({"components": ["vae"]}, r"components must be a mapping of names; got \['vae'\]"),
        ({"components": {"vae": {"name": "v", "weights": 4}}}, r"components\.vae\.weights must be a mapping"),
        ({"tolerance": {"output": 0}}, r"tolerance\.output must be finite and above 0, got 0"),
        ({"tolerance": {"instead": "hope"}}, r"tolerance\.instead is 'hope'"),
        ({"rules": ["conv_in"]}, r"rules\[0\] must be a mapping of match.*got 'conv_in'"),
        ({"weights": 4}, r"weights must be a mapping of bits.*got 4"),
        ({"weights": {"bits": "4"}}, r"weights\.bits must be of type int or NoneType; got '4'"),
        ({"weights": {"bits": 4.0}}, r"weights\.bits must be of type int or NoneType; got 4\.0"),
        ({"weights": {"bits": True}}, r"weights\.bits .*got True"),
        ({"activations": {"products": 1}}, r"activations\.products must be of type bool; got 1"),
        ({"activations": {"products": "yes"}}, r"activations\.products .*got 'yes'"),
        ({"learning": {"learning_rate": "fast"}}, r"learning\.learning_rate .*got 'fast'"),
        ({"learning": {"learning_rate": float("nan")}}, r"learning_rate must be > 0"),
        ({"weights": {"bits": 1}}, r"2\.\.8, got 1"),
        ({"temporal": {"maintenance": "hope"}}, r"temporal\.maintenance is 'hope'"),
        (
            {"rules": [{"match": "role:middle", "weights": {"bits": 8}}]},
            r"unknown role 'role:middle'",
        ),
    ],
)
def test_what_is_wrong_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_dict({"name": "r", **values})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "cannot read the recipe"),
        ("- a", "must be a mapping"),
        ("", "must be a mapping"),
        ("weights: {bits: 4}", "name"),
        ("name: r\nrules: [{match: '*'}]", r"the rule '\*' changes nothing"),
        ("name: r\nrules: [{match: '*', rescaling: {rotation: 6}}]", "rotation must be 0 or a power of four"),
        ("name: r\nrules: [{match: '*', rescaling: {turned: 4}}]", "turned"),
        ("name: r\nweights: {bits: 4}\nweights: {}", r"the key weights stands there twice\n.*line 3"),
        ("name: r\nlearning: {warmup: 0.1, warmup: 0.2}", "the key warmup stands there twice"),
        ("name: r\n4: x\nb: y", "unknown key"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_by_its_path(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_missing_or_binary_file_is_refused_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read the recipe .*gone\.yaml"):
        load(tmp_path / "gone.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(ValueError, match=r"binary\.yaml"):
        load(tmp_path / "binary.yaml")


def bomb(levels: int) -> str:
    """Anchors that hold the one before nine times: nine to the power of `levels` values in a line each."""
    lines = [
        "a0: &a0 [x]",
        *(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, levels + 1)),
    ]
    return "\n".join([*lines, f"rules: *a{levels}"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb(9), "more than 4096 values"),
        (bomb(2), "unknown key a0"),
        ("name: r\nweights: {bits: &a [*a]}", "recipe.yaml"),
        ("name: " + "[" * 3000, "nested deeper than 16"),
        ("name: " + "{a: " * 20 + "1" + "}" * 20, "nested deeper than 16"),
        ("name: r\nrules: [" + "1, " * 5000 + "1]", "more than 4096 values"),
        ("name: r\nweights: {bits: 0x" + "f" * 20_000 + "}", "an integer of 80000 bits|Exceeds the limit"),
        ("name: r\nweights: {bits: " + "1" * 20_000 + "}", "cannot read the recipe"),
        ("name: r\nweights: {bits: 2020-99-99}", "cannot read the recipe"),
        (
            "name: r\nweights: {bits: " + "x" * 20_000 + "}",
            r"weights\.bits must be of type int or NoneType; got 'xxx",
        ),
        ("name: r\n" + "x" * 1000 + ": 1", "unknown key xxx"),
        (
            "name: r\nrules: [{match: 'role:" + "x" * 20_000 + "', weight_bits: 8, activation_bits: 8}]",
            "unknown role 'role:xxx",
        ),
        ("name: r\nweights: !" + "x" * 20_000 + " 1", "cannot read the recipe"),
        ("name: r\n#" + "x" * 70_000, "larger than 65536 bytes"),
    ],
    ids=lambda value: value[:24] if "\n" in value else value[:40],
)
def test_a_file_that_grows_is_refused_in_a_few_words(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 1000


def test_anchors_are_no_offence(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: r\nlearning: &l {iterations: 7}\ntemporal: {learning: *l}")
    assert load(path).temporal.learning == load(path).learning == Learning(iterations=7)


@pytest.mark.skipif(not Path("/dev/zero").is_char_device(), reason="needs /dev/zero")
def test_a_device_without_end_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot read the recipe /dev/zero: larger than"):
        load(Path("/dev/zero"))
