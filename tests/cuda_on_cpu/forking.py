"""One run for each mutant, in a process forked after the slow start: see mutants.py.

This pytest plugin (`-p forking`) runs the collected tests for each mutant; races.py uses it, too.
It reads lines "NUMBER FILE" from the standard input: the number of the mutant, and the file for the
output. It answers each with the exit status of the run: 0 if nothing failed, and a negative number
if a signal ended it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import TextIO

import _pytest.main
import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key

SECONDS = 1800  # a run that takes longer has failed


def serve(run: Callable[[], int], limit: int = SECONDS) -> None:
    """Run the function, for `limit` seconds at most, in a child for each line of the input."""
    with os.fdopen(int(os.environ["ANSWERS"]), "w") as answers:
        _serve(run, answers, limit)


def _serve(run: Callable[[], int], answers: TextIO, limit: int) -> None:
    assert sys.__stdin__ is not None  # pytest replaces sys.stdin
    assert sys.__stdout__ is not None
    for line in sys.__stdin__:
        number, output = line.split()
        child = os.fork()
        if child == 0:
            _redirect(output)
            signal.alarm(limit)
            core = sys.modules["eigenfilter._core"].__file__
            ctypes.CDLL(core).choose_mutant(int(number))
            status = 1
            try:
                status = run()
            except BaseException:  # whatever happens, the child must not go on to serve
                traceback.print_exc(file=sys.__stdout__)
            sys.__stdout__.flush()
            os._exit(status)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def _redirect(output: str) -> None:
    """Send the standard output and error of this process to a file."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool:
    def run() -> int:
        os.dup2(2, session.config.stash[fault_handler_stderr_fd_key])
        with contextlib.suppress(session.Failed):
            _pytest.main.pytest_runtestloop(session)
        return int(session.testsfailed > 0)

    serve(run)
    return True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        print(f"\nFAILED {report.nodeid}", file=sys.__stdout__, flush=True)
