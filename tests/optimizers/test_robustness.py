"""What goes on between an ascent and its step, and parameters that do not take part as usual."""

import numpy as np
import pytest
import torch
from torch import Tensor

import eigenfilter
from eigenfilter import kernels


def usam(*values: float, **arguments: object) -> tuple[list[Tensor], eigenfilter.USAM]:
    params = [torch.nn.Parameter(torch.full((3,), v)) for v in values]
    for p in params:
        p.grad = torch.full_like(p, 2.0)
    return params, eigenfilter.USAM(params, lr=0.1, rho=0.5, **arguments)


def test_an_interrupt_right_after_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    (x,), opt = usam(1.0)
    perturb = opt.perturbation.perturb

    def interrupted(index: int, bucket_slice: object) -> None:
        perturb(index, bucket_slice)
        raise KeyboardInterrupt

    monkeypatch.setattr(opt.perturbation, "perturb", interrupted)
    with pytest.raises(KeyboardInterrupt):
        opt.ascend()
    assert x.tolist() == [1.0, 1.0, 1.0]
    assert not opt.perturbed


def test_an_interrupt_right_before_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backups still hold an older x by then."""
    (x,), opt = usam(1.0)
    assert opt.ascend()
    x.grad = torch.full_like(x, 2.0)
    opt.step()
    x.grad = torch.full_like(x, 2.0)
    now = x.detach().clone()

    def interrupted(index: int, bucket_slice: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(opt.perturbation, "perturb", interrupted)
    with pytest.raises(KeyboardInterrupt):
        opt.ascend()
    assert torch.equal(x, now)
    assert not torch.equal(x, torch.ones(3))


def test_groups_that_share_memory() -> None:
    a = torch.nn.Parameter(torch.ones(4))
    b = torch.nn.Parameter(a.detach()[1:3])
    with pytest.raises(ValueError, match="share memory"):
        eigenfilter.USAM([{"params": [a]}, {"params": [b]}], lr=0.1)
    opt = eigenfilter.USAM([{"params": [a]}], lr=0.1)
    with pytest.raises(ValueError, match="share memory"):
        opt.add_param_group({"params": [b]})
    assert len(opt.param_groups) == 1
    opt.param_groups[0]["params"].append(b)  # behind the optimizer's back
    a.grad, b.grad = torch.ones(4), torch.ones(2)
    with pytest.raises(ValueError, match="share memory"):
        opt.ascend()
    assert a.tolist() == [1.0] * 4


def test_reading_the_state_between_ascent_and_step() -> None:
    (x,), opt = usam(1.0)
    assert opt.ascend()
    assert opt.state[x] == {}
    x.grad = torch.full_like(x, 2.0)
    opt.step()
    torch.testing.assert_close(x.detach(), torch.full((3,), 0.8))


def test_only_a_group_without_ascent_has_gradients() -> None:
    backbone, head = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    groups = [{"params": [backbone]}, {"params": [head], "rho": 0.0}]
    opt = eigenfilter.USAM(groups, lr=0.1, rho=0.5)
    head.grad = torch.full_like(head, 2.0)
    assert not opt.ascend()
    assert opt.phase == "descent"
    opt.step()
    assert opt.phase == "ascent"
    assert backbone.tolist() == [1.0] * 3
    torch.testing.assert_close(head.detach(), torch.full((3,), 0.8))


def test_a_load_keeps_the_count_of_skipped_steps() -> None:
    x = torch.nn.Parameter(torch.ones(3))
    opt = eigenfilter.SGD([x], lr=0.1, skip_nonfinite=True)
    x.grad = torch.full_like(x, float("nan"))
    opt.step()
    opt.load_state_dict(opt.state_dict())
    assert opt.skipped == 1
    assert x.tolist() == [1.0] * 3


def test_hyperparameters_of_numpy() -> None:
    x = torch.nn.Parameter(torch.ones(3))
    opt = eigenfilter.SGD([x], lr=np.float32(0.5))
    x.grad = torch.full_like(x, 2.0)
    opt.step()
    assert x.tolist() == [0.0] * 3


@pytest.mark.parametrize("backend_name", ["native", "reference"])
def test_kernels_bump_versions(backend_name: str) -> None:
    x, g, b, m = (torch.ones(3) for _ in range(4))
    before = [t._version for t in (x, g, b, m)]
    kernels.perturb([x], [g], [b], 0.1, backend=backend_name)
    kernels.sgd_step([x], [g], [m], [b], lr=0.1, momentum=0.9, backend=backend_name)
    grown = [t._version > v for t, v in zip((x, g, b, m), before, strict=True)]
    assert grown == [True, False, True, True]


@pytest.mark.parametrize("arguments", [{"momentum": 0.9}, {"nesterov": True}])
def test_momentum_needs_buffers(arguments: dict[str, object]) -> None:
    x = torch.ones(3)
    with pytest.raises(ValueError, match="needs momenta"):
        kernels.sgd_step([x], [torch.ones(3)], lr=0.1, **arguments)
    assert x.tolist() == [1.0] * 3


def test_a_first_step_in_inference_mode_leaves_state_for_steps_outside_of_it() -> None:
    x = torch.nn.Parameter(torch.ones(3))
    opt = eigenfilter.USAM([x], lr=0.5, momentum=0.5, rho=0.5)

    def closure() -> float:
        x.grad = torch.ones(3)
        return 0.0

    with torch.inference_mode():
        opt.step(closure)
    assert x.tolist() == [0.5] * 3
    opt.step(closure)
    assert x.tolist() == [-0.25] * 3


def test_a_first_step_of_adamw_in_inference_mode() -> None:
    x, y = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    opt, other = (eigenfilter.AdamW([p], lr=0.1) for p in (x, y))
    for inside in (True, False):
        x.grad, y.grad = torch.ones(3), torch.ones(3)
        with torch.inference_mode(inside):
            opt.step()
        other.step()
    assert opt.state[x]["step"] == other.state[y]["step"] == 2
    assert torch.equal(x, y)


@pytest.mark.parametrize("backend_name", ["native", "reference"])
def test_a_parameter_made_in_inference_mode_is_refused_outside_of_it(backend_name: str) -> None:
    with torch.inference_mode():
        x = torch.ones(3)
    y = torch.ones(3)
    x.grad, y.grad = torch.ones(3), torch.ones(3)
    with pytest.raises(RuntimeError, match="was made in inference mode"):
        eigenfilter.SGD([y, x], lr=0.5, backend=backend_name).step()
    assert x.tolist() == y.tolist() == [1.0] * 3
