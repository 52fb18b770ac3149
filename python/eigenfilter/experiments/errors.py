"""What a command raises when its user has to change something."""

from __future__ import annotations

from importlib import import_module


class UserError(Exception):
    """Bad input: the message is one clear line, and the command ends with exit code 2."""


def require(*modules: str, extra: str = "experiments") -> None:
    """Check for optional dependencies before any work is done.

    extra: of this package, that brings them.

    Raises:
        UserError: naming the first that is missing, and how to install it.
    """
    for module in modules:
        try:
            import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise  # there, but broken
            advice = f'pip install "eigenfilter[{extra}]"'
            raise UserError(f"{module} is not installed: {advice}") from error
