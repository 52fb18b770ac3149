"""A copy of the tree that takes the steps of a section of CONTRIBUTING.md.

A block of code in the section begins with a comment that says where it belongs:

    # path/of/a/file.py: a new file
    # path/of/a/file.py: at the end
    # path/of/a/file.py: above the beginning of a line
    # path/of/a/file.py: below the beginning of a line
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pybind11

from eigenfilter import _core
from pages import ROOT

_COPIED = ("python", "csrc", "tests", "benchmarks", "docs", "pyproject.toml", "CMakeLists.txt")
_LEFT_OUT = ("__pycache__", "results", "figures", "contributing", "_core*.so")

# An editable installation finds the package before any folder in sys.path; the copy goes first.
_START = """
import sys

sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "ScikitBuildRedirectingFinder"]
"""


class Checkout:
    """A copy of the tree in a folder, with the compiled extension of this installation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in _COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns(*_LEFT_OUT))
            else:
                shutil.copy(source, folder / name)
        shutil.copy(_core.__file__, folder / "python/eigenfilter")
        (folder / "sitecustomize.py").write_text(_START)

    def follow(self, section: str) -> list[str]:
        """Take the steps of a section; return the files that they touch."""
        touched = []
        for block in blocks_of_section(section):
            comment, code = block.split("\n", 1)
            path, place = re.fullmatch(r"(?:#|//|<!--) (\S+): (.*?)(?: -->)?", comment).groups()
            self._write(self.folder / path, place, code)
            touched.append(path)
        return touched

    def _write(self, file: Path, place: str, code: str) -> None:
        if place == "a new file":
            assert not file.exists(), file
            file.write_text(code)
        elif place == "at the end":
            file.write_text(f"{file.read_text().rstrip()}\n\n\n{code}")
        else:
            side, start = place.split(" ", 1)
            lines = file.read_text().splitlines(keepends=True)
            (at,) = (i for i, line in enumerate(lines) if line.startswith(start))
            at += {"above": 0, "below": 1}[side]
            file.write_text("".join([*lines[:at], code, *lines[at:]]))

    def build(self, source: str, build: str, *options: str) -> Path:
        """Build the extension of a folder with a CMakeLists.txt; return the folder of the build."""
        definitions = [f"-DPython_EXECUTABLE={sys.executable}"]
        definitions.append(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
        self.run("cmake", "-G", "Ninja", "-S", source, "-B", build, *definitions, *options)
        self.run("ninja", "-C", build)
        return self.folder / build

    def python(self, *arguments: str, **environment: str) -> str:
        """Run Python in the copy and return what it prints; an error shows all of it."""
        return self.run(sys.executable, *arguments, **environment)

    def run(self, *command: str, **environment: str) -> str:
        """Run a program in the copy and return what it prints; an error shows all of it."""
        folders = os.pathsep.join(map(str, [self.folder, self.folder / "python"]))
        tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        ran = subprocess.run(
            command,
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": folders, "PATH": tools} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert ran.returncode == 0, ran.stdout
        return ran.stdout

    def pytest(self, *arguments: str, **environment: str) -> int:
        """Run tests of the copy, which must pass; return how many did."""
        options = ("-q", "-p", "no:cacheprovider")
        printed = self.python("-m", "pytest", *options, *arguments, **environment)
        return int(re.search(r"(\d+) passed", printed)[1])


def blocks_of_section(section: str) -> list[str]:
    """The blocks of code of a section of CONTRIBUTING.md that name a file."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    text = re.search(rf"^## {section}\n(.*?)(?=^## )", page, re.DOTALL | re.MULTILINE)[1]
    blocks = re.findall(r"^( *)```\w+\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for _, block in blocks]
