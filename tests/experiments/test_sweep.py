"""eigenfilter sweep: the runs of a file, their names, the table, and the ways it can end."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from eigenfilter.experiments.cli import main
from eigenfilter.experiments.config import Config
from eigenfilter.experiments.errors import UserError
from eigenfilter.experiments.runs import Record
from eigenfilter.experiments.sweep import execution, local, search_space, table

YAML = """
base: {model: mlp-12, samples: 96, batch_size: 32, epochs: 2}
grid:
  - {optimizer: sgd, lr: [0.1, 5e-2], momentum: 0.5}
  - {optimizer: [usam, sam], rho: [0.01, 0.1]}
seeds: [3, 5]
"""
RANDOM = """
grid: {optimizer: [sgd, usam]}
random:
  lr: {log_uniform: [1e-3, 1]}
  momentum: {uniform: [0.1, 0.9]}
  batch_size: {integers: [16, 64]}
  activation: {choice: [relu, tanh]}
samples: 5
random_seed: 7
"""


def read_configs(text: str, folder: Path, **flags: Any) -> dict[Config, str]:
    (folder / "sweep.yaml").write_text(text)
    return search_space.read(folder / "sweep.yaml", flags)


def test_a_grid(tmp_path: Path) -> None:
    configs = read_configs(YAML, tmp_path)
    base = {"model": "mlp-12", "samples": 96, "batch_size": 32, "epochs": 2, "threads": 1}
    options = [
        {"optimizer": "sgd", "lr": 0.1, "momentum": 0.5},
        {"optimizer": "sgd", "lr": 0.05, "momentum": 0.5},
        *({"optimizer": o, "rho": r} for o in ("usam", "sam") for r in (0.01, 0.1)),
    ]
    assert list(configs) == [Config(**base, **o, seed=s) for o in options for s in (3, 5)]
    assert list(configs.values())[::4] == [
        "optimizer=sgd,lr=0.1,momentum=0.5,seed=3",
        "optimizer=usam,rho=0.01,seed=3",
        "optimizer=sam,rho=0.01,seed=3",
    ]


def test_flags_are_over_the_file(tmp_path: Path) -> None:
    configs = read_configs(YAML, tmp_path, epochs=7, threads=2)
    assert {(config.epochs, config.threads) for config in configs} == {(7, 2)}
    assert [c.seed for c in read_configs("base: {lr: 0.3}", tmp_path, seed=4)] == [4]
    assert [c.seed for c in read_configs("seeds: 3", tmp_path)] == [0, 1, 2]
    with pytest.raises(UserError, match="rho is swept over"):
        read_configs(YAML, tmp_path, rho=0.3)


def test_what_two_grids_share_is_run_once(tmp_path: Path) -> None:
    configs = read_configs("grid: [{lr: [0.1, 0.2]}, {lr: [0.2, 0.3], rho: 0.05}]", tmp_path)
    assert list(configs.values()) == ["lr=0.1,seed=0", "lr=0.2,seed=0", "lr=0.3,rho=0.05,seed=0"]


def test_random_samples_are_those_of_their_seed(tmp_path: Path) -> None:
    configs = read_configs(RANDOM, tmp_path)
    assert len(configs) == 10
    assert configs == read_configs(RANDOM, tmp_path)
    assert not configs.keys() & read_configs(RANDOM.replace("seed: 7", "seed: 8"), tmp_path).keys()
    for config in configs:
        assert 1e-3 <= config.lr <= 1
        assert 0.1 <= config.momentum <= 0.9
        assert 16 <= config.batch_size <= 64
        assert float(f"{config.lr:.4g}") == config.lr
    sgd, usam = list(configs)[:5], list(configs)[5:]  # the same samples at each point of the grid
    assert [c.lr for c in sgd] == [c.lr for c in usam]
    assert len({c.lr for c in sgd}) == 5
    assert {c.activation for c in configs} == {"relu", "tanh"}


def test_more_samples_and_options_leave_those_there_were(tmp_path: Path) -> None:
    before = read_configs(RANDOM, tmp_path)
    more = read_configs(RANDOM.replace("samples: 5", "samples: 8"), tmp_path)
    assert before.keys() < more.keys()
    other = RANDOM.replace("random:", "random:\n  weight_decay: {uniform: [0, 0.1]}")
    assert [c.lr for c in read_configs(other, tmp_path)] == [c.lr for c in before]


def test_distributions_are_what_they_say(tmp_path: Path) -> None:
    text = "random: {lr: {log_uniform: [1e-4, 1]}, rho: {uniform: [0, 2]}}\nsamples: 2000"
    configs = list(read_configs(text, tmp_path))
    for part, low in ((0.25, 1e-3), (0.5, 1e-2), (0.75, 1e-1)):  # within four deviations
        assert sum(c.lr < low for c in configs) / 2000 == pytest.approx(part, abs=0.045)
        assert sum(c.rho < 2 * part for c in configs) / 2000 == pytest.approx(part, abs=0.045)


@pytest.mark.parametrize("kind", ["uniform", "log_uniform"])
@pytest.mark.parametrize(("low", "high"), [(0.123456, 0.123459), (0.99996, 0.99999)])
def test_rounding_stays_in_the_range(kind: str, low: float, high: float, tmp_path: Path) -> None:
    text = f"random: {{lr: {{{kind}: [{low}, {high}]}}}}\nsamples: 9"
    assert all(low <= config.lr <= high for config in read_configs(text, tmp_path))


def test_names_are_short_and_those_of_one_configuration(tmp_path: Path) -> None:
    options = {
        name: {"choice": [0.123, 0.456]}
        for name in ("lr", "momentum", "weight_decay", "rho", "beta1", "beta2", "clip", "dropout")
    } | {"label_smoothing": {"choice": [0.1234, 0.4567]}, "rho_end": {"choice": [0.333, 0.555]}}
    configs = read_configs(json.dumps({"random": options, "samples": 12}), tmp_path)
    assert len(set(configs.values())) == len(configs)
    assert max(map(len, configs.values())) == search_space.LONGEST


def write_complete_run(out: Path, name: str, config: Config) -> None:
    """Write the folder of a complete run."""
    folder = out / "runs" / name
    folder.mkdir(parents=True)
    record = {"outcome": "complete", "config": config.as_dict()}
    (folder / "results.json").write_text(json.dumps(record))


def test_folders_keep_their_runs_whatever_the_file_becomes(tmp_path: Path) -> None:
    before = search_space.assign_names(
        read_configs("base: {rho: 0.1}\ngrid: {lr: [0.1, 0.2]}", tmp_path), tmp_path
    )
    for name, config in before.items():
        write_complete_run(tmp_path, name, config)
    more = "grid: {lr: [0.1, 0.2, 0.3], rho: [0.1, 0.2]}"
    after = search_space.assign_names(read_configs(more, tmp_path), tmp_path)
    assert len(after) == 6
    assert before.items() < after.items()
    longer = search_space.assign_names(
        read_configs("grid: {lr: [0.1, 0.2]}\nbase: {epochs: 3}", tmp_path), tmp_path
    )
    assert not before.keys() & longer.keys()
    assert all(name.startswith("lr=0.") and "-" in name for name in longer)


BAD = {
    "grids: []": "unknown key 'grids': did you mean grid?",
    "- 1": "must contain lines such as",
    "base: [1]": "base must contain lines such as 'lr: 0.1', not a list",
    "grid: 3": "grid must contain lines such as",
    "grid: {lr: []}": "grid has no value of lr",
    "grid: {learning: [1]}": "unknown option 'learning' (at learning 1)",
    "grid: {lr: [0.1, -1]}": "lr must be a number of at least 0, not -1 (at lr -1)",
    "grid: {seed: [1]}": "seed cannot be in grid or random",
    "seeds: 0": "seeds must be a list or a number of seeds, not 0",
    "seeds: [a]": "seed must be a whole number",
    "{base: {seed: 1}, seeds: 2}": "the seed is given twice",
    "samples: 3": "samples needs random, which is missing",
    "random: {lr: {uniform: [0, 1]}}": "samples must be the number of random samples",
    "{random: {lr: [0, 1]}, samples: 2}": "lr of random must be like {uniform: [0, 1]}",
    "{random: {lr: {uniform: [1, 0]}}, samples: 2}": "lr of random must be {uniform: [low, high]}",
    "{random: {lr: {log_uniform: [0, 1]}}, samples: 2}": "lr of random must be",
    "{random: {lr: {normal: [0, 1]}}, samples: 2}": "lr of random must be",
    "{random: {lr: {uniform: [0, .inf]}}, samples: 2}": "lr of random must be",
    "{random: {lr: {uniform: [-1e308, 1e308]}}, samples: 2}": "lr of random must be",
    f"{{random: {{lr: {{log_uniform: [1, 1{'0' * 400}]}}}}, samples: 2}}": "lr of random must be",
    "{random: {lr: {uniform: [0, 1]}}, samples: 2, random_seed: x}": "random_seed must be",
    "{grid: [{rho: 0}, {lr: [1, 2]}], random: {lr: {choice: [1]}}, samples: 2}": (
        "lr is in grid and in random"
    ),
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_file_is_one_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.yaml").write_text(text)
    assert main(["sweep", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("eigenfilter sweep: error: ")
    assert BAD[text] in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def record(accuracy: float, **more: Any) -> Record:
    return {
        "outcome": "complete",
        "test": {"accuracy": accuracy, "loss": 2 * accuracy},
        "gradients": 30,
        "seconds": 1.0,
        **more,
    }


def test_the_table_is_over_seeds_and_complete_rows_are_first() -> None:
    configs = {
        f"{rho} {seed}": Config(rho=rho, seed=seed)
        for rho in (0.1, 0.2, 0.3, 0.4, 0.5)
        for seed in (0, 1, 2)
    }
    infinite = record(0.5, test={"accuracy": 0.5, "loss": None})
    failed: Record = {"outcome": "failed", "error": "nan", "diverged": True}
    records = dict(
        zip(
            configs,
            [
                *(record(0.5), record(0.7), failed),
                *(record(0.8, sharpness={"sharpness": 20.0}), failed, {"outcome": "stopped"}),
                *(failed, failed, failed),
                *(record(0.3), record(0.3), record(0.3)),
                *(record(0.5), infinite, record(0.5)),
            ],
            strict=True,
        )
    )
    rows = table.rows(configs, records)
    assert [row["options"] for row in rows] == [{"rho": rho} for rho in (0.5, 0.4, 0.1, 0.2, 0.3)]
    measure = rows[2]["measures"]["test accuracy"]
    assert measure["mean"] == pytest.approx(0.6)
    assert measure["deviation"] == pytest.approx(0.02**0.5)
    counts, same = ["runs", "failed"], ["30 ± 0", "1.0 ± 0.0"]
    assert table.cells(rows) == [
        ["rho", "test accuracy, %", "test loss", "sharpness", "gradients", "seconds", *counts],
        ["0.5", "50.00 ± 0.00", "1.0000 ± 0.0000 (n = 2)", "-", *same, "3/3", "0"],
        ["0.4", "30.00 ± 0.00", "0.6000 ± 0.0000", "-", *same, "3/3", "0"],
        ["0.1", "60.00 ± 14.14", "1.2000 ± 0.2828", "-", *same, "2/3", "1"],
        ["0.2", "80.00", "1.6000", "20", "30", "1.0", "1/3", "1"],
        ["0.3", "-", "-", "-", "-", "-", "0/3", "3"],
    ]
    rows_and_note = ["| a | b |", "| --- | --- |", "| 1 | 2 |", "", table.NOTE]
    assert table.markdown([["a", "b"], ["1", "2"]]).splitlines() == rows_and_note


def test_the_table_has_no_rho_where_there_is_no_ascent() -> None:
    configs = {
        "a": Config(optimizer="sgd"),
        "b": Config(rho=0.1),
        "c": Config(optimizer="adamw", method="sam", rho=0.2),
        "d": Config(optimizer="torch.optim.SGD", rho=0.2),
    }
    rows = table.rows(configs, {name: record(0.5) for name in configs})
    assert [row["options"]["rho"] for row in rows] == [None, 0.1, 0.2, None]
    assert [line[2] for line in table.cells(rows)] == ["rho", "-", "0.1", "0.2", "-"]


FAILED = {"outcome": "failed", "error": "killed", "diverged": False}


@pytest.mark.parametrize("signalled", [False, True])
@pytest.mark.parametrize(
    ("second", "third", "code"),
    [
        (record(0.5), record(0.5), 0),
        (record(0.5), FAILED | {"diverged": True}, 0),
        (record(0.5), FAILED, 1),
        ({"outcome": "stopped"}, record(0.5), 0),
        ({"outcome": "stopped"}, FAILED | {"diverged": True}, 0),
        ({"outcome": "stopped"}, FAILED, 1),
    ],
)
def test_the_exit_code_says_what_failed(
    second: Record,
    third: Record,
    code: int,
    signalled: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def execute(runs: dict[str, Config], out: Path, *, stop: Any, **options: Any) -> Any:
        stop.signalled = signalled
        out.mkdir(exist_ok=True)
        return dict(zip(runs, (record(0.5), second, third), strict=True))

    monkeypatch.setattr(execution, "execute", execute)
    (tmp_path / "s.yaml").write_text("seeds: 3")
    argv = ["sweep", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out")]
    assert main(argv) == (130 if signalled and second["outcome"] == "stopped" else code)


SMALL = """
base: {model: mlp-12, samples: 96, batch_size: 32, epochs: 3, lr_schedule: constant}
grid: [{optimizer: usam, rho: [0.01, 0.1]}, {optimizer: sgd, lr: 1e18}]
seeds: 2
"""


@pytest.mark.slow
def test_a_sweep_stops_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.yaml").write_text(SMALL)
    argv = ["sweep", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out"), "--processes", "1"]
    record_end = local.RunQueue.record_end
    monkeypatch.setattr(
        local.RunQueue,
        "record_end",
        lambda *a: [record_end(*a), signal.raise_signal(signal.SIGTERM)],
    )
    assert main(argv) == 130
    assert "runs unfinished; run the command again" in capsys.readouterr().out
    first = json.loads((tmp_path / "out" / "results.json").read_text())
    outcomes = [r["outcome"] for r in first["runs"].values()]
    assert outcomes.count("complete") == 1
    assert outcomes.count("stopped") == 5
    monkeypatch.setattr(local.RunQueue, "record_end", record_end)
    assert main(argv) == 0
    out = capsys.readouterr()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    names = [f"optimizer=usam,rho={rho},seed={seed}" for rho in (0.01, 0.1) for seed in (0, 1)]
    names += [f"optimizer=sgd,lr=1e+18,seed={seed}" for seed in (0, 1)]
    assert list(results["runs"]) == names
    assert [r["outcome"] for r in results["runs"].values()] == ["complete"] * 4 + ["failed"] * 2
    assert results["runs"][names[0]]["config"]["threads"] == 1
    assert {row["complete"] for row in results["table"]} == {0, 2}
    assert f"{names[4]} failed: the loss of step " in out.out
    assert "optimizer" in (tmp_path / "out" / "table.md").read_text().splitlines()[0]
    logs = [path.stat() for path in (tmp_path / "out" / "runs").glob("*/log.jsonl")]
    assert main(argv) == 0  # nothing is run again
    assert logs == [path.stat() for path in (tmp_path / "out" / "runs").glob("*/log.jsonl")]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
