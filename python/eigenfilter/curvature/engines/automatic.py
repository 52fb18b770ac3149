"""The choice of the engine for each product: the requested one, or the first that works."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import Tensor

from eigenfilter.curvature.engines import Engines
from eigenfilter.curvature.engines.choice import ORDER, choose
from eigenfilter.curvature.loss.batch_sources import BatchSource, UnusableModelError
from eigenfilter.curvature.loss.vectors import Sums

_logger = logging.getLogger(__name__)

_LONGEST = 500  # characters of an engine's error that a message shows


class RequestedEngine:
    """The engine that was requested by name, which works or raises."""

    def __init__(self, name: str) -> None:
        self.name = name

    def multiply(
        self, engines: Engines, source: BatchSource, budget: Callable[[], int], V: Tensor
    ) -> Sums:
        """Return the products with V [n, b], summed over batches."""
        return engines[self.name].multiply(V)


class AutomaticEngine:
    """The fastest exact engine; where it fails, the next one that works, with a line in the log.

    The choices for single vectors and for blocks are kept. An engine that failed is not tried
    again.

    Attributes:
        name: name of the engine that made the last product; "auto" before the first.
    """

    def __init__(self) -> None:
        self.name = "auto"
        self._candidates: dict[bool, list[str]] = {}  # for blocks (True) and for single vectors
        self._failures: dict[str, str] = {}  # engines that failed -> their errors

    def multiply(
        self, engines: Engines, source: BatchSource, budget: Callable[[], int], V: Tensor
    ) -> Sums:
        """Return the products with V [n, b], summed over batches.

        Raises:
            UnusableModelError: the model or its data are at fault.
            RuntimeError: no engine works; each is named, with its reason.
            Exception: reading the data raised it, or all engines raised the same, the model's own.
        """
        block = V.shape[1] > 1
        if block not in self._candidates:
            self._candidates[block] = self._choose(engines, source, budget, V.shape[1])
        candidates = self._candidates[block]
        while True:
            try:
                sums = engines[candidates[0]].multiply(V)
            except UnusableModelError:
                raise
            except Exception as error:  # of any kind: it is logged, and the next engine is tried
                # If the model itself fails or the data cannot be read, that may be temporary.
                if not engines.objective.traits.evaluated or error is source.failure:
                    raise
                engines.drop(candidates[0])
                self._record_failure(candidates.pop(0), candidates, error)
                if not candidates:
                    del self._candidates[block]  # the cause may be gone the next time
                    if (failure := self._joint_failure(error)) is error:
                        raise
                    raise failure from error
            else:
                self.name = candidates[0]
                return sums

    def _choose(
        self, engines: Engines, source: BatchSource, budget: Callable[[], int], vectors: int
    ) -> list[str]:
        try:
            names = choose(engines.objective, source, engines.params, budget(), vectors)
        except UnusableModelError:
            raise
        except Exception as error:  # as above; the engines will meet the same error
            if not engines.objective.traits.evaluated or error is source.failure:
                raise
            _logger.info("the trial of engines failed: %s", _short(error))
            names = ORDER
        return [name for name in names if name not in self._failures]

    def _record_failure(self, name: str, remaining: list[str], error: Exception) -> None:
        self._failures[name] = f"{type(error).__name__}: {error}"
        if not remaining:
            return
        inexact = remaining[0] == "finite_difference"
        _logger.log(
            logging.WARNING if inexact else logging.INFO,
            "engine %r failed: %s; next is %r%s",
            name,
            _short(error),
            remaining[0],
            ", whose products are not exact (see the operator's `error`)" if inexact else "",
        )

    def _joint_failure(self, error: Exception) -> Exception:
        """Return what to raise if nothing works: the error if all are the same, else one of all."""
        failures, self._failures = self._failures, {}
        if len(set(failures.values())) == 1:
            return error
        reasons = "".join(f"\n- {name}: {_cut(why)}" for name, why in failures.items())
        return RuntimeError(
            f"no engine can multiply by this matrix:{reasons}\nLet the model and the loss use "
            "operations that torch can differentiate. With engine=... only that engine is used, "
            "and its own error is raised"
        )


def _short(error: Exception) -> str:
    return _cut(f"{type(error).__name__}: {error}")


def _cut(text: str) -> str:
    """Return the first line of a text, cut where it is long."""
    line = text.splitlines()[0]
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."
