"""Cross-entropy of hidden states and an output matrix: torch's formula, in pieces of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eigenfilter.curvature import (
    GGNOperator,
    HessianOperator,
    LinearLogits,
    linear_cross_entropy,
)
from eigenfilter.curvature.engines import NAMES
from eigenfilter.curvature.loss import cross_entropy
from eigenfilter.curvature.loss import linear_cross_entropy as module
from eigenfilter.curvature.loss.cross_entropy import FusedCrossEntropy
from tests.curvature.test_cross_entropy import arrays_at_most

CLASSES, WIDTH = 11, 3
TARGETS = torch.tensor([[1, 2, -100, 10, 0], [3, 7, 1, 1, -100]])
CLASS_WEIGHTS = torch.linspace(0.1, 1.3, CLASSES, dtype=torch.float64)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "ignoring": {"ignore_index": 3},
    "smoothing": {"label_smoothing": 0.2},
    "z-loss": {"z_loss": 0.3},
    "soft cap": {"softcap": 2.5},
    "class weights": {"class_weights": CLASS_WEIGHTS, "label_smoothing": 0.3},
    "all": {
        "class_weights": CLASS_WEIGHTS,
        "label_smoothing": 0.3,
        "z_loss": 0.3,
        "softcap": 2.5,
        "reduction": "sum",
    },
}

Loss = Callable[..., Tensor]


def formula(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    class_weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The loss by torch's function, and what that lacks by its definition."""
    y = F.linear(hidden, weight, bias).flatten(0, -2)
    if softcap is not None:
        y = softcap * torch.tanh(y / softcap)
    classes = targets.flatten()
    loss = F.cross_entropy(
        y,
        classes,
        class_weights,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    counts = classes != ignore_index
    shares = (
        torch.ones(len(y), dtype=y.dtype)
        if class_weights is None
        else class_weights[classes.where(counts, 0)]
    )
    shares = shares[counts]
    squares = shares * y.logsumexp(1)[counts] ** 2
    return loss + z_loss * (squares.sum() / (shares.sum() if reduction == "mean" else 1))


def fused(*args: Any) -> Tensor:
    with FusedCrossEntropy():
        return F.cross_entropy(*args)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def variables(seed: int = 0) -> list[Tensor]:
    """Hidden states that do not lie in order, an output matrix, and its bias."""
    hidden = random(5, 2, WIDTH, seed=seed).transpose(0, 1)
    return [hidden, 2 * random(CLASSES, WIDTH, seed=seed + 1), random(CLASSES, seed=seed + 2)]


def targets_of(options: dict[str, Any]) -> Tensor:
    return TARGETS.where(TARGETS >= 0, options.get("ignore_index", -100))


def by_backward(loss_fn: Loss, which: tuple[int, ...], *, bias: bool) -> list[Tensor]:
    """The loss and its derivatives up to the third in some variables, by backward passes."""
    own = variables()
    wrt = [own[i].requires_grad_() for i in which]
    u = [variables(10)[i] for i in which]
    seed = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    loss = loss_fn(own[0], own[1], own[2] if bias else None)
    gradient = torch.autograd.grad(loss, wrt, seed, create_graph=True)
    second = torch.autograd.grad(gradient, [*wrt, seed], u, create_graph=True)
    third = torch.autograd.grad(second[0], [*wrt, seed], u[0] ** 2, retain_graph=True)
    products = torch.autograd.grad(gradient, [*wrt, seed], u, retain_graph=True)
    one = torch.autograd.grad(gradient[0], wrt, u[0], retain_graph=True)
    several = [torch.stack([t, -2 * t, t**2]) for t in u]
    batched = torch.autograd.grad(gradient, wrt, several, is_grads_batched=True)
    return [loss, *gradient, *second, *third, *products, *one, *batched]


def by_forward_mode(loss_fn: Loss, which: tuple[int, ...], *, bias: bool) -> list[Tensor]:
    own, u = variables(), tuple(variables(10)[i] for i in which)
    results: list[Tensor] = []
    for power in (1, 2):  # the second makes the seed of the loss depend on the variables

        def f(*at: Tensor, power: int = power) -> Tensor:
            given = dict(enumerate(own)) | dict(zip(which, at, strict=True))
            return loss_fn(given[0], given[1], given[2] if bias else None) ** power

        at = tuple(own[i] for i in which)
        results += torch.func.jvp(f, at, u)
        gradient = torch.func.grad(f, tuple(range(len(which))))
        for both in torch.func.jvp(gradient, at, u):
            results += both
    return results


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
@pytest.mark.parametrize("derivatives", [by_backward, by_forward_mode])
@pytest.mark.parametrize("chunk", [1, 3, None])
@pytest.mark.parametrize("name", OPTIONS)
def test_all_derivatives_are_those_of_the_formula(
    name: str, chunk: int | None, derivatives: Callable[..., list[Tensor]]
) -> None:
    options, targets = OPTIONS[name], targets_of(OPTIONS[name])
    bias = name != "sum"
    which = (0, 1, 2) if bias else (0, 1)
    expected = derivatives(lambda h, w, b: formula(h, w, targets, b, **options), which, bias=bias)
    result = derivatives(
        lambda h, w, b: linear_cross_entropy(h, w, targets, b, **options, chunk=chunk),
        which,
        bias=bias,
    )
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
@pytest.mark.parametrize("derivatives", [by_backward, by_forward_mode])
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 2)])
def test_derivatives_in_some_variables_alone(
    which: tuple[int, ...], derivatives: Callable[..., list[Tensor]]
) -> None:
    options = OPTIONS["all"]
    expected = derivatives(lambda h, w, b: formula(h, w, TARGETS, b, **options), which, bias=True)
    result = derivatives(
        lambda h, w, b: linear_cross_entropy(h, w, TARGETS, b, **options, chunk=3),
        which,
        bias=True,
    )
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-12)


def test_nothing_but_ignored_tokens_is_as_torch_has_it() -> None:
    own, ignored = [v.requires_grad_() for v in variables()], torch.full_like(TARGETS, -100)
    loss = linear_cross_entropy(own[0], own[1], ignored, own[2], z_loss=0.1)
    assert loss.isnan()
    assert not any(g.any() for g in torch.autograd.grad(loss, own))
    assert linear_cross_entropy(*own[:2], ignored, own[2], reduction="sum") == 0


def test_the_derivative_in_a_seed_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hessian rows of a loss's coefficient that is 0, also by the function in torch's place."""
    monkeypatch.setattr(cross_entropy, "LEAST", 1)
    own = variables()
    z = F.linear(*own[:2]).flatten(0, 1)

    def row(loss_fn: Loss, at: Tensor) -> Tensor:
        coefficient, x = torch.zeros((), dtype=torch.float64).requires_grad_(), at.requires_grad_()
        (gradient,) = torch.autograd.grad(coefficient * loss_fn(x), x, create_graph=True)
        result: Tensor = torch.autograd.grad(gradient, coefficient, at.detach() ** 2)[0]
        return result

    options = OPTIONS["all"]
    expected = row(lambda h: formula(h, own[1], TARGETS, **options), own[0])
    assert torch.allclose(
        row(lambda h: linear_cross_entropy(h, own[1], TARGETS, **options), own[0]), expected
    )
    expected = row(lambda z: F.cross_entropy(z, TARGETS.flatten()), z.detach())
    result = row(lambda z: fused(z, TARGETS.flatten()), z.detach())
    assert torch.allclose(result, expected)


class Model(nn.Module):
    """Tokens [b, t] to hidden states [b, t, d], and an output layer."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.hidden(self.embedding(tokens)).tanh()
        return result


def unfused(model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
    y = model.head(model(batch[:, :-1]))
    return 1.5 * torch.tanh(y / 1.5), batch[:, 1:]


def unfused_loss(y: Tensor, targets: Tensor) -> Tensor:
    rows, classes = y.flatten(0, 1), targets.flatten()
    squares = rows.logsumexp(1)[classes != 2] ** 2
    loss = F.cross_entropy(rows, classes, ignore_index=2, label_smoothing=0.1)
    return loss + 0.2 * squares.mean()


def unformed(model: nn.Module, batch: Tensor) -> tuple[LinearLogits, Tensor]:
    logits = LinearLogits(model(batch[:, :-1]), model.head.weight, model.head.bias, softcap=1.5)
    return logits, batch[:, 1:]


def unformed_loss(logits: LinearLogits, targets: Tensor) -> Tensor:
    return logits.cross_entropy(targets, ignore_index=2, label_smoothing=0.1, z_loss=0.2, chunk=3)


@pytest.mark.parametrize("engine", [n for n in NAMES if n != "finite_difference"] + ["auto"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", [HessianOperator, GGNOperator])
def test_matrices_are_those_of_the_formula_with_every_engine(
    kind: type[HessianOperator | GGNOperator], tied: bool, engine: str
) -> None:
    torch.manual_seed(0)
    model = Model(tied=tied).double()
    data = list(torch.randint(CLASSES, (2, 3, 5)))

    def tokens(batch: Tensor) -> float:
        return float((batch[:, 1:] != 2).sum())

    matrix = kind(
        model, unformed_loss, data, forward=unformed, weight=tokens, engine=engine
    ).to_dense()
    expected = kind(
        model, unfused_loss, data, forward=unfused, weight=tokens, engine="cached_graph"
    ).to_dense()
    torch.testing.assert_close(matrix, expected, rtol=1e-9, atol=1e-12)


def test_several_batches_of_unformed_logits_need_a_weight() -> None:
    model, data = Model(tied=False), list(torch.randint(CLASSES, (2, 3, 5)))
    operator = GGNOperator(model, unformed_loss, data, forward=unformed)
    with pytest.raises(ValueError, match=r"number of samples is unknown.*pass weight"):
        operator.to_dense()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_widened_before_the_product(dtype: torch.dtype, autocast: bool) -> None:
    """Derivatives are those of float32 at the rounded variables, rounded once at the end."""
    options = OPTIONS["all"] | {"class_weights": CLASS_WEIGHTS.to(dtype)}
    half = [v.to(dtype) for v in variables()]

    def derivatives(own: list[Tensor]) -> list[Tensor]:
        wrt = [v.requires_grad_() for v in own]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = linear_cross_entropy(wrt[0], wrt[1], TARGETS, wrt[2], **options, chunk=3)
        assert loss.dtype == torch.float32
        gradient = torch.autograd.grad(loss, wrt, create_graph=True)
        u = [v.detach() for v in wrt]
        return [loss, *gradient, *torch.autograd.grad(gradient, wrt, u)]

    wide = derivatives([v.float() for v in half])
    rounded = derivatives(half)
    assert [t.dtype for t in rounded[1:]] == [dtype] * 6
    for ours, exact in zip(rounded, wide, strict=True):
        torch.testing.assert_close(ours, exact.to(ours.dtype))


def test_neither_training_nor_products_form_the_logits() -> None:
    """With autograd's help, torch keeps three arrays of their size in training, and more here."""
    tokens, classes, width = 96, 4000, 4
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(classes, width, requires_grad=True)
    targets = torch.randint(classes, (tokens,))

    def train(loss_fn: Loss) -> None:
        torch.autograd.grad(loss_fn(hidden, weight, targets), [hidden, weight])

    def multiply(loss_fn: Loss) -> None:
        gradient = torch.autograd.grad(
            loss_fn(hidden, weight, targets), [hidden, weight], create_graph=True
        )
        torch.autograd.grad(gradient, [hidden, weight], [hidden.detach(), weight.detach()])

    def pieces(*args: Tensor) -> Tensor:
        return linear_cross_entropy(*args, chunk=8)

    for run, ours, theirs in ((train, 0.5, 2.0), (multiply, 0.6, 5.0)):
        run(pieces)
        assert arrays_at_most(lambda run=run: run(pieces), 4 * tokens * classes) < ours
        assert arrays_at_most(lambda run=run: run(formula), 4 * tokens * classes) > theirs


def test_the_default_number_of_tokens_holds_a_number_of_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = variables()
    expected = linear_cross_entropy(*own[:2], TARGETS)
    sizes: list[int] = []
    take = module._logits

    def counted(h: Tensor, *args: Any) -> Tensor:
        sizes.append(len(h))
        return take(h, *args)

    monkeypatch.setattr(module, "_logits", counted)
    monkeypatch.setitem(module._PIECE, "cpu", 3 * CLASSES + 1)
    assert torch.allclose(linear_cross_entropy(*own[:2], TARGETS), expected)
    assert sizes == [3, 3, 2]  # of the tokens that count


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"hidden": [1.0]}, TypeError, "hidden must be a tensor, not list"),
        ({"weight": None}, TypeError, "weight must be a tensor, not NoneType"),
        ({"hidden": torch.ones(2, 5, WIDTH).long()}, TypeError, "hidden must be floating"),
        ({"targets": TARGETS.int()}, TypeError, "targets must be class indices of dtype int64"),
        ({"weight": torch.ones(CLASSES, 4)}, ValueError, r"hidden must be \[..., d\] and weight"),
        ({"targets": TARGETS[:, 1:]}, ValueError, r"targets must be \[2, 5\], not \[2, 4\]"),
        ({"bias": torch.ones(3)}, ValueError, r"bias must be \[11\], not \[3\]"),
        ({"class_weights": torch.ones(3)}, ValueError, r"class_weights must be \[11\]"),
        (
            {"class_weights": torch.ones(CLASSES, requires_grad=True)},
            ValueError,
            "class_weights must be constants",
        ),
        ({"weight": torch.ones(CLASSES, WIDTH, device="meta")}, ValueError, "to one device"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], not 1.5"),
        ({"z_loss": -1.0}, ValueError, "z_loss must be a number >= 0"),
        ({"z_loss": float("nan")}, ValueError, "z_loss must be a number >= 0"),
        ({"softcap": 0.0}, ValueError, "softcap must be a number > 0"),
        ({"reduction": "none"}, ValueError, "reduction must be 'mean' or 'sum', not 'none'"),
        ({"chunk": 0}, ValueError, "chunk must be a number of tokens >= 1, not 0"),
    ],
)
def test_arguments_that_do_not_fit(
    changes: dict[str, Any], kind: type[Exception], message: str
) -> None:
    own = variables()
    arguments = {"hidden": own[0], "weight": own[1], "targets": TARGETS} | changes
    with pytest.raises(kind, match=message):
        linear_cross_entropy(**arguments)


@pytest.mark.parametrize("wrong", [CLASSES, -1])
def test_classes_that_there_are_not_raise(wrong: int) -> None:
    with pytest.raises((RuntimeError, IndexError), match=r"out of (bounds|range)"):
        linear_cross_entropy(*variables()[:2], TARGETS.where(TARGETS != 7, wrong))
