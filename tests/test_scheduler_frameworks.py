"""What frameworks look at in a scheduler: its type, its state, and the lr that they log."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import eigenfilter as ef
from eigenfilter.schedulers import RhoScheduler


def imported(name: str) -> Any:
    """A framework, or a skipped test; what it warns of when it is imported does not matter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def step(opt: Any, model: nn.Module, backward: Any = torch.Tensor.backward) -> None:
    """A step in the explicit form."""
    for _ in range(2):
        backward(model(torch.ones(4, 3)).square().mean())
        opt.ascend()
    opt.step()
    opt.zero_grad()


def test_lightning(tmp_path: Path) -> None:
    """It accepts the scheduler, steps it, logs the lr of the groups and resumes."""
    lightning = imported("lightning.pytorch")
    types = imported("lightning.pytorch.utilities.types")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            loss: torch.Tensor = self.layer(batch).square().mean()
            return loss

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.ones(8, 3), batch_size=2)

        def configure_optimizers(self) -> Any:
            opt = ef.USAM(self.parameters(), lr=0.1, rho=0.05)
            rho = RhoScheduler(opt, "linear", total_steps=10)
            assert isinstance(rho, types.LRSchedulerTypeTuple)
            lr = torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.5)
            return [opt], [{"scheduler": s, "interval": "step"} for s in (lr, rho)]

    def trainer(steps: int) -> Any:
        return lightning.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            default_root_dir=tmp_path,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice about workers
        first = trainer(3)
        first.fit(Module())
        first.save_checkpoint(tmp_path / "last.ckpt")
        second = trainer(4)
        second.fit(Module(), ckpt_path=tmp_path / "last.ckpt")
    rho = second.lr_scheduler_configs[1].scheduler
    assert rho.last_epoch == 4
    assert rho.get_last_rho() == [pytest.approx(0.05 * 0.6)]
    assert rho.get_last_lr() == [pytest.approx(0.1 / 16)]


def test_fabric() -> None:
    fabric = imported("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    model = nn.Linear(3, 1)
    opt = ef.USAM(model.parameters(), lr=0.1, rho=0.05)
    before = RhoScheduler(opt, "linear", total_steps=4)
    model, wrapper = fabric.setup(model, opt)
    after = RhoScheduler(wrapper, "lr")
    for _ in range(2):
        step(wrapper, model, fabric.backward)
        before.step()
        assert opt.param_groups[0]["rho"] == pytest.approx(0.05 * (1 - before.last_epoch / 4))
        after.step()
        assert opt.param_groups[0]["rho"] == 0.05


def test_accelerate(tmp_path: Path) -> None:
    """`prepare` wraps it as it wraps torch's, and a registered one is saved."""
    accelerate = imported("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = nn.Linear(3, 1)
    opt = ef.USAM(model.parameters(), lr=0.1, rho=0.05)
    own = RhoScheduler(opt, "linear", total_steps=10)
    registered = RhoScheduler(opt, "lr")
    model, wrapper, prepared = accelerator.prepare(model, opt, own)
    assert type(prepared).__name__ == "AcceleratedScheduler"
    accelerator.register_for_checkpointing(registered)
    for _ in range(3):
        step(wrapper.optimizer, model, accelerator.backward)
        prepared.step()
        registered.step()
    assert (own.last_epoch, registered.last_epoch) == (3, 3)
    assert prepared.get_last_lr() == [0.1]
    accelerator.save_state(str(tmp_path))
    prepared.step()
    registered.step()
    accelerator.load_state(str(tmp_path))
    assert (own.last_epoch, registered.last_epoch) == (3, 3)
    assert opt.param_groups[0]["rho"] == 0.05  # the registered one is loaded last


def test_transformers(tmp_path: Path) -> None:
    """Its Trainer steps and saves a scheduler that it is given, and logs its lr."""
    transformers = imported("transformers")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.layer(x).square().mean()}

    model = Model()
    opt = ef.USAM(model.parameters(), lr=0.1, rho=0.0)  # its loop takes no ascents
    scheduler = RhoScheduler(opt, "linear", total_steps=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            use_cpu=True,
            report_to=[],
            save_steps=3,
            logging_steps=1,
            disable_tqdm=True,
        )
        data = [{"x": torch.ones(3)} for _ in range(24)]
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=data, optimizers=(opt, scheduler)
        )
        trainer.train()
    assert scheduler.last_epoch == 3
    assert [e["learning_rate"] for e in trainer.state.log_history if "loss" in e] == [0.1] * 3
    saved = torch.load(tmp_path / "checkpoint-3" / "scheduler.pt", weights_only=True)
    assert saved == {"last_epoch": 3, "_step_count": 4}
