"""The operator's definition in plain ONNX operators: what makes a file run where our library is not."""

from __future__ import annotations

import onnx.parser
import onnx_ir as ir

from qbb_export.errors import QbbError
from qbb_export.format import DOMAIN, LAYOUT_ROWS, LAYOUT_TILED, OP_TYPE, OPSET_VERSION, TILE_ROWS, WORD_BITS

MIN_OPSET = 13
MIN_IR_VERSION = 8  # model-local functions

# Right shifts that bring inputs 0-3, 4-7, ..., 28-31 of a word into its low four bits.
_NIBBLE_SHIFTS = {
    LAYOUT_ROWS: "0, 4, 8, 12, 16, 20, 24, 28",
    LAYOUT_TILED: "0, 8, 16, 24, 4, 12, 20, 28",
}

# The signs of the four inputs in each of the sixteen nibbles, lowest bit first.
_SIGNS = ", ".join(str(2 * (nibble >> bit & 1) - 1) for nibble in range(16) for bit in range(4))


# ONNX text: signs float32 [..., W, 8, 4] of words uint32 [..., W, 1], with the constants below.
SIGN_STEPS = """nibble_low = BitShift <direction = "RIGHT"> (word_column, nibble_shifts)
          nibble_high = BitShift <direction = "LEFT"> (nibble_low, drop)
          nibble = BitShift <direction = "RIGHT"> (nibble_high, drop)
          nibble_index = Cast <to = 6> (nibble)
          signs_by_nibble = Gather (sign_table, nibble_index)"""


def sign_constants(layout: int) -> str:
    """ONNX text of the constants that ``SIGN_STEPS`` use."""
    return f"""nibble_shifts = Constant <value = uint32[8] {{{_NIBBLE_SHIFTS[layout]}}}> ()
        drop = Constant <value = uint32[1] {{28}}> ()
        sign_table = Constant <value = float[16, 4] {{{_SIGNS}}}> ()"""


def _rows(layout: int, source: str, result: str) -> str:
    """ONNX text that brings [tiles, D, 16] (or [1, 1]) to [rows, D]; layout 0 has rows already."""
    if layout == LAYOUT_ROWS:
        return f"{result} = Identity ({source})"
    # The last dimension goes in as itself, so that [1, 1] passes as [1, 1, 1].
    return f"""{result}_dims = Shape ({source})
        {result}_first = Gather ({result}_dims, zero)
        {result}_last = Gather ({result}_dims, minus_1)
        {result}_cube_shape = Concat <axis = 0> ({result}_first, minus_1, {result}_last)
        {result}_cube = Reshape ({source}, {result}_cube_shape)
        {result}_tiles = Transpose <perm = [0, 2, 1]> ({result}_cube)
        {result}_tile_dims = Shape ({result}_tiles)
        {result}_depth = Gather ({result}_tile_dims, minus_1)
        {result}_shape = Concat <axis = 0> (minus_1, {result}_depth)
        {result} = Reshape ({result}_tiles, {result}_shape)"""


def _text(layout: int, opset: int, cast: str) -> str:
    """The function in ONNX's text syntax.

    R: rows of W, padded to whole tiles; G: groups; P: inputs, padded to whole groups.
    """
    row_factor = 1 if layout == LAYOUT_ROWS else TILE_ROWS
    # Without allowzero (opset 14) a batch of size 0 cannot be put back.
    allowzero = "<allowzero = 1>" if opset >= 14 else ""
    return f"""
      <domain: "{DOMAIN}", opset_import: ["": {opset}]>
      {OP_TYPE} <K, N, bases, group_size, layout, format> (X, B, S, Z, C) => (Y)
      {{
        zero = Constant <value = int64[1] {{0}}> ()
        one = Constant <value = int64[1] {{1}}> ()
        two = Constant <value = int64[1] {{2}}> ()
        minus_1 = Constant <value = int64[1] {{-1}}> ()
        word_bits = Constant <value = int64[1] {{{WORD_BITS}}}> ()
        row_factor = Constant <value = int64[1] {{{row_factor}}}> ()
        {sign_constants(layout)}
        K_scalar = Constant <value_int: int = @K> ()
        N_scalar = Constant <value_int: int = @N> ()
        group_scalar = Constant <value_int: int = @group_size> ()
        K_ = Reshape (K_scalar, one)
        N_ = Reshape (N_scalar, one)
        group = Reshape (group_scalar, one)

        group_minus_1 = Sub (group, one)
        K_up = Add (K_, group_minus_1)
        G = Div (K_up, group)
        P = Mul (G, group)
        X_missing = Sub (P, K_)
        B_dims = Shape (B)
        B_rows = Gather (B_dims, one)
        B_words = Gather (B_dims, two)
        R = Mul (B_rows, row_factor)
        B_inputs = Mul (B_words, word_bits)
        B_short = Sub (P, B_inputs)
        B_missing = Max (B_short, zero)
        X_pads = Concat <axis = 0> (zero, zero, zero, X_missing)
        B_pads = Concat <axis = 0> (zero, zero, zero, B_missing)
        grouped_X_shape = Concat <axis = 0> (zero, G, group)
        grouped_W_shape = Concat <axis = 0> (R, G, group)
        W_shape = Concat <axis = 0> (R, P)

        X_matrix = Flatten <axis = -1> (X)
        X_float = Cast <to = 1> (X_matrix)
        X_padded = Pad (X_float, X_pads)
        X_grouped = Reshape (X_padded, grouped_X_shape)
        X_sums = ReduceSum <keepdims = 0> (X_grouped, two)
        {_rows(layout, "Z", "Z_rows")}
        Z_shape = Concat <axis = 0> (R, G)
        Z_full = Expand (Z_rows, Z_shape)
        Y_offset = Gemm <transB = 1> (X_sums, Z_full)

        Y_rows = Scan <num_scan_inputs = 2, body = one_basis (sum_in, words, scales) => (sum_out) {{
        {_rows(layout, "words", "word_rows")}
        {_rows(layout, "scales", "scale_rows")}
          word_column = Unsqueeze (word_rows, two)
          {SIGN_STEPS}
          signs_shape = Concat <axis = 0> (R, minus_1)
          signs = Reshape (signs_by_nibble, signs_shape)
          signs_padded = Pad (signs, B_pads)
          signs_whole = Slice (signs_padded, zero, P, one)
          signs_grouped = Reshape (signs_whole, grouped_W_shape)
          scale_float = Cast <to = 1> (scale_rows)
          scale_column = Unsqueeze (scale_float, two)
          W_grouped = Mul (signs_grouped, scale_column)
          W = Reshape (W_grouped, W_shape)
          sum_out = Gemm <transB = 1> (X_padded, W, sum_in)
        }}> (Y_offset, B, S)

        Y_matrix = Slice (Y_rows, zero, N_, one)
        Y_bias = Add (Y_matrix, C)
        X_dims = Shape (X)
        X_lead = Slice (X_dims, zero, minus_1)
        Y_dims = Concat <axis = 0> (X_lead, N_)
        Y_float = Reshape {allowzero} (Y_bias, Y_dims)
        {cast}
      }}
    """


def function_body(layout: int, opset: int, output_type: ir.DataType | None = None) -> ir.Function:
    """The function ``qbb::BinaryBasisMatMul`` for one layout.

    One basis at a time is unpacked to a dense matrix inside a Scan. *Why a Scan:* ONNX Runtime folds constant
    expressions at load, and a plain one would bring all dense weights back before the first run; a Scan it never folds.
    *Why a table:* one Gather turns a nibble into four signs.

    Args:
        layout: ``LAYOUT_ROWS`` or ``LAYOUT_TILED``.
        opset: version of the standard domain that the model imports; ONNX wants the function to import the same.
        output_type: type of every X of the model; needed below opset 15, which has no CastLike.

    Raises:
        QbbError: opset below 13, or below 15 without ``output_type``.
    """
    if opset < MIN_OPSET:
        raise QbbError("opset is too old (onnx.version_converter can raise it)", expected=f">= {MIN_OPSET}", got=opset)
    if opset >= 15:
        cast = "Y = CastLike (Y_float, X)"
    elif output_type is not None:
        cast = f"Y = Cast <to = {int(output_type)}> (Y_float)"
    else:
        raise QbbError("model mixes activation types, which needs CastLike", expected="opset >= 15", got=opset)
    proto = onnx.parser.parse_function(_text(layout, opset, cast))
    return ir.serde.deserialize_function(proto)


def binary_basis_nodes(model: ir.Model) -> list[ir.Node]:
    """All ``BinaryBasisMatMul`` nodes of the main graph and its subgraphs."""
    return [node for node in model.graph.all_nodes() if (node.domain, node.op_type) == (DOMAIN, OP_TYPE)]


class AttachFunctionBody(ir.passes.InPlacePass):
    """Give the model the function that its ``BinaryBasisMatMul`` nodes call.

    1. no such node: nothing to do
    2. the nodes' layout must be one: a function is chosen by name, so a file holds one body
    3. the IR version rises to 8 if it is lower (functions came with it)

    Visits the main graph and its subgraphs. Running it again replaces the function by an equal one.

    Raises:
        QbbError: mixed layouts, or an opset without the operators that the body needs.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = binary_basis_nodes(model)
        if not nodes:  # rule 1
            return ir.passes.PassResult(model, False)
        layouts = {node.attributes.get_int("layout", LAYOUT_ROWS) for node in nodes}
        if len(layouts) > 1:  # rule 2
            raise QbbError("one file holds one layout", where=OP_TYPE, expected="one layout", got=sorted(layouts))
        types = {node.inputs[0].dtype for node in nodes if node.inputs[0] is not None}
        opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
        function = function_body(layouts.pop(), opset, types.pop() if len(types) == 1 else None)
        model.functions[function.identifier()] = function
        model.opset_imports[DOMAIN] = OPSET_VERSION
        model.ir_version = max(model.ir_version, MIN_IR_VERSION)  # rule 3
        return ir.passes.PassResult(model, True)
