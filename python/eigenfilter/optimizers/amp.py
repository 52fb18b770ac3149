"""Loss scales and non-finite gradients: the state that a step keeps on the device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eigenfilter import _distributed

if TYPE_CHECKING:
    from eigenfilter.optimizers._step_state import StepState
    from eigenfilter.optimizers.buckets import Gradients


class AmpState:
    """The loss scale and the flag for a non-finite gradient of this step, on every device.

    Flags are one-element float32 tensors that kernels read on their device. Only `skipped` and
    `is_skipped` wait for a device. The ranks share their flags, so that all of them skip a step or
    none does.

    Attributes:
        is_scaled: whether the present gradients carry a loss scale.
    """

    def __init__(self) -> None:
        self.is_scaled = False
        self._scales: dict[torch.device, Tensor] = {}
        self._flags: dict[torch.device, Tensor] = {}
        self._skipped: dict[torch.device, Tensor] = {}

    def begin(self) -> None:
        """Begin a step without a scale and without a flag."""
        self.is_scaled = False
        self._scales.clear()
        self._flags.clear()

    def adopt_scale(
        self, scaler: torch.amp.GradScaler | None, devices: Iterable[torch.device], step: StepState
    ) -> None:
        """Read an ascent's scale from its scaler, without a synchronization."""
        is_scaled = is_enabled(scaler)
        self._require_agreement(is_scaled, step)
        self.is_scaled = is_scaled
        self._scales.clear()
        if scaler is not None and is_scaled:
            for device in devices:
                one = torch.ones((), dtype=torch.float32, device=device)
                self._scales[device] = scaler.scale(one).detach()

    def adopt_scaler_state(
        self,
        optimizer: torch.optim.Optimizer,
        devices: Iterable[torch.device],
        step: StepState,
        *,
        are_shards: bool,
    ) -> None:
        """Read the descent's scale and flag, which `scaler.step` sets on the optimizer.

        If the parameters are shards, each rank's scaler has checked its own only.
        """
        self._require_agreement("found_inf" in vars(optimizer), step)
        self._scales.clear()
        scale, flag = vars(optimizer).get("grad_scale"), vars(optimizer).get("found_inf")
        if scale is not None and step.is_unscaled:
            raise RuntimeError(
                "clip_grad_norm_ has unscaled the gradients for one optimizer, and the scaler "
                "steps with a wrapper of it: call scaler.unscale_(wrapper) instead, and clip with "
                "torch.nn.utils.clip_grad_norm_"
            )
        for device in devices:
            if isinstance(scale, Tensor):
                self._scales[device] = scale.to(device, torch.float32)
            if isinstance(flag, Tensor):
                self._make_flag(device).add_(flag.to(device, torch.float32).reshape(()))
        if isinstance(flag, Tensor) and are_shards:
            self._share_flags()

    def _require_agreement(self, is_scaled: bool, step: StepState) -> None:
        if step.ascents_taken > 0 and is_scaled != self.is_scaled:
            raise RuntimeError(
                "the ascents and the step must agree on the scaler: pass grad_scaler= to every "
                "ascend() and end the step with grad_scaler.step(opt), or use none"
            )

    def check_finite(self, gradients: Gradients, devices: Iterable[torch.device]) -> None:
        """Flag the step if a gradient is not finite, on this rank or on another one.

        Every rank has to call this, even one without a gradient. `devices` are the devices of its
        parameters, at least one.
        """
        for device in devices:
            self._make_flag(device)
        for bucket, grads in gradients:
            bucket.kernels.flag_nonfinite(grads, self._make_flag(bucket.device))
        self._share_flags()

    def scalars(self, device: torch.device) -> dict[str, Tensor | None]:
        """The kernels' `grad_scale` and `found_inf` on a device."""
        return {"grad_scale": self._scales.get(device), "found_inf": self._flags.get(device)}

    def flag(self, device: torch.device) -> Tensor | None:
        """The flag on a device, or None if no gradient is checked in this step."""
        return self._flags.get(device)

    def unscale(self, value: Tensor | float, device: torch.device) -> Tensor | float:
        """A value on a device, divided by the scale that the present gradients carry."""
        scale = self._scales.get(device)
        return value if scale is None else value / scale.double()

    def is_skipped(self, device: torch.device) -> bool:
        """Whether the step is skipped; waits for the device if there is a flag."""
        return device in self._flags and bool(self._flags[device])

    def count_skipped(self) -> None:
        """Count the step if it was skipped."""
        for device, flag in self._flags.items():
            if device not in self._skipped:
                self._skipped[device] = torch.zeros((), dtype=torch.int64, device=device)
            self._skipped[device].add_(flag != 0)

    def skipped(self) -> int:
        """The number of skipped steps."""
        return max((int(n) for n in self._skipped.values()), default=0)

    def _make_flag(self, device: torch.device) -> Tensor:
        if device not in self._flags:
            self._flags[device] = torch.zeros((), dtype=torch.float32, device=device)
        return self._flags[device]

    def _share_flags(self) -> None:
        """Give all devices and ranks the largest of their flags."""
        flags = list(self._flags.values())
        for other in flags[1:]:
            flags[0].add_(other.to(flags[0].device))
        _distributed.max_over_ranks(flags[0])
        for other in flags[1:]:
            other.copy_(flags[0])


def is_enabled(scaler: torch.amp.GradScaler | None) -> bool:
    """Whether there is a scaler that scales."""
    return scaler is not None and scaler.is_enabled()


def refuse_unscaled(
    optimizers: Iterable[torch.optim.Optimizer], scaler: torch.amp.GradScaler | None
) -> None:
    """Raise if `scaler.unscale_` was called for an ascent's gradient.

    The scaler would then take the descent's gradient, which is still scaled, for unscaled.

    Args:
        optimizers: an optimizer and its wrapper: the scaler knows the one that it was given.
        scaler: the scaler, or None.
    """
    if scaler is None or not scaler.is_enabled():
        return
    stages = [scaler._per_optimizer_states[id(optimizer)]["stage"] for optimizer in optimizers]
    if any(stage.name == "UNSCALED" for stage in stages):
        raise RuntimeError(
            "grad_scaler.unscale_() was called for an ascent's gradient, which ascend() unscales "
            "itself: call unscale_(), or opt.clip_grad_norm_(max_norm, scaler), only after the "
            "last ascent"
        )


SCALER_ATTRIBUTES = ("grad_scale", "found_inf")
"""The attributes that a GradScaler sets on its optimizer during a step."""


def copy_scaler_attributes(wrapper: torch.optim.Optimizer, owner: torch.optim.Optimizer) -> None:
    """Copy a GradScaler's attributes from the wrapper that it was given."""
    vars(owner).update({k: v for k, v in vars(wrapper).items() if k in SCALER_ATTRIBUTES})


def drop_scaler_attributes(optimizer: torch.optim.Optimizer) -> None:
    """Delete a GradScaler's attributes, which it deletes itself only after a successful step."""
    for name in SCALER_ATTRIBUTES:
        vars(optimizer).pop(name, None)


def refuse_closure(optimizer: torch.optim.Optimizer) -> None:
    """Raise RuntimeError if a GradScaler steps with a closure."""
    if "found_inf" in vars(optimizer):
        raise RuntimeError(
            "a GradScaler cannot step with a closure: take the step in its explicit form, "
            "ascend(grad_scaler=scaler) and scaler.step(opt)"
        )
