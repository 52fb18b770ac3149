"""design is the inverse of max_eigenvalue."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eigenfilter import filters
from eigenfilter.filters import design

METHODS: dict[str, Callable[..., filters.Filter]] = {
    "usam": filters.USAM,
    "sam": lambda *a, **kw: filters.SAM(*a, grad_norm=0.3, **kw),
    "two_step_usam": filters.TwoStepUSAM,
    "hessian_usam": filters.HessianUSAM,
}


@pytest.mark.parametrize("name", METHODS)
@given(
    target=st.floats(-3, 5).map(lambda e: 10.0**e),
    momentum=st.one_of(st.just(0.0), st.floats(0.1, 0.95)),
    dampening=st.floats(0.0, 0.9),
    decay=st.floats(0.0, 0.5),
    share=st.floats(0.01, 0.99),
    nesterov=st.booleans(),
    ascent=st.sampled_from(["sequential", "anchored"]),
)
def test_the_edge_is_where_it_was_wanted(
    name: str,
    target: float,
    momentum: float,
    dampening: float,
    decay: float,
    share: float,
    nesterov: bool,
    ascent: str,
) -> None:
    nesterov = nesterov and momentum > 0
    rest = {
        "momentum": momentum,
        "dampening": 0.0 if nesterov else dampening,
        "weight_decay": decay * target,
        "nesterov": nesterov,
    }
    extra = {"ascent": ascent} if name == "two_step_usam" else {}
    norm = {"grad_norm": 0.3} if name == "sam" else {}
    highest = design("sgd", target, **rest)
    lr = share * highest
    rho = design(name, target, lr=lr, **rest, **extra, **norm)
    assert rho > 0
    result = METHODS[name](lr, rho=rho, **rest, **extra).max_eigenvalue()
    assert result == pytest.approx(target, rel=1e-9)
    assert design(name, target, rho=rho, **rest, **extra, **norm) == pytest.approx(lr, rel=1e-9)
    with pytest.raises(ValueError, match="take lr <=") as refused:
        design(name, target, lr=1.01 * highest, **rest, **extra, **norm)
    allowed = float(re.search(r"take lr <= (\S+),", str(refused.value))[1])
    design(name, target, lr=allowed * (1 - 1e-12), **rest, **extra, **norm)


def test_sgd() -> None:
    assert design("sgd", 10.0) == pytest.approx(0.2)
    lr = design("sgd", 25.0, momentum=0.9, nesterov=True, weight_decay=0.1)
    flt = filters.Nesterov(lr, 0.9, 0.0, 0.1)
    assert flt.max_eigenvalue() == pytest.approx(25)


@given(
    target=st.floats(-3, 5).map(lambda e: 10.0**e),
    momentum=st.floats(0.05, 0.99),
    dampening=st.floats(0.0, 0.9),
    decay=st.floats(0.0, 0.5),
    share=st.floats(0.01, 0.99),
)
def test_the_extrapolation_of_sgd(
    target: float, momentum: float, dampening: float, decay: float, share: float
) -> None:
    rest = {"momentum": momentum, "dampening": dampening, "weight_decay": decay * target}
    highest = design("sgd", target, **rest)
    e = design("sgd", target, lr=share * highest, **rest)
    assert e > 0
    flt = filters.HeavyBall(share * highest, **rest, extrapolation=e)
    assert flt.max_eigenvalue() == pytest.approx(target, rel=1e-9)
    with pytest.raises(ValueError, match=r"take lr <= .* and an extrapolation to it"):
        design("sgd", target, lr=1.01 * highest, **rest)


@given(
    target=st.floats(-2, 2).map(lambda e: 10.0**e),
    momentum=st.floats(0.1, 0.95),
    norm=st.floats(-3, 3).map(lambda e: 10.0**e),
)
def test_the_radius_of_msam(target: float, momentum: float, norm: float) -> None:
    rest = {"momentum": momentum, "dampening": 0.1, "weight_decay": 0.2 * target}
    highest = design("sgd", target, **rest)
    rho = design("msam", target, lr=0.3 * highest, momentum_norm=norm, **rest)
    flt = filters.MSAM(0.3 * highest, **rest, rho=rho, momentum_norm=norm)
    assert flt.max_eigenvalue() == pytest.approx(target, rel=1e-9)
    lr = design("msam", target, rho=rho, momentum_norm=norm, **rest)
    assert lr == pytest.approx(0.3 * highest, rel=1e-6)
    with pytest.raises(ValueError, match=r"alone puts the edge below .*: take rho <"):
        design("msam", target, rho=2.0 * rho, momentum_norm=norm, **rest)


@given(
    target=st.floats(-3, 5).map(lambda e: 10.0**e),
    beta1=st.floats(0.0, 0.99),
    decay=st.floats(0.0, 0.5),
    share=st.floats(0.01, 0.99),
)
def test_adamw(target: float, beta1: float, decay: float, share: float) -> None:
    rest = {"beta1": beta1, "weight_decay": decay * target}
    highest = design("adamw", target, **rest)
    assert filters.AdamW(highest, **rest).max_eigenvalue() == pytest.approx(target, rel=1e-9)
    e = design("adamw", target, lr=share * highest, **rest)
    assert e > 0
    flt = filters.AdamW(share * highest, **rest, extrapolation=e)
    assert flt.max_eigenvalue() == pytest.approx(target, rel=1e-9)
    with pytest.raises(ValueError, match=r"take lr <= .* and an extrapolation to it"):
        design("adamw", target, lr=1.01 * highest, **rest)


@pytest.mark.parametrize(
    ("method", "edge", "options", "match"),
    [
        ("adamw", 1.0, {"lr": 0.0}, "lr must be positive"),
        ("adamw", 1.0, {"lr": 0.1, "beta1": 1.0}, "beta1 must lie"),
        ("adamw", 1.0, {"lr": 0.1, "momentum": 0.9}, "momentum is not an argument of adamw"),
        ("adamw", 1.0, {"rho": 0.1}, "rho is not an argument of adamw"),
        ("adamw", 0.0, {"lr": 0.1}, "max_eigenvalue"),
        ("sgd", 1.0, {"lr": 0.1, "beta1": 0.9}, "beta1 is an argument of adamw, not of sgd"),
        ("adam", 1.0, {"lr": 0.1}, "unknown method"),
        ("usam", -1.0, {"lr": 0.1}, "max_eigenvalue"),
        ("usam", 1.0, {}, "one of the two"),
        ("usam", 1.0, {"lr": 0.1, "rho": 0.1}, "one of the two"),
        ("sgd", 1.0, {"rho": 0.1}, "no rho"),
        ("sgd", 1.0, {"lr": 0.1}, "set momentum > 0"),
        ("sgd", 1.0, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, "no nesterov"),
        ("usam", 1.0, {"lr": 0.0}, "lr must be positive"),
        ("usam", 1.0, {"rho": -1.0}, "rho"),
        ("usam", 1.0, {"lr": 0.1, "momentum": 1.0}, "momentum"),
        ("usam", 1.0, {"lr": 0.1, "momentum": 0.5, "dampening": 1.0}, "no parameter changes"),
        ("sam", 1.0, {"lr": 0.1}, "grad_norm"),
        ("msam", 1.0, {"lr": 0.1, "momentum": 0.9}, "give momentum_norm"),
        ("msam", 1.0, {"lr": 0.1, "momentum_norm": 0.0, "momentum": 0.9}, "momentum_norm"),
        ("msam", 1.0, {"lr": 0.1, "momentum_norm": 1.0}, "set momentum > 0"),
        ("msam", 1.0, {"rho": 0.1, "momentum_norm": 1.0}, "set momentum > 0"),
        (
            "msam",
            1.0,
            {"rho": 0.1, "momentum_norm": 1.0, "momentum": 0.9, "nesterov": True},
            "leave nesterov out",
        ),
        ("usam", 1.0, {"lr": 0.1, "momentum_norm": 1.0}, "momentum_norm is an argument of msam"),
        ("two_step_usam", 1.0, {"lr": 0.1, "ascent": "both"}, "ascent"),
        ("usam", 1.0, {"lr": 0.1, "ascent": "anchored"}, "ascent is an argument of"),
        ("usam", 1.0, {"lr": 0.1, "grad_norm": 1.0}, "grad_norm is an argument of"),
    ],
)
def test_bad_values(method: str, edge: float, options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        design(method, edge, **options)
