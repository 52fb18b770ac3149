"""The loop of docs/integrations/deepspeed.md against USAM in plain torch."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pages import ROOT, blocks_of
from plain_usam import PlainUSAM

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"),
]
(PAGE,) = blocks_of(ROOT / "docs/integrations/deepspeed.md")


def run(script: str, folder: Path, processes: int = 2) -> subprocess.CompletedProcess[str]:
    (folder / "page.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    # DeepSpeed compiles an extension with ninja.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": path}
    return subprocess.run(
        [*command, "page.py"], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("max_norm", [0.0, 0.05])
@pytest.mark.parametrize("stage", [1, 2])
def test_two_processes(tmp_path: Path, stage: int, max_norm: float) -> None:
    page = PAGE.replace('{"stage": 2}', f'{{"stage": {stage}}}')
    page = page.replace('"gradient_clipping": 0.05', f'"gradient_clipping": {max_norm}')
    ended = run(page, tmp_path)
    assert ended.returncode == 0, ended.stderr
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
    plain = PlainUSAM(model, max_norm or None)
    gen = torch.Generator().manual_seed(0)
    for _ in range(8):
        draw = [torch.randn(6, columns, generator=gen) for columns in (4, 2, 4, 2)]
        plain.step([(draw[0], draw[1]), (draw[2], draw[3])])
    trained = torch.load(tmp_path / "model.pt")
    for name, p in model.named_parameters():
        torch.testing.assert_close(trained[name], p.detach(), rtol=0, atol=1e-6)
    assert trained["1.num_batches_tracked"] == 8


def test_an_ascent_inside_the_engine_is_refused(tmp_path: Path) -> None:
    head, _, _ = PAGE.partition("ascents = ")
    page = head.replace("torch.optim.SGD(", "ef.USAM(")
    page += (
        "engine.backward(engine(torch.ones(6, 4)).sum())\n"
        "try:\n    engine.step()\nexcept RuntimeError as error:\n    print(error)\n"
    )
    ended = run(page, tmp_path, processes=1)
    assert ended.returncode == 0, ended.stderr
    assert "step() needs 1 ascents before it" in ended.stdout
