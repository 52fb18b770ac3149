"""Multi-tensor update kernels, one contract in four backends.

Each function works on lists of tensors that share one device and one dtype (float32, float64,
bfloat16 or float16) and are *dense*: their elements fill one stretch of memory, in any order of
dimensions. The i-th tensors of all lists have the same shape and strides, because the kernels index
memory linearly. Arithmetic is float32 (float64 for float64). All arguments are checked before
anything is written, and an error names the list and the index.

Each gradient (in `grads` and `base_grads`) may be wider than its parameter: float32 for bfloat16
and float16 parameters, float64 for float32 ones. It is read in its own dtype, the arithmetic is
that of the wider dtype, and each result is rounded once.

Scalars are floats or 0-dim float32/float64 tensors, which are read on their device without a
synchronization. `grad_scale` (the loss scale to divide gradients by) and `found_inf` (not zero:
leave everything unchanged) are the one-element float32 tensors that `torch.amp.GradScaler` sets.

Results are rounded to nearest, ties to even. With a `rounding_seed`, `sgd_step` and `adamw_step`
round what they write to bfloat16 and float16 *stochastically*: of the neighbors a < b of a float32
value y

    b with probability (y - a) / (b - a), else a,        so that E[rounded y] = y

Steps that rounding to nearest would lose then count on average. Values that the dtype holds stay,
bit for bit. Beyond its largest number, where b would be infinite, rounding is to nearest, as it
always is for float32 and float64. Probabilities are exact, except for float16's subnormals, where
they are multiples of 2^-21. The random bits are a function of the seed, the index of the tensor in
the lists, the output, and the index of the element in memory (modulo 2^32). They are the same in
every backend, and each call should use another seed. Source: S. Gupta et al., 2015, arXiv
1502.02551, section 3.

The kernels of Lanczos iterations and of cross-entropy work on single tensors of vectors: see
`vectors` and `cross_entropy`.

Under torch.compile a call becomes the operator `torch.ops.eigenfilter.<name>`, and no graph breaks.

After a fork (`os.fork`, the workers of a DataLoader, multiprocessing's "fork") kernels and torch
use one thread in the child, because the threads of the pool do not survive a fork.

`backend` is None (choose by device), "native" (C++ or CUDA), "triton" or "reference".
"""

from __future__ import annotations

import torch

from eigenfilter.kernels import cross_entropy, dispatch, forks, reductions, vectors
from eigenfilter.kernels._op import OnBackend
from eigenfilter.kernels.adamw import adamw_step
from eigenfilter.kernels.cholesky import cholesky_qr
from eigenfilter.kernels.cross_entropy import cross_entropy_hvp
from eigenfilter.kernels.dispatch import BACKENDS
from eigenfilter.kernels.perturbation import perturb, perturb_hvp
from eigenfilter.kernels.reductions import flag_nonfinite, norm
from eigenfilter.kernels.sgd import sgd_step
from eigenfilter.kernels.vectors import gram, lanczos_step, mix_rows, orthogonalize, row_dots

__all__ = [
    "BACKENDS",
    "Backend",
    "adamw_step",
    "cholesky_qr",
    "cross_entropy_hvp",
    "flag_nonfinite",
    "gram",
    "lanczos_step",
    "mix_rows",
    "norm",
    "orthogonalize",
    "perturb",
    "perturb_hvp",
    "row_dots",
    "select",
    "sgd_step",
]


class Backend:
    """The operations on one backend, as functions with the arguments of `eigenfilter.kernels`.

    They leave version counters and autograd to their caller, and take no `backend`. What their
    results are written to is allocated by the caller, too.

    Attributes:
        name: one of "native", "triton" and "reference".

    Raises:
        ValueError: the name is another one.
    """

    adamw_step = OnBackend(adamw_step)
    cross_entropy_hvp = OnBackend(cross_entropy._cross_entropy_hvp)
    flag_nonfinite = OnBackend(flag_nonfinite)
    gram = OnBackend(vectors._gram)
    lanczos_step = OnBackend(vectors._lanczos_step)
    mix_rows = OnBackend(vectors._mix_rows)
    norm = OnBackend(reductions._norm)
    orthogonalize = OnBackend(vectors._orthogonalize)
    perturb = OnBackend(perturb)
    perturb_hvp = OnBackend(perturb_hvp)
    row_dots = OnBackend(vectors._row_dots)
    sgd_step = OnBackend(sgd_step)

    def __init__(self, name: str) -> None:
        if name not in BACKENDS:
            raise ValueError(dispatch.unknown(name))
        self.name = name


def select(device: torch.device | str, backend: str | None = None) -> Backend:
    """Return the operations on the backend that serves a device.

    Args:
        device: device of type "cpu" or "cuda" (torch's name for ROCm too). "cuda" without a number
            stands for the current GPU.
        backend: name of a backend, which works or raises. None selects native on the CPU, and on a
            GPU native if its kernels were compiled for such a GPU, else Triton. The selection is
            logged once.

    Raises:
        ValueError: the backend is unknown, or no backend serves the device.
        RuntimeError: the backend is not available, or not for this device.
    """
    return _BACKENDS[dispatch.choose(torch.device(device), backend)]


_BACKENDS = {name: Backend(name) for name in BACKENDS}

forks.watch()
