"""Train with states of fewer bits beside float32 ones: the same network, batches and seeds.

    python examples/compressed_state.py out/compressed --data DIR

DIR holds CIFAR-10; `--methods adamw adamw_usam` needs no data. Networks, data and measurements are
those of examples/one_gradient. The script appends every run to runs.jsonl in the folder, and
writes compressed_state.png and compressed_state.md. A second call goes on where the first one
ended.

Every network computes in float32, also with bfloat16 parameters, which are widened first: what
differs between the formats is what the optimizer keeps. Gradients have the parameters' dtype.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import eigenfilter as ef
from eigenfilter.kernels.compression import decode, encode
from eigenfilter.optimizers.base import EigenfilterOptimizer

sys.path.insert(0, str(Path(__file__).with_name("one_gradient")))
from problems import PROBLEMS, Problem, Task
from training import Gradient, Sharpness, evaluate, factor, load

SEEDS = 3
WINDOWS = 40  # of a run's steps, whose training losses are averaged

Record = dict[str, Any]
Run = tuple[str, str, int]
"""A method, a format and a seed."""


def to_nearest(opt: torch.optim.Optimizer, *_: Any) -> None:
    """Round the moments of AdamW to their codes, the second ones to nearest, too."""
    for entry in opt.state.values():
        for key, codes in (("exp_avg", torch.int8), ("exp_avg_sq", torch.uint8)):
            entry[key].copy_(decode(*encode(entry[key], codes)))


@dataclass(frozen=True)
class Format:
    """What an optimizer keeps.

    Attributes:
        title: its name in figure and table.
        color: of the figure.
        dtype: the parameters' dtype.
        options: arguments of the optimizer.
        hook: runs after every step.
    """

    title: str
    color: str
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)
    hook: Callable[..., None] | None = None


BF16 = torch.bfloat16
FORMATS = {
    "float32": Format("float32", "#000000"),
    "state8": Format("float32, state of 8 bits", "#0072b2", options={"state_bits": 8}),
    "master24_state8": Format(
        "bfloat16, masters of 24 bits, state of 8 bits", "#009e73", BF16,
        {"master_weight_bits": 24, "state_bits": 8},
    ),
    "master24": Format(
        "bfloat16, masters of 24 bits, state of bfloat16", "#56b4e9", BF16,
        {"master_weight_bits": 24},
    ),
    "bfloat16": Format("bfloat16, no masters", "#d55e00", BF16),
    "stochastic": Format(
        "bfloat16, no masters, stochastic rounding", "#e69f00", BF16, {"stochastic_rounding": True}
    ),
    "nearest": Format("float32, state of 8 bits to nearest", "#cc79a7", hook=to_nearest),
}  # fmt: skip
REFERENCE = "float32"


@dataclass(frozen=True)
class Method:
    """An optimizer on a problem.

    Attributes:
        title: its name in figure and tables.
        problem: key of the problem.
        build: makes the optimizer of parameters, with the options of a format.
        steps: number of training steps.
        formats: keys of the formats.
    """

    title: str
    problem: str
    build: Callable[..., EigenfilterOptimizer]
    steps: int
    formats: tuple[str, ...] = tuple(FORMATS)[:-1]


METHODS = {
    "sgd": Method(
        "SGD, residual network", "cifar10",
        lambda params, **o: ef.SGD(params, lr=0.05, momentum=0.9, **o), 400,
    ),
    "adamw": Method(
        "AdamW, GPT", "gpt",
        lambda params, **o: ef.AdamW(params, lr=3e-3, **o), 800, tuple(FORMATS),
    ),
    "usam": Method(
        "USAM, residual network", "cifar10",
        lambda params, **o: ef.USAM(params, lr=0.1, momentum=0.9, rho=0.1, **o),
        400, tuple(FORMATS)[:3],
    ),
    "adamw_usam": Method(
        "AdamW with USAM's ascent, GPT", "gpt",
        lambda params, **o: ef.AdamW(params, lr=3e-3, rho=0.1, **o),
        800, tuple(FORMATS)[:3],
    ),
}  # fmt: skip


class Widened(nn.Module):
    """A network that computes in float32 whatever the dtype of its parameters."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs to scores."""
        wide = {name: p.float() for name, p in self.network.named_parameters()}
        scores: Tensor = torch.func.functional_call(self.network, wide, (inputs,))
        return scores


def prepare(network: nn.Module, method: Method, how: Format) -> EigenfilterOptimizer:
    """Convert the parameters of a network; return an optimizer whose masters they were."""
    weights = [p.detach().clone() for p in network.parameters()]
    for p in network.parameters():
        p.data = p.data.to(how.dtype)
    opt = method.build(network.parameters(), **how.options)
    opt.load_master_weights(weights)
    if how.hook is not None:
        opt.register_step_post_hook(how.hook)
    return opt


def bytes_per_parameter(opt: EigenfilterOptimizer) -> float:
    """The bytes of parameters and state, over the number of parameters."""
    params = [p for group in opt.param_groups for p in group["params"]]
    kept = [t for entry in opt.state.values() for t in entry.values() if isinstance(t, Tensor)]
    return sum(t.nbytes for t in (*params, *kept)) / sum(p.numel() for p in params)


@torch.no_grad()
def restore(network: nn.Module, weights: Iterable[Tensor]) -> None:
    """Give a network float32 weights."""
    for p, weight in zip(network.parameters(), weights, strict=True):
        p.data = weight


def train(name: str, form: str, seed: int, folder: Path, *, short: bool) -> Record:
    """Train once.

    Test loss, accuracy and sharpness are those of the master weights. Seconds are CPU time of
    batches, gradients and updates, on one thread.

    Returns:
        What was measured; "diverged" is the step at which a loss was not finite, if one was.
    """
    torch.set_num_threads(1)
    method = METHODS[name]
    problem = replace(PROBLEMS[method.problem], steps=method.steps)
    problem = replace(problem.short(), steps=2) if short else problem
    task = load(method.problem, folder)
    network = task.model(seed)
    opt = prepare(network, method, FORMATS[form])
    lr_schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: factor(problem, t))
    gradient, batches = Gradient(Widened(network), opt), task.batches(seed)
    result: Record = {"method": name, "format": form, "seed": seed}
    losses: list[float] = []
    start = time.process_time()
    for step in range(problem.steps):
        gradient.batch = next(batches)
        losses.append(opt.step(gradient).item())
        lr_schedule.step()
        if not math.isfinite(losses[-1]):
            return result | {"diverged": step}
    result["seconds"] = time.process_time() - start
    result["losses"] = averaged(losses)
    result["bytes per parameter"] = bytes_per_parameter(opt)
    restore(network, opt.master_weights())
    return result | measure(network, task, problem)


def averaged(losses: Sequence[float]) -> list[float]:
    """The means of losses over windows of steps."""
    size = max(1, len(losses) // WINDOWS)
    return [statistics.fmean(losses[i : i + size]) for i in range(0, len(losses), size)]


def measure(network: nn.Module, task: Task, problem: Problem) -> dict[str, float]:
    """Return the test loss and accuracy of a network, and its largest Hessian eigenvalue."""
    loss, accuracy = evaluate(network, islice(task.part("test"), problem.batches))
    sharpness = Sharpness(network, task.training(problem.probe))()
    return {"test loss": loss, "test accuracy": accuracy, "sharpness": sharpness}


MEASURES = {"test loss": (3, 1.0), "test accuracy": (2, 100.0), "sharpness": (2, 1.0)}
"""Digits and unit of what the table has."""


def of(records: Iterable[Record], name: str, form: str) -> list[Record]:
    """The runs of a method and a format that did not diverge, by seed."""
    mine = [r for r in records if (r["method"], r["format"]) == (name, form)]
    return sorted((r for r in mine if "diverged" not in r), key=lambda r: int(r["seed"]))


def deviation(values: Sequence[float]) -> float:
    """The standard deviation; NaN of fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def spread(values: Sequence[float], digits: int) -> str:
    """Return "mean ± standard deviation"."""
    return f"{statistics.fmean(values):.{digits}f} ± {deviation(values):.{digits}f}"


def of_seeds(records: Sequence[Record], others: Sequence[Record]) -> list[Record]:
    """The runs whose seeds others have, too."""
    return [r for r in records if r["seed"] in {other["seed"] for other in others}]


def difference(mine: Sequence[Record], usual: Sequence[Record], measure: str) -> str:
    """The mean difference of runs from float32's, and its error, in deviations of float32's."""
    pairs = zip(mine, of_seeds(usual, mine), strict=True)
    differences = [a[measure] - b[measure] for a, b in pairs]
    unit = deviation([r[measure] for r in usual])
    error = deviation(differences) / math.sqrt(len(differences))
    return f"{statistics.fmean(differences) / unit:+.2f} ± {error / unit:.2f}"


def distance(mine: Sequence[Record], usual: Sequence[Record]) -> float:
    """The distance of two mean loss curves, root mean square, in deviations of float32's."""
    pairs = zip(curves(mine), curves(of_seeds(usual, mine)), strict=True)
    squares = [(statistics.fmean(a) - statistics.fmean(b)) ** 2 for a, b in pairs]
    return math.sqrt(sum(squares) / sum(deviation(at) ** 2 for at in curves(usual)))


def curves(records: Sequence[Record]) -> list[tuple[float, ...]]:
    """The losses of each window, over the seeds."""
    return list(zip(*(r["losses"] for r in records), strict=True))


def table(name: str, records: Sequence[Record]) -> str:
    """Return the table of a method, with a row for each format."""
    head = ["format", "seeds", "bytes", "seconds", "loss curve: distance"]
    for measure in MEASURES:
        head += [measure + (", %" if measure == "test accuracy" else ""), "difference"]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    usual = of(records, name, REFERENCE)
    for form in METHODS[name].formats:
        mine = of_seeds(of(records, name, form), usual)
        if not mine:
            continue
        seconds = statistics.fmean(r["seconds"] for r in mine)
        cells = [FORMATS[form].title, f"{len(mine)}", f"{mine[0]['bytes per parameter']:.2f}"]
        cells += [f"{seconds:.0f}", "" if form == REFERENCE else f"{distance(mine, usual):.2f}"]
        for measure, (digits, scale) in MEASURES.items():
            cells.append(spread([scale * r[measure] for r in mine], digits))
            cells.append("" if form == REFERENCE else difference(mine, usual, measure))
        lines.append("| " + " | ".join(cells) + " |")
    lost = sum("diverged" in r for r in records if r["method"] == name)
    return "\n".join(lines) + "\n" + (f"\n{lost} runs diverged.\n" if lost else "")


def draw(names: Sequence[str], records: Sequence[Record], path: Path) -> None:
    """Draw the mean loss curves in a band of float32's deviation, and the sharpness at the end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(names) + 1.5, 7.0), layout="constrained")
    FigureCanvasAgg(figure)
    columns = figure.subplots(2, len(names), squeeze=False).T
    for (upper, lower), name in zip(columns, names, strict=True):
        for place, form in enumerate(METHODS[name].formats):
            mine, how = of(records, name, form), FORMATS[form]
            if not mine:
                continue
            losses = curves(mine)
            steps = [METHODS[name].steps / len(losses) * (i + 0.5) for i in range(len(losses))]
            means = [statistics.fmean(at) for at in losses]
            upper.plot(steps, means, color=how.color, lw=1, label=how.title)
            if form == REFERENCE:
                errors = [deviation(at) for at in losses]
                low, high = (
                    [m + k * e for m, e in zip(means, errors, strict=True)] for k in (-1, 1)
                )
                upper.fill_between(steps, low, high, color=how.color, alpha=0.15, lw=0)
            sharpness = [r["sharpness"] for r in mine]
            lower.plot([place] * len(mine), sharpness, "o", color=how.color, ms=4, alpha=0.6)
            lower.plot(place, statistics.fmean(sharpness), "_", color=how.color, ms=18)
        upper.set_title(METHODS[name].title, size=10)
        upper.set_xlabel("step")
        lower.set_ylim(0, 1.05 * lower.get_ylim()[1])
        lower.set_xticks([])
    columns[0][0].set_ylabel("training loss")
    columns[0][1].set_ylabel("largest Hessian eigenvalue at the end")
    widest = max(columns, key=lambda pair: len(pair[0].lines))
    handles = widest[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=110)


def write(records: Sequence[Record], folder: Path) -> None:
    """Write figure and tables of the methods that have runs with float32."""
    names = [name for name in METHODS if of(records, name, REFERENCE)]
    texts = [f"### {METHODS[name].title}\n\n{table(name, records)}" for name in names]
    (folder / "compressed_state.md").write_text("\n".join(texts))
    draw(names, records, folder / "compressed_state.png")


def read(file: Path) -> list[Record]:
    """The records of a file, if there is one."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def execute(runs: Sequence[Run], file: Path, args: argparse.Namespace) -> None:
    """Take the runs that the file lacks, and append their records to it."""
    done = {(r["method"], r["format"], r["seed"]) for r in read(file)}
    runs, start = [run for run in runs if run not in done], time.monotonic()
    context = get_context("spawn")  # a fork would inherit torch's threads
    with ProcessPoolExecutor(args.processes, mp_context=context) as pool:
        futures = [pool.submit(train, *run, args.data, short=args.short) for run in runs]
        for count, future in enumerate(as_completed(futures), 1):
            record = future.result()
            with file.open("a") as lines:
                lines.write(json.dumps(record) + "\n")
            left = (time.monotonic() - start) / count * (len(runs) - count)
            name = f"{record['method']} {record['format']} seed {record['seed']}"
            result = (
                f"diverged at step {record['diverged']}"
                if "diverged" in record
                else f"test loss {record['test loss']:.4f}, sharpness {record['sharpness']:.2f}"
            )
            print(f"{count}/{len(runs)}, {left / 60:.0f} min left: {name}: {result}", flush=True)


def main() -> None:
    """Run the study, and write its figure and its tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="OUT", help="folder of the results")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the data sets")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME",
        help=f"some of {', '.join(METHODS)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--formats", nargs="+", choices=FORMATS, default=list(FORMATS), metavar="NAME",
        help=f"some of {', '.join(FORMATS)} (default: all)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help=f"default: {SEEDS}")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--short", action="store_true", help="2 steps a run, to try the code")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    file = args.folder / ("short.jsonl" if args.short else "runs.jsonl")
    chosen = [(name, form) for name in args.methods for form in METHODS[name].formats]
    chosen = [(name, form) for name, form in chosen if form in args.formats]
    execute([(*of_seed, seed) for seed in range(args.seeds) for of_seed in chosen], file, args)
    write(read(file), args.folder)


if __name__ == "__main__":
    main()
