"""Small networks for the tests of operators, and their matrices built densely."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call

from eigenfilter.curvature import (
    CurvatureOperator,
    EmpiricalFisherOperator,
    GGNOperator,
    HessianOperator,
)

SAMPLES = 40
Loss = Callable[[Any, Any], Tensor]


class Partial(nn.Module):
    """One layer frozen, one unused, one used twice; batch normalization and dropout."""

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


class Transformer(nn.Module):
    """A transformer block over tokens with tied embedding and output weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.qkv = nn.Linear(4, 12)
        self.first, self.second = nn.LayerNorm(4), nn.LayerNorm(4)
        self.wide = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Dropout(0.3), nn.Linear(6, 4))
        self.read = nn.Linear(4, 6, bias=False)
        self.read.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = self.qkv(self.first(x)).chunk(3, -1)
        x = x + torch.softmax(q @ k.mT / 2, -1) @ v
        return self.read(x + self.wide(self.second(x))).mean(1)[:, :3]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3))


def _conv(*between: nn.Module) -> nn.Module:
    body = [nn.Conv2d(1, 2, 2), *between, nn.Softplus(), nn.Flatten(), nn.Linear(8, 3)]
    unflatten = nn.Sequential(nn.ConstantPad1d((0, 4), 0.3), nn.Unflatten(1, (1, 3, 3)))
    return nn.Sequential(unflatten, *body).to(memory_format=torch.channels_last)


def conv() -> nn.Module:
    return _conv()


def conv_norm() -> nn.Module:
    return _conv(nn.BatchNorm2d(2))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "conv": conv,
    "conv_norm": conv_norm,
    "partial": Partial,
    "transformer": Transformer,
}


def make(name: str = "mlp", dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a model in training mode, inputs and targets."""
    model = MODELS[name]().to(dtype)
    if name == "transformer":
        x = torch.randint(6, (SAMPLES, 5))
    else:
        x = torch.randn(SAMPLES, 5, dtype=dtype)
    return model, x, torch.randint(3, (SAMPLES,))


def dense(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    names: list[str] | None = None,
    loss_fn: Loss = nn.functional.cross_entropy,
    mode: str = "eval",
) -> Tensor:
    """Return the Hessian [n, n] by `torch.autograd.functional`, of a copy."""
    output, flat = _as_function(model, x, names, mode)
    result = hessian(lambda x_flat: loss_fn(output(x_flat), target), flat)
    assert isinstance(result, Tensor)
    return result


def dense_ggn(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    names: list[str] | None = None,
    loss_fn: Loss = nn.functional.cross_entropy,
    mode: str = "eval",
) -> Tensor:
    """Return J^T H_L J [n, n], from dense J and H_L."""
    output, flat = _as_function(model, x, names, mode)
    z = output(flat).detach()
    J = jacobian(output, flat).reshape(z.numel(), len(flat))
    H = hessian(lambda z: loss_fn(z, target), z).reshape(z.numel(), z.numel())
    return J.T @ H @ J


def dense_fisher(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    names: list[str] | None = None,
    loss_fn: Loss = nn.functional.cross_entropy,
    mode: str = "eval",
) -> Tensor:
    """Return the mean of g g^T [n, n], from the gradient g of each sample."""
    output, flat = _as_function(model, x, names, mode)

    def losses(x_flat: Tensor) -> Tensor:
        z = output(x_flat)
        return torch.stack([loss_fn(z[i : i + 1], target[i : i + 1]) for i in range(len(z))])

    G = jacobian(losses, flat)
    return G.T @ G / len(G)


OPERATORS: dict[type[CurvatureOperator], Callable[..., Tensor]] = {
    HessianOperator: dense,
    GGNOperator: dense_ggn,
    EmpiricalFisherOperator: dense_fisher,
}


def columns(op: CurvatureOperator) -> Tensor:
    return op.matmat(torch.eye(op.shape[0], dtype=op.dtype))


def _as_function(
    model: nn.Module, x: Tensor, names: list[str] | None, mode: str
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return a copy's output as a function of its flat parameters, and these.

    In mode "train" dropout draws what the operator's first batch draws with seed 0.
    """
    model = copy.deepcopy(model).train(mode == "train")
    params = {
        name: p.detach()
        for name, p in model.named_parameters()
        if p.requires_grad and (names is None or name in names)
    }

    def output(x_flat: Tensor) -> Tensor:
        pieces = torch.split(x_flat, [p.numel() for p in params.values()])
        own = {k: v.view(p.shape) for (k, p), v in zip(params.items(), pieces, strict=True)}
        own |= {k: b.clone() for k, b in model.named_buffers()}  # training writes to them
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            return functional_call(model, own, (x,))

    return output, torch.cat([p.reshape(-1) for p in params.values()])
