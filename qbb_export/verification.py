"""Open the file that was just written and compare what it computes with the model it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qbb_export.errors import QbbError
from qbb_export.load import InputSpec
from qbb_export.passes.function_body import binary_basis_nodes
from qbb_export.runtimes import ort

Array = npt.NDArray[Any]

# Largest difference allowed, relative to the largest magnitude of the output. Both sides sum in float32 but in another
# order in every layer; a few dozen layers lift the float32 step of 1.2e-7 to 1e-5 or so.
BODY_BOUND = 1e-4
# PyTorch also has other attention and normalisation kernels than ONNX Runtime.
STUDENT_BOUND = 1e-3
# float16 outputs carry 11 bits.
HALF_BOUND = 1e-2
# The function body makes dense copies of a layer; a model with a larger one is spared them.
_BODY_MAX_WEIGHTS = 1 << 26

_BATCH, _SEQUENCE = 2, 24
_TEXT = (
    "The committee met on Tuesday and agreed to plant two hundred trees along the river before the end of the year.",
    "Heat flows from the warmer body to the colder one until both have the same temperature.",
)


@dataclass(frozen=True)
class Comparison:
    """One row of the verification table.

    Attributes:
        what: the two sides.
        output: name of the graph output.
        error: largest difference over the largest magnitude of the reference.
        cosine: of the two outputs as vectors.
        bound: what ``error`` must stay below; None for a row that only informs.
    """

    what: str
    output: str
    error: float
    cosine: float
    bound: float | None

    @property
    def ok(self) -> bool:
        """Within the bound, or without one. NaN is never within."""
        return self.bound is None or self.error <= self.bound


def compare(
    what: str, outputs: Mapping[str, Array], reference: Mapping[str, Array], bound: float | None
) -> list[Comparison]:
    """Compare outputs of the same names, in float64.

    Raises:
        QbbError: names or shapes differ.
    """
    rows = []
    for name, expected in reference.items():
        got = outputs.get(name)
        if got is None or got.shape != expected.shape:
            raise QbbError(
                "outputs differ in shape",
                where=f"{what}, {name}",
                expected=expected.shape,
                got=None if got is None else got.shape,
            )
        if not np.issubdtype(expected.dtype, np.floating):
            continue
        limit = max(bound, HALF_BOUND) if bound is not None and expected.dtype == np.float16 else bound
        a, b = got.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
        peak = float(np.abs(b).max(initial=0.0))
        difference = float(np.abs(a - b).max(initial=0.0))
        norms = float(np.linalg.norm(a) * np.linalg.norm(b))
        error = difference / peak if peak > 0 else difference
        rows.append(Comparison(what, name, error, float(a @ b) / norms if norms > 0 else 1.0, limit))
    return rows


def sample_inputs(inputs: tuple[InputSpec, ...], tokenizer: Path | None, seed: int = 0) -> dict[str, Array]:
    """Something to feed a model with: sentences where there is a tokenizer, random values elsewhere.

    Dynamic dimensions become 2 (the first) and 24 (others).
    """
    rng = np.random.default_rng(seed)
    feeds: dict[str, Array] = {}
    for spec in inputs:
        dims = [d if isinstance(d, int) else (_BATCH if axis == 0 else _SEQUENCE) for axis, d in enumerate(spec.dims)]
        if spec.name.endswith("mask"):
            feeds[spec.name] = np.ones(dims, dtype=spec.dtype)
        elif spec.name == "token_type_ids":
            feeds[spec.name] = np.zeros(dims, dtype=spec.dtype)
        elif spec.dtype.startswith("float"):
            feeds[spec.name] = rng.standard_normal(dims).astype(spec.dtype)
        else:
            feeds[spec.name] = rng.integers(0, spec.high, dims).astype(spec.dtype)
    ids = feeds.get("input_ids")
    if tokenizer is not None and ids is not None:
        from tokenizers import Tokenizer

        encoder = Tokenizer.from_file(str(tokenizer))
        for row, sentence in zip(ids, _TEXT, strict=False):
            tokens = np.asarray(encoder.encode(sentence).ids[: row.size])
            row[: len(tokens)] = tokens
    return feeds


def graph_inputs(model: ir.Model) -> tuple[InputSpec, ...]:
    """Input descriptions of a graph that came as an .onnx file."""
    specs = []
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        if value.shape is None or value.dtype is None:
            raise QbbError("graph input has no type or shape", where=f"input '{value.name}'")
        dims = tuple(d if isinstance(d, int) else str(d) for d in value.shape)
        specs.append(InputSpec(value.name or "", value.dtype.numpy().name, dims))
    return tuple(specs)


def run_file(path: Path, feeds: Mapping[str, Array], *, library: bool) -> dict[str, Array]:
    """Run an exported file in ONNX Runtime, with our library or through the function body."""
    session = ort.session(path, library=library, check_data=library)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def body_is_affordable(model: ir.Model) -> bool:
    """Whether the dense copies that the function body makes of one layer at a time stay small."""
    sizes = [node.attributes.get_int("K", 0) * node.attributes.get_int("N", 0) for node in binary_basis_nodes(model)]
    return max(sizes, default=0) <= _BODY_MAX_WEIGHTS
