"""Commands of ours in processes that may be killed, starved or lied to by the system."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

LIMIT_S = 120
SERVER = Path(__file__).with_name("server.py")
# What an export of an .onnx file imports, and what a model of PyTorch wants.
WARM = "import numpy, onnx, onnx_ir, safetensors.numpy; from qbb_export import cli, pipeline, plan"
WARM_TORCH = WARM + "\nimport torch, transformers; torch.set_num_threads(1); from qbb_export import learning, capture"


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code or minus the signal, and what it said on stderr."""

    code: int
    errors: str

    def is_clean_error(self) -> bool:
        """Exit code 2 and one line, after whatever bars of progress there were."""
        lines = self.errors.splitlines()
        told = [line for line in lines if line.startswith("error: ")]
        return self.code == 2 and len(told) == 1 and lines[-1] == told[0] and "Traceback" not in self.errors


class Commands:
    """A server of commands; see server.py."""

    def __init__(self, folder: Path, prologue: str = WARM, **environment: str) -> None:
        """Args: a folder for stderr; Python that warms up; more of the environment."""
        self._errors = folder / "stderr"
        both = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self._process = subprocess.Popen(
            [sys.executable, str(SERVER), prologue], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=both
        )
        self._child = 0

    def start(self, *arguments: object, before: str = "", after: str = "") -> None:
        """``qbb-export …`` or ``qbb …``."""
        words = [str(a) for a in arguments]
        self._child = 0
        request = {"arguments": words, "errors": str(self._errors), "before": before, "after": after}
        self._child = self._ask(json.dumps(request))

    def end(self) -> Ended:
        """Wait for it."""
        status = self._ask("")
        return Ended(os.waitstatus_to_exitcode(status), self._errors.read_text(errors="replace"))

    def kill(self) -> bool:
        """With signal 9; False if it had ended before."""
        os.kill(self._child, signal.SIGKILL)
        return self.end().code == -signal.SIGKILL

    def run(self, *arguments: object, before: str = "", after: str = "") -> Ended:
        """From start to end."""
        self.start(*arguments, before=before, after=after)
        return self.end()

    def __enter__(self) -> Commands:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate(timeout=LIMIT_S)

    def _ask(self, line: str) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], LIMIT_S)[0]:
            if self._child:
                os.kill(self._child, signal.SIGKILL)
            self._process.kill()
            raise AssertionError(f"no end after {LIMIT_S} s: {self._errors.read_text(errors='replace')}")
        answer = self._process.stdout.readline()
        assert answer, "the server of commands has ended; its traceback is above"
        return int(answer)


def files(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def differing(found: dict[str, bytes], wanted: dict[str, bytes]) -> list[str]:
    """Names of the files that only one of them has, or that differ."""
    return sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
