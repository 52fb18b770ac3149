"""What `import eigenfilter` brings, and when."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import eigenfilter as ef

LOADED = """
import json, sys
{code}
print(json.dumps([m for m in ("torch", "numpy", "eigenfilter._core") if m in sys.modules]))
"""


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import eigenfilter", []),
        ("import eigenfilter as ef; ef.__version__; dir(ef)", []),
        ("import eigenfilter.filters", ["numpy"]),
        ("from eigenfilter import filters; filters.HeavyBall(0.1).max_eigenvalue()", ["numpy"]),
        ("import eigenfilter as ef; ef.SGD", ["torch", "numpy", "eigenfilter._core"]),
    ],
)
def test_parts_come_when_they_are_used(code: str, expected: list[str]) -> None:
    """The program runs in its own process, which has imported nothing else."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED.format(code=code)], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == expected


def test_torch_comes_before_the_core() -> None:
    """The core shares torch's OpenMP pool only if torch is imported first."""
    code = "import sys, eigenfilter.kernels; m = list(sys.modules); print(m.index('torch') < "
    process = subprocess.run(
        [sys.executable, "-c", code + "m.index('eigenfilter._core'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout == "True\n"


@pytest.mark.parametrize("name", [*ef.__all__, "__version__"])
def test_every_name_is_there(name: str) -> None:
    """Every public name can be imported, and dir() lists it."""
    assert getattr(ef, name) is not None
    assert name in dir(ef)


def test_other_names_are_errors() -> None:
    """An unknown attribute raises AttributeError, as of any module."""
    with pytest.raises(AttributeError, match="module 'eigenfilter' has no attribute 'Adam'"):
        _ = ef.Adam


def imports_of(file: Path) -> Iterator[str]:
    """The names that a file of the package imports, in full."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_a_module_with_an_underscore_is_imported_in_its_package_alone() -> None:
    root = Path(ef.__file__).parent
    outside = []
    for file in root.rglob("*.py"):
        module = ".".join(("eigenfilter", *file.relative_to(root).with_suffix("").parts))
        for name in imports_of(file):
            package, _, private = name.partition("._")
            inside = f"{module}.".startswith(f"{package}.")
            if name.startswith("eigenfilter.") and private and not inside:
                outside.append((module, name))
    assert not outside
