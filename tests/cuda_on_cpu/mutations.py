"""Changes of the CUDA sources that their tests have to notice, and one source that has them all."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

# Loops up to these are unrolled: they are neither bounds nor tails.
CONSTANTS = ("Group::kSize", "kAccesses", "Roles", "InFlight", "States", "kGradients")
BARRIER = "without the barrier"


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


def with_mutants(source: str, mutants: Mapping[int, Mutant]) -> str:
    """A source that runs as the mutant does whose number it is given, and otherwise as it is.

    A condition becomes `(emulator::mutant(7) ? (false) : emulator::mutant(8) ? (true) :
    (condition))`. No line moves.
    """
    return _switched(source, 0, len(source), mutants)


def _switched(source: str, begin: int, end: int, mutants: Mapping[int, Mutant]) -> str:
    """The same of a stretch of the source, for the mutants that lie in it."""
    text, done = "", begin
    # Whatever holds another stretch comes before it.
    stretches = sorted({(m.begin, m.end) for m in mutants.values()}, key=lambda s: (s[0], -s[1]))
    for first, last in stretches:
        if first < done:
            continue  # in the stretch before
        here = {n: m for n, m in mutants.items() if (m.begin, m.end) == (first, last)}
        within = {n: m for n, m in mutants.items() if first <= m.begin and m.end <= last}
        inner = _switched(source, first, last, {n: within[n] for n in within.keys() - here.keys()})
        text += source[done:first] + _choice(here, inner)
        done = last
    return text + source[done:end]


def _choice(mutants: Mapping[int, Mutant], text: str) -> str:
    if any(m.what == BARRIER for m in mutants.values()):
        [number] = mutants
        return f"if (!emulator::mutant({number})) {text}"
    others = "".join(
        f"emulator::mutant({n}) ? ({' '.join(m.text.split())}) : " for n, m in mutants.items()
    )
    return f" ({others}({text}))"
