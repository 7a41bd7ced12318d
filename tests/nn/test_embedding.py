"""Quantized embeddings against `nn.Embedding` on dequantized rows."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tfmq.nn import embedding
from tfmq.nn.embedding import CalibratedEmbedding, KeptCodes, KeptRows, PackedEmbedding
from tfmq.numerics.grids import IntegerFormat
from tfmq.quantizers.weight import fit_grid


def calibrated(
    bits: int = 8,
    *,
    symmetric: bool = False,
    rows: int = 6,
    width: int = 5,
    dtype: torch.dtype = torch.float32,
) -> CalibratedEmbedding:
    source = nn.Embedding(rows, width, dtype=dtype).requires_grad_(False)
    return CalibratedEmbedding(
        source, fit_grid(source.weight, IntegerFormat(bits, symmetric), method="min_max")
    )


@given(
    st.integers(2, 8),
    st.booleans(),
    st.integers(1, 9),
    st.sampled_from([(3,), (2, 4), ()]),
    st.integers(0, 2**31),
)
def test_a_row_is_off_by_half_a_step_of_its_own_grid_at_most(
    bits: int, symmetric: bool, width: int, shape: tuple[int, ...], seed: int
) -> None:
    torch.manual_seed(seed)
    layer, index = calibrated(bits, symmetric=symmetric, width=width), torch.randint(6, shape)
    assert torch.equal(layer(index), layer.weight[index])
    layer.weight_precision = "quantized"
    step = layer.grid.scale[index]
    assert bool(((layer(index) - layer.weight[index]).abs() <= step * 0.5001 + 1e-7).all())
    packed = layer.finished()
    assert torch.equal(packed(index), layer(index))
    assert torch.equal(nn.functional.embedding(index, packed.weight), packed(index))
    for execution in (KeptCodes(packed.codes), KeptRows(packed.weight)):
        packed.execute(execution)
        assert torch.equal(packed(index), layer(index))


def test_a_look_up_unpacks_the_rows_that_it_reads_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, unpacked = calibrated(4, rows=1000).finished(), []

    def counted(values: torch.Tensor, **options: Any) -> torch.Tensor:
        unpacked.append(len(values))
        return unpack(values, **options)

    unpack = embedding.unpack_unsigned
    monkeypatch.setattr(embedding, "unpack_unsigned", counted)
    packed(torch.tensor([[7, 999], [0, 7]]))
    assert unpacked == [4]


def test_the_output_has_the_dtype_of_the_model_and_follows_it() -> None:
    packed = calibrated(dtype=torch.bfloat16).finished()
    assert packed(torch.tensor([1])).dtype == torch.bfloat16
    assert packed.float()(torch.tensor([1])).dtype == torch.float32
    assert nn.Sequential(packed).half()[0].dtype == torch.float16


def test_an_unused_row_of_zeros_stays_zero() -> None:
    source = nn.Embedding(4, 3, padding_idx=1).requires_grad_(False)
    packed = CalibratedEmbedding(source, fit_grid(source.weight, IntegerFormat(4))).finished()
    assert not packed(torch.tensor([1])).any() and (packed.num_embeddings, packed.embedding_dim) == (4, 3)


def test_other_rows_are_rounded_in_place() -> None:
    packed, rows = calibrated().finished(), torch.randn(6, 5)
    packed.round(rows)
    assert float((packed.weight - rows).abs().max()) < 0.02
    assert isinstance(packed, PackedEmbedding) and packed.stock_weight.shape == rows.shape
