"""Memory that does not suffice: one line and exit code 2, at whatever moment it ends (R7)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from qbb_export.runtimes.gate import check
from tests.faults.forked import WARM, WARM_TORCH, Commands, files
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

    def __init__(self, commands: Commands, command: list[object], output: Path) -> None:
        self._commands, self._command, self._output = commands, command, output
        output.mkdir()
        whole = commands.run(*command, before=f"globals()['began'] = 0; {BEGAN}", after=PEAK)
        assert whole.code == 0, whole.errors
        self.took = int(whole.errors.split("took:")[1])  # much of it reserved, not needed

    def suffices(self, extra: int) -> bool:
        """Whether it is done with so many bytes; if not, it says so in one line and leaves nothing or all."""
        shutil.rmtree(self._output)
        self._output.mkdir()
        ended = self._commands.run(*self._command, before=LIMIT.format(extra=extra))
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
        print(f"{refused} of {LEVELS} levels below {high / 1e6:.0f} MB: one line each; the others were enough")
        assert refused >= LEVELS - 3  # the least that suffices is not always the same


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chain(tmp_path_factory.mktemp("big") / "in.onnx", 3, 1024)


@pytest.fixture
def commands(tmp_path: Path, big: Path) -> Iterator[Commands]:
    late = [
        "qbb-export",
        str(chain(tmp_path / "in.onnx", 3, 64)),
        "-o",
        str(tmp_path / "m.onnx"),
        "--recipe",
        "greedy",
        "--no-verify",
    ]
    with Commands(tmp_path, f"{WARM}\nrun({late})") as all_imported:
        yield all_imported


def command_for(model: Path, output: Path, *more: object) -> list[object]:
    return ["qbb-export", model, "-o", output / "m.onnx", "--bases", "2", *more]


def test_too_little_memory(commands: Commands, big: Path, tmp_path: Path) -> None:
    starved = Starved(commands, command_for(big, tmp_path / "out", "--recipe", "greedy"), tmp_path / "out")
    refused = [extra for extra in (0, 1 << 20, 8 << 20, 20 << 20) if not starved.suffices(extra)]
    assert len(refused) >= 3


@pytest.mark.soak
@pytest.mark.parametrize("recipe", ["greedy", "fast"])
def test_an_export_at_twenty_levels(commands: Commands, big: Path, tmp_path: Path, recipe: str) -> None:
    Starved(commands, command_for(big, tmp_path / "out", "--recipe", recipe), tmp_path / "out").twenty_levels()


@pytest.mark.soak
@pytest.mark.parametrize("recipe", ["fast", "best"])
def test_a_language_model_at_twenty_levels(tmp_path: Path, recipe: str) -> None:
    pytest.importorskip("torch")
    from tests.unit.models import byte_tokenizer, tiny_llama

    model = tiny_llama(tmp_path / "model", vocab_size=280, hidden_size=256, intermediate_size=512)
    byte_tokenizer(model)
    late = [str(word) for word in command_for(model, tmp_path, "--recipe", recipe, "--no-verify")]
    with Commands(tmp_path, f"{WARM_TORCH}\n{LLAMA}\nrun({late})") as commands:
        Starved(commands, command_for(model, tmp_path / "out", "--recipe", recipe), tmp_path / "out").twenty_levels()
