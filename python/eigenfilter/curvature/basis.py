"""The vectors of a Krylov space: where they lie, and the passes over them."""

from __future__ import annotations

import torch
from torch import Tensor

_PIECE = 1 << 12  # elements of which a norm is taken at a time
_CHUNK = 1 << 16  # columns rotated at a time: the rotation needs no second basis


def norm(w: Tensor) -> Tensor:
    """Return ||w|| of w [n], in float64: summed in pieces, so that float32 errs by its eps only.

    Torch's own sum in float64 first makes a copy in float64, which takes five times as long.
    """
    pieces = w[: len(w) // _PIECE * _PIECE].view(-1, _PIECE)
    rest = torch.linalg.vector_norm(w[pieces.numel() :])
    norms = torch.linalg.vector_norm(pieces, dim=1)
    total: Tensor = torch.linalg.vector_norm(torch.cat([norms, rest[None]]).double())
    return total


def rotate(basis: Tensor, first: int, s: Tensor) -> None:
    """Replace rows first.. of a basis [m, n] by the combinations S^T of them, in place.

    s: [m - first, l] with l <= m - first; the l combinations take the rows from `first` on.
    """
    s = s.to(basis)
    for start in range(0, basis.shape[1], _CHUNK):
        columns = basis[first:, start : start + _CHUNK]
        columns[: s.shape[1]] = s.T @ columns
