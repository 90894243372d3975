"""The one exception type that users see: what went wrong, where, what was expected, what was found."""

from __future__ import annotations

import errno
import re

# How PyTorch, ONNX Runtime, protobuf, the C++ library, the dynamic linker and Python's threads say it.
_NO_MEMORY = re.compile(
    r"out of memory|not enough memory|bad[ _]alloc|alloc failed"
    r"|(can't|cannot|failed to|could not) (allocate|map|start new thread)",
    re.IGNORECASE,
)


class QbbError(Exception):
    """A mistake in what was handed to us, told in one line.

    The command line prints it as it is and exits with code 2; nothing is left half-written.

    Args:
        what: the mistake, e.g. ``"weights hold NaN or Inf"``.
        where: file, layer, node or option it was found in.
        expected: what would have been right.
        got: what was found instead.
    """

    def __init__(self, what: str, *, where: object = None, expected: object = None, got: object = None) -> None:
        self.what = what
        self.where = where
        parts = [what if where is None else f"{where}: {what}"]
        if expected is not None:
            parts.append(f"expected {expected}")
        if got is not None:
            parts.append(f"got {got}")
        # A path or a foreign message may hold line breaks; one mistake stays one line.
        line = " ".join("; ".join(parts).split())
        # Nor may a name in a file from a stranger speak to the terminal.
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line))


def is_lack_of_memory(error: BaseException | None) -> bool:
    """Whether an exception, or what caused it, means that the system or a limit gives no more memory."""
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True
        if not isinstance(error, QbbError) and _NO_MEMORY.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
