"""The nodes of an autograd graph, and the tensors that they saved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

Root = Tensor | GradientEdge  # an edge keeps the graph of a tensor alive, and not its memory

_saved_names: dict[type, tuple[str, ...]] = {}  # node type -> its attributes of saved tensors


def nodes(roots: Iterable[Root]) -> Iterator[Any]:
    """Yield the nodes of the graph behind `roots`, each once."""
    yield from nodes_below(r.grad_fn if isinstance(r, Tensor) else r.node for r in roots)


def nodes_below(starts: Iterable[Any]) -> Iterator[Any]:
    """Yield these nodes, of which some may be None, and all behind them, each once."""
    stack, visited = list(starts), set()
    while stack:
        node = stack.pop()
        if node is not None and node not in visited:
            visited.add(node)
            yield node
            stack.extend(edge for edge, _ in node.next_functions)


def python_function(node: Any) -> bool:
    """Whether a node's backward is written in Python, by someone else.

    Our own Functions say `is_recorded`: autograd sees all of their backward, which calls no module.
    """
    is_python = isinstance(node, torch.autograd.function.BackwardCFunction)
    return is_python and not getattr(type(node)._forward_cls, "is_recorded", False)


def saved_tensors(roots: Iterable[Root]) -> Iterator[Tensor]:
    """Yield the tensors that the graph keeps alive, those of `roots` first; some several times.

    Tensors behind saved-tensor hooks (torch.utils.checkpoint) are left out, because unpacking them
    would run the forward pass again.
    """
    roots = list(roots)
    yield from (root for root in roots if isinstance(root, Tensor))
    for node in nodes(roots):
        for saved in _saved(node):
            if saved.unpack_hook is None and isinstance(saved.data, Tensor):
                yield saved.data


def runs_python(roots: Iterable[Root]) -> bool:
    """Whether backward runs Python code, a Function or a hook, which may call modules again."""
    return any(
        python_function(node) or any(saved.unpack_hook is not None for saved in _saved(node))
        for node in nodes(roots)
    )


def _saved(node: Any) -> Iterator[Any]:
    """Yield a node's SavedTensors."""
    kind = type(node)
    if kind not in _saved_names:
        _saved_names[kind] = tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))
    for name in _saved_names[kind]:
        value = getattr(node, name)
        yield from value if isinstance(value, tuple) else (value,)


def reachable_leaves(roots: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the tensors in which backward from `roots` would leave a gradient."""
    for node in nodes(roots):
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            yield variable
