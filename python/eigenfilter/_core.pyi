"""The compiled core. Called through `eigenfilter.kernels` and the optimizers."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from eigenfilter.kernels.conventions import Scalar

cuda_compiled: bool
"""Whether the CUDA kernels were compiled into this build."""

cuda_architectures: tuple[str, ...]
"""What the CUDA kernels were compiled for, as CMake has it: "90-real", "100-virtual" and such."""

cuda_device_type: str
"""The type of the devices that the CUDA kernels serve, as torch calls it."""

class TensorList(Sequence[Tensor]):
    """A list of tensors that is passed again and again: they stay the same objects."""

    def __init__(
        self, tensors: Iterable[Tensor], *, hold: bool = False, trust: bool = False
    ) -> None:
        """Make a list of `tensors`, read once.

        Args:
            tensors: whatever the list is passed for; checked at its use.
            hold: keep them in a way that is read twice as fast; not for tensors that torch may want
                to swap.
            trust: check what is slow to check (lazy negation, inference mode) only when a tensor's
                memory is first seen and when it changes, and not at every use. A tensor that is
                negated where it is goes unnoticed: only for tensors that nobody does this to.

        Raises:
            TypeError: `tensors` cannot be iterated over, or with `hold` not all are tensors.
        """

    filled: bool
    """Whether the compiled `perturb` has filled these tensors as its backups."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> Tensor: ...  # type: ignore[override]
    def __iter__(self) -> Iterator[Tensor]: ...

class LayoutError(ValueError):
    """The i-th tensors of two lists differ in dtype, shape or strides. Nothing was written."""

def isa() -> str:
    """The instruction set the CPU kernels run with: "baseline", "avx2" or "avx512"."""

def isas() -> list[str]:
    """All instruction sets of this build that this CPU has, lowest first."""

def set_isa(name: str) -> None:
    """Run the CPU kernels with one of `isas()`; for tests and benchmarks."""

def is_serial() -> bool:
    """Whether the CPU kernels use one thread: this process was forked from one that had more."""

def require_cuda() -> None:
    """Raise RuntimeError, with what to do, unless the CUDA kernels were compiled."""

Table = tuple[bytes, bytes, bytes]
"""What a check has read: data pointers, int64 [present lists, n], and element counts, int64 [n].

Last the numbers of the gradients' dtypes, uint8 [n], or nothing where all are the lists'.
"""

def check(
    names: Sequence[str],
    lists: Sequence[Sequence[Tensor] | None],
    written: Sequence[bool],
) -> Table:
    """Raise what the kernels raise for lists that do not go together; None is an absent list."""

# The kernels check all arguments before anything is written. Called with `num_threads` 0 they do
# nothing else, and those of lists return what they have read: it is the check step of the backends
# that are written in Python.

def perturb(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    backups: Sequence[Tensor] | None,
    alpha: Scalar,
    save: bool,
    adaptive: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    num_threads: int,
) -> Table | None: ...
def perturb_hvp(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    base_grads: Sequence[Tensor],
    backups: Sequence[Tensor],
    alpha: Scalar,
    eps: Scalar,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    num_threads: int,
) -> Table | None: ...
def sgd_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor] | None,
    backups: Sequence[Tensor] | None,
    lr: Scalar,
    momentum: Scalar,
    dampening: Scalar,
    weight_decay: Scalar,
    nesterov: bool,
    maximize: bool,
    rounding_seed: Scalar | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    num_threads: int,
) -> Table | None: ...
def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    backups: Sequence[Tensor] | None,
    lr: Scalar,
    beta1: Scalar,
    beta2: Scalar,
    eps: Scalar,
    weight_decay: Scalar,
    step: Scalar,
    maximize: bool,
    rounding_seed: Scalar | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    num_threads: int,
) -> Table | None: ...
def norm(
    tensors: Sequence[Tensor],
    out: Tensor,
    weights: Sequence[Tensor] | None,
    grad_scale: Tensor | None,
    num_threads: int,
) -> Table | None: ...
def orthogonalize(
    w: Tensor, basis: Tensor, coefficients: Tensor, norms: Tensor, passes: int, num_threads: int
) -> None: ...
def row_dots(q: Tensor, w: Tensor, sums: Tensor, num_threads: int) -> None: ...
def lanczos_step(
    u: Tensor, q: Tensor, w: Tensor, factors: Tensor, sums: Tensor, num_threads: int
) -> None: ...
def gram(vectors: Tensor, out: Tensor, num_threads: int) -> None: ...
def mix_rows(vectors: Tensor, factors: Tensor, num_threads: int) -> None: ...
def flag_nonfinite(
    tensors: Sequence[Tensor], found_inf: Tensor, num_threads: int
) -> Table | None: ...
def gradients(params: list[Tensor]) -> tuple[list[Tensor | None], int]:
    """The parameters' gradients (`p.grad`), and how many of them are None."""

def clear_gradients(params: list[Tensor]) -> None:
    """Set `p.grad = None` on every parameter."""

def same_objects(a: list[Any], b: list[Any]) -> bool:
    """Whether two lists hold the same objects in the same order."""

def same_entries(
    state: dict[Any, Any], entries: list[Any], keys: tuple[str, ...], values: list[Any]
) -> bool:
    """Whether the values of `state` but the empty ones are `entries`, and hold `values` at `keys`.

    `values` has an item for every entry and key, None where there is none.
    """
