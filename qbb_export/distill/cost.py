"""What the stages of a recipe take: bytes from shapes and settings, seconds from short trials. No torch here.

Letters: E elements of all parameters, W weights of the matrices to quantise, L tokens of a sequence, V tokens in the
vocabulary. One process is meant; several share the text and the batches, not the memory. The constants were fitted to
the peaks of small models on a CPU, where the allocator's leftovers count; expect an error of a third.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from qbb_export.distill.settings import DistillSettings, ModelRecipe, SweepSettings
from qbb_export.format import Spec, bits_per_weight
from qbb_export.quantize.rows import GPU_BLOCKS

FLOAT: Final = 4
ID: Final = 8  # bytes of a token's id

# Weights-only stage: its arrays for a block of weights, whatever the matrix.
_BLOCK_WEIGHTS, _BLOCK_BYTES = 1 << 19, 96 << 20
# Bytes for each weight of the largest matrix: indices (int64) and values on the way to the nearest level and back.
_LEVEL_BYTES: Final = 32
# Bytes for each weight of the tallest stack in a sweep: weights, open weights, codes, dense, gaps, int64 indices.
_SWEEP_BYTES: Final = 40
# Floats for each entry of H: itself, damped, reordered; in float64 reversed, factor, its mirror and its inverse.
_HESSIAN_FLOATS: Final = 12
# Floats for each logit of a micro-batch: both models', their log-softmax, the terms of KL, gradients of all these.
_LOGIT_FLOATS: Final = 9
_COMPARED_FLOATS: Final = 7  # the same where there is no gradient
# Floats kept for the backward pass, over in- and outputs of the quantised layers: also norms, rotations, residuals.
_KEPT_FLOATS: Final = 2.5
# Floats at once in a forward pass without one, over in- and output of the largest layer.
_PASSING_FLOATS: Final = 4
_SAMPLED_FLOATS: Final = 5  # for each logit while a token is drawn
_SWEPT_TOKENS: Final = 1 << 14  # at once, as in ``sweeps``
_FILTERED: Final = 8  # sequences at once, as in ``run``
_VALIDATIONS: Final = 20  # of a phase, as in ``train``


@dataclass(frozen=True)
class Matrix:
    """One matrix to quantise.

    Args:
        spec: shape, bases and groups.
        offset: whether its groups have one.
        block: a name for the block that it belongs to.
        reads: a name for its input; layers with the same one share H.
    """

    spec: Spec
    offset: bool
    block: str
    reads: str

    @property
    def weights(self) -> int:
        """N · K."""
        return self.spec.N * self.spec.K

    @property
    def packed(self) -> int:
        """Bytes as it is stored, with float16 scales."""
        return round(bits_per_weight(self.spec, scale_bits=16, offset=self.offset) * self.weights / 8)

    @property
    def scales(self) -> int:
        """Numbers that are no codes: scales and offsets."""
        return self.spec.N * self.spec.groups * (self.spec.bases + self.offset)


@dataclass(frozen=True)
class ModelFacts:
    """What the formulas want to know of a model.

    Args:
        elements: E.
        own_bytes: of the parameters in their own types.
        vocabulary: V.
        decoder: it writes text and has logits.
        length: L; of an encoder the longest input that is made up.
        rows_at_once: sequences of so many tokens whose logits may be there at once.
        written_at_once: sequences in a batch of the writing.
        cached: floats that the keys and values of one token take in all layers.
        layers: blocks.
        cuda: it runs on a GPU.
    """

    elements: int
    own_bytes: int
    vocabulary: int
    decoder: bool
    length: int
    rows_at_once: int
    written_at_once: int
    cached: int
    layers: int
    cuda: bool

    @property
    def teacher(self) -> int:
        """Bytes of the float model where it runs: float32 on a CPU, its own types on a GPU."""
        return self.own_bytes if self.cuda else FLOAT * self.elements


@dataclass(frozen=True)
class Speeds:
    """Seconds for one of each; NaN where it could not be tried.

    Args:
        start: weight quantised by itself.
        forward: token of a micro-batch through the model and the loss.
        write: token of all sequences of a batch written.
        bases: weight made from its bases, with the gradients on the way back.
        column: weight in a sweep, matrix products left aside.
        product: multiply-add of a matrix product in float32.
    """

    start: float = math.nan
    forward: float = math.nan
    write: float = math.nan
    bases: float = math.nan
    column: float = math.nan
    product: float = math.nan


@dataclass(frozen=True)
class Need:
    """What one stage takes.

    Args:
        stage: its name.
        working: bytes where the model runs, the float model included.
        host: on the host, beside that; on a CPU the two add up.
        disk: bytes written to the record.
        removed: of these, gone when the run is over.
        seconds: about; NaN where nothing could be tried.
    """

    stage: str
    working: int
    host: int
    disk: int
    removed: int
    seconds: float


def needs(facts: ModelFacts, matrices: Sequence[Matrix], recipe: ModelRecipe, speeds: Speeds) -> list[Need]:
    """All stages of a recipe, in order."""
    found = [start_need(matrices, speeds.start, facts.teacher, cuda=facts.cuda)]
    if recipe.sweep is not None or recipe.distill:
        found.append(_text_need(facts, recipe, speeds))
    if recipe.sweep is not None:
        found.append(_sweep_need(facts, matrices, recipe, recipe.sweep, speeds))
    for number, settings in enumerate(recipe.distill, 1):
        found.append(_distill_need(facts, matrices, recipe, settings, number, speeds))
    packed = sum(m.packed for m in matrices)
    last = found[-1]  # the finished layers
    return [*found[:-1], Need(last.stage, last.working, last.host, last.disk + packed, last.removed, last.seconds)]


def start_need(matrices: Sequence[Matrix], seconds: float, model: int, *, cuda: bool) -> Need:
    """Each matrix by itself: a float32 copy and the arrays of one block of weights; all results stay on the host.

    Args:
        matrices: all of them.
        seconds: for one weight.
        model: bytes of the model.
        cuda: on a GPU, which takes larger blocks.
    """
    largest = max(m.weights for m in matrices)
    blocks = GPU_BLOCKS if cuda else 1
    arrays = _BLOCK_BYTES * blocks * min(1.0, largest / (_BLOCK_WEIGHTS * blocks))
    packed = sum(m.packed for m in matrices)
    working = model + FLOAT * largest + round(arrays)
    return Need("quantise weights", working, packed, packed, 0, seconds * sum(m.weights for m in matrices))


def _text_need(facts: ModelFacts, recipe: ModelRecipe, speeds: Speeds) -> Need:
    """Decoder: keys and values of a batch in 16 bits on a GPU, else 32, and room for the copy that grows (of a layer;
    a GPU's allocator keeps about as much again), logits of one token each. Encoder: inputs are drawn, nothing runs;
    to find words that go together takes the table of embeddings (part of E) twice, on the host.
    """
    sequences, ids = recipe.text.sequences, ID * recipe.text.sequences * facts.length
    if not facts.decoder:
        drawn = ID * recipe.text.sequences * recipe.text.length
        table = 2 * FLOAT * facts.elements
        return Need("make inputs", facts.teacher, 2 * drawn + table, 0, 0, 1e-7 * drawn + 2e-4 * facts.vocabulary)
    batch, batches = facts.written_at_once, -(-sequences // facts.written_at_once)
    room = 2.0 if facts.cuda else 1.0 + 1.0 / facts.layers
    cache = round(room * batch * facts.length * facts.cached * (2 if facts.cuda else FLOAT))
    logits = _SAMPLED_FLOATS * FLOAT * batch * facts.vocabulary
    seconds = speeds.write * facts.length * batches
    return Need("write text", facts.teacher + cache + logits, 3 * ids, ids, 0, seconds)


def _sweep_need(
    facts: ModelFacts, matrices: Sequence[Matrix], recipe: ModelRecipe, settings: SweepSettings, speeds: Speeds
) -> Need:
    """A float32 copy of the model, activations of one layer, H of a block's inputs and the tallest stack at work.

    Seconds: a pass up to each block over all its text; K² products a token for each H; per weight of a stack, the steps
    along the columns as tried, and 7.5 + 6 · rounds times K multiply-adds; 2 K³ to factorise H.
    """
    tokens = settings.sequences * (facts.length if facts.decoder else recipe.text.length)
    inputs: dict[str, dict[str, int]] = {}
    stacks: dict[tuple[str, str], int] = {}
    for matrix in matrices:
        inputs.setdefault(matrix.block, {})[matrix.reads] = matrix.spec.K
        stack = (matrix.block, matrix.reads)
        stacks[stack] = stacks.get(stack, 0) + matrix.weights
    hessians = max(sum(K * K for K in block.values()) for block in inputs.values())
    largest = max(m.spec.K for m in matrices)
    passing = min(tokens, _SWEPT_TOKENS) * max(m.spec.N + m.spec.K for m in matrices)
    working = (
        facts.teacher
        + FLOAT * facts.elements
        + FLOAT * (hessians + _HESSIAN_FLOATS * largest**2 + _PASSING_FLOATS * passing)
        + _SWEEP_BYTES * max(stacks.values())
    )
    products = sum(K * K * tokens + 2 * K**3 for block in inputs.values() for K in block.values())
    passes = 7.5 + 6 * settings.rounds
    products += sum(round(passes * m.spec.K) * m.weights for m in matrices)
    seconds = len(inputs) * tokens * speeds.forward / 2 + products * speeds.product
    seconds += speeds.column * sum(m.weights for m in matrices)
    packed = sum(m.packed for m in matrices)
    return Need("sweep layers", working, packed, packed, 0, seconds)


def _distill_need(
    facts: ModelFacts,
    matrices: Sequence[Matrix],
    recipe: ModelRecipe,
    settings: DistillSettings,
    number: int,
    speeds: Speeds,
) -> Need:
    """Student, optimizer, and one micro-batch on its way forth and back.

    * student: E floats, a code byte or its float latent for each weight
    * trained numbers P (scales and offsets, with ``codes`` W latents too): gradient, two moments of Adam, best copy
    * kept for the way back: each weight as a float and its code; ``_KEPT_FLOATS`` for each in- and output of a layer
      and token; with a GPU's 16-bit products a copy of all weights in 16 bits
    * logits of the micro-batch; validation takes more sequences at once, without gradients
    * the state is saved every minute: 4 P floats, on the host once as they are and twice as bytes of a file

    Seconds: a step is four forward passes (one of the float model, one of the copy, two for its way back) and each
    weight made from its bases for each micro-batch; each validation is two passes over its text.
    """
    weights = sum(m.weights for m in matrices)
    trained = sum(m.scales for m in matrices) + (weights if settings.codes else 0)
    length = facts.length
    rows = settings.batch if facts.decoder else settings.batch * recipe.text.length // length
    micro = min(rows, facts.rows_at_once)
    student = FLOAT * facts.elements + (0 if settings.codes else weights) + FLOAT * sum(m.scales for m in matrices)
    dense = (FLOAT + 1 + (2 if facts.cuda else 0)) * weights + _LEVEL_BYTES * max(m.weights for m in matrices)
    kept = round(FLOAT * _KEPT_FLOATS * micro * length * sum(m.spec.N + m.spec.K for m in matrices))
    filtered = recipe.text.keep < 1 and facts.decoder
    compared = max(min(recipe.text.validation, facts.rows_at_once), _FILTERED if filtered else 0)
    numbers = max(_LOGIT_FLOATS * micro, _COMPARED_FLOATS * compared) * length * facts.vocabulary
    logits = FLOAT * numbers if facts.decoder else 0
    state = 4 * FLOAT * trained
    step = 4 * rows * length * speeds.forward + -(-rows // micro) * weights * speeds.bases
    seconds = settings.steps * step
    tokens_a_sequence = length if facts.decoder else recipe.text.length
    validations = 1 + -(-settings.steps // max(1, settings.steps // _VALIDATIONS))
    seconds += validations * 2 * recipe.text.validation * tokens_a_sequence * speeds.forward
    if filtered:
        seconds += 2 * recipe.text.sequences * length * speeds.forward
    return Need(
        f"distil ({number})",
        facts.teacher + student + state + dense + kept + logits,
        (3 if facts.cuda else 2) * state + ID * recipe.text.sequences * recipe.text.length,
        2 * state,  # the old file goes when the new one is whole
        2 * state,
        seconds,
    )
