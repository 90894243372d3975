"""What a layer costs: bits, bytes and arithmetic."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from qbb_export.format import bits_per_weight
from qbb_export.record import LayerHead
from qbb_export.studies.study import Study

COST_COLUMNS: Final = (
    "layer",
    "out × in",
    "bits per weight",
    "bytes",
    "float16 bytes",
    "additions",
    "look-ups",
    "multiplications",
    "float multiply-adds",
)


def cost_study(layers: Iterable[LayerHead]) -> Study:
    """Bits, bytes and arithmetic of each layer and of all, for one token, against the float matrix product.

    Args:
        layers: heads as :func:`qbb_export.record.read_layers` gives them.
    """
    rows = [_cost(layer) for layer in layers]
    total = [sum(row[i] for row in rows) for i in range(3, len(COST_COLUMNS))]  # type: ignore[misc]
    bits = 8 * total[0] / total[-1] if rows else 0.0
    return Study(
        "cost",
        "Size and arithmetic of each layer, for one token",
        "table",
        columns=COST_COLUMNS,
        rows=(*rows, ("all", "", bits, *total)),
        note="Bytes count scales, offset and padding. The sums of a layer take either the additions (bases × out × in) "
        "or the look-ups in tables of four inputs (a quarter; filling the tables is not counted); then comes one "
        "multiplication for each scale and offset. The float product takes out × in of both.",
    )


def _cost(layer: LayerHead) -> tuple[str | float | None, ...]:
    """A row of the table of costs."""
    spec, weights = layer.spec, layer.spec.N * layer.spec.K
    bits = bits_per_weight(spec, scale_bits=layer.scale_bits, offset=layer.offset)
    look_ups = spec.bases * spec.N * -(-spec.K // 4)
    multiplications = (spec.bases + layer.offset) * spec.N * spec.groups
    size = round(bits * weights / 8)
    shape = f"{spec.N} × {spec.K}"
    return (layer.name, shape, bits, size, 2 * weights, spec.bases * weights, look_ups, multiplications, weights)
