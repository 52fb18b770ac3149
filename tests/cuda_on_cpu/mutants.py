"""Whether the tests notice when a CUDA kernel is wrong: `python tests/cuda_on_cpu/mutants.py`.

One at a time, every barrier is taken out of the sources, every condition of an `if` is made always
true and always false, each side of an `&&` and of a `min` is left out, every loop over elements
runs once too often or not at all. The emulator's build holds all of these changes, and a process
runs one of them, which EIGENFILTER_MUTANT names. It has to fail: in the tests or, where these pass,
under the thread sanitizer, which runs every kernel on a few blocks (first, where a barrier is
missing), or, in a second round, in the tests under the address sanitizer, which take five times as
long. A mutant that survives is code that no test needs: a comment at the line that says "not needed
for ..." says why it is there.

The table goes to tests/cuda_on_cpu/MUTANTS.md. It takes about an hour on two cores, and goes on
where it was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutations import BARRIER, Mutant, mutants_of, with_mutants

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCES = ROOT / "csrc" / "cuda"
WORK = ROOT / "build" / "mutants"
TABLE = HERE / "MUTANTS.md"

# The tests of a source; a header's are all of them.
TESTS = {
    "perturb.cu": ["test_perturb.py", "test_perturb_again.py", "test_perturb_hvp.py"],
    "sgd_step.cu": ["test_sgd_step.py", "test_stochastic_rounding.py"],
    "adamw_step.cu": ["test_adamw_step.py"],
    "reduce.cu": ["test_norm.py", "test_flag_nonfinite.py"],
    "orthogonalize.cu": ["test_orthogonalize.py"],
    "lanczos.cu": ["test_lanczos_step.py", "test_cholesky_qr.py"],
}
GENERAL = ["test_wide_gradients.py", "test_wide_norms.py", "test_scalars.py", "test_rounding.py"]
# What is quick goes first, and for all mutants.
ROUNDS = (("none", "thread"), ("address",))
# A test, and a run of many, that takes longer hangs.
TEST_SECONDS, SECONDS = 180, 1800


def build(mutants: Sequence[Mutant]) -> None:
    """Build the extension with every mutant in it, once for each sanitizer."""
    sources = WORK / "cuda"
    shutil.rmtree(sources, ignore_errors=True)
    sources.mkdir(parents=True)
    for path in SOURCES.glob("*.cu*"):
        here = {n: m for n, m in enumerate(mutants) if m.file == path.name}
        (sources / path.name).write_text(with_mutants(path.read_text(), here))
    for sanitizer in itertools.chain(*ROUNDS):
        _run(
            "cmake", "-G", "Ninja", "-S", HERE, "-B", WORK / sanitizer,
            f"-DSANITIZER={sanitizer}", f"-DCUDA_SOURCES={sources}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={_output(sys.executable, '-m', 'pybind11', '--cmakedir')}",
        )  # fmt: skip
        _run("ninja", "-C", WORK / sanitizer)


def caught(mutant: Mutant | None, number: int, sanitizers: Sequence[str]) -> str:
    """What notices a mutant, or fails of the sources as they are; "" if nothing does."""
    is_barrier = mutant is not None and mutant.what == BARRIER
    for sanitizer in reversed(sanitizers) if is_barrier else sanitizers:
        failure = _failure(sanitizer, mutant.file if mutant else "", number)
        if failure:
            return failure
    return ""


def _failure(sanitizer: str, file: str, number: int) -> str:
    """The first failure of the tests of a source, or ""."""
    try:
        done = subprocess.run(
            [HERE / "run.sh", sanitizer, *_tests(sanitizer, file)],
            env=os.environ
            | {"EIGENFILTER_EMULATED": str(WORK / sanitizer / "_core.so")}
            | {"EIGENFILTER_MUTANT": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"a test that takes more than {SECONDS} s"
    return _reason(done.stdout) if done.returncode != 0 else ""


def _tests(sanitizer: str, file: str) -> list[str]:
    if sanitizer == "thread":
        return [str(HERE / "races.py")]
    names = TESTS.get(file) or [name for names in TESTS.values() for name in names]
    files = [str(ROOT / "tests" / "kernels" / name) for name in [*names, *GENERAL]]
    # The emulator and the sanitizers write to the process's own stderr as it ends.
    options = ["-x", "-q", "--capture=sys", "-p", "no:cacheprovider"]
    options += [
        "-o",
        f"faulthandler_timeout={TEST_SECONDS}",
        "-o",
        "faulthandler_exit_on_timeout=true",
    ]
    return ["-m", "pytest", *options, *files]


def _reason(said: str) -> str:
    """What of an output says why it failed."""
    for pattern, reason in (
        (r"emulator: \S+?(\w+\.\w+:\d+): ([^\n]*)", r"emulator: \2, \1"),
        (r"emulator: (an access outside device memory|the host touched device memory)", r"\1"),
        (r"ThreadSanitizer: ([\w -]+?) \(", r"thread sanitizer: \1"),
        (r"AddressSanitizer: ([\w-]+)", r"address sanitizer: \1"),
        (r"csrc/\S+?(\w+\.\w+:\d+):\d+: runtime error: ([^\n]{,60})", r"\2, \1"),
        (r"Timeout \(\S+\)!", f"a test that takes more than {TEST_SECONDS} s"),
        (r"FAILED \S+?(test_\w+)\.py::(\w+)", r"\1: \2"),
        (r"ERROR ([^\n]{,80})", r"\1"),
    ):
        found = re.search(pattern, said)
        if found:
            return found.expand(reason)
    return "ended: " + said.strip().splitlines()[-1][:100] if said.strip() else "ended"


def _run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stdout[-4000:] + done.stderr[-4000:])


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


class Record:
    """What caught each mutant, kept from run to run for as long as its code does not change."""

    def __init__(self, mutants: Sequence[Mutant]) -> None:
        WORK.mkdir(parents=True, exist_ok=True)
        self._file = WORK / "caught.json"
        self._known: dict[str, str] = {}
        if self._file.exists():
            self._known = json.loads(self._file.read_text())
        hashes = {file: _hash_of_code(file) for file in {m.file for m in mutants}}
        # Lines may move, where a comment comes.
        keys = [f"{hashes[m.file]} {m.file} {m.what} -> {m.text}" for m in mutants]
        self._keys = {
            mutant: f"{key} {keys[:i].count(key)}"
            for i, (mutant, key) in enumerate(zip(mutants, keys, strict=True))
        }

    def __getitem__(self, mutant: Mutant) -> str | None:
        """What `caught` returned last time; None if that was with other code, or never."""
        return self._known.get(self._keys[mutant])

    def __setitem__(self, mutant: Mutant, by: str) -> None:
        self._known[self._keys[mutant]] = by
        self._file.write_text(json.dumps(self._known, indent=1))


def _hash_of_code(file: str) -> str:
    """Of a source with all headers (of a header, of all sources), and of what they run on.

    Comments may come, and tests, which are the better for it.
    """
    found = hashlib.sha256()
    for folder in (SOURCES, ROOT / "csrc" / "include", HERE):
        for path in sorted(folder.rglob("*.[ch]*")):
            if path.suffix != ".cu" or path.name == file or not file.endswith(".cu"):
                code = re.sub(r"//[^\n]*", "", path.read_text())
                found.update(" ".join(code.split()).encode())
    return found.hexdigest()


def table(mutants: Sequence[Mutant], record: Record) -> str:
    """What caught each mutant that was tried, in Markdown."""
    rows = []
    for mutant in mutants:
        by = record[mutant]
        if by is not None:
            what = mutant.what.replace("|", "\\|")
            by = by or _explanation(mutant) or "**nothing**"
            rows.append(f"| {mutant.file}:{mutant.line} | `{what}` | {by} |")
    head = [
        "# Mutants of the CUDA kernels",
        "",
        "What notices each change of the sources, run by the emulator: see `mutants.py`.",
        f"Tried so far: {len(rows)} of {len(mutants)}.",
        "",
        "| source | change | noticed by |",
        "| --- | --- | --- |",
    ]
    return "\n".join([*head, *rows]) + "\n"


def _explanation(mutant: Mutant) -> str:
    """What a comment at the line, or right above it, says a line is there for."""
    lines = (SOURCES / mutant.file).read_text().splitlines()
    near = " ".join(lines[max(mutant.line - 4, 0) : mutant.line])
    found = re.search(r"not needed for [^.;]*", near.replace(" // ", " "))
    return f"nothing: {found[0]}" if found else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="of csrc/cuda (default: all)")
    parser.add_argument("--only", default="", metavar="TEXT", help="mutants that say so")
    parser.add_argument("--list", action="store_true", help="list the mutants")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="tried at a time")
    args = parser.parse_args()
    files = sorted(path.name for path in SOURCES.glob("*.cu*"))
    mutants = [m for file in files for m in mutants_of(file, (SOURCES / file).read_text())]
    chosen = [m for m in mutants if args.only in m.what and m.file in (args.files or files)]
    if args.list:
        for mutant in chosen:
            print(f"{mutant.file}:{mutant.line}: {mutant.what}")
        print(f"{len(chosen)} mutants")
        return 0
    record = Record(mutants)
    # One that survived is tried again: there may be a test for it by now.
    untried = [m for m in chosen if not record[m]]
    print(f"{len(untried)} of {len(chosen)} mutants are to be tried. The build...", flush=True)
    build(mutants)
    for sanitizers in ROUNDS:
        survivors = [m for m in untried if not record[m]]
        tried: list[Mutant | None] = [None, *survivors]
        numbers = [-1, *map(mutants.index, survivors)]
        with ThreadPoolExecutor(args.jobs) as pool:
            found = pool.map(caught, tried, numbers, itertools.repeat(sanitizers))
            for count, (mutant, by) in enumerate(zip(tried, found, strict=True)):
                if mutant is None and by:
                    pool.shutdown(cancel_futures=True)
                    sys.exit(f"the sources as they are fail: {by}")
                if mutant is None:
                    continue
                record[mutant] = by
                where = f"{count}/{len(survivors)} {mutant.file}:{mutant.line}"
                said = by or _explanation(mutant) or "SURVIVES"
                print(f"{where} {mutant.what}: {said}", flush=True)
                TABLE.write_text(table(mutants, record))
    return 1 if any(not (record[m] or _explanation(m)) for m in chosen) else 0


if __name__ == "__main__":
    sys.exit(main())
