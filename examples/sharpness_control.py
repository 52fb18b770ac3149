"""Keep the sharpness at a target while lr decays, and draw it beside runs without control.

    python examples/sharpness_control.py out/control --data DIR

DIR holds MNIST as torchvision unpacks it, and CIFAR-10's binary version; `--problems digits` needs
neither. The script trains each problem from each seed with `SharpnessController`, with the constant
extrapolation that `filters.design` gives at the first lr, and without extrapolation. It measures
the sharpness of x on the probe every few steps by an operator of its own, and writes
sharpness_control.png, .md and .json into the folder. The share of steps counts the measurements
within 10% of the target, from the first one on that has reached 90% of it. The time of the control
is the CPU time of all calls of the controller's step, over that of the training steps.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import eigenfilter as ef

BAND = 0.1
COLORS = {"controlled": "#0072b2", "constant e": "#d55e00", "e = 0": "#999999"}

Data = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def square_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Half the squared distance from the labels' unit vectors."""
    return 0.5 * (scores - nn.functional.one_hot(labels, 10)).square().sum(1).mean()


def digits(root: Path) -> Data:
    """scikit-learn's 1,797 digits, centered."""
    from sklearn.datasets import load_digits

    inputs, labels = load_digits(return_X_y=True)
    x = torch.tensor(inputs / 16.0, dtype=torch.float32)
    return x - x.mean(0), torch.tensor(labels)


def mnist(root: Path) -> Data:
    """The training images of MNIST, standardized."""
    from torchvision.datasets import MNIST

    data = MNIST(str(root), train=True)
    return (data.data.float() / 255.0 - 0.1307) / 0.3081, data.targets


def cifar10(root: Path) -> Data:
    """The first 20,000 training images of CIFAR-10, standardized."""
    raw = [(root / f"cifar-10-batches-bin/data_batch_{i}.bin").read_bytes() for i in (1, 2)]
    rows = torch.frombuffer(bytearray(b"".join(raw)), dtype=torch.uint8).reshape(-1, 3073)
    return rows[:, 1:].reshape(-1, 3, 32, 32).float() / 64.0 - 2.0, rows[:, 0].long()


def mlp(inputs: int, hidden: int, activation: type[nn.Module]) -> nn.Module:
    """A network with one hidden layer."""
    layers = nn.Flatten(), nn.Linear(inputs, hidden), activation(), nn.Linear(hidden, 10)
    return nn.Sequential(*layers)


def convnet() -> nn.Module:
    """Three convolutions of stride 2, 10,000 parameters."""
    layers: list[nn.Module] = []
    for into, out in ((3, 16), (16, 16), (16, 32)):
        layers += [nn.Conv2d(into, out, 3, stride=2, padding=1), nn.GELU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


@dataclass(frozen=True)
class Problem:
    """A training problem.

    Attributes:
        title: its name in the figure.
        data: returns inputs and labels, given the folder of the data.
        build: makes the network.
        loss: the loss.
        lr: the first learning rate, which decays to 0 along a cosine.
        target: the sharpness that is wanted.
        steps: number of training steps.
        batch: samples of a step; 0 takes all.
        every: shortest interval between the controller's checks.
        probe: the first samples, on which the sharpness is measured.
        measure: steps between the measurements that are drawn.
    """

    title: str
    data: Callable[[Path], Data]
    build: Callable[[], nn.Module]
    loss: Loss
    lr: float
    target: float
    steps: int
    batch: int
    every: int
    probe: int
    measure: int


PROBLEMS = {
    "digits": Problem(
        "digits, full batch, square loss",
        digits,
        lambda: mlp(64, 100, nn.Tanh),
        square_loss,
        lr=0.1,
        target=6.0,
        steps=6000,
        batch=0,
        every=100,
        probe=1797,
        measure=20,
    ),
    "mnist": Problem(
        "MNIST MLP, batch 128, square loss",
        mnist,
        lambda: mlp(784, 64, nn.ReLU),
        square_loss,
        lr=0.05,
        target=7.0,
        steps=9000,
        batch=128,
        every=200,
        probe=512,
        measure=60,
    ),
    "cifar10": Problem(
        "CIFAR-10 convnet, batch 128, cross-entropy",
        cifar10,
        convnet,
        nn.functional.cross_entropy,
        lr=0.05,
        target=10.0,
        steps=3000,
        batch=128,
        every=400,
        probe=256,
        measure=50,
    ),
}


@dataclass
class Run:
    """A training run: its measurements, and what the control took."""

    name: str
    seed: int
    steps: list[int] = field(default_factory=list)
    sharpness: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    e: list[float] = field(default_factory=list)
    checks: list[tuple[int, float, float | None, int]] = field(default_factory=list)
    training_seconds: float = 0.0
    control_seconds: float = 0.0
    loss: float = math.nan
    whole: float = math.nan  # the last sharpness, on more samples

    def within(self, target: float) -> float:
        """The share of the measurements within the band, once the band was reached."""
        reached = [i for i, s in enumerate(self.sharpness) if s >= (1 - BAND) * target]
        if not reached:
            return 0.0
        after = self.sharpness[reached[0] :]
        return sum(abs(s / target - 1) <= BAND for s in after) / len(after)


def operator(
    problem: Problem, model: nn.Module, data: Data, samples: int
) -> ef.curvature.HessianOperator:
    """The Hessian on the first samples."""
    some = data[0][:samples], data[1][:samples]
    return ef.curvature.HessianOperator(model, problem.loss, some, engine="cached_graph")


def late_share(run: Run, target: float) -> float:
    """The share of the measurements in the last half of the run within the band."""
    late = run.sharpness[len(run.sharpness) // 2 :]
    return sum(abs(s / target - 1) <= BAND for s in late) / len(late)


class Probe:
    """Measures the sharpness of x on the probe, in a copy of the model."""

    def __init__(self, problem: Problem, model: nn.Module, data: Data) -> None:
        self.twin = copy.deepcopy(model)
        self.op = operator(problem, self.twin, data, problem.probe)
        self.vectors: Tensor | None = None

    @torch.no_grad()
    def measure(self, opt: ef.SGD) -> float:
        [group] = opt.param_groups
        for x, y in zip(self.twin.parameters(), group["params"], strict=True):
            x.copy_(y + group["extrapolated"] * opt.state[y]["momentum_buffer"])
        eigsh = ef.curvature.eigsh  # it follows three, of which none is missed when they cross
        result = eigsh(self.op, 3, tol=1e-2, v0=self.vectors, check_multiplicity=False)
        self.vectors = result.vectors
        return result.values[0].item()


def train(problem: Problem, data: Data, name: str, seed: int, **options: Any) -> Run:
    """Train with control, with a constant extrapolation, or without."""
    torch.manual_seed(seed)
    model, run = problem.build(), Run(name, seed)
    opt = ef.SGD(model.parameters(), lr=problem.lr, momentum=0.9)
    if name == "constant e":
        e = ef.filters.design("sgd", problem.target, lr=problem.lr, momentum=0.9)
        opt.param_groups[0]["extrapolation"] = e
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, problem.steps)
    controller = None
    if name == "controlled":
        op = operator(problem, model, data, problem.probe)
        controller = ef.SharpnessController(op, opt, problem.target, every=problem.every, **options)
    probe = Probe(problem, model, data)
    for step in range(1, problem.steps + 1):
        start = time.process_time()
        x, y = data
        if problem.batch:
            chosen = torch.randint(len(x), (problem.batch,))
            x, y = x[chosen], y[chosen]
        opt.zero_grad()
        torch.autograd.backward(problem.loss(model(x), y))
        opt.step()
        schedule.step()
        middle = time.process_time()
        if controller is not None:
            controller.step()
        run.training_seconds += middle - start
        run.control_seconds += time.process_time() - middle
        if step % problem.measure == 0:
            run.steps.append(step)
            run.sharpness.append(probe.measure(opt))
            run.lr.append(opt.param_groups[0]["lr"])
            run.e.append(opt.param_groups[0]["extrapolation"])
    opt.eval()
    with torch.no_grad():
        run.loss = problem.loss(model(data[0][:4096]), data[1][:4096]).item()
    whole = operator(problem, model, data, 4096)
    run.whole = ef.curvature.eigsh(whole, 1, tol=3e-3, check_multiplicity=False).values[0].item()
    if controller is not None:
        run.checks = [(c.step, c.sharpness, c.edge, c.matvecs) for c in controller.history]
    return run


def table(runs: dict[str, list[Run]]) -> str:
    """Return a Markdown table with a row for each problem and kind of run."""
    lines = [
        "| problem | run | steps within 10% | in the last half | last sharpness | the same, 4,096 "
        "samples | training loss | time of the control | products a check |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]

    def text(values: list[float], form: str = "{:.2f}") -> str:
        mean, ends = statistics.fmean(values), (min(values), max(values))
        return (
            f"{form} [{form}, {form}]".format(mean, *ends) if len(values) > 1 else form.format(mean)
        )

    for name, all_runs in runs.items():
        problem = PROBLEMS[name]
        for kind in COLORS:
            some = [run for run in all_runs if run.name == kind]
            control, products = "", ""
            if kind == "controlled":
                shares = [run.control_seconds / run.training_seconds for run in some]
                control = text([100 * share for share in shares], "{:.1f}") + "%"
                counts = [check[3] for run in some for check in run.checks]
                checks = len(counts) / len(some)
                products = f"{statistics.fmean(counts):.1f}, in {checks:.0f} checks"
            lines.append(
                f"| {problem.title}, target {problem.target:g} | {kind} "
                f"| {text([100 * run.within(problem.target) for run in some], '{:.0f}')}% "
                f"| {text([100 * late_share(run, problem.target) for run in some], '{:.0f}')}% "
                f"| {text([run.sharpness[-1] for run in some])} "
                f"| {text([run.whole for run in some])} "
                f"| {text([run.loss for run in some], '{:.3f}')} | {control} | {products} |"
            )
    return "\n".join(lines) + "\n"


def draw(runs: dict[str, list[Run]], path: Path) -> None:
    """Draw sharpness over steps with the target's band, above e and lr, for the first seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(runs), 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(runs), squeeze=False, height_ratios=(2, 1), sharex="col")
    for (upper, lower), (name, all_runs) in zip(axes.T, runs.items(), strict=True):
        problem = PROBLEMS[name]
        band = (1 - BAND) * problem.target, (1 + BAND) * problem.target
        upper.axhspan(*band, color=COLORS["controlled"], alpha=0.15, label="target, 10%")
        for run in reversed([run for run in all_runs if run.seed == all_runs[0].seed]):
            upper.plot(run.steps, run.sharpness, color=COLORS[run.name], label=run.name, lw=1.2)
        upper.set_title(problem.title, size=10)
        upper.set_ylim(0, 3 * problem.target)
        controlled = all_runs[0]
        lower.plot(controlled.steps, controlled.lr, color="#009e73", label="lr")
        lower.plot(
            controlled.steps, controlled.e, color=COLORS["controlled"], label="e, controlled"
        )
        lower.set_ylim(bottom=0)
        lower.set_xlabel("training step")
    axes[0, 0].set_ylabel("sharpness of x on the probe")
    axes[0, 0].legend(frameon=False, loc="lower right", fontsize=8)
    axes[1, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def write(runs: dict[str, list[Run]], folder: Path) -> None:
    """Write figure, table and measurements of the problems so far."""
    draw(runs, folder / "sharpness_control.png")
    (folder / "sharpness_control.md").write_text(table(runs))
    records = {name: [asdict(run) for run in some] for name, some in runs.items()}
    (folder / "sharpness_control.json").write_text(json.dumps(records))


def main() -> None:
    """Train, and write figure, table and measurements."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where figure, table and measurements go")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the data")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the numbers of steps")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    runs: dict[str, list[Run]] = {}
    for name in args.problems:
        problem = PROBLEMS[name]
        problem = replace(problem, steps=round(args.scale * problem.steps))
        data = problem.data(args.data)
        runs[name] = []
        for seed in range(args.seeds):
            for kind in COLORS:
                runs[name].append(run := train(problem, data, kind, seed))
                share = 100 * run.within(problem.target)
                print(f"{name}, seed {seed}, {kind}: {share:.0f}% of steps within 10%", flush=True)
        write(runs, args.folder)
    print(table(runs))


if __name__ == "__main__":
    main()
