"""Temporal features from a table (cache-based maintenance; Temporal Feature Matters, Huang et al., 2025)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from tfmq.nn.operation import weight_of
from tfmq.nn.submodules import submodules
from tfmq.numerics.affine import dequantize, quantize
from tfmq.numerics.grids import IntegerFormat
from tfmq.numerics.ranges import min_max
from tfmq.quantizers.part import Part
from tfmq.quantizers.steps import StepContext

TableFormat = Literal["int8", "float16"]
_INT8 = IntegerFormat(8)


class FeatureTable(Part):
    """The values of one temporal feature at every calibrated timestep.

    `values` `[S, d]` is uint8 with `scale` and `zero_point` `[S]` of their own for each timestep, or float16
    without them.
    """

    values: Tensor
    scale: Tensor | None
    zero_point: Tensor | None

    def __init__(self, steps: int, width: int, table_format: TableFormat) -> None:
        super().__init__()
        if table_format not in ("int8", "float16"):
            raise ValueError(f"a temporal table is int8 or float16, got {table_format!r}")
        self.table_format: TableFormat = table_format
        integer = table_format == "int8"
        self.register_buffer(
            "values", torch.zeros(steps, width, dtype=torch.uint8 if integer else torch.float16)
        )
        self.register_buffer("scale", torch.ones(steps) if integer else None)
        self.register_buffer("zero_point", torch.zeros(steps, dtype=torch.uint8) if integer else None)

    @torch.no_grad()
    def fit(self, feature: Tensor) -> None:
        """Store a feature `[S, d]`; integer tables use the exact range of each timestep."""
        if self.scale is None or self.zero_point is None:
            self.values.copy_(feature)
            return
        scale, zero_point = min_max(feature, _INT8)
        self.values.copy_(quantize(feature, scale[:, None], zero_point[:, None], _INT8.levels))
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def forward(self, index: Tensor) -> Tensor:
        """Return the feature at bins `index` `[B]`, float32 `[B, d]`."""
        values = self.values[index]
        if self.scale is None or self.zero_point is None:
            return values.float()
        return dequantize(values, self.scale[index, None], self.zero_point[index, None].to(self.scale.dtype))


def _for_rows(values: Tensor, x: Tensor) -> Tensor:
    """Repeat `values` `[B, ...]` for an input with several rows a sample, such as the frames of a video; a
    single row serves any number.
    """
    # Do not use `len`, which a graph would take for a constant.
    batch, rows = values.shape[0], x.shape[0]
    return values.repeat_interleave(rows // batch, dim=0) if batch > 1 and rows != batch else values


def _as_output(values: Tensor, x: Tensor) -> Tensor:
    """Return rows `[B or 1, d]` as a layer would put them out for the input `x`, of which nothing is read but
    what a graph knows of it.
    """
    return values if values.shape[0] == x.shape[0] else values.expand(x.shape[0], -1)


class CachedFeature(Part):
    """A temporal layer whose output comes from a table at the timesteps that selected it.

    `use_table` `[S]` holds the choice of disturbance-aware selection for each timestep. The layer itself
    stays as `block`: it serves the timesteps that kept it, and schedules that the table does not know. Where
    whoever runs the denoiser has the output of a call already, `given_features` sets it as `given` `[B, d]`,
    and neither table nor block is read.
    """

    use_table: Tensor

    def __init__(
        self, block: nn.Module, table: FeatureTable, steps: StepContext, *, everywhere: bool
    ) -> None:
        super().__init__()
        self.block = block
        self.table = table
        self.everywhere = everywhere
        self.enabled = True
        self.given: Tensor | None = None
        self._steps = (steps,)
        self.register_buffer("use_table", torch.ones(len(steps.timesteps), dtype=torch.uint8))

    @property
    def weight(self) -> Tensor:
        """The weight of the layer behind the table."""
        return weight_of(self.block)

    @property
    def width(self) -> int:
        """The number of values of the feature."""
        return self.table.values.shape[1]

    def forward(self, input: Tensor) -> Tensor:
        """Return the feature from the table where the timestep is in it and the table serves, else from the
        layer.
        """
        x, (steps,) = input, self._steps
        if self.given is not None:
            return _as_output(_for_rows(self.given, x).to(x.dtype), x)
        if not self.enabled:
            return self.block(x)
        index, exact = _for_rows(steps.index, x), _for_rows(steps.exact, x)
        cached = self.table(index).to(x.dtype)
        if self.everywhere and steps.all_exact:
            return _as_output(cached, x)
        use = self.use_table[index].bool() & exact
        return torch.where(use[:, None], cached, self.block(x))


class SkippedLayer(Part):
    """A temporal layer that nothing needs while every feature comes from its table; it returns zeros then,
    without computing.
    """

    def __init__(self, block: nn.Module, width: int, steps: StepContext) -> None:
        super().__init__()
        self.block = block
        self.width = width
        self.enabled = True
        self._steps = (steps,)

    @property
    def weight(self) -> Tensor:
        """The weight of the skipped layer."""
        return weight_of(self.block)

    def forward(self, input: Tensor) -> Tensor:
        """Return zeros where nothing reads the layer, else its output."""
        x = input
        if self.enabled and self._steps[0].all_exact:
            # Read only what a graph knows of `x` without computing it: dtype, device and shape.
            return torch.zeros(1, dtype=x.dtype, device=x.device).expand(*x.shape[:-1], self.width)
        return self.block(x)


def cached_features(module: nn.Module) -> dict[str, CachedFeature]:
    """Return every temporal layer behind a table below `module`, by name, in the order in which
    `given_features` takes their outputs.
    """
    return submodules(module, CachedFeature)


def tabulated(module: nn.Module, index: Tensor) -> Tensor:
    """Return the rows of all tables at bins `index` `[B]` side by side, float32 `[B, D]`."""
    return torch.cat([child.table(index) for child in cached_features(module).values()], dim=1)


@contextmanager
def given_features(module: nn.Module, values: Tensor) -> Iterator[None]:
    """Let the temporal layers behind tables put out `values` `[B, D]` for a while, each its own columns,
    whatever the timestep.
    """
    children = list(cached_features(module).values())
    try:
        for child, part in zip(
            children, values.split([child.width for child in children], dim=1), strict=True
        ):
            child.given = part
        yield
    finally:
        for child in children:
            child.given = None


# Where peft keeps the layer that an adapter stands beside.
ADAPTED = "base_layer"


def stock_name(module: nn.Module, name: str) -> str:
    """Return the name in the stock architecture of the layer that is now called `name` below `module`: tables
    and skips keep it as `block`, adapters as `base_layer`.
    """
    parent, _, last = name.rpartition(".")
    if last == ADAPTED and parent:
        return parent
    return (
        parent
        if last == "block" and isinstance(module.get_submodule(parent), CachedFeature | SkippedLayer)
        else name
    )


@contextmanager
def without_tables(module: nn.Module) -> Iterator[None]:
    """Compute every temporal feature with its layers for a while, as for a schedule that was not cached."""
    cached = [child for child in module.modules() if isinstance(child, CachedFeature | SkippedLayer)]
    before = [child.enabled for child in cached]
    for child in cached:
        child.enabled = False
    try:
        yield
    finally:
        for child, enabled in zip(cached, before, strict=True):
            child.enabled = enabled
