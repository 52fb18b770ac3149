"""What a command raises when its user has to change something."""

from __future__ import annotations

from importlib import import_module


class UserError(Exception):
    """Bad input: the message is one clear line, and the command ends with exit code 2."""


def line(text: object) -> str:
    """A message as one line that can be printed, whatever names of files or options are in it."""
    return " ".join(str(text).splitlines()).encode("utf-8", "backslashreplace").decode()


def quoted(value: object) -> str:
    """A value from a file for a message: at most 80 letters, or its type if it is no plain one."""
    if type(value) is int and abs(value) >= 10**80:  # which Python may refuse to write out
        return f"a number of {value.bit_length()} bits"
    if value is None or type(value) in (str, int, float, bool):
        text = repr(value[:80] if type(value) is str else value)
        return text if len(text) <= 80 else text[:77] + "..."
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


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
