"""Products by the engine asked for, or by the first that can."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import Tensor

from eigenfilter.curvature.engines import Engines
from eigenfilter.curvature.engines.choice import ORDER, choose
from eigenfilter.curvature.loss.batch_sources import BatchSource, UnusableModelError
from eigenfilter.curvature.loss.vectors import Sums

_logger = logging.getLogger(__name__)

_LONGEST = 500  # characters that are shown of why an engine failed


class RequestedEngine:
    """The engine that was asked for, which works or raises."""

    def __init__(self, name: str) -> None:
        self.name = name

    def multiply(
        self, made: Engines, source: BatchSource, budget: Callable[[], int], V: Tensor
    ) -> Sums:
        """Return the products with V [n, b], summed over batches."""
        return made[self.name].multiply(V)


class AutomaticEngine:
    """The fastest exact engine; where it fails, the next that does not, and a line in the log.

    What is chosen for single vectors and for blocks is kept, and what failed is not tried again.

    Attributes:
        name: that of the last product; "auto" before the first.
    """

    def __init__(self) -> None:
        self.name = "auto"
        self._left: dict[bool, list[str]] = {}  # for blocks (True) and for single vectors
        self._refused: dict[str, str] = {}  # engines that failed, and how

    def multiply(
        self, made: Engines, source: BatchSource, budget: Callable[[], int], V: Tensor
    ) -> Sums:
        """Return the products with V [n, b], summed over batches.

        Raises:
            UnusableModelError: the model or its data are at fault.
            RuntimeError: no engine works; each is named, with its reason.
            Exception: what reading the data raised.
            Exception: what all engines raised alike, which is the model's own.
        """
        block = V.shape[1] > 1
        if block not in self._left:
            self._left[block] = self._candidates(made, source, budget, V.shape[1])
        left = self._left[block]
        while True:
            try:
                sums = made[left[0]].multiply(V)
            except UnusableModelError:
                raise
            except Exception as error:  # any: the engine is left for the next, and this is logged
                # The model itself fails, or the data cannot be read: that may pass.
                if not made.objective.traits.evaluated or error is source.failure:
                    raise
                made.drop(left[0])
                self._pass_over(left.pop(0), left, error)
                if not left:
                    del self._left[block]  # the cause may be gone the next time
                    if (verdict := self._verdict(error)) is error:
                        raise
                    raise verdict from error
            else:
                self.name = left[0]
                return sums

    def _candidates(
        self, made: Engines, source: BatchSource, budget: Callable[[], int], vectors: int
    ) -> list[str]:
        try:
            found = choose(made.objective, source, made.params, budget(), vectors)
        except UnusableModelError:
            raise
        except Exception as error:  # as above: it met what the engines will meet
            if not made.objective.traits.evaluated or error is source.failure:
                raise
            _logger.info("the trial of engines failed: %s", _short(error))
            found = ORDER
        return [name for name in found if name not in self._refused]

    def _pass_over(self, name: str, left: list[str], error: Exception) -> None:
        self._refused[name] = f"{type(error).__name__}: {error}"
        if not left:
            return
        inexact = left[0] == "finite_difference"
        _logger.log(
            logging.WARNING if inexact else logging.INFO,
            "engine %r failed: %s; next is %r%s",
            name,
            _short(error),
            left[0],
            ", whose products are not exact (see the operator's `error`)" if inexact else "",
        )

    def _verdict(self, error: Exception) -> Exception:
        """Return what to raise where nothing works: the one reason there is, or all."""
        refused, self._refused = self._refused, {}
        if len(set(refused.values())) == 1:
            return error
        reasons = "".join(f"\n- {name}: {_cut(why)}" for name, why in refused.items())
        return RuntimeError(
            f"no engine can multiply by this matrix:{reasons}\nLet the model and the loss use "
            "operations that torch can differentiate. With engine=... one engine alone is taken, "
            "and its error raised as it is"
        )


def _short(error: Exception) -> str:
    return _cut(f"{type(error).__name__}: {error}")


def _cut(text: str) -> str:
    """Return the first line of a text, cut where it is long."""
    line = text.splitlines()[0]
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."
