"""Triton's interpreter does what a GPU does; `mend` replaces what it does otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.uint32]


def bfloat16_of(bits: Bits) -> npt.NDArray[np.uint16]:
    """The bits of float32 numbers, rounded to the nearest bfloat16, ties to even; NaN stays NaN."""
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, 0x7FC0, rounded).astype(np.uint16)


def mend() -> None:
    """Change the interpreter of this process; TRITON_INTERPRET must be set before.

    This differs from the interpreter as it comes in three ways:

    1. float32 is rounded to the nearest bfloat16, as a GPU does it. The interpreter cuts bits off.
    2. An overflow, or a NaN, warns nobody: a GPU goes on.
    3. A function that a kernel calls does not replace triton's language again, which the launch of
       the kernel has done already. Kernels run more than twice as fast.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    executor: Any = interpreter.GridExecutor
    function: Any = interpreter.InterpretedFunction
    cast, launch = builder.cast_impl, executor.__call__

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        before, after = src.dtype.scalar, dst_type.scalar
        if (before, after) == (tl.float32, tl.bfloat16):
            data: Any = bfloat16_of(src.data.view(np.uint32))
        elif (before, after) == (tl.bfloat16, tl.float32):
            data = (src.data.astype(np.uint32) << 16).view(np.float32)
        else:
            return cast(self, src, dst_type)
        return interpreter.TensorHandle(data, after)

    def launch_quietly(self: Any, *args: Any, **kwargs: Any) -> None:
        with np.errstate(all="ignore"):
            launch(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "tl" not in self.fn.__globals__:  # triton's own, that has names of the language's parts
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    builder.cast_impl = cast_impl
    executor.__call__ = launch_quietly
    function.__call__ = call
