"""What CONTRIBUTING.md says about files is so."""

from __future__ import annotations

import re

from contributing.checkout import blocks_of_section
from pages import ROOT


def test_the_files_that_rho_passes_exist() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    section = page.split("### From rho to the arithmetic", 1)[1].split("\n## ", 1)[0]
    files = re.findall(r"^\d+\. `([^`]+)`", section, re.MULTILINE)
    assert len(files) == 8
    for name in files:
        folders = (ROOT, ROOT / "python/eigenfilter")
        assert any((folder / name).is_file() for folder in folders), name


def test_steps_name_their_files() -> None:
    assert len(blocks_of_section("How to add an optimizer")) == 3
    assert len(blocks_of_section("How to add an engine")) == 2
