"""The kernels of Lanczos' iterations, on vectors that lie as rows in one tensor.

`backend` and `torch.compile` as in `eigenfilter.kernels`, where these functions are found.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from eigenfilter import _core
from eigenfilter.kernels import dispatch
from eigenfilter.kernels.torch_library import operator

_MOST_VECTORS = 65_535  # of a GPU's grid


def project_out(
    w: Tensor, basis: Tensor, *, passes: int = 2, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Take away from vectors, in place, their part in the span of a basis: Gram-Schmidt.

        c <- c + Q w,    w <- w - Q^T (Q w)        (`passes` times over, c = 0 at first)

    for Q [m, n] with orthonormal rows q_i. Sums are taken in float64, in an order that depends on
    the sizes alone (with CUDA, also on whether rows are 16-byte aligned; on the CPU, products of
    floats are summed as floats within 64 columns); w is rounded once a pass. The CPU reads the
    basis `passes` + 1 times.

    Args:
        w: [n] or [b, n], float32 or float64, contiguous.
        basis: [m, n], contiguous, of any dtype of the kernels: half precision halves the traffic.
        passes: at least 1. One leaves an error of some roundings of what it takes away; the second
            takes that away too.
        backend: see the module.

    Returns:
        Coefficients c [m] or [b, m] and norms [] or [b] of what is left of w; float64.

    Raises:
        TypeError: an unsupported dtype.
        ValueError: shapes or devices do not match, or memory is not contiguous.
        RuntimeError: the backend asked for is not available; the message says how to get it.

    Source: L. Giraud, J. Langou, M. Rozloznik, 2005: twice is enough.
    """
    if basis.ndim != 2 or w.ndim not in (1, 2) or w.shape[-1] != basis.shape[1]:
        raise ValueError(
            f"basis must be [m, n] and w [n] or [b, n]: got {list(basis.shape)} and {list(w.shape)}"
        )
    if not (w.is_contiguous() and basis.is_contiguous()):
        raise ValueError("w and basis must be contiguous: pass .contiguous() of them")
    if w.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"w must be float32 or float64, not {w.dtype}")
    if w.ndim == 2 and len(w) > _MOST_VECTORS:
        raise ValueError(f"w must be of at most {_MOST_VECTORS} vectors, not {len(w)}")
    if basis.device != w.device:
        raise ValueError(f"w is on {w.device} and basis on {basis.device}: move one of them")
    if passes < 1:
        raise ValueError(f"passes must be at least 1, not {passes}")
    shape = w.shape[:-1]
    coefficients = torch.zeros((*shape, len(basis)), dtype=torch.float64, device=w.device)
    norms = torch.zeros(shape, dtype=torch.float64, device=w.device)
    if w.numel() == 0:
        return coefficients, norms
    _project_out(w, basis, coefficients, norms, passes, backend)
    return coefficients, norms


@operator(mutates=("w", "coefficients", "norms"))
def _project_out(
    w: Tensor,
    basis: Tensor,
    coefficients: Tensor,
    norms: Tensor,
    passes: int,
    backend: str | None,
) -> None:
    _core.check(("w",), ([w],), (True,))
    _core.check(("basis",), ([basis],), (False,))
    if _overlap(w, basis):
        raise ValueError("w shares memory with basis, which would change as it is read: clone it")
    with torch.no_grad():
        dispatch.of([w], backend).project_out(w, basis, coefficients, norms, passes=passes)
    increment_version([w])


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the memory of two contiguous tensors overlaps."""
    first, second = a.data_ptr(), b.data_ptr()
    return first < second + b.nbytes and second < first + a.nbytes
