"""When work ends early: a signal, or the time is spent."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from eigenfilter.experiments.errors import UserError

STOPPED = 130  # the exit code of what Ctrl-C ended


class StopCondition:
    """Says when to stop: after a signal, or when the time is spent.

    Attributes:
        signalled: whether it was a signal.
    """

    def __init__(self, minutes: float | None) -> None:
        self._deadline = None if minutes is None else time.perf_counter() + 60 * minutes
        self.signalled = False

    def __call__(self) -> bool:
        return self.signalled or (
            self._deadline is not None and time.perf_counter() >= self._deadline
        )

    def exit_code(self, *, left: bool, failed: bool) -> int:
        """STOPPED if a signal left runs to go; else 1 if one failed, not by diverging; else 0."""
        if left and self.signalled:
            return STOPPED
        return 1 if failed else 0


@contextmanager
def graceful_stop(minutes: float | None) -> Iterator[StopCondition]:
    """The first Ctrl-C, or SIGTERM, stops gently; the second at once.

    Args:
        minutes: after which to stop gently too; None for never.

    Raises:
        UserError: at the second signal.
    """
    stop = StopCondition(minutes)

    def handle(number: int, frame: object) -> None:
        if stop.signalled:
            raise KeyboardInterrupt
        stop.signalled = True

    before: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handle)
        yield stop
    except KeyboardInterrupt:
        raise UserError("ended at once: the last checkpoint, if there was one, is kept") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
