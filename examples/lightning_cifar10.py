"""SGD beside USAM on CIFAR-10 with Lightning, and the sharpness at which each of them ends.

    python examples/lightning_cifar10.py                     # on a GPU, or patiently
    python examples/lightning_cifar10.py --images 10000 --epochs 5
    python examples/lightning_cifar10.py --dataset digits    # a minute on a CPU

Both runs start from the same weights and see the same batches. Sharpness is the largest eigenvalue
of the Hessian of the training loss, on the first `--curvature-images` images. CIFAR-10 is read from
--data-dir, else EIGENFILTER_DATA, in torchvision's format. The script needs
`pip install "eigenfilter[lightning,experiments]"`.
"""

from __future__ import annotations

import argparse
import itertools
import logging
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import eigenfilter as ef
from eigenfilter.experiments import datasets
from eigenfilter.integrations.lightning import SharpnessAwareCallback

# With smoothed labels the loss has a minimum: without, sharpness falls as confidence grows.
LOSS = nn.CrossEntropyLoss(label_smoothing=0.1)

# What the data sets want; arguments override it.
DEFAULTS = {
    "cifar10": {"batch_size": 128, "width": 32, "rho": 0.05, "curvature_images": 2000},
    "digits": {"batch_size": 64, "width": 8, "rho": 0.1, "curvature_images": 500},
}


@dataclass(frozen=True)
class Images:
    """Standardized images with their labels."""

    train: TensorDataset
    test: TensorDataset
    channels: int
    size: int


def read(name: str, folder: Path | None, images: int) -> Images:
    """Read a data set; of the training images the first `images`, or all for 0."""
    data = datasets.load(name, folder).first(images)
    mean, deviation = (t.float()[:, None, None] for t in (data.mean, data.deviation))

    def standardized(pixels: Tensor) -> Tensor:
        return (pixels.float() / 255 - mean) / deviation

    train = TensorDataset(standardized(data.images), data.labels)
    test = TensorDataset(standardized(data.test_images), data.test_labels)
    return Images(train, test, data.images.shape[1], data.images.shape[-1])


class Classifier(pl.LightningModule):
    """A convolutional network; nothing in it knows of the method."""

    def __init__(self, data: Images, width: int, lr: float, rho: float, steps: int) -> None:
        super().__init__()
        self.lr, self.rho, self.steps = lr, rho, steps
        layers: list[nn.Module] = []
        widths = [data.channels, width, 2 * width, 4 * width]
        for n_in, n_out in itertools.pairwise(widths):
            layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.GroupNorm(8, n_out), nn.GELU()]
            layers += [nn.MaxPool2d(2)]
        outputs = widths[-1] * (data.size // 8) ** 2
        self.net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(outputs, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = LOSS(self.net(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        right = self.net(batch[0]).argmax(1) == batch[1]
        self.log("accuracy", right.float().mean(), batch_size=len(right))

    def configure_optimizers(self) -> tuple[list[ef.USAM], list[dict[str, object]]]:
        opt = ef.USAM(self.parameters(), lr=self.lr, momentum=0.9, rho=self.rho)  # rho 0: SGD
        lr = torch.optim.lr_scheduler.CosineAnnealingLR(opt, self.steps)
        return [opt], [{"scheduler": lr, "interval": "step"}]


def train(arguments: argparse.Namespace, data: Images, rho: float) -> tuple[float, float]:
    """Train with one radius; return the test accuracy and the sharpness."""
    pl.seed_everything(arguments.seed, verbose=False)
    batch = arguments.batch_size
    steps_an_epoch = -(-len(data.train) // (batch * arguments.accumulate))
    steps = arguments.epochs * steps_an_epoch
    module = Classifier(data, arguments.width, arguments.lr, rho, steps)
    trainer = pl.Trainer(
        max_epochs=arguments.epochs,
        accumulate_grad_batches=arguments.accumulate,
        gradient_clip_val=arguments.clip,
        precision=arguments.precision,
        callbacks=[SharpnessAwareCallback()],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=not arguments.quiet,
        logger=False,
    )
    trainer.fit(module, DataLoader(data.train, batch, shuffle=True))
    (result,) = trainer.test(module, DataLoader(data.test, 500), verbose=False)
    return result["accuracy"], sharpness(module, data, arguments.curvature_images)


def sharpness(module: Classifier, data: Images, images: int) -> float:
    """Return the largest eigenvalue of the Hessian of the training loss."""
    net = module.net.eval()
    inputs, labels = (t[:images] for t in data.train.tensors)
    loader = DataLoader(TensorDataset(inputs, labels), 250)
    op = ef.curvature.HessianOperator(net, LOSS, loader)
    return float(ef.curvature.eigsh(op, k=1, tol=1e-2, check_multiplicity=False).values[0])


def parse() -> argparse.Namespace:
    """Parse the command line; what is not given depends on the data set."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", choices=list(DEFAULTS), default="cifar10")
    parser.add_argument("--data-dir", type=Path, help="folder with the data")
    parser.add_argument("--images", type=int, default=0, help="training images; 0: all")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, help="of a micro-batch: 128; digits: 64")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--width", type=int, help="channels of the first layer: 32; digits: 8")
    parser.add_argument("--lr", type=float, default=0.05, help="falls to 0 along a cosine")
    parser.add_argument("--rho", type=float, help="of USAM: 0.05; digits: 0.1")
    parser.add_argument("--clip", type=float, help="largest norm of the descent's gradient")
    parser.add_argument("--precision", default="32-true", help="Lightning's, as bf16-mixed")
    parser.add_argument("--curvature-images", type=int, help="2,000; digits: 500")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    arguments = parser.parse_args()
    for name, value in DEFAULTS[arguments.dataset].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def main() -> None:
    """Train with SGD and with USAM, and print how sharp each minimum is."""
    arguments = parse()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    data = read(arguments.dataset, arguments.data_dir, arguments.images)
    for name, rho in (("SGD", 0.0), ("USAM", arguments.rho)):
        print(f"{name}: {arguments.epochs} epochs", flush=True)
        accuracy, largest = train(arguments, data, rho)
        print(f"{name}: sharpness {largest:.2f}, test accuracy {accuracy:.3f}", flush=True)


if __name__ == "__main__":
    main()
