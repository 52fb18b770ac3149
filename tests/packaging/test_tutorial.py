"""The code of docs/tutorial.md runs as it stands, with the results that the page describes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pages import ROOT, run_page, sharpness_and_edge


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    output = run_page(ROOT / "docs" / "tutorial.md", tmp_path)
    pairs = sharpness_and_edge(output)
    assert len(pairs) == 2
    for sharpness, edge in pairs:
        assert sharpness == pytest.approx(edge, rel=0.1)
    assert re.findall(r"^verdict +(.*)$", output, re.MULTILINE) == [
        "not an equilibrium",
        "inside",
    ]
    assert (tmp_path / "tutorial.png").stat().st_size > 0
