"""``qbb report``: one page that shows what a record holds, and the numbers behind it as JSON."""

from __future__ import annotations

from pathlib import Path

from qbb_export.errors import QbbError
from qbb_export.files import write_whole
from qbb_export.report.charts import require_matplotlib
from qbb_export.report.collect import ReportData, collect
from qbb_export.report.page import render

__all__ = ["ReportData", "collect", "render", "write_report"]


def write_report(record: Path, output: Path, *, force: bool = False) -> tuple[Path, Path]:
    """Write ``output`` and the JSON beside it (the same name with ``.json``).

    The page needs no other file and no network. The same record gives the same bytes.

    Args:
        record: ``MODEL.qbb``; it is only read, without its lock.
        output: ends in ``.html``.
        force: replace existing files.

    Returns:
        The paths of the page and of the JSON.

    Raises:
        QbbError: matplotlib is missing, the record is none or is damaged, or the output cannot be written.
    """
    if output.suffix.lower() not in (".html", ".htm"):
        raise QbbError("bad name for a page", where=output, expected="a name that ends in .html")
    numbers = output.with_suffix(".json")
    for path in (output, numbers):
        if path.exists() and not force:
            raise QbbError("file exists (use --force to replace it)", where=path)
    require_matplotlib()
    data = collect(record)
    text = render(data)
    try:
        write_whole(numbers, data.as_json().encode("ascii"))
        write_whole(output, text.encode("utf-8"))
    except OSError as error:
        raise QbbError("cannot write the report", where=output, got=error) from error
    return output, numbers
