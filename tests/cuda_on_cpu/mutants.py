"""Mutation tests of the CUDA kernels: `python tests/cuda_on_cpu/mutants.py`.

A mutant is one change that makes a kernel wrong: a barrier is removed, the condition of an `if` is
always true or always false, one side of an `&&` or of a `min` is left out, or a loop over elements
runs once too often or not at all. The emulator's build holds all mutants, and a process runs one of
them. Something has to fail, in one of three rounds: the tests; the source's own tests under the
address sanitizer, which take five times as long; the kernels on a few blocks under the thread
sanitizer, which comes first if the mutant lacks a barrier. If a mutant survives, no test needs the
code that it changes: then a comment "not needed for ..." at that line has to explain the code.

Python, torch and the collection of tests are loaded once for each source, and every mutant runs in
a fork (forking.py). The results are written to tests/cuda_on_cpu/MUTANTS.md: of mutants that some
rounds have not noticed, once the last round has tried them. A full run takes most of an hour on two
cores, and a run that was stopped continues where it ended. `--only FILE:LINE:` tries the mutants of
one line.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import forking
from mutations import BARRIER, Mutant, mutants_of, with_mutants

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCES = ROOT / "csrc" / "cuda"
WORK = ROOT / "build" / "mutants"
TABLE = HERE / "MUTANTS.md"
CODE = (".cu", ".cuh", ".cpp", ".hpp", ".h", ".cmake")

# The tests of each source. Those of a header are the tests of all sources that include it.
UPDATES = {
    "perturb.cu": ["test_perturb.py", "test_perturb_unsaved.py", "test_perturb_hvp.py"],
    "sgd_step.cu": ["test_sgd_step.py", "test_stochastic_rounding.py", "test_compressed_steps.py"],
    "adamw_step.cu": ["test_adamw_step.py"],
}
COMPRESSED = {"sgd_step.cu": ["test_compressed_steps.py"]}
REDUCTIONS = {"reduce.cu": ["test_norm.py", "test_wide_norms.py", "test_flag_nonfinite.py"]}
VECTORS = {
    "orthogonalize.cu": ["test_orthogonalize.py"],
    "lanczos.cu": ["test_lanczos_step.py", "test_cholesky_qr.py"],
    "cross_entropy.cu": ["test_cross_entropy_hvp.py"],
}
HEADERS = {
    "update.cuh": UPDATES,
    "compressed.cuh": COMPRESSED,
    "scalars.cuh": UPDATES | REDUCTIONS,
    "multi_tensor.cuh": UPDATES | REDUCTIONS | VECTORS,
    "block_sum.cuh": REDUCTIONS | VECTORS,
    "tiles.cuh": VECTORS,
}
TESTS = (
    {
        file: [name for names in sources.values() for name in names]
        for file, sources in HEADERS.items()
    }
    | UPDATES
    | REDUCTIONS
    | VECTORS
)
# These tests run all updates and reductions. The address sanitizer runs the first two alone.
GENERAL = ["test_wide_gradients.py", "test_many_tensors.py"]
GENERAL += ["test_scalars.py", "test_rounding.py", "test_backups.py"]
# The part of races.py that runs a source.
RACES = {
    "perturb.cu": ["updates"],
    "sgd_step.cu": ["updates"],
    "adamw_step.cu": ["updates"],
    "update.cuh": ["updates"],
    "compressed.cuh": ["updates"],
    "reduce.cu": ["reductions"],
    "scalars.cuh": ["updates", "reductions"],
    "orthogonalize.cu": ["rows"],
    "lanczos.cu": ["rows"],
    "cross_entropy.cu": ["rows"],
    "tiles.cuh": ["rows"],
}
ROUNDS = ("none", "address", "thread")  # the quick round is the first, and takes all mutants
TEST_SECONDS = 600  # a test that takes longer has failed


def write_sources(mutants: Sequence[Mutant]) -> None:
    """Write the sources with every mutant in them."""
    sources = WORK / "cuda"
    sources.mkdir(parents=True, exist_ok=True)
    texts = {path.name: path.read_text() for path in SOURCES.glob("*.cu*")}
    for path in sources.iterdir():
        if path.name not in texts:
            path.unlink()
    for name, source in texts.items():
        here = {n: m for n, m in enumerate(mutants) if m.file == name}
        text, path = with_mutants(source, here), sources / name
        if not path.exists() or path.read_text() != text:  # ninja builds newer files again
            path.write_text(text)


def build(sanitizer: str) -> None:
    """Build the extension from the sources with mutants, for a sanitizer."""
    print(f"Building all mutants (sanitizer: {sanitizer})...", flush=True)
    _run(
        "cmake", "-G", "Ninja", "-S", HERE, "-B", WORK / sanitizer,
        f"-DSANITIZER={sanitizer}", f"-DCUDA_SOURCES={WORK / 'cuda'}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={_output(sys.executable, '-m', 'pybind11', '--cmakedir')}",
    )  # fmt: skip
    _run("ninja", "-C", WORK / sanitizer)


class Server:
    """A process that has loaded the tests of a source, and runs them for one mutant at a time."""

    def __init__(self, sanitizer: str, file: str) -> None:
        self._name = f"{file} ({sanitizer})"
        answers, write_end = os.pipe()
        self._folder = tempfile.TemporaryDirectory()
        self._output = Path(self._folder.name, "output.txt")
        self._process = subprocess.Popen(
            [HERE / "run.sh", sanitizer, *_arguments(sanitizer, file)],
            env=os.environ
            | {"EIGENFILTER_EMULATED": str(WORK / sanitizer / "_core.so")}
            | {"PYTHONPATH": str(HERE), "ANSWERS": str(write_end)},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[write_end],
            text=True,
        )
        os.close(write_end)
        self._answers = os.fdopen(answers)

    def failure(self, number: int) -> str:
        """Return the first failure with a mutant, or ""."""
        assert self._process.stdin is not None
        print(number, self._output, file=self._process.stdin, flush=True)
        answer = self._answers.readline()
        if not answer:
            raise RuntimeError(f"the process with the tests of {self._name} has ended")
        status = int(answer)
        if status == -signal.SIGALRM:
            return f"a run that takes more than {forking.SECONDS} s"
        output = self._output.read_text()
        reason = _reason(output)
        if status == -signal.SIGKILL or (status != 0 and not reason):
            # The machine is the cause, and not the mutant: it is out of memory, or a disk is full.
            raise RuntimeError(f"{self._name} ended with {status} for no known reason: {output}")
        return reason if status != 0 else ""

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._answers.close()
        self._folder.cleanup()


def try_mutants(
    mutants: Sequence[tuple[int, Mutant]], sanitizer: str, file: str
) -> Iterator[tuple[Mutant, str]]:
    """Yield the mutants of a source, each with what notices it; "" if nothing does."""
    server = Server(sanitizer, file)
    try:
        if failure := server.failure(-1):
            raise RuntimeError(f"the sources as they are fail ({sanitizer}, {file}): {failure}")
        for number, mutant in mutants:
            yield mutant, server.failure(number)
    finally:
        server.close()


def _arguments(sanitizer: str, file: str) -> list[str]:
    if sanitizer == "thread":
        return [str(HERE / "races.py"), *RACES.get(file, [])]
    names = TESTS[file]
    if file not in VECTORS and file != "tiles.cuh":
        names = [*names, *(GENERAL[:2] if sanitizer == "address" else GENERAL)]
    files = [str(ROOT / "tests" / "kernels" / name) for name in names]
    # The emulator and the sanitizers end the process with a message on its own stderr, which pytest
    # must not have replaced.
    options = ["-x", "-q", "--capture=sys", "-p", "no:cacheprovider", "-p", "forking"]
    options += [
        "-o",
        f"faulthandler_timeout={TEST_SECONDS}",
        "-o",
        "faulthandler_exit_on_timeout=true",
    ]
    return ["-m", "pytest", *options, *files]


def _reason(output: str) -> str:
    """Return the part of an output that says why a run failed, or ""."""
    for pattern, reason in (
        (r"emulator: \S+?(\w+\.\w+:\d+): ([^\n]*)", r"emulator: \2, \1"),
        (r"emulator: a call:0: ([^\n]*)", r"emulator: \1"),
        (r"emulator: (an access outside device memory|the host touched device memory)", r"\1"),
        (r"ThreadSanitizer: ([\w -]+?) \(", r"thread sanitizer: \1"),
        (r"AddressSanitizer: ([\w-]+)", r"address sanitizer: \1"),
        (r"csrc/\S+?(\w+\.\w+:\d+):\d+: runtime error: ([^\n]{,60})", r"\2, \1"),
        (r"Timeout \(\S+\)!", f"a test that takes more than {TEST_SECONDS} s"),
        (r"FAILED \S+?(test_\w+)\.py::(\w+)", r"\1: \2"),
        (r"ERROR ([^\n]{,80})", r"\1"),
        (r"\n(\w+Error: [^\n]{,80})", r"\1"),
    ):
        match = re.search(pattern, output)
        if match:
            return match.expand(reason)
    return ""


def _run(*command: object) -> None:
    process = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if process.returncode != 0:
        sys.exit(process.stdout[-4000:] + process.stderr[-4000:])


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


class Record:
    """What noticed each mutant, in a file that holds as long as the mutant's code does."""

    def __init__(self, mutants: Sequence[Mutant]) -> None:
        WORK.mkdir(parents=True, exist_ok=True)
        self._file = WORK / "caught.json"
        self._known: dict[str, str] = {}
        if self._file.exists():
            self._known = json.loads(self._file.read_text())
        hashes = {file: _hash_of_code(file) for file in {m.file for m in mutants}}
        # The key has no line number, which a new comment would change.
        keys = [f"{hashes[m.file]} {m.file} {m.what} -> {m.text}" for m in mutants]
        self._keys = {
            mutant: f"{key} {keys[:i].count(key)}"
            for i, (mutant, key) in enumerate(zip(mutants, keys, strict=True))
        }

    def __getitem__(self, mutant: Mutant) -> str | None:
        """What noticed a mutant, "" if nothing did; None if not every round has tried this code."""
        return self._known.get(self._keys[mutant])

    def __setitem__(self, mutant: Mutant, by: str) -> None:
        self._known[self._keys[mutant]] = by
        self._write()

    def forget(self, mutants: Sequence[Mutant]) -> None:
        """Forget what is known of mutants that are to be tried again."""
        for mutant in mutants:
            self._known.pop(self._keys[mutant], None)
        self._write()

    def _write(self) -> None:
        self._file.write_text(json.dumps(self._known, indent=1))


def _hash_of_code(file: str) -> str:
    """Hash a source with all headers, and a header with all sources; the emulator counts, too.

    Comments do not count, and neither do the tests. Delete the record after a change that weakens
    a test.
    """
    digest = hashlib.sha256()
    for folder in (SOURCES, ROOT / "csrc" / "core", HERE):
        for path in sorted(each for each in folder.rglob("*") if each.suffix in CODE):
            if path.suffix != ".cu" or path.name == file or not file.endswith(".cu"):
                code = re.sub(r"//[^\n]*", "", path.read_text())
                digest.update(" ".join(code.split()).encode())
    return digest.hexdigest()


def table(mutants: Sequence[Mutant], record: Record) -> str:
    """What noticed each mutant that was tried to the end, as a table in Markdown."""
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
    """The reason for a mutant's code that a comment at its line, or right above it, gives."""
    lines = (SOURCES / mutant.file).read_text().splitlines()
    first = mutant.line - 1
    while lines[first - 1].lstrip().startswith("//"):
        first -= 1
    near = " ".join(lines[first : mutant.line])
    match = re.search(r"not needed for [^.;]*", re.sub(r"\s+//", "", near))
    return f"nothing: {match[0]}" if match else ""


def _try_all(
    survivors: Sequence[Mutant],
    mutants: Sequence[Mutant],
    record: Record,
    sanitizer: str,
    jobs: int,
) -> None:
    """Try the survivors of the rounds before, `jobs` sources at a time; record and print.

    A mutant that survives without an explanation is not recorded: a later round may notice it.
    """
    if not survivors:
        return
    build(sanitizer)
    count, lock, failed = itertools.count(1), threading.Lock(), threading.Event()

    def try_source(file: str) -> None:
        pairs = [(mutants.index(m), m) for m in survivors if m.file == file]
        for mutant, by in try_mutants(pairs, sanitizer, file):
            if failed.is_set():
                return
            with lock:
                result = by or _explanation(mutant)
                if result:
                    record[mutant] = by
                    TABLE.write_text(table(mutants, record))
                place = f"{next(count)}/{len(survivors)} {_described(mutant)}"
                print(f"{place}: {result or 'survives so far'}", flush=True)

    sizes = Counter(m.file for m in survivors)
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(try_source, file) for file, _ in sizes.most_common()]
        for future in as_completed(futures):
            if error := future.exception():
                failed.set()
                pool.shutdown(wait=False, cancel_futures=True)
                print(f"{error}\nWaiting for the runs in progress to end.", flush=True)
                raise error


def _described(mutant: Mutant) -> str:
    return f"{mutant.file}:{mutant.line}: {mutant.what}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="files of csrc/cuda (default: all)")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only mutants with this in --list"
    )
    parser.add_argument("--list", action="store_true", help="list the mutants")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="sources at a time")
    args = parser.parse_args()
    files = sorted(path.name for path in SOURCES.glob("*.cu*"))
    mutants = [m for file in files for m in mutants_of(file, (SOURCES / file).read_text())]
    chosen = [m for m in mutants if args.only in _described(m) and m.file in (args.files or files)]
    if args.list:
        for mutant in chosen:
            print(_described(mutant))
        print(f"{len(chosen)} mutants")
        return 0
    record = Record(mutants)
    # A survivor without an explanation is tried again, as there may be a test for it by now.
    untried = [m for m in chosen if record[m] is None or not (record[m] or _explanation(m))]
    print(f"{len(untried)} of {len(chosen)} mutants are to be tried.", flush=True)
    record.forget(untried)
    write_sources(mutants)
    _try_all([m for m in untried if m.what == BARRIER], mutants, record, "thread", args.jobs)
    for sanitizer in ROUNDS:
        # Only the tests try a mutant that has an explanation.
        survivors = [m for m in untried if not record[m]]
        if sanitizer != ROUNDS[0]:
            survivors = [m for m in survivors if not _explanation(m)]
        _try_all(survivors, mutants, record, sanitizer, args.jobs)
    unnoticed = [m for m in untried if not (record[m] or _explanation(m))]
    for mutant in unnoticed:
        record[mutant] = ""
        print(f"{_described(mutant)}: SURVIVES", flush=True)
    TABLE.write_text(table(mutants, record))
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
