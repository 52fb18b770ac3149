"""The machine code of the compiled CUDA kernels: 16-byte accesses, nothing fused or spilled."""

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
UPDATES = {"Perturb": 3, "PerturbHvp": 1, "SgdStep": 4, "AdamWStep": 2}  # by their rules
KERNELS = {**UPDATES, "squares_kernel": 2, "nonfinite_kernel": 1}  # and in how many forms
SEEDED = {"SgdStep", "AdamWStep"}  # which also round stochastically to narrow dtypes
# Where gradients are wider than parameters, which are read from backups: in fewer forms.
WIDE = {"Perturb": 2, "PerturbHvp": 1, "SgdStep": 2, "AdamWStep": 1, "squares_kernel": 1}
WIDE_DTYPES = ("FloatInDouble", *NARROW)
DIVIDES = {"AdamWStep"}  # each element, for which the compiler's own code fuses


def cuobjdump(*arguments: str) -> str:
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [str(tool), *arguments, _core.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def dtypes_of(name: str) -> tuple[str, bool]:
    """A kernel's dtype, and whether its gradients are wider."""
    found = {d for d in (*DTYPES, "FloatInDouble") if re.search(rf"\d{d}", storages_of(name))}
    narrow = found - {"NativeIfE", "NativeIdE"}
    return (narrow or found).pop(), len(found) > 1


def storages_of(name: str) -> str:
    """The part of a kernel's name that tells its storage types: its rule has a type of its own."""
    return name.partition("DeferredRule")[0]


def operation(instruction: str) -> str:
    """The instruction's name; a multiply-add of the zero register only moves a value."""
    name = instruction.split()[0]
    moves = name.startswith(("FFMA", "HFMA2")) and "RZ" in instruction
    return "MOV" if moves else name


Code = list[tuple[int, str]]
"""Instructions with their addresses, in order; a jump on a condition has a "?" before it."""


@pytest.fixture(scope="module", params=ARCHITECTURES)
def code(request) -> dict[str, Code]:
    """The machine code by function."""
    found: dict[str, Code] = {}
    for line in cuobjdump("-sass", "-arch", request.param).splitlines():
        if match := re.search(r"Function : (\S+)", line):
            own = found.setdefault(match[1], [])
        elif match := re.search(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][^;]*)", line):
            is_jump = match[3].startswith(("BRA", "EXIT"))
            own.append((int(match[1], 16), ("?" if match[2] and is_jump else "") + match[3]))
    return found


@pytest.fixture(scope="module")
def instructions(code: dict[str, Code]) -> dict[str, Counter]:
    """How often each instruction occurs, by function."""
    return {name: Counter(operation(text) for _, text in own) for name, own in code.items()}


def in_flight(code: Code) -> int:
    """How many 16-byte loads are under way at once: none is used before the last of them.

    Counted along the code as it lies, from 0 again at the head of a loop and behind a jump that is
    always taken.
    """
    heads = {
        int(target, 16)
        for address, text in code
        if "BRA" in text
        for target in re.findall(r"0x[0-9a-f]+", text)
        if int(target, 16) <= address
    }
    most, loaded = 0, set()
    for address, text in code:
        used = {int(register) for register in re.findall(r"\bR(\d+)", text)}
        leaves = re.match(r"(BRA|EXIT)\S*\s*(0x|`|$)", text)
        if address in heads or used & loaded or leaves:
            loaded = set()
        if text.startswith("LDG") and ".128" in text:
            first = int(re.search(r"\bR(\d+)", text)[1])
            loaded |= set(range(first, first + 4))
            most = max(most, len(loaded) // 4)
    return most


@pytest.fixture(scope="module")
def ptx() -> dict[str, str]:
    """The code that later chips get, by function: divisions and roots are one instruction here."""
    _, *functions = cuobjdump("-ptx").split(".entry ")
    return {text[: text.index("(")]: text for text in functions}


def of(functions: dict, kernel: str) -> dict:
    return {name: code for name, code in functions.items() if re.search(rf"\d{kernel}I", name)}


def wide(counts: Counter, access: str) -> int:
    return sum(n for op, n in counts.items() if op.startswith(access) and ".128" in op)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_is_there_in_every_dtype(instructions, kernel):
    names = of(instructions, kernel)
    for seeded, dtypes in (False, DTYPES), (True, NARROW if kernel in SEEDED else ()):
        counts = Counter(dtypes_of(name) for name in names if ("Seeded" in name) == seeded)
        wide = [d for d in WIDE_DTYPES if not seeded or d in dtypes] if kernel in WIDE else []
        # Once more for few tensors, except updates whose code is long.
        plain, long = 1 + (kernel not in UPDATES or not seeded), 1 + (kernel not in UPDATES)
        expected = {(dtype, False): plain * KERNELS[kernel] for dtype in dtypes}
        assert counts == expected | {(dtype, True): long * WIDE[kernel] for dtype in wide}


@pytest.mark.parametrize("kernel", KERNELS)
def test_main_body_accesses_16_bytes(instructions, kernel):
    for name, counts in of(instructions, kernel).items():
        assert wide(counts, "LDG") >= 2, name
        if kernel in UPDATES:
            assert wide(counts, "STG") >= 2, name


@pytest.mark.parametrize("kernel", ["dots_kernel", "subtract_kernel"])
def test_a_basis_is_read_16_bytes_at_a_time_where_its_rows_allow_it(instructions, kernel):
    """Several of them under way at once, in every dtype and for both types of vector."""
    by_pack = {True: 0, False: 0}
    for name, counts in of(instructions, kernel).items():
        packed = "4PackI" in name
        by_pack[packed] += 1
        assert (wide(counts, "LDG") >= 4) == packed, name
    assert by_pack == {True: 8, False: 8}


# Those whose second packs the compiler loads a little later: rule, dtype, loads a pack, wide.
LATER = {("SgdStep", "BFloat16", 3, False), ("AdamWStep", "FloatInDouble", 5, True)}


@pytest.mark.parametrize("kernel", UPDATES)
def test_a_pack_of_every_list_is_loaded_before_the_first_is_used(code, kernel):
    """And a second one with it, but where registers are short: see `Step` in update.cuh."""
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
    ],
)
def test_loads_are_in_flight_together(request, code, kernel, least):
    """Where there are 16-byte ones. For sm_100 the compiler takes those of gram one by one."""
    if (request.node.callspec.params["code"], kernel) == ("sm_100", "gram_kernel"):
        least = 1
    counts = {
        name: in_flight(own) for name, own in of(code, kernel).items() if "7ElementI" not in name
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
    assert in_flight(code("LDG.E.64 R4, desc[UR4][R2.64]")) == 0


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
    """Nor may the assembler fuse any: it leaves alone what says how it rounds."""
    assert len(ptx) > sum(KERNELS.values()) * len(DTYPES)
    for name, text in ptx.items():
        assert not re.search(r"\b(fma|mad)\.(rn\.)?f\d|\b(mul|add|sub)\.f\d", text), name


def test_machine_code_fuses_nothing(instructions):
    """In float32; in double the compiler's own division needs fused steps."""
    for kernel in UPDATES.keys() - DIVIDES:
        for name, counts in of(instructions, kernel).items():
            assert not any(op.startswith(("FFMA", "HFMA2")) for op in counts), name
            assert any(op.startswith(("FMUL", "DMUL")) for op in counts), name


def test_nothing_touches_local_memory(instructions):
    for name, counts in instructions.items():
        assert not any(op.startswith(("LDL", "STL")) for op in counts), name


def test_2000_tensors_take_three_launches(ptx):
    """A tensor takes a pointer in each list, of which there are at most five, and 8 bytes.

    Up to 70 go in a launch whose arguments are as long as they could be before CUDA 12.1.
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
    assert forms[True] == sum(UPDATES.values()) * len(DTYPES)


def test_ptx_for_later_chips_is_included():
    assert "sm_100" in cuobjdump("-lptx")


def test_imports_without_a_cuda_runtime():
    needed = subprocess.run(
        ["readelf", "-d", _core.__file__], capture_output=True, text=True, check=True
    ).stdout
    assert "NEEDED" in needed
    assert "libcuda" not in needed
