"""The loop of docs/integrations/ray.md against USAM in plain torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from pages import ROOT, run_page
from plain_usam import PlainUSAM


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("ray", "pyarrow"))), reason="needs ray[train]"
)
def test_two_workers(tmp_path: Path) -> None:
    run_page(ROOT / "docs/integrations/ray.md", tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)).double()
    plain = PlainUSAM(model, max_norm=0.05)
    for workers in torch.load(tmp_path / "steps.pt"):
        plain.step([batch for window in workers for batch in window])
    trained = torch.load(tmp_path / "model.pt")
    for name, p in model.named_parameters():
        torch.testing.assert_close(trained[name], p.detach(), rtol=0, atol=1e-6)
    # DDP broadcasts rank 0's statistics: they have seen its batches, once each.
    assert trained["1.num_batches_tracked"] == 4 * 3
