"""The certificate of AdamW, whose matrix is preconditioned."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import eigenfilter as ef
from certificate.tasks import Network
from eigenfilter import filters


@pytest.mark.parametrize("cls", [ef.AdamW, torch.optim.AdamW])
def test_adamw_by_its_preconditioned_matrix(cls: Any) -> None:
    task = Network()
    opt = cls(task.model.parameters(), lr=1e-2, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.0)
    task.step(opt, 30)
    corrected = [
        opt.state[p]["exp_avg_sq"].flatten() / (1 - 0.95 ** float(opt.state[p]["step"]))
        for p in task.model.parameters()
    ]
    P = torch.cat(corrected).sqrt() + 1e-4
    exact = torch.linalg.eigvalsh(task.dense() / P.sqrt() / P.sqrt()[:, None])
    for lr, verdict in ((1.1, "outside"), (1.0, "at the edge"), (0.8, "inside")):
        opt.param_groups[0]["lr"] = lr * filters.AdamW(1.0, 0.8).max_eigenvalue() / exact[-1].item()
        result = task.certify(opt, equilibrium_tol=1e9)
        assert result.upper is not None
        assert result.upper.verdict == verdict
        assert result.sharpness == pytest.approx(exact[-1].item(), rel=1e-6)
        assert (
            result.bottom.value - result.bottom.margin <= exact[0].item() + result.upper.tolerance
        )


@pytest.mark.parametrize(
    ("method", "words", "jacobian_of"),
    [
        ("usam", "(H + H R H)", lambda H: H + 0.03 * H @ H),
        (
            "two_step_usam",
            "(H + 2 H R H + H R H R H)",
            lambda H: H + 0.06 * H @ H + 9e-4 * H @ H @ H,
        ),
        ("hessian_usam", "(H + H R H R H)", lambda H: H + 0.03 * H @ H @ H),
    ],
)
def test_adamw_after_an_ascent(method: str, words: str, jacobian_of: Any) -> None:
    task = Network()
    opt = ef.AdamW(
        task.model.parameters(), lr=1e-2, betas=(0.8, 0.95), eps=1e-4, method=method, rho=0.03
    )
    task.step(opt, 30)
    result = task.certify(opt, equilibrium_tol=1e9)
    assert words in result.matrix
    H = task.dense()
    state = [opt.state[p] for p in task.model.parameters()]
    corrected = [s["exp_avg_sq"].flatten() / (1 - 0.95 ** float(s["step"])) for s in state]
    P = torch.cat(corrected).sqrt() + 1e-4
    J = jacobian_of(H) / P.sqrt() / P.sqrt()[:, None]
    assert result.sharpness == pytest.approx(torch.linalg.eigvalsh(J)[-1].item(), rel=1e-6)


def test_adamw_without_its_state_raises() -> None:
    task = Network()
    with pytest.raises(ValueError, match="load its state"):
        task.certify(ef.AdamW(task.model.parameters()))


def test_asam_within_adamw_has_no_filter() -> None:
    task = Network()
    opt = ef.AdamW(task.model.parameters(), lr=0.01, rho=0.05, method="sam", adaptive=True)
    task.step(opt, 3)
    result = task.certify(opt, equilibrium_tol=1e9)
    assert result.verdict == "undecided"
    assert "no filter is known after an ascent of ASAM" in result.needed
