"""Memory that does not suffice: one line and exit code 2, at whatever moment it ends (R7)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qbb_export.runtimes.gate import check
from tests.faults.forked import WARM, WARM_TORCH, Commands, Ended, files
from tests.faults.models import chain
from tests.faults.test_disk import LLAMA

LEVELS = 20
# Address space above what the process has when the command begins.
LIMIT = """
import resource
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + {extra},) * 2)
"""
PEAK = """
import re
peak = int(re.search(r"VmPeak:\\s+(\\d+)", open("/proc/self/status").read())[1])
print("took:", 1024 * peak - began, file=sys.stderr)
"""
BEGAN = 'began = 4096 * int(open("/proc/self/statm").read().split()[0])'


class Starved:
    """A command that gets less memory than it takes."""

    def __init__(self, folder: Path, prologue: str, command: list[object], output: Path) -> None:
        self._folder, self._prologue, self._command, self._output = folder, prologue, command, output
        output.mkdir()
        whole = self._run(f"globals()['began'] = 0; {BEGAN}", PEAK)
        assert whole.code == 0, whole.errors
        self.took = int(whole.errors.split("took:")[1])  # much of it reserved, not needed

    def _run(self, before: str, after: str = "") -> Ended:
        # A server of its own: what one has reserved, its next copy finds free.
        with Commands(self._folder, self._prologue) as commands:
            return commands.run(*self._command, before=before, after=after)

    def suffices(self, extra: int) -> bool:
        """Whether it is done with so many bytes; if not, it says so in one line and leaves nothing or all."""
        shutil.rmtree(self._output)
        self._output.mkdir()
        ended = self._run(LIMIT.format(extra=extra))
        if ended.code == 0:
            return True
        assert ended.is_clean_error(), f"{extra} bytes: {ended}"
        assert "out of memory" in ended.errors, ended
        if [name for name in files(self._output) if ".qbb/" not in name]:
            check(self._output / "m.onnx")  # it did not suffice to compare the file, which is whole
        return False

    def twenty_levels(self) -> None:
        """From next to nothing up to nearly enough."""
        low, high = 0, self.took
        for _ in range(6):
            middle = (low + high) // 2
            low, high = (low, middle) if self.suffices(middle) else (middle, high)
        refused = sum(not self.suffices(high * level // LEVELS) for level in range(LEVELS))
        print(f"{refused} of {LEVELS} levels below {high / 1e6:.0f} MB (of {self.took / 1e6:.0f}): one line each")
        assert refused >= LEVELS // 2  # what suffices depends on where the system puts things


def command_for(model: Path, output: Path, *more: object) -> list[object]:
    return ["qbb-export", model, "-o", output / "m.onnx", "--bases", "2", *more]


def starved(tmp_path: Path, *more: object) -> Starved:
    """An export of three matrices of 1024 x 1024 by a process that has imported all it needs."""
    big, small = chain(tmp_path / "big.onnx", 3, 1024), chain(tmp_path / "small.onnx", 3, 64)
    late = [str(word) for word in command_for(small, tmp_path, "--recipe", "greedy", "--no-verify", "--force")]
    return Starved(tmp_path, f"{WARM}\nrun({late})", command_for(big, tmp_path / "out", *more), tmp_path / "out")


def test_too_little_memory(tmp_path: Path) -> None:
    few = starved(tmp_path, "--recipe", "greedy")
    assert sum(not few.suffices(extra) for extra in (0, 8 << 20, 20 << 20)) == 3


@pytest.mark.soak
@pytest.mark.parametrize("recipe", ["greedy", "fast"])
def test_an_export_at_twenty_levels(tmp_path: Path, recipe: str) -> None:
    starved(tmp_path, "--recipe", recipe).twenty_levels()


@pytest.mark.soak
@pytest.mark.parametrize("recipe", ["fast", "best"])
def test_a_language_model_at_twenty_levels(tmp_path: Path, recipe: str) -> None:
    pytest.importorskip("torch")
    from tests.unit.models import byte_tokenizer, tiny_llama

    model = tiny_llama(tmp_path / "model", vocab_size=280, hidden_size=256, intermediate_size=512)
    byte_tokenizer(model)
    late = [str(word) for word in command_for(model, tmp_path, "--recipe", recipe, "--no-verify", "--force")]
    prologue = f"{WARM_TORCH}\n{LLAMA}\nrun({late})"
    Starved(
        tmp_path, prologue, command_for(model, tmp_path / "out", "--recipe", recipe), tmp_path / "out"
    ).twenty_levels()
