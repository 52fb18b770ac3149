"""The names that the code of a function reads, assigns and writes in place."""

from __future__ import annotations

import dis
import functools
from itertools import pairwise
from types import CodeType
from typing import NamedTuple

_LIST_WRITERS = {"append", "extend", "insert"}  # by which a function leaves something in a list
_VARIABLES = {"LOAD_GLOBAL", "LOAD_DEREF"}
_ATTRIBUTES = {"LOAD_ATTR", "LOAD_METHOD"}
_CALLS = {"CALL", "CALL_KW", "CALL_FUNCTION_EX"}
_STORES = {"STORE_SUBSCR": 2, "STORE_SLICE": 3}  # with the height of the index


class Names(NamedTuple):
    """The names in the code of a function and of those inside it.

    Attributes:
        globals, attributes: those that are read.
        stored: those outside that are assigned.
        stored_attributes: attributes that are assigned.
        written: those of which a writing method of lists is called.
        used: variables and attributes that are read for more than to write them in place.
    """

    globals: frozenset[str]
    attributes: frozenset[str]
    stored: frozenset[str]
    stored_attributes: frozenset[str]
    written: frozenset[str]
    used: frozenset[str]


@functools.lru_cache(maxsize=128)
def names_of(code: CodeType) -> Names:
    """The names in the code of a function."""
    instructions = list(dis.get_instructions(code))
    used = [(i.opname, i.argval) for i in instructions]
    read = _VARIABLES | _ATTRIBUTES
    own = Names(
        frozenset(name for op, name in used if op == "LOAD_GLOBAL"),
        frozenset(name for op, name in used if op in _ATTRIBUTES),
        frozenset(
            name
            for op, name in used
            if op == "STORE_GLOBAL" or (op == "STORE_DEREF" and name in code.co_freevars)
        ),
        frozenset(name for op, name in used if op == "STORE_ATTR"),
        frozenset(
            name
            for (op, name), (after, method) in pairwise(used)
            if op in read and after in read and method in _LIST_WRITERS
        ),
        frozenset(
            name
            for position, (op, name) in enumerate(used)
            if op in read and not _is_only_written(instructions[position:])
        ),
    )
    inside = [names_of(c) for c in code.co_consts if isinstance(c, CodeType)]
    # What a function inside assigns may be a variable of this one.
    inside = [each._replace(stored=each.stored - set(code.co_cellvars)) for each in inside]
    return Names(*(names.union(*more) for names, *more in zip(own, *inside, strict=True)))


def _is_only_written(instructions: list[dis.Instruction]) -> bool:
    """Whether the value that the first instruction loads is written in place, and no more.

    So it is in a statement such as `total.add_(x)`, `logs["total"].mul_(0.9).add_(x)`,
    `losses[i] = x` or `counts[i] += 1`, and not where the result is used: `model(x.mul_(2))`. The
    walk follows the value on the stack, at height 1, until an instruction takes it.
    """
    first, *rest = instructions
    height = dis.stack_effect(first.opcode, first.arg)
    if height > 1 or first.opname == "LOAD_METHOD":
        return False  # the variable is called
    is_written = augments = False
    height = 1
    for i in rest:
        if "JUMP" in i.opname or i.opname.startswith(("RETURN", "YIELD", "SEND")):
            return False
        before, height = height, height + dis.stack_effect(i.opcode, i.arg)
        if before == 1 and i.opname in _ATTRIBUTES:
            is_written |= i.argval.endswith("_") and not i.argval.endswith("__")
            continue
        # The value and the index, or both ends of a slice, of `counts[i] += 1`.
        augments |= i.opname == "COPY" and i.arg == before and before in (2, 3)
        if i.opname in _STORES and height < 1:
            return before == _STORES[i.opname] or augments
        if i.opname == "POP_TOP" and height == 0:
            return is_written
        is_entry = i.opname in ("BINARY_SUBSCR", "BINARY_SLICE") or i.argrepr == "[]"
        if height < 1 or (height == 1 and before > 1 and i.opname not in _CALLS and not is_entry):
            return False
    return False
