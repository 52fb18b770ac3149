"""Train GPT-2 with 124 million parameters on a text, and measure the spectrum of its Hessian.

    python examples/gpt2_spectrum out/gpt2 --text /usr/share/dictd/gcide.dict.dz

The text is any file of some ten megabytes, which gzip may have compressed; this one is Webster's
dictionary of 1913, which the Debian package dict-gcide contains. The tokenizer learns GPT-2's
number of tokens from it. The command trains, finds the largest eigenpairs of the Hessian of the
loss on training sequences, estimates the density of all eigenvalues, and writes results.json,
spectrum.png and gpt2_spectrum.md into the folder. Whenever it was stopped, the same command goes on
from there. Half a gigabyte of disk is needed for each product until the eigenpairs are found.

Needs transformers, tokenizers and matplotlib, and Linux, for the peak memory.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import peer
import spectrum
import text
import torch
import training

from eigenfilter import curvature
from eigenfilter.experiments.errors import UserError
from eigenfilter.experiments.files import read_json, replace_text


def main() -> None:
    """Run what is missing, and write the results."""
    args = arguments()
    args.folder.mkdir(parents=True, exist_ok=True)
    try:
        run(args)
    except UserError as error:
        sys.exit(f"error: {error}")


def arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        prog="python examples/gpt2_spectrum",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="OUT", help="folder of the results")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="the text")
    parser.add_argument(
        "--shape",
        choices=training.SHAPES,
        default="gpt2",
        help="tiny tries the code (default: gpt2)",
    )
    numbers = {
        "steps": (600, "steps of training"),
        "batch": (8, "sequences in a step, and in the probe"),
        "length": (128, "tokens in a sequence"),
        "pairs": (10, "eigenpairs"),
        "probes": (2, "random vectors for the density"),
        "density-steps": (40, "products with each of them"),
    }
    for name, (default, what) in numbers.items():
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default: {default})"
        )
    parser.add_argument(
        "--tol", type=float, default=1e-3, metavar="X",
        help="relative tolerance of the eigenvalues (default: 0.001)",
    )  # fmt: skip
    parser.add_argument(
        "--peer", type=int, default=0, metavar="N",
        help="take N products of Lanczos with hessian-eigenthings too; its basis keeps them all",
    )  # fmt: skip
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    """Train, measure what results.json lacks, and write it."""
    file = args.folder / "results.json"
    settings = {k: v for k, v in vars(args).items() if k not in ("folder", "text", "peer")}
    results: dict[str, Any] = {"settings": settings}
    if file.exists():
        results = read_json(file, "give another folder")
    if results["settings"] != settings:
        raise UserError(f"{file} is of other settings, {results['settings']}: give another folder")

    def keep(name: str, record: Any) -> None:
        results[name] = record
        replace_text(file, json.dumps(results, indent=1) + "\n")

    keep("settings", settings)
    vocabulary = training.SHAPES[args.shape]["vocab_size"]
    tokens = text.encode(args.text, vocabulary, args.folder / "tokens.pt")
    rows, held_out = text.split(tokens, args.length)
    model = training.build(args.shape)
    how = training.train(model, rows, args.batch, args.steps, args.folder)
    if "training" not in results:
        how["held-out loss"] = training.loss(model, held_out[: 16 * args.batch], args.batch)
        keep("training", how)
    model.eval()
    batches = [{"input_ids": next(text.batches(rows, args.batch, 0))}]
    op = curvature.causal_lm(model, batches)
    n = op.shape[0]
    if "eigenpairs" not in results:
        keep("eigenpairs", spectrum.eigenpairs(op, args.pairs, args.tol, args.folder, seed=0))
    densities = results.get("densities", [])
    for seed in range(len(densities), args.probes):
        densities.append(spectrum.density(op, args.density_steps, args.folder, seed))
        keep("densities", densities)
    if args.peer and "peer" not in results:
        keep("peer", peer.measure(model, batches, op, args.pairs, args.peer))
    write(results, n, args.folder)


def write(results: dict[str, Any], n: int, folder: Path) -> None:
    """Write the figure, and the tables beside the cost model."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    how, pairs = results["training"], results["eigenpairs"]
    figure, axes = plt.subplots(figsize=(7, 4))
    density = spectrum.joined(results["densities"], n)
    density.plot(axes)
    axes.plot(pairs["values"], [axes.get_ylim()[0]] * len(pairs["values"]), "|", ms=12)
    axes.set_title(f"Hessian of GPT-2, {n:,} parameters, at a loss of {how['loss']:.2f}")
    figure.tight_layout()
    figure.savefig(folder / "spectrum.png", dpi=150)
    cost = curvature.eigsh_cost(
        n, len(pairs["values"]), products=pairs["products"],
        multiplicity_products=pairs["multiplicity products"], basis_itemsize=2,
    )  # fmt: skip
    probes = results["densities"]
    rows = [
        ("training", how["steps"], how["minutes"], None, None),
        (f"{len(pairs['values'])} eigenpairs", pairs["products"], pairs["minutes"],
         pairs["minutes of products"], pairs["peak memory"]),
        (f"density, {len(probes)} vectors", *(sum(r[k] for r in probes) for k in
         ("products", "minutes", "minutes of products")), max(r["peak memory"] for r in probes)),
    ]  # fmt: skip
    lines = ["| part | steps or products | minutes | of products | peak memory |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    for name, count, minutes, of_products, peak in rows:
        parts = "" if of_products is None else f"{of_products:.1f}"
        memory = "" if peak is None else f"{peak / 1e9:.1f} GB"
        lines.append(f"| {name} | {count} | {minutes:.1f} | {parts} | {memory} |")
    lines += [
        "",
        f"Solver's memory by `eigsh_cost`: {cost.memory / 1e9:.1f} GB, besides the "
        f"{pairs['memory of a product'] / 1e9:.1f} GB of model, graph and a product.",
        f"Loss {how['loss']:.3f}, held-out {how['held-out loss']:.3f}; "
        f"trace of the Hessian {density.trace.value:.1f}.",
        "",
        "| eigenvalue | residual | estimated error |",
        "| --- | --- | --- |",
    ]
    for value, residual, error in zip(
        pairs["values"], pairs["residuals"], pairs["errors"], strict=True
    ):
        lines.append(f"| {value:.4f} | {residual:.1e} | {error:.1e} |")
    if "peer" in results:
        lines += ["", *peer.lines(results["peer"], pairs)]
    (folder / "gpt2_spectrum.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
