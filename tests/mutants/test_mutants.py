"""R18: without any one check of the validators, some test fails. `make soak` runs it; a table comes out."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from tests.mutants import mutate

REPO = Path(__file__).resolve().parents[2]
UNIT = "tests/unit/test_"
PATIENCE_S = 300  # some ten times what the tests of a module take
# Validators, and the tests that have to notice, the quickest first.
MODULES = {
    "qbb_export.format": [f"{UNIT}format.py"],
    "qbb_export.record": [f"{UNIT}record_edges.py", f"{UNIT}record.py"],
    "qbb_export.artifact": [f"{UNIT}artifact.py", "tests/corrupt/test_paths.py", "tests/corrupt/test_kinds.py"],
    "qbb_export.runtimes.gate": [f"{UNIT}artifact.py", "tests/corrupt/test_kinds.py"],
    "qbb_export.passes.verify": [f"{UNIT}artifact.py", "tests/corrupt/test_kinds.py"],
}


def source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_text()


def run(module: str, number: int | None) -> tuple[int, str]:
    """The exit code of the module's tests without one of its checks, and the first test that failed."""
    environment = dict(os.environ) | ({} if number is None else {"QBB_MUTANT": f"{module}:{number}"})
    options = ["-p", "tests.mutants.mutate", "-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *MODULES[module]]
    try:
        done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        assert number is not None, "the tests of the validators take too long"
        return 1, "a test that does not end"  # a check against what never ends
    failed = re.search(r"^FAILED \S+::(\S+)", done.stdout, re.MULTILINE)
    return done.returncode, failed.group(1) if failed else done.stdout[-300:]


def test_a_check_is_really_removed() -> None:
    text = "def f(x):\n    if x < 0 or x > 9:\n        raise ValueError\n    _check_more(x)\n    return x\n"
    found = mutate.mutants(text)
    assert [m.text for m in found] == ["_check_more(x)", "if x < 0 or x > 9", "… or x < 0", "… or x > 9"]
    for number, accepted in enumerate([(), (-1, 10), (-1,), (10,)]):
        called: list[int] = []
        names: dict[str, object] = {"_check_more": called.append}
        exec(compile(mutate.without(text, number), "f", "exec"), names)
        for x in (-1, 5, 10):
            try:
                names["f"](x)  # type: ignore[operator]
            except ValueError:
                assert x != 5 and x not in accepted
            else:
                assert x == 5 or x in accepted
        assert bool(called) == (number > 0)


def test_there_are_enough_checks() -> None:
    assert sum(len(mutate.mutants(source(module))) for module in MODULES) >= 25


@pytest.mark.soak
@pytest.mark.parametrize("module", MODULES)
def test_every_check_is_missed_by_a_test(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(module, None)
    assert code == 0, f"the tests fail with all checks in place: {text}"
    table, survivors = Table("line", "removed", "noticed by", title=module), []
    found = mutate.mutants(source(module))
    for number, mutant in enumerate(found):
        code, test = run(module, number)
        if code != 1:  # 0: nobody noticed. Others: pytest itself failed, which proves nothing
            survivors.append((mutant, code, test))
        table.add_row(str(mutant.line), mutant.text, test if code == 1 else f"NOBODY (exit code {code})")
        with capsys.disabled():
            print(f"\r{module}: {number + 1} of {len(found)}", end="", file=sys.stderr, flush=True)
    with capsys.disabled():
        print()
        Console(width=150).print(table)
    assert not survivors
