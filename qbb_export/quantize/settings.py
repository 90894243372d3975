"""What a user may choose about the quantization of one layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from qbb_export.errors import QbbError
from qbb_export.format import MAX_BASES, effective_group_size

# An offset shifts all levels of a group. The fewer levels, the more that helps: on a language and an embedding model
# (docs/results.md) it pays for its 32 bits at 2 and 3 bases, and hardly at 4.
OFFSET_UP_TO = 3

SCALE_DTYPES = ("auto", "float16", "float32")


@dataclass(frozen=True)
class QuantizeSettings:
    """Settings of one layer. They hold plain values only, so that they can be compared, hashed and written as JSON.

    Args:
        bases: binary matrices, 1..8; a weight then takes one of ``2**bases`` levels and costs about ``bases`` bits.
        group_size: inputs that share a scale: 0 for the whole row, else a multiple of 32. A group costs
            ``16 * bases`` bits for its scales.
        offset: add a float32 offset to each group, 32 bits a group. None leaves it to the recipe: ``fast`` adds it for
            up to ``OFFSET_UP_TO`` bases.
        rounds: at most so many rounds of alternating minimisation from the best start, 0..1000.
        shakes: attempts to leave the local minimum that was reached, 0..1000; each costs a few rounds.
        scale_dtype: ``"float16"``, ``"float32"``, or ``"auto"``: float16, unless the largest weight of the layer is so
            large or so small that float16 scales would overflow or lose their precision.

    Raises:
        QbbError: for a value out of range.
    """

    bases: int = 4
    group_size: int = 128
    offset: bool | None = None
    rounds: int = 20
    shakes: int = 8
    scale_dtype: str = "auto"

    def __post_init__(self) -> None:
        if not 1 <= self.bases <= MAX_BASES:
            raise QbbError("bad number of bases", where="--bases", expected=f"1..{MAX_BASES}", got=self.bases)
        effective_group_size(1, self.group_size)  # refuses what is neither 0 nor a multiple of 32
        for name, value in (("--rounds", self.rounds), ("--shakes", self.shakes)):
            if not 0 <= value <= 1000:
                raise QbbError("out of range", where=name, expected="0..1000", got=value)
        if self.scale_dtype not in SCALE_DTYPES:
            raise QbbError(
                "unknown type",
                where="--scale-dtype",
                expected=f"one of {', '.join(SCALE_DTYPES)}",
                got=self.scale_dtype,
            )

    def as_dict(self) -> dict[str, int | bool | str | None]:
        """Plain values by field name, for JSON."""
        return asdict(self)
