"""Errors that a user can correct, and helpers for their messages."""

from __future__ import annotations

from importlib import import_module


class UserError(Exception):
    """Bad input. The message is one line, and the command ends with exit code 2."""


def one_line(text: object) -> str:
    """Return a message as one printable line, whatever names of files or options it contains."""
    return " ".join(str(text).splitlines()).encode("utf-8", "backslashreplace").decode()


def quoted(value: object) -> str:
    """Return a value for a message: at most 80 characters, or the type if it is not a scalar."""
    if type(value) is int and abs(value) >= 10**80:  # Python may refuse to convert it to text
        return f"a number of {value.bit_length()} bits"
    if value is None or type(value) in (str, int, float, bool):
        text = repr(value[:80] if type(value) is str else value)
        return text if len(text) <= 80 else text[:77] + "..."
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def require(*modules: str, extra: str = "experiments") -> None:
    """Check for optional dependencies before any work is done.

    Args:
        modules: names of the modules.
        extra: the extra of this package that installs them.

    Raises:
        UserError: a module is missing; the message names it and how to install it.
    """
    for module in modules:
        try:
            import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise  # the module is installed but broken
            advice = f'pip install "eigenfilter[{extra}]"'
            raise UserError(f"{module} is not installed: {advice}") from error
