"""With a damaged checkpoint a run resumes to the same bits, or fails with one line."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eigenfilter.experiments import archives, datasets, runs
from eigenfilter.experiments.cli import main
from eigenfilter.experiments.config import Config

MUTATIONS = 100  # of bytes, for each kind of run
EVERY = 12  # change of a structure is tried
STOPPED = 5  # steps, of 6
SMALL = {
    "model": "mlp-4",
    "samples": 64,
    "batch_size": 32,
    "epochs": 3,
    "log_every": 2,
    "threads": 1,
    "sharpness_every": 3,
    "sharpness_samples": 20,
}
KINDS = {
    "usam": SMALL | {"optimizer": "usam", "rho_schedule": "linear"},
    "adamw": SMALL | {"optimizer": "adamw", "method": "sam", "lr": 0.01},
    "controlled": SMALL | {"optimizer": "sgd", "sharpness_target": 10.0},
    "wrapped": SMALL | {"optimizer": "torch.optim.RMSprop", "method": "usam", "lr": 0.001},
}


@dataclass
class StoppedRun:
    """A stopped run, and its final state."""

    folder: Path
    work: Path  # copy in which it resumes
    capsys: pytest.CaptureFixture[str]
    config: dict[str, Any]
    final: Any = None
    log: list[Any] = field(default_factory=list)

    def outcome(self, checkpoint: Path | None) -> str:
        """Resume from a checkpoint, and return "same" or the error."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.folder, self.work)
        path = self.work / "checkpoint.pt"
        if checkpoint is not None:
            shutil.copy(checkpoint, path)
        before = path.read_bytes()
        log = (self.work / "log.jsonl").read_bytes()
        code = main(["train", "--resume", "--out", str(self.work)])
        error = self.capsys.readouterr().err
        if code == 2:
            assert error.startswith("eigenfilter train: error: "), error
            assert error.count("\n") == 1, error
            assert path.read_bytes() == before
            assert (self.work / "log.jsonl").read_bytes() == log
            return error
        assert code == 0, error
        contents = archives.read(path)["trainer"]
        if self.final is None:
            self.final, self.log = contents, self._lines()
        assert same(contents, self.final)
        assert self._lines() == self.log
        return "same"

    def _lines(self) -> list[Any]:
        lines = [json.loads(line) for line in (self.work / "log.jsonl").read_text().splitlines()]
        for line in lines:
            line.pop("images_per_second", None)
        return lines


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.fixture(params=KINDS)
def stopped_run(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> StoppedRun:
    digits = datasets.load("digits")
    monkeypatch.setattr(datasets, "load", lambda *args: digits)
    count = iter(range(1, 100))
    runs.run(Config(**KINDS[request.param]), tmp_path / "run", stop=lambda: next(count) >= STOPPED)
    contents = StoppedRun(tmp_path / "run", tmp_path / "work", capsys, KINDS[request.param])
    assert contents.outcome(None) == "same"
    return contents


def mutate(raw: bytes, draw: random.Random) -> bytes:
    """Flip a bit, change a byte, truncate, or remove, repeat, zero or randomize a part."""
    at, n = draw.randrange(len(raw)), draw.randrange(1, 40)
    new = [
        raw[:at] + bytes([raw[at] ^ 1 << draw.randrange(8)]) + raw[at + 1 :],
        raw[:at] + draw.randbytes(1) + raw[at + 1 :],
        raw[:at],
        raw[:at] + raw[at + n :],
        raw[: at + n] + raw[at:],
        raw[:at] + bytes(n) + raw[at + n :],
        raw[:at] + draw.randbytes(n) + raw[at + n :],
    ]
    return draw.choice(new)


@pytest.mark.slow
def test_mutated_bytes(stopped_run: StoppedRun, tmp_path: Path) -> None:
    """Half of the mutations are in the directory of the archive."""
    raw = (stopped_run.folder / "checkpoint.pt").read_bytes()
    draw = random.Random(0)
    path = tmp_path / "mutated.pt"
    outcomes = []
    for i in range(MUTATIONS):
        if i % 2:
            path.write_bytes(mutate(raw, draw))
        else:
            end = raw.index(b"PK\1\2")
            path.write_bytes(raw[:end] + mutate(raw[end:], draw))
        outcomes.append(stopped_run.outcome(path))
    assert sum(outcome != "same" for outcome in outcomes) > 0.5 * MUTATIONS


OTHERS: tuple[Any, ...] = (
    *(None, True, -1, 10**30, 0.5, float("nan"), "text\nof two lines", b"bytes"),
    *([], {}, (), [[]], {"a": {}}, torch.ones(3), torch.ones(2, dtype=torch.complex64)),
)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of all nested entries."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    for key, each in inside:
        yield (*at, key)
        if isinstance(each, (dict, list, tuple)):
            yield from places(each, (*at, key))


def change_entry(state: Any, at: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    """Return a copy with one entry changed; tuples on its path become lists."""
    state = holder = copy.deepcopy(state)
    for key in at[:-1]:
        if isinstance(holder[key], tuple):
            holder[key] = list(holder[key])
        holder = holder[key]
    change(holder, at[-1])
    return state


def reshape_variants(tensor: Tensor) -> list[Tensor]:
    return [
        *(tensor[None], tensor.flatten()[:-1].clone(), torch.cat([tensor.flatten()] * 2)),
        *(tensor.double(), tensor.half(), tensor.int(), torch.empty(0), torch.ones(())),
        tensor.flatten()[:1].expand(2**20),
    ]


def changes(state: Any) -> Iterator[tuple[str, Any]]:
    """Yield copies with each entry deleted, renamed or of another type, shape or dtype."""
    for at in places(state):
        value: Any = state
        for key in at:
            value = value[key]
        if at[:1] == ("versions",) and len(at) > 1:
            continue  # told of, and never used
        yield f"{at} deleted", change_entry(state, at, lambda holder, key: holder.pop(key))
        if isinstance(at[-1], str):
            yield (
                f"{at} renamed",
                change_entry(state, at, lambda h, key: h.__setitem__(key + "x", h.pop(key))),
            )
        others = list(OTHERS) + (reshape_variants(value) if isinstance(value, Tensor) else [])
        if isinstance(value, list):
            others += [value * 2 or [0], value[:-1], tuple(value)]
        if isinstance(value, (int, float)):
            others += [str(value), [value], torch.tensor(value)]
        for other in others:
            if type(other) is type(value) and isinstance(other, (int, float, str)):
                continue  # a value, no structure
            yield (
                f"{at} is {str(other)[:40]!r}",
                change_entry(state, at, lambda h, key, other=other: h.__setitem__(key, other)),
            )


@pytest.mark.slow
def test_changed_structures(stopped_run: StoppedRun, tmp_path: Path) -> None:
    """The test tries every twelfth change, and every deletion."""
    state = archives.read(stopped_run.folder / "checkpoint.pt")
    path = tmp_path / "changed.pt"
    for i, (what, other) in enumerate(changes(state)):
        if i % EVERY and "deleted" not in what:
            continue
        torch.save(other, path)
        try:
            outcome = stopped_run.outcome(path)
        except BaseException as error:
            raise AssertionError(what) from error
        if "deleted" in what:
            assert outcome != "same", what


@pytest.mark.parametrize("value", [None, [], "x", 7, torch.ones(2), OrderedDict(a=1)])
def test_other_contents(value: Any, stopped_run: StoppedRun, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "other.pt")
    assert "is not a checkpoint" in stopped_run.outcome(tmp_path / "other.pt")


def alias(state: Any) -> None:
    """Let all tensors of the optimizer start at the same address."""
    memory = torch.full((10_000,), float(STOPPED))  # as the numbers of steps
    for values in state["trainer"]["optimizer"]["state"].values():
        for key, value in values.items():
            values[key] = memory[: value.numel()].view(value.shape)


def repeat(state: Any) -> None:
    """Let all rows of each tensor of the optimizer share memory."""
    for values in state["trainer"]["optimizer"]["state"].values():
        for key, value in values.items():
            values[key] = value[:1].expand(value.shape) if value.dim() else value


def scatter(state: Any) -> None:
    random = state["trainer"]["random"]
    random["cpu"] = torch.stack([random["cpu"]] * 2, 1)[:, 0]


def transpose(state: Any) -> None:
    for values in state["trainer"]["optimizer"]["state"].values():
        for key, value in values.items():
            values[key] = value.t().contiguous().t() if value.dim() == 2 else value


LAYOUTS: dict[str, tuple[Callable[[Any], None], str]] = {
    "aliased": (alias, "share memory"),
    "repeated": (repeat, "share memory"),
    "scattered": (scatter, "a state of generators is not contiguous"),
    "transposed": (transpose, "same"),
    "a huge log": (lambda state: state.update(log=2**62), "is not the log of the checkpoint"),
    "a log beyond numbers": (lambda state: state.update(log=2**100), "is not the log"),
    "a bad option": (
        lambda state: state["config"].update(lr=-1.0),
        "has a configuration that is damaged, or of another version (lr must be",
    ),
    "an unknown option": (
        lambda state: state["config"].update(beta=1.0),
        "checkpoint.pt has a configuration that is damaged",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_and_sizes(name: str, stopped_run: StoppedRun, tmp_path: Path) -> None:
    """The values have other memory layouts, or numbers claim huge sizes."""
    change, says = LAYOUTS[name]
    state = archives.read(stopped_run.folder / "checkpoint.pt")
    change(state)
    torch.save(state, tmp_path / "other.pt")
    assert says in stopped_run.outcome(tmp_path / "other.pt")


def test_results_of_another_run(stopped_run: StoppedRun) -> None:
    """Results of another run are not mistaken for those of the checkpoint."""
    whole = stopped_run.folder.parent / "whole"
    runs.run(Config(**stopped_run.config), whole)
    path = stopped_run.folder / "results.json"
    before = path.read_text()
    for change in ({}, {"config": Config(model="mlp-5").as_dict()}):
        contents = json.loads((whole / "results.json").read_text()) | change
        path.write_text(json.dumps(contents))
        assert f"{stopped_run.work / 'results.json'} belongs to another run" in stopped_run.outcome(
            None
        )
    path.write_text(before)
    assert stopped_run.outcome(None) == "same"
