import pytest
import torch
from torch import Tensor, nn

from tfmq.nn.operation import is_embedding, operation_of, register_operation, weight_of
from tfmq.numerics.operations import Convolution, Linear, TransposedConvolution


class Standardized(nn.Conv2d):
    """A convolution that computes with another weight than the one it holds."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class Named(nn.Linear):
    """A subclass that computes what its parent does."""


def test_stock_layers_have_their_operation() -> None:
    assert operation_of(nn.Linear(2, 3)) == Linear()
    expected = Convolution((2, 2), (1, 1), (3, 3), 2)
    assert operation_of(nn.Conv2d(4, 4, 3, stride=2, padding=1, dilation=3, groups=2)) == expected
    assert operation_of(Named(2, 3)) == Linear()
    transposed = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, dilation=2, groups=2)
    assert operation_of(transposed) == TransposedConvolution((2, 2), (1, 1), (1, 1), (2, 2), 2)
    assert weight_of(transposed).shape == (6, 2, 3, 3)


def test_embeddings_that_only_look_up_are_known() -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    assert is_embedding(nn.Embedding(3, 2)) and is_embedding(nn.Embedding(3, 2, padding_idx=0))
    others = (Scaled(3, 2), nn.Embedding(3, 2, max_norm=1.0), nn.EmbeddingBag(3, 2), nn.Linear(3, 2))
    assert not any(map(is_embedding, others))


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
        nn.Embedding(3, 2),
        nn.LayerNorm(2),
        nn.Bilinear(2, 2, 2),
    ],
)
def test_what_has_no_quantized_form_has_no_operation(module: nn.Module) -> None:
    assert operation_of(module) is None


def test_a_subclass_that_computes_something_else_is_not_mistaken_for_its_parent() -> None:
    assert operation_of(Standardized(2, 2, 3)) is None


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(3, 5), (2, 4, 3)),
        (nn.Conv1d(4, 6, 3, padding="same"), (2, 4, 7)),
        (nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(0, 2), groups=2), (2, 4, 7, 7)),
        (nn.Conv3d(4, 6, 2, dilation=2), (2, 4, 5, 5, 5)),
        (nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1), (2, 4, 7)),
        (nn.ConvTranspose2d(4, 6, 3, stride=(2, 3), output_padding=(1, 0), groups=2), (2, 4, 5, 5)),
        (nn.ConvTranspose3d(4, 6, 2, dilation=2), (2, 4, 3, 3, 3)),
    ],
)
def test_the_operation_applied_to_the_modules_tensors_is_the_module(
    module: nn.Module, shape: tuple[int, ...]
) -> None:
    operation, x = operation_of(module), torch.randn(shape)
    assert operation is not None
    assert torch.equal(operation(x, weight_of(module), module.bias), module(x))
    assert x.shape[operation.channel_axis] == shape[-1 if isinstance(module, nn.Linear) else 1]
    made = operation.module(weight_of(module).shape, bias=True, dtype=torch.float16)
    assert type(made) is type(module) and operation_of(made) == operation and str(made) == str(module)
    assert made.weight.dtype == torch.float16 and made.weight.shape == module.weight.shape


def test_a_second_registration_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear is registered already"):
        register_operation(nn.Linear)(lambda module: None)
