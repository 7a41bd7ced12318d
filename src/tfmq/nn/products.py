"""Quantized attention products: q.k and p.v of any module that computes them with torch functions.

The owner is the module whose own `forward` calls the product. Products are counted in call order within one
forward, a fused `scaled_dot_product_attention` as two. No attention class or processor is known here: a
function mode sees the calls.
"""

import threading
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tfmq.kernels.kernel import Rows
from tfmq.nn.contraction import Contraction, contraction, operands_of
from tfmq.numerics.attention import Attention, Multiply
from tfmq.quantizers.activation import ActivationQuantizer
from tfmq.quantizers.part import Execution, Part, Precision

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
_SITES = {ATTENTION: 2, **dict.fromkeys(PRODUCTS, 1)}

Operands = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
Attend = Callable[[int, Attention], Tensor]
ProductKernel = Callable[[Tensor, Rows, Tensor, Rows], Tensor]
# Both products of an attention at once, on the grids of query, key, probabilities and value; None where that
# is no gain.
AttentionKernel = Callable[[Attention, Sequence[Rows]], Tensor | None]


def _einsum(func: Callable[..., Any], arguments: Sequence[Any]) -> Contraction | None:
    """Return the product that a call is if it is an einsum of activations; what shares no batch with the
    other operand is a weight.
    """
    found = contraction(arguments) if func is torch.einsum else None
    return found if found is not None and found.batch else None


def sites(func: Callable[..., Any], arguments: Sequence[Any]) -> int:
    """Return how many products a call of a torch function is."""
    return _SITES.get(func, 0) or int(_einsum(func, arguments) is not None)


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
        count = 1 if einsum is not None else _SITES.get(func, 0)
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


class ProductQuantizers(Part):
    """The quantizers of one owner's products; `left[i]` and `right[i]` belong to site `i`, None where a site
    stays in full precision. Without an execution the owner computes in floating point on the grids.
    """

    execution: "ProductExecution | None"

    def __init__(self, left: Sequence[nn.Module | None], right: Sequence[nn.Module | None]) -> None:
        super().__init__()
        self.left = nn.ModuleList([quantizer or nn.Identity() for quantizer in left])
        self.right = nn.ModuleList([quantizer or nn.Identity() for quantizer in right])
        self.enabled = True

    def choose(self, *, weights: Precision | None, inputs: Precision | None) -> Callable[[], None]:
        """Quantize the operands, or leave them as they come."""
        before = self.enabled
        self.enabled = inputs == "quantized" if inputs else before

        def undo() -> None:
            self.enabled = before

        return undo

    def finished(self) -> "ProductQuantizers":
        """Let the quantizers act; they have no other form."""
        self.enabled = True
        return self

    def spare(self) -> None:
        """Leave the operands of every site in full precision from now on."""
        self.left, self.right = (
            nn.ModuleList(nn.Identity() for _ in side) for side in (self.left, self.right)
        )

    def rows(self, sites: Sequence[int], operands: Sequence[Tensor]) -> tuple[Rows, ...] | None:
        """Return the rows of the grids of the `operands` of `sites`, left and right in turn; None unless all
        of them are quantized.
        """
        if not self.enabled or sites[-1] >= len(self.left):
            return None
        both = [grid for site in sites for grid in (self.left[site], self.right[site])]
        grids = [grid for grid in both if isinstance(grid, ActivationQuantizer)]
        if len(grids) < len(both):
            return None
        return tuple(grid.rows(x) for grid, x in zip(grids, operands, strict=True))

    def forward(self, site: int, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Return the operands of a site on their grids."""
        if not self.enabled or site >= len(self.left):
            return left, right
        return self.left[site](left), self.right[site](right)


class ProductExecution(Execution):
    """How the owner of products computes them."""

    @abstractmethod
    def around(self, products: ProductQuantizers) -> AbstractContextManager[Any]:
        """Return the context in which the owner's forward runs."""


class StockProducts(ProductExecution):
    """Products as if there were no quantizers, a fused attention fused."""

    def around(self, products: ProductQuantizers) -> AbstractContextManager[Any]:
        """Return a context that does nothing."""
        return nullcontext()


class ProductKernels(ProductExecution):
    """Products by the integer `kernel` of a backend, or of each site by its own among `sites`; sites without
    one are computed on the grids. With `attention` it computes the two of a fused attention at once.
    """

    def __init__(
        self,
        kernel: ProductKernel | None = None,
        *,
        attention: AttentionKernel | None = None,
        sites: Mapping[int, ProductKernel] | None = None,
    ) -> None:
        super().__init__()
        self.kernel, self.attention, self.sites = kernel, attention, dict(sites or {})

    def around(self, products: ProductQuantizers) -> AbstractContextManager[Any]:
        """Return the mode that lets the kernels multiply."""
        return ProductMode(products, partial(self.multiply, products), partial(self.attend, products))

    def multiply(self, products: ProductQuantizers, site: int, left: Tensor, right: Tensor) -> Tensor:
        """Return the product of site `site` by the kernel, or on quantized operands where one of them stays
        in full precision.
        """
        kernel = self.sites.get(site, self.kernel)
        rows = None if kernel is None else products.rows([site], [left, right])
        if kernel is not None and rows is not None:
            return kernel(left, rows[0], right, rows[1])
        left, right = products(site, left, right)
        return left @ right

    def attend(self, products: ProductQuantizers, first: int, call: Attention) -> Tensor:
        """Return an attention whose products are the sites `first` and the next."""
        # A kernel reads the values of grids, which a graph must not branch on.
        if self.attention is not None and not torch.compiler.is_compiling():
            # Probabilities are as many as queries.
            rows = products.rows([first, first + 1], [call.query, call.key, call.query, call.value])
            found = None if rows is None else self.attention(call, rows)
            if found is not None:
                return found
        return call.by(partial(self.multiply, products), first)


class _Owner:
    """Mixed into the class of a module whose products are quantized."""

    tfmq_products: ProductQuantizers

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward with its products quantized."""
        products = self.tfmq_products
        execution = products.execution
        with ProductMode(products) if execution is None else execution.around(products):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


_OWNERS: dict[type[nn.Module], type[nn.Module]] = {}


def attach_products(module: nn.Module, quantizers: ProductQuantizers) -> None:
    """Quantize the products of `module` in place. Its class becomes a subclass of itself, so that
    `isinstance` and methods stay.
    """
    kind = type(module)
    if kind not in _OWNERS:

        @wraps(kind.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return _Owner.forward(self, *args, **kwargs)

        _OWNERS[kind] = type(
            kind.__name__, (_Owner, kind), {"__module__": kind.__module__, "forward": forward}
        )
    module.__class__ = _OWNERS[kind]
    module.tfmq_products = quantizers
