"""Hand the product of a fused query, key and value projection to the attention as it is."""

from __future__ import annotations

import onnx_ir as ir


class PackAttention(ir.passes.InPlacePass):
    """``GroupQueryAttention`` of the three outputs of a Split reads what is split: that is its packed form.

    *Why:* one copy of the activations less for each layer.

    1. query, key and value are all outputs of one Split along the last axis, in this order
    2. nobody else reads them, and none is a graph output

    Visits the main graph and its subgraphs.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        packed = 0
        for node in list(model.graph.all_nodes()):
            split = _split_of(node) if node.op_type == "GroupQueryAttention" else None
            if split is not None:
                node.replace_input_with(0, split.inputs[0])
                node.replace_input_with(1, None)
                node.replace_input_with(2, None)
                assert split.graph is not None
                split.graph.remove(split, safe=True)
                packed += 1
        return ir.passes.PassResult(model, packed > 0)


def _split_of(attention: ir.Node) -> ir.Node | None:
    query = attention.inputs[0]
    split = None if query is None else query.producer()
    if split is None or split.op_type != "Split" or split.attributes.get_int("axis", 0) not in (-1, 2):
        return None
    if list(split.outputs) != list(attention.inputs[:3]):  # rule 1
        return None
    used_once = all(len(value.uses()) == 1 and not value.is_graph_output() for value in split.outputs)  # rule 2
    return split if used_once else None
