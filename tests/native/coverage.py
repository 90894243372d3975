"""Which branches of the C++ validators the tests take, by gcov: a table, and what was missed."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

# Files, and lines whose other branch no test can take, each with the reason.
VALIDATORS = ("core/spec.cc", "core/matrix.cc", "ort/node.h")
UNREACHABLE = {
    "wide > std::numeric_limits<size_t>::max()": "pointers of 32 bits only",
    "if (status != nullptr) {  // a nameless node": "ONNX Runtime never fails to tell a name",
    "if (status == nullptr && size > 0)": "the same",
    "name.resize(size > 0": "the same",
    "if (count != kInputs)": "ONNX Runtime counts them before, by the schema (test_wrong_number_of_inputs)",
    "if (is_constant == 0 || value == nullptr)": "the second is said together with the first",
}


@dataclass(frozen=True)
class Branches:
    """One file: branches, those taken, lines with one that was not."""

    file: str
    total: int
    taken: int
    missed: tuple[tuple[int, str], ...]


def branches(build: Path, sources: Path) -> list[Branches]:
    """What gcov counted for a library that was built with ``--coverage`` in ``build``.

    Branches into the handling of exceptions, which GCC adds to every call, are no decisions of the source and do not
    count. A branch counts as taken if any copy of its line (templates, inlining, several files) took it.
    """
    found: dict[str, dict[tuple[int, int], int]] = {name: {} for name in VALIDATORS}
    for notes in build.rglob("*.gcda"):
        done = subprocess.run(
            ["gcov", "--json-format", "--stdout", "-b", notes], capture_output=True, cwd=build, check=True
        )
        for part in done.stdout.splitlines():
            for file in json.loads(part)["files"]:
                name = next((v for v in VALIDATORS if Path(file["file"]).resolve() == (sources / v).resolve()), None)
                if name is None:
                    continue
                for line in file["lines"]:
                    decisions = [b for b in line["branches"] if not b["throw"]]
                    for index, branch in enumerate(decisions):
                        key = (line["line_number"], index)
                        found[name][key] = found[name].get(key, 0) + branch["count"]
    result = []
    for name, counts in found.items():
        text = (sources / name).read_text().splitlines()
        counted = {k: c for k, c in counts.items() if not any(reason in text[k[0] - 1] for reason in UNREACHABLE)}
        missed = sorted({line for (line, _), count in counted.items() if count == 0})
        taken = sum(count > 0 for count in counted.values())
        result.append(Branches(name, len(counted), taken, tuple((line, text[line - 1].strip()) for line in missed)))
    return result
