"""Cheaper approximations of a matrix W (out, in), and their errors. Everything is in float64 until it is used in a layer.

Rank r: W ~ A B with A (out, r) and B (r, in) takes r (out + in) multiplications per token instead of out * in, so it is
cheaper below the rank out * in / (out + in). Two ways to choose A and B:

- SVD: the r largest singular triplets. No matrix of rank r is closer to W in the Frobenius norm, and the distance is the
  root of the sum of the other singular values' squares (Eckart and Young, Psychometrika 1936).
- Data-aware: the outputs Y = X W^T matter, for real inputs X (N, in), not W itself. With their second moments C = X^T X / N
  the error is ||X (W - W_r)^T||^2 / N = tr((W - W_r) C (W - W_r)^T). Its minimum over all W_r of rank r keeps the r principal
  directions V of the outputs, eigenvectors of W C W^T: W_r = V V^T W. The error is the sum of the other eigenvalues. (This is
  Eckart and Young for C^(1/2) W^T; no inverse is needed, so C may be singular.)

A diagonal in addition, W ~ A B + D, costs one multiplication per channel. For a W that is not square, D is a diagonal in each
of the square blocks of W, side by side or on top of each other.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


def svd_factors(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (out, rank) and B (rank, in) with the smallest error in the Frobenius norm."""
    return truncated(*torch.linalg.svd(w.double(), full_matrices=False), rank)


def truncated(u: Tensor, s: Tensor, vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same from a decomposition u, s, vh; A and B each get the square roots of the singular values."""
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def svd_error(singular_values: Tensor, rank: int) -> float:
    """The relative Frobenius error at this rank by the theorem of Eckart and Young."""
    squares = singular_values.double().square()
    return (squares[rank:].sum() / squares.sum()).sqrt().item()


def data_aware_factors(w: Tensor, moments: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (out, rank) and B (rank, in) with the smallest error in the outputs; `moments` (in, in) is X^T X / N."""
    w = w.double()
    basis, inner = torch.linalg.qr(w) if len(w) > w.size(1) else (None, w)  # W C W^T has no direction outside that of W
    _, directions = torch.linalg.eigh(inner @ moments.double() @ inner.T)   # ascending
    main = directions[:, -rank:] if basis is None else basis @ directions[:, -rank:]
    return main, main.T @ w


def data_aware_errors(w: Tensor, moments: Tensor) -> Tensor:
    """The relative output error of the best approximation of rank 0, 1, ..., out: (out + 1,)."""
    w = w.double()
    values = torch.linalg.eigvalsh(w @ moments.double() @ w.T).clamp(min=0)  # ascending
    return F.pad(values.cumsum(0), (1, 0)).flip(0).div(values.sum()).sqrt()


def output_error(w: Tensor, approximation: Tensor, moments: Tensor) -> float:
    """||X (W - W')^T|| / ||X W^T|| for inputs of these second moments."""
    left, whole = (energy(m.double(), moments) for m in (w.double() - approximation.double(), w))
    return (left.clamp(min=0) / whole).sqrt().item()  # rounding may make it slightly negative


def weight_error(w: Tensor, approximation: Tensor) -> float:
    """||W - W'|| / ||W||, Frobenius norms."""
    return ((w.double() - approximation.double()).norm() / w.double().norm()).item()


def fit(method: str, w: Tensor, moments: Tensor, rank: int, rounds: int = 8) -> tuple[Tensor, ...]:
    """(A, B) of the methods `svd` and `data_aware`, (A, B, d) of `data_aware_diagonal`."""
    if method == "svd":
        return svd_factors(w, rank)
    return data_aware_factors(w, moments, rank) if method == "data_aware" else low_rank_plus_diagonal(w, moments, rank, rounds)


def low_rank_plus_diagonal(w: Tensor, moments: Tensor, rank: int, rounds: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """A, B as from `data_aware_factors`, and d (max(out, in),), the entries of D for `diagonal_matrix`.

    Alternates between the best A B for W - D and the best D for W - A B, both in closed form, so that the error in the
    outputs never rises. It starts at D = 0: the result is never worse than the low rank alone.
    """
    w, moments = w.double(), moments.double()
    d = w.new_zeros(max(w.shape))
    for _ in range(rounds):
        a, b = data_aware_factors(w - diagonal_matrix(d, *w.shape), moments, rank)
        d = best_diagonal(w - a @ b, moments)
    return *data_aware_factors(w - diagonal_matrix(d, *w.shape), moments, rank), d


def diagonal_matrix(d: Tensor, out: int, features: int) -> Tensor:
    """D (out, features) with d[i] at (i, i modulo features) where it is tall, at (i modulo out, i) where it is wide."""
    i = torch.arange(max(out, features), device=d.device)
    return d.new_zeros(out, features).index_put((i % out, i % features), d)


def best_diagonal(residual: Tensor, moments: Tensor) -> Tensor:
    """The d that minimizes the error of D for `residual` R (out, in): min tr((R - D) C (R - D)^T).

    Each output depends on its own entries of D only: one where D is tall, in / out of them where it is wide, for which the
    normal equations are solved. Inputs that are always 0 get 0.
    """
    out, features = residual.shape
    target = residual @ moments                                      # (out, in)
    if out >= features:
        i = torch.arange(out, device=residual.device)
        scale = moments.diagonal()[i % features]
        return torch.where(scale > 0, target[i, i % features] / scale.clamp(min=1e-300), 0.0)
    columns = torch.arange(features, device=residual.device).view(-1, out).T  # (out, in / out)
    blocks = moments[columns[:, :, None], columns[:, None, :]]                # (out, in / out, in / out)
    right = target.gather(1, columns)[..., None]
    return (torch.linalg.pinv(blocks, hermitian=True) @ right)[..., 0].T.reshape(-1)


def energy(w: Tensor, moments: Tensor) -> Tensor:
    """||X W^T||^2 / N for inputs with these second moments."""
    return ((w @ moments.double()) * w).sum()


class LowRank(nn.Module):
    """`low_rank` with fp32 parameters, multiplied in the dtype of the input, like gpt.Linear."""

    def __init__(self, a: Tensor, b: Tensor, d: Tensor | None = None):
        super().__init__()
        self.a, self.b = nn.Parameter(a.float().contiguous()), nn.Parameter(b.float().contiguous())
        self.d = None if d is None else nn.Parameter(d.float())

    def forward(self, x):
        return low_rank(x, *(p.to(x.dtype) for p in self.parameters()))


def low_rank(x: Tensor, a: Tensor, b: Tensor, d: Tensor | None = None) -> Tensor:
    """x (A B + D)^T (..., out) of x (..., in)."""
    y = F.linear(F.linear(x, b), a)
    return y if d is None else y + times_diagonal(x, d, len(a))


def times_diagonal(x: Tensor, d: Tensor, out: int) -> Tensor:
    """x D^T (..., out) of x (..., in) and the d of `diagonal_matrix`."""
    if out >= x.size(-1):
        return (x.unsqueeze(-2) * d.view(-1, x.size(-1))).flatten(-2)
    return (x * d).unflatten(-1, (-1, out)).sum(-2)
