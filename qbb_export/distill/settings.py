"""Recipes that need the whole model, as plain values.

The QBB paper (Bulat et al., NeurIPS 2024) leaves optimizer, rates, schedules and the amount of text open. Every such
number is a field here; they are our choice, found by trial, and no field depends on the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

from qbb_export.errors import QbbError

Loss = Literal["kl", "mse", "ce"]


@dataclass(frozen=True)
class TextSettings:
    """Text that the float model writes for its copy to learn from.

    Args:
        sequences: how many, validation included. An encoder gets made-up inputs of as many tokens in all.
        length: tokens of each; less where the model's context is shorter.
        temperature: of the sampling; 1 is the model's own distribution.
        seed: of everything random.
        validation: sequences that are not learnt from; the best state on them is kept.
        keep: share of the sequences kept for learning, those on which float model and copy differ most (the paper's
            filter); 1 keeps all.
    """

    sequences: int = 32768
    length: int = 512
    temperature: float = 1.0
    seed: int = 0
    validation: int = 128
    keep: float = 1.0


@dataclass(frozen=True)
class SweepSettings:
    """The pass over the columns of each layer with its inputs in view (``quantize.sweep``).

    Args:
        sequences: from which the layers' inputs are taken.
        damping: share of the mean diagonal added to H, GPTQ's 1 %.
        act_order: columns with the largest inputs first.
        rounds: of least squares and coordinate descent afterwards.
        uniform: keep the equal steps of round-to-nearest: this is GPTQ. No rounds then.
    """

    sequences: int = 512
    damping: float = 0.01
    act_order: bool = True
    rounds: int = 4
    uniform: bool = False


@dataclass(frozen=True)
class DistillSettings:
    """Learning from the float model's outputs on its own text.

    Args:
        steps: of the optimizer (Adam).
        batch: sequences a step.
        codes: train the codes too, through one latent weight per matrix; else scales and offsets alone.
        scale_rate: peak learning rate of scales and offsets, relative to the mean distance of a group's neighbouring
            levels at the start. With every basis levels come closer to each other; in this unit codes change equally
            often, and do as much harm relative to what is there.
        code_rate: peak learning rate of the latent weights, in the same unit.
        betas: of Adam.
        warmup: share of the steps during which the rates rise; they fall along a cosine afterwards.
        loss: ``"kl"`` to the float model's probabilities (the paper's KD: same gradient), ``"mse"`` of the logits (its
            KD-MSE), or ``"ce"`` on the written tokens. Encoders always use the distance of embeddings.
        features: weight of the mean squared error of the blocks' outputs, relative to their variance.
        swap: share of the steps during which float blocks stand in for quantised ones; they go one after the other,
            from the first block on (the paper's gradual swap). Only without ``codes``.
        clip: largest norm of the gradient.
    """

    steps: int = 4000
    batch: int = 32
    codes: bool = True
    scale_rate: float = 1e-3
    code_rate: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.95)
    warmup: float = 0.05
    loss: Loss = "kl"
    features: float = 0.0
    swap: float = 0.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise QbbError("out of range", where="--steps", expected=">= 1", got=self.steps)
        if self.codes and self.swap:
            raise QbbError("blocks can be swapped only while codes are fixed", where="DistillSettings.swap")


@dataclass(frozen=True)
class ModelRecipe:
    """A way through the stages: a start from the weights alone, then what the model's own text adds.

    Args:
        start: recipe in ``quantize.RECIPES`` for each matrix alone.
        offset_up_to: layers without a setting of their own get an offset on up to this many bases. A trained scale
            makes up for most of it from 3 bases on, so it is not worth its 32 bits a group there.
        text: what the model writes.
        sweep: None leaves it out.
        distill: phases, one after the other.
    """

    start: str = "fast"
    offset_up_to: int = 2
    text: TextSettings = field(default_factory=TextSettings)
    sweep: SweepSettings | None = None
    distill: tuple[DistillSettings, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and keys."""
        return asdict(self)

    def reduced(self) -> ModelRecipe:
        """A budget for CPUs: about a hundredth of it, 82 thousand tokens of text and half a million tokens learnt."""
        text = replace(self.text, sequences=min(self.text.sequences, 320), length=256, validation=32)
        sweep = None if self.sweep is None else replace(self.sweep, sequences=64)
        # Noise of n steps adds up like the square root of n, so a sixteenth of the steps can go four times as far each;
        # at the full rate most latents would not even leave their cells.
        phases = (
            replace(d, steps=max(1, d.steps // 16), batch=min(8, d.batch), code_rate=d.code_rate * 4)
            for d in self.distill
        )
        return replace(self, text=text, sweep=sweep, distill=tuple(phases))

    def with_steps(self, steps: int) -> ModelRecipe:
        """As many steps in all, shared out over the phases as before; 0 leaves the distillation out."""
        total = sum(d.steps for d in self.distill)
        phases = (replace(d, steps=max(1, round(d.steps * steps / total))) for d in self.distill if steps)
        return replace(self, distill=tuple(phases))


_SCALES_ONLY: Final = DistillSettings(steps=250, codes=False)

MODEL_RECIPES: Final[Mapping[str, ModelRecipe]] = MappingProxyType(
    {
        # The default.
        "best": ModelRecipe(sweep=SweepSettings(), distill=(_SCALES_ONLY, DistillSettings(steps=3750))),
        # It without the distillation.
        "sweep": ModelRecipe(text=TextSettings(sequences=512), sweep=SweepSettings()),
        # The paper: cascaded start, refinement by straight-through estimation (which `settled` follows to a minimum in
        # all bases at once), then scales alone learn from the text on which they differ most, logits and blocks by
        # squared error, float blocks swapped out gradually.
        "qbb": ModelRecipe(
            start="settled",
            offset_up_to=0,
            text=TextSettings(keep=0.5),
            distill=(DistillSettings(steps=2000, codes=False, loss="mse", features=1.0, swap=0.5),),
        ),
        # For comparison: Frantar et al. 2022 on the steps of round-to-nearest.
        "gptq": ModelRecipe(
            start="rtn",
            offset_up_to=8,
            text=TextSettings(sequences=512),
            sweep=SweepSettings(uniform=True, rounds=0),
        ),
    }
)


def gptq_before(recipe: ModelRecipe) -> ModelRecipe:
    """The run whose result ``--start gptq`` approximates: with the budget of the recipe that follows."""
    return replace(MODEL_RECIPES["gptq"], text=replace(recipe.text, keep=1.0))


@dataclass(frozen=True)
class LearningOptions:
    """What a user may change about a recipe that learns.

    Args:
        budget: ``"full"``, or ``"reduced"`` for CPUs; None: by device.
        steps: of the optimizer, instead of the budget's; 0 leaves the distillation out.
        calibration: a text file to learn from besides what the model writes.
        start: ``"gptq"``, or the folder of a GPTQ or AWQ checkpoint: approximate its weights instead of the model's.
    """

    budget: Literal["full", "reduced"] | None = None
    steps: int | None = None
    calibration: Path | None = None
    start: str | None = None

    def refuse(self, recipe: str) -> None:
        """Raise if anything is set: ``recipe`` does not learn."""
        for name, value in asdict(self).items():
            if value is not None:
                raise QbbError("only for recipes that learn", where=f"--{name} with --recipe {recipe}", got=value)

    def apply(self, name: str, device: str) -> ModelRecipe:
        """The recipe of a name, as it is to be run.

        Raises:
            QbbError: an option does not fit it.
        """
        recipe = MODEL_RECIPES[name]
        if self.budget == "reduced" or (self.budget is None and device == "cpu"):
            recipe = recipe.reduced()
        if self.steps is not None:
            if not recipe.distill:
                raise QbbError("this recipe does not distil", where=f"--steps with --recipe {name}")
            if self.steps < 0:
                raise QbbError("out of range", where="--steps", expected=">= 0", got=self.steps)
            recipe = recipe.with_steps(self.steps)
        if self.start is not None and name == "gptq":
            raise QbbError("gptq starts from the model's own weights", where="--start")
        return recipe
