"""The compiled core. Called through `eigenfilter.kernels` and the optimizers."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from eigenfilter.kernels.conventions import Table

cuda_compiled: bool
"""Whether the CUDA kernels were compiled into this build."""

cuda_architectures: tuple[str, ...]
"""What the CUDA kernels were compiled for, as CMake has it: "90-real", "100-virtual" and such."""

cuda_device_type: str
"""The type of the devices that the CUDA kernels serve, as torch calls it."""

group_size: int
most_rows: int
"""How many vectors `gram` and `mix_rows` take at most."""

most_vectors: int
"""How many vectors the other kernels of Lanczos iterations take at most."""

most_softmax_rows: int
"""How many rows of logits `cross_entropy_hvp` takes at most."""

operations: dict[str, dict[str, str]]
"""The arguments of each operation, in order.

For each, when it is written to: "always", where the flag of a name is true, or "" for never.
"""

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

def check(
    names: Sequence[str],
    lists: Sequence[Sequence[Tensor] | None],
    written: Sequence[bool],
) -> Table:
    """Raise what the kernels raise for lists that do not go together; None is an absent list."""

# The functions of the kernels, one an operation, are called by `eigenfilter.kernels._op` alone.

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
