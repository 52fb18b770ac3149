"""Damaged results, plans, spectra and logs are read, or rejected with one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from eigenfilter.experiments import runs
from eigenfilter.experiments.cli import main
from eigenfilter.experiments.config import Config
from eigenfilter.experiments.errors import UserError
from eigenfilter.experiments.reproduce import EXPERIMENTS, spectra, spectra_figure
from eigenfilter.experiments.reproduce.plan import ExperimentScale, Plan, SpectrumSettings
from eigenfilter.experiments.reproduce.summary import RunResult
from eigenfilter.experiments.sweep import folders, table
from experiments.test_damage import SMALL, changes

CONFIG = Config(**SMALL)
GARBLED = (
    "",
    "{",
    "[]",
    "null",
    "7",
    '"text"',
    "{}",
    "[" * 100_000,
    '{"a": 1e999}',
    "\0",
    "\udcff",
)
SETTINGS = SpectrumSettings(20, 2, 1, 3)

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a complete run with its spectrum."""
    folder = tmp_path_factory.mktemp("complete") / "runs" / "a"
    runs.run(CONFIG, folder)
    spectra.measure_spectrum(folder, SETTINGS, data_dir=None, device=torch.device("cpu"))
    return folder


def damage(path: Path) -> list[bytes]:
    """Return damaged versions of a JSON file: garbage, a truncated file, and other structures."""
    contents = path.read_bytes()
    texts = [text.encode(errors="surrogateescape") for text in GARBLED] + [
        contents[: len(contents) // 2]
    ]
    for i, (_, other) in enumerate(changes(json.loads(contents))):
        if i % 3 == 0:
            texts.append(json.dumps(other, default=str).encode())
    return texts


def assert_damage_refused(path: Path, use: Callable[[], Any]) -> None:
    """Fail unless damaged versions of a file are rejected, each with one line that names it."""
    before, messages = path.read_bytes(), list[str]()
    try:
        for text in damage(path):
            path.write_bytes(text)
            try:
                use()
            except UserError as error:
                messages.append(str(error))
    finally:
        path.write_bytes(before)
    use()
    assert len(messages) > len(GARBLED)
    for text in messages:
        assert str(path) in text
        assert "remove " in text
        assert "\n" not in text


def test_results_of_a_run(out: Path) -> None:
    def use() -> None:
        there = folders.load_finished(CONFIG, out)
        if there is not None:
            table.cells(table.rows({"a": CONFIG}, {"a": there}))
            if there["outcome"] == "complete":
                RunResult.of("a", there, None)

    def use_held() -> None:
        try:
            use()
        except UserError as error:
            if "contains a run with" not in str(error):
                raise
            raise UserError(f"{out / 'results.json'}: remove it") from error

    assert_damage_refused(out / "results.json", use_held)


@pytest.mark.parametrize("text", GARBLED)
def test_results_that_are_garbled(text: str, out: Path, capsys: Capture) -> None:
    path = out / "results.json"
    before = path.read_bytes()
    path.write_bytes(text.encode(errors="surrogateescape"))
    try:
        assert main(["train", "--resume", "--out", str(out)]) == 2
    finally:
        path.write_bytes(before)
    error = capsys.readouterr().err
    assert f"{path} is damaged" in error
    assert error.count("\n") == 1


def test_a_spectrum(out: Path) -> None:
    record = folders.load_finished(CONFIG, out)
    assert record is not None

    def use() -> None:
        contents = spectra.load_spectrum(out, SETTINGS)
        RunResult.of("a", record, contents).as_dict()
        if contents is not None and "error" not in contents:
            spectra_figure._density(contents)(torch.linspace(0.0, 1.0, 5))

    assert_damage_refused(out / "spectrum.json", use)


def test_a_plan(tmp_path: Path) -> None:
    scale = ExperimentScale(2, 3, "mlp-8", 100, SETTINGS)
    rates = {"gradient": 0.1, "product": 0.2}
    plan = Plan("mnist", 0, 5.0, scale, scale, 7.0, rates)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.as_dict()))

    def use() -> None:
        try:
            contents = Plan.of(json.loads(path.read_text()))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: remove it ({' '.join(str(error).split())})") from error
        assert contents.statement
        assert len(EXPERIMENTS[contents.experiment].runs(contents.scale, contents.seeds[0])) > 1
        assert asdict(contents)["rates"] in (rates, None)

    assert_damage_refused(path, use)


@pytest.mark.parametrize("name", ["plan.json", "spent.json"])
@pytest.mark.parametrize("text", [*GARBLED, '{"seconds": "x"}', '{"seconds": NaN}'])
def test_a_reproduction_names_the_file(
    name: str, text: str, tiny: Any, tmp_path: Path, capsys: Capture
) -> None:
    scale = EXPERIMENTS["mnist"].full
    plan = Plan("mnist", 0, None, scale, scale)
    (tmp_path / "plan.json").write_text(json.dumps(plan.as_dict()))
    (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    assert main(["reproduce", "mnist", "--device", "cpu", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / name} is damaged" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: b"",
        lambda raw: raw[:-9],
        lambda raw: raw[9:],
        lambda raw: raw.replace(b"\n", b" "),
    ],
)
def test_the_log_is_that_of_the_checkpoint(
    change: Callable[[bytes], bytes], tmp_path: Path, capsys: Capture
) -> None:
    count = iter(range(1, 99))
    runs.run(CONFIG, tmp_path, stop=lambda: next(count) >= 4)
    log = tmp_path / "log.jsonl"
    log.write_bytes(change(log.read_bytes()))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["train", "--resume", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{log} is not the log of the checkpoint beside it; restore it" in error
    assert error.count("\n") == 1
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


YAML = {
    "a thousand brackets": "lr: " + "[" * 5000,
    "another type": "lr: !!python/object/apply:os.system ['true']",
    "a date that is none": "lr: 2001-99-99",
    "a date": "lr: 2001-01-01",
    "empty numbers": "lr: !!int ''",
    "a truth that is none": "lr: !!bool x",
    "a long number": "lr: 1" + "0" * 400,
    "a very long number": "lr: 1" + "0" * 5000,
    "a mapping": "lr: {a: 1}",
    "keys that are none": "{[1, 2]: 3}",
    "no text": "\udcff\udcfe",
    "a mapping that holds itself": "lr: &x [*x]",
    "aliases of aliases": "a: &a [1, 1, 1, 1, 1, 1, 1, 1]\n"
    + "".join(
        f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
        for before, name in zip("abcdefghij", "bcdefghijk", strict=True)
    )
    + "lr: *k\n",
}


@pytest.mark.parametrize("command", ["train", "sweep"])
@pytest.mark.parametrize("what", YAML)
def test_a_garbled_configuration(what: str, command: str, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "c.yaml"
    text = YAML[what] if command == "train" else "grid: {" + YAML[what].replace("\n", "\n ") + "}"
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert main([command, str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"eigenfilter {command}: error: ")
    assert error.count("\n") == 1
    assert len(error) < 1000
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


def test_a_garbled_configuration_of_a_run(tmp_path: Path, capsys: Capture) -> None:
    """A sweep identifies its runs by their configurations."""
    (tmp_path / "c.yaml").write_text("base: {model: mlp-4, samples: 64, epochs: 1}")
    folder = tmp_path / "out" / "runs" / "seed=0"
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").touch()
    for text in ("lr: 2001-01-01", "lr: [1", "1: 2", "- 1", "lr: {a: 1}"):
        (folder / "config.yaml").write_text(text)
        assert main(["sweep", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert f"remove {folder}" in error
        assert error.count("\n") == 1
