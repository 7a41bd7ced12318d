"""Quantized attention products: the quantizers of an owner's products, and how backends compute these."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tfmq.kernels.kernel import Rows
from tfmq.nn.product_mode import ProductMode
from tfmq.nn.subclass import mix_in
from tfmq.numerics.attention import Attention
from tfmq.quantizers.activation import ActivationQuantizer
from tfmq.quantizers.part import Execution, Part, Precision

ProductKernel = Callable[[Tensor, Rows, Tensor, Rows], Tensor]
# Both products of an attention at once, on the grids of query, key, probabilities and value; None where that
# is no gain.
AttentionKernel = Callable[[Attention, Sequence[Rows]], Tensor | None]
# On a CPU, attention with more scores than this, 32 MiB of float32, is computed a block of queries at a time.
WHOLE = 2**23
# Number of scores of a block: 4 MiB of float32, which stay in a processor's caches.
BLOCK = 2**20


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
        return self._on_grid(self.left, site, left), self._on_grid(self.right, site, right)

    def _on_grid(self, side: nn.ModuleList, site: int, x: Tensor) -> Tensor:
        return side[site](x) if self.enabled and site < len(side) else x

    def attend(self, first: int, call: Attention) -> Tensor:
        """Return an attention on the grids of the sites `first` and the next. Where its scores are many they
        are never in memory all at once.
        """
        if not self._by_blocks(first + 1, call):
            return call.by(self.multiply, first)
        query, key = self(first, call.query, call.key.transpose(-2, -1))
        value = self._on_grid(self.right, first + 1, call.value)
        whole = replace(call, query=query, key=key.transpose(-2, -1), value=value)

        def multiply(site: int, left: Tensor, right: Tensor) -> Tensor:
            # All but the probabilities is on its grid already.
            return (left if site == first else self._on_grid(self.left, site, left)) @ right

        return torch.cat([block.by(multiply, first) for block in whole.blocks(BLOCK)], dim=-2)

    def multiply(self, site: int, left: Tensor, right: Tensor) -> Tensor:
        """Return the product of a site on its grids."""
        left, right = self(site, left, right)
        return left @ right

    def _by_blocks(self, site: int, call: Attention) -> bool:
        """Whether the probabilities, the left operand of a site, come a block of queries at a time: a graph
        would have a copy of the nodes for each, a gradient keeps every block, and who watches an operand
        wants all of it.
        """
        # Fake tensors are of another class, and hold nothing in memory.
        fake = type(call.query) is not Tensor
        tracing = fake or torch._C._get_tracing_state() is not None or torch.compiler.is_compiling()
        # A graph for any batch must not be asked how many scores it has.
        if tracing or torch.is_grad_enabled() or call.query.device.type != "cpu" or call.scores <= WHOLE:
            return False
        if site >= len(self.left):
            return True
        grid = self.left[site]
        watched = grid._forward_hooks or grid._forward_pre_hooks
        return isinstance(grid, ActivationQuantizer | nn.Identity) and not watched


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
        return products.multiply(site, left, right)

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
        with execution.around(products) if execution else ProductMode(products, attend=products.attend):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


def attach_products(module: nn.Module, quantizers: ProductQuantizers) -> None:
    """Quantize the products of `module` in place. Its class becomes a subclass of itself, so that
    `isinstance` and methods stay.
    """
    mix_in(module, _Owner)
    module.tfmq_products = quantizers
