"""Backend selection: a name works or raises, and an automatic choice is logged once."""

from __future__ import annotations

import inspect
import logging
import os
import sys

import pytest
import torch

from eigenfilter import _core, kernels
from eigenfilter.kernels import dispatch
from eigenfilter.kernels._op import OPERATIONS

needs_no_cuda = pytest.mark.skipif(_core.cuda_compiled, reason="built with CUDA kernels")


@pytest.fixture(autouse=True)
def fresh_choice() -> None:
    dispatch._choose.cache_clear()


def test_the_cpu_is_served_by_native(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="eigenfilter"):
        assert all(kernels.select("cpu").name == "native" for _ in range(3))
    assert [r.getMessage() for r in caplog.records] == ["kernels on cpu: native"]


def test_an_explicit_choice_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="eigenfilter"):
        assert kernels.select("cpu", "native").name == "native"
        assert kernels.select("cpu", "reference").name == "reference"
        assert kernels.select("mps", "reference").name == "reference"
    assert caplog.records == []


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the kernels would run")
def test_triton_on_a_cpu_needs_its_interpreter() -> None:
    pytest.importorskip("triton")
    x, g, b = torch.zeros(3, 4)
    with pytest.raises(RuntimeError, match=r"needs a GPU, or TRITON_INTERPRET=1"):
        kernels.perturb([x], [g], [b], 0.1, backend="triton")


def test_every_backend_has_every_kernel() -> None:
    # cholesky_qr is made of others
    names = set(kernels.__all__) - {"BACKENDS", "Backend", "select", "cholesky_qr"}
    assert names == set(OPERATIONS)
    for backend in (kernels.select("cpu", name) for name in ("native", "reference")):
        for name, operation in OPERATIONS.items():
            declared = inspect.signature(operation.reference).parameters.values()
            expected = [p for p in declared if p.name != "backend"]
            parameters = inspect.signature(getattr(backend, name)).parameters.values()
            assert [(p.name, p.kind, p.default) for p in parameters] == [
                (p.name, p.kind, p.default) for p in expected
            ]
    with pytest.raises(AttributeError, match="no attribute 'sgd'"):
        kernels.select("cpu").sgd  # type: ignore[attr-defined]  # noqa: B018


def test_an_unknown_backend_is_told_the_known_ones() -> None:
    message = "unknown backend 'cuda': choose one of native, triton, reference, or None"
    x = torch.ones(3)
    with pytest.raises(ValueError, match=message):
        kernels.perturb([x], [x], [x], 0.1, backend="cuda")
    with pytest.raises(ValueError, match=message):
        kernels.norm([x], backend="cuda")


def test_an_unknown_device() -> None:
    with pytest.raises(ValueError, match=r"no kernels for device 'mps': .*backend=.reference"):
        kernels.select("mps")
    for backend in (None, *kernels.BACKENDS):
        with pytest.raises(ValueError, match=r"meta device have no data: .*to_empty"):
            kernels.norm([torch.ones(3, device="meta")], backend=backend)


def test_a_tensor_in_place_of_a_list() -> None:
    x = torch.ones(3)
    with pytest.raises(TypeError, match=r"take lists of tensors: pass \[tensor\]"):
        kernels.norm(x)


def test_triton_on_the_cpu_is_refused_when_it_is_chosen() -> None:
    pytest.importorskip("triton")
    with pytest.raises(RuntimeError, match='"triton" needs a GPU, or TRITON_INTERPRET=1'):
        kernels.select("cpu", "triton")


@needs_no_cuda
def test_without_cuda_kernels_native_says_how_to_get_them() -> None:
    assert not _core.cuda_compiled
    message = r"built without its CUDA kernels: reinstall it .*EIGENFILTER_CUDA=ON.*triton"
    with pytest.raises(RuntimeError, match=message):
        kernels.select("cuda", "native")
    with pytest.raises(RuntimeError, match=message):
        _core.require_cuda()


@pytest.mark.skipif(not _core.cuda_compiled, reason="built without CUDA kernels")
def test_with_cuda_kernels_native_serves_both_devices() -> None:
    assert kernels.select("cuda", "native").name == "native"
    assert kernels.select("cpu", "native").name == "native"
    _core.require_cuda()


@needs_no_cuda
def test_without_cuda_kernels_a_gpu_is_served_by_triton(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("triton")
    with caplog.at_level(logging.INFO, logger="eigenfilter"):
        assert kernels.select("cuda") is kernels.select("cuda", "triton")
    assert [r.getMessage() for r in caplog.records] == ["kernels on cuda: triton"]


OURS = ("80-real", "90-real", "100-real", "100-virtual")


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (OURS, (7, 5), False),
        (OURS, (8, 0), True),
        (OURS, (8, 9), True),  # machine code for 8.0
        (OURS, (9, 0), True),
        (OURS, (10, 3), True),
        (OURS, (12, 0), True),  # PTX for 10.0
        (("90-real",), (8, 0), False),
        (("90-real",), (10, 0), False),
        (("86-real",), (8, 0), False),
        (("75",), (9, 0), True),  # PTX beside the machine code
        (("90-virtual",), (8, 0), False),
        (("90a-real",), (9, 0), True),
        (("90a-virtual",), (10, 0), False),
        (("100f-real",), (10, 3), True),
        (("100f-virtual",), (12, 0), False),
    ],
)
def test_where_compiled_code_runs(
    architectures: tuple[str, ...], capability: tuple[int, int], runs: bool
) -> None:
    assert any(dispatch._runs(a, capability) for a in architectures) == runs


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build for Ampere and later, and a machine whose first GPU is older."""
    monkeypatch.setattr(_core, "cuda_compiled", True)
    monkeypatch.setattr(_core, "cuda_architectures", OURS)
    monkeypatch.setattr(_core, "require_cuda", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    capabilities = {0: (7, 5), 1: (9, 0)}
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: capabilities[device.index]
    )


@pytest.mark.usefixtures("two_gpus")
def test_each_gpu_is_served_by_what_has_code_for_it(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("triton")
    old, new = torch.device("cuda:0"), torch.device("cuda:1")
    with caplog.at_level(logging.INFO, logger="eigenfilter"):
        for _ in range(2):
            assert kernels.select(old) is kernels.select(old, "triton")
            assert kernels.select(new).name == "native"
            assert kernels.select("cuda").name == "native"
    assert [r.getMessage() for r in caplog.records] == [
        "kernels on cuda:0: triton (it has compute capability 7.5, and the CUDA kernels were "
        "compiled for 80-real, 90-real, 100-real, 100-virtual)",
        "kernels on cuda:1: native",
    ]


@pytest.mark.usefixtures("two_gpus")
def test_native_is_refused_where_it_has_no_code() -> None:
    message = (
        r'"native" has no code for cuda:0: it has compute capability 7\.5, .* '
        r'backend="triton", or .*CMAKE_CUDA_ARCHITECTURES=native'
    )
    with pytest.raises(RuntimeError, match=message):
        kernels.select("cuda:0", "native")
    assert kernels.select("cuda:1", "native").name == "native"


def test_the_build_names_what_it_was_compiled_for() -> None:
    assert bool(_core.cuda_architectures) == _core.cuda_compiled
    for architecture in _core.cuda_architectures:
        dispatch._runs(architecture, (9, 0))
    with pytest.raises(RuntimeError, match="unknown CUDA architecture, 'native'"):
        dispatch._runs("native", (9, 0))


def test_without_triton_the_backend_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = "eigenfilter.kernels.triton"
    for name in [m for m in sys.modules if m == ours or m.startswith(f"{ours}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(kernels, "triton", raising=False)
    for name in [m for m in sys.modules if m == "triton" or m.startswith("triton.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [NoTriton(), *sys.meta_path])
    with pytest.raises(RuntimeError, match="needs the triton package: pip install triton"):
        kernels.select("cuda", "triton")


class NoTriton:
    """An import system in which triton is not installed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")


@pytest.mark.parametrize("backend_name", [None, "native", "reference"])
def test_no_tensors(backend_name: str | None) -> None:
    with pytest.raises(ValueError, match="no tensors: pass at least one"):
        kernels.perturb([], [], [], 0.1, backend=backend_name)
    with pytest.raises(ValueError, match="no tensors: pass at least one"):
        kernels.norm([], backend=backend_name)


def test_an_unknown_instruction_set() -> None:
    before = _core.isa()
    with pytest.raises(ValueError, match=r'no kernels for "avx1024": see isas\(\)'):
        _core.set_isa("avx1024")
    assert _core.isa() == before == _core.isas()[-1]
    assert _core.isas()[0] == "baseline"
