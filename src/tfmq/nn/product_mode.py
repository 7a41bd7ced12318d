"""The attention products of any module that computes them with torch functions: q.k and p.v.

The owner is the module whose own `forward` calls the product. Products are counted in call order within one
forward, a fused `scaled_dot_product_attention` as two. No attention class or processor is known here: a
function mode sees the calls.
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tfmq.nn.contraction import Contraction, contraction, operands_of
from tfmq.numerics.attention import Attention, Multiply

ATTENTION = F.scaled_dot_product_attention
# Where the two operands of a product stand in the argument list of each function, and what they are called
# there.
_MATMUL = (0, "input"), (1, "other")
_BMM = (0, "input"), (1, "mat2")
_BADDBMM = (1, "batch1"), (2, "batch2")
PRODUCTS: dict[Callable[..., Any], tuple[tuple[int, str], tuple[int, str]]] = {
    torch.matmul: _MATMUL,
    torch.bmm: _BMM,
    Tensor.matmul: _MATMUL,
    Tensor.__matmul__: _MATMUL,
    Tensor.bmm: _BMM,
    torch.baddbmm: _BADDBMM,
    Tensor.baddbmm: _BADDBMM,
}
SITES = {ATTENTION: 2, **dict.fromkeys(PRODUCTS, 1)}

Operands = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
Attend = Callable[[int, Attention], Tensor]


def _einsum(func: Callable[..., Any], arguments: Sequence[Any]) -> Contraction | None:
    """Return the product that a call is if it is an einsum of activations; what shares no batch with the
    other operand is a weight.
    """
    found = contraction(arguments) if func is torch.einsum else None
    return found if found is not None and found.batch else None


def sites(func: Callable[..., Any], arguments: Sequence[Any]) -> int:
    """Return how many products a call of a torch function is."""
    return SITES.get(func, 0) or int(_einsum(func, arguments) is not None)


def _given(
    func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[dict[Any, Any], int | str, int | str]:
    """Return the arguments of a product by position or name, and under which of these its operands are."""
    given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    left, right = (name if name in given else position for position, name in PRODUCTS[func])
    return given, left, right


def _by(
    multiply: Callable[[Tensor, Tensor], Tensor],
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> Tensor:
    """Return what a product of torch gives, with `multiply` for its multiplication."""
    given, left, right = _given(func, args, kwargs)
    product = multiply(given[left], given[right])
    if func not in (torch.baddbmm, Tensor.baddbmm):
        return product
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    return alpha * product + (beta * (args[0] if args else kwargs["input"]) if beta else 0)


class ProductMode(TorchFunctionMode):
    """Computes every attention product of one module's forward on the operands that `operands(site, left,
    right)` returns.

    With `multiply(site, left, right)` that computes the product itself, and `attend(site, call)` a fused
    attention. Modes nest with the modules that own them; only the innermost acts, so a product belongs to
    exactly one owner.
    """

    _running = threading.local()

    def __init__(
        self, operands: Operands, multiply: Multiply | None = None, attend: Attend | None = None
    ) -> None:
        super().__init__()
        self.operands = operands
        self.multiply = multiply
        self.attend = attend
        self.site = 0

    @classmethod
    def _stack(cls) -> list["ProductMode"]:
        """The running owners of this thread, innermost last."""
        if not hasattr(cls._running, "stack"):
            cls._running.stack = []
        stack: list[ProductMode] = cls._running.stack
        return stack

    def __enter__(self) -> "ProductMode":
        self._stack().append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._stack().pop()
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._stack()[-1] is not self:
            return func(*args, **kwargs)
        einsum = _einsum(func, args)
        count = 1 if einsum is not None else SITES.get(func, 0)
        if not count:
            return func(*args, **kwargs)
        first, self.site = self.site, self.site + count
        multiply = self.multiply or self._multiply
        if func is ATTENTION:
            call = Attention.of(*args, **kwargs)
            return call.by(multiply, first) if self.attend is None else self.attend(first, call)
        if einsum is not None:
            left, right = operands_of(args)
            return einsum.multiply(left, right, partial(multiply, first))
        if self.multiply is not None:
            return _by(partial(self.multiply, first), func, args, kwargs)
        return self._on_operands(first, func, args, kwargs)

    def _on_operands(
        self, site: int, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        """Call a product of torch with what `operands` makes of its two operands."""
        given, left, right = _given(func, args, kwargs)
        given[left], given[right] = self.operands(site, given[left], given[right])
        return func(
            *(given[position] for position in range(len(args))), **{name: given[name] for name in kwargs}
        )

    def _multiply(self, site: int, left: Tensor, right: Tensor) -> Tensor:
        left, right = self.operands(site, left, right)
        return left @ right
