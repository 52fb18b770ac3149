"""Mutants: changes of the CUDA sources that the tests have to notice, all in one build."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

# A loop up to one of these constants is unrolled: it can neither miss a tail nor exceed a bound.
CONSTANTS = ("Group::kSize", "kAccesses", "kHeld", "Roles", "InFlight", "States", "kGradients")
BARRIER = "without the barrier"


@dataclass(frozen=True)
class Mutant:
    """A change of a source.

    Attributes:
        file, line: the place of the change.
        what: the change, in the words of the table.
        begin, end: the range of characters that `text` replaces.
        text: the replacement.
    """

    file: str
    line: int
    what: str
    begin: int
    end: int
    text: str


def mutants_of(file: str, source: str) -> Iterator[Mutant]:
    """Yield every mutant of a source."""
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
        if m[0] == "for (" and ";" not in code[m.end() : end]:
            continue  # a range has no condition
        begin, until = _condition_of_loop(code, m.end(), end)
        condition = " ".join(source[begin:until].split())
        if condition.endswith(CONSTANTS):
            continue
        yield mutant(begin, until, " false", f"loop while {condition}: not at all")
        if re.search(r"(?<![<-])<(?![<=])", code[begin:until]):
            text = re.sub(r"(?<![<-])<(?![<=])", "<=", source[begin:until], count=1)
            yield mutant(begin, until, text, f"loop while {condition}: once more")
    for m in re.finditer(r" && (?!\.\.\.)", code):
        statement = re.split(r"[;{}]", code[: m.start()])[-1]
        if "static constexpr" in statement:
            continue  # this chooses a number of registers, and changes no result
        begin, end = _side(code, m.start(), -1), _side(code, m.end() - 1, 1)
        left, right = source[begin : m.start()].strip(), source[m.end() : end].strip()
        what = " ".join(f"{left} && {right}".split())
        yield mutant(begin, end, f" {left} ", f"{what}: the left side alone")
        yield mutant(begin, end, f" {right} ", f"{what}: the right side alone")


def _side(code: str, at: int, step: int) -> int:
    """Return the end of the operand to the left (-1) or to the right (1) of an `&&`."""
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
    """Return the position of the parenthesis that closes the one at `opening`."""
    depth = 0
    for i in range(opening, len(code)):
        depth += (code[i] == "(") - (code[i] == ")")
        if depth == 0:
            return i
    raise ValueError("a parenthesis that is not closed")


def _arguments(code: str, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges between commas, except those within further parentheses."""
    depth, first = 0, begin
    for i in range(begin, end):
        depth += (code[i] in "([{<") - (code[i] in ")]}>")
        if depth == 0 and code[i] == ",":
            yield first, i
            first = i + 1
    yield first, end


def _condition_of_loop(code: str, begin: int, end: int) -> tuple[int, int]:
    if ";" not in code[begin:end]:
        return begin, end  # the loop is a `while`
    first = code.index(";", begin) + 1
    return first, code.index(";", first)


def with_mutants(source: str, mutants: Mapping[int, Mutant]) -> str:
    """Return a source that holds all mutants, one of which the emulator chooses by its number.

    A condition becomes `(emulator::mutant(7) ? (false) : emulator::mutant(8) ? (true) :
    (condition))`. Every line keeps its number.
    """
    return _switched(source, 0, len(source), mutants)


def _switched(source: str, begin: int, end: int, mutants: Mapping[int, Mutant]) -> str:
    """Return one range of the source with the mutants in it."""
    text, position = "", begin
    # A range comes before the ranges within it, which the recursion takes.
    ranges = sorted({(m.begin, m.end) for m in mutants.values()}, key=lambda r: (r[0], -r[1]))
    for first, last in ranges:
        if first < position:
            continue
        here = {n: m for n, m in mutants.items() if (m.begin, m.end) == (first, last)}
        within = {n: m for n, m in mutants.items() if first <= m.begin and m.end <= last}
        inner = _switched(source, first, last, {n: within[n] for n in within.keys() - here.keys()})
        text += source[position:first] + _choice(here, inner)
        position = last
    return text + source[position:end]


def _choice(mutants: Mapping[int, Mutant], text: str) -> str:
    if any(m.what == BARRIER for m in mutants.values()):
        [number] = mutants
        return f"if (!emulator::mutant({number})) {text}"
    others = "".join(
        f"emulator::mutant({n}) ? ({' '.join(m.text.split())}) : " for n, m in mutants.items()
    )
    return f" ({others}({text}))"
