"""Is a trained model inside its optimizer's filter? A verdict with its evidence."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eigenfilter import filters
from eigenfilter.certificate.equilibrium import Direction, direction
from eigenfilter.certificate.linearized import Linearized, NoFilter, ascent_of, linearized
from eigenfilter.certificate.sides import Side, Tolerances
from eigenfilter.certificate.verdict import Look, SideVerdict, judge
from eigenfilter.curvature import HessianOperator, SpectrumBound, SpectrumBounds
from eigenfilter.curvature.norms import norms
from eigenfilter.filters import AdamW, PolynomialFilter

NOT_AN_EQUILIBRIUM = "not an equilibrium"
FULL_BATCH = "f over all data: with minibatches, stability asks for more"


@dataclass(frozen=True)
class Certificate:
    """What is known of a model beside its optimizer's filter.

    Attributes:
        verdict: "inside", "at the edge", "outside", "undecided" or "not an equilibrium".
        matrix: whose eigenvalues are spoken of, in words: the Hessian, or for AdamW and for several
            groups what takes its place.
        parameters: n, their number.
        dtype: of the products, as text.
        filter: in words, or None where there is none.
        intervals: the eigenvalues that it admits.
        sharpness: theta, the largest Ritz value: the largest eigenvalue is at least that, and but
            for the failure probability at most sharpness + sharpness_error.
        sharpness_error: see there.
        edge: the upper end of the uppermost interval, or None.
        top, bottom: both ends of the spectrum, with residuals and errors.
        upper, saddle: the verdict on each side, or None where there is no filter.
        gradient_norm: ||grad f(x)|| over all data.
        direction_norm: ||d(x) + wd x||, which is 0 at an equilibrium.
        distance: ||d(x) + wd x|| / (||J|| ||x||), J being the Jacobian of d + wd x: to first order
            an equilibrium is at least that far, relative to ||x||.
        equilibrium_tol: the most it may be at an equilibrium.
        failure_probability: of an error bar that is too small.
        matvecs: products of the Hessian.
        seed: of the random start.
        notes: what the statement rests on.
        needed: which evidence would decide, where the verdict is "undecided"; what is amiss, where
            it is "not an equilibrium".
    """

    verdict: str
    matrix: str
    parameters: int
    dtype: str
    filter: str | None
    intervals: tuple[tuple[float, float], ...]
    sharpness: float
    sharpness_error: float
    edge: float | None
    top: SpectrumBound
    bottom: SpectrumBound
    upper: Side | None
    saddle: Side | None
    gradient_norm: float
    direction_norm: float
    distance: float
    equilibrium_tol: float
    failure_probability: float
    matvecs: int
    seed: int
    notes: tuple[str, ...]
    needed: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain types; infinite numbers, which JSON does not have, as None."""
        found: dict[str, Any] = _plain(asdict(self))
        return found

    def to_json(self, indent: int | None = 1) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def __str__(self) -> str:
        rows = [("verdict", self.verdict)]
        rows += [("matrix", f"{self.matrix}; {self.parameters:,} parameters, {self.dtype}")]
        admitted = " and ".join(f"[{low:.6g}, {high:.6g}]" for low, high in self.intervals)
        rows += (
            [("filter", f"{self.filter}: admits {admitted or 'nothing'}")] if self.filter else []
        )
        rows += [("largest eigenvalue", _bar(self.top, up=True))]
        rows += [("upper edge", _line(self.upper))] if self.upper else []
        rows += [("smallest eigenvalue", _bar(self.bottom, up=False))]
        rows += [("saddle side", _line(self.saddle))] if self.saddle else []
        rows += [
            (
                "equilibrium",
                f"||d(x) + wd x|| = {self.direction_norm:.3g}, ||grad f(x)|| = "
                f"{self.gradient_norm:.3g}; at least {self.distance:.2g} ||x|| away, "
                f"tolerance {self.equilibrium_tol:g}",
            ),
            (
                "error bars",
                f"fail with probability {self.failure_probability:g} at most, over random starts; "
                f"seed {self.seed}, {self.matvecs} products",
            ),
        ]
        rows += [("rests on", note) for note in self.notes]
        rows += [("needed", text) for text in self.needed]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def certify(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    data: Any,
    optimizer: torch.optim.Optimizer,
    *,
    grad_norm: float | None = None,
    failure_probability: float = 1e-3,
    edge_tol: float = 0.05,
    saddle_tol: float = 0.05,
    equilibrium_tol: float = 1e-3,
    tol: float = 0.01,
    max_matvecs: int = 300,
    seed: int | None = None,
    basis_device: torch.device | str | None = None,
    **options: Any,
) -> Certificate:
    r"""Say whether a trained model is inside the filter of its optimizer, and on what evidence.

    theta, r: a Ritz value and its residual from Lanczos' iteration with a random start; t: how far
    the extreme eigenvalue lies beyond the outermost theta at most, but for the failure probability.

        the upper edge E, with e = edge_tol E
            outside:      theta - r > E + e
            at the edge:  theta >= E - e  and  theta + t <= E + e
            inside:       theta + t <= E
        the saddle side from L, with s = saddle_tol S
            outside:      theta + r < L - s
            inside:       theta - t >= L - s

    S is the largest |theta|, E and L are the ends of the uppermost interval; USAM admits a second
    one below, and what lies there is not outside. Everything else is "undecided". "Outside" is
    proven, up to rounding; "inside" and "at the edge" hold but for the failure probability, over
    starts, whatever the matrix. See `curvature.spectrum_bounds` for the theorem.

    The verdict is "not an equilibrium" where

        ||d(x) + wd x|| > equilibrium_tol ||J|| ||x||

    with J the Jacobian of the left side: to first order, d + wd x vanishes no nearer to x than
    equilibrium_tol ||x||. Of AdamW, and of groups that differ, norms are those of the coordinates
    D^-1 x in which the matrix D (J + W) D is symmetric. Else it is the worse side's.

    All is of f over the whole of `data`. It says what the optimizer with all data at each step
    would do here: with minibatches, whose Hessians and gradients scatter, the noise makes some of
    these points unstable too, and an "inside" is necessary only. The parameters, their gradients
    and versions are left as they are.

    Groups that differ compose, in whatever but maximize and Hessian USAM's rho: see
    `linearized.linearized`. AdamW is seen through its preconditioner now. SAM has no equilibrium
    where its filter holds: its edge is that at `grad_norm`, and moves with it.

    Args:
        model, loss_fn, data: as `curvature.HessianOperator`.
        optimizer: torch.optim.SGD or AdamW, or one of this package, with what it has learned. Its
            parameters are those that count.
        grad_norm: of SAM; None for that of the gradient at x.
        failure_probability: in (0, 1), of any error bar that is too small.
        edge_tol: relative, in [0, 1): how near counts as "at the edge".
        saddle_tol: relative to S, >= 0: how negative an eigenvalue may be.
        equilibrium_tol: see above, >= 0.
        tol: relative to S, > 0: how small error bars get, decided or not, as far as max_matvecs
            allows.
        max_matvecs: the most products of a look, >= 1; each takes two or three of the Hessian after
            an ascent of AdamW or of groups that differ. The basis takes n times as many elements.
        seed: of the start; None for one that the operating system draws. It is mixed, so that a
            seed that a model was made with does no harm.
        basis_device: where the basis lies: "cpu" where the model's device has no room for it.
        options: further arguments of `HessianOperator`, but params.

    Raises:
        TypeError: no filter is known for the optimizer.
        ValueError: an argument is out of its range, the optimizer's parameters are not the model's,
            AdamW has taken no step, or params is given.
        FloatingPointError: the gradient or a product is not finite.
        RuntimeError: the optimizer holds the parameters away from x.

    Example:
        >>> print(eigenfilter.certify(model, loss_fn, loader, opt))

    Source: arXiv 2510.09034 for the filters; `curvature.spectrum_bounds` for the error bars.
    """
    tolerances = Tolerances(edge_tol, saddle_tol, tol)
    if not equilibrium_tol >= 0:
        raise ValueError(f"equilibrium_tol must be at least 0, not {equilibrium_tol}")
    if "params" in options:
        raise ValueError("params has no place here: the optimizer's parameters are taken")
    if seed is None and options.get("process_group") is not None:
        raise ValueError("give a seed, the same on all processes of process_group")
    filters.of(optimizer, grad_norm=1.0)  # raises where none is known, before any work
    params = [p for g in optimizer.param_groups for p in g["params"] if p.requires_grad]
    op = HessianOperator(model, loss_fn, data, params=params, **options)
    seed = secrets.randbits(32) if seed is None else seed
    look = Look(failure_probability, max_matvecs, basis_device, seed)
    with op.fixed():
        move = direction(op, optimizer)
        try:
            if ascent_of(optimizer).method == "sam" and grad_norm is None:
                grad_norm = _sam_norm(optimizer, move)
            seen = linearized(op, optimizer, grad_norm=grad_norm)
            judged = judge(seen, tolerances, look)
        except NoFilter as reason:
            seen, judged = None, SideVerdict(look(op, tolerances.sharp), needed=(f"{reason}",))
    found, flt = judged.found, None if seen is None else seen.filter
    distance = _distance(op, move, seen, found)
    verdict, needed = judged.verdict, judged.needed
    if not distance <= equilibrium_tol:
        verdict = NOT_AN_EQUILIBRIUM
        training = f"training on, until x is no further than {equilibrium_tol:g} ||x|| away"
        needed = (training, *needed)
    intervals = () if flt is None else tuple(flt.intervals())
    return Certificate(
        verdict=verdict,
        matrix="the Hessian H" if seen is None else seen.matrix,
        parameters=op.shape[0],
        dtype=str(op.dtype).removeprefix("torch."),
        filter=None if flt is None else repr(flt),
        intervals=intervals,
        sharpness=found.top.value,
        sharpness_error=found.top.margin,
        edge=intervals[-1][1] if intervals else None,
        top=found.top,
        bottom=found.bottom,
        upper=judged.upper,
        saddle=judged.saddle,
        gradient_norm=move.gradient_norm,
        direction_norm=float(norms(move.vector.double())),
        distance=distance,
        equilibrium_tol=equilibrium_tol,
        failure_probability=failure_probability,
        matvecs=look.products,
        seed=seed,
        notes=(FULL_BATCH, *(() if seen is None else seen.notes)),
        needed=needed,
    )


def _sam_norm(optimizer: torch.optim.Optimizer, move: Direction) -> float:
    if move.ascent_norm > 0 or all(float(g["rho"]) == 0.0 for g in optimizer.param_groups):
        return move.ascent_norm or 1.0  # without an ascent it plays no part
    raise NoFilter(
        "SAM's edge falls to 0 with the gradient's norm, which is 0 here: give grad_norm"
    )


def _distance(
    op: HessianOperator, move: Direction, seen: Linearized | None, found: SpectrumBounds
) -> float:
    """||D v|| / (||J|| ||D^-1 x||) for the direction v."""
    x = torch.cat([p.detach().reshape(-1) for p in op.params])
    v = move.vector
    if seen is not None and seen.scale is not None:
        v = seen.scale * v
        x = torch.where(seen.scale > 0, x / seen.scale, 0.0)
    length = float(norms(v.double()))
    whole = _jacobian_norm(seen, found) * float(norms(x.double()))
    return 0.0 if length == 0 else length / whole if whole else math.inf


def _jacobian_norm(seen: Linearized | None, found: SpectrumBounds) -> float:
    """||J||, from below, from the Ritz values."""
    if seen is None:
        return found.scale
    flt = seen.filter
    if isinstance(flt, PolynomialFilter):
        return float(abs(flt.p(found.values.numpy()) + flt.weight_decay).max())
    assert isinstance(flt, AdamW)
    return found.scale + flt.weight_decay


def _bar(end: SpectrumBound, *, up: bool) -> str:
    beyond = f"{'+' if up else '-'} {end.margin:.2g}"
    return f"{end.value:.6g} {beyond} at most; residual {end.residual:.2g}"


def _line(side: Side) -> str:
    return f"{side.limit:.6g}, within {side.tolerance:.2g}: {side.verdict}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
