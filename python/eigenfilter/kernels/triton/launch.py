"""How the Triton kernels over lists of tensors are launched, on NVIDIA and AMD GPUs.

TRITON_INTERPRET=1, set before triton is imported, runs the kernels on CPU tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eigenfilter.kernels.conventions import Scalar, Table, arithmetic_dtype
from eigenfilter.kernels.triton.blocks import Blocks
from eigenfilter.kernels.triton.device import OPTIONS, chunk
from eigenfilter.kernels.triton.tables import Tables, tables

_INTERPRETED = not isinstance(chunk, triton.JITFunction)

_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
    torch.int16: tl.int16,
}


def constants(
    dtype: torch.dtype, blocks: Blocks, grad: torch.dtype | None = None
) -> dict[str, Any]:
    """Return the compile-time constants that all kernels over tensors of `dtype` share.

    Args:
        dtype: dtype of the parameters, or of the weights of a reduction. It decides the number of
            elements in a block.
        blocks: sizes of the kernel's blocks.
        grad: dtype of the gradients, or of the tensors of a reduction; None stands for `dtype`.
    """
    grad = grad or dtype
    return {
        "DTYPE": _TYPES[dtype],
        "GRAD": _TYPES[grad],
        "REAL": _TYPES[arithmetic_dtype(dtype, grad)],
        "BLOCK": blocks.elements(dtype),
    }


def options(blocks: Blocks) -> dict[str, Any]:
    """Return the compiler's options."""
    return OPTIONS | {"num_warps": blocks.warps}


def launch(kernel: Any, table: Table, call: SimpleNamespace, **chosen: Any) -> None:
    """Run a program for every chunk of a call's lists.

    The kernel's arguments are found by their names: `pointers`, `chunks` and `n` are the tables, a
    hyperparameter `lr` with its address `lr_at`, `grad_scale` and `found_inf` are the call's.

    Args:
        kernel: the kernel, named after its operation: `<operation>_kernel`.
        table: what the check of the call's arguments has read.
        call: the call's arguments.
        chosen: further arguments; those in capitals, flags and dtypes, select a variant at compile
            time.
    """
    like = next(iter(vars(call).values()))[0]
    with on_device(like.device):
        work = tables(kernel.fn.__name__.removesuffix("_kernel"), like, table)
        variant = {
            name: value if value is None or isinstance(value, tl.dtype) else bool(value)
            for name, value in chosen.items()
            if name.isupper()
        }
        args = list(_arguments(kernel, call, like.device, chosen))
        for grad in work.chunks:
            launch_chunks(kernel, like.dtype, work, grad, args, variant)


def _arguments(
    kernel: Any, call: SimpleNamespace, device: torch.device, chosen: dict[str, Any]
) -> Iterator[object]:
    """The arguments of a launch after the tables, by the names of the kernel's."""
    for name in kernel.arg_names[3:]:
        if name.isupper() or name.endswith("_at"):
            continue
        if name in chosen:
            yield chosen[name]
        elif name == "grad_scale":
            yield scale_of(call.grad_scale, device)
        elif name == "found_inf":
            yield call.found_inf
        else:
            yield from _scalar(getattr(call, name), device)


def launch_chunks(
    kernel: Any,
    dtype: torch.dtype,
    work: Tables,
    grad: torch.dtype,
    args: Sequence[object],
    variant: dict[str, Any],
) -> None:
    """Run the programs of the chunks whose gradients are of dtype `grad`."""
    chunks = work.chunks[grad]
    if chunks.shape[1] > 0:
        kernel[(chunks.shape[1],)](
            work.pointers,
            chunks,
            work.n,
            *args,
            **variant,
            **constants(dtype, work.blocks, grad),
            **options(work.blocks),
        )


def require(device_type: str) -> None:
    """Raise RuntimeError unless the kernels run on this type of device."""
    if device_type != ("cpu" if _INTERPRETED else "cuda"):
        raise RuntimeError(
            f'backend "triton" needs a GPU, or TRITON_INTERPRET=1 in the environment and tensors '
            f"on the CPU: these are on {device_type}"
        )


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context in which `device` is the current one; raise if kernels cannot run on it."""
    require(device.type)
    return contextlib.nullcontext() if _INTERPRETED else torch.cuda.device(device)


def _scalar(value: Scalar | None, device: torch.device) -> tuple[float, Tensor | None]:
    """Return a hyperparameter as two arguments: its value, and its tensor if on the device."""
    if value is None:
        return 0.0, None
    if isinstance(value, Tensor) and value.device == device:
        return 0.0, value
    return float(value), None


def dtype_of(tensors: Sequence[Tensor] | None) -> Any:
    """Triton's dtype of the tensors of a list, or None where there is no list."""
    return None if tensors is None else _TYPES[tensors[0].dtype]


def rounds_by_steps(states: Sequence[Tensor] | None, call: SimpleNamespace) -> bool:
    """Whether the number of the step rounds states: codes, or bfloat16 of compressed tensors."""
    if states is None:
        return False
    dtype = states[0].dtype
    is_compressed = call.corrections is not None or dtype != call.params[0].dtype
    return is_compressed and dtype in (torch.int8, torch.bfloat16)


def is_stochastic(call: SimpleNamespace) -> bool:
    """Whether results are rounded stochastically: with a seed, in a 16-bit dtype."""
    return call.rounding_seed is not None and call.params[0].dtype.itemsize == 2


def scale_of(grad_scale: Scalar | None, device: torch.device) -> Tensor | None:
    """Return a loss scale, a number or a float32 or float64 tensor, as a kernel argument."""
    if grad_scale is None:
        return None
    dtype = grad_scale.dtype if isinstance(grad_scale, Tensor) else torch.float64
    return torch.as_tensor(grad_scale, dtype=dtype, device=device)
