"""The classes of docs/integrations/torchtitan.md, in torchtitan's own `train_step`."""

from __future__ import annotations

import importlib.util
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pages import ROOT, blocks_of
from plain_usam import USAM, Batch, PlainUSAM, assert_same, make_batches, make_model

NEEDED = ("torchtitan", "torchdata", "datasets", "tyro", "spmd_types")
if not all(map(importlib.util.find_spec, NEEDED)):
    pytest.skip("needs torchtitan", allow_module_level=True)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of torchtitan's imports
    from torchtitan.components.optimizer import ParamGroupConfig
    from torchtitan.trainer import Trainer

    PAGE: dict[str, Any] = {}
    exec(blocks_of(ROOT / "docs/integrations/torchtitan.md")[0], PAGE)


def make_optimizers(model: nn.Module, **kwargs: Any) -> Any:
    group = ParamGroupConfig(pattern=".*", optimizer_name="USAM", optimizer_kwargs=USAM | kwargs)
    container = PAGE["SharpnessAwareOptimizers"]
    config = container.Config(param_groups=[group], implementation="for-loop")
    return container(config, model_parts=[model])


class SmallTrainer(PAGE["SharpnessAwareTrainer"]):  # type: ignore[misc]
    """As much of torchtitan's trainer as its `train_step` needs."""

    def __init__(self, model: nn.Module, accumulation: int, max_norm: float) -> None:
        self.optimizers = make_optimizers(model)
        self.model_parts = [model]
        self.gradient_accumulation_steps = accumulation
        self.num_pipeline_parallel_microbatches = 1
        self.device = torch.device("cpu")
        self.step = 1
        self.parallel_dims = SimpleNamespace(
            dp_enabled=False,
            pp_enabled=False,
            ep_enabled=False,
            get_optional_mesh=lambda name: None,
        )
        training = SimpleNamespace(max_norm=max_norm, disable_cuda_graphs=True)
        self.config = SimpleNamespace(training=training)
        self.metrics_processor = SimpleNamespace(should_log=lambda step: False)
        self.lr_schedulers = SimpleNamespace(step=lambda: None, get_metrics=dict)
        self.checkpointer = SimpleNamespace(maybe_wait_for_staging=lambda: None)

    def post_dataloading_process(self, inputs: Any, labels: Any) -> Any:
        return inputs.pop("input"), labels, {}

    def fwd_bwd_fn(self, inputs: Any, labels: Any, tokens: torch.Tensor, extra: Any) -> Any:
        loss = nn.functional.mse_loss(self.model_parts[0](inputs), labels, reduction="sum") / tokens
        loss.backward()
        return loss


@pytest.mark.parametrize("max_norm", [1e9, 0.05])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_train_step_is_usam(accumulation: int, max_norm: float) -> None:
    assert SmallTrainer.train_step is Trainer.train_step
    model, other = make_model(), make_model()
    trainer = SmallTrainer(model, accumulation, max_norm)
    loader = iter([({"input": x}, y) for x, y in make_batches(8)])
    torch.manual_seed(1)
    for _ in range(8 // accumulation):
        trainer.train_step(loader)

    tokens = accumulation * 6 * 2

    def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
        return nn.functional.mse_loss(model(batch[0]), batch[1], reduction="sum") / tokens

    plain = PlainUSAM(other, max_norm, loss_of=loss_of)
    torch.manual_seed(1)
    for start in range(0, 8, accumulation):
        plain.step(make_batches(8)[start : start + accumulation], factor=1.0)
    assert_same(model, other)


def test_checkpoints() -> None:
    model = make_model()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    optimizers = make_optimizers(model)
    optimizers.state_dict()  # which initializes the state
    for name, t in model.state_dict().items():
        assert torch.equal(before[name], t)
    trainer = SmallTrainer(model, 1, 1e9)
    trainer.train_step(iter([({"input": x}, y) for x, y in make_batches(1)]))
    saved = {
        k: v.clone() if isinstance(v, torch.Tensor) else v
        for k, v in trainer.optimizers.state_dict().items()
    }
    again = make_optimizers(make_model(), lr=0.5)
    again.load_state_dict(saved)
    (opt,) = again
    (first,) = trainer.optimizers
    assert opt.param_groups[0]["lr"] == USAM["lr"]
    for p, q in zip(opt.param_groups[0]["params"], first.param_groups[0]["params"], strict=True):
        buffers = opt.state[p]["momentum_buffer"], first.state[q]["momentum_buffer"]
        assert torch.equal(*buffers)
        assert buffers[0].abs().max() > 0


def test_the_container_itself_refuses() -> None:
    model = make_model()
    optimizers = make_optimizers(model)
    model(make_batches(1)[0][0]).sum().backward()
    with pytest.raises(RuntimeError, match="needs 1 ascents before it"):
        optimizers.step()
