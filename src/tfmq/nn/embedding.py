"""Quantized embeddings: look-ups of rows, of which a call dequantizes those that it reads."""

from abc import abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tfmq.nn.packed import PackedWeight
from tfmq.numerics.grids import Grid
from tfmq.numerics.packing import unpack_unsigned
from tfmq.quantizers.part import Execution, Held, Part, Precision
from tfmq.quantizers.weight import WeightGrid


class CalibratedEmbedding(Part):
    """An embedding during calibration: the full-precision rows, their nearest codes, and a choice between the
    two.

    No rounding is learned: a row is read as it is, so that its nearest codes are its best.
    """

    codes: Tensor

    def __init__(self, source: nn.Embedding, grid: WeightGrid) -> None:
        super().__init__()
        self.grid = grid
        self.weight = nn.Parameter(source.weight.detach(), requires_grad=False)
        self.weight_precision: Precision = "full"
        self.register_buffer("codes", grid.encode(self.weight).to(torch.uint8), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of whole numbers, in full precision or on their grids."""
        if self.weight_precision == "full":
            return F.embedding(input, self.weight)
        scale, zero_point = self.grid.scale[input], self.grid.zero_point[input]
        codes = self.codes[input].to(scale.dtype)
        return (self.grid.format.integers(codes, zero_point) * scale).to(self.weight.dtype)

    def choose(self, *, weights: Precision | None, inputs: Precision | None) -> Callable[[], None]:
        """Choose the precision of the weight; there is no input to quantize."""
        before = self.weight_precision
        self.weight_precision = weights or before

        def undo() -> None:
            self.weight_precision = before

        return undo

    def finished(self) -> "PackedEmbedding":
        """Return the packed form; it gives bitwise the same rows."""
        packed = PackedEmbedding(self.grid.format, tuple(self.weight.shape), dtype=self.weight.dtype).to(
            self.weight.device
        )
        packed.fill(self.codes, self.grid)
        return packed


class PackedEmbedding(PackedWeight):
    """An embedding at rest: packed codes `[rows, width]`, with a scale and a zero-point for each row. Its
    output has the model's `dtype`.
    """

    execution: "EmbeddingExecution | None"

    def __init__(self, fmt: Grid, shape: tuple[int, ...], *, dtype: torch.dtype) -> None:
        super().__init__(fmt, shape)
        self.dtype = dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedEmbedding":
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    @property
    def num_embeddings(self) -> int:
        """Rows, as a stock embedding has them."""
        return self.shape[0]

    @property
    def embedding_dim(self) -> int:
        """Width of a row, as a stock embedding has it."""
        return self.shape[1]

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of whole numbers, decoded."""
        if self.execution is None:
            return self.decoded(input, self._rows(input.flatten()))
        return self.execution.compute(self, input)

    def decoded(self, input: Tensor, codes: Tensor) -> Tensor:
        """Return the rows of whole numbers from their `codes` `[n, width]`."""
        index = input.flatten()
        scale = self.scale[index]
        zero_point = (
            torch.full_like(scale, self.format.middle)
            if self.zero_point is None
            else self.zero_point[index].to(scale.dtype)
        )
        rows = self.format.integers(codes.to(scale.dtype), zero_point) * scale
        return rows.reshape(*input.shape, self.shape[1]).to(self.dtype)

    def _rows(self, index: Tensor) -> Tensor:
        # Do not use `len`, which a graph would take for a constant.
        return unpack_unsigned(
            self.packed[index], bits=self.format.bits, shape=(index.shape[0], self.shape[1])
        )

    def extra_repr(self) -> str:
        """Return shape and bits for the printed model."""
        return f"shape={self.shape}, bits={self.format.bits}"


class EmbeddingExecution(Execution):
    """How a packed embedding computes."""

    @abstractmethod
    def compute(self, embedding: PackedEmbedding, input: Tensor) -> Tensor:
        """Return the rows of whole numbers."""


class KeptRows(EmbeddingExecution):
    """An embedding whose dequantized `weight` is kept, in the model's dtype."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = Held(weight)

    def compute(self, embedding: PackedEmbedding, input: Tensor) -> Tensor:
        """Return rows of the weight."""
        return F.embedding(input, self.weight())


class KeptCodes(EmbeddingExecution):
    """An embedding whose unpacked `codes` are kept, uint8 `[rows, width]`: engines have no operators that
    unpack.
    """

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.codes = Held(codes)

    def compute(self, embedding: PackedEmbedding, input: Tensor) -> Tensor:
        """Return the rows of the codes, decoded."""
        return embedding.decoded(input, self.codes()[input.flatten()])
