"""The machine code of the compiled CUDA kernels: 16-byte accesses, nothing fused or spilled."""

import itertools
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from eigenfilter import _core

pytestmark = pytest.mark.skipif(not _core.cuda_compiled, reason="built without CUDA kernels")

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
NARROW = ("BFloat16", "Float16")
DTYPES = ("NativeIfE", "NativeIdE", *NARROW)
# Instances of each rule.
UPDATES = {"Perturb": 3, "PerturbHvp": 1, "SgdStep": 4, "AdamWStep": 2, "AheadAdamWStep": 2}
LONG = {"AheadAdamWStep"}  # without a second instance for few tensors
KERNELS = {**UPDATES, "squares_kernel": 2, "nonfinite_kernel": 1}  # instances by dtype
SEEDED = {
    "SgdStep",
    "AdamWStep",
    "AheadAdamWStep",
}  # these also round stochastically to narrow dtypes
# Instances for gradients wider than the parameters, which are then read from backups.
WIDE = {
    "Perturb": 2,
    "PerturbHvp": 1,
    "SgdStep": 2,
    "AdamWStep": 1,
    "AheadAdamWStep": 1,
    "squares_kernel": 1,
}
WIDE_DTYPES = ("FloatInDouble", *NARROW)
# One instance for SGD with momenta, without, for AdamW, and for moves along momenta, by dtype of
# parameters.
COMPRESSED = "compressed_kernel"
DIVIDES = {"AdamWStep", "AheadAdamWStep"}  # the compiler's own code for a division fuses


def cuobjdump(*arguments: str) -> str:
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [str(tool), *arguments, _core.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def dtypes_of(name: str) -> tuple[str, bool]:
    """Return a kernel's dtype, and whether its gradients are wider."""
    storages = {d for d in (*DTYPES, "FloatInDouble") if re.search(rf"\d{d}", storages_of(name))}
    narrow = storages - {"NativeIfE", "NativeIdE"}
    return (narrow or storages).pop(), len(storages) > 1


def storages_of(name: str) -> str:
    """Return the part of a kernel's name before its rule, which has an arithmetic type."""
    return name.partition("DeferredRule")[0]


def operation(instruction: str) -> str:
    """Return the instruction's name; a multiply-add with the zero register only moves a value."""
    name = instruction.split()[0]
    moves = name.startswith(("FFMA", "HFMA2")) and "RZ" in instruction
    return "MOV" if moves else name


Code = list[tuple[int, str]]
"""Instructions with their addresses, in order; a jump on a condition has a "?" before it."""


@pytest.fixture(scope="module", params=ARCHITECTURES)
def code(request) -> dict[str, Code]:
    """The machine code by function."""
    functions: dict[str, Code] = {}
    for line in cuobjdump("-sass", "-arch", request.param).splitlines():
        if match := re.search(r"Function : (\S+)", line):
            own = functions.setdefault(match[1], [])
        elif match := re.search(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][^;]*)", line):
            is_jump = match[3].startswith(("BRA", "EXIT"))
            own.append((int(match[1], 16), ("?" if match[2] and is_jump else "") + match[3]))
    return functions


@pytest.fixture(scope="module")
def instructions(code: dict[str, Code]) -> dict[str, Counter]:
    """How often each instruction occurs, by function."""
    return {name: Counter(operation(text) for _, text in own) for name, own in code.items()}


def in_flight(code: Code, least_bytes: int = 16) -> int:
    """Return how many loads of 16 bytes, or of at least so many, precede the first use of one.

    The count goes along the code in memory, and starts from 0 at the head of a loop and behind an
    unconditional jump.
    """
    heads = {
        int(target, 16)
        for address, text in code
        if "BRA" in text
        for target in re.findall(r"0x[0-9a-f]+", text)
        if int(target, 16) <= address
    }
    most, loads, unused = 0, 0, set()
    for address, text in code:
        used = {int(register) for register in re.findall(r"\bR(\d+)", text)}
        leaves = re.match(r"(BRA|EXIT)\S*\s*(0x|`|$)", text)
        if address in heads or used & unused or leaves:
            loads, unused = 0, set()
        if text.startswith("LDG") and (size := loaded_bytes(text)) >= least_bytes:
            loads += 1
            first = int(re.search(r"\bR(\d+)", text)[1])
            unused |= set(range(first, first + size // 4))
            most = max(most, loads)
    return most


def loaded_bytes(load: str) -> int:
    return 16 if ".128" in load else 8 if ".64 R" in load else 4


@pytest.fixture(scope="module")
def ptx() -> dict[str, str]:
    """The code for later chips, by function; a division or a root is one instruction in it."""
    _, *functions = cuobjdump("-ptx").split(".entry ")
    return {text[: text.index("(")]: text for text in functions}


def of(functions: dict, kernel: str) -> dict:
    """Return the functions of a kernel, or those of a rule that step plain tensors."""
    return {
        name: code
        for name, code in functions.items()
        if re.search(rf"\d{kernel}I", name)
        and (kernel == COMPRESSED or not re.search(rf"\d{COMPRESSED}I", name))
    }


def wide(counts: Counter, access: str) -> int:
    return sum(n for op, n in counts.items() if op.startswith(access) and ".128" in op)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_is_there_in_every_dtype(instructions, kernel):
    names = of(instructions, kernel)
    for seeded, dtypes in (False, DTYPES), (True, NARROW if kernel in SEEDED else ()):
        counts = Counter(dtypes_of(name) for name in names if ("Seeded" in name) == seeded)
        wide = [d for d in WIDE_DTYPES if not seeded or d in dtypes] if kernel in WIDE else []
        # There is a second instance for few tensors, except for updates whose code is long.
        is_short = not seeded and kernel not in LONG
        plain, long = 1 + (kernel not in UPDATES or is_short), 1 + (kernel not in UPDATES)
        expected = {(dtype, False): plain * KERNELS[kernel] for dtype in dtypes}
        assert counts == expected | {(dtype, True): long * WIDE[kernel] for dtype in wide}


@pytest.mark.parametrize("kernel", KERNELS)
def test_main_body_accesses_16_bytes(instructions, kernel):
    for name, counts in of(instructions, kernel).items():
        assert wide(counts, "LDG") >= 2, name
        if kernel in UPDATES:
            assert wide(counts, "STG") >= 2, name


def test_steps_of_compressed_tensors_are_few_kernels(instructions):
    """A thread has 4 elements: of float32 in 16 bytes, of a narrow dtype in 8."""
    names = of(instructions, COMPRESSED)
    form = rf"{COMPRESSED}INS\w*?_\d+(Native|BFloat16|Float16)(?:IfE)?ELb(\d)ELi(\d)E"
    counts = Counter(re.search(form, name).groups() for name in names)
    kinds = (("0", "0"), ("0", "1"), ("0", "2"), ("1", "0"))
    expected = itertools.product(("Native", *NARROW), kinds)
    assert counts == Counter((storage, *kind) for storage, kind in expected)
    for name, operations in names.items():
        access = ".128" if "6NativeIfE" in name else ".64"
        for kind in "LDG", "STG":
            assert any(op.startswith(kind) and access in op for op in operations), name


def test_lists_of_compressed_tensors_are_loaded_before_the_first_is_used(code):
    """The scale of a group's codes is what is used first."""
    for name, own in of(code, COMPRESSED).items():
        texts = [text for _, text in own]
        shuffles = [i for i, text in enumerate(texts) if text.startswith("SHFL.IDX")]
        loads = [i for i, text in enumerate(texts) if text.startswith("LDG") and ".128" in text]
        assert loads, name
        assert not shuffles or max(loads) < min(shuffles), name


@pytest.mark.parametrize("kernel", ["dots_kernel", "subtract_kernel"])
def test_a_basis_is_read_16_bytes_at_a_time_where_its_rows_allow_it(instructions, kernel):
    """Several reads are under way at once, in every dtype and for both types of vector."""
    by_pack = {True: 0, False: 0}
    for name, counts in of(instructions, kernel).items():
        packed = "4PackI" in name
        by_pack[packed] += 1
        assert (wide(counts, "LDG") >= 4) == packed, name
    assert by_pack == {True: 8, False: 8}


# For these the compiler loads the second pack a little later: rule, dtype, loads a pack, wide.
LATER = {("SgdStep", "BFloat16", 3, False), ("AdamWStep", "FloatInDouble", 5, True)}


@pytest.mark.parametrize("kernel", UPDATES)
def test_a_pack_of_every_list_is_loaded_before_the_first_is_used(code, kernel):
    """A second pack is loaded with it, unless registers are short: see `Step` in update.cuh."""
    shape = r"Li(\d)ELi(\d)ELNS\w*?_6BackupE\dELb(\d)E"
    for name, own in of(code, kernel).items():
        inputs, states, is_seeded = map(int, re.search(shape, name).groups())
        dtype, is_wide = dtypes_of(name)
        reads = 1 + states + (inputs - states) * (1 + is_wide)
        is_full = inputs > 2 or is_seeded or is_wide
        is_double = dtype in ("NativeIdE", "FloatInDouble")
        packs = 1 if is_full and not is_double else 2
        if (kernel, dtype, reads, is_wide) in LATER:
            assert reads <= in_flight(own), name
        else:
            assert packs * reads <= in_flight(own), name


@pytest.mark.parametrize(
    ("kernel", "least"),
    [
        ("nonfinite_kernel", 2),
        ("squares_kernel", 2),
        ("dots_kernel", 4),
        ("subtract_kernel", 4),
        ("row_dots_kernel", 4),
        ("lanczos_step_kernel", 3),
        ("gram_kernel", 4),
        ("mix_rows_kernel", 4),
        ("cross_entropy_hvp_kernel", 8),
    ],
)
def test_loads_are_in_flight_together(request, code, kernel, least):
    """This holds for 16-byte loads; the compiler uses those of gram one by one on sm_100.

    Rows of logits need not start at 16 bytes, so cross-entropy loads number by number.
    """
    if (request.node.callspec.params["code"], kernel) == ("sm_100", "gram_kernel"):
        least = 1
    bytes_ = 4 if kernel == "cross_entropy_hvp_kernel" else 16
    counts = {
        name: in_flight(own, bytes_)
        for name, own in of(code, kernel).items()
        if "7ElementI" not in name
    }
    assert counts
    assert {name: count for name, count in counts.items() if count < least} == {}


def test_loads_are_counted_up_to_the_first_use():
    def code(*texts: str) -> Code:
        return [(16 * i, text) for i, text in enumerate(texts)]

    first, second = "LDG.E.128 R4, desc[UR4][R2.64]", "LDG.E.128 R8, desc[UR4][R2.64+0x10]"
    assert in_flight(code(first, second, "FADD R0, R4, R8")) == 2
    assert in_flight(code(first, "FADD R0, R7, 1", second)) == 1
    assert in_flight(code(first, first)) == 1
    assert in_flight(code(first, second, "?BRA 0x10")) == 1
    assert in_flight(code(first, "BRA 0x30", second)) == 1
    assert in_flight(code(first, "EXIT ", second)) == 1
    assert in_flight(code(first, "?BRA 0x30", second, "NOP ")) == 2
    short = "LDG.E.64 R4, desc[UR4][R2.64]", "LDG.E R6, desc[UR4][R2.64]"
    assert [in_flight(code(*short), size) for size in (4, 8, 16)] == [2, 1, 0]
    assert in_flight(code(*short, "DADD R0, R4, R4", "LDG.E R7, desc[UR4][R2.64]"), 4) == 2


@pytest.mark.parametrize(
    ("kernel", "reads", "writes"),
    [
        ("row_dots_kernel", 2, 0),
        ("lanczos_step_kernel", 3, 1),
        ("gram_kernel", 1, 0),
        ("mix_rows_kernel", 1, 1),
    ],
)
def test_vectors_are_accessed_16_bytes_at_a_time_where_their_rows_allow_it(
    instructions, kernel, reads, writes
):
    by_pack = {True: 0, False: 0}
    for name, counts in of(instructions, kernel).items():
        packed = "4PackI" in name
        by_pack[packed] += 1
        assert (wide(counts, "LDG") >= reads) == packed, name
        assert (wide(counts, "STG") >= writes) == (packed or not writes), name
    assert by_pack == {True: 2, False: 2}


def test_parameters_are_not_read_where_they_start_from_backups(instructions):
    for name, counts in of(instructions, "PerturbHvp").items():
        # A wide gradient takes two accesses where a parameter takes one.
        lists = 5 if dtypes_of(name)[1] else 3
        assert wide(counts, "LDG") == lists * wide(counts, "STG"), name


def test_no_multiply_add_is_fused(ptx):
    """The assembler may not fuse any either: every operation here states its rounding."""
    assert len(ptx) > sum(KERNELS.values()) * len(DTYPES)
    for name, text in ptx.items():
        assert not re.search(r"\b(fma|mad)\.(rn\.)?f\d|\b(mul|add|sub)\.f\d", text), name


def test_machine_code_fuses_nothing(instructions):
    """In float32, in rules without a division: the compiler's own code for one is fused."""
    for kernel in UPDATES.keys() - DIVIDES:
        for name, counts in of(instructions, kernel).items():
            assert not any(op.startswith(("FFMA", "HFMA2")) for op in counts), name
            assert any(op.startswith(("FMUL", "DMUL")) for op in counts), name


def test_nothing_touches_local_memory(instructions):
    for name, counts in instructions.items():
        assert not any(op.startswith(("LDL", "STL")) for op in counts), name


def test_2000_tensors_take_three_launches(ptx):
    """A tensor takes 8 bytes and a pointer in each of at most five lists.

    A launch for few tensors takes up to 70, in the 4,096 bytes of arguments that every GPU allows.
    """
    forms = Counter()
    for kernel in UPDATES:
        for name, text in of(ptx, kernel).items():
            arguments = text[: text.index("{")]
            batch, rule = map(int, re.findall(r"_param_\d\[(\d+)\]", arguments))
            assert arguments.count(".param") == 3, name
            is_for_few = "ELi4096E" in name
            forms[is_for_few] += 1
            launches, tensors = (1, 70) if is_for_few else (3, 2000)
            assert batch + rule + 8 <= (4096 if is_for_few else 32764), name
            assert launches * (batch // (5 * 8 + 8)) >= tensors, name
    assert forms[True] == sum(UPDATES[kernel] for kernel in UPDATES.keys() - LONG) * len(DTYPES)


def test_ptx_for_later_chips_is_included():
    assert "sm_100" in cuobjdump("-lptx")


def test_imports_without_a_cuda_runtime():
    needed = subprocess.run(
        ["readelf", "-d", _core.__file__], capture_output=True, text=True, check=True
    ).stdout
    assert "NEEDED" in needed
    assert "libcuda" not in needed
