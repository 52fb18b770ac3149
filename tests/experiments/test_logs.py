"""The log of a run when the disk fails."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from eigenfilter.experiments.errors import UserError
from eigenfilter.experiments.logs import RunLog


def test_a_disk_that_fails_during_fsync_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = RunLog(tmp_path)
    log.write("train", 1, {"loss": 2.0})
    assert log.sync() == (tmp_path / "log.jsonl").stat().st_size

    def full(descriptor: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*log.jsonl: Disk quota exceeded"):
        log.sync()
    log.close()


def test_a_disk_that_is_full_for_events_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = RunLog(tmp_path, tensorboard=True)
    log.write("train", 1, {"loss": 2.0})
    close = log._writer.close
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    with pytest.raises(UserError, match=r"cannot write .*tensorboard: No space left"):
        log.write("train", 2, {"loss": 1.0})
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.close", full)
    with pytest.raises(UserError, match=r"cannot write .*tensorboard: No space left"):
        log.close()
    close()
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2
