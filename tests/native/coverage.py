"""Which decisions of the C++ validators the tests take both ways: Clang's source coverage.

gcov is of no use for this: GCC counts the clean-up of every temporary string as branches.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

VALIDATORS = ("core/spec.cc", "core/matrix.cc", "ort/node.h")
FLAGS = "-fprofile-instr-generate -fcoverage-mapping"
# Lines of which no test can take one way, each with the reason.
UNREACHABLE = {
    "wide > std::numeric_limits<size_t>::max()": "pointers of 32 bits only",
    "if (status != nullptr) {  // a nameless node": "ONNX Runtime never fails to tell a name, and each has its zero",
    "if (status == nullptr && size > 0)": "the same",
    "name.resize(size > 0": "the same",
    "if (count != kInputs)": "ONNX Runtime counts them before, by the schema (test_wrong_number_of_inputs)",
    "if (is_constant == 0 || value == nullptr)": "the second is said together with the first",
}


@dataclass(frozen=True)
class Decisions:
    """One file: ways (two a condition), those taken, lines with one that was not."""

    file: str
    total: int
    taken: int
    missed: tuple[tuple[int, str], ...]


def decisions(library: Path, profiles: list[Path], sources: Path, version: str) -> list[Decisions]:
    """What was counted for a library that was built with FLAGS; ``version``: the suffix of Clang's tools, ``"-14"``."""
    merged = library.with_name("all.profdata")
    subprocess.run([f"llvm-profdata{version}", "merge", "-o", merged, *profiles], check=True)
    command = [f"llvm-cov{version}", "export", f"-instr-profile={merged}", library]
    done = subprocess.run([*command, *(sources / name for name in VALIDATORS)], capture_output=True, check=True)
    result = []
    for file in json.loads(done.stdout)["data"][0]["files"]:
        path = Path(file["filename"])
        text = path.read_text().splitlines()
        ways: dict[tuple[int, int, bool], int] = {}
        for line, column, _, _, true, false, *_ in file["branches"]:
            if not any(reason in text[line - 1] for reason in UNREACHABLE):
                for way, count in ((True, true), (False, false)):  # a template has several copies
                    ways[line, column, way] = ways.get((line, column, way), 0) + count
        missed = sorted({(line, text[line - 1].strip()) for (line, _, _), count in ways.items() if count == 0})
        taken = sum(count > 0 for count in ways.values())
        result.append(Decisions(str(path.relative_to(sources)), len(ways), taken, tuple(missed)))
    return result
