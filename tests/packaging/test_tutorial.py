"""docs/tutorial.md runs as it stands, and comes to what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial.md"


def test_the_tutorial_runs(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    blocks = re.findall(r"```python\n(.*?)```", TUTORIAL.read_text(), re.DOTALL)
    script = tmp_path / "tutorial.py"
    script.write_text("import torch\n\ntorch.set_num_threads(1)\n" + "\n".join(blocks))
    run = subprocess.run(
        [sys.executable, script], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    found = re.findall(r"sharpness ([\d.]+), edge ([\d.]+)", run.stdout)
    assert len(found) == 2
    for sharpness, edge in found:
        assert float(sharpness) == pytest.approx(float(edge), rel=0.1)
    assert re.findall(r"^verdict +(.*)$", run.stdout, re.MULTILINE) == [
        "not an equilibrium",
        "inside",
    ]
    assert (tmp_path / "tutorial.png").stat().st_size > 0
