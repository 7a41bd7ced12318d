"""Write the tables of docs/capabilities.md: which backend computes what in integers.

    python3 tasks.py matrix

No row and no column is listed here. Layers come from the register of operations, products from that of
attention products, backends and schemes from theirs. Every cell is what a backend said of a tiny layer that
it was given. Layers that a backend claims are then computed by it, and held against the simulation. The
backend `cuda` runs here too: without a GPU its kernels compute by their definitions in torch.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from tfmq.backends.backend import BACKENDS, Backend, Coverage, Options, release
from tfmq.backends.execution import backend_names  # noqa: F401  importing it fills the register of backends
from tfmq.backends.operators import Cuda
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.trace import trace
from tfmq.nn.operation import OPERATIONS, operation_of
from tfmq.nn.plan import (
    Plan,
    activation_sites,
    pack_all,
    packed_layers,
    prepare,
)
from tfmq.nn.product_mode import SITES
from tfmq.nn.products import ProductKernels, ProductQuantizers, StockProducts
from tfmq.nn.scheme import ActivationScheme, LayerScheme, WeightScheme
from tfmq.numerics.errors import sqnr_db
from tfmq.numerics.grids import GRIDS, MAX_BITS, MIN_BITS, Grid, IntegerFormat, Table
from tfmq.numerics.operations import Operation
from tfmq.quantizers.steps import StepContext
from tfmq.recipes.paper import PAPER
from tfmq.recipes.plan import make_plan
from tfmq.recipes.presets import PRESETS, scheme

PAGE = Path(__file__).with_name("capabilities.md")
WIDTH, SIDE, BATCH = 4, 3, 2
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# dB of SQNR against the simulation. One code of difference in layers this small costs more than 40 dB; a
# wrong result leaves less than 10.
NEAR = 25.0
SAME = "as above"
PLAIN = ("integers", "in the graph", "rows dequantized", "kept dequantized", SAME)


class Grids(NamedTuple):
    """What a layer is quantized to: the grid of its weight, and that of its input, if it has one."""

    weight: Grid
    input: IntegerFormat | None
    tokens: str

    def __str__(self) -> str:
        bits = f"W{self.weight.bits}A{self.input.bits if self.input else 32}"
        return " ".join(
            [
                bits,
                self.weight.describe().get("grid", "symmetric" if self.weight.symmetric else "asymmetric"),
                *([] if self.tokens == "static" else [self.tokens]),
            ]
        )


class Assembly(nn.Module):
    """Layers side by side: each reads a part of `x` `[B, N]`, and the outputs are joined."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.axes = {name: layer.weight.ndim - 2 for name, layer in layers.items()}

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        outputs = []
        for name, layer in self.layers.items():
            shape = (WIDTH, *[SIDE] * self.axes[name]) if self.axes[name] else (SIDE, WIDTH)
            count = torch.Size(shape).numel()
            outputs.append(layer(x[:, :count].reshape(-1, *shape)).flatten(1))
        return torch.cat(outputs, dim=1)


class Product(nn.Module):
    """A module that computes one attention product by one function of torch."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        try:
            return self.function(x, x.mT)
        except TypeError:
            return self.function(x, x, x)


def kinds() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Yield every kind of layer that the register of operations knows, in words, with what builds it; grouped
    ones too, where there are any.
    """
    for kind in OPERATIONS:
        for groups in (1, 2):
            build = functools.partial(
                kind,
                WIDTH,
                WIDTH,
                **({"kernel_size": 3, "padding": 1, "groups": groups} if has_groups(kind) else {}),
            )
            if groups == 1 or has_groups(kind):
                layer = build()
                axes = layer.weight.ndim - 2
                grouped = "grouped " if groups > 1 else ""
                spatial = f", {axes} {'axis' if axes == 1 else 'axes'}" if axes else ""
                yield f"{grouped}{operation(layer).kind}{spatial}", build


def has_groups(kind: type[nn.Module]) -> bool:
    """Whether layers of this kind may have groups."""
    return "groups" in kind.__init__.__annotations__


def operation(layer: nn.Module) -> Operation:
    """Return the operation of a layer that has one."""
    found = operation_of(layer)
    assert found is not None, layer
    return found


class Resample(nn.Module):
    """A convolution that changes the size of its input."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(nn.functional.interpolate(x, scale_factor=self.factor))


class TimeEmbedding(nn.Module):
    """Two layers that read the timestep alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(2, WIDTH)
        self.linear_2 = nn.Linear(WIDTH, WIDTH)

    def forward(self, t: Tensor) -> Tensor:
        return self.linear_2(nn.functional.silu(self.linear_1(torch.stack([t.sin(), t.cos()], dim=1))))


class Block(nn.Module):
    """A residual block that reads a concatenation, and attends."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_shortcut = nn.Conv2d(2 * WIDTH, WIDTH, 1)
        self.conv = nn.Conv2d(2 * WIDTH, WIDTH, 3, padding=1)
        self.to_q = nn.Linear(WIDTH, WIDTH)
        self.to_out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        hidden = (self.conv(torch.relu(x)) + embedding[:, :, None, None]).flatten(2).mT
        hidden = self.to_out(nn.functional.scaled_dot_product_attention(self.to_q(hidden), hidden, hidden))
        return self.conv_shortcut(x) + hidden.mT.unflatten(2, x.shape[2:])


class Tiny(nn.Module):
    """The smallest denoiser that has a layer for every rule of the recipes, under diffusers' names."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embedding = TimeEmbedding()
        self.conv_in = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        first = nn.ModuleDict({"conv1": nn.Conv2d(WIDTH, WIDTH, 3, padding=1)})
        down = nn.ModuleDict(
            {"resnets": nn.ModuleList([first]), "downsamplers": nn.ModuleList([Resample(0.5)])}
        )
        self.down_blocks = nn.ModuleList([down])
        self.up = nn.ModuleDict({"upsamplers": nn.ModuleList([Resample(2.0)]), "block": Block()})
        self.conv_out = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        embedding, entry, down = self.time_embedding(t), self.conv_in(x), self.down_blocks[0]
        smaller = down["downsamplers"][0](down["resnets"][0]["conv1"](entry))
        hidden = self.up["upsamplers"][0](smaller)
        return self.conv_out(self.up["block"](torch.cat([entry, hidden], dim=1), embedding))


def schemes() -> dict[str, Plan]:
    """Return what every preset and every published experiment makes of the tiny denoiser."""
    traced = trace(Denoiser(Tiny()), Inputs(torch.zeros(1, WIDTH, 4, 4), torch.zeros(1)))
    return {name: make_plan(scheme(name), traced) for name in (*PRESETS, *PAPER)}


def grids(plans: Iterable[Plan]) -> list[Grids]:
    """Return every pair of grids that a scheme gives a layer, and beside them the narrowest and the widest
    weights of either symmetry.
    """
    layers = [layer for plan in plans for layer in plan.layers.values()]
    tokens = {
        "dynamic" if layer.input and layer.input.tokens == "measured" else "static" for layer in layers
    } | {"static"}
    weights = {layer.weight.grid for layer in layers} | {
        IntegerFormat(bits, symmetric) for bits in (MIN_BITS, MAX_BITS) for symmetric in (False, True)
    }
    inputs = {layer.input.grid if layer.input else None for layer in layers}
    pairs = [
        Grids(weight, entry, kind)
        for weight in weights
        for entry in inputs
        for kind in (sorted(tokens) if entry else ["static"])
    ]
    pairs += [Grids(Table(name, values), IntegerFormat(MAX_BITS), "static") for name, values in GRIDS.items()]
    return sorted(
        pairs,
        key=lambda pair: (
            pair.tokens == "dynamic",
            pair.input is None,
            pair.weight.bits,
            pair.weight.symmetric,
        ),
    )


def fit(module: nn.Module) -> None:
    """Give every activation quantizer a grid for inputs of about one."""
    for site in activation_sites(module).values():
        shape = site.scale.shape
        site.fit(torch.full(shape, 8 / site.format.levels), torch.full(shape, float(site.format.middle)))


def quantized(module: nn.Module, plan: Plan) -> nn.Module:
    """Return a module with its layers packed by a plan, in simulated arithmetic."""
    prepare(module.requires_grad_(False).eval(), plan, StepContext(torch.tensor([0.0, 500.0])), timestep="t")
    fit(module)
    pack_all(module)
    return module


def quantizer(entry: Grids) -> ActivationScheme | None:
    """Return the plan of a layer's input."""
    return ActivationScheme(grid=entry.input, ranges="min_max", tokens=entry.tokens) if entry.input else None  # type: ignore[arg-type]


def assembly(
    rows: Sequence[tuple[Callable[[], nn.Module], Grids]], dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Return layers with their grids, quantized, called `layers.0` and so on."""
    layers = {str(number): build() for number, (build, _) in enumerate(rows)}
    for layer in layers.values():
        # One extreme value a row: an asymmetric grid of eight bits then has codes that no signed byte holds.
        layer.weight.data.copy_(
            torch.full_like(layer.weight, -0.1).masked_fill_(torch.rand_like(layer.weight) < 0.3, 0.5)
        )
    plans = {
        f"layers.{number}": LayerScheme(
            weight=WeightScheme(grid=entry.weight, ranges="min_max"), input=quantizer(entry)
        )
        for number, (_, entry) in enumerate(rows)
    }
    return quantized(Assembly(layers).to(dtype), Plan(plans, {}))


def attached(backend: Backend, module: nn.Module) -> Coverage:
    """Let a backend say what of a module it computes in integers. Tiles of a GPU are not looked for: there
    may be none.
    """
    release(module)
    backend.missing()
    with ExitStack() as stack:
        if isinstance(backend, Cuda):
            stack.enter_context(patch("tfmq.backends.tuned.StoredTiles.of_device"))
            stack.enter_context(patch("tfmq.kernels.gpu.tiles.keep_in"))
        return backend.attach(module, Options())


def cell(coverage: Coverage, name: str) -> str:
    """Return what a backend does with a layer: `integers`, or why not."""
    return "integers" if name in coverage.integer else coverage.floating[name]


@torch.no_grad()
def computed(module: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the output of an assembly for the same input each time."""
    noise = torch.randn(BATCH, WIDTH * SIDE**3, generator=torch.Generator().manual_seed(0))
    output: Tensor = module(noise.to(dtype), torch.zeros(BATCH))
    return output


def layer_rows(entries: Sequence[Grids]) -> dict[tuple[str, str], tuple[str, ...]]:
    """Return a row of cells for every kind of layer and pair of grids."""
    wanted = [
        (kind, entry, build)
        for kind, build in kinds()
        for entry in entries
        if entry.tokens == "static" or operation(build()).channel_axis < 0
    ]
    module, columns = assembly([(build, entry) for _, entry, build in wanted]), []
    for backend in BACKENDS.values():
        coverage = attached(backend, module)
        columns.append([cell(coverage, f"layers.{number}") for number in range(len(wanted))])
    return {
        (kind, str(entry)): cells
        for (kind, entry, _), cells in zip(wanted, zip(*columns, strict=True), strict=True)
    }


def product_rows() -> dict[str, tuple[str, ...]]:
    """Return a row of cells for every function that computes an attention product."""
    rows = {}
    for function, count in SITES.items():
        entry = ActivationScheme(grid=IntegerFormat(MAX_BITS), ranges="min_max", shared=True)
        module = quantized(Product(function), Plan({}, {"": (count, entry)}))
        cells = []
        for backend in BACKENDS.values():
            attached(backend, module)
            cells.append(product_cell(module))
        owner, _, name = function.__qualname__.rpartition(".")
        spelled = owner.replace("_VariableFunctionsClass", "torch").replace("TensorBase", "Tensor")
        rows[f"`{spelled}.{name}`" if spelled else f"`{name}`"] = tuple(cells)
    return rows


def product_cell(module: nn.Module) -> str:
    """Return what computes the products of a module."""
    (owner,) = (child for child in module.modules() if isinstance(child, ProductQuantizers))
    if isinstance(owner.execution, ProductKernels):
        return "integers"
    if isinstance(owner.execution, StockProducts):
        return "float"
    return "simulated" if module.tfmq_executor is None else "in the graph"


def embedding_row() -> tuple[str, ...]:
    """Return what each backend does with an embedding: whether it keeps the rows in the model's dtype, or
    dequantizes those that a call reads.
    """
    cells = []
    for backend in BACKENDS.values():
        module = quantized(
            Lookup(), Plan({}, {}, {"table": WeightScheme(grid=IntegerFormat(MAX_BITS), ranges="min_max")})
        )
        attached(backend, module)
        cells.append("rows dequantized" if module.table.execution is None else "kept dequantized")
    return tuple(cells)


class Lookup(Assembly):
    """An embedding alone."""

    def __init__(self) -> None:
        super().__init__({})
        self.table = nn.Embedding(WIDTH, WIDTH)


def dtype_rows(entry: Grids) -> dict[str, tuple[str, ...]]:
    """Return for every dtype of a model whether each backend computes it, by running layers; in float32, the
    dtype of most, one of every kind.
    """
    builds = [build for _, build in kinds()]
    few = list({operation(build()).kind: build for build in builds}.values())
    rows = {}
    for dtype in DTYPES:
        module = assembly([(build, entry) for build in (builds if dtype == torch.float32 else few)], dtype)
        expected, cells = computed(module, dtype), []
        for backend in BACKENDS.values():
            attached(backend, module)
            try:
                output = computed(module, dtype)
            except (RuntimeError, TypeError) as error:
                cells.append(f"no, {type(error).__name__}")
                continue
            near = sqnr_db(expected, output)
            cells.append("yes" if output.dtype == dtype and near > NEAR else f"{output.dtype}, {near:.0f} dB")
        rows[str(dtype).removeprefix("torch.")] = tuple(cells)
    return rows


def scheme_rows(plans: Mapping[str, Plan]) -> dict[str, tuple[str, ...]]:
    """Return for every scheme how many layers of the tiny denoiser each backend computes in integers; schemes
    with one plan share a row.
    """
    groups: list[tuple[Plan, list[str]]] = []
    for name, plan in plans.items():
        same = next((names for other, names in groups if other == plan), None)
        if same is None:
            groups.append((plan, [name]))
        else:
            same.append(name)
    rows = {}
    for plan, names in groups:
        module = quantized(Tiny(), plan)
        total, cells = len(packed_layers(module)), []
        for backend in BACKENDS.values():
            cells.append(f"{len(attached(backend, module).integer)} of {total}")
        rows[", ".join(f"`{name}`" for name in names)] = tuple(cells)
    return rows


def merged(rows: Mapping[str, tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return the rows of a table, those with equal cells as one."""
    found: dict[tuple[str, ...], list[str]] = {}
    for label, cells in rows.items():
        found.setdefault(cells, []).append(label)
    return [("; ".join(labels), *cells) for cells, labels in found.items()]


def usual(rows: Mapping[tuple[str, str], tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Return for every kind of layer its cells with the grids that most backends take."""
    by_kind: dict[str, list[tuple[str, ...]]] = {}
    for (kind, _), cells in rows.items():
        by_kind.setdefault(kind, []).append(cells)
    return {kind: max(many, key=lambda cells: cells.count("integers")) for kind, many in by_kind.items()}


def by_grids(
    rows: Mapping[tuple[str, str], tuple[str, ...]], most: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """Return for every pair of grids the cells that are not the usual ones of a kind of layer."""
    found: dict[str, list[dict[str, None]]] = {}
    for (kind, entry), cells in rows.items():
        columns = found.setdefault(entry, [{} for _ in cells])
        for column, own, other in zip(columns, cells, most[kind], strict=True):
            column.update({own: None} if own != other else {})
    return {entry: tuple(", ".join(column) or SAME for column in columns) for entry, columns in found.items()}


class Notes:
    """Reasons, numbered in the order in which they come first."""

    def __init__(self) -> None:
        self.reasons: dict[str, int] = {}

    def __call__(self, cell: str) -> str:
        """Return a cell, a reason as `float` with its number."""
        if cell in PLAIN or cell in BACKENDS:
            return cell
        return f"float, {self.reasons.setdefault(cell, len(self.reasons) + 1)}"

    def rows(self, rows: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
        """Return rows of a table with their reasons as numbers."""
        return [(label, *map(self, cells)) for label, *cells in rows]

    def __str__(self) -> str:
        return "".join(f"{number}. {reason}\n" for reason, number in self.reasons.items())


def table(head: str, rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table with a column for every backend."""
    heads = [head, *(f"`{name}`" for name in BACKENDS)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)) + "\n"


def tables() -> dict[str, str]:
    """Return the generated parts of the page, by name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plans, notes = schemes(), Notes()
        entries = grids(plans.values())
        rows = layer_rows(entries)
        most = usual(rows)
        layers = notes.rows(merged({**most, **product_rows(), "`Embedding`": embedding_row()}))
        other = notes.rows(row for row in merged(by_grids(rows, most)))
        return {
            "layers": table("layer or product", layers) + f"\n{notes}",
            "grids": table("grids", other),
            "dtypes": table("dtype of the model", merged(dtype_rows(entries[0]))),
            "schemes": table("scheme", merged(scheme_rows(plans))),
        }


def page(text: str) -> str:
    """Return the text of the page with its generated parts as they are today.

    Raises:
        ValueError: a part has no place in it.
    """
    for name, body in tables().items():
        start, end = f"<!-- {name}: generated by docs/capabilities.py -->\n", f"<!-- end of {name} -->"
        if start not in text or end not in text:
            raise ValueError(f"{PAGE.name} has no part {name}")
        text = text[: text.index(start) + len(start)] + body + text[text.index(end) :]
    return text


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
