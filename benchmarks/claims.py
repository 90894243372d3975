"""What is promised of our CPU kernels, computed from the rows that cpu.py measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.table import Table

from results import Row, unique

Pick = Callable[[Row], bool]


def ours(mode: str, bases: int) -> Pick:
    return lambda row: row.kind.kernel == "qbb" and (row.kind.mode, row.kind.width) == (mode, bases)


def nbits(bits: int, level: int | None = None, block: int | None = None) -> Pick:
    """MatMulNBits, look-up excepted where a level is named."""
    return lambda row: (
        (row.kind.kernel, row.kind.width) == ("MatMulNBits", bits)
        and (level is None or (row.kind.accuracy_level == level and row.kind.mode != "lut"))
        and block in (None, row.kind.block_size)
    )


def fp32(row: Row) -> bool:
    return row.kind.kernel == "fp32"


def bases(n: int) -> str:
    return f"{n} base{'s' if n > 1 else ''}"


@dataclass(frozen=True)
class Claim:
    """A figure with a limit.

    Attributes:
        batch: the rows of X that it is about, as the table says it.
        limit: what is promised.
        at_most: the figure has to be at most the limit, else at least.
        figure: from the rows of one shape and number of threads; None where rows are missing.
    """

    text: str
    batch: str
    limit: float
    at_most: bool
    figure: Callable[[Sequence[Row]], float | None]

    def cell(self, rows: Sequence[Row]) -> str:
        value = self.figure(rows)
        if value is None:
            return ""
        kept = value <= self.limit if self.at_most else value >= self.limit
        return f"{'' if kept else '! '}{value:.2f}"


def ratio(text: str, batch: int, over: Pick, under: Pick, limit: float, *, at_most: bool) -> Claim:
    """Time of the best of ``over`` divided by time of the best of ``under``."""

    def figure(rows: Sequence[Row]) -> float | None:
        above, below = ([row.median_ms for row in rows if row.batch == batch and pick(row)] for pick in (over, under))
        return min(above) / min(below) if above and below else None

    return Claim(text, str(batch), limit, at_most, figure)


def bandwidth(n: int) -> Claim:
    """Share of the read bandwidth that int8 reaches at one row of X."""
    pick = ours("int8", n)
    text = f"int8 {bases(n)}: share of the read bandwidth"
    return Claim(text, "1", 0.8, False, lambda rows: next((r.share for r in rows if r.batch == 1 and pick(r)), None))


def few_rows(mode: str, text: str, figure: Callable[[float, int, float, int], float]) -> Claim:
    """The worst of 2 to 16 rows of X and all numbers of bases.

    Args:
        figure: of the time at one row or at the next smaller batch, that batch, the time here and this batch.
    """

    def figures(rows: Sequence[Row]) -> Iterator[float]:
        times = {(row.kind.width, row.batch): row.median_ms for row in rows if ours(mode, row.kind.width)(row)}
        for (width, batch), ms in times.items():
            smaller = sorted(b for w, b in times if w == width and b < batch <= 16)
            yield from (figure(times[width, b], b, ms, batch) for b in {*smaller[:1], *smaller[-1:]})

    return Claim(f"{mode}: {text}, worst", "2..16", 1, True, lambda rows: max(figures(rows), default=None))


def never_slower(mode: str) -> Claim:
    """M rows at once against M single calls."""
    return few_rows(
        mode, "M rows / M single calls", lambda less, few, ms, batch: ms / (batch * less) if few == 1 else 0.0
    )


def monotone(mode: str) -> Claim:
    """More rows never take less time, so that there is no number of rows that one had better fill up."""
    return few_rows(mode, "fewer rows / more rows", lambda less, few, ms, batch: less / ms)


def claims(modes: Sequence[str]) -> list[Claim]:
    int8, exact = (lambda n: ours("int8", n)), (lambda n: ours("exact", n))
    four = "MatMulNBits 4-bit"
    return [
        *(
            ratio(f"int8 {bases(n)} / {four} L4 b128", 1, int8(n), nbits(4, 4, 128), n / 4, at_most=True)
            for n in range(1, 5)
        ),
        ratio("MatMulNBits 2-bit, best / int8 2 bases", 1, nbits(2), int8(2), 1.3, at_most=False),
        *(bandwidth(n) for n in range(1, 5)),
        ratio("fp32 / exact 3 bases", 1, fp32, exact(3), 4, at_most=False),
        ratio(f"{four} L0 / exact 3 bases", 1, nbits(4, 0), exact(3), 1.5, at_most=False),
        ratio("MatMulNBits 2-bit L0 / exact 2 bases", 1, nbits(2, 0), exact(2), 100, at_most=False),
        ratio(f"int8 3 bases / {four} L4", 128, int8(3), nbits(4, 4), 1.3, at_most=True),
        *(ratio(f"exact {bases(n)} / fp32", 128, exact(n), fp32, 1.15, at_most=True) for n in range(1, 5)),
        *(never_slower(mode) for mode in modes),
        *(monotone(mode) for mode in modes),
    ]


def table(rows: Sequence[Row]) -> Table:
    """A line for each claim that the rows say something about, a column for each shape and number of threads."""
    cases = unique((row.shape, row.threads) for row in rows)
    result = Table(title="ratios of medians, of the best setting where several are; ! misses what is wanted")
    result.add_column("ratio")
    for column in ("M", "wanted"):
        result.add_column(column, justify="right", no_wrap=True)
    for shape, threads in cases:
        result.add_column(f"{shape}\n{threads} thread{'s' if threads > 1 else ''}", justify="right", no_wrap=True)
    for claim in claims(unique(row.kind.mode for row in rows if row.kind.kernel == "qbb")):
        cells = [claim.cell([row for row in rows if (row.shape, row.threads) == case]) for case in cases]
        if any(cells):
            result.add_row(claim.text, claim.batch, f"{'<=' if claim.at_most else '>='} {claim.limit:g}", *cells)
    return result
