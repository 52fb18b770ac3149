"""Configurations: one declaration of every option, for files, flags and Python."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from eigenfilter.experiments import config as configs
from eigenfilter.experiments.config import Config


def test_a_file_and_flags_over_it(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("lr: 1e-3\nmomentum: 0.5\nflip: true\nmodel: wrn-16-2\nepochs: 3\n")
    parser = argparse.ArgumentParser()
    parser.add_argument("--out")
    configs.add_flags(parser)
    args = parser.parse_args(["--momentum", "0.7", "--no-flip", "--crop", "4", "--out", "there"])
    config = Config.of(configs.read(path) | configs.given(args))
    changed = {"lr": 1e-3, "momentum": 0.7, "model": "wrn-16-2", "epochs": 3, "crop": 4}
    assert config == Config(**changed)
    assert config.as_dict() == Config().as_dict() | changed


def test_what_is_written_is_read(tmp_path: Path) -> None:
    config = Config(lr=1e-7, flip=True, model="vit-64", rho_schedule="late", samples=12)
    configs.write(config, tmp_path / "c.yaml")
    assert Config.of(configs.read(tmp_path / "c.yaml")) == config


def test_every_option_is_plain_data_and_has_help() -> None:
    for field in dataclasses.fields(Config):
        assert isinstance(getattr(Config(), field.name), bool | int | float | str)
        assert field.metadata["help"]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"momentun": 0.9}, "unknown option 'momentun': did you mean momentum?"),
        ({"xyz": 0.9}, "unknown option 'xyz'"),
        ({3: 0.9}, "unknown option 3"),
        ({"lr": "fast"}, "lr must be a number of at least 0, not 'fast'"),
        ({"lr": -1}, "lr must be"),
        ({"lr": float("nan")}, "lr must be"),
        ({"lr": float("inf")}, "lr must be"),
        ({"lr": True}, "lr must be"),
        ({"lr": None}, "lr must be"),
        ({"momentum": 1.0}, "momentum must be a number of at least 0 and below 1, not 1.0"),
        ({"rho_start": 1.5}, "rho_start must be a number of at least 0 and at most 1"),
        ({"epochs": 0}, "epochs must be a whole number of at least 1, not 0"),
        ({"epochs": 2.5}, "epochs must be"),
        ({"epochs": "2.5"}, "epochs must be"),
        ({"epochs": float("inf")}, "epochs must be"),
        ({"epochs": True}, "epochs must be"),
        ({"threads": 2**40}, "threads must be a whole number of at least 0 and at most 1024"),
        ({"lr": 10**400}, "lr must be"),
        ({"flip": "yes"}, "flip must be true or false, not 'yes'"),
        ({"dataset": "cifar"}, "dataset must be one of digits, mnist"),
        ({"dataset": "cifar1"}, "did you mean cifar10?"),
        ({"optimizer": "usma"}, "optimizer must be one of .* did you mean usam?"),
        ({"model": "resnet"}, "model must be mlp"),
        ({"label_smoothing": 0.1, "loss": "square"}, "label_smoothing goes with loss"),
        ({"method": "sam", "optimizer": "sgd"}, "method is for adamw"),
        ({"lr": [[1]]}, "lr must be a number of at least 0, not a list"),
        ({"model": "x" * 10**6}, "not '" + "x" * 76 + r"\.\.\.$"),
        ({"dataset": "x" * 10**6}, "not '" + "x" * 76 + r"\.\.\.$"),
        ({"epochs": 10**5000}, "not a number of 16610 bits"),
        ({"a\nb": 1}, r"unknown option 'a\\nb'"),
        ({(1, 2): 1}, "unknown option a tuple"),
    ],
)
def test_bad_values(values: dict[Any, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says.replace("?", r"\?")):
        Config.of(values)


def bomb(tag: str) -> str:
    """A few lines that say a value 9**8 times."""
    lines = ["  - k: &a0 [1]"]
    lines += [f"  - k: &a{i} {tag} [{', '.join([f'k: *a{i - 1}'] * 9)}]" for i in range(1, 9)]
    return "\n".join(["lr:", *lines, ""])


def merges(depth: int, width: int) -> str:
    """A few lines that merge a mapping width**depth times; all have the same single key."""
    lines = ["a0: &a0 {lr: 1}"]
    for i in range(1, depth + 1):
        lines.append(f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * width)}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lr: [1", "is not YAML"),
        ("- lr", "must hold lines such as 'lr: 0.1', not a list"),
        ("\x00", "is not YAML"),
        ("lr: 2001-01-01", "c.yaml has a date, and options are text, numbers or truth values"),
        ("? 2001-01-01\n: 1", "has a date"),
        ("lr: !!binary aGk=", "has a bytes"),
        ("lr: !!set {x, y}", "has a set"),
        ("lr: !!pairs [a: 1]", "has a tuple"),
        ("lr: !!omap [a: 1]", "has a tuple"),
        (bomb("!!pairs"), "refers to itself, or to the same over and over"),
        (bomb("!!omap"), "refers to itself, or to the same over and over"),
        (bomb(""), "refers to itself, or to the same over and over"),
        (merges(9, 10), "refers to itself, or to the same over and over"),
        (merges(30, 2), "refers to itself, or to the same over and over"),
        ("a: &a\n  <<: *a\n  b: 1", "refers to itself, or to the same over and over"),
        ("lr: &a [*a]", "refers to itself, or to the same over and over"),
    ],
)
def test_bad_files(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        configs.read(tmp_path / "c.yaml")
    assert "\n" not in str(error.value)


def test_merge_keys_that_are_few_are_taken(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("base: &b {lr: 0.1}\nrun:\n  <<: *b\n  epochs: 2\n")
    found = configs.read(tmp_path / "c.yaml")
    assert found == {"base": {"lr": 0.1}, "run": {"lr": 0.1, "epochs": 2}}


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*No such file"):
        configs.read(tmp_path / "c.yaml")
    (tmp_path / "empty.yaml").touch()
    assert configs.read(tmp_path / "empty.yaml") == {}
