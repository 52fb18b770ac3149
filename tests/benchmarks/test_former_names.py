"""Results from before a renaming are read under the current names."""

from __future__ import annotations

import pytest

from benchmarks import registry
from benchmarks.curvature import library_solvers
from benchmarks.former_names import CURRENT_NAMES, with_current_names
from eigenfilter import kernels


@pytest.mark.parametrize(
    ("former", "current"),
    [
        ("ascend-float32", "perturb-float32"),
        ("descend-bfloat16", "sgd_step-bfloat16"),
        ("descend_adamw-float64", "adamw_step-float64"),
        ("project-out-float16", "orthogonalize-float16"),
        ("three-term-8", "lanczos-step-8"),
        ("orthonormalise-4", "cholesky-qr-4"),
    ],
)
def test_benchmarks_have_current_names(former: str, current: str) -> None:
    assert with_current_names(former) == current
    assert current in registry.BENCHMARKS


def test_keys_and_values_at_every_depth() -> None:
    former = {
        "neighbours": 0.5,
        "host": [{"call": "descend", "us": None}, {"call": "SGD.step", "us": 2}],
        "ratios": {"eigenfilter, no copies": {"median": 1.5}},
        "setting": "look_for_copies=False",
    }
    name = library_solvers.WITHOUT_CHECK.name
    assert with_current_names(former) == {
        "busy_cores": 0.5,
        "host": [{"call": "sgd_step", "us": None}, {"call": "SGD.step", "us": 2}],
        "ratios": {name: {"median": 1.5}},
        "setting": "check_multiplicity=False",
    }
    assert "check_multiplicity=False" in library_solvers.WITHOUT_CHECK.settings


def test_current_names_stay() -> None:
    names = [*registry.BENCHMARKS, *kernels.__all__, "usam-small", "2026-11-24", "", "-"]
    assert with_current_names(names) == names
    assert not CURRENT_NAMES.keys() & set(CURRENT_NAMES.values())
