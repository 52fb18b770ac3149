"""Attention whose fused kernel has no second derivative: it runs in its math backend."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from curvature.networks import OPERATORS, columns
from curvature.networks import make as samples
from eigenfilter.curvature import CurvatureOperator, GGNOperator, HessianOperator
from eigenfilter.curvature.engines import NAMES
from marks import rest_slow

LOGGER = "eigenfilter.curvature.loss.objective"
SEQUENCES, LENGTH, WIDTH = 4, 5, 4


class Plain(nn.Module):
    """torch's function itself."""

    def __init__(self, *, dropout: float = 0.0, **options: Any) -> None:
        super().__init__()
        self.qkv, self.dropout, self.options = nn.Linear(WIDTH, 3 * WIDTH), dropout, options

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        p = self.dropout if self.training else 0.0
        return scaled_dot_product_attention(q, k, v, dropout_p=p, **self.options).squeeze(1)


class MultiHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Padded(nn.Module):
    """An encoder with padding, which torch's fast path would skip."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 6, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[:, 3:] = True
        return self.encoder(x, src_key_padding_mask=padding)


class Recomputed(nn.Module):
    """Backward runs the attention again, and must do so in the same backend."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = Plain()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inside, x, use_reentrant=False)


BODIES: dict[str, Callable[[], nn.Module]] = {
    "plain": Plain,
    "causal": lambda: Plain(is_causal=True),
    "masked": lambda: Plain(attn_mask=torch.ones(LENGTH, LENGTH).tril().bool()),
    "biased": lambda: Plain(attn_mask=torch.linspace(-1, 1, LENGTH**2).view(LENGTH, -1).double()),
    "dropout": lambda: Plain(dropout=0.3),
    "multihead": MultiHead,
    "encoder": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 6, batch_first=True),
    "encoder, norm first": lambda: nn.TransformerEncoderLayer(
        WIDTH, 2, 6, batch_first=True, norm_first=True, activation="gelu"
    ),
    "padded": Padded,
    "recomputed": Recomputed,
}


class Classifier(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(1))


def make(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    model = Classifier(BODIES[name]()).double()
    x = torch.randn(SEQUENCES, LENGTH, WIDTH, dtype=torch.float64)
    return model, x, torch.randint(3, (SEQUENCES,))


def in_math(kind: type[CurvatureOperator], *arguments: Any, mode: str = "eval") -> Tensor:
    """Return the matrix built densely, under the math backend and without the fast path."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            return OPERATORS[kind](*arguments, mode=mode)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", rest_slow(BODIES, "plain", "encoder", "recomputed"))
@pytest.mark.parametrize("kind", rest_slow(OPERATORS))
def test_every_engine(kind: type[CurvatureOperator], name: str, mode: str) -> None:
    """An engine is right or raises: forward mode does not repeat every dropout mask."""
    model, x, target = make(name)
    recomputed = isinstance(model.get_submodule("body"), Recomputed)
    original = copy.deepcopy(model)
    if recomputed:
        original.body = original.get_submodule("body.inside")
    expected = in_math(kind, original, x, target, mode=mode)
    model.train(mode == "eval")
    refusals = []
    for engine in [*NAMES, "auto"]:
        op = kind(model, nn.CrossEntropyLoss(), (x, target), mode=mode, engine=engine)
        atol = float(expected.abs().max()) * (1e-6 if engine == "finite_difference" else 1e-11)
        try:
            result = columns(op)
        except RuntimeError as error:
            if "engine='cached_graph'" not in " ".join(
                [str(error), *getattr(error, "__notes__", [])]
            ):
                raise
            refusals.append(engine)
            continue
        torch.testing.assert_close(result, expected, rtol=0, atol=atol)
        assert op.engine in (engine, "cached_graph", "vmap")
    masks = mode == "train" and ("encoder" in name or name == "padded")
    assert set(refusals) <= {"forward_over_reverse"}
    assert bool(refusals) == (masks or (recomputed and kind is HessianOperator))


@pytest.mark.parametrize("engine", ["auto", "per_pass_graph", "forward_over_reverse"])
def test_it_is_logged_once(engine: str, caplog: pytest.LogCaptureFixture) -> None:
    model, x, target = make("plain")
    op = GGNOperator(model, nn.CrossEntropyLoss(), [(x, target), (x, target)], engine=engine)
    with caplog.at_level(logging.INFO, LOGGER):
        op.matvec(torch.ones(op.shape[0], dtype=torch.float64))
        columns(op)
    (record,) = (r for r in caplog.records if r.name == LOGGER)
    assert record.getMessage().startswith("scaled_dot_product_attention runs in its math backend")


def test_the_settings_of_the_caller_come_back() -> None:
    model, x, target = make("encoder")

    def settings() -> list[bool]:
        cuda = torch.backends.cuda
        return [
            torch.backends.mha.get_fastpath_enabled(),
            torch.backends.cudnn.enabled,
            cuda.flash_sdp_enabled(),
            cuda.mem_efficient_sdp_enabled(),
            cuda.math_sdp_enabled(),
        ]

    before = settings()
    settings_inside = []

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        settings_inside.append(settings())
        return nn.functional.cross_entropy(output, target)

    columns(HessianOperator(model, loss_fn, (x, target)))
    assert settings() == before
    assert any(inside != before for inside in settings_inside)


@pytest.mark.parametrize("engine", [n for n in [*NAMES, "auto"] if n != "microbatched"])
def test_attention_in_the_loss(engine: str) -> None:
    """For a GGN matrix only the loss is differentiated twice."""
    model, x, _ = make("plain")

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        z = output.view(1, 1, SEQUENCES, 3)
        return scaled_dot_product_attention(z, z.tanh(), z).square().mean()

    expected = in_math(GGNOperator, model, x, x, None, loss_fn)
    op = GGNOperator(model, loss_fn, (x, x), engine=engine)
    atol = 1e-7 if engine == "finite_difference" else 1e-12
    torch.testing.assert_close(columns(op), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_language_model(mode: str, reentrant: bool | None) -> None:
    """GPT-2 at its defaults, and with its layers checkpointed."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=7,
        n_positions=6,
        n_embd=4,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).double()
    ids = torch.randint(7, (3, 5))

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return model(input_ids=batch["ids"]).logits[:, :-1], batch["ids"][:, 1:]

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())

    names = ["transformer.h.0.attn.c_attn.weight"]
    twin = copy.deepcopy(model).train(mode == "train")
    weight = twin.get_parameter(names[0]).detach()

    def value(w: Tensor) -> Tensor:
        with torch.random.fork_rng([]), sdpa_kernel(SDPBackend.MATH):
            torch.manual_seed(0)
            out = functional_call(twin, {names[0]: w}, kwargs={"input_ids": ids})
            return loss_fn(out.logits[:, :-1], ids[:, 1:])

    expected = hessian(value, weight).reshape(weight.numel(), -1)
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    op = HessianOperator(
        model,
        loss_fn,
        {"ids": ids},
        params=[model.get_parameter(names[0])],
        forward=forward,
        mode=mode,
    )
    result = columns(op)
    exact = op.engine != "finite_difference"
    assert exact == (reentrant is not True or mode == "eval")  # checkpointing is for training
    scale = float(expected.abs().max())
    torch.testing.assert_close(result, expected, rtol=0, atol=scale * (1e-11 if exact else 1e-6))


@pytest.mark.parametrize("engine", [*NAMES, "auto"])
@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("dim", rest_slow([0, 1, None]))
def test_weight_normalization(dim: int | None, kind: type[CurvatureOperator], engine: str) -> None:
    """The second derivative of torch's kernel is wrong: it is not even symmetric."""

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(4))
            self.g, self.v = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(4, 5))
            self.last = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            along = tuple(d for d in range(2) if d != dim)
            norm = self.v.square().sum(along, keepdim=True).sqrt()
            return self.last(torch.tanh(x @ (self.v * self.g / norm).T + self.bias))

    first = nn.utils.parametrizations.weight_norm(nn.Linear(5, 4), dim=dim)
    model = nn.Sequential(first, nn.Tanh(), nn.Linear(4, 3)).double()
    _, x, target = samples()
    twin = Written().double()
    own = [p.detach().clone() for p in model.parameters()]
    for (name, _), value in zip(list(twin.named_parameters()), own, strict=True):
        twin.get_submodule(name.rpartition(".")[0])._parameters[name.rpartition(".")[2]] = (
            nn.Parameter(value)
        )
    expected = OPERATORS[kind](twin, x, target)
    torch.testing.assert_close(expected, expected.T, rtol=0, atol=1e-14)
    op = kind(model, nn.CrossEntropyLoss(), (x, target), engine=engine)
    if dim is None and engine == "forward_over_reverse":
        with pytest.raises(RuntimeError) as raised:
            columns(op)
        assert "use engine='cached_graph'" in raised.value.__notes__[0]
        return
    atol = 1e-7 if engine == "finite_difference" else 1e-12
    torch.testing.assert_close(columns(op), expected, rtol=0, atol=atol)
