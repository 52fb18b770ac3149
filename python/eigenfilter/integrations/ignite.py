"""ignite: a trainer for optimizers that take ascents. See docs/integrations/ignite.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from eigenfilter.integrations._extras import imports_of
from eigenfilter.integrations._window import Window, optimizer_of, set_mode

with imports_of("ignite"):
    from ignite.engine import DeterministicEngine, Engine, Events
    from ignite.utils import convert_tensor


def _prepare_batch(
    batch: Sequence[Any], device: str | torch.device | None, non_blocking: bool
) -> tuple[Any, Any]:
    x, y = batch
    return convert_tensor(x, device, non_blocking), convert_tensor(y, device, non_blocking)


def _output(x: Any, y: Any, y_pred: Any, loss: Tensor) -> Any:
    return loss.item()


def create_supervised_trainer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[[Any, Any], Tensor],
    device: str | torch.device | None = None,
    non_blocking: bool = False,
    prepare_batch: Callable[..., Any] = _prepare_batch,
    model_transform: Callable[[Any], Any] = lambda output: output,
    output_transform: Callable[[Any, Any, Any, Tensor], Any] = _output,
    deterministic: bool = False,
    amp_mode: str | None = None,
    scaler: bool | torch.amp.GradScaler = False,
    gradient_accumulation_steps: int = 1,
    model_fn: Callable[[nn.Module, Any], Any] = lambda model, x: model(x),
    *,
    max_norm: float | None = None,
) -> Engine:
    """ignite's `create_supervised_trainer` for methods with ascents.

    Every iteration is one batch, and fires its events once. As in ignite, iterations are counted
    over all epochs, so a step whose batches an epoch does not complete goes on in the next one.
    Running statistics stay those of x, as do buffers of a `loss_fn` that is a module, and
    `engine.state.output` is that at x. The methods `train` and `eval` of a schedule-free base are
    called in each iteration and after each epoch. An optimizer of another library steps as with
    ignite's trainer.

    The arguments that are not described here are ignite's. `model_fn`, `model_transform` and
    `loss_fn` are called at perturbed weights too.

    Args:
        amp_mode: "amp" for autocast on the device's type, or None, which leaves autocast as it is
            around the run.
        scaler: whether to scale the loss, or the GradScaler to use; with `amp_mode="amp"` only.
            If it is True, the engine's state has it as `scaler`.
        max_norm: largest norm of the descent's gradient; None does not clip. ignite has no such
            argument.

    Returns:
        The engine.

    Raises:
        ValueError: `amp_mode` is another one, there is a scaler without it,
            `gradient_accumulation_steps` is not positive, or the optimizer has `release_gradients`.
    """
    if gradient_accumulation_steps <= 0:
        raise ValueError(
            f"gradient_accumulation_steps is {gradient_accumulation_steps}; it must be at least 1"
        )
    if amp_mode not in (None, "amp"):
        raise ValueError(
            f'amp_mode is {amp_mode!r}; a method with ascents trains with "amp" or None'
        )
    if scaler and amp_mode is None:
        raise ValueError('a scaler needs amp_mode="amp"')
    device_type = torch.device("cuda" if device is None else device).type
    is_own_scaler = scaler is True
    if isinstance(scaler, bool):
        scaler = torch.amp.GradScaler(device_type, enabled=scaler)
    grad_scaler = scaler
    inner = optimizer_of(optimizer)
    window = None if inner is None else Window(model, inner, keeps_all=True)

    def update(engine: Engine, batch: Sequence[Any]) -> Any:
        index = (engine.state.iteration - 1) % gradient_accumulation_steps
        if index == 0:
            optimizer.zero_grad()
            if window is not None:
                window.clear()  # batches of a run that ended within a step
        model.train()
        set_mode(optimizer, "train")
        x, y = prepare_batch(batch, device=device, non_blocking=non_blocking)

        def evaluate(batch: tuple[Any, Any]) -> tuple[Any, Tensor]:
            x, y = batch
            with nullcontext() if amp_mode is None else torch.autocast(device_type):
                y_pred = model_transform(model_fn(model, x))
                loss = loss_fn(y_pred, y) / gradient_accumulation_steps
            graph = inner is not None and inner.needs_graph
            torch.autograd.backward(grad_scaler.scale(loss), create_graph=graph)
            return y_pred, loss.detach()

        modules = loss_fn, model_transform, model_fn
        with nullcontext() if window is None else window.recording(evaluate, (x, y), modules):
            y_pred, loss = evaluate((x, y))
        if index == gradient_accumulation_steps - 1:
            with nullcontext() if window is None else window.descent(grad_scaler):
                if max_norm is not None:
                    grad_scaler.unscale_(optimizer)
                    params = [p for group in optimizer.param_groups for p in group["params"]]
                    nn.utils.clip_grad_norm_(params, max_norm)
                grad_scaler.step(optimizer)
                grad_scaler.update()
        return output_transform(x, y, y_pred, loss * gradient_accumulation_steps)

    engine = DeterministicEngine(update) if deterministic else Engine(update)
    engine.add_event_handler(Events.EPOCH_COMPLETED, set_mode, optimizer, "eval")
    if is_own_scaler:
        engine.state.scaler = grad_scaler
    return engine
