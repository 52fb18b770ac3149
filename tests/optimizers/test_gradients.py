"""Gradients that do not lie in memory as their parameters do: views, other dtypes and strides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import eigenfilter as ef
from cases import RHO, same_bits
from optimizers.problems import SETTINGS, distance, loss_of, parameters, snapshot

HEAVY = SETTINGS["heavy ball"]

Give = Callable[[list], None]
"""Puts gradients that `loss_of` has made into another form, same values."""


def bucket_views(params: list) -> None:
    """Make gradients as DDP does: views of one buffer, without any alignment."""
    flat = torch.empty(sum(p.numel() for p in params) + 3, dtype=params[0].dtype)
    start = 1
    for p in params:
        view = torch.as_strided(flat, p.shape, p.stride(), start)
        p.grad = view.copy_(p.grad)
        start += p.numel()


def other_strides(params: list) -> None:
    for p in params:
        if p.dim() == 4:
            p.grad = p.grad.contiguous()
            assert p.grad.stride() != p.stride()
        elif p.dim() == 2:
            p.grad = p.grad.t().contiguous().t()
            assert p.grad.stride() != p.stride()


def strided_out_of_something_larger(params: list) -> None:
    for p in params:
        wide = torch.full((*p.shape, 2), torch.nan, dtype=p.dtype)
        wide[..., 1] = p.grad
        p.grad = wide[..., 1]


def lazily_negated(params: list) -> None:
    for p in params:
        p.grad = torch._neg_view(-p.grad)
        assert p.grad.is_neg()


def requiring_grad(params: list) -> None:
    for p in params:
        p.grad = p.grad.detach().requires_grad_()


FORMS: dict[str, Give] = {
    "bucket views": bucket_views,
    "other strides": other_strides,
    "with gaps": strided_out_of_something_larger,
    "lazily negated": lazily_negated,
    "requiring grad": requiring_grad,
}


def run(give: Give | None, dtype: torch.dtype, **options: Any) -> tuple[list, ef.USAM]:
    params = parameters(dtype)
    opt = ef.USAM([{"params": params[:3]}, {"params": params[3:]}], **HEAVY, rho=RHO, **options)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_of(params)
        loss.backward()
        if give is not None:
            give(params)
        return loss

    for _ in range(4):
        opt.step(closure)
    return params, opt


@pytest.mark.parametrize("skip_nonfinite", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits_from_gradients_of_any_form(
    dtype: torch.dtype, form: str, skip_nonfinite: bool
) -> None:
    expected, _ = run(None, dtype)
    params, opt = run(FORMS[form], dtype, skip_nonfinite=skip_nonfinite)
    assert all(map(same_bits, params, expected))
    assert opt.skipped == 0


def test_a_bucket_that_is_written_again_does_not_reach_the_backup() -> None:
    """DDP fills the same bucket with each pass: x must not lie in it."""
    params = parameters()
    opt = ef.USAM(params, **HEAVY, rho=RHO)
    before = snapshot(params)
    loss_of(params).backward()
    bucket_views(params)
    bucket = params[0].grad.untyped_storage()
    opt.ascend()
    torch.tensor([], dtype=torch.float64).set_(bucket).fill_(torch.nan)
    opt.restore()
    assert all(map(same_bits, params, before))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_gradients_of_another_dtype(narrow: torch.dtype) -> None:
    p = torch.nn.Parameter(torch.linspace(-1, 1, 50))
    twin = torch.nn.Parameter(p.detach().clone())
    p.grad_dtype = narrow
    opt, reference = (ef.USAM([q], **HEAVY, rho=RHO) for q in (p, twin))
    for _ in range(3):
        for phase in ("ascent", "descent"):
            for q, o in ((p, opt), (twin, reference)):
                q.grad = None
                with torch.no_grad():
                    g = (q * 1.3).to(narrow)
                q.grad = g if q is p else g.float()
                o.ascend() if phase == "ascent" else o.step()
    assert same_bits(p, twin)
    assert p.dtype == torch.float32


def test_expanded_gradients() -> None:
    params, twins = parameters(), parameters()
    opt, reference = (ef.USAM(p, **HEAVY, rho=RHO) for p in (params, twins))
    for step in (opt.ascend, opt.step):
        for p in params:
            p.grad = torch.full((), 0.5, dtype=p.dtype).expand(p.shape)
        step()
    for step in (reference.ascend, reference.step):
        for p in twins:
            p.grad = torch.full_like(p, 0.5)
        step()
    assert all(map(same_bits, params, twins))


def test_one_tensor_may_be_the_gradient_of_two_parameters() -> None:
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    opt = ef.USAM(params, lr=0.5, rho=RHO)
    for step in (opt.ascend, opt.step):
        shared = torch.full((4,), 0.25)
        for p in params:
            p.grad = shared
        step()
    for p in params:
        assert torch.equal(p.detach(), torch.full((4,), 0.875))


def test_a_hook_that_negates() -> None:
    """A post-accumulate hook may leave any tensor as the gradient."""
    results = []
    for lazy in (True, False):
        params = parameters()
        for p in params:
            p.register_post_accumulate_grad_hook(
                lambda q, lazy=lazy: setattr(
                    q, "grad", torch._neg_view(q.grad) if lazy else -q.grad
                )
            )
        opt = ef.USAM(params, **HEAVY, rho=RHO, maximize=True)
        for _ in range(3):
            loss_of(params).backward()
            opt.ascend()
            loss_of(params).backward()
            opt.step()
            opt.zero_grad()
        results.append(params)
    assert all(map(same_bits, *results))
    assert distance(results[0], parameters()) > 0.1


def test_sparse_gradients_are_named() -> None:
    table = torch.nn.Embedding(5, 3, sparse=True)
    opt = ef.SGD(table.parameters(), lr=0.1, momentum=0.9)
    before = table.weight.detach().clone()
    table(torch.tensor([1, 3])).sum().backward()
    with pytest.raises(TypeError, match=r"shape \(5, 3\) is sparse .*: use sparse=False"):
        opt.step()
    assert same_bits(table.weight, before)


def test_a_gradient_that_aliases_its_parameter_is_refused() -> None:
    p = torch.nn.Parameter(torch.ones(4))
    opt = ef.USAM([p], lr=0.1, rho=RHO)
    p.grad = p.detach()
    with pytest.raises(ValueError, match="share memory"):
        opt.ascend()
    assert torch.equal(p.detach(), torch.ones(4))
    assert not opt.perturbed


def test_a_bad_gradient_in_the_last_group_is_refused_before_the_first_steps() -> None:
    first = torch.nn.Parameter(torch.ones(4))
    table = torch.nn.Embedding(5, 3, sparse=True)
    opt = ef.SGD([{"params": [first]}, {"params": table.parameters()}], lr=0.1)
    (first.sum() + table(torch.tensor([1])).sum()).backward()
    with pytest.raises(TypeError, match="is sparse"):
        opt.step()
    assert torch.equal(first.detach(), torch.ones(4))


def test_a_bad_gradient_beside_one_with_other_state_is_refused_before_either_steps() -> None:
    """One parameter has momentum, the other gets its first gradient: two calls of the kernel."""
    first = torch.nn.Parameter(torch.ones(4))
    table = torch.nn.Embedding(5, 3, sparse=True)
    opt = ef.SGD([first, table.weight], lr=0.1, momentum=0.9)
    first.sum().backward()
    opt.step()
    before = first.detach().clone()
    (first.sum() + table(torch.tensor([1])).sum()).backward()
    with pytest.raises(TypeError, match="is sparse"):
        opt.step()
    assert torch.equal(first.detach(), before)
