"""The matrices of causal language models, against those of a loss written out by hand."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call
from torch.utils.data import DataLoader

from eigenfilter.curvature import HessianOperator, causal_lm, eigsh
from eigenfilter.curvature.engines import NAMES
from marks import rest_slow
from pages import ROOT, run_page
from run_distributed import RunDistributed

transformers = pytest.importorskip("transformers")

by_peft = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

VOCABULARY = 7
LENGTH = 6
Batch = dict[str, Tensor]


def gpt2(vocabulary: int = VOCABULARY, **options: Any) -> Any:
    """Its embedding and its head share a weight."""
    shape = {"n_positions": 8, "n_embd": 4, "n_layer": 2, "n_head": 2, "n_inner": 5}
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(vocab_size=vocabulary, **shape, **tokens, **options)
    return transformers.GPT2LMHeadModel(config)


def llama(tied: bool = False) -> nn.Module:
    """Its heads share keys and values."""
    shape = {"hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    kind = "Qwen2" if tied else "Llama"
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY, tie_word_embeddings=tied, **shape, **heads
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": gpt2,
    "llama": llama,
    "qwen2": functools.partial(llama, tied=True),
}


def make(name: str = "gpt2", dtype: torch.dtype = torch.float64) -> Any:
    """Return a model in training mode, the same each time, whose weights are not small."""
    torch.manual_seed(2)
    model = MODELS[name]().to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape).to(p), alpha=0.2)
    return model.train()


def batches() -> list[Batch]:
    """Padding to the right, prompts that do not count, nothing that counts; each time the same."""
    torch.manual_seed(3)
    ids = torch.randint(VOCABULARY, (3, LENGTH))
    mask = torch.ones_like(ids)
    mask[1, 3:], mask[2, 5:] = 0, 0
    prompted = torch.randint(VOCABULARY, (2, 4))
    labels = prompted.clone()
    labels[0, :2], labels[1, 3] = -100, -100
    ignored = torch.randint(VOCABULARY, (2, 5))
    return [
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": ignored, "labels": torch.full_like(ignored, -100)},
        {"input_ids": prompted, "attention_mask": torch.ones_like(labels), "labels": labels},
    ]


def counted(batch: Batch) -> list[tuple[int, int, int]]:
    """The sequence, the position and the token of each that counts."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    labels = batch.get("labels")
    return [
        (s, t, int(ids[s, t]))
        for s in range(len(ids))
        for t in range(1, ids.shape[1])
        if (bool(mask is None or mask[s, t]) if labels is None else int(labels[s, t]) != -100)
    ]


def by_hand(model: Any, data: list[Batch], matrix: str = "hessian") -> Tensor:
    """The matrix, dense, of the parameters that require grad, with the plain attention."""
    model = copy.deepcopy(model).eval()
    model.set_attn_implementation("eager")
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    x = torch.cat([p.detach().flatten() for p in named.values()])
    tokens = torch.tensor([token for batch in data for _, _, token in counted(batch)])

    def log_probabilities(x: Tensor) -> Tensor:
        pieces = x.split([p.numel() for p in named.values()])
        at = {n: v.view_as(p) for (n, p), v in zip(named.items(), pieces, strict=True)}
        rows = []
        for batch in data:
            inputs = {name: t for name, t in batch.items() if name != "labels"}
            logits = functional_call(model, at, (), inputs).logits
            rows += [logits[s, t - 1] for s, t, _ in counted(batch)]
        return torch.stack(rows)

    def losses(z: Tensor) -> Tensor:
        return -z.log_softmax(1).gather(1, tokens[:, None])[:, 0]

    if matrix == "hessian":
        return hessian(lambda x: losses(log_probabilities(x)).mean(), x)
    J = jacobian(log_probabilities, x)  # [tokens, vocabulary, n]
    p = log_probabilities(x).detach().softmax(1)
    if matrix == "ggn":
        inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        return torch.einsum("tin,tij,tjm->nm", J, inner, J) / len(tokens)
    G = torch.einsum("ti,tin->tn", p - nn.functional.one_hot(tokens, VOCABULARY), J)
    return G.T @ G / len(tokens)


@functools.cache
def exact(name: str, matrix: str) -> Tensor:
    return by_hand(make(name), batches(), matrix)


def assert_near(result: Tensor, expected: Tensor, tol: float) -> None:
    atol = tol * float(expected.abs().max())
    torch.testing.assert_close(result, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("matrix", ["hessian", "ggn", "fisher"])
@pytest.mark.parametrize("name", rest_slow(MODELS, "gpt2", "llama"))
def test_the_matrix_of_all_tokens(name: str, matrix: str) -> None:
    """Uneven batches weigh by their tokens; tied weights count once."""
    model, data = make(name), batches()
    op = causal_lm(model, data, matrix)
    assert len(op.params) == len(list(model.parameters()))
    # Llama's norms and the softmax of its plain attention compute in float32.
    assert_near(op.to_dense(), exact(name, matrix), 1e-11 if name == "gpt2" else 1e-5)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_the_models_own(name: str) -> None:
    model, data = make(name, torch.float32).eval(), batches()
    op = causal_lm(model, data)
    assert isinstance(op, HessianOperator)
    sizes = [len(counted(batch)) for batch in data]
    for batch, size in zip(data, sizes, strict=True):
        if "labels" not in batch:
            batch["labels"] = batch["input_ids"].where(batch["attention_mask"] > 0, -100)
        if size:
            (size / sum(sizes) * model(**batch).loss).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(op.gradient(), expected, rtol=1e-4, atol=1e-6)


def vector(model: nn.Module) -> list[Tensor]:
    """One vector, in the shapes of the parameters."""
    return [torch.linspace(-1, 1, p.numel(), dtype=p.dtype).view_as(p) for p in model.parameters()]


def padded(rows: list[list[int]]) -> Any:
    length = max(map(len, rows))
    ids = [row + [0] * (length - len(row)) for row in rows]
    mask = [[int(i < len(row)) for i in range(length)] for row in rows]
    return transformers.BatchEncoding(
        {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    )


def test_a_loader_of_encodings() -> None:
    model = make()
    rows = [torch.randint(VOCABULARY, (size,)).tolist() for size in (6, 2, 4, 1, 5)]
    loader = DataLoader(rows, batch_size=2, collate_fn=padded)  # type: ignore[arg-type]
    v = torch.cat([t.flatten() for t in vector(model)])
    torch.testing.assert_close(causal_lm(model, loader) @ v, causal_lm(model, padded(rows)) @ v)


@pytest.mark.parametrize("matrix", rest_slow(["hessian", "ggn", "fisher"]))
@pytest.mark.parametrize("engine", NAMES)
def test_every_engine(engine: str, matrix: str) -> None:
    model, data = make(), batches()
    V = torch.randn(sum(p.numel() for p in model.parameters()), 3, dtype=torch.float64)
    op = causal_lm(model, data, matrix, engine=engine)
    tol = 1e-6 if engine == "finite_difference" else 1e-11
    assert_near(op @ V, exact("gpt2", matrix) @ V, tol)


def test_large_vocabularies_have_the_fused_product(caplog: pytest.LogCaptureFixture) -> None:
    model = gpt2(1 << 14).double()
    batch = {"input_ids": torch.randint(1 << 14, (2, 6))}
    v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    with caplog.at_level("INFO", logger="eigenfilter"):
        product = causal_lm(model, batch) @ v
    assert "cross_entropy of many logits" in caplog.text

    def loss(z: Tensor, tokens: Tensor) -> Tensor:
        return -z.log_softmax(1).gather(1, tokens[:, None]).mean()

    def forward(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return model(**batch).logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten()

    written = HessianOperator(model, loss, batch, forward=forward)
    torch.testing.assert_close(product, written @ v, rtol=1e-9, atol=1e-12)


def test_one_block() -> None:
    model, data = make(), batches()
    names = [name for name, _ in model.named_parameters()]
    sizes = [p.numel() for p in model.parameters()]
    owner = torch.repeat_interleave(torch.arange(len(names)), torch.tensor(sizes))
    whole = exact("gpt2", "hessian")
    for params in ("*.h.1.*", ["*.h.1.attn.*", "*.h.1.mlp.*", "*.h.1.ln_?.*"]):
        rows = torch.isin(owner, torch.tensor([i for i, n in enumerate(names) if ".h.1." in n]))
        op = causal_lm(model, data, params=params)
        assert_near(op.to_dense(), whole[rows][:, rows], 1e-11)
    head = causal_lm(model, data, params="lm_head.*")
    assert head.params == (model.transformer.wte.weight,)
    block = causal_lm(model, data, params=model.transformer.h[1].parameters())
    assert block.params == op.params


def adapted(**options: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, **options)
    model = peft.get_peft_model(make(), config).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    return model


@by_peft
def test_adapters_alone() -> None:
    """Dropout in the adapters is off; frozen weights are left out."""
    model, data = adapted(lora_dropout=0.3), batches()
    op = causal_lm(model, data)
    assert op.shape[0] == 2 * 2 * (4 + 12)  # two adapters of rank 2, from 4 to 12
    whole = op.to_dense()
    assert_near(whole, by_hand(model, data), 1e-11)
    one = causal_lm(model, data, params="*.h.0.*lora_*")
    torch.testing.assert_close(one.to_dense(), whole[:32, :32])
    assert_near(causal_lm(model, data, "ggn").to_dense(), by_hand(model, data, "ggn"), 1e-11)


@by_peft
def test_virtual_tokens() -> None:
    """A prompt that is learned comes before the tokens, and predicts the first one too."""
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(gpt2(), config).eval()
    batch = batches()[0]
    labels = batch["input_ids"].where(batch["attention_mask"] > 0, -100)
    op = causal_lm(model, batch)
    assert isinstance(op, HessianOperator)
    model(**batch, labels=labels).loss.backward()
    (p,) = op.params
    torch.testing.assert_close(op.gradient(), p.grad.flatten(), rtol=1e-4, atol=1e-6)


def test_weights_in_half_precision() -> None:
    """The matrix is that of a copy in float32."""
    model, data = make(dtype=torch.bfloat16), batches()
    op = causal_lm(model, data)
    assert op.dtype == torch.float32
    wide = copy.deepcopy(model).float()
    v = torch.cat([t.flatten() for t in vector(wide)])
    torch.testing.assert_close(op @ v, causal_lm(wide, data) @ v)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert causal_lm(model, data, dtype=torch.float64).dtype == torch.float64


@by_peft
def test_adapters_of_a_model_in_half_precision() -> None:
    """PEFT keeps adapters in float32, and their products have its precision."""
    model, data = adapted(), batches()
    for p in model.parameters():
        p.data = p.data.float() if p.requires_grad else p.data.bfloat16()
    op = causal_lm(model, data)
    wide = copy.deepcopy(model).float()
    torch.testing.assert_close(op.to_dense(), causal_lm(wide, data).to_dense())


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_gradient_checkpointing(matrix: str) -> None:
    """Transformers checkpoints in mode="train"; without dropout that is the same function."""
    options = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model, data = gpt2(**options).double(), batches()
    v = torch.cat([t.flatten() for t in vector(model)])
    calls: list[int] = []
    model.transformer.h[0].ln_1.register_forward_pre_hook(lambda *_: calls.append(1))
    expected = causal_lm(model, data, matrix, engine="per_pass_graph") @ v
    evaluations = len(calls)
    model.activation_checkpointing_enable({"use_reentrant": False})
    calls.clear()
    op = causal_lm(model, data, matrix, mode="train", engine="per_pass_graph")
    torch.testing.assert_close(op @ v, expected)
    assert len(calls) > evaluations  # backward ran the blocks again


@pytest.mark.filterwarnings("ignore")
def test_reentrant_checkpointing_is_named() -> None:
    model, data = make(), batches()
    model.activation_checkpointing_enable({"use_reentrant": True})
    op = causal_lm(model, data, mode="train", engine="cached_graph")
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        op @ torch.ones(op.shape[0], dtype=torch.float64)


def own_batches(rank: int) -> list[Batch]:
    """One process has two batches, and the other one a batch in which nothing counts."""
    data = batches()
    return [data[1]] if rank else [data[0], data[2]]


def sharded_product(rank: int) -> list[Tensor]:
    from torch.distributed.fsdp import fully_shard

    model = make()
    v = vector(model)
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    op = causal_lm(model, own_batches(rank), engine="finite_difference")
    own = [
        dist.tensor.distribute_tensor(piece, p.device_mesh, p.placements).to_local().flatten()
        for piece, p in zip(v, op.params, strict=True)
    ]
    product = op @ torch.cat(own)
    return list(product.split([len(t) for t in own]))


@pytest.mark.distributed
def test_shards_of_fsdp2(run_distributed: RunDistributed) -> None:
    results = run_distributed(sharded_product, 2)
    expected = exact("gpt2", "hessian") @ torch.cat([t.flatten() for t in vector(make())])
    whole = [torch.cat(parts) for parts in zip(*results, strict=True)]
    assert_near(torch.cat(whole), expected, 1e-6)


def test_the_top_of_a_spectrum() -> None:
    model, data = make(), batches()
    top = eigsh(causal_lm(model, data), k=3)
    expected = torch.linalg.eigvalsh(exact("gpt2", "hessian")).flip(0)[:3]
    torch.testing.assert_close(top.values, expected, rtol=1e-4, atol=0)


def refusals() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    ids = torch.randint(VOCABULARY, (2, 4))
    yield "matrix must be one of", {"input_ids": ids}, {"matrix": "gauss_newton"}
    yield "a batch must be a dict .* not tuple", (ids, ids), {}
    yield "it has list, under the keys", {"input_ids": ids.tolist()}, {}
    yield r"it has NoneType, under the keys \['inputs'\]", {"inputs": ids}, {}
    yield r"it has \[4\], under", {"input_ids": ids[0]}, {}
    yield "pass labels", {"input_ids": ids, "attention_mask": torch.ones(2, 1, 4, 4)}, {}
    yield "no token counts", {"input_ids": ids, "labels": torch.full_like(ids, -100)}, {}
    yield "no token counts", {"input_ids": ids[:, :1]}, {}


@pytest.mark.parametrize(("message", "data", "options"), list(refusals()))
def test_what_is_refused(message: str, data: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        causal_lm(make(), data, **options)


def test_a_loader_without_a_token_that_counts() -> None:
    rows = [[1], [2], [3]]
    loader = DataLoader(rows, batch_size=2, collate_fn=padded)  # type: ignore[arg-type]
    op = causal_lm(make(), loader)
    with pytest.raises(ValueError, match="all batches have weight 0"):
        op @ torch.ones(op.shape[0], dtype=torch.float64)


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    printed = run_page(ROOT / "docs" / "language_models.md", tmp_path)
    assert "block 1: " in printed
    assert re.search(r"adapters: 512 parameters, eigenvalues -\d\.\d+ to \d", printed)
