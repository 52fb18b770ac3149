"""Training step by step: the network, the optimizer, the schedules, and their state."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor

import eigenfilter as ef
from eigenfilter.curvature import HessianOperator
from eigenfilter.experiments import factories, validation
from eigenfilter.experiments.config import Config
from eigenfilter.experiments.datasets import ImageDataset
from eigenfilter.experiments.errors import UserError
from eigenfilter.experiments.image_batches import Augmentation, Batches, Normalizer, in_order
from eigenfilter.experiments.networks import build
from eigenfilter.experiments.processes import SINGLE_PROCESS, Processes
from eigenfilter.optimizers.extrapolation import at_x
from eigenfilter.optimizers.hyperparameters import rho_key


class Diverged(UserError):
    """The loss or a parameter is no longer finite."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(what)
        self.step = step


class Trainer:
    """Trains a network on image batches, one step at a time.

    `advance()` takes a step without waiting for the device; `drain()` waits and returns the
    metrics. Networks with dropout draw from torch's global generators; see `reproducible`.

    Args:
        config: the configuration.
        data: the images of `config.dataset`.
        device: the device.
        processes: the processes that share every batch and the test set. Each has this network in
            a Trainer of its own, and all methods except `examples` and `rates` are collective.

    Attributes:
        model, loss_fn, optimizer: the model, its loss and its optimizer.
        step: number of steps taken.
        gradients: number of gradients taken, in units of a whole batch. An ascent on a fraction of
            the batch counts as that fraction; Hessian-vector products of `hvp: autograd` do not
            count.
        steps_per_epoch, total_steps: numbers of steps in an epoch and in the whole training.
        monitor: monitor of the sharpness, with `sharpness_target` its controller, or None.

    Raises:
        ValueError: values of the configuration do not go together.

    Example:
        >>> trainer = Trainer(config, datasets.load(config.dataset), torch.device("cpu"))
        >>> while not trainer.finished:
        ...     trainer.advance()
        >>> trainer.evaluate()
    """

    def __init__(
        self,
        config: Config,
        data: ImageDataset,
        device: torch.device,
        processes: Processes = SINGLE_PROCESS,
    ) -> None:
        self.config, self.device, self._processes = config, device, processes
        self.data = data.first(config.samples)
        _check_config(config, self.data, processes.world_size)
        dtype = torch.float64 if config.precision == "float64" else torch.float32
        model = build(
            config.model,
            self.data.task,
            activation=config.activation,
            dropout=config.dropout,
            seed=config.seed,
        )
        layout = torch.channels_last if config.channels_last else torch.preserve_format
        self.model = model.to(device, dtype, memory_format=layout)  # type: ignore[call-overload]
        self._normalizer = Normalizer(self.data, device, dtype, config.channels_last)
        self._batches = Batches(
            self.data,
            config.batch_size,
            Augmentation(config.crop, config.flip, config.cutout),
            self._normalizer,
            device,
            config.seed,
            processes,
        )
        self._statistics = [b for b in self.model.buffers() if b.is_floating_point()]
        self._network = processes.wrap_model(self.model, self.examples(1)[0])
        self.loss_fn = factories.build_loss(config)
        self.optimizer = factories.build_optimizer(config, self.model.parameters())
        if not config.ascent_sync:
            ef.ascent_sync(self._network, self.optimizer, enabled=False)
        self.batch_size = self._batches.size
        self.steps_per_epoch = self._batches.count
        self.total_steps = config.epochs * self.steps_per_epoch
        self._lr = factories.lr_schedule(config, self.optimizer, self.steps_per_epoch)
        self._rho = factories.rho_schedule(config, self.optimizer, self.steps_per_epoch)
        self.step = 0
        self.gradients = 0.0
        ascents = max(1, round(config.ascent_part * self.batch_size))
        self._ascent_samples = processes.samples_per_process(ascents, "ascent_part")
        # Losses and accuracies of the last steps stay on the device, for this process only.
        # `_collect_metrics` averages them over processes and moves them to `_metrics`.
        self._losses: list[Tensor] = []
        self._accuracies: list[Tensor] = []
        self._metrics: list[tuple[float, float]] = []
        self.monitor = self._monitor() if config.checks_every else None

    @property
    def finished(self) -> bool:
        """Whether all steps have been taken."""
        return self.step >= self.total_steps

    @property
    def rho_is_scheduled(self) -> bool:
        """Whether the optimizer has a rho."""
        return self._rho is not None

    def advance(self) -> None:
        """Take the next step: load a batch, perturb, step, and update the schedules."""
        epoch, index = divmod(self.step, self.steps_per_epoch)
        images, labels = self._batches.batch(epoch, index)
        optimizer = self.optimizer
        try:
            scores, loss = self._evaluate(images, labels)
            self._losses.append(loss.detach())
            hits = scores.detach().argmax(dim=1) == labels[: len(scores)]
            self._accuracies.append(hits.double().mean())
            while optimizer.ascend():
                self._evaluate(images, labels)
            if self.config.clip:
                optimizer.clip_grad_norm_(self.config.clip)
            optimizer.step()
        except BaseException:
            optimizer.restore()
            raise
        self._lr.step()
        if self._rho is not None:
            self._rho.step()
        self.step += 1

    def drain(self) -> dict[str, float]:
        """Return the mean training loss and accuracy of the steps since the last call.

        Both are measured on the batch of a step before its update. If ascents use a fraction of
        the batch, they are measured on this fraction.

        Raises:
            Diverged: a loss is not finite; the message names the first such step.
        """
        self._collect_metrics()
        losses, accuracies = zip(*self._metrics, strict=True)
        self._metrics = []
        n = len(losses)
        return {"loss": sum(losses) / n, "accuracy": sum(accuracies) / n}

    @property
    def pending(self) -> int:
        """The number of steps since the last call of `drain`."""
        return len(self._metrics) + len(self._losses)

    def check(self) -> None:
        """Check that losses since the last `drain` and all parameters are finite.

        Raises:
            Diverged: one is not.
        """
        self._collect_metrics()
        norms = torch._foreach_norm([p.detach() for p in self.model.parameters()])
        if not bool(torch.stack(norms).isfinite().all()):
            raise Diverged(f"a parameter is not finite after step {self.step}", self.step)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the loss and the accuracy on the test set, in evaluation mode."""
        loss = torch.zeros((), device=self.device, dtype=torch.float64)
        correct = torch.zeros((), device=self.device, dtype=torch.int64)
        data, part = self.data, self._processes.sample_slice
        with self._evaluation_mode():
            for images, labels in in_order(
                data.test_images[part], data.test_labels[part], self._normalizer, self.device
            ):
                with self._autocast():
                    scores = self.model(images)
                    loss += len(labels) * self.loss_fn(scores, labels)
                correct += (scores.argmax(dim=1) == labels).sum()
        loss, correct = map(self._processes.all_reduce, (loss, correct))
        n = len(data.test_labels)
        return {"loss": float(loss) / n, "accuracy": float(correct) / n}

    @contextmanager
    def _evaluation_mode(self) -> Iterator[None]:
        """A context in which the model is in evaluation mode, and at x if it is extrapolated."""
        self.model.eval()
        try:
            with at_x(self.optimizer):
                yield
        finally:
            self.model.train()

    def examples(self, samples: int) -> tuple[Tensor, Tensor]:
        """Return the first training images, normalized but not augmented, and their labels."""
        some = slice(min(samples, len(self.data.images)))
        images = self.data.images[some].to(self.device)
        return self._normalizer(images), self.data.labels[some].to(self.device)

    def rates(self) -> dict[str, float]:
        """Return the current lr, and the rho and the extrapolation in use, of the first group."""
        group = self.optimizer.param_groups[0]
        names = {"lr": "lr", "rho": rho_key(group)}
        if self.config.extrapolation or self.config.sharpness_target:
            names["extrapolation"] = "extrapolation"
        return {name: float(group[key]) for name, key in names.items() if key in group}

    def controlled(self) -> dict[str, float]:
        """Return the extrapolation or the rho that the controller sets, if there is one."""
        if not self.config.sharpness_target:
            return {}
        rates = self.rates()
        name = "extrapolation" if "extrapolation" in rates else "rho"
        return {name: rates[name]}

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next steps depend on, as tensors and plain data."""
        self._collect_metrics()
        random, *others = self._processes.all_gather(_random_state(self.device))
        return {
            "step": self.step,
            "gradients": self.gradients,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_schedule": {"last_epoch": self._lr.last_epoch},
            "rho_schedule": None if self._rho is None else self._rho.state_dict(),
            "losses": [loss for loss, _ in self._metrics],
            "accuracies": [accuracy for _, accuracy in self._metrics],
            "random": random,
            "others": others,
            "monitor": None if self.monitor is None else self.monitor.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state, including torch's global generators.

        The next steps have the same bits as those of the trainer whose state it is. With another
        number of processes they agree up to rounding. The generators of additional processes are
        left alone.

        Raises:
            ValueError: the state is damaged, or belongs to another model or optimizer. Nothing
                has changed.
        """
        validation.check_trainer(state, self)
        self.model.load_state_dict(dict(state["model"]))
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.gradients = state["gradients"]
        # The parameter groups already have the learning rates of this step. The schedule computes
        # later ones from the number of steps.
        self._lr.last_epoch = state["lr_schedule"]["last_epoch"]
        self._lr._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        if self._rho is not None:
            self._rho.load_state_dict(state["rho_schedule"])
        self._metrics = list(zip(state["losses"], state["accuracies"], strict=True))
        if self.monitor is not None:
            self.monitor.load_state_dict(state["monitor"])
        random = self._processes.own_value([state["random"], *state["others"]])
        if random is not None:
            _set_random_state(random, self.device)

    def _evaluate(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores and loss at the current point, and accumulate gradients by backward."""
        optimizer = self.optimizer
        if optimizer.phase == "ascent":
            images, labels = images[: self._ascent_samples], labels[: self._ascent_samples]
        self.gradients += len(images) / self._batches.share
        frozen = optimizer.perturbed
        with (
            ef.freeze_running_stats(self.model) if frozen else nullcontext(),
            optimizer.evaluation(),
        ):
            optimizer.zero_grad()
            with self._autocast():
                scores = self._network(images)
                loss = self.loss_fn(scores, labels)
            loss.backward(create_graph=optimizer.needs_graph)  # type: ignore[no-untyped-call]
        if not frozen:
            self._processes.all_reduce_mean(self._statistics)
        return scores, loss

    def _autocast(self) -> Any:
        if self.config.precision != "bfloat16":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _collect_metrics(self) -> None:
        """Move the losses and accuracies of the last steps to the host, waiting for the device.

        Raises:
            Diverged: a loss is not finite.
        """
        steps = len(self._losses)
        if not steps:
            return
        local = torch.stack([torch.stack(self._losses).double(), torch.stack(self._accuracies)])
        self._losses, self._accuracies = [], []
        means = self._processes.all_reduce(local.cpu()) / self._processes.world_size
        for i, (loss, accuracy) in enumerate(means.T.tolist()):
            if not math.isfinite(loss):
                step = self.step - steps + i + 1
                raise Diverged(f"the loss of step {step} is {loss}", step)
            self._metrics.append((loss, accuracy))

    def _monitor(self) -> ef.SharpnessMonitor:
        # "auto" chooses an engine by timing, and engines round differently. A fixed engine keeps
        # runs reproducible.
        images, labels = self.examples(self.config.sharpness_samples)
        part = self._processes.sample_slice
        op = HessianOperator(
            self.model,
            self.loss_fn,
            (images[part], labels[part]),
            mode="train",
            engine="cached_graph",
            process_group=self._processes.process_group,
        )
        target, every = self.config.sharpness_target, self.config.checks_every
        if target:
            return ef.SharpnessController(op, self.optimizer, target, every)
        return ef.SharpnessMonitor(op, self.optimizer, every)


@contextmanager
def reproducible(
    config: Config, device: torch.device, processes: Processes = SINGLE_PROCESS
) -> Iterator[None]:
    """Seed torch's generators, and configure its threads and deterministic algorithms.

    All settings are restored at the end.
    """
    cudnn, deterministic = torch.backends.cudnn, cast(Any, torch.utils.deterministic)
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn.benchmark,
        deterministic.fill_uninitialized_memory,
    )
    if config.deterministic and device.type == "cuda":  # cuBLAS reads it at its first use
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    rng = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with rng, threads(config.threads):
        torch.manual_seed(processes.process_seed(config.seed))
        torch.use_deterministic_algorithms(config.deterministic)
        cudnn.benchmark = not config.deterministic
        deterministic.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            cudnn.benchmark = before[2]
            deterministic.fill_uninitialized_memory = before[3]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Use a number of CPU threads inside the context; 0 leaves the number unchanged."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_config(config: Config, data: ImageDataset, processes: int) -> None:
    """Check the configuration against the images and the number of processes.

    Raises:
        ValueError: they do not go together.
    """
    side = min(data.images.shape[2:])
    for name in ("crop", "cutout"):
        if getattr(config, name) > side:
            raise ValueError(f"{name} must be at most the images' side, {side}")
    if config.checks_every and config.sharpness_samples < processes:
        raise ValueError(f"sharpness_samples must be at least 1 for each of {processes} processes")
    if processes > 1 and factories.build_perturbation(config).needs_graph(0):
        raise ValueError(
            "hvp autograd works in a single process only; set hvp to finite_difference"
        )


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
