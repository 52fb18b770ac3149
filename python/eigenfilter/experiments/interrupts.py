"""Stopping work early and cleanly, at a signal or after a time limit."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from eigenfilter.experiments.errors import UserError

STOPPED = 130  # exit code of a command that Ctrl-C ended


class StopCondition:
    """A callable that returns whether to stop: after a signal, or after the time limit.

    Args:
        minutes: the time limit; None means none.

    Attributes:
        signalled: whether a signal was received.
    """

    def __init__(self, minutes: float | None) -> None:
        self._deadline = None if minutes is None else time.perf_counter() + 60 * minutes
        self.signalled = False

    def __call__(self) -> bool:
        return self.signalled or (
            self._deadline is not None and time.perf_counter() >= self._deadline
        )

    def exit_code(self, *, unfinished: bool, failed: bool) -> int:
        """Return the exit code of a command that runs many trainings.

        Args:
            unfinished: whether there are unfinished runs.
            failed: whether a run failed for another reason than divergence.

        Returns:
            STOPPED if a signal left runs unfinished, else 1 if a run failed, else 0.
        """
        if unfinished and self.signalled:
            return STOPPED
        return 1 if failed else 0


@contextmanager
def graceful_stop(minutes: float | None) -> Iterator[StopCondition]:
    """Stop gracefully at the first Ctrl-C or SIGTERM, and immediately at the second.

    Args:
        minutes: time limit after which to stop gracefully too; None means none.

    Yields:
        The condition to check between steps.

    Raises:
        UserError: a second signal was received.
    """
    stop = StopCondition(minutes)

    def handle(number: int, frame: object) -> None:
        if stop.signalled:
            raise KeyboardInterrupt
        stop.signalled = True

    handlers: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, handle)
        yield stop
    except KeyboardInterrupt:
        raise UserError(
            "a second signal ended the command; the last checkpoint, if there was one, is kept"
        ) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
