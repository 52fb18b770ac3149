"""The Triton kernels compile for GPUs that are not here, to the instructions they are built on.

Every target is compiled in a process of its own, this file run as a script: compiling needs triton
not to interpret, whatever the environment of the tests says.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from marks import rest_slow

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# Machine code follows PTX closely and takes long to read: one target stands for the others.
DISASSEMBLED = "sm_90"

NARROW = ("bfloat16", "float16")
DTYPES = ("float32", "float64", *NARROW)
# A parameter's dtype and the wider one of its gradients; they are compiled as "float32-float64".
WIDE = {"bfloat16": "float32", "float16": "float32", "float32": "float64"}

# How many lists each kernel reads and writes.
LISTS = {
    "perturb": (2, 2),
    "perturb_scaled": (2, 2),
    "perturb_adaptive": (2, 2),
    "perturb_unsaved": (2, 1),
    "perturb_unsaved_scaled": (2, 1),
    "perturb_hvp": (3, 1),
    "perturb_hvp_scaled": (3, 1),
    "sgd_step": (2, 1),
    "sgd_step_scaled": (3, 2),
    "sgd_step_ahead": (3, 2),
    "adamw_step": (4, 3),
    "adamw_step_scaled": (4, 3),
    "adamw_step_ahead": (4, 3),
    "adamw_step_ahead_scaled": (4, 3),
    "sum_squares": (1, 0),
    "sum_squares_weighted": (2, 0),
    "flag_nonfinite": (1, 0),
}
# Of the narrow dtypes alone.
STOCHASTIC = {
    "sgd_step_stochastic": (3, 2),
    "adamw_step_stochastic": (4, 3),
    "adamw_step_stochastic_scaled": (4, 3),
    "adamw_step_ahead_stochastic": (4, 3),
}
# Of compressed tensors: how often a thread reads and writes 16 bytes of a whole block. Codes beside
# float32 are 8 bytes a thread, which are not counted.
CODES_OF_NARROW = {
    "sgd_step_codes": (6, 4),
    "adamw_step_codes": (7, 5),
    "adamw_step_ahead_codes": (7, 5),
    "adamw_step_masters": (14, 12),
}
COMPRESSED = {
    "float32": {name: (4, 2) for name in CODES_OF_NARROW if name.endswith("codes")},
    "bfloat16": CODES_OF_NARROW,
    "float16": CODES_OF_NARROW,
}
# Over rows of vectors, whose lengths are multiples of 16 here; of the wide dtypes alone.
OVER_ROWS = {
    "row_dots": (2, 0),
    "lanczos_step": (3, 1),
    "gram": (2, 0),
    "mix_rows": (1, 1),
    "cross_entropy_hvp": (4, 1),
}
VECTORS = ("u", "q", "w", "vectors", "logits", "product")
ROWS_OF_16 = (*VECTORS, "columns")
# The expansion of a division has fused multiply-adds of its own; these kernels divide nothing.
WITHOUT_DIVISION = (
    "perturb",
    "perturb_adaptive",
    "perturb_unsaved",
    "sgd_step",
    "sgd_step_ahead",
    "sgd_step_stochastic",
)


def lists_of(dtype: str) -> dict[str, tuple[int, int]]:
    return LISTS | STOCHASTIC if dtype in NARROW else LISTS


# With wide gradients: how many lists of parameters' dtype each kernel reads, of gradients' dtype,
# and how many it writes.
WIDE_LISTS = {
    "perturb": (1, 1, 2),
    "perturb_unsaved_scaled": (1, 1, 1),
    "perturb_hvp_scaled": (1, 2, 1),
    "sgd_step_scaled": (2, 1, 2),
    "adamw_step_scaled": (3, 1, 3),
    "adamw_step_ahead_scaled": (3, 1, 3),
    "sum_squares_weighted": (1, 1, 0),
}
WIDE_STOCHASTIC = {
    "sgd_step_stochastic": (2, 1, 2),
    "adamw_step_stochastic_scaled": (3, 1, 3),
}
EVERY_WIDE = [
    (kernel, dtype)
    for dtype in WIDE
    for kernel in WIDE_LISTS | (WIDE_STOCHASTIC if dtype in NARROW else {})
]
EVERY_COMPRESSED = [(kernel, dtype) for dtype in COMPRESSED for kernel in COMPRESSED[dtype]]
EVERY = [(kernel, dtype) for dtype in DTYPES for kernel in lists_of(dtype)]


@pytest.fixture(scope="module", params=rest_slow(TARGETS, "sm_90"))
def target(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def compiled(target: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with one assembly file, and for CUDA one binary, a kernel and dtype."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp(target)
    environment = dict(os.environ, TRITON_CACHE_DIR=str(folder / "cache"))
    environment.pop("TRITON_INTERPRET", None)
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, __file__, target, str(folder)], check=True, env=environment)
    return folder


@pytest.mark.parametrize(("kernel", "dtype"), EVERY)
def test_whole_blocks_are_accessed_16_bytes_at_a_time(
    target: str, compiled: Path, kernel: str, dtype: str
) -> None:
    reads, writes = lists_of(dtype)[kernel]
    if target == "gfx942":
        assembly = (compiled / f"{kernel}.{dtype}.amdgcn").read_text()
        assert count(r"(buffer|global)_load_dwordx4", assembly) >= reads
        assert count(r"(buffer|global)_store_dwordx4", assembly) >= writes
        return
    # A block is 4 KiB, 128 threads access 2 KiB at a time.
    width = "v2.b64" if dtype == "float64" else "v4.b32"
    assembly = (compiled / f"{kernel}.{dtype}.ptx").read_text()
    assert count(rf"ld\.global\.{width}", assembly) >= 2 * reads
    assert count(rf"st\.global\.{width}", assembly) >= 2 * writes
    # A masked access may be one to a tensor that is not aligned.
    assert count(r"@%p\d+ (ld|st)\.global\.v", assembly) == 0
    if target == DISASSEMBLED:
        machine_code = disassemble(compiled / f"{kernel}.{dtype}.cubin")
        assert count(r"LDG\.E\.128", machine_code) >= 2 * reads
        assert count(r"STG\.E\.128", machine_code) >= 2 * writes


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d not in NARROW])
@pytest.mark.parametrize("kernel", OVER_ROWS)
def test_rows_are_accessed_16_bytes_at_a_time(
    target: str, compiled: Path, kernel: str, dtype: str
) -> None:
    reads, writes = OVER_ROWS[kernel]
    if target == "gfx942":
        assembly = (compiled / f"{kernel}.{dtype}.amdgcn").read_text()
        assert count(r"(buffer|global)_load_dwordx4", assembly) >= reads
        assert count(r"(buffer|global)_store_dwordx4", assembly) >= writes
        assert re.findall(r"\.[sv]gpr_spill_count: *(\d+)", assembly) == ["0", "0"]
        return
    width = "v2.b64" if dtype == "float64" else "v4.b32"
    assembly = (compiled / f"{kernel}.{dtype}.ptx").read_text()
    assert count(rf"ld\.global\.{width}", assembly) >= reads
    assert count(rf"st\.global\.{width}", assembly) >= writes
    # Quotients and exponentials in float64 have fused multiply-adds of their own.
    assert "fma" not in assembly or kernel == "cross_entropy_hvp"
    usage = run_tool("cuobjdump", "-res-usage", compiled / f"{kernel}.{dtype}.cubin")
    assert re.findall(r"(?:STACK|LOCAL):(\d+)", usage) == ["0", "0"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_rounded_before_they_are_added(
    target: str, compiled: Path, dtype: str
) -> None:
    if target == "gfx942":
        for kernel in lists_of(dtype).keys() & WITHOUT_DIVISION:
            assembly = (compiled / f"{kernel}.{dtype}.amdgcn").read_text()
            # v_fma_mix widens fp16 on its way; x * +-1 + y and x * y - 0 round once, as x + y and
            # x * y do.
            assembly = re.sub(r"v_fma_mix.*(1\.0|neg\(0\)).*", "", assembly)
            assert not re.search(r"v_(pk_)?(fma|mad|mac)", assembly)
        return
    for kernel in lists_of(dtype):
        assert "fma" not in (compiled / f"{kernel}.{dtype}.ptx").read_text()
    if target == DISASSEMBLED:
        for kernel in lists_of(dtype).keys() & WITHOUT_DIVISION:
            machine_code = disassemble(compiled / f"{kernel}.{dtype}.cubin")
            assert not re.search(r"\b[FD]FMA\b", machine_code)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quotients_and_roots_are_rounded_to_nearest(
    target: str, compiled: Path, dtype: str
) -> None:
    if target == "gfx942":
        assembly = (compiled / f"adamw_step.{dtype}.amdgcn").read_text()
        # A reciprocal is the beginning of a division, which ends in a fix-up; a root in float32 is
        # compared with its neighbors, that below first.
        assert count("v_div_fixup", assembly) == count("v_rcp", assembly) > 0
        neighbors = count(r"v_add_u32\w* v\d+, -1, v\d+", assembly)
        assert neighbors >= count("v_sqrt_f32", assembly) > 0 or dtype == "float64"
        return
    for kernel in [*lists_of(dtype), "norm"]:
        assembly = (compiled / f"{kernel}.{dtype}.ptx").read_text()
        assert not re.search(r"(div|rcp|r?sqrt)\.(approx|full)|\.ftz", assembly)
    real = "f64" if dtype == "float64" else "f32"
    assembly = (compiled / f"adamw_step.{dtype}.ptx").read_text()
    assert f"div.rn.{real}" in assembly
    assert f"sqrt.rn.{real}" in assembly


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_spills(target: str, compiled: Path, dtype: str) -> None:
    for kernel in [*lists_of(dtype), "norm"]:
        if target == "gfx942":
            assembly = (compiled / f"{kernel}.{dtype}.amdgcn").read_text()
            assert re.findall(r"\.[sv]gpr_spill_count: *(\d+)", assembly) == ["0", "0"]
        else:
            usage = run_tool("cuobjdump", "-res-usage", compiled / f"{kernel}.{dtype}.cubin")
            assert re.findall(r"(?:STACK|LOCAL):(\d+)", usage) == ["0", "0"]


@pytest.mark.parametrize(("kernel", "dtype"), EVERY_WIDE)
def test_wide_gradients_take_wide_accesses_and_no_spills(
    target: str, compiled: Path, kernel: str, dtype: str
) -> None:
    name = f"{kernel}.{dtype}-{WIDE[dtype]}"
    params, grads, writes = (WIDE_LISTS | WIDE_STOCHASTIC)[kernel]
    if target == "gfx942":
        assembly = (compiled / f"{name}.amdgcn").read_text()
        assert count(r"(buffer|global)_load_dwordx4", assembly) >= params + 2 * grads
        assert count(r"(buffer|global)_store_dwordx4", assembly) >= writes
        assert re.findall(r"\.[sv]gpr_spill_count: *(\d+)", assembly) == ["0", "0"]
        return
    assembly = (compiled / f"{name}.ptx").read_text()
    # A block is 4 KiB of parameters and twice as much of gradients.
    width = "v2.b64" if WIDE[dtype] == "float64" else "v4.b32"
    assert count(r"ld\.global\.(v4\.b32|v2\.b64)", assembly) >= 2 * params + 4 * grads
    assert count(rf"ld\.global\.{width}", assembly) >= 4 * grads
    assert count(r"st\.global\.v4\.b32", assembly) >= 2 * writes
    assert "fma" not in assembly
    assert not re.search(r"(div|rcp|r?sqrt)\.(approx|full)|\.ftz", assembly)
    usage = run_tool("cuobjdump", "-res-usage", compiled / f"{name}.cubin")
    assert re.findall(r"(?:STACK|LOCAL):(\d+)", usage) == ["0", "0"]


@pytest.mark.parametrize(("kernel", "dtype"), EVERY_COMPRESSED)
def test_compressed_tensors_take_wide_accesses_and_no_spills(
    target: str, compiled: Path, kernel: str, dtype: str
) -> None:
    if target == "gfx942":
        assembly = (compiled / f"{kernel}.{dtype}.amdgcn").read_text()
        assert re.findall(r"\.[sv]gpr_spill_count: *(\d+)", assembly) == ["0", "0"]
        return
    reads, writes = COMPRESSED[dtype][kernel]
    assembly = (compiled / f"{kernel}.{dtype}.ptx").read_text()
    assert count(r"ld\.global\.v4\.b32", assembly) >= reads
    assert count(r"st\.global\.v4\.b32", assembly) >= writes
    assert count(r"@%p\d+ (ld|st)\.global\.v", assembly) == 0
    assert "fma" not in assembly
    assert not re.search(r"(div|rcp|r?sqrt)\.(approx|full)|\.ftz", assembly)
    usage = run_tool("cuobjdump", "-res-usage", compiled / f"{kernel}.{dtype}.cubin")
    assert re.findall(r"(?:STACK|LOCAL):(\d+)", usage) == ["0", "0"]


def count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


@functools.cache
def disassemble(cubin: Path) -> str:
    return run_tool("nvdisasm", "-c", cubin)


def run_tool(name: str, option: str, cubin: Path) -> str:
    """Return what a binary tool of CUDA, as triton brings it along, prints."""
    import triton

    tools = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin"
    return subprocess.run(
        [str(tools / name), option, str(cubin)],
        check=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ).stdout


def compile_all(target: str, folder: Path) -> None:
    """Leave the assembly, and for CUDA the binary, of every kernel and dtype in `folder`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    every = {dtype: configurations(dtype) | over_rows(dtype) for dtype in DTYPES}
    for dtype, grad in WIDE.items():
        chosen = WIDE_LISTS | (WIDE_STOCHASTIC if dtype in NARROW else {})
        output = configurations(dtype, grad)
        every[f"{dtype}-{grad}"] = {name: output[name] for name in chosen}
    for dtype, of_dtype in every.items():
        for name, (kernel, fixed, options) in of_dtype.items():
            signature = {
                arg: "constexpr" if arg in fixed else type_of(arg, dtype)
                for arg in kernel.arg_names
            }
            divisible = [(i,) for i, arg in enumerate(kernel.arg_names) if arg in ROWS_OF_16]
            attributes = {at: [["tt.divisibility", 16]] for at in divisible}
            source = ASTSource(kernel, signature, fixed, attributes)
            result = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
            for kind in {"ptx", "amdgcn"} & set(result.asm):
                (folder / f"{name}.{dtype}.{kind}").write_text(result.asm[kind])
            if "cubin" in result.asm:
                (folder / f"{name}.{dtype}.cubin").write_bytes(result.asm["cubin"])


def configurations(
    dtype: str, grad: str = ""
) -> dict[str, tuple[Any, dict[str, Any], dict[str, Any]]]:
    """Return kernels with their compile-time constants and options, by name."""
    import torch
    import triton.language as tl

    from eigenfilter.kernels.triton.adamw_step import adamw_step_kernel as adamw
    from eigenfilter.kernels.triton.blocks import Blocks
    from eigenfilter.kernels.triton.flag_nonfinite import flag_nonfinite_kernel
    from eigenfilter.kernels.triton.launch import constants, options
    from eigenfilter.kernels.triton.norm import (
        NORM_BLOCK,
        NORM_OPTIONS,
        norm_kernel,
        sum_squares_kernel,
    )
    from eigenfilter.kernels.triton.perturb import perturb_kernel
    from eigenfilter.kernels.triton.perturb_hvp import perturb_hvp_kernel
    from eigenfilter.kernels.triton.sgd_step import sgd_step_kernel as sgd

    shared = constants(getattr(torch, dtype), Blocks(), getattr(torch, grad or dtype))
    plain = {"CORRECTION": None, "SCALE": None, "TURNS": False}
    plain |= dict.fromkeys(("STATE", "FIRST", "SECOND"), shared["DTYPE"])
    nesterov = {"MOMENTA": True, "NESTEROV": True, "AHEAD": False}
    ahead = {"MOMENTA": True, "NESTEROV": False, "AHEAD": True}
    straight, nearest = {"AHEAD": False}, {"STOCHASTIC": False}
    unscaled = {} if "float64" in (dtype, grad) else {"exponents": None}
    kernels: dict[str, tuple[Any, dict[str, Any]]] = {
        "perturb": on_host(perturb_kernel, SAVE=True, ADAPTIVE=False),
        "perturb_scaled": (perturb_kernel, {"SAVE": True, "ADAPTIVE": True}),
        "perturb_adaptive": on_host(perturb_kernel, SAVE=True, ADAPTIVE=True),
        "perturb_unsaved": on_host(perturb_kernel, SAVE=False, ADAPTIVE=False),
        "perturb_unsaved_scaled": (perturb_kernel, {"SAVE": False, "ADAPTIVE": False}),
        "perturb_hvp": on_host(perturb_hvp_kernel),
        "perturb_hvp_scaled": (perturb_hvp_kernel, {}),
        "sgd_step": on_host(sgd, MOMENTA=False, NESTEROV=False, AHEAD=False, **nearest),
        "sgd_step_scaled": (sgd, nesterov | nearest),
        "sgd_step_ahead": on_host(sgd, **ahead, **nearest),
        "adamw_step": on_host(adamw, **straight, **nearest),
        "adamw_step_scaled": (adamw, straight | nearest),
        "adamw_step_ahead": on_host(adamw, AHEAD=True, **nearest),
        "adamw_step_ahead_scaled": (adamw, {"AHEAD": True} | nearest),
        "sum_squares": (sum_squares_kernel, {"WEIGHTS": False} | unscaled),
        "sum_squares_weighted": (sum_squares_kernel, {"WEIGHTS": True} | unscaled),
        "flag_nonfinite": (flag_nonfinite_kernel, {}),
    }
    if dtype in NARROW:
        kernels["sgd_step_stochastic"] = on_host(sgd, **nesterov, STOCHASTIC=True)
        kernels["adamw_step_stochastic"] = on_host(adamw, **straight, STOCHASTIC=True)
        kernels["adamw_step_stochastic_scaled"] = (adamw, straight | {"STOCHASTIC": True})
        kernels["adamw_step_ahead_stochastic"] = on_host(adamw, AHEAD=True, STOCHASTIC=True)
        masters = {"CORRECTION": tl.int16, "FIRST": tl.float32, "SECOND": tl.float32}
        kernels["adamw_step_masters"] = (adamw, straight | nearest | masters)
    if dtype in COMPRESSED:
        codes = {"STATE": tl.int8, "FIRST": tl.int8, "SECOND": tl.uint8, "SCALE": tl.float32}
        codes["TURNS"] = True
        codes["CORRECTION"] = tl.int8 if dtype in NARROW else None
        momenta = codes | {"GRAD": tl.int8}
        kernels["perturb_codes"] = on_host(perturb_kernel, SAVE=False, ADAPTIVE=False, **momenta)
        kernels["sum_squares_codes"] = (sum_squares_kernel, {"WEIGHTS": False} | momenta | unscaled)
        kernels["sgd_step_codes"] = on_host(sgd, **ahead, **nearest, **codes)
        kernels["adamw_step_codes"] = on_host(adamw, **straight, **nearest, **codes)
        kernels["adamw_step_ahead_codes"] = (adamw, {"AHEAD": True} | nearest | codes)
    output = {
        name: (
            kernel,
            shared | {a: v for a, v in (plain | chosen).items() if a in kernel.arg_names},
            options(Blocks()),
        )
        for name, (kernel, chosen) in kernels.items()
    }
    block = {"BLOCK": NORM_BLOCK} | unscaled
    return output | {"norm": (norm_kernel, block, NORM_OPTIONS)}


def over_rows(dtype: str) -> dict[str, tuple[Any, dict[str, Any], dict[str, Any]]]:
    """Return the kernels over rows of vectors, as `configurations` does."""
    import torch

    from eigenfilter.kernels import triton as package
    from eigenfilter.kernels.triton import rows

    if dtype in NARROW:
        return {}
    modules = {name: importlib.import_module(f"{package.__name__}.{name}") for name in OVER_ROWS}
    least = {"LEAST": torch.finfo(getattr(torch, dtype)).min}
    return {
        name: (
            getattr(module, f"{name}_kernel"),
            {"TILE": rows.TILE} | (least if name == "cross_entropy_hvp" else {}),
            rows.OPTIONS,
        )
        for name, module in modules.items()
    }


def on_host(kernel: Any, **chosen: bool) -> tuple[Any, dict[str, Any]]:
    """Return a kernel and its constants where no scalar lies on the device."""
    absent = [a for a in kernel.arg_names if a.endswith("_at") or a in ("grad_scale", "found_inf")]
    return kernel, dict.fromkeys(absent) | chosen


def type_of(argument: str, dtype: str) -> str:
    """Return the type of a kernel's argument as triton's signatures spell it."""
    if argument in VECTORS:
        return "*fp64" if dtype == "float64" else "*fp32"
    if argument in ("pointers", "chunks"):
        return "*i64"
    if argument == "exponents":
        return "*i32"
    if argument in ("n", "origin", "count", "rows", "columns"):
        return "i32"
    if argument in ("sums", "factors", "scales", "means"):
        return "*fp64"
    if argument in ("lr_at", "momentum_at", "step_at", "rounding_seed_at"):
        return "*fp64"
    on_device = argument.endswith("_at") or argument in ("grad_scale", "found_inf", "out")
    return "*fp32" if on_device else "fp64"


if __name__ == "__main__":
    compile_all(sys.argv[1], Path(sys.argv[2]))
