"""Tables, progress bars and results files of the experiments."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

import eigenfilter as ef
from eigenfilter.experiments.files import replace_text
from eigenfilter.experiments.full_batch import FullBatchRun

_COLUMNS: Mapping[str, Callable[[FullBatchRun], str]] = {
    "method": lambda run: run.method,
    "settings": lambda run: run.settings,
    "loss": lambda run: f"{run.last.loss:.5f}",
    "train": lambda run: f"{run.train_accuracy:.1%}",
    "test": lambda run: f"{run.test_accuracy:.1%}",
    "sharpness": lambda run: f"{run.last.sharpness:.3f}",
    "residual": lambda run: f"{run.last.residual:.0e}",
    "edge": lambda run: f"{run.last.edge:.3f}",
    "ratio": lambda run: f"{run.last.ratio:.3f}",
    "outcome": lambda run: run.outcome,
}
_WORDS = ("method", "settings", "outcome")


def table(runs: Sequence[FullBatchRun]) -> str:
    """Return the last measurements as text, one row per run.

    The residual ||H v - sharpness v|| bounds the distance to an eigenvalue of the Hessian H.
    """
    return align_columns(
        [tuple(_COLUMNS), *(tuple(f(run) for f in _COLUMNS.values()) for run in runs)]
    )


def align_columns(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as text with aligned columns, of which the first row is the head.

    Columns of words are aligned to the left, columns of numbers to the right.
    """
    head = rows[0]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, head, strict=True)
        aligned = (w.ljust(n) if name in _WORDS else w.rjust(n) for w, n, name in cells)
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as a Markdown table, of which the first row is the head."""
    head, *rest = rows
    lines = [head, ["---"] * len(head), *rest]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


@contextmanager
def progress(name: str) -> Iterator[Callable[[FullBatchRun], None]]:
    """Show the progress of a run in a bar if there is a terminal, and print its outcome at the end.

    Yields:
        A function that shows the last measurement of a run.
    """
    from tqdm import tqdm

    last: list[FullBatchRun] = []
    with tqdm(desc=name, unit=" steps", leave=False, disable=None) as bar:

        def show(run: FullBatchRun) -> None:
            last[:] = [run]
            bar.update(run.last.step - bar.n)
            bar.set_postfix_str(f"sharpness {run.last.sharpness:.2f}, edge {run.last.edge:.2f}")

        yield show
    for run in last:
        steps = f"{run.last.step} steps, {run.seconds:.1f} s"
        print(f"{name}: {run.outcome} ({steps})", flush=True)


def save_results(path: Path, command: str, values: Mapping[str, object]) -> None:
    """Write results.json: the command, its values, and the versions of the packages.

    Raises:
        UserError: the file cannot be written.
    """
    versions = {"eigenfilter": ef.__version__, "torch": torch.__version__}
    results = {"command": command, "versions": versions} | dict(values)
    replace_text(path, json.dumps(_json_safe(results), indent=1) + "\n")


def _json_safe(value: object) -> object:
    """Replace NaN and infinity, which JSON does not have, by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _json_safe(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_safe(each) for each in value]
    return value
