"""The compiled backend: C++ on the CPU, CUDA C++ on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eigenfilter import _core
from eigenfilter.kernels.conventions import Scalar


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
    threads = torch.get_num_threads()
    _core.perturb(params, grads, backups, alpha, True, adaptive, grad_scale, found_inf, threads)


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
    threads = torch.get_num_threads()
    _core.perturb(params, grads, backups, alpha, False, False, grad_scale, found_inf, threads)


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
    _core.perturb_hvp(
        params,
        grads,
        base_grads,
        backups,
        alpha,
        eps,
        grad_scale,
        found_inf,
        torch.get_num_threads(),
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
    _core.sgd_step(
        params,
        grads,
        momenta,
        backups,
        lr,
        momentum,
        dampening,
        weight_decay,
        nesterov,
        maximize,
        rounding_seed,
        grad_scale,
        found_inf,
        torch.get_num_threads(),
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
    _core.adamw_step(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        backups,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        step,
        maximize,
        rounding_seed,
        grad_scale,
        found_inf,
        torch.get_num_threads(),
    )


def norm(
    tensors: Sequence[Tensor],
    out: Tensor,
    *,
    weights: Sequence[Tensor] | None = None,
    grad_scale: Tensor | None = None,
) -> None:
    """Euclidean norm; see `eigenfilter.kernels.norm`."""
    _core.norm(tensors, out, weights, grad_scale, torch.get_num_threads())


def orthogonalize(
    w: Tensor, basis: Tensor, coefficients: Tensor, norms: Tensor, *, passes: int
) -> None:
    """Orthogonalize against a basis; see `eigenfilter.kernels.orthogonalize`."""
    _core.orthogonalize(w, basis, coefficients, norms, passes, torch.get_num_threads())


def row_dots(q: Tensor, w: Tensor, sums: Tensor) -> None:
    """Inner products; see `eigenfilter.kernels.row_dots`."""
    _core.row_dots(q, w, sums, torch.get_num_threads())


def lanczos_step(u: Tensor, q: Tensor, w: Tensor, factors: Tensor, sums: Tensor) -> None:
    """A step of recurrences; see `eigenfilter.kernels.lanczos_step`."""
    _core.lanczos_step(u, q, w, factors, sums, torch.get_num_threads())


def gram(vectors: Tensor, out: Tensor) -> None:
    """Inner products of all pairs; see `eigenfilter.kernels.gram`."""
    _core.gram(vectors, out, torch.get_num_threads())


def mix_rows(vectors: Tensor, factors: Tensor) -> None:
    """Triangular combinations; see `eigenfilter.kernels.mix_rows`."""
    _core.mix_rows(vectors, factors, torch.get_num_threads())


def flag_nonfinite(tensors: Sequence[Tensor], found_inf: Tensor) -> None:
    """Flag inf and NaN; see `eigenfilter.kernels.flag_nonfinite`."""
    _core.flag_nonfinite(tensors, found_inf, torch.get_num_threads())
