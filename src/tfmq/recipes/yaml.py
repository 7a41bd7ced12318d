"""Recipes to and from YAML; the file is the value's fields, nothing else."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from tfmq.errors import cut, require, shown
from tfmq.recipes.recipe import Recipe, Rule

# Limits of a recipe's file (bytes, levels, values), many times what any recipe needs. An alias counts as all
# that it stands for.
MOST_BYTES = 2**16
MOST_DEPTH = 16
MOST_VALUES = 4096
# Most characters of the reason that an error repeats.
LONGEST = 600


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain values that JSON and YAML keep."""
    values: dict[str, Any] = _plain(asdict(recipe))
    return values


def _plain(value: Any) -> Any:
    """Return a value with lists in the place of tuples, which YAML does not have."""
    match value:
        case dict():
            return {name: _plain(item) for name, item in value.items()}
        case tuple():
            return [_plain(item) for item in value]
    return value


def _build(kind: Any, values: Any, path: str) -> Any:
    """Return the part of a recipe, of the dataclass `kind`, that `values` describe at `path`."""
    if not isinstance(values, dict):
        raise ValueError(
            f"{path.rstrip('.') or 'the recipe'} must be a mapping of "
            f"{', '.join(f.name for f in fields(kind))}; got {shown(values)}"
        )
    hints = get_type_hints(kind)
    if kind is Rule:
        values = _current(values)
    _check_keys(kind, values, path)
    changed = {f.name: f.metadata["changes"] for f in fields(kind) if "changes" in f.metadata}
    return kind(
        **{
            name: _fields(changed[name], value, f"{path}{name}.")
            if name in changed
            else _value(hints[name], value, f"{path}{name}")
            for name, value in values.items()
        }
    )


def _check_keys(kind: Any, values: Mapping[Any, Any], path: str) -> None:
    """Refuse keys that a part of a recipe does not have, and a part that lacks one."""
    known = [f.name for f in fields(kind)]
    unknown = sorted(set(values) - set(known), key=str)
    if unknown:
        raise ValueError(
            f"unknown key {path}{cut(str(unknown[0]), 80)}; "
            f"{path.rstrip('.') or 'a recipe'} has {', '.join(known)}"
        )
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in needed if name not in values]
    if missing:
        raise ValueError(f"{path.rstrip('.') or 'the recipe'} lacks {', '.join(missing)}")


def _current(rule: dict[str, Any]) -> dict[str, Any]:
    """Return a rule as it is written now: rules once had bits alone, under names of their own."""
    earlier = {"weight_bits": "weights", "activation_bits": "activations"}
    return {
        earlier.get(name, name): {"bits": value} if name in earlier else value for name, value in rule.items()
    }


def _fields(kind: Any, values: Any, path: str) -> dict[str, Any]:
    """Return some fields of a part of the recipe, checked as the whole part would be."""
    part = _build(kind, values, path)
    return {name: getattr(part, name) for name in values}


def _value(hint: Any, value: Any, path: str) -> Any:
    if is_dataclass(hint):
        return _build(hint, value, f"{path}.")
    if getattr(hint, "__origin__", None) is Mapping:
        return _values(get_args(hint)[1], value, path)
    if getattr(hint, "__origin__", None) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{path} must be a list; got {shown(value)}")
        return tuple(_value(get_args(hint)[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    allowed = _plain_types(hint)
    if float in allowed and type(value) is int:
        return float(value)
    if type(value) not in allowed:
        raise ValueError(
            f"{path} must be of type {' or '.join(kind.__name__ for kind in allowed)}; got {shown(value)}"
        )
    return value


def _values(hint: Any, values: Any, path: str) -> dict[str, Any]:
    """Return a mapping of names to values of a kind."""
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{path} must be a mapping of names; got {shown(values)}")
    return {name: _value(hint, value, f"{path}.{name}") for name, value in values.items()}


def _plain_types(hint: Any) -> tuple[type, ...]:
    if isinstance(hint, type):
        return (hint,)
    parts = get_args(hint)
    # The values of a Literal, or the members of a union, which may be Literals.
    return (
        tuple(dict.fromkeys(kind for part in parts for kind in _plain_types(part)))
        if parts
        else (type(hint),)
    )


def from_dict(values: dict[str, Any]) -> Recipe:
    """Return the recipe with these fields.

    Raises:
        ValueError: an unknown key, a value of the wrong type, or one that the recipe refuses; names the key.
    """
    recipe: Recipe = _build(Recipe, values, "")
    return recipe


def dumps(recipe: Recipe) -> str:
    """Return the recipe as YAML. Needs the `cli` extra."""
    text: str = require("yaml", extra="cli").safe_dump(to_dict(recipe), sort_keys=False)
    return text


def _check_size(yaml: Any, text: str) -> None:
    """Refuse a YAML text whose values nest too deep or are too many, before any of them is made.

    Aliases of anchors that hold aliases grow by a factor a line; here an alias counts as all values of its
    anchor.

    Raises:
        ValueError: see there.
        YAMLError: it is not YAML.
    """
    sizes: dict[str, int] = {}
    counts, anchors = [0], [""]
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        anchor = getattr(event, "anchor", None) or ""
        match event:
            case yaml.AliasEvent():
                counts[-1] += sizes.get(anchor, 1)
            case yaml.ScalarEvent():
                counts[-1] += 1
                sizes[anchor] = 1
            case yaml.CollectionStartEvent():
                counts.append(1)
                anchors.append(anchor)
            case yaml.CollectionEndEvent():
                sizes[anchors.pop()] = size = counts.pop()
                counts[-1] += size
        if len(counts) > MOST_DEPTH:
            raise ValueError(f"nested deeper than {MOST_DEPTH} levels")
        if sum(counts) > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES} values, counted with what aliases stand for")


def _parse(yaml: Any, text: str) -> Any:
    """Return the values of a YAML text; a key that a mapping has twice is an error, where YAML's reader takes
    the last one.
    """

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value:
                if isinstance(key.value, str) and key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {cut(key.value, 80)} stands there twice", key.start_mark
                    )
                seen.add(str(key.value))
            return super().construct_mapping(node, deep)

    _check_size(yaml, text)
    return yaml.load(text, Loader=Loader)


def _read(path: Path) -> str:
    """Return the text of a recipe's file, or of a pipe, as shells make of `<(command)`; never more of it than
    a recipe may have.
    """
    with path.open("rb") as stream:
        found = stream.read(MOST_BYTES + 1)
    if len(found) > MOST_BYTES:
        raise ValueError(f"larger than {MOST_BYTES} bytes")
    return found.decode()


def load(path: Path) -> Recipe:
    """Read a recipe from a YAML file. Needs the `cli` extra.

    Raises:
        ValueError: the file is missing, is not YAML, is too large, or is not a recipe; names the file.
    """
    yaml = require("yaml", extra="cli")
    try:
        values = _parse(yaml, _read(Path(path)))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the recipe {path}: {cut(str(error), LONGEST)}") from error
    try:
        return from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {cut(str(error), LONGEST)}") from error
