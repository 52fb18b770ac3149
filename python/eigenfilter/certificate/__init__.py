"""Certificates: whether a trained model lies inside its optimizer's filter, with evidence."""

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
from eigenfilter.certificate.linearized import Linearized, NoFilter, linearized, perturbation_of
from eigenfilter.certificate.sides import Side, Tolerances
from eigenfilter.certificate.verdict import SideVerdict, SpectrumProbe, judge
from eigenfilter.curvature import HessianOperator, SpectrumBound, SpectrumBounds
from eigenfilter.curvature.norms import norms
from eigenfilter.filters import AdamW, PolynomialFilter

NOT_AN_EQUILIBRIUM = "not an equilibrium"
FULL_BATCH = "f over all data: with minibatches, stability asks for more"


@dataclass(frozen=True)
class Certificate:
    """The verdict on a model and its optimizer's filter, with the evidence.

    Attributes:
        verdict: "inside", "at the edge", "outside", "undecided" or "not an equilibrium".
        matrix: the matrix whose eigenvalues count, in words: the Hessian, or what replaces it for
            AdamW and for several groups.
        parameters: number n of parameters.
        dtype: dtype of the products, as text.
        filter: the filter as text, or None if there is none.
        intervals: the intervals of eigenvalues that the filter admits.
        sharpness: the largest Ritz value. The largest eigenvalue is at least that, and at most
            sharpness + sharpness_error except with the failure probability.
        sharpness_error: see sharpness.
        edge: upper end of the uppermost interval, or None.
        top: upper end of the spectrum, with its residual and margin.
        bottom: lower end of the spectrum, with its residual and margin.
        upper: the verdict on the upper edge, or None if there is no filter.
        saddle: the verdict on the lower side, or None if there is no filter.
        gradient_norm: ||grad f(x)|| over all data.
        direction_norm: ||d(x) + wd x||, which is 0 at an equilibrium.
        distance: ||d(x) + wd x|| / (||J|| ||x||) with the Jacobian J of d + wd x. To first order,
            every equilibrium is at least that far away, relative to ||x||.
        equilibrium_tol: largest distance that counts as an equilibrium.
        failure_probability: probability that an error bar is too small.
        matvecs: number of products with the Hessian.
        seed: seed of the random start.
        notes: the assumptions of the verdict.
        needed: evidence that would decide, if the verdict is "undecided"; what to do, if it is "not
            an equilibrium".
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
        """Return all attributes in plain types. Infinite numbers, which JSON lacks, become None."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    def to_json(self, indent: int | None = 1) -> str:
        """Return `to_dict` as JSON."""
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
        rows += [("assumes", note) for note in self.notes]
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
    r"""Decide whether a trained model lies inside the filter of its optimizer.

    Let theta be a Ritz value of the Lanczos iteration with a random start, r its residual, and t
    the margin beyond the outermost theta within which the extreme eigenvalue lies, except with the
    failure probability.

        the upper edge E, with e = edge_tol E
            outside:      theta - r > E + e
            at the edge:  theta >= E - e  and  theta + t <= E + e
            inside:       theta + t <= E
        the saddle side from L, with s = saddle_tol S
            outside:      theta + r < L - s
            inside:       theta - t >= L - s

    E and L are the ends of the uppermost interval of the filter, and S is the largest |theta|.
    USAM admits a second interval below, where eigenvalues are not outside. Everything else is
    "undecided". "Outside" is proven, up to rounding; "inside" and "at the edge" hold except with
    the failure probability, over random starts, for any matrix. `curvature.spectrum_bounds` gives
    the theorem.

    The verdict is that on the worse side, or "not an equilibrium" if

        ||d(x) + wd x|| > equilibrium_tol ||J|| ||x||

    with the Jacobian J of the left side: to first order, every equilibrium is then further away
    than equilibrium_tol ||x||. For AdamW, and for groups that differ, norms are taken in the
    coordinates D^-1 x in which the matrix D (J + W) D is symmetric.

    f is the loss over all of `data`. So the verdict is about the optimizer with all data in each
    step. With minibatches, noise makes some of these points unstable too, so that "inside" is a
    necessary condition only. docs/certificate.md explains this, and which optimizers and groups
    have a filter. Parameters, their gradients and their version counters do not change.

    Args:
        model: the module, as in `curvature.HessianOperator`.
        loss_fn: function (output, target) -> loss, as in `curvature.HessianOperator`.
        data: one batch, a list of batches, or a DataLoader.
        optimizer: torch.optim.SGD or AdamW, or one of this package, with its state. The matrix is
            taken in its parameters.
        grad_norm: gradient norm at which SAM's filter is taken; None for the norm at x.
        failure_probability: probability, in (0, 1), that any error bar is too small.
        edge_tol: distance that counts as "at the edge", relative to E, in [0, 1).
        saddle_tol: how negative an eigenvalue may be, relative to S, >= 0.
        equilibrium_tol: largest distance that counts as an equilibrium, as above, >= 0.
        tol: size, relative to S, > 0, below which error bars must get, decided or not, as far as
            max_matvecs allows.
        max_matvecs: largest number of products with the matrix, >= 1. Each takes two or three
            products with the Hessian after an ascent of AdamW or of groups that differ. The basis
            has n max_matvecs elements.
        seed: seed of the random start; None lets the operating system draw one. It is hashed, so
            that the seed that the model was created with does no harm.
        basis_device: where the basis lies; "cpu" if the memory of the model's device is short.
        options: further arguments of `HessianOperator`, except params.

    Returns:
        The certificate, which prints as text.

    Raises:
        TypeError: no filter is known for the optimizer.
        ValueError: an argument is out of its range; the optimizer has parameters that are not the
            model's; AdamW has taken no step; or params is passed.
        FloatingPointError: the gradient or a product is not finite.
        RuntimeError: the optimizer holds perturbed parameters.

    Example:
        >>> import eigenfilter as ef, torch
        >>> model = torch.nn.Linear(2, 1, bias=False).double()
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        >>> y = torch.zeros(2, 1, dtype=torch.float64)
        >>> opt = ef.SGD(model.parameters(), lr=0.1)  # admits eigenvalues up to 2 / lr = 20
        >>> report = ef.certify(model, torch.nn.functional.mse_loss, (x, y), opt, seed=1)
        >>> report.verdict, round(report.sharpness, 6), report.edge
        ('inside', 9.0, 20.0)

    Source: arXiv 2510.09034 for the filters; `curvature.spectrum_bounds` for the error bars.
    """
    tolerances = Tolerances(edge_tol, saddle_tol, tol)
    if not equilibrium_tol >= 0:
        raise ValueError(f"equilibrium_tol must be at least 0, not {equilibrium_tol}")
    if "params" in options:
        raise ValueError("certify takes no params: it uses the optimizer's parameters")
    if seed is None and options.get("process_group") is not None:
        raise ValueError("pass a seed, the same on all processes of process_group")
    filters.of(optimizer, grad_norm=1.0)  # raises where none is known, before any work
    params = [p for g in optimizer.param_groups for p in g["params"] if p.requires_grad]
    op = HessianOperator(model, loss_fn, data, params=params, **options)
    seed = secrets.randbits(32) if seed is None else seed
    probe = SpectrumProbe(failure_probability, max_matvecs, basis_device, seed)
    with op.fixed():
        step = direction(op, optimizer)
        try:
            theory = perturbation_of(optimizer).theory
            if grad_norm is None and theory is not None and theory.takes("grad_norm"):
                grad_norm = _sam_norm(optimizer, step)
            linear = linearized(op, optimizer, grad_norm=grad_norm)
            sides = judge(linear, tolerances, probe)
        except NoFilter as reason:
            linear, sides = None, SideVerdict(probe(op, tolerances.sharp), needed=(f"{reason}",))
    bounds, flt = sides.bounds, None if linear is None else linear.filter
    distance = _distance(op, step, linear, bounds)
    verdict, needed = sides.verdict, sides.needed
    if not distance <= equilibrium_tol:
        verdict = NOT_AN_EQUILIBRIUM
        training = f"training on, until x is no further than {equilibrium_tol:g} ||x|| away"
        needed = (training, *needed)
    intervals = () if flt is None else tuple(flt.intervals())
    return Certificate(
        verdict=verdict,
        matrix="the Hessian H" if linear is None else linear.matrix,
        parameters=op.shape[0],
        dtype=str(op.dtype).removeprefix("torch."),
        filter=None if flt is None else repr(flt),
        intervals=intervals,
        sharpness=bounds.top.value,
        sharpness_error=bounds.top.margin,
        edge=intervals[-1][1] if intervals else None,
        top=bounds.top,
        bottom=bounds.bottom,
        upper=sides.upper,
        saddle=sides.saddle,
        gradient_norm=step.gradient_norm,
        direction_norm=float(norms(step.vector.double())),
        distance=distance,
        equilibrium_tol=equilibrium_tol,
        failure_probability=failure_probability,
        matvecs=probe.products,
        seed=seed,
        notes=(FULL_BATCH, *(() if linear is None else linear.notes)),
        needed=needed,
    )


def _sam_norm(optimizer: torch.optim.Optimizer, step: Direction) -> float:
    if step.ascent_norm > 0 or all(float(g["rho"]) == 0.0 for g in optimizer.param_groups):
        return step.ascent_norm or 1.0  # without an ascent the norm has no effect
    raise NoFilter("SAM's edge falls to 0 with the gradient norm, which is 0 here: pass grad_norm")


def _distance(
    op: HessianOperator, step: Direction, linear: Linearized | None, bounds: SpectrumBounds
) -> float:
    """Return ||D v|| / (||J|| ||D^-1 x||) for the direction v."""
    x = torch.cat([p.detach().reshape(-1) for p in op.params])
    v = step.vector
    if linear is not None and linear.scale is not None:
        v = linear.scale * v
        x = torch.where(linear.scale > 0, x / linear.scale, 0.0)
    length = float(norms(v.double()))
    whole = _jacobian_norm(linear, bounds) * float(norms(x.double()))
    return 0.0 if length == 0 else length / whole if whole else math.inf


def _jacobian_norm(linear: Linearized | None, bounds: SpectrumBounds) -> float:
    """Return a lower bound of ||J||, from the Ritz values."""
    if linear is None:
        return bounds.scale
    flt = linear.filter
    if isinstance(flt, PolynomialFilter):
        return float(abs(flt.p(bounds.values.numpy()) + flt.weight_decay).max())
    assert isinstance(flt, AdamW)
    return bounds.scale + flt.weight_decay


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
