"""The frameworks of the integrations, each an optional extra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def imports_of(name: str) -> Iterator[None]:
    """A context for the imports of `eigenfilter.integrations.NAME`, whose extra is NAME.

    Raises:
        ModuleNotFoundError: the framework is not installed; the message says how to install it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"eigenfilter.integrations.{name} needs {error.name}, which is not installed: "
            f'pip install "eigenfilter[{name}]"',
            name=error.name,
        ) from error
