"""Formats of an optimizer's state: corrections of 16-bit parameters, and states of fewer bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eigenfilter import _distributed
from eigenfilter.kernels.compression import CODES, decode, encode, groups, join, split

CORRECTION = "weight_correction"
"""Key of the state that makes master weights of 16-bit parameters."""

_CORRECTIONS = {24: torch.int8, 32: torch.int16}
_STATES = {16: torch.bfloat16, 32: torch.float32}


def scale_key(key: str) -> str:
    """The key of the scales that the codes at `key` have."""
    return f"{key}_scale"


@dataclass(frozen=True, slots=True)
class Formats:
    """The formats of one optimizer's state: see `Options`.

    Attributes:
        master_weight_bits: 24, 32, or None for parameters alone.
        state_bits: 8, 16, 32, or None for the parameters' dtype.
        roots: the keys of states that are codes of their roots, without a sign.
    """

    master_weight_bits: int | None = None
    state_bits: int | None = None
    roots: tuple[str, ...] = ()

    @property
    def are_usual(self) -> bool:
        """Whether every state is like its parameter, and there is nothing else."""
        return self.master_weight_bits is None and self.state_bits is None

    def keys(self, states: tuple[str, ...]) -> tuple[str, ...]:
        """The keys that a parameter's state has beside those of its `states`."""
        corrections = () if self.master_weight_bits is None else (CORRECTION,)
        return corrections + (tuple(map(scale_key, states)) if self.state_bits == 8 else ())

    def correction(self, p: Tensor) -> torch.dtype | None:
        """The dtype of a parameter's correction; None if it has none."""
        if self.master_weight_bits is None or p.itemsize != 2:
            return None
        return _CORRECTIONS[self.master_weight_bits]

    def dtype(self, key: str, p: Tensor) -> torch.dtype:
        """The dtype of a parameter's buffer at a key."""
        if key == CORRECTION:
            correction = self.correction(p)
            assert correction is not None
            return correction
        if self.state_bits is None:
            return p.dtype
        if self.state_bits == 8:
            return torch.uint8 if key in self.roots else torch.int8
        return _STATES[self.state_bits]

    def round_by_steps(self, key: str, p: Tensor) -> bool:
        """Whether the number of a step rounds the buffer at a key, which has less than 32 bits."""
        return not self.are_usual and self.dtype(key, p).itemsize < 4

    def fit(self, key: str, p: Tensor, entry: dict[str, Any]) -> Tensor:
        """The buffer at a key of a parameter's state: created as zeros, or converted if need be."""
        dtype, buffer = self.dtype(key, p), entry.get(key)
        if buffer is None:
            buffer = torch.zeros_like(p, dtype=dtype, requires_grad=False)
            if dtype in CODES and key != CORRECTION:
                entry[scale_key(key)] = _zero_scales(p)
        elif key == CORRECTION:
            buffer = _like(p, _as_correction(buffer, dtype))
        elif dtype in CODES:
            buffer = self._fit_codes(key, p, entry, dtype)
        else:
            buffer = _like(p, expanded(entry, key), dtype)
            entry.pop(scale_key(key), None)
        entry[key] = buffer
        return buffer

    def _fit_codes(self, key: str, p: Tensor, entry: dict[str, Any], dtype: torch.dtype) -> Tensor:
        buffer: Tensor = entry[key]
        scale: Tensor | None = entry.get(scale_key(key))
        local = _distributed.local(p)
        if buffer.dtype == dtype and scale is not None:
            own = _distributed.local(buffer)
            if own.device == local.device and own.stride() == local.stride():
                if scale.device != local.device or scale.shape != (groups(local),):
                    entry[scale_key(key)] = scale.to(local.device)
                return buffer
        value = _like(p, expanded(entry, key), torch.float32)
        codes, entry[scale_key(key)] = encode(_distributed.local(value), dtype)
        return _placed(p, codes)


def expanded(entry: Mapping[str, Any], key: str) -> Tensor:
    """A state as numbers: what its codes stand for, or what it is.

    Raises:
        ValueError: there are codes, and no scales that go with them.
    """
    value: Tensor = entry[key]
    if not isinstance(value, Tensor) or value.dtype not in CODES:
        return value
    scale, local = entry.get(scale_key(key)), _distributed.local(value)
    if not isinstance(scale, Tensor) or scale.shape != (groups(local),):
        raise ValueError(
            f"{key} holds codes of 8 bits, and {scale_key(key)} is not their {groups(local)} "
            "scales: load the whole state, or a state_dict()"
        )
    return _placed(value, decode(local, scale))


def expanded_entry(entry: Mapping[str, Any], states: tuple[str, ...]) -> dict[str, Any]:
    """A parameter's state with numbers in the place of the codes and scales of its `states`."""
    scales = {scale_key(key) for key in states if key in entry}
    return {
        key: expanded(entry, key) if key in states else value
        for key, value in entry.items()
        if key not in scales
    }


def set_apart(
    state_dict: dict[str, Any], params: Sequence[Tensor], formats: Formats, states: tuple[str, ...]
) -> tuple[dict[str, Any], list[tuple[Tensor, dict[str, Any]]]]:
    """Split a state_dict into what torch may load, and for each parameter what it may not.

    torch converts every tensor to its parameter's dtype, in which codes would lose their meaning,
    and float32 states digits.

    Args:
        state_dict: of this optimizer or another one.
        params: the parameters, in the order of the groups.
        formats: how the state is to be held.
        states: the keys of the states, of which there may be codes.
    """
    saved = state_dict.get("state", {})
    ids = [number for group in state_dict.get("param_groups", ()) for number in group["params"]]
    if len(ids) != len(params):  # torch raises its own error
        return state_dict, []
    rest, apart = dict(saved), []
    for number, p in zip(ids, params, strict=True):
        if number not in saved:
            continue
        entry: Mapping[str, Any] = saved[number]
        own: dict[str, Any] = {}
        kept = () if formats.are_usual else states
        kept += () if formats.correction(p) is None else (CORRECTION,)
        for key in kept:
            if isinstance(entry.get(key), Tensor):
                _refuse_other_shape(key, p, entry[key])
                copies = {k: entry[k] for k in (key, scale_key(key)) if k in entry}
                own |= {k: t.to(p.device, copy=True) for k, t in copies.items()}
                formats.fit(key, p, own)
        codes = [k for k, t in entry.items() if isinstance(t, Tensor) and t.dtype in CODES]
        numbers = expanded_entry(entry, tuple(k for k in codes if k != CORRECTION))
        rest[number] = {k: v for k, v in numbers.items() if k not in (*own, CORRECTION)}
        apart.append((p, own))
    return state_dict | {"state": rest}, apart


def _refuse_other_shape(key: str, p: Tensor, value: Tensor) -> None:
    """Raise ValueError for a state whose part on this rank is not like the parameter's."""
    shape, own = _distributed.local(p).shape, _distributed.local(value).shape
    if own != shape:
        raise ValueError(
            f"{key} holds the state of a tensor {tuple(own)}, and this rank's part of its "
            f"parameter is {tuple(shape)}: a compressed_state_dict() belongs to the sharding that "
            "it was saved with; save and load state_dict()"
        )


def master_weight(p: Tensor, entry: Mapping[str, Any]) -> Tensor:
    """The master weight of a parameter, float32 (float64 for one of float64), in new memory."""
    p = p.detach()
    if p.itemsize != 2 or CORRECTION not in entry:
        return p.to(torch.promote_types(p.dtype, torch.float32), copy=True)
    whole = join(_distributed.local(p), _distributed.local(entry[CORRECTION]))
    return _placed(p, whole)


def set_master_weight(p: Tensor, entry: Mapping[str, Any], value: Tensor) -> None:
    """Write a master weight to a parameter and its correction, rounded to what they hold."""
    local, value = _distributed.local(p.detach()), _distributed.local(value)
    if p.itemsize != 2 or CORRECTION not in entry:
        local.copy_(value)
        return
    correction = _distributed.local(entry[CORRECTION])
    like = torch.empty_like(local, dtype=torch.float32).copy_(value)
    param, rest = split(like, local.dtype, correction.dtype)
    local.copy_(param)
    correction.copy_(rest)


def _as_correction(buffer: Tensor, dtype: torch.dtype) -> Tensor:
    """A correction with more or fewer bits; one of another optimizer, which has cast it, is 0."""
    if buffer.dtype == dtype:
        return buffer
    if buffer.dtype not in _CORRECTIONS.values():
        return torch.zeros_like(buffer, dtype=dtype)
    if dtype == torch.int16:
        return buffer.to(dtype) << 8
    return ((buffer.int() + 128) >> 8).clamp(max=127).to(dtype)


def _zero_scales(p: Tensor) -> Tensor:
    local = _distributed.local(p)
    return torch.zeros(groups(local), dtype=torch.float32, device=local.device)


def _like(p: Tensor, value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor with a dtype, and the placement and strides of a parameter; copied if need be."""
    dtype = dtype or value.dtype
    local, own = _distributed.local(p), _distributed.local(value)
    alike = own.dtype == dtype and own.device == local.device and own.stride() == local.stride()
    if alike and own.shape == local.shape and not own.is_neg():
        return value
    return _placed(p, torch.empty_like(local, dtype=dtype, requires_grad=False).copy_(own))


def _placed(like: Tensor, local: Tensor) -> Tensor:
    """A local tensor as part of one that is distributed as another is."""
    if not _distributed.is_dtensor(like):
        return local
    whole = torch.empty_like(like, dtype=local.dtype, requires_grad=False)
    _distributed.local(whole).copy_(local)
    return whole
