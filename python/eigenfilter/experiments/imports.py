"""Users' own models, data and losses, named as module:name."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from eigenfilter.experiments.errors import UserError


def import_object(text: str) -> Any:
    """The object that `text`, "package.module:name", names; looked for in the working folder too.

    Raises:
        UserError: it is not of that form, or the module cannot be imported or has no such name.
    """
    module, separator, name = text.partition(":")
    if not (module and separator and name):
        raise UserError(f"{text!r} must be module:name, as in mypackage.training:build")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does
    try:
        found = import_module(module)
    except Exception as error:  # whatever a user's module raises
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise UserError(f"there is no module {error.name} here or installed") from error
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"cannot import {module} ({reason})") from error
    if not hasattr(found, name):
        raise UserError(f"module {module} has no {name}")
    return getattr(found, name)


def call_imported(text: str) -> Any:
    """What the callable that `text` names returns, called without arguments.

    Raises:
        UserError: see `import_object`; or it cannot be called.
    """
    found = import_object(text)
    if not callable(found):
        raise UserError(f"{text} must be a function, not {type(found).__name__}")
    return found()
