"""The optimizers inside those of frameworks, which every part of the library finds alike."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import eigenfilter as ef
from eigenfilter.optimizers._step_state import owner_of
from eigenfilter.optimizers.layers import layers_of, optimizer_of

MODEL = nn.Linear(3, 2)


class Wrapper(torch.optim.SGD):
    """An optimizer that holds another one in an attribute."""

    def __init__(self, name: str, inner: Any) -> None:
        super().__init__(MODEL.parameters(), lr=0.1)
        setattr(self, name, inner)


class Property:
    """What holds another optimizer, is none itself, and shows it in a property."""

    __slots__ = ("_held",)

    def __init__(self, inner: Any) -> None:
        self._held = inner

    @property
    def optimizer(self) -> Any:
        return self._held


def of_fastai(inner: Any) -> Any:
    optimizer = pytest.importorskip("fastai.optimizer")
    return optimizer.OptimWrapper(opt=inner)


def of_timm(inner: Any) -> Any:
    optim = pytest.importorskip("timm.optim")
    return optim.Lookahead(inner)


def of_lightning(inner: Any) -> Any:
    return pytest.importorskip("lightning.pytorch.core.optimizer").LightningOptimizer(inner)


def of_fabric(inner: Any) -> Any:
    fabric = pytest.importorskip("lightning.fabric")
    return fabric.Fabric(accelerator="cpu").setup_optimizers(inner)


NAMES = "optimizer", "_optimizer", "base_optimizer", "_base_optimizer", "optim", "opt"
WRAPPERS: dict[str, Callable[[Any], Any]] = {
    **{name: functools.partial(Wrapper, name) for name in NAMES},
    "property": Property,
    "two": lambda inner: Wrapper("_optimizer", Wrapper("base_optimizer", inner)),
    "fastai": of_fastai,
    "timm": of_timm,
    "lightning": of_lightning,
    "fabric": of_fabric,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of frameworks' imports
@pytest.mark.parametrize("name", WRAPPERS)
def test_the_optimizer_in_a_wrapper(name: str) -> None:
    opt = ef.USAM(MODEL.parameters(), lr=0.1)
    assert owner_of(optimizer_of(WRAPPERS[name](opt))) is opt  # Lightning's are subclasses of USAM
    assert optimizer_of(WRAPPERS[name](torch.optim.SGD(MODEL.parameters()))) is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of frameworks' imports
@pytest.mark.parametrize("name", WRAPPERS)
def test_ascent_sync_takes_a_wrapper(name: str) -> None:
    opt = WRAPPERS[name](ef.USAM(MODEL.parameters(), lr=0.1))
    ef.ascent_sync(MODEL, opt, enabled=False)  # one process has no other to wait for
    other = WRAPPERS[name](torch.optim.SGD(MODEL.parameters()))
    with pytest.raises(TypeError, match="ascent_sync needs an optimizer that takes ascents"):
        ef.ascent_sync(MODEL, other)


def test_the_outer_one_comes_first() -> None:
    base = ef.SGD(MODEL.parameters(), lr=0.1)
    opt = ef.SharpnessAware(base)
    assert optimizer_of(opt) is opt
    assert layers_of(opt) == [opt, base]
    assert optimizer_of(None) is None


def test_a_wrapper_that_holds_itself() -> None:
    wrapper = Wrapper("opt", None)
    wrapper.opt = wrapper
    assert layers_of(wrapper) == [wrapper]
    assert optimizer_of(wrapper) is None
