"""What CONTRIBUTING.md says about files is so."""

from __future__ import annotations

import re

from contributing.checkout import blocks_of_section
from pages import ROOT


def test_rho_passes_at_most_eight_files() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    section = page.split("### From rho to the arithmetic", 1)[1].split("\n## ", 1)[0]
    steps = re.findall(r"^\d+\. (.*?):", section, re.MULTILINE)
    files = [name for step in steps for name in re.findall(r"`([^`]+)`", step)]
    assert 5 <= len(files) <= 8
    for name in files:
        folders = (ROOT, ROOT / "python/eigenfilter")
        assert any((folder / name).is_file() for folder in folders), name


def test_steps_name_their_files() -> None:
    assert len(blocks_of_section("How to add an optimizer")) == 3
    assert len(blocks_of_section("How to add an engine")) == 2
