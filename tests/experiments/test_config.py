"""Configurations: each option is declared once, for files, flags and Python."""

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
    config = Config.of(configs.read(path) | configs.from_flags(args))
    changed = {"lr": 1e-3, "momentum": 0.7, "model": "wrn-16-2", "epochs": 3, "crop": 4}
    assert config == Config(**changed)
    assert config.as_dict() == Config().as_dict() | changed


def test_round_trip(tmp_path: Path) -> None:
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
        ({"label_smoothing": 0.1, "loss": "square"}, "label_smoothing applies only to loss"),
        ({"method": "sam", "optimizer": "sgd"}, "method applies only to adamw"),
        ({"ascent_sync": False, "optimizer": "sgd"}, "ascent_sync applies only to ascents"),
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
    """Return a few lines of YAML whose aliases expand to 9**8 values."""
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
        ("- lr", "must contain lines such as 'lr: 0.1', not a list"),
        ("\x00", "is not YAML"),
        ("lr: 2001-01-01", "c.yaml contains a date; options are text, numbers or booleans"),
        ("? 2001-01-01\n: 1", "contains a date"),
        ("lr: !!binary aGk=", "contains a bytes"),
        ("lr: !!set {x, y}", "contains a set"),
        ("lr: !!pairs [a: 1]", "contains a tuple"),
        ("lr: !!omap [a: 1]", "contains a tuple"),
        (bomb("!!pairs"), "has aliases that refer to themselves, or that expand to more than"),
        (bomb("!!omap"), "has aliases that refer to themselves, or that expand to more than"),
        (bomb(""), "has aliases that refer to themselves, or that expand to more than"),
        (merges(9, 10), "has aliases that refer to themselves, or that expand to more than"),
        (merges(30, 2), "has aliases that refer to themselves, or that expand to more than"),
        (
            "a: &a\n  <<: *a\n  b: 1",
            "has aliases that refer to themselves, or that expand to more than",
        ),
        ("lr: &a [*a]", "has aliases that refer to themselves, or that expand to more than"),
    ],
)
def test_bad_files(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        configs.read(tmp_path / "c.yaml")
    assert "\n" not in str(error.value)


def test_merge_keys_that_are_few_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("base: &b {lr: 0.1}\nrun:\n  <<: *b\n  epochs: 2\n")
    content = configs.read(tmp_path / "c.yaml")
    assert content == {"base": {"lr": 0.1}, "run": {"lr": 0.1, "epochs": 2}}


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*No such file"):
        configs.read(tmp_path / "c.yaml")
    (tmp_path / "empty.yaml").touch()
    assert configs.read(tmp_path / "empty.yaml") == {}
