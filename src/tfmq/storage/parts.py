"""The quantized parts of a denoiser as a manifest describes them (docs/format.md, `structure`): frozen values
of checked types.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from tfmq.errors import shown
from tfmq.numerics.grids import MAX_BITS, MIN_BITS, is_table
from tfmq.numerics.groups import SMALLEST
from tfmq.numerics.rotation import ORDER, is_group

from .fields import Fields

__all__ = ["Branch", "Correction", "Input", "Layer", "Products", "Structure", "Table"]

# Bounds on what is built before any tensor was read. No real model comes near them.
MOST_STEPS = 100_000
MOST_CHANNELS = 2**24
MOST_AXES = 8
MOST_ROTATED = 2**16
MOST_RANK = 2**12
# What a layer and a structure may have. What this reader does not know would be left out of the computation,
# so it is refused.
LAYER = frozenset(
    {
        *("bits", "symmetric", "grid", "values", "group", "segments", "input", "kind", "names"),
        *("rescaled", "rotated", "ordered", "branch"),
    }
)
BRANCH = frozenset({"rank", "dtype"})
FACTORS = ("float16", "bfloat16", "float32", "int8", "int8_weight_only")
KNOWN = frozenset({"steps", "timestep", "networks", "layers", "products", "tables", "skipped", "corrections"})


@dataclass(frozen=True)
class Input:
    """The quantizer of a layer's input or of a product's operand; a `dynamic` one is never `per_step` and has
    no tensors.
    """

    bits: int
    symmetric: bool
    segments: tuple[int, ...]
    per_step: bool
    dynamic: bool

    @classmethod
    def from_json(cls, fields: Fields) -> "Input":
        """Return the quantizer that `fields` describe."""
        dynamic = "dynamic" in fields.values
        if dynamic:
            fields.choice("dynamic", ("token",))
        else:
            fields.integer("axis", -MOST_AXES, MOST_AXES - 1)
        return cls(*_grid(fields), per_step=not dynamic and fields.flag("per_step"), dynamic=dynamic)


@dataclass(frozen=True)
class Branch:
    """Two factors beside a layer: their rank, and their dtype, which may be `int8_weight_only`."""

    rank: int
    dtype: str


@dataclass(frozen=True)
class Layer:
    """A quantized layer: its weight grid, the quantizer of its input, None for full precision, whether that
    input is multiplied by a factor, the channels of a group in which it is rotated, 0 for none, whether its
    channels are in another order, those of a group of the weight, and what is computed beside it. `values`
    are those of a grid that is not uniform.
    """

    bits: int
    symmetric: bool
    segments: tuple[int, ...]
    input: Input | None
    rescaled: bool = False
    rotated: int = 0
    ordered: bool = False
    values: tuple[int, ...] = ()
    group: int = 0
    branch: Branch | None = None


@dataclass(frozen=True)
class Products:
    """The quantizers of the two operands of each product of an owner; None for full precision."""

    left: tuple[Input | None, ...]
    right: tuple[Input | None, ...]


@dataclass(frozen=True)
class Table:
    """A layer whose output comes from a table."""

    format: Literal["int8", "float16"]
    everywhere: bool


@dataclass(frozen=True)
class Correction:
    """A correction of a prediction: so many channels, on this axis of it."""

    channels: int


@dataclass(frozen=True)
class Structure:
    """All quantized parts, by the names of modules of the stock architecture.

    A component without a `timestep` lists its `networks`, which compute calls of their own; the one of a
    denoiser is the denoiser, called "".

    Raises (from `from_json`):
        ForeignFileError: a value of another type, out of bounds, or a name twice; names its place.
    """

    steps: int
    timestep: str | None
    layers: Mapping[str, Layer] = field(default_factory=dict)
    products: Mapping[str, Products] = field(default_factory=dict)
    tables: Mapping[str, Table] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    corrections: Mapping[str, Correction] = field(default_factory=dict)
    networks: tuple[str, ...] = ("",)

    @classmethod
    def from_json(cls, fields: Fields) -> "Structure":
        """Return the parts that `fields`, a manifest's `structure`, describe."""
        fields.only(KNOWN)
        networks = _networks(fields)
        layers = {name: _layer(group) for name, group in _named(fields, "layers")}
        products = {name: _products(group) for name, group in _named(fields, "products", empty=True)}
        tables = {name: _table(group) for name, group in _named(fields, "tables")}
        skipped = fields.names("skipped")
        if twice := sorted(tables.keys() & set(skipped)):
            raise fields.refuse("skipped", f"a list of names that are not in tables, as {twice[0]} is")
        corrections = (
            {name: _correction(group) for name, group in _named(fields, "corrections")}
            if "corrections" in fields.values
            else {}
        )
        return cls(
            fields.integer("steps", 1, MOST_STEPS),
            None if networks else fields.text("timestep"),
            layers,
            products,
            tables,
            skipped,
            corrections,
            networks or ("",),
        )

    def stored_name(self, name: str) -> str:
        """Return the name of a layer in the checkpoint: behind a table, or skipped, it is that module's
        `block`.
        """
        return f"{name}.block" if name in self.tables or name in self.skipped else name


def _networks(fields: Fields) -> tuple[str, ...]:
    """Return the names of the networks of a component without a timestep; none for a denoiser."""
    if "networks" not in fields.values:
        return ()
    found = fields.names("networks", empty=True)
    if not found or "timestep" in fields.values:
        raise fields.refuse("networks", "absent beside timestep, or a list of at least one name")
    return found


def _grid(fields: Fields) -> tuple[int, bool, tuple[int, ...]]:
    """Return bits, of which one is enough for a table, symmetry and segments."""
    return (
        fields.integer("bits", 1 if "values" in fields.values else MIN_BITS, MAX_BITS),
        fields.flag("symmetric"),
        fields.widths("segments", most=MOST_CHANNELS),
    )


def _named(fields: Fields, kind: str, *, empty: bool = False) -> Iterator[tuple[str, Fields]]:
    """Yield the names of the groups `kind`, each with its group."""
    seen: set[str] = set()
    for group in fields.parts(kind):
        names = group.names("names", empty=empty)
        if twice := sorted(seen.intersection(names)):
            raise group.refuse("names", f"a list of names that are in no other group, as {twice[0]} is")
        seen.update(names)
        yield from ((name, group) for name in names)


def _layer(group: Fields) -> Layer:
    found = (
        None if "input" in group.values and not group.has("input") else Input.from_json(group.part("input"))
    )
    group.only(LAYER)
    rescaled = "rescaled" in group.values and group.flag("rescaled")
    layer = Layer(
        *_grid(group),
        input=found,
        rescaled=rescaled,
        rotated=_rotated(group),
        ordered=_ordered(group),
        values=_values(group),
        group=_group(group),
        branch=_branch(group),
    )
    if layer.group and any(width % layer.group for width in layer.segments):
        raise group.refuse("group", "a number that divides every segment")
    if found is not None and found.segments != layer.segments:
        raise group.part("input").refuse("segments", f"those of the layer, {shown(list(layer.segments))}")
    return layer


def _rotated(group: Fields) -> int:
    """Return the channels of a group that is rotated, 0 for none."""
    if "rotated" not in group.values:
        return 0
    size = group.integer("rotated", ORDER, MOST_ROTATED)
    if not is_group(size) or "kind" in group.values:
        raise group.refuse("rotated", "a power of four, of a layer without kind")
    return size


def _ordered(group: Fields) -> bool:
    """Return whether the channels of the input are in another order, which segments are there for."""
    if "ordered" not in group.values or not group.flag("ordered"):
        return False
    if group.values.get("kind") == "embedding" or not group.items("segments"):
        raise group.refuse("ordered", "absent from an embedding, and from a layer without segments")
    return True


def _group(group: Fields) -> int:
    """Return the channels of a group of a weight, 0 for none."""
    if "group" not in group.values:
        return 0
    if group.values.get("kind") == "embedding":
        raise group.refuse("group", "absent: an embedding has one grid a row")
    return group.integer("group", SMALLEST, MOST_CHANNELS)


def _branch(group: Fields) -> Branch | None:
    """Return what is computed beside a layer."""
    if "branch" not in group.values:
        return None
    if group.values.get("kind") == "embedding":
        raise group.refuse("branch", "absent from an embedding, which multiplies nothing")
    branch = group.part("branch")
    branch.only(BRANCH)
    return Branch(branch.integer("rank", 1, MOST_RANK), branch.choice("dtype", FACTORS))


def _values(group: Fields) -> tuple[int, ...]:
    """Return the values of a table of signed bytes, ascending and with zero among them; none for a uniform
    grid.
    """
    if "grid" not in group.values and "values" not in group.values:
        return ()
    group.text("grid")
    values, levels = group.items("values"), 2 ** group.integer("bits", 1, MAX_BITS)
    known = all(type(value) is int and -128 <= value <= 127 for value in values)
    if not known or not is_table(values) or not levels // 2 < len(values) <= levels:
        zero = "one on either side of 0" if levels == 2 else "0 among them"
        wanted = f"a list of {levels // 2 + 1} to {levels} integers of -128 to 127, ascending, {zero}"
        raise group.refuse("values", wanted)
    if not group.flag("symmetric"):
        raise group.refuse("symmetric", "true, as a table has no zero-points")
    return tuple(values)


def _products(group: Fields) -> Products:
    left, right = (
        tuple(_operand(group, side, place) for place in range(len(group.items(side))))
        for side in ("left", "right")
    )
    if len(left) != len(right):
        raise group.refuse("right", f"a list of {len(left)} operands, as left is")
    return Products(left, right)


def _operand(group: Fields, side: str, place: int) -> Input | None:
    value = group.items(side)[place]
    if value is None:
        return None
    fields = Fields.of(value, group.source, f"{group.path}{side}[{place}].")
    found = Input.from_json(fields)
    if found.dynamic or found.segments:
        raise fields.refuse(
            "dynamic" if found.dynamic else "segments", "that of a static quantizer with one grid"
        )
    return found


def _table(group: Fields) -> Table:
    return Table(group.choice("format", ("int8", "float16")), group.flag("everywhere"))  # type: ignore[arg-type]


def _correction(group: Fields) -> Correction:
    group.integer("axis", -MOST_AXES, MOST_AXES - 1)
    return Correction(group.integer("channels", 1, MOST_CHANNELS))
