"""A symmetric operator in matrix notation: op @ v, V @ op, op.T, op.to_dense(), op.to_scipy()."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eigenfilter.curvature.engines.memory import default_budget
from eigenfilter.curvature.loss.slices import ShardSlices

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

_WIDTH = 32  # columns multiplied at once


class SymmetricMatrix(ABC):
    """Matrix notation for a symmetric C [n, n] that is known only by its products."""

    __array_ufunc__ = None  # NumPy leaves `array @ op` to us

    slices: ShardSlices | None

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(n, n)."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the vectors."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of the vectors."""

    @abstractmethod
    def matvec(self, v: Tensor) -> Tensor:
        """Return C v [n] for v [n]."""

    @abstractmethod
    def matmat(self, V: Tensor) -> Tensor:
        """Return C V [n, b] for V [n, b]."""

    @abstractmethod
    def fixed(self) -> AbstractContextManager[None]:
        """A context in which C must not change."""

    @property
    def T(self) -> SymmetricMatrix:
        """The transpose: the operator itself, since it is symmetric."""
        return self

    def __matmul__(self, V: Tensor) -> Tensor:
        """Return C v [n] for a vector, C V [n, b] for a matrix [n, b]."""
        return self.matvec(V) if _as_tensor(V).ndim == 1 else self.matmat(V)

    def __rmatmul__(self, V: Tensor) -> Tensor:
        """Return v C [n] for a vector, V C [b, n] for a matrix [b, n]."""
        return self.matvec(V) if _as_tensor(V).ndim == 1 else self.matmat(V.mT).mT

    def to_dense(self) -> Tensor:
        """Return C [n, n], by n products.

        It is the mean of what the products give and its transpose, so that it is exactly symmetric.

        Raises:
            ValueError: it does not fit into free memory, or vectors are sliced over processes.
            RuntimeError: from a product; see the class.
        """
        if self.slices is not None:
            raise ValueError(
                "a dense matrix needs whole vectors, and these are slices: build the operator on "
                "an unsharded copy of the model"
            )
        n = self.shape[0]
        needed, free = 2 * n * n * self.dtype.itemsize, 2 * default_budget(self.device)
        if needed > free:
            raise ValueError(
                f"a dense matrix of {n} parameters takes {needed / 1e9:.3g} GB while it is built, "
                f"and {free / 1e9:.3g} GB are free on {self.device}: use products (op @ v), "
                "eigsh(op, k), or a block of it by params=..."
            )
        rows = torch.empty(n, n, dtype=self.dtype, device=self.device)
        with self.fixed():
            for first in range(0, n, _WIDTH):
                part = rows[first : first + _WIDTH]
                unit = torch.zeros(n, len(part), dtype=self.dtype, device=self.device)
                unit[first : first + len(part)].fill_diagonal_(1.0)
                part.copy_(self.matmat(unit).mT)
        return rows.add_(rows.mT.clone()).mul_(0.5)

    def to_scipy(self) -> LinearOperator:
        """Return the operator as a `scipy.sparse.linalg.LinearOperator`. Needs SciPy.

        Raises:
            ValueError: vectors are sliced over processes, which SciPy does not support.
        """
        if self.slices is not None:
            raise ValueError("SciPy needs whole vectors, and these are slices: use our solvers")
        from scipy.sparse.linalg import LinearOperator

        def matvec(x: Any) -> Any:
            v = torch.tensor(x.reshape(-1), dtype=self.dtype, device=self.device)
            return self.matvec(v).cpu().numpy()

        def matmat(X: Any) -> Any:
            return self.matmat(torch.tensor(X, dtype=self.dtype, device=self.device)).cpu().numpy()

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(
            self.shape, matvec=matvec, rmatvec=matvec, matmat=matmat, rmatmat=matmat, dtype=dtype
        )


def _as_tensor(V: object) -> Tensor:
    if not isinstance(V, Tensor):
        raise TypeError(
            f"products take a torch.Tensor, not {type(V).__name__}: convert it by "
            "torch.as_tensor(v, dtype=op.dtype, device=op.device), or use op.to_scipy()"
        )
    return V
