"""Translate CUDA C++ to C++ for the emulator: `translate.py IN OUT`.

Only the parts that are no C++ are changed, and every line keeps its number: messages name the lines
of the CUDA source.

    kernel<T><<<grid, block, shared, stream>>>(...)   a call of emulator::configured
    __shared__ double sums[256];                      a reference to the block's own memory
    const __grid_constant__ Batch batch               a reference
    #ifdef __CUDA_ARCH__ ... #endif                   if (emulator::on_device()) { ... }
    asm volatile("st.global.v4...")                   an assignment
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

AT = "{__FILE__, __LINE__}"
SHARED = re.compile(r"__shared__ (?:alignas\((\w+)\) )?([\w ]+?) (\w+)((?:\[[^;]+\])?);")
STORE = re.compile(r'asm volatile\("st\.global\.v4\.b32[^;]*?;"\s*:\s*: "l"\((\w+)\)[^;]*?\);')


def translate(source: str, name: str) -> str:
    """Return the translation of a source, whose lines keep their numbers.

    Raises:
        ValueError: the source uses a part of CUDA that the emulator does not know.
    """
    text = "".join(_launches(source))
    text = SHARED.sub(_shared, text)
    text = re.sub(r"const __grid_constant__ ([\w:<>]+) (\w+)", r"const \1& \2", text)
    text = re.sub(
        r"#ifdef __CUDA_ARCH__\n(.*?)#endif\n",
        r"if (emulator::on_device()) {\n\1}\n",
        text,
        flags=re.DOTALL,
    )
    text = STORE.sub(_same_lines(r"*reinterpret_cast<uint4*>(\1) = raw;"), text)
    for left in ("<<<", "__shared__", "__grid_constant__", "__CUDA_ARCH__", "asm "):
        if left in text:
            raise ValueError(f"{name}: {left.strip()} in a form that is not translated")
    return f'#line 1 "{name}"\n{text}'


def _launches(source: str) -> list[str]:
    """Cut a source at its launches, and put calls in their place."""
    parts, position = [], 0
    for launch in re.finditer(r"<<<(.*?)>>>", source, re.DOTALL):
        begin = _kernel_before(source, launch.start())
        kernel = source[begin : launch.start()]
        call = f"emulator::configured({AT}, {launch[1]}, [](auto&... a) {{ {kernel}(a...); }})"
        parts += [source[position:begin], call]
        position = launch.end()
    return [*parts, source[position:]]


def _kernel_before(source: str, end: int) -> int:
    """Return where the kernel's name begins, before its template arguments and the launch."""
    begin = len(source[:end].rstrip())
    if source[begin - 1] == ">":
        depth = 1
        while depth > 0:
            begin -= 1
            depth += (source[begin - 1] == ">") - (source[begin - 1] == "<")
        begin -= 1
    while source[begin - 1].isalnum() or source[begin - 1] == "_":
        begin -= 1
    return begin


def _shared(match: re.Match[str]) -> str:
    alignment, kind, name, size = match.groups()
    alias = f"{name}_in_shared_memory"
    return (
        f"using {alias} = {kind}{size}; static const char {name}_key = 0; "
        f"{alias}& {name} = *static_cast<{alias}*>(emulator::shared_memory("
        f"&{name}_key, sizeof({alias}), alignof({alignment or alias})));"
    )


def _same_lines(replacement: str):  # type: ignore[no-untyped-def]
    """Return a replacement that adds lines until there are as many as before."""
    return lambda match: match.expand(replacement) + "\n" * match[0].count("\n")


if __name__ == "__main__":
    source, out = map(Path, sys.argv[1:])
    out.write_text(translate(source.read_text(), f"csrc/cuda/{source.name}"))
