"""Bring a foreign graph into the shape that the other passes expect; what it computes stays the same."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from qbb_export.format import DOMAIN

# Smaller constants are shapes and axes; weights worth replacing are larger.
_LIFT_AT_LEAST = 16


def prepare_passes() -> ir.passes.Sequential:
    """Inline local functions but ours, and lift weights held by Constant nodes to initializers.

    *Why:* some exporters wrap each module into a function and hand it the weight as an argument, so that no weight is
    constant inside; others write a weight as a Constant node.
    """
    return ir.passes.Sequential(
        common.InlinePass(criteria=lambda function: function.domain != DOMAIN),
        common.LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=_LIFT_AT_LEAST),
    )
