"""Small networks for the tests of operators, and their dense Hessians."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.func import functional_call

from eigenfilter.curvature import HessianOperator

SAMPLES = 40


class Partial(nn.Module):
    """One layer frozen, one unused, one used twice; batch normalisation and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.tied = nn.Linear(4, 4)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.frozen(self.first(x))))
        x = torch.tanh(self.tied(self.drop(x)))
        return self.last(torch.sigmoid(self.tied(x)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3))


def conv() -> nn.Module:
    body = [nn.Conv2d(1, 2, 2), nn.Softplus(), nn.Flatten(), nn.Linear(8, 3)]
    unflatten = nn.Sequential(nn.ConstantPad1d((0, 4), 0.3), nn.Unflatten(1, (1, 3, 3)))
    return nn.Sequential(unflatten, *body).to(memory_format=torch.channels_last)


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "conv": conv, "partial": Partial}


def make(name: str = "mlp", dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a model in training mode, inputs and targets."""
    model = MODELS[name]().to(dtype)
    x = torch.randn(SAMPLES, 5, dtype=dtype)
    return model, x, torch.randint(3, (SAMPLES,))


def dense(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    names: list[str] | None = None,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
) -> Tensor:
    """Return the Hessian [n, n] in eval mode by `torch.autograd.functional`, of a copy."""
    model = copy.deepcopy(model).eval()
    params = {
        name: p.detach()
        for name, p in model.named_parameters()
        if p.requires_grad and (names is None or name in names)
    }
    flat = torch.cat([p.reshape(-1) for p in params.values()])

    def loss(x_flat: Tensor) -> Tensor:
        pieces = torch.split(x_flat, [p.numel() for p in params.values()])
        own = {k: v.view(p.shape) for (k, p), v in zip(params.items(), pieces, strict=True)}
        return loss_fn(functional_call(model, own, (x,)), target)

    result = hessian(loss, flat)
    assert isinstance(result, Tensor)
    return result


def columns(op: HessianOperator) -> Tensor:
    return op.matmat(torch.eye(op.shape[0], dtype=op.dtype))
