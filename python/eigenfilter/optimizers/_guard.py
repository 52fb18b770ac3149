"""Loss scales and non-finite gradients: what a step carries on the device besides gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from eigenfilter import _distributed
from eigenfilter.optimizers._parts import Part


class Guard:
    """The loss scale and the flag "some gradient of this step was not finite", on every device.

    Flags are one-element float32 tensors that kernels read where they are; nothing here waits for a
    device but `skipped` and `skips`. All ranks share a flag, so that all skip a step or none does.
    """

    def __init__(self) -> None:
        self._scaled = False
        self._scales: dict[torch.device, Tensor] = {}
        self._flags: dict[torch.device, Tensor] = {}
        self._skipped: dict[torch.device, Tensor] = {}

    @property
    def scaled(self) -> bool:
        """Whether the present gradients carry a scale."""
        return self._scaled

    def begin(self) -> None:
        """Begin a step: no scale, no flag."""
        self._scaled = False
        self._scales.clear()
        self._flags.clear()

    def take_scale(
        self, scaler: torch.amp.GradScaler | None, devices: Iterable[torch.device], ascended: bool
    ) -> None:
        """Take an ascent's scale from its scaler, without a synchronisation."""
        scaled = scaler is not None and scaler.is_enabled()
        self._require_agreement(scaled, ascended)
        self._scaled = scaled
        self._scales.clear()
        if scaler is not None and scaled:
            for device in devices:
                one = torch.ones((), dtype=torch.float32, device=device)
                self._scales[device] = scaler.scale(one).detach()

    def take_over(
        self,
        optimizer: torch.optim.Optimizer,
        devices: Iterable[torch.device],
        *,
        ascended: bool,
        unscaled: bool,
        shared: bool,
    ) -> None:
        """Take the descent's scale and flag, which `scaler.step` sets on the optimizer.

        Args:
            optimizer: where they are.
            devices: those of its parameters.
            ascended: whether the step has taken ascents.
            unscaled: whether the gradients have been unscaled already.
            shared: whether each rank's scaler has looked at its own shards only.
        """
        self._require_agreement("found_inf" in vars(optimizer), ascended)
        self._scales.clear()
        scale = vars(optimizer).get("grad_scale")
        if scale is not None and unscaled:
            raise RuntimeError(
                "clip_grad_norm_ has unscaled the gradients for one optimizer, and the scaler "
                "steps with a wrapper of it: call scaler.unscale_(wrapper) instead, and clip with "
                "torch.nn.utils.clip_grad_norm_"
            )
        flag = vars(optimizer).get("found_inf")
        for device in devices:
            if isinstance(scale, Tensor):
                self._scales[device] = scale.to(device, torch.float32)
            if isinstance(flag, Tensor):
                self._make_flag(device).add_(flag.to(device, torch.float32).reshape(()))
        if isinstance(flag, Tensor) and shared:
            self._share()

    def _require_agreement(self, scaled: bool, ascended: bool) -> None:
        if ascended and scaled != self.scaled:
            raise RuntimeError(
                "the ascents and the step must agree on the scaler: pass grad_scaler= to every "
                "ascend() and end the step with grad_scaler.step(opt), or use none"
            )

    def look(self, found: list[tuple[Part, list[Tensor]]], devices: Iterable[torch.device]) -> None:
        """Flag the step if a gradient is not finite, here or on another rank.

        Every rank has to call this, one without a gradient too. `devices` are those of its
        parameters, at least one.
        """
        for device in devices:
            self._make_flag(device)
        for part, grads in found:
            part.kernels.flag_nonfinite(grads, self._make_flag(part.device))
        self._share()

    def scalars(self, device: torch.device) -> dict[str, Tensor | None]:
        """The kernels' `grad_scale` and `found_inf` on a device."""
        return {"grad_scale": self._scales.get(device), "found_inf": self._flags.get(device)}

    def flag(self, device: torch.device) -> Tensor | None:
        """The flag on a device, or None if nothing looks."""
        return self._flags.get(device)

    def unscaled(self, value: Tensor | float, device: torch.device) -> Tensor | float:
        """A value on a device, divided by the scale that the present gradients carry."""
        scale = self._scales.get(device)
        return value if scale is None else value / scale.double()

    def skips(self, device: torch.device) -> bool:
        """Whether the step is skipped; waits for the device if there is a flag."""
        return device in self._flags and bool(self._flags[device])

    def count(self) -> None:
        """Count the step if it was skipped."""
        for device, flag in self._flags.items():
            if device not in self._skipped:
                self._skipped[device] = torch.zeros((), dtype=torch.int64, device=device)
            self._skipped[device].add_(flag != 0)

    def skipped(self) -> int:
        """How many steps were skipped."""
        return max((int(n) for n in self._skipped.values()), default=0)

    def _make_flag(self, device: torch.device) -> Tensor:
        if device not in self._flags:
            self._flags[device] = torch.zeros((), dtype=torch.float32, device=device)
        return self._flags[device]

    def _share(self) -> None:
        """Give all devices and ranks the largest of their flags."""
        flags = list(self._flags.values())
        for other in flags[1:]:
            flags[0].add_(other.to(flags[0].device))
        _distributed.any_rank(flags[0])
        for other in flags[1:]:
            other.copy_(flags[0])


def refuse_unscaled(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
    """Raise if `scaler.unscale_(optimizer)` was called for an ascent's gradient.

    The scaler would then take the descent's gradient, which is still scaled, for unscaled.
    """
    if scaler is None or not scaler.is_enabled():
        return
    if scaler._per_optimizer_states[id(optimizer)]["stage"].name == "UNSCALED":
        raise RuntimeError(
            "grad_scaler.unscale_() was called for an ascent's gradient, which ascend() unscales "
            "itself: call unscale_(), or opt.clip_grad_norm_(max_norm, scaler), only after the "
            "last ascent"
        )


HANDED_OVER = ("grad_scale", "found_inf")
"""What a GradScaler sets on the optimizer that it is given, for the time of a step."""


def drop_handed_over(optimizer: torch.optim.Optimizer) -> None:
    """Drop what a GradScaler set on the optimizer: it does so only after a step that works."""
    for name in HANDED_OVER:
        vars(optimizer).pop(name, None)
