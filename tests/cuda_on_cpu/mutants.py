"""Whether the tests notice when a CUDA kernel is wrong: `python tests/cuda_on_cpu/mutants.py`.

One at a time, every barrier is taken out of the sources, every condition of an `if` is made always
true and always false, each side of an `&&` and of a `min` is left out, every loop over elements
runs once too often or not at all. What comes of it is built for the emulator and has to fail: the
tests under the address sanitizer, then, where it passes, every kernel under the thread sanitizer
(first, where a barrier is missing). A mutant that survives is code that no test needs: a comment at
the line that says "not needed for ..." says why it is there.

The table goes to tests/cuda_on_cpu/MUTANTS.md. Takes about an hour on two cores; goes on where it
was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cuda"
WORK = ROOT / "build" / "mutants"
TABLE = Path(__file__).with_name("MUTANTS.md")

# The tests of a source; a header's are all of them.
TESTS = {
    "ascend.cu": ["test_ascend.py", "test_ascend_again.py", "test_ascend_hvp.py"],
    "descend.cu": ["test_descend.py", "test_stochastic_rounding.py"],
    "descend_adamw.cu": ["test_descend_adamw.py"],
    "reduce.cu": ["test_norm.py", "test_flag_nonfinite.py"],
    "project.cu": ["test_project_out.py"],
    "lanczos.cu": ["test_three_term.py", "test_orthonormalise.py"],
}
GENERAL = ["test_wide_gradients.py", "test_scalars.py", "test_rounding.py"]
# Loops up to these are unrolled: they are neither bounds nor tails.
CONSTANTS = ("Group::kSize", "kAccesses", "Roles", "InFlight", "States", "kGradients")
ORDER = ("address", "thread")
BARRIER = "without the barrier"
SECONDS = 900  # a mutant that runs for longer hangs


@dataclass(frozen=True)
class Mutant:
    """A change of a source.

    Attributes:
        file, line: where.
        what: the change, as the table says it.
        begin, end: the characters that are replaced.
        text: what stands there then.
    """

    file: str
    line: int
    what: str
    begin: int
    end: int
    text: str


def mutants_of(file: str, source: str) -> Iterator[Mutant]:
    """Every mutant of a source."""
    code = re.sub(r"//[^\n]*|\"[^\"\n]*\"", lambda m: " " * len(m[0]), source)

    def mutant(begin: int, end: int, text: str, what: str) -> Mutant:
        line = source.count("\n", 0, begin) + 1
        return Mutant(file, line, what, begin, end, text)

    for m in re.finditer(r"__syncthreads\(\);", code):
        yield mutant(m.start(), m.end(), ";", BARRIER)
    for m in re.finditer(r"\bif \(", code):
        end = _closing(code, m.end() - 1)
        condition = " ".join(source[m.end() : end].split())
        if not code[: m.start()].rstrip().endswith("else"):
            yield mutant(m.end(), end, "false", f"if ({condition}): never")
        yield mutant(m.end(), end, "true", f"if ({condition}): always")
    for m in re.finditer(r"\bmin\(", code):
        end = _closing(code, m.end() - 1)
        whole = " ".join(source[m.start() : end + 1].split())
        for part in _arguments(code, m.end(), end):
            text = source[slice(*part)].strip()
            yield mutant(m.start(), end + 1, f"({text})", f"{whole}: {' '.join(text.split())}")
    for m in re.finditer(r"\b(?:for|while) \(", code):
        end = _closing(code, m.end() - 1)
        begin, until = _condition_of_loop(code, m.end(), end)
        condition = " ".join(source[begin:until].split())
        if condition.endswith(CONSTANTS):
            continue
        yield mutant(begin, until, " false", f"loop while {condition}: not at all")
        if re.search(r"(?<![<-])<(?![<=])", code[begin:until]):
            text = re.sub(r"(?<![<-])<(?![<=])", "<=", source[begin:until], count=1)
            yield mutant(begin, until, text, f"loop while {condition}: once more")
    for m in re.finditer(r" && (?!\.\.\.)", code):
        if "static constexpr" in code[code.rindex("\n", 0, m.start()) : m.start()]:
            continue  # a choice of registers, which changes no result
        begin, end = _side(code, m.start(), -1), _side(code, m.end() - 1, 1)
        left, right = source[begin : m.start()].strip(), source[m.end() : end].strip()
        what = " ".join(f"{left} && {right}".split())
        yield mutant(begin, end, f" {left} ", f"{what}: the left side alone")
        yield mutant(begin, end, f" {right} ", f"{what}: the right side alone")


def _side(code: str, at: int, step: int) -> int:
    """Where the operand ends that reaches from an `&&` to the left (-1) or to the right (1)."""
    depth = 0
    while True:
        at += step
        depth += step * ((code[at] in "([{") - (code[at] in ")]}"))
        ends = code[at] in ";,?" or code[at : at + 4] == " && " or code[at : at + 4] == " || "
        assigns = code[at] == "=" and code[at - 1] not in "<>=!" and code[at + 1] != "="
        returns = step < 0 and code[at : at + 7] == "return "
        if depth < 0 or (depth == 0 and (ends or assigns)):
            return at if step > 0 else at + 1
        if depth == 0 and returns:
            return at + 7


def _closing(code: str, opening: int) -> int:
    """Where the parenthesis closes that opens there."""
    depth = 0
    for i in range(opening, len(code)):
        depth += (code[i] == "(") - (code[i] == ")")
        if depth == 0:
            return i
    raise ValueError("a parenthesis that is not closed")


def _arguments(code: str, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Stretches between commas that are in no further parentheses."""
    depth, first = 0, begin
    for i in range(begin, end):
        depth += (code[i] in "([{<") - (code[i] in ")]}>")
        if depth == 0 and code[i] == ",":
            yield first, i
            first = i + 1
    yield first, end


def _condition_of_loop(code: str, begin: int, end: int) -> tuple[int, int]:
    if ";" not in code[begin:end]:
        return begin, end  # while
    first = code.index(";", begin) + 1
    return first, code.index(";", first)


class Workshop:
    """A copy of the sources, and the extensions that are built from it."""

    def __init__(self) -> None:
        self.sources = WORK / "cuda"
        shutil.rmtree(self.sources, ignore_errors=True)
        shutil.copytree(SOURCES, self.sources)
        for sanitizer in ORDER:
            _run(
                "cmake", "-G", "Ninja", "-S", Path(__file__).parent, "-B", WORK / sanitizer,
                f"-DSANITIZER={sanitizer}", f"-DCUDA_SOURCES={self.sources}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={_output(sys.executable, '-m', 'pybind11', '--cmakedir')}",
            )  # fmt: skip

    def caught(self, mutant: Mutant | None) -> str:
        """What notices a mutant; "" if nothing does."""
        path = self.sources / mutant.file if mutant else None
        source = path.read_text() if path else ""
        if mutant and path:
            path.write_text(source[: mutant.begin] + mutant.text + source[mutant.end :])
        try:
            is_barrier = mutant is not None and mutant.what == BARRIER
            for sanitizer in reversed(ORDER) if is_barrier else ORDER:
                built = subprocess.run(
                    ["ninja", "-C", WORK / sanitizer], capture_output=True, text=True
                )
                if built.returncode != 0:
                    return "the compiler"
                failure = _failure(sanitizer, mutant.file if mutant else "")
                if failure:
                    return failure
            return ""
        finally:
            if path:
                path.write_text(source)


def _failure(sanitizer: str, file: str) -> str:
    """The first failure of the tests with the extension that was built, or ""."""
    try:
        done = subprocess.run(
            [ROOT / "tests" / "cuda_on_cpu" / "run.sh", sanitizer, *_tests(sanitizer, file)],
            env=os.environ | {"EIGENFILTER_EMULATED": str(WORK / sanitizer / "_core.so")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"a test that takes more than {SECONDS} s"
    if done.returncode == 0:
        return ""
    return _reason(done.stdout)


def _tests(sanitizer: str, file: str) -> list[str]:
    if sanitizer == "thread":
        return [str(Path(__file__).with_name("races.py"))]
    names = TESTS.get(file) or [name for names in TESTS.values() for name in names]
    files = [str(ROOT / "tests" / "kernels" / name) for name in [*names, *GENERAL]]
    # The emulator and the sanitizers write to the process's own stderr as it ends.
    return ["-m", "pytest", "-x", "-q", "--capture=sys", "-p", "no:cacheprovider", *files]


def _reason(said: str) -> str:
    """What of an output says why it failed."""
    for pattern, reason in (
        (r"emulator: \S+?(\w+\.\w+:\d+): ([^\n]*)", r"emulator: \2, \1"),
        (r"emulator: (an access outside device memory|the host touched device memory)", r"\1"),
        (r"ThreadSanitizer: ([\w -]+?) \(", r"thread sanitizer: \1"),
        (r"AddressSanitizer: ([\w-]+)", r"address sanitizer: \1"),
        (r"csrc/\S+?(\w+\.\w+:\d+):\d+: runtime error: ([^\n]{,60})", r"\2, \1"),
        (r"FAILED \S+?(test_\w+)\.py::(\w+)", r"\1: \2"),
        (r"ERROR ([^\n]{,80})", r"\1"),
    ):
        found = re.search(pattern, said)
        if found:
            return found.expand(reason)
    return "ended: " + said.strip().splitlines()[-1][:100] if said.strip() else "ended"


def _run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="of csrc/cuda (default: all)")
    parser.add_argument("--only", default="", metavar="TEXT", help="mutants that say so")
    parser.add_argument("--list", action="store_true", help="list the mutants")
    args = parser.parse_args()
    files = sorted(path.name for path in SOURCES.glob("*.cu*"))
    mutants = [m for file in files for m in mutants_of(file, (SOURCES / file).read_text())]
    chosen = [m for m in mutants if args.only in m.what and m.file in (args.files or files)]
    if args.list:
        for mutant in chosen:
            print(f"{mutant.file}:{mutant.line}: {mutant.what}")
        print(f"{len(chosen)} mutants")
        return 0
    record = Record()
    if failure := record.of(None):
        print(f"the sources as they are fail: {failure}", file=sys.stderr)
        return 2
    survivors = 0
    for number, mutant in enumerate(chosen, 1):
        said = record.of(mutant) or _explanation(mutant)
        survivors += not said
        where = f"{number}/{len(chosen)} {mutant.file}:{mutant.line}"
        print(f"{where} {mutant.what}: {said or 'SURVIVES'}", flush=True)
        TABLE.write_text(table(mutants, record))
    return 1 if survivors else 0


def _hash_of_sources() -> str:
    """Of what is tested, and of what it runs on; tests may come."""
    found = hashlib.sha256()
    for folder in (ROOT / "csrc", Path(__file__).parent):
        for path in sorted(folder.rglob("*.[ch]*")):
            found.update(path.read_bytes())
    return found.hexdigest()


class Record:
    """What caught each mutant, kept from run to run for as long as no source changes."""

    def __init__(self) -> None:
        WORK.mkdir(parents=True, exist_ok=True)
        self._file = WORK / "caught.json"
        self._known: dict[str, str] = {}
        if self._file.exists():
            self._known = json.loads(self._file.read_text())
        self._workshop: Workshop | None = None
        self._sources = _hash_of_sources()

    def of(self, mutant: Mutant | None) -> str:
        """What catches a mutant, or the sources as they are; "" if nothing does."""
        found = self.known(mutant)
        if found or (found is not None and mutant is None):
            return found
        # One that survived is tried again: there may be a test for it by now.
        self._workshop = self._workshop or Workshop()
        self._known[self._key(mutant)] = self._workshop.caught(mutant)
        self._file.write_text(json.dumps(self._known, indent=1))
        return self._known[self._key(mutant)]

    def known(self, mutant: Mutant | None) -> str | None:
        """What `of` returned last time; None if that was with other sources, or never."""
        return self._known.get(self._key(mutant))

    def _key(self, mutant: Mutant | None) -> str:
        return self._sources + json.dumps(mutant and asdict(mutant))


def table(mutants: Sequence[Mutant], record: Record) -> str:
    """What caught each mutant that was tried, in Markdown."""
    rows = []
    for mutant in mutants:
        by = record.known(mutant)
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


if __name__ == "__main__":
    sys.exit(main())
