"""A weight parted into a product of two thin factors, which is computed beside it, and the rest, which is
quantized.

`W = U D + R`. What few directions have in common, outliers of rows or of channels that rescaling has moved
into the weight, goes into the factors, so that `R` has a shorter range (SVDQuant, Li et al., ICLR 2025,
arXiv 2411.05007, section 4.2).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Share of the mean square of the inputs that is added to each of their second moments: directions that few
# calibration inputs have shown count a little.
DAMPING = 0.05
# Turns of the alternation. SVDQuant takes up to 100 and stops at the first that is worse; the error has
# settled long before.
ROUNDS = 6


@dataclass(frozen=True)
class LowRank:
    """`up @ down` of a weight of G groups of R rows and n columns: `up` `[G, R, r]`, `down` `[G, r, n]`."""

    up: Tensor
    down: Tensor

    @property
    def product(self) -> Tensor:
        """The product, `[G, R, n]`."""
        return self.up @ self.down


def truncated(weight: Tensor, moments: Tensor | None, rank: int) -> LowRank:
    """Return the factors of `rank` that minimise `tr((W - U D) M (W - U D)^T)`, in float64.

    By Eckart and Young these are the leading singular vectors of `W L` with `M = L L^T`. They are found on
    the smaller side: `U` has the eigenvectors of `W M W^T` and `D = U^T W`, or `D = V^T L^-1` with those of
    `L^T W^T W L`. Each pair of columns is balanced, so that both factors have the same largest magnitude.

    Args:
        weight: `[G, R, n]`.
        moments: positive definite `M` `[G, n, n]`; None is the identity (a plain SVD).
        rank: number of columns of each factor, at most the smaller of R and n.
    """
    weight = weight.double()
    rows, columns = weight.shape[1:]
    if rows <= columns:
        seen = weight if moments is None else weight @ moments.double()
        up = torch.linalg.eigh(seen @ weight.mT).eigenvectors[:, :, -rank:]
        return _balanced(up, up.mT @ weight)
    root = None if moments is None else torch.linalg.cholesky(moments.double())
    seen = weight if root is None else weight @ root
    vectors = torch.linalg.eigh(seen.mT @ seen).eigenvectors[:, :, -rank:]
    down = (vectors if root is None else torch.linalg.solve_triangular(root.mT, vectors, upper=True)).mT
    return _balanced(seen @ vectors, down)


def _balanced(up: Tensor, down: Tensor) -> LowRank:
    """Return the same product of factors whose columns and rows have the same largest magnitudes."""
    high, low = up.abs().amax(dim=1), down.abs().amax(dim=2)
    tiny = torch.finfo(up.dtype).tiny
    factor = (low.clamp(min=tiny) / high.clamp(min=tiny)).sqrt()
    factor = torch.where((high > 0) & (low > 0), factor, torch.ones_like(factor))
    return LowRank(up * factor[:, None, :], down / factor[:, :, None])


def second_moments(rows: Tensor) -> Tensor:
    """Return the damped second moments `[G, n, n]` of what a weight reads, `rows` `[G, P, n]`, in float64."""
    rows = rows.double()
    moments = rows.mT @ rows / rows.shape[1]
    diagonal = moments.diagonal(dim1=1, dim2=2)
    diagonal += (DAMPING * diagonal.mean(dim=1, keepdim=True)).clamp(min=torch.finfo(rows.dtype).tiny)
    return moments


# Returns the weight that codes stand for, of a weight `[G, R, n]`.
Quantized = Callable[[Tensor], Tensor]
# Proposes factors of a rank for a weight `[G, R, n]` whose inputs have the moments `[G, n, n]`.
Splitter = Callable[[Tensor, Tensor, int, Quantized], Iterator[LowRank]]


def weighted(weight: Tensor, moments: Tensor, rank: int, quantized: Quantized) -> Iterator[LowRank]:
    """Yield the factors that leave the least energy of the output to the rest.

    Where the paper takes a plain SVD, the input's second moments weigh the columns.
    """
    yield truncated(weight, moments, rank)


def plain(weight: Tensor, moments: Tensor, rank: int, quantized: Quantized) -> Iterator[LowRank]:
    """Yield the factors that leave the least energy of the weight to the rest, which is what noise of the
    same size in all inputs sees (SVDQuant, equation 6).
    """
    yield truncated(weight, None, rank)


def alternating(weight: Tensor, moments: Tensor, rank: int, quantized: Quantized) -> Iterator[LowRank]:
    """Yield the factors of what quantizing the rest has left over, turn by turn (SVDQuant's released code).

    They start at a plain SVD. Each turn leaves the least energy of the output's error for the codes that the
    turn before has found.
    """
    found = truncated(weight, None, rank)
    for _ in range(ROUNDS):
        codes = quantized((weight.double() - found.product).to(weight.dtype))
        found = truncated(weight.double() - codes.double(), moments, rank)
        yield found


SPLITTERS: dict[str, Splitter] = {"weighted": weighted, "plain": plain, "alternating": alternating}
