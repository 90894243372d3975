"""Open a file in a child process first: what would take the process down there is a refusal here.

The gate and ONNX Runtime are long tested against damaged files, but both parse in C++. A child costs a second or two.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from qbb_export.errors import QbbError

# Named in SECURITY.md. Large models open in seconds, because weights are mapped.
SECONDS: Final = 120.0
# Of memory of its own (mapped weights are not counted): so much, and so many times the bytes of the files.
MEMORY: Final = 4 << 30
MEMORY_TIMES: Final = 4


def probe(
    path: Path, *, device: str = "cpu", library: bool = True, mode: str | None = None, seconds: float = SECONDS
) -> None:
    """Check a file and open it in ONNX Runtime, in a child process that is thrown away.

    Args:
        path, device, library, mode: as for :func:`qbb_export.runtimes.ort.session`.
        seconds: the child is killed after so long.

    Raises:
        QbbError: what the child says of the file, or that it was killed by a signal (one of its own, or the system's
            for memory), did not end in time, or ended without a word.
    """
    how = {"path": str(path), "device": device, "library": library, "mode": mode}
    command = [sys.executable, "-m", "qbb_export.runtimes.probe", json.dumps(how)]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise QbbError(
            "probe did not end", where=path, expected=f"an open file within {seconds:g} s", got="still opening it"
        ) from None
    last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    if done.returncode < 0:
        with suppress(ValueError):
            name = signal.Signals(-done.returncode).name
            raise QbbError("opening the file crashes", where=path, expected="no signal", got=f"{name} {last}".strip())
    if done.returncode == 0 and done.stdout == b"opened":
        return
    if done.returncode == 2 and done.stdout:
        raise QbbError(done.stdout.decode(errors="replace"))
    raise QbbError("probe failed", where=path, expected="exit code 0 or 2", got=f"{done.returncode} {last}".strip())


def _limit_memory(size: int) -> None:
    """No more memory than a sane file takes, and no core file."""
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit, hard = MEMORY + MEMORY_TIMES * size, resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def main(how: dict[str, Any]) -> int:
    """The child: says ``opened`` or the error, and nothing else, on the standard output; returns the exit code."""
    from qbb_export.artifact import external_tensors, read_graph
    from qbb_export.runtimes import ort

    path = Path(how["path"])
    out, code = b"opened", 0
    try:
        if how["device"] == "cpu":  # CUDA reserves far more than it uses
            _limit_memory(path.stat().st_size if path.is_file() else 0)
            files = {Path(tensor.path) for tensor in external_tensors(read_graph(path))}
            _limit_memory(sum(file.stat().st_size for file in (path, *files)))
        # The digests are left to the parent: they read every weight, and nothing that they find can crash.
        device, library, mode = how["device"], how["library"], how["mode"]
        ort.session(path, device=device, library=library, mode=mode, threads=1, check_data=False)
    except QbbError as error:
        out, code = str(error).encode(errors="replace"), 2
    except MemoryError:
        out, code = f"{path}: not enough memory to open the file".encode(errors="replace"), 2
    os.write(1, out)
    return code


if __name__ == "__main__":
    os._exit(main(json.loads(sys.argv[1])))  # no destructors: what they do is not the file's doing
