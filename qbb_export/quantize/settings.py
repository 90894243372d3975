"""What a user may choose about the quantization of one layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

from qbb_export.errors import QbbError
from qbb_export.format import MAX_BASES, effective_group_size

# An offset shifts all levels of a group. The fewer levels, the more that helps: on a language and an embedding model
# (docs/results.md) it pays for its 32 bits at 2 and 3 bases, and hardly at 4.
OFFSET_UP_TO = 3

SCALE_DTYPES = ("auto", "float16", "float32")
INITS: Final = ("cascaded", "independent", "random")
ORDERS: Final = ("sequential", "simultaneous")


@dataclass(frozen=True)
class RefineSettings:
    """Settings of the recipe ``refine``, QBB's iterative refinement (see ``quantize.refine``).

    The paper gives no optimizer, rates or numbers of steps: those are our choice, the best of a small grid on normal
    and Laplace distributed weights with 2 to 4 bases.

    Args:
        init: ``"cascaded"``, the paper's; ``"independent"`` and ``"random"`` are its ablations.
        order: ``"sequential"``, the paper's: one stage for each basis, in which only that basis and all scales train;
            or ``"simultaneous"``, its ablation (Figure 7): one stage with as many steps, in which everything trains.
        steps: steps of Adamax per stage, 0..100000. Our choice: twice as many gain 1 % of the error.
        latent_rate: rate of the latent weights at the start of a stage, 0..1, in units of the group's mean residual;
            it falls linearly to zero. Our choice.
        scale_rate: the same for the scales, in units of the group's mean weight. Our choice.
        betas: decay of Adamax's mean and peak of the gradients, each 0 or more and below 1. Our choice: the usual ones.

    Raises:
        QbbError: for a value out of range.
    """

    init: str = "cascaded"
    order: str = "sequential"
    steps: int = 100
    latent_rate: float = 0.005
    scale_rate: float = 0.02
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        for name, value, known in (("init", self.init, INITS), ("order", self.order, ORDERS)):
            if value not in known:
                raise QbbError(
                    "unknown value", where=f"RefineSettings.{name}", expected=f"one of {', '.join(known)}", got=value
                )
        if not 0 <= self.steps <= 100_000:
            raise QbbError("out of range", where="RefineSettings.steps", expected="0..100000", got=self.steps)
        for name, rate in (("latent_rate", self.latent_rate), ("scale_rate", self.scale_rate)):
            if not 0.0 <= rate <= 1.0:
                raise QbbError("out of range", where=f"RefineSettings.{name}", expected="0..1", got=rate)
        if [0.0 <= beta < 1.0 for beta in self.betas] != [True, True]:
            raise QbbError(
                "out of range",
                where="RefineSettings.betas",
                expected="two numbers, each 0 or more and below 1",
                got=self.betas,
            )


@dataclass(frozen=True)
class QuantizeSettings:
    """Settings of one layer. They hold plain values only, so that they can be compared, hashed and written as JSON.

    Args:
        bases: binary matrices, 1..8; a weight then takes one of ``2**bases`` levels and costs about ``bases`` bits.
        group_size: inputs that share a scale: 0 for the whole row, else a multiple of 32. A group costs
            ``16 * bases`` bits for its scales.
        offset: add a float32 offset to each group, 32 bits a group. None leaves it to the recipe: ``fast`` adds it for
            up to ``OFFSET_UP_TO`` bases, ``rtn`` always, recipes that learn as ``distill.settings`` says.
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
    refine: RefineSettings = RefineSettings()

    def __post_init__(self) -> None:
        if not 1 <= self.bases <= MAX_BASES:
            raise QbbError("bad number of bases", where="--bases", expected=f"1..{MAX_BASES}", got=self.bases)
        effective_group_size(1, self.group_size)  # refuses what is neither 0 nor a multiple of 32
        for name, value in (("rounds", self.rounds), ("shakes", self.shakes)):
            if not 0 <= value <= 1000:
                raise QbbError("out of range", where=f"QuantizeSettings.{name}", expected="0..1000", got=value)
        if self.scale_dtype not in SCALE_DTYPES:
            raise QbbError(
                "unknown type",
                where="QuantizeSettings.scale_dtype",
                expected=f"one of {', '.join(SCALE_DTYPES)}",
                got=self.scale_dtype,
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain values by field name, for JSON; those of ``refine`` in a dictionary of their own."""
        return asdict(self)
