"""Updates: what changes x, with the gradient that was taken at a perturbed point."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from eigenfilter import _core, _distributed
from eigenfilter.kernels.conventions import arithmetic_dtype
from eigenfilter.optimizers._step_counts import StepCounts
from eigenfilter.optimizers.amp import AmpState
from eigenfilter.optimizers.buckets import BucketSlice, Directions, ParamBucket, ParamBuckets

MOMENTUM = "momentum_buffer"
EXTRAPOLATION = "extrapolation"  # that a group should have
EXTRAPOLATED = "extrapolated"  # that its parameters have
EXTRAPOLATED_RHO = "extrapolated_rho"  # the radius of MSAM that its parameters have
EXP_AVG, EXP_AVG_SQ, STEP = "exp_avg", "exp_avg_sq", "step"

SEED = "rounding_seed"  # in a group that rounds stochastically; counts its kernel calls
TURN = "rounding_step"  # in a group of SGD whose momenta have fewer bits; counts its steps
SEEDS = 2**24
SPREAD = 0x9E3779B1  # odd: the seeds of groups and shards start far from each other


def rounding_seed(bucket: ParamBucket) -> Tensor | None:
    """A different seed for each call, counted on the device; None rounds to nearest.

    All ranks use the same seeds for replicated parameters, which therefore stay equal.
    """
    group, dtype = bucket.group, bucket.params[0].dtype
    if not group["stochastic_rounding"] or dtype not in (torch.bfloat16, torch.float16):
        return None
    seed = group.get(SEED)
    if seed is None:
        start = bucket.number * 1024 + _distributed.shard_number(bucket.params[0])
        seed = torch.tensor(float(start * SPREAD % SEEDS), dtype=torch.float32)
    group[SEED] = seed = seed.to(bucket.device)
    return cast(Tensor, seed.add_(1).remainder_(SEEDS))


def rounding_step(bucket: ParamBucket) -> Tensor:
    """The number of the step, from 1 and counted on the device, by which momenta are rounded."""
    turn: Tensor | None = bucket.group.get(TURN)
    turn = torch.ones((), dtype=torch.float32) if turn is None else turn
    bucket.group[TURN] = turn.to(bucket.device)
    return cast(Tensor, bucket.group[TURN])


class Update:
    """The update of the parameters; one kernel call updates those with equal state signatures.

    Attributes:
        keys: keys of its tensors in a parameter's state, under torch's names.
        moments: those of `keys` that are like the parameters.
        roots: those of `moments` that are not negative, and of which the root counts.
        group_options: the options that its groups hold, see `Options`.
        needs_norm: whether a step takes a norm over all parameters' state.
        extrapolated_key: key under which a group says how far its parameters are from x.
    """

    keys: tuple[str, ...] = ()
    moments: tuple[str, ...] = ()
    roots: tuple[str, ...] = ()
    group_options: tuple[str, ...] = ()
    needs_norm = False
    extrapolated_key = EXTRAPOLATED

    def refuse_extrapolated(self, group: Mapping[str, Any]) -> None:
        """Raise ValueError for a saved group whose parameters hold the y of another method."""
        for key in (EXTRAPOLATED, EXTRAPOLATED_RHO):
            if key != self.extrapolated_key and group.get(key):
                raise ValueError(
                    f"the state was saved ahead of x by another method ({key} is {group[key]}): "
                    "load it with that method, call eval(), and save model and optimizer again"
                )

    def state_signature(self, state: dict[str, Any]) -> Hashable:
        """A value that is equal for parameters that one kernel call may update."""
        raise NotImplementedError

    def change_together(self, states: Sequence[dict[str, Any]]) -> bool:
        """Whether equal signatures of `states` stay equal, or a change of one is marked."""
        return True

    def initialize_state(self, bucket: ParamBucket) -> None:
        """Create the state of a bucket's parameters, as it is before their first step."""

    def writes_first(self, bucket_slice: BucketSlice) -> bool:
        """Whether the update of a slice writes before the kernel that checks its gradients.

        They are then checked before: `step` creates state, or changes the parameters.
        """
        return False

    @contextmanager
    def whole_step(self, buckets: ParamBuckets, amp: AmpState) -> Iterator[None]:
        """A context for all slices of a step."""
        self.begin()
        try:
            yield
            self.end(buckets, amp)
        except BaseException:
            self.cancel()
            raise

    def begin(self) -> None:
        """Begin a step, before its first slice."""

    def end(self, buckets: ParamBuckets, amp: AmpState) -> None:
        """End a step, after its last slice."""

    def cancel(self) -> None:
        """End a step that an exception has left after some of its slices."""

    def has_edits(self) -> bool:
        """Whether other code has edited state in place that must then be read again."""
        return False

    def normalize_state(self, state: dict[Tensor, dict[str, Any]]) -> None:
        """Convert a loaded state to the form that this class uses."""

    def step(self, bucket_slice: BucketSlice) -> None:
        """Update a slice, from its backups if it is perturbed."""
        raise NotImplementedError


Scratch: TypeAlias = dict[torch.device, Tensor]
"""Memory on each device, that `ExtrapolatedUpdate.directions` may write to."""


class ExtrapolatedUpdate(Update):
    """An update u whose gradient is taken ahead along it.

    The parameters of a group hold y = x - e u, with the e that the group has as `extrapolated`.

    Its state signature is false for parameters that have no moments yet. u follows from `moments`.
    """

    def scratch(self, buckets: Sequence[ParamBucket]) -> Scratch:
        """The memory that the `directions` of these buckets need, one after the other."""
        return {}

    def directions(self, bucket: ParamBucket, scratch: Scratch) -> Iterator[Directions]:
        """The parameters of a bucket that have moments, with u where it is not 0.

        Each u is read before the next one is asked for.
        """
        raise NotImplementedError

    def end(self, buckets: ParamBuckets, amp: AmpState) -> None:
        """Let a change of `extrapolation` take effect, after a step with the old one."""
        changed = [g for g in buckets.groups if g.get(EXTRAPOLATION) != g.get(EXTRAPOLATED)]
        if changed and not any(map(amp.is_skipped, buckets.devices)):
            self.extrapolate(buckets, [(group, group[EXTRAPOLATION]) for group in changed])

    def extrapolate(
        self, buckets: ParamBuckets, wanted: Sequence[tuple[dict[str, Any], float]]
    ) -> None:
        """Change y = x - e u of groups from their present e to the one that is wanted.

        After an error all have their present e, up to rounding.
        """
        alphas = {id(group): group[EXTRAPOLATED] - e for group, e in wanted}
        changed = [
            bucket
            for bucket, has_moments in buckets.by_state()
            if has_moments and alphas.get(id(bucket.group), 0.0) != 0
        ]
        for bucket in changed:  # errors come before the first write
            lists = bucket.tensors, *map(bucket.like_params, self.moments)
            _core.check(("params", *self.moments), lists, (True, *[False] * len(self.moments)))
        scratch = self.scratch(changed)  # all memory, too

        def directions() -> Iterator[tuple[ParamBucket, float, Directions]]:
            for bucket in changed:
                for each in self.directions(bucket, scratch):
                    yield bucket, alphas[id(bucket.group)], each

        done = 0
        try:
            for bucket, alpha, along in directions():
                bucket.move(along, alpha)
                done += 1
                buckets.store.has_written = True
        except BaseException:
            for bucket, alpha, along in islice(directions(), done):
                bucket.move(along, -alpha)
            raise
        finally:
            buckets.mark_written(changed)
        for group, e in wanted:
            group[EXTRAPOLATED] = e


class SGDUpdate(ExtrapolatedUpdate):
    """Gradient descent, heavy ball, Nesterov; u is the momentum buffer."""

    keys = moments = (MOMENTUM,)
    group_options = ("maximize", "stochastic_rounding")

    def state_signature(self, state: dict[str, Any]) -> Hashable:
        return state.get(MOMENTUM) is not None

    def initialize_state(self, bucket: ParamBucket) -> None:
        bucket.corrections()
        if bucket.group["momentum"] != 0:
            bucket.buffers(MOMENTUM)

    def writes_first(self, bucket_slice: BucketSlice) -> bool:
        bucket = bucket_slice.bucket
        has_momentum = bucket.group["momentum"] != 0
        return (not bucket_slice.state_signature and has_momentum) or bucket.lacks_corrections()

    def directions(self, bucket: ParamBucket, scratch: Scratch) -> Iterator[Directions]:
        yield bucket.along(MOMENTUM)

    def end(self, buckets: ParamBuckets, amp: AmpState) -> None:
        super().end(buckets, amp)
        for group in buckets.groups:
            if TURN in group:
                group[TURN].remainder_(SEEDS).add_(1)

    def factors(self, bucket_slice: BucketSlice) -> tuple[float | Tensor, float | Tensor]:
        """The momentum and the extrapolation that the kernel is called with, before it is."""
        group = bucket_slice.bucket.group
        return group["momentum"], group.get(EXTRAPOLATED, 0.0)

    def step(self, bucket_slice: BucketSlice) -> None:
        bucket, group = bucket_slice.bucket, bucket_slice.bucket.group
        momenta, scales, dampening, undo = None, None, 0.0, False
        turn: float | Tensor = 1.0
        momentum: float | Tensor = 0.0
        extrapolation: float | Tensor = 0.0
        if group["momentum"] != 0:
            momenta, scales = bucket.buffers(MOMENTUM), bucket.scales(MOMENTUM)
            if bucket.store.formats.round_by_steps(MOMENTUM, bucket.params[0]):
                turn = rounding_step(bucket)
            momentum, extrapolation = self.factors(bucket_slice)
            if bucket_slice.state_signature:
                dampening = group["dampening"]
            elif group["dampening"] != 0:  # the first step is undamped, unless it is skipped
                undo = bucket_slice.amp.is_skipped(bucket.device)
        bucket_slice.launch(
            bucket.kernels.sgd_step,
            momenta,
            bucket.backups() if bucket_slice.is_perturbed else None,
            bucket.corrections(),
            scales,
            lr=group["lr"],
            momentum=momentum,
            dampening=dampening,
            weight_decay=group["weight_decay"],
            extrapolation=extrapolation,
            step=turn,
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            rounding_seed=rounding_seed(bucket),
        )
        if undo:
            bucket.drop(MOMENTUM)


class AdamWUpdate(ExtrapolatedUpdate):
    """AdamW; one call updates parameters that have taken the same number of steps.

    u is the quotient of the moments, corrected for the steps that they have taken.
    """

    keys = (EXP_AVG, EXP_AVG_SQ, STEP)
    moments = (EXP_AVG, EXP_AVG_SQ)
    roots = (EXP_AVG_SQ,)
    group_options = ("maximize", "stochastic_rounding")

    def __init__(self) -> None:
        self._counts = StepCounts()

    def state_signature(self, state: dict[str, Any]) -> Hashable:
        return self._counts.key(state[STEP]) if STEP in state else None

    def change_together(self, states: Sequence[dict[str, Any]]) -> bool:
        """Whether they have one group of counts: a step of a part of it forms another, marked.

        Equal counts of different groups come apart in a step of one group, which marks nothing.
        """
        return self._counts.are_together([s[STEP] for s in states if STEP in s])

    def has_edits(self) -> bool:
        return self._counts.has_edits()

    def normalize_state(self, state: dict[Tensor, dict[str, Any]]) -> None:
        entries = [(p, s) for p, s in state.items() if STEP in s]
        counts = self._counts.read([s[STEP] for _, s in entries], [p.device for p, _ in entries])
        for (_, s), count in zip(entries, counts, strict=True):
            s[STEP] = count

    def writes_first(self, bucket_slice: BucketSlice) -> bool:
        return bucket_slice.state_signature is None or bucket_slice.bucket.lacks_corrections()

    def begin(self) -> None:
        self._counts.new_step()

    def initialize_state(self, bucket: ParamBucket) -> None:
        bucket.corrections()
        bucket.buffers(EXP_AVG)
        bucket.buffers(EXP_AVG_SQ)
        self._start_counts(bucket)

    def scratch(self, buckets: Sequence[ParamBucket]) -> Scratch:
        """For each device u and the denominator of its largest parameter."""
        sizes: dict[torch.device, int] = {}
        for bucket in buckets:
            locals_ = list(map(_distributed.local, bucket.params))
            most = max(p.numel() * arithmetic_dtype(p.dtype).itemsize for p in locals_)
            size = (most // 64 + 1) * 64  # no empty rows, and rows of any dtype
            sizes[bucket.device] = max(sizes.get(bucket.device, 0), size)
        return {
            device: torch.empty(2, size, dtype=torch.uint8, device=device)
            for device, size in sizes.items()
        }

    def directions(self, bucket: ParamBucket, scratch: Scratch) -> Iterator[Directions]:
        """See `ExtrapolatedUpdate`; one parameter at a time, in the same memory.

        u errs by a few roundings of the arithmetic's dtype, in which it is passed on.
        """
        steps = float(bucket.store.state[bucket.params[0]][STEP])
        if steps == 0:  # only skipped ones, after which u is 0
            return
        group = bucket.group
        beta1, beta2 = map(float, group["betas"])
        size, root = 1 / (1 - beta1**steps), (1 - beta2**steps) ** -0.5
        eps, T = float(group["eps"]), arithmetic_dtype(bucket.params[0].dtype)
        memory = [(row, row.storage_offset()) for row in scratch[bucket.device].view(T)]
        for param in bucket.params:
            m, v = (bucket.store.number(key, param) for key in self.moments)
            p = _distributed.local(param)
            shape = p.shape, p.stride()
            u, denominator = (row.as_strided(*shape, offset) for row, offset in memory)
            denominator.copy_(v).sqrt_().mul_(root).add_(eps)
            yield Directions([param], [u.copy_(m).mul_(size).div_(denominator)])

    def step(self, bucket_slice: BucketSlice) -> None:
        bucket, group = bucket_slice.bucket, bucket_slice.bucket.group
        if bucket_slice.state_signature is None:
            self._start_counts(bucket)
        if bucket.count_group is None or bucket.count_group.size != len(bucket.params):
            counts = [bucket.store.state[p][STEP] for p in bucket.params]
            bucket.count_group, is_new = self._counts.group(counts)
            if is_new:
                bucket.store.mark_changed()
        beta1, beta2 = group["betas"]
        bucket_slice.launch(
            bucket.kernels.adamw_step,
            bucket.buffers(EXP_AVG),
            bucket.buffers(EXP_AVG_SQ),
            bucket.backups() if bucket_slice.is_perturbed else None,
            bucket.corrections(),
            bucket.scales(EXP_AVG),
            bucket.scales(EXP_AVG_SQ),
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            extrapolation=group.get(EXTRAPOLATED, 0.0),
            step=bucket.count_group.counts[0] + 1,
            maximize=group["maximize"],
            rounding_seed=rounding_seed(bucket),
        )
        self._counts.advance(bucket.count_group, bucket_slice.amp.flag(bucket.device))

    def _start_counts(self, bucket: ParamBucket) -> None:
        """Create the step counts of the parameters that have none."""
        state = bucket.store.state
        params = [p for p in bucket.params if STEP not in state[p]]
        if params:
            counts = self._counts.start(len(params), bucket.device)
            for p, count in zip(params, counts, strict=True):
                state[p][STEP] = count
            bucket.store.mark_changed()
