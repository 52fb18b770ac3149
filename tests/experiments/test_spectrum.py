"""eigenfilter spectrum: checkpoints and users' models against dense Hessians, and bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigenfilter as ef
from eigenfilter.experiments import runs
from eigenfilter.experiments.cli import main
from eigenfilter.experiments.config import Config
from eigenfilter.experiments.devices import device_of
from eigenfilter.experiments.loaded_models import load_trained

CONFIG = Config(
    samples=60,
    batch_size=20,
    model="mlp-3",
    activation="tanh",
    epochs=2,
    precision="float64",
    lr_schedule="constant",
    threads=1,
)

# What a user's module looks like.


class Bowl(nn.Module):
    """A loss with a known Hessian: sum_i a_i x_i^2 / 2."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones(6, dtype=torch.float64))

    def forward(self, a: Tensor) -> Tensor:
        return 0.5 * a * self.x**2


MODULE = """
import torch
from experiments.test_spectrum import Bowl as make

model = make()

CURVATURES = (torch.tensor([[1.0, 2.0, 3.0, 5.0, 8.0, -4.0]], dtype=torch.float64), torch.zeros(1))

def loss(output, target):
    return output.sum() / len(output)

def data():
    return [CURVATURES, CURVATURES]

def optimizer(params):
    import eigenfilter
    return eigenfilter.SGD(params, lr=0.2)

def broken(*args):
    raise KeyError("no such thing")

damaged = (CURVATURES[0] * float("nan"), CURVATURES[1])
nothing = ()
number = 3
"""


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a user's module into the current folder, and return its name."""
    name = f"users_module_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    return name


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    runs.run(CONFIG, folder)
    return folder


def spectrum(folder: Path, *argv: str) -> dict[str, Any]:
    assert main(["spectrum", "--out", str(folder), *argv]) == 0
    assert (folder / "spectrum.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "spectrum.json").read_text())


def dense(run: Path, samples: int = 0) -> Tensor:
    """Return all eigenvalues of a checkpoint's Hessian, descending; samples=0 uses all images."""
    loaded = load_trained(run, torch.device("cpu"), samples=samples)
    inputs = torch.cat([x for x, _ in loaded.data])
    labels = torch.cat([y for _, y in loaded.data])
    parameters = dict(loaded.model.named_parameters())
    shapes = [p.shape for p in parameters.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        tree = {n: p.view(s) for n, p, s in zip(parameters, parts, shapes, strict=True)}
        output = torch.func.functional_call(loaded.model, tree, inputs)
        return nn.functional.cross_entropy(output, labels)

    flat = torch.cat([p.detach().flatten() for p in parameters.values()])
    return torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat)).flip(0)


def test_a_checkpoint(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--pairs", "4", "--tol", "1e-6", "--probes", "3", "--steps", "20", "--batch-size", "25"]
    report = spectrum(tmp_path, str(run), *argv)
    exact = dense(run)
    assert report["values"] == pytest.approx(exact[:4].tolist(), rel=1e-5)
    assert all(report["converged"])
    assert report["parameters"] == len(exact)
    assert report["subject"]["step"] == 6
    assert report["subject"]["samples"] == 60
    assert report["edge"] == ef.filters.USAM(0.1, 0.9, rho=0.05).max_eigenvalue()
    trace = report["trace"]
    assert trace["value"] == pytest.approx(float(exact.sum()), abs=5 * trace["standard_error"])
    text = capsys.readouterr().out
    assert f"{report['values'][0]:.6g}" in text
    assert f"edge of the optimizer's filter {report['edge']:.5g}" in text


def test_ends_and_samples(run: Path, tmp_path: Path) -> None:
    report = spectrum(tmp_path, str(run / "checkpoint.pt"), "--which", "BE", "--pairs", "2",
                     "--probes", "0")  # fmt: skip
    exact = dense(run)
    assert report["values"] == pytest.approx([float(exact[-1]), float(exact[0])], rel=1e-2)
    assert "density" not in report
    assert report["certificate"]["edge"] == report["edge"]
    fewer = spectrum(tmp_path, str(run), "--samples", "20", "--probes", "1", "--steps", "5",
                     "--certificate", "0")  # fmt: skip
    assert fewer["certificate"] is None
    assert fewer["subject"]["samples"] == 20
    assert fewer["trace"]["standard_error"] is None
    assert fewer["values"][0] != pytest.approx(report["values"][1], rel=1e-3)


def test_measuring_leaves_the_generators(run: Path) -> None:
    before = torch.get_rng_state()
    load_trained(run, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_users_model(user: str, tmp_path: Path) -> None:
    paths = [f"--{what}={user}:{what}" for what in ("loss", "data", "optimizer")]
    report = spectrum(tmp_path, f"--model={user}:make", *paths, "--pairs", "6", "--probes", "2")
    assert report["values"] == pytest.approx([8, 5, 3, 2, 1, -4], rel=1e-6)
    assert report["edge"] == pytest.approx(10.0)
    assert report["certificate"]["verdict"] == "not an equilibrium"
    assert report["certificate"]["sharpness"] == pytest.approx(8)
    weights = tmp_path / "weights.pt"
    torch.save({"x": torch.zeros(6)}, weights)
    again = spectrum(tmp_path, str(weights), f"--model={user}:make", *paths, "--pairs", "1")
    assert again["values"] == pytest.approx([8], rel=1e-3)
    assert again["certificate"]["verdict"] == "outside"
    assert again["certificate"]["upper"]["verdict"] == "inside"
    assert again["subject"]["weights"] == str(weights)


@pytest.mark.parametrize("matrix", ["ggn", "fisher"])
def test_other_matrices_are_positive(matrix: str, run: Path, tmp_path: Path) -> None:
    report = spectrum(
        tmp_path, str(run), "--matrix", matrix, "--which", "SA", "--pairs", "1", "--probes", "0"
    )
    assert report["values"][0] > -1e-10


def assert_command_fails(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["spectrum", *argv]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "give a CHECKPOINT of eigenfilter train, or --model and --data"),
        (["--data", "a:b"], "--data needs --model"),
        (["--model", "a:b"], "--model needs --data"),
        (["--model", "a:b", "--data", "c:d"], "there is no module a here or installed"),
        (["--model", "make", "--data", "c:d"], "'make' must be module:name"),
        (["--model", "{}:nope", "--data", "{}:data"], "has no nope"),
        (["--model", "{}:number", "--data", "{}:data"], "number failed (TypeError"),
        (["--model", "{}:data", "--data", "{}:data"], "data gives a list, not a torch.nn.Module"),
        (["--model", "{}:broken", "--data", "{}:data"], "broken failed (KeyError"),
        (["--model", "{}:make", "--data", "{}:nothing"], "nothing contains no tensors"),
        (["--model", "{}:make", "--data", "{}:broken"], "broken failed (KeyError"),
        (["--model", "{}:make", "--data", "{}:number"], "batch"),
        (["nowhere.pt"], "cannot read nowhere.pt"),
        (["--device", "tpu", "nowhere.pt"], "tpu is not a device"),
    ],
)
def test_bad_input(
    argv: list[str], says: str, user: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_command_fails([word.format(user) for word in argv], says, capsys)


def test_weights_that_do_not_fit(
    user: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"y": torch.zeros(6)}, tmp_path / "w.pt")
    argv = [str(tmp_path / "w.pt"), "--model", f"{user}:make", "--data", f"{user}:data"]
    assert_command_fails(argv, "does not fit", capsys)


def test_more_pairs_than_there_are(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_command_fails([str(run), "--pairs", "9999", "--out", str(run)], "k must", capsys)


def test_products_that_are_not_finite(user: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [f"--{what}={user}:{what}" for what in ("model", "loss")]
    assert_command_fails([*argv, f"--data={user}:damaged", "--pairs", "2"], "finite", capsys)


def test_devices() -> None:
    assert device_of("cpu") == torch.device("cpu")
    assert device_of("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
