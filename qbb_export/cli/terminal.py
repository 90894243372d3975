"""What every verb shares: the terminal, the progress bars, exit codes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from qbb_export.errors import QbbError

EXIT_BAD_INPUT = 2
EXIT_DISAGREES = 1
EXIT_INTERRUPTED = 130

# Of several processes (torchrun, accelerate launch) one speaks.
SPEAKS = os.environ.get("RANK", "0") == "0"

_messages = Console(stderr=True)


class Parser(argparse.ArgumentParser):
    """Tells a usage error in one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting."""
        raise QbbError(message, where=self.prog)


class _Note(ProgressColumn):
    """A few words behind a bar, where there are any."""

    def render(self, task: Task) -> Text:
        """What was last said of the task."""
        return Text(str(task.fields.get("note", "")))


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Bars on stderr, with the time left."""
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        _Note(),
    )
    # No thread for nothing: where nobody watches, bars are printed once, at the end.
    watched = _messages.is_terminal
    with Progress(*columns, console=_messages, auto_refresh=watched, disable=not SPEAKS) as progress:
        yield progress
