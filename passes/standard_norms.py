"""Write ONNX Runtime's old name for an RMS norm as the operator that ONNX has had since opset 23."""

from __future__ import annotations

import onnx_ir as ir

_OLD, _NEW, _OPSET = "SimplifiedLayerNormalization", "RMSNormalization", 23


class StandardNorms(ir.passes.InPlacePass):
    """``SimplifiedLayerNormalization`` of the standard domain becomes ``RMSNormalization``, with the same results.

    *Why:* the old name is in no version of ONNX, so ONNX's checker, and with it our gate, refuses the file.

    1. only where the old name is used, the opset rises to 23
    2. a second output, which the new operator does not have, must be unused

    Visits the main graph and its subgraphs.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        old = [node for node in model.graph.all_nodes() if (node.domain, node.op_type) == ("", _OLD)]
        old = [node for node in old if not any(output.uses() for output in node.outputs[1:])]  # rule 2
        for node in old:
            node.op_type = _NEW
            node.resize_outputs(1)
        if old:  # rule 1
            model.opset_imports[""] = max(model.opset_imports.get("", 0), _OPSET)
        return ir.passes.PassResult(model, bool(old))
