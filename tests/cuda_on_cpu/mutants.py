"""Whether the tests notice when a CUDA kernel is wrong: `python tests/cuda_on_cpu/mutants.py`.

One at a time, every barrier is taken out of the sources, every condition of an `if` is made always
true and always false, each side of an `&&` and of a `min` is left out, every loop over elements
runs once too often or not at all. The emulator's build holds all of these changes, and a process
runs one of them. It has to fail: in the tests; or, in a second round, in the source's own tests
under the address sanitizer, which take five times as long; or, in a third one, under the thread
sanitizer, which runs the kernels on a few blocks, and comes first where a barrier is missing. A
mutant that survives is code that no test needs: a comment at the line that says "not needed for
..." says why it is there.

Python, torch and the collection of tests are loaded once for each source: every mutant runs in a
fork (forking.py). The table goes to tests/cuda_on_cpu/MUTANTS.md. It takes most of an hour on
two cores, and goes on where it was stopped.
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

# The tests of a source, and the part of races.py that runs it; a header's are those of all sources
# that include it.
UPDATES = {
    "perturb.cu": ["test_perturb.py", "test_perturb_again.py", "test_perturb_hvp.py"],
    "sgd_step.cu": ["test_sgd_step.py", "test_stochastic_rounding.py"],
    "adamw_step.cu": ["test_adamw_step.py"],
}
REDUCTIONS = {"reduce.cu": ["test_norm.py", "test_wide_norms.py", "test_flag_nonfinite.py"]}
VECTORS = {
    "orthogonalize.cu": ["test_orthogonalize.py"],
    "lanczos.cu": ["test_lanczos_step.py", "test_cholesky_qr.py"],
}
HEADERS = {
    "update.cuh": UPDATES,
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
# Of all updates and reductions; the first two also under the address sanitizer.
GENERAL = ["test_wide_gradients.py", "test_many_tensors.py"]
GENERAL += ["test_scalars.py", "test_rounding.py", "test_backups.py"]
RACES = {
    "perturb.cu": ["updates"],
    "sgd_step.cu": ["updates"],
    "adamw_step.cu": ["updates"],
    "update.cuh": ["updates"],
    "reduce.cu": ["reductions"],
    "scalars.cuh": ["updates", "reductions"],
    "orthogonalize.cu": ["rows"],
    "lanczos.cu": ["rows"],
    "tiles.cuh": ["rows"],
}
ROUNDS = ("none", "address", "thread")  # what is quick goes first, and for all mutants
TEST_SECONDS = 180  # a test that takes longer hangs


def build(mutants: Sequence[Mutant]) -> None:
    """Build the extension with every mutant in it, once for each sanitizer."""
    sources = WORK / "cuda"
    sources.mkdir(parents=True, exist_ok=True)
    texts = {path.name: path.read_text() for path in SOURCES.glob("*.cu*")}
    for path in sources.iterdir():
        if path.name not in texts:
            path.unlink()
    for name, source in texts.items():
        here = {n: m for n, m in enumerate(mutants) if m.file == name}
        text, path = with_mutants(source, here), sources / name
        if not path.exists() or path.read_text() != text:  # what is the same is not built again
            path.write_text(text)
    for sanitizer in ROUNDS:
        _run(
            "cmake", "-G", "Ninja", "-S", HERE, "-B", WORK / sanitizer,
            f"-DSANITIZER={sanitizer}", f"-DCUDA_SOURCES={sources}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={_output(sys.executable, '-m', 'pybind11', '--cmakedir')}",
        )  # fmt: skip
        _run("ninja", "-C", WORK / sanitizer)


class Server:
    """A process that has loaded the tests of a source, and runs them for one mutant at a time."""

    def __init__(self, sanitizer: str, file: str) -> None:
        self._name = f"{file} ({sanitizer})"
        answers, written = os.pipe()
        self._folder = tempfile.TemporaryDirectory()
        self._output = Path(self._folder.name, "output.txt")
        self._process = subprocess.Popen(
            [HERE / "run.sh", sanitizer, *_arguments(sanitizer, file)],
            env=os.environ
            | {"EIGENFILTER_EMULATED": str(WORK / sanitizer / "_core.so")}
            | {"PYTHONPATH": str(HERE), "ANSWERS": str(written)},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[written],
            text=True,
        )
        os.close(written)
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
            # Out of memory, a full disk: that is not the mutant's doing.
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
    # The emulator and the sanitizers write to the process's own stderr as it ends.
    options = ["-x", "-q", "--capture=sys", "-p", "no:cacheprovider", "-p", "forking"]
    options += [
        "-o",
        f"faulthandler_timeout={TEST_SECONDS}",
        "-o",
        "faulthandler_exit_on_timeout=true",
    ]
    return ["-m", "pytest", *options, *files]


def _reason(said: str) -> str:
    """What of an output says why it failed, or ""."""
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
        found = re.search(pattern, said)
        if found:
            return found.expand(reason)
    return ""


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

    Comments may change, and so may tests: after a change that weakens them, delete the record.
    """
    found = hashlib.sha256()
    for folder in (SOURCES, ROOT / "csrc" / "core", HERE):
        for path in sorted(each for each in folder.rglob("*") if each.suffix in CODE):
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
    """What a comment at the line, or lines of comment right above it, say that it is there for."""
    lines = (SOURCES / mutant.file).read_text().splitlines()
    first = mutant.line - 1
    while lines[first - 1].lstrip().startswith("//"):
        first -= 1
    near = " ".join(lines[first : mutant.line])
    found = re.search(r"not needed for [^.;]*", re.sub(r"\s+//", "", near))
    return f"nothing: {found[0]}" if found else ""


def _try_all(
    survivors: Sequence[Mutant],
    mutants: Sequence[Mutant],
    record: Record,
    sanitizer: str,
    jobs: int,
) -> None:
    """Try the survivors, source by source, some sources at a time; record and print."""
    count, lock, failed = itertools.count(1), threading.Lock(), threading.Event()

    def try_source(file: str) -> None:
        pairs = [(mutants.index(m), m) for m in survivors if m.file == file]
        for mutant, by in try_mutants(pairs, sanitizer, file):
            if failed.is_set():
                return
            with lock:
                record[mutant] = by
                where = f"{next(count)}/{len(survivors)} {mutant.file}:{mutant.line}"
                said = by or _explanation(mutant) or "SURVIVES"
                print(f"{where} {mutant.what}: {said}", flush=True)
                TABLE.write_text(table(mutants, record))

    sizes = Counter(m.file for m in survivors)
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(try_source, file) for file, _ in sizes.most_common()]
        for future in as_completed(futures):
            if error := future.exception():
                failed.set()
                pool.shutdown(wait=False, cancel_futures=True)
                print(f"{error}\nWaiting for what runs to end.", flush=True)
                raise error


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
    # One that survived is tried again, unless it is explained: there may be a test for it by now.
    untried = [m for m in chosen if record[m] is None or not (record[m] or _explanation(m))]
    print(f"{len(untried)} of {len(chosen)} mutants are to be tried. The build...", flush=True)
    build(mutants)
    _try_all([m for m in untried if m.what == BARRIER], mutants, record, "thread", args.jobs)
    for sanitizer in ROUNDS:
        # What is explained is tried by the tests alone.
        survivors = [m for m in untried if not record[m]]
        if sanitizer != ROUNDS[0]:
            survivors = [m for m in survivors if not _explanation(m)]
        _try_all(survivors, mutants, record, sanitizer, args.jobs)
    return 1 if any(not (record[m] or _explanation(m)) for m in chosen) else 0


if __name__ == "__main__":
    sys.exit(main())
