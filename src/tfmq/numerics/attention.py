"""Scaled dot-product attention as two products and what stands between them."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Multiply = Callable[[int, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Attention:
    """A call of `torch.nn.functional.scaled_dot_product_attention`: `softmax(q k^T scale + mask) v`.

    Attributes:
        query, key, value: `[..., L, D]`, `[..., S, D]`, `[..., S, E]`; leading axes broadcast.
        mask: what is added to the scores, or (boolean) where a query may look; broadcasts to `[..., L, S]`.
        scale: factor on the scores, the products of queries and keys.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> "Attention":
        """Return the call with arguments of torch's signature.

        Raises:
            ValueError: dropout, which has no place in a quantized model.
        """
        if dropout_p:
            raise ValueError(f"attention dropout must be 0 in a quantized model, got {dropout_p}")
        if enable_gqa:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
            value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
        if is_causal:
            attn_mask = torch.ones(
                query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device
            ).tril()
        return cls(query, key, value, attn_mask, 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)

    def by(self, multiply: Multiply, first: int) -> Tensor:
        """Compute it with two calls of `multiply(site, left, right)`, the sites `first` and the next."""
        # Give no name to the scores: with one they would stay in memory beside the probabilities.
        return multiply(
            first + 1,
            probabilities(
                multiply(first, self.query, self.key.transpose(-2, -1)) * self.scale,
                self.mask,
            ),
            self.value,
        )

    @property
    def scores(self) -> int:
        """How many scores there are, one for each pair of a query and a key."""
        leading = torch.broadcast_shapes(self.query.shape[:-2], self.key.shape[:-2])
        return math.prod(leading) * self.query.shape[-2] * self.key.shape[-2]

    def blocks(self, most: int) -> Iterator["Attention"]:
        """Yield calls for some of the queries each, in their order, with at most so many scores, or with one
        query.
        """
        queries = self.query.shape[-2]
        step = max(1, most * queries // max(1, self.scores))
        for start in range(0, queries, step):
            rows, mask = slice(start, start + step), self.mask
            if mask is not None and mask.ndim > 1 and mask.shape[-2] > 1:
                mask = mask[..., rows, :]
            yield replace(self, query=self.query[..., rows, :], mask=mask)


def probabilities(scores: Tensor, mask: Tensor | None, *, out: Tensor | None = None) -> Tensor:
    """Return `softmax(scores + mask)` over the last axis, without a mask in `out` if that is given."""
    if mask is None:
        return torch.softmax(scores, dim=-1, out=out)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    # A query that may look nowhere attends to nothing, as in torch.
    return torch.softmax(scores, dim=-1).masked_fill((scores == -torch.inf).all(dim=-1, keepdim=True), 0.0)
