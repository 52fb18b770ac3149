"""timm: its optimizer factory, and its loss scaler. See docs/integrations/timm.md."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from eigenfilter import optimizers
from eigenfilter.integrations._extras import imports_of
from eigenfilter.integrations._loss_functions import evaluate
from eigenfilter.integrations._window import Window, optimizer_of
from eigenfilter.optimizers import registry
from eigenfilter.optimizers.base import EigenfilterOptimizer

with imports_of("timm"):
    from timm.optim import OptimInfo
    from timm.optim._optim_factory import default_registry
    from timm.utils import NativeScaler, dispatch_clip_grad


def register() -> tuple[str, ...]:
    """Register the optimizers of this library with `timm.optim.create_optimizer_v2`.

    The names are those of the classes in lower case, and "asam"; `SGD` and `AdamW` are "efsgd" and
    "efadamw". (timm reads only what follows the last underscore of a name: "two_step_usam" would be
    "usam".) All arguments of an optimizer can be given:

        timm.optim.create_optimizer_v2(model, opt="usam", lr=0.1, weight_decay=1e-4, rho=0.05)

    As for its own optimizers, timm sets a momentum of 0.9 unless another is given.

    Returns:
        The names that were registered.

    Raises:
        RuntimeError: timm has another optimizer of one of these names.
    """
    infos = list(_infos())
    for info in infos:
        known = default_registry._optimizers.get(info.name)
        if known is not None and known != info:
            raise RuntimeError(
                f"timm has another optimizer that is named {info.name!r}: construct ours itself, "
                f"on timm.optim.param_groups_weight_decay(model, weight_decay)"
            )
        if known is None:
            default_registry.register(info)
    return tuple(info.name for info in infos)


def _infos() -> Iterator[OptimInfo]:
    # The base has no method, and SharpnessAware takes another optimizer.
    others = EigenfilterOptimizer, optimizers.SharpnessAware
    for name in optimizers.__all__:
        optimizer = getattr(optimizers, name)
        is_class = isinstance(optimizer, type) and issubclass(optimizer, EigenfilterOptimizer)
        if is_class and optimizer not in others:
            yield _info(name.lower(), optimizer, {})
    for name, (method, options) in registry.VARIANTS.items():
        yield _info(name, registry.OPTIMIZERS[method], dict(options))


def _info(name: str, optimizer: Callable[..., Any], defaults: dict[str, Any]) -> OptimInfo:
    arguments = inspect.signature(optimizer).parameters
    summary = (inspect.getdoc(optimizer) or "").partition("\n")[0]
    return OptimInfo(
        name=f"ef{name}" if name in ("sgd", "adamw") else name.replace("_", ""),
        opt_class=optimizer,
        description=f"eigenfilter: {summary}",
        has_eps="eps" in arguments,
        has_momentum="momentum" in arguments,
        has_betas="betas" in arguments,
        defaults=defaults or None,
    )


class SharpnessAwareScaler(NativeScaler):  # type: ignore[misc]
    """timm's `NativeScaler` for methods with ascents.

    It is called with the function that computes the loss in the place of the loss, because the
    loss of every micro-batch of a step is needed at perturbed weights too:

        loss_scaler = SharpnessAwareScaler(model, device="cuda")
        loss = loss_scaler(forward, optimizer, clip_grad=1.0, parameters=model.parameters(),
                           need_update=need_update, batch=(input, target))

    The gradient of the descent alone is clipped, running statistics stay those of x, and after an
    update the model is at x, where `ModelEmaV3` sees it. An optimizer of another library steps as
    with timm's scaler.

    Args:
        model: model whose running statistics are preserved, as DDP has wrapped it.
        device: type of the device of the loss.
        enabled: whether to scale the loss, for float16. False also replaces the branch of a
            training loop without a scaler.
    """

    def __init__(self, model: nn.Module, device: str = "cuda", enabled: bool = True) -> None:
        self.model = model
        self._scaler = torch.amp.GradScaler(device=device, enabled=enabled)
        self._windows: dict[int, Window] = {}

    def __call__(
        self,
        forward: Callable[..., Tensor],
        optimizer: torch.optim.Optimizer,
        clip_grad: float | None = None,
        clip_mode: str = "norm",
        parameters: Iterable[Tensor] | None = None,
        create_graph: bool = False,
        need_update: bool = True,
        *,
        batch: tuple[Any, ...] | list[Any] = (),
    ) -> Tensor:
        """Evaluate a micro-batch, and update the weights after the last one of a step.

        Args:
            forward: function that computes the loss of the micro-batch, divided by the number of
                micro-batches. It is called again later, when variables of the loop have other
                values: it must take the batch as arguments.
            optimizer, clip_grad, clip_mode, parameters, create_graph, need_update: those of
                `NativeScaler`.
            batch: tuple or list of the arguments of `forward`; later evaluations get copies of
                them.

        Returns:
            The loss of the micro-batch at x, detached.

        Raises:
            TypeError: `forward` is the loss itself, or returns no tensor; or `batch` is no tuple
                and no list.
            RuntimeError: a variable that `forward` reads was assigned, or a tensor that it reads
                was written, after its first call of this step; or an argument was computed from
                trained parameters.
            ValueError: `clip_grad` was given without `parameters`, or the optimizer has
                `release_gradients`.
        """
        if not callable(forward):
            raise TypeError(
                "SharpnessAwareScaler takes the function that computes the loss, and was given "
                f"{type(forward).__name__}: loss = loss_scaler(forward, optimizer, ...)"
            )
        if not isinstance(batch, (tuple, list)):
            raise TypeError(
                "batch is the tuple of the arguments of the function that computes the loss, and "
                f"was given {type(batch).__name__}: loss_scaler(forward, optimizer, ..., "
                "batch=(input, target)); a mapping or a tensor that is the only argument is "
                "batch=(inputs,)"
            )
        if clip_grad is not None and parameters is None:
            raise ValueError("clip_grad needs the parameters whose gradients are clipped")
        inner = optimizer_of(optimizer)
        descent: AbstractContextManager[None] = nullcontext()

        def backward(loss: Tensor) -> None:
            graph = create_graph or (inner is not None and inner.needs_graph)
            torch.autograd.backward(self._scaler.scale(loss), create_graph=graph)

        if inner is None:
            loss = forward(*batch)
            backward(loss)
            loss = loss.detach()
        else:
            window = self._windows.setdefault(id(inner), Window(self.model, inner))
            loss = evaluate(window, forward, tuple(batch), {}, backward)
            if need_update:
                del self._windows[id(inner)]  # which would keep the optimizer alive
            descent = window.descent(self._scaler)
        if need_update:
            with descent:
                self._update(optimizer, clip_grad, clip_mode, parameters)
        return loss

    def _update(
        self,
        optimizer: torch.optim.Optimizer,
        clip_grad: float | None,
        clip_mode: str,
        parameters: Iterable[Tensor] | None,
    ) -> None:
        if clip_grad is not None:
            self._scaler.unscale_(optimizer)
            dispatch_clip_grad(parameters, clip_grad, mode=clip_mode)
        self._scaler.step(optimizer)
        self._scaler.update()
