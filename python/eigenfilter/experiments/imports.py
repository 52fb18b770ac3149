"""Import of users' own models, data and losses, which are named as module:name."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from eigenfilter.experiments.errors import UserError


def import_object(text: str) -> Any:
    """Import the object that `text` names, in the form "package.module:name".

    Modules in the current folder are found too.

    Raises:
        UserError: the text has another form, or the module cannot be imported or has no such name.
    """
    module, separator, name = text.partition(":")
    if not (module and separator and name):
        raise UserError(f"{text!r} must be module:name, as in mypackage.training:build")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does
    try:
        imported = import_module(module)
    except Exception as error:  # a user's module may raise anything
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise UserError(f"there is no module {error.name} here or installed") from error
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"cannot import {module} ({reason})") from error
    if not hasattr(imported, name):
        raise UserError(f"module {module} has no {name}")
    return getattr(imported, name)


def call_imported(text: str) -> Any:
    """Import the function that `text` names, and return its result without arguments.

    Raises:
        UserError: see `import_object`; or the object cannot be called.
    """
    function = import_object(text)
    if not callable(function):
        raise UserError(f"{text} must be a function, not {type(function).__name__}")
    return function()
