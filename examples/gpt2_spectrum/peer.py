"""The same products and eigenvalues by hessian-eigenthings."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from spectrum import PeakMemory
from torch.nn import functional as F

ROUNDS = 3


def measure(model: Any, batches: list[Any], op: Any, pairs: int, products: int) -> dict[str, Any]:
    """Return the time and memory of a product of each, in turns, and the peer's eigenvalues."""
    from hessian_eigenthings import HessianOperator, lanczos

    def loss(model: Any, batch: Any) -> Any:
        ids = batch["input_ids"]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    model.config._attn_implementation = "eager"  # its products need a second derivative
    other = HessianOperator(model, batches, loss)
    v = torch.randn(op.shape[0], generator=torch.Generator().manual_seed(0))
    v /= v.norm()
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    memory = {}
    with op.fixed():
        ours = op.matvec(v)  # builds the graph that the others keep
        for _ in range(ROUNDS):
            for name, operator in (("ours", op), ("theirs", other)):
                PeakMemory.restart()
                start = time.monotonic()
                theirs = operator.matvec(v)
                times[name].append(time.monotonic() - start)
                memory[name] = PeakMemory.most()
    difference = float((theirs - ours).norm() / ours.norm())
    del ours, theirs
    PeakMemory.restart()
    start = time.monotonic()
    result = lanczos(other, k=pairs, max_iter=products, which="LA", seed=0)
    return {
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "peak memory of a product": memory,
        "difference": difference,
        "products": products,
        "values": result.eigenvalues.tolist(),
        "residuals": result.residuals.tolist(),
        "minutes": (time.monotonic() - start) / 60,
        "peak memory": PeakMemory.most(),
    }


def lines(record: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Return a table of the peer beside the library."""
    times = record["seconds"]
    peaks = [f"{which['peak memory'] / 1e9:.1f} GB" for which in (ours, record)]
    wrong = [abs(a - b) / abs(b) for a, b in zip(record["values"], ours["values"], strict=True)]
    good = sum(error <= 1e-3 for error in wrong)
    return [
        "| | eigenfilter | hessian-eigenthings |",
        "| --- | --- | --- |",
        f"| seconds of a product | {times['ours']:.2f} | {times['theirs']:.2f} |",
        f"| products | {ours['products']} | {record['products']} |",
        f"| eigenvalues to 1e-3 | {len(ours['values'])} | {good} of {len(wrong)} |",
        f"| minutes | {ours['minutes']:.1f} | {record['minutes']:.1f} |",
        f"| peak memory | {peaks[0]} | {peaks[1]} |",
    ]
