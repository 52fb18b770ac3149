"""An optimizer between its steps: groups, gradients and state; refused while it is perturbed."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from eigenfilter import _core, _distributed, kernels
from eigenfilter.optimizers._accumulation import UsedGradients, any_nonzero, zero_gradients
from eigenfilter.optimizers._buffers import refuse_overlap
from eigenfilter.optimizers._compression import (
    CORRECTION,
    Formats,
    expanded_entry,
    master_weight,
    set_apart,
    set_master_weight,
)
from eigenfilter.optimizers._norms import clip
from eigenfilter.optimizers._shards import ParentOptimizer, other_ranks_wait
from eigenfilter.optimizers._step_state import StepState, through_owner
from eigenfilter.optimizers.amp import AmpState, is_enabled
from eigenfilter.optimizers.buckets import Gradients, ParamBuckets
from eigenfilter.optimizers.hyperparameters import (
    CHECKED,
    DTYPES,
    check_hyperparameters,
    explain_options,
    is_zero,
    lr_is_zero,
    refuse_modes,
    remember_lrs,
    rho_of,
    show_options,
)
from eigenfilter.optimizers.in_backward import GradientRelease
from eigenfilter.optimizers.perturbation import Perturbation
from eigenfilter.optimizers.updates import Update


class GroupedOptimizer(torch.optim.Optimizer):
    """torch's optimizer, whose groups and state cannot change while parameters are perturbed.

    Attributes:
        perturbation: the method's ascents.
    """

    perturbation: Perturbation
    backend: str | None
    master_weight_bits: int | None = None
    state_bits: int | None = None
    skip_nonfinite: bool
    release_gradients: bool
    set_to_none: bool
    _update: Update
    _constructed = False

    def __init_subclass__(cls, **kw: Any) -> None:
        super().__init_subclass__(**kw)
        cls.__doc__ = explain_options(cls.__doc__)
        if "__init__" in vars(cls):
            show_options(cls.__init__)

    def _start(self) -> None:
        """Make the parts of a step, which are never saved."""
        self._checked_values: dict[int, list[Any]] = {}  # by id of a group: those that passed
        self._step_state = StepState(self)
        self._used = UsedGradients()
        self._amp = AmpState()
        self._parent = ParentOptimizer(self)
        formats = Formats(self.master_weight_bits, self.state_bits, self._update.roots)
        self._buckets = ParamBuckets(self._update, self._amp, self.backend, formats)
        self._release = GradientRelease(self._buckets, self._amp)

    @property
    def perturbed(self) -> bool:
        """Whether the parameters are perturbed."""
        return bool(self._buckets.perturbed)

    def _perturbed_ids(self) -> set[int]:
        return self._buckets.perturbed_ids()

    def _refuse_perturbed(self, what: str) -> None:
        if self.perturbed:
            raise RuntimeError(
                f"{what} while the parameters are perturbed: first end the step with step(), or "
                "go back with restore()"
            )

    # Groups.

    @through_owner
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its hyperparameters are checked as the constructor's are.

        Raises:
            TypeError: a parameter is sparse, complex or of an unsupported dtype.
            ValueError: a hyperparameter is out of its range.
            RuntimeError: the parameters are perturbed.
        """
        self._refuse_perturbed("add_param_group()")
        self._add_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except BaseException:
            self.param_groups.pop()
            raise
        remember_lrs(self)

    def current_groups(self) -> list[dict[str, Any]]:
        """The groups, each with the rho of its next ascent, also where rho follows lr."""
        for group in self.param_groups:
            rho_of(group)
        return self.param_groups

    def _add_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _ascents_wanted(self) -> int:
        if all(is_zero(rho_of(group)) for group in self.param_groups):
            return 0
        return self.perturbation.count

    def _check_group(self, group: dict[str, Any]) -> None:
        self._check_hyperparameters(group)
        for device in {p.device for p in group["params"] if p.device.type != "meta"}:
            kernels.select(device, self.backend)
        for i, p in enumerate(group["params"]):
            if p.layout != torch.strided or p.dtype not in DTYPES:
                raise TypeError(
                    f"parameter {i} of the group is {p.dtype}, {p.layout}: the optimizers take "
                    "dense float32, float64, bfloat16 and float16 parameters; give the others to "
                    "an optimizer of their own"
                )
            if p.dtype == torch.float64 and self.state_bits is not None:
                raise TypeError(
                    f"parameter {i} of the group is float64, and state_bits={self.state_bits} "
                    "keeps its state in fewer bits than its arithmetic: leave state_bits None"
                )
        if self._constructed:
            refuse_overlap(self.param_groups)

    def _check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_hyperparameters(group)
        refuse_modes(group)
        self._check_extrapolation(group)

    def _check_extrapolation(self, group: dict[str, Any]) -> None:
        if group.get("extrapolation"):
            raise ValueError(
                "extrapolation is an option of eigenfilter.SGD and AdamW: leave it out, or use one "
                "of them"
            )

    def _check_groups(self) -> None:
        """Raise TypeError or ValueError for a hyperparameter that was changed to a bad value."""
        for group in self.current_groups():
            values = [group.get(name) for name in CHECKED]
            values += [
                p.dtype for p in group["params"][:1]
            ]  # model.to(dtype) changes them in place
            checked = self._checked_values.get(id(group))
            if checked is None or not all(map(operator.is_, values, checked)):
                self._check_hyperparameters(group)
                # Tensors and lists may change in place.
                if not any(isinstance(v, (Tensor, list)) for v in values):
                    self._checked_values[id(group)] = values

    # The next gradient.

    @property
    @through_owner
    def phase(self) -> str:
        """The use of the next gradient: "ascent" or "descent"."""
        step = self._step_state
        ascends = step.ascents_taken < self._ascents_wanted() and not step.skips_ascents
        return "ascent" if ascends else "descent"

    @property
    @through_owner
    def needs_graph(self) -> bool:
        """Whether the next gradient must be differentiable itself.

        It is meant for `loss.backward(create_graph=opt.needs_graph)`, and is False unless a method
        takes exact Hessian-vector products.
        """
        taken = self._step_state.ascents_taken
        return self.phase == "ascent" and self.perturbation.needs_graph(taken)

    @through_owner
    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """A context for every call of the closure in the explicit form.

        Both evaluations of a finite difference draw the same random numbers from torch in it.
        `release_gradients` releases gradients in this context alone.
        """
        context: AbstractContextManager[None] = nullcontext()
        ascends = self.phase == "ascent"
        if self.release_gradients and (self.perturbation.is_elementwise or not ascends):
            context = self._release.during_backward(self)
        elif ascends:
            index = self._step_state.ascents_taken
            context = self.perturbation.evaluation_context(index, self._params())
        with context:
            yield

    @through_owner
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set the gradients of all parameters to None, or to 0 in place."""
        super().zero_grad(set_to_none)
        self._step_state.clears += 1
        self._used.forget()

    def _clear_gradients(self) -> None:
        self._used.forget()
        for group in self.param_groups:
            if self.set_to_none:
                _core.clear_gradients(group["params"])
            else:
                zero_gradients(group["params"])

    @through_owner
    def clip_grad_norm_(
        self, max_norm: float, grad_scaler: torch.amp.GradScaler | None = None
    ) -> Tensor:
        """Clip the descent gradient to a total norm, in place, as torch.nn.utils.clip_grad_norm_.

        Args:
            max_norm: largest norm over all parameters of all groups.
            grad_scaler: scaler whose scale the gradients carry; it unscales them first.

        Returns:
            The total norm before clipping, a 0-dim float64 tensor.

        Raises:
            RuntimeError: the next gradient is an ascent's, which the methods take unclipped; or
                `release_gradients` is set.
        """
        if self.release_gradients:
            raise RuntimeError(
                "release_gradients=True applies each gradient before the total norm is known: "
                "leave it False to clip"
            )
        self._parent.refuse_clipping(self, self._params())
        if self.phase == "ascent":
            raise RuntimeError(
                "clip_grad_norm_ clips the descent gradient: call it after the ascents, just "
                "before step()"
            )
        if grad_scaler is not None:
            grad_scaler.unscale_(self)
            self._step_state.is_unscaled = grad_scaler.is_enabled()
        return clip(self._buckets.with_gradients(self), max_norm)

    @property
    def skipped(self) -> int:
        """The number of steps skipped for a gradient that was not finite (synchronizes)."""
        return self._amp.skipped()

    def _refuse_ascent(self) -> None:
        """Raise RuntimeError where an ascent needs more than the gradients of this rank."""
        flat = self._params() if self._buckets.are_flat else []
        self._parent.refuse_ascent(self, flat, self.perturbation.needs_norm)

    def _refuse_norm(self, params: list[Tensor]) -> None:
        """Raise RuntimeError where the update needs a norm over what other ranks have."""
        if self._update.needs_norm:
            self._parent.refuse_norm(self, params)

    def _other_ranks_wait(self, grad_scaler: torch.amp.GradScaler | None = None) -> bool:
        """Whether other ranks, which may have gradients, wait for this one without a gradient."""
        checks = self.skip_nonfinite or is_enabled(grad_scaler) or self._update.needs_norm
        return other_ranks_wait(checks or bool(self._step_state.with_local_ascents), self._params())

    # State.

    @through_owner
    def state_dict(self) -> dict[str, Any]:
        """State and hyperparameters in the torch optimizer's form, without backups.

        States of 8 bits are float32 numbers in it, exactly those that the codes stand for, so that
        other optimizers, and other shardings, can load them: see `compressed_state_dict`.

        Raises:
            RuntimeError: the parameters are perturbed, as the model's own state_dict would be.
        """
        saved = self.compressed_state_dict()
        moments = self._update.moments
        state = {key: expanded_entry(entry, moments) for key, entry in saved["state"].items()}
        saved["state"] = state
        return saved

    @through_owner
    def compressed_state_dict(self) -> dict[str, Any]:
        """The state_dict with states of 8 bits as their codes and scales.

        `load_state_dict` takes it, with any `state_bits`. Under FSDP2 it must be loaded with the
        sharding that it was saved with, because the scales belong to the shards.

        Raises:
            RuntimeError: the parameters are perturbed, as the model's own state_dict would be.
        """
        self._refuse_perturbed("state_dict()")
        return super().state_dict()

    @through_owner
    @torch.no_grad()
    def master_weights(self) -> list[Tensor]:
        """The master weights, in the order of the parameters in the groups, in new memory.

        They are float32, and float64 for parameters of it; without `master_weight_bits` they are
        the parameters, converted.

        Raises:
            RuntimeError: the parameters are perturbed.
        """
        self._refuse_perturbed("master_weights()")
        return [master_weight(p, self.state.get(p, {})) for p in self._params()]

    @through_owner
    @torch.no_grad()
    def load_master_weights(self, weights: Iterable[Tensor]) -> None:
        """Set the parameters and their corrections to float32 weights, rounded to nearest.

        Args:
            weights: like `master_weights()`, from a checkpoint of any precision.

        Raises:
            RuntimeError: the parameters are perturbed.
            ValueError: their number, or the shape of one, is not the parameters'.
        """
        self._refuse_perturbed("load_master_weights()")
        params, weights = self._params(), list(weights)
        shapes = [tuple(w.shape) if isinstance(w, Tensor) else None for w in weights]
        if shapes != [tuple(p.shape) for p in params]:
            raise ValueError(
                f"there are {len(params)} parameters and {len(weights)} weights, of shapes that "
                "are not theirs: pass a tensor for every parameter, in the order of the groups"
            )
        self._corrections()
        for p, weight in zip(params, weights, strict=True):
            set_master_weight(p, self.state.get(p, {}), weight)
        self._buckets.refresh(self)
        self._buckets.mark_written(self._buckets.built)

    @through_owner
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class or of the torch optimizer.

        A hyperparameter that its groups lack, such as rho in torch's, keeps its value.

        Raises:
            RuntimeError: the parameters are perturbed.
            ValueError: the groups do not match, or were saved ahead of x by another method.
        """
        self._refuse_perturbed("load_state_dict()")
        state_dict = fill_missing_keys(self, state_dict)
        for group in state_dict.get("param_groups", ()):
            refuse_modes(group)
            self._update.refuse_extrapolated(group)
        formats = self._buckets.store.formats
        state_dict, apart = set_apart(state_dict, self._params(), formats, self._update.moments)
        super().load_state_dict(state_dict)
        for p, entry in apart:
            if entry:
                self.state[p].update(entry)
        remember_lrs(self)

    def _corrections(self) -> list[Tensor]:
        """The corrections on this rank, of all parameters that have one."""
        formats = self._buckets.store.formats
        params = [p for p in self._params() if formats.correction(p) is not None]
        return [_distributed.local(formats.fit(CORRECTION, p, self.state[p])) for p in params]

    def _only_initializes_state(self, gradients: Gradients) -> bool:
        """Whether this is the step with which distributed checkpointing creates the state.

        Every lr and every gradient is 0 then. The state is created as zeros.
        """
        if self.perturbed or not all(lr_is_zero(g.get("lr", 1.0)) for g in self.param_groups):
            return False
        if any_nonzero([g for _, grads in gradients for g in grads]):
            return False
        self._initialize_state(gradients)
        return True

    def _initialize_state(self, gradients: Gradients) -> None:
        for bucket, _ in gradients:
            self._update.initialize_state(bucket)
        self._buckets.store.snapshot_if_changed()

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_perturbed("copying or pickling")
        names = (*OWN_OPTIONS, "perturbation", "_update")
        return super().__getstate__() | {name: vars(self)[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_step_state" not in vars(self):  # a copy; a loaded optimizer keeps its own
            self._start()


OWN_OPTIONS = (
    *("skip_nonfinite", "release_gradients", "set_to_none", "backend"),
    *("master_weight_bits", "state_bits"),
)
"""The options that the optimizer itself holds, and not its groups."""


def fill_missing_keys(
    optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]
) -> dict[str, Any]:
    """Add to the groups of a state_dict the hyperparameters that only the optimizer's have."""
    groups = state_dict.get("param_groups", ())  # a wrapper may have a form of its own
    if len(groups) != len(optimizer.param_groups):
        return state_dict
    own = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    joined = [present | loaded for present, loaded in zip(own, groups, strict=True)]
    return state_dict | {"param_groups": joined}
