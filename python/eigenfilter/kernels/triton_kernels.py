"""The Triton backend, for NVIDIA and AMD GPUs, with the arguments of `eigenfilter.kernels`.

TRITON_INTERPRET=1, set before triton is imported, runs the kernels on CPU tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eigenfilter import _core
from eigenfilter.kernels import triton_device as device_code
from eigenfilter.kernels import triton_lanczos as lanczos_code
from eigenfilter.kernels import triton_orthogonalize as orthogonalize_code
from eigenfilter.kernels.conventions import Scalar, arithmetic_dtype
from eigenfilter.kernels.triton_blocks import Blocks
from eigenfilter.kernels.triton_tables import Tables, tables

_INTERPRETED = not isinstance(device_code.perturb_kernel, triton.JITFunction)

_CHECK = 0  # threads: the compiled kernel then checks its arguments and computes nothing

_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def perturb(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    backups: Sequence[Tensor],
    alpha: Scalar,
    *,
    adaptive: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Save and perturb; see `eigenfilter.kernels.perturb`."""
    read = _core.perturb(
        params, grads, backups, alpha, True, adaptive, grad_scale, found_inf, _CHECK
    )
    x = params[0]
    with _on_device(x.device):
        work = tables("perturb", x, read)
        _launch(
            device_code.perturb_kernel,
            x.dtype,
            work,
            *_scalars(x.device, alpha=alpha),
            *_flags(x.device, grad_scale, found_inf),
            ADAPTIVE=adaptive,
        )


def perturb_again(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    alpha: Scalar,
    backups: Sequence[Tensor] | None,
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Perturb once more; see `eigenfilter.kernels.perturb_again`."""
    read = _core.perturb(params, grads, backups, alpha, False, False, grad_scale, found_inf, _CHECK)
    x = params[0]
    with _on_device(x.device):
        work = tables("perturb_again", x, read)
        _launch(
            device_code.perturb_again_kernel,
            x.dtype,
            work,
            0 if backups is None else 2,
            *_scalars(x.device, alpha=alpha),
            *_flags(x.device, grad_scale, found_inf),
        )


def perturb_hvp(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    base_grads: Sequence[Tensor],
    backups: Sequence[Tensor],
    alpha: Scalar,
    eps: Scalar,
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Perturb along a Hessian-vector product; see `eigenfilter.kernels.perturb_hvp`."""
    lists = (params, grads, base_grads, backups)
    read = _core.perturb_hvp(*lists, alpha, eps, grad_scale, found_inf, _CHECK)
    x = params[0]
    with _on_device(x.device):
        work = tables("perturb_hvp", x, read)
        _launch(
            device_code.perturb_hvp_kernel,
            x.dtype,
            work,
            *_scalars(x.device, alpha=alpha, eps=eps),
            *_flags(x.device, grad_scale, found_inf),
        )


def sgd_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor] | None,
    backups: Sequence[Tensor] | None,
    *,
    lr: Scalar,
    momentum: Scalar = 0.0,
    dampening: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    rounding_seed: Scalar | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Restore and step; see `eigenfilter.kernels.sgd_step`."""
    lists, scalars = (params, grads, momenta, backups), (lr, momentum, dampening, weight_decay)
    flags = (rounding_seed, grad_scale, found_inf)
    read = _core.sgd_step(*lists, *scalars, nesterov, maximize, *flags, _CHECK)
    x = params[0]
    has_momenta = momenta is not None
    with _on_device(x.device):
        work = tables("sgd_step", x, read)
        _launch(
            device_code.sgd_step_kernel,
            x.dtype,
            work,
            0 if backups is None else 2 + has_momenta,
            -1.0 if maximize else 1.0,
            *_scalars(
                x.device,
                lr=lr,
                momentum=momentum,
                dampening=dampening,
                weight_decay=weight_decay,
                rounding_seed=0.0 if rounding_seed is None else rounding_seed,
            ),
            *_flags(x.device, grad_scale, found_inf),
            STOCHASTIC=_is_stochastic(rounding_seed, x.dtype),
            MOMENTA=has_momenta,
            NESTEROV=nesterov,
        )


def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    backups: Sequence[Tensor] | None,
    *,
    lr: Scalar,
    beta1: Scalar,
    beta2: Scalar,
    eps: Scalar,
    weight_decay: Scalar,
    step: Scalar,
    maximize: bool = False,
    rounding_seed: Scalar | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Restore and take AdamW's step; see `eigenfilter.kernels.adamw_step`."""
    lists, scalars = (params, grads, exp_avgs, exp_avg_sqs, backups), (lr, beta1, beta2, eps)
    flags = (rounding_seed, grad_scale, found_inf)
    read = _core.adamw_step(*lists, *scalars, weight_decay, step, maximize, *flags, _CHECK)
    x = params[0]
    with _on_device(x.device):
        work = tables("adamw_step", x, read)
        _launch(
            device_code.adamw_step_kernel,
            x.dtype,
            work,
            0 if backups is None else 4,
            -1.0 if maximize else 1.0,
            *_scalars(
                x.device,
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                eps=eps,
                weight_decay=weight_decay,
                step=step,
                rounding_seed=0.0 if rounding_seed is None else rounding_seed,
            ),
            *_flags(x.device, grad_scale, found_inf),
            STOCHASTIC=_is_stochastic(rounding_seed, x.dtype),
        )


def norm(
    tensors: Sequence[Tensor],
    out: Tensor,
    *,
    weights: Sequence[Tensor] | None = None,
    grad_scale: Tensor | None = None,
) -> None:
    """Euclidean norm; see `eigenfilter.kernels.norm`."""
    read = _core.norm(tensors, out, weights, grad_scale, _CHECK)
    t = tensors[0]
    like = t if weights is None else weights[0]
    with _on_device(t.device):
        work = tables("norm", like, read)
        double = torch.float64 in (out.dtype, *work.chunks)
        _single("out", out, torch.float64 if double else torch.float32, t.device)
        scale = _scale(grad_scale, t.device)
        sums = torch.empty(work.programs, dtype=torch.float64, device=t.device)
        wide = torch.float64 in work.chunks
        exponents = sums.new_empty(work.programs, dtype=torch.int32) if wide else None
        done = 0
        weighted = {"WEIGHTS": weights is not None}
        for grad, chunks in work.chunks.items():
            kernel = device_code.sum_squares_kernel
            out_at = (sums[done:], None if exponents is None else exponents[done:])
            _launch_chunks(kernel, like.dtype, work, grad, out_at, weighted)
            done += chunks.shape[1]
        device_code.norm_kernel[(1,)](
            sums,
            exponents,
            work.programs,
            out,
            scale,
            BLOCK=device_code.NORM_BLOCK,
            **device_code.NORM_OPTIONS,
        )


def orthogonalize(
    w: Tensor, basis: Tensor, coefficients: Tensor, norms: Tensor, *, passes: int
) -> None:
    """Orthogonalize against a basis; see `eigenfilter.kernels.orthogonalize`."""
    rows, columns = basis.shape
    count = w.shape[0] if w.ndim == 2 else 1
    _core.orthogonalize(w, basis, coefficients, norms, passes, _CHECK)
    tiles = triton.cdiv(columns, orthogonalize_code.TILE)
    constants = {"TILE": orthogonalize_code.TILE, **orthogonalize_code.OPTIONS}
    with _on_device(w.device):
        sums = w.new_empty(count * rows * tiles, dtype=torch.float64)
        squares = w.new_empty(count * tiles, dtype=torch.float64)
        factors = torch.empty_like(coefficients)
        grid = (tiles, count)
        for i in range(passes):
            if rows:
                orthogonalize_code.dots_kernel[grid](w, basis, sums, rows, columns, **constants)
                orthogonalize_code.add_tiles_kernel[(count * rows,)](
                    sums, tiles, factors, coefficients, FIRST=i == 0, **constants
                )
            orthogonalize_code.subtract_kernel[grid](
                w, basis, factors, squares, rows, columns, **constants
            )
        orthogonalize_code.norms_kernel[(count,)](squares, tiles, norms, **constants)


def row_dots(q: Tensor, w: Tensor, sums: Tensor) -> None:
    """Inner products; see `eigenfilter.kernels.row_dots`."""
    _core.row_dots(q, w, sums, _CHECK)
    _over_columns(lanczos_code.row_dots_kernel, len(q), q.shape[1], (q, w), sums)


def lanczos_step(u: Tensor, q: Tensor, w: Tensor, factors: Tensor, sums: Tensor) -> None:
    """A step of recurrences; see `eigenfilter.kernels.lanczos_step`."""
    _core.lanczos_step(u, q, w, factors, sums, _CHECK)
    _over_columns(
        lanczos_code.lanczos_step_kernel, len(u), u.shape[1], (u, q, w, factors), sums, len(u)
    )


def gram(vectors: Tensor, out: Tensor) -> None:
    """Inner products of all pairs; see `eigenfilter.kernels.gram`."""
    _core.gram(vectors, out, _CHECK)
    _over_columns(lanczos_code.gram_kernel, 1, vectors.shape[1], (vectors,), out, len(vectors))


def mix_rows(vectors: Tensor, factors: Tensor) -> None:
    """Triangular combinations; see `eigenfilter.kernels.mix_rows`."""
    _core.mix_rows(vectors, factors, _CHECK)
    rows, columns = vectors.shape
    constants = {"TILE": lanczos_code.TILE, **lanczos_code.OPTIONS}
    grid = (triton.cdiv(columns, lanczos_code.TILE),)
    with _on_device(vectors.device):
        lanczos_code.mix_rows_kernel[grid](vectors, factors, rows, columns, **constants)


def _over_columns(
    kernel: Any, count: int, columns: int, inputs: tuple[Tensor, ...], sums: Tensor, *rows: int
) -> None:
    """Run a kernel over tiles of columns, `count` times, and add up the sums of its tiles."""
    tiles = triton.cdiv(columns, lanczos_code.TILE)
    constants = {"TILE": lanczos_code.TILE, **lanczos_code.OPTIONS}
    with _on_device(sums.device):
        tile_sums = sums.new_empty(sums.numel() * tiles)
        kernel[(tiles, count)](*inputs, tile_sums, *rows, columns, **constants)
        lanczos_code.add_sums_kernel[(sums.numel(),)](tile_sums, tiles, sums, **constants)


def flag_nonfinite(tensors: Sequence[Tensor], found_inf: Tensor) -> None:
    """Flag inf and NaN; see `eigenfilter.kernels.flag_nonfinite`."""
    read = _core.flag_nonfinite(tensors, found_inf, _CHECK)
    t = tensors[0]
    with _on_device(t.device):
        work = tables("flag_nonfinite", t, read)
        _single("found_inf", found_inf, torch.float32, t.device)
        _launch(device_code.flag_nonfinite_kernel, t.dtype, work, found_inf)


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
    return device_code.OPTIONS | {"num_warps": blocks.warps}


def _launch(kernel: Any, dtype: torch.dtype, work: Tables, *args: object, **variant: bool) -> None:
    """Run a program for every chunk, in the variant that the flags in `variant` select."""
    for grad in work.chunks:
        _launch_chunks(kernel, dtype, work, grad, args, variant)


def _launch_chunks(
    kernel: Any,
    dtype: torch.dtype,
    work: Tables,
    grad: torch.dtype,
    args: tuple[object, ...],
    variant: dict[str, bool],
) -> None:
    """Run the programs of the chunks whose gradients are of dtype `grad`."""
    chunks = work.chunks[grad]
    if chunks.shape[1] > 0:
        kernel[(chunks.shape[1],)](
            work.pointers,
            chunks,
            work.n,
            *args,
            **{name: bool(value) for name, value in variant.items()},
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


def _on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context in which `device` is the current one; raise if kernels cannot run on it."""
    require(device.type)
    return contextlib.nullcontext() if _INTERPRETED else torch.cuda.device(device)


def _scalar(name: str, value: Scalar, device: torch.device) -> tuple[float, Tensor | None]:
    """Return a hyperparameter as a kernel argument: its value, and its tensor if on the device."""
    if not isinstance(value, Tensor):
        return float(value), None
    if value.numel() != 1 or value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be a number or a one-element float32 or float64 tensor")
    if value.device == device:
        return 0.0, value
    if value.device.type == "cpu":
        return value.item(), None
    raise ValueError(
        f"{name} is on {value.device} and the tensors on {device}: move it there or to the CPU"
    )


def _scalars(device: torch.device, **values: Scalar) -> list[float | Tensor | None]:
    """Return the kernel arguments of hyperparameters, see `_scalar`, one after the other."""
    return [part for name, value in values.items() for part in _scalar(name, value, device)]


def _is_stochastic(rounding_seed: Scalar | None, dtype: torch.dtype) -> bool:
    """Whether results are rounded stochastically: with a seed, in a 16-bit dtype."""
    return rounding_seed is not None and dtype.itemsize == 2


def _flags(
    device: torch.device, grad_scale: Tensor | None, found_inf: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Check and return the tensors that a GradScaler sets."""
    return (
        _scale(grad_scale, device),
        _single("found_inf", found_inf, torch.float32, device),
    )


def _scale(grad_scale: Scalar | None, device: torch.device) -> Tensor | None:
    """Return a loss scale, a number or a float32 or float64 tensor, as a kernel argument."""
    if grad_scale is None:
        return None
    dtype = grad_scale.dtype if isinstance(grad_scale, Tensor) else torch.float64
    return torch.as_tensor(grad_scale, dtype=dtype, device=device)


def _single(
    name: str, value: Tensor | None, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """Return `value`; raise unless it is None or one element of this dtype on this device."""
    if value is not None and (value.numel() != 1 or value.dtype != dtype or value.device != device):
        raise ValueError(f"{name} must be a {dtype} tensor of one element on {device}")
    return value
