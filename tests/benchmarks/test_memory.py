"""No method holds more than parameters, momentum, one gradient and a backup; Hessian USAM one more.

Each is measured in a process of its own, as `eigenfilter bench memory` does, in float32: a copy of
the parameters takes 4 bytes a parameter. Of released gradients, two of eight
equal ones exist at a time: one waits until backward has ended.
"""

from __future__ import annotations

import sys

import pytest

from benchmarks.memory import measure_in_new_process

MOST = {
    "SGD": 12,
    "USAM": 16,
    "SAM, adaptive": 16,
    "TwoStepUSAM": 16,
    "HessianUSAM": 20,
    "AdamW, method SAM": 20,
    "SGD, gradients released": 9,
    "USAM, gradients released": 13,
    "TwoStepUSAM, gradients released": 13,
    "USAM, bfloat16, gradients released": 6.5,
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux' high-water mark")
@pytest.mark.parametrize("name", MOST)
def test_peak_bytes_a_parameter(name: str) -> None:
    peak = measure_in_new_process(name, 1 << 24)
    assert MOST[name] - 0.5 < peak < MOST[name] + 0.5
