"""Pages of documentation whose Python runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def blocks_of(page: Path) -> list[str]:
    """The Python blocks of `page`, of which there must be some."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    assert blocks, page
    return blocks


def run_page(page: Path, folder: Path) -> str:
    """Run the Python blocks of `page` one after another in `folder`; return what they print."""
    script = folder / "page.py"
    script.write_text("import torch\n\ntorch.set_num_threads(1)\n" + "\n".join(blocks_of(page)))
    return subprocess.run(
        [sys.executable, script], cwd=folder, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def sharpness_and_edge(printed: str) -> list[tuple[float, float]]:
    """Every "sharpness ..., edge ..." that was printed."""
    result = re.findall(r"sharpness ([\d.]+), edge ([\d.]+)", printed)
    return [(float(sharpness), float(edge)) for sharpness, edge in result]
