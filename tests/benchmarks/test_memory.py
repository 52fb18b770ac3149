"""No method holds more than parameters, momentum, one gradient and a backup; Hessian USAM one more.

Each is measured in a process of its own, as `eigenfilter bench memory` does, in float32: a copy of
the parameters takes 4 bytes a parameter. Of released gradients, an eighth exists at a time.
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
    "SGD, gradients released": 8.5,
    "USAM, gradients released": 12.5,
    "TwoStepUSAM, gradients released": 12.5,
    "USAM, bfloat16, gradients released": 6.25,
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux' high-water mark")
@pytest.mark.parametrize("name", MOST)
def test_peak_bytes_a_parameter(name: str) -> None:
    peak = measure_in_new_process(name, 1 << 24)
    assert MOST[name] - 0.5 < peak < MOST[name] + 0.5
