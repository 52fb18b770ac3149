"""What a command raises when its user has to change something."""

from __future__ import annotations

from importlib import import_module


class UserError(Exception):
    """Bad input: the message is one clear line, and the command ends with exit code 2."""


def require(*modules: str) -> None:
    """Check for optional dependencies before any work is done.

    Raises:
        UserError: naming the first that is missing, and how to install it.
    """
    for module in modules:
        try:
            import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise  # there, but broken
            advice = 'pip install "eigenfilter[experiments]"'
            raise UserError(f"{module} is not installed: {advice}") from error
