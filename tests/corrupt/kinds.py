"""Named kinds of damage, each with the error that it has to give: (kind, damage, pattern).

A damage gets a sound model with one node ``layer`` (inputs x, B, S, Z, C), its attributes and a random generator, and
changes the model in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

Attributes = dict[str, int]
Damage = Callable[[onnx.ModelProto, Attributes, np.random.Generator], None]
KINDS: list[tuple[str, Damage, str]] = []
NODE = r"node 'layer': "


def kind(pattern: str) -> Callable[[Damage], Damage]:
    def add(damage: Damage) -> Damage:
        KINDS.append((damage.__name__, damage, pattern))
        return damage

    return add


def layer(model: onnx.ModelProto) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == "layer")


def attribute(model: onnx.ModelProto, name: str) -> AttributeProto:
    return next(a for a in layer(model).attribute if a.name == name)


def initializer(model: onnx.ModelProto, name: str) -> TensorProto:
    return next(t for t in model.graph.initializer if t.name == name)


def any_of(rng: np.random.Generator, *choices: Any) -> Any:
    return choices[rng.integers(len(choices))]


def replace(model: onnx.ModelProto, name: str, array: np.ndarray) -> None:
    initializer(model, name).CopyFrom(numpy_helper.from_array(array, name))


def array_of(model: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(initializer(model, name))


# --- attributes


@kind(NODE + r".*unknown format version \(written by a newer qbb-export\?\); expected 1; got (2|3|1000)$")
def newer_format(model, at, rng):
    attribute(model, "format").i = any_of(rng, 2, 3, 1000)


@kind(NODE + r".*unknown format version .*; got (0|-1|-9223372036854775808)$")
def impossible_format(model, at, rng):
    attribute(model, "format").i = any_of(rng, 0, -1, -(2**63))


@kind(NODE + r".*unknown layout; expected one of \(0, 1\); got")
def unknown_layout(model, at, rng):
    attribute(model, "layout").i = any_of(rng, 2, -1, 2**40)


@kind(NODE + r"wrong shape of B; ")
def the_other_layout(model, at, rng):
    attribute(model, "layout").i = 1 - at["layout"]


@kind(NODE + r".*empty matrix; expected K >= 1 and N >= 1; got K=(0|-\d+), ")
def no_inputs(model, at, rng):
    attribute(model, "K").i = any_of(rng, 0, -1, -at["K"], -(2**63))


@kind(NODE + r".*empty matrix; expected K >= 1 and N >= 1; got .*N=(0|-\d+)$")
def no_outputs(model, at, rng):
    attribute(model, "N").i = any_of(rng, 0, -1, -at["N"])


@kind(NODE + r"(.*bad group_size; expected K|wrong shape of (B|X); )")
def more_inputs(model, at, rng):
    attribute(model, "K").i = at["K"] + any_of(rng, 1, 32, 1000, 2**40)


@kind(NODE + r"(.*bad group_size; expected K|wrong shape of [BSX]; )")
def fewer_inputs(model, at, rng):
    attribute(model, "K").i = int(rng.integers(1, at["K"]))


@kind(NODE + r"wrong shape of [BC]; ")
def more_outputs(model, at, rng):
    attribute(model, "N").i = at["N"] + any_of(rng, 16, 17, 2**62)


@kind(NODE + r".*bad number of bases; expected 1\.\.8; got")
def impossible_bases(model, at, rng):
    attribute(model, "bases").i = any_of(rng, 0, 9, -1, 2**32 + 1)


@kind(NODE + r"wrong shape of B; ")
def other_bases(model, at, rng):
    attribute(model, "bases").i = at["bases"] % 8 + 1


@kind(NODE + r".*bad group_size; expected K \(\d+\) or a multiple of 32 below it; got")
def odd_group_size(model, at, rng):
    attribute(model, "group_size").i = any_of(rng, 0, 1, 16, 31, 33, -32, at["K"] + 1, at["K"] + 32)


@kind(NODE + r"wrong attributes; expected .*; got")
def missing_attribute(model, at, rng):
    layer(model).attribute.remove(attribute(model, any_of(rng, *at)))


@kind(NODE + r"wrong attributes; expected .*; got")
def unknown_attribute(model, at, rng):
    layer(model).attribute.append(helper.make_attribute(any_of(rng, "Q", "axis", "k", ""), 1))


@kind(NODE + r"attribute \w+ is no integer; expected int; got (FLOAT|STRING|INTS|TENSOR)$")
def attribute_of_another_type(model, at, rng):
    name = any_of(rng, *at)
    value = any_of(rng, 2.0, "2", [2, 2], numpy_helper.from_array(np.ones(1, np.int64)))
    attribute(model, name).CopyFrom(helper.make_attribute(name, value))


@kind(NODE + r"attribute \w+ is no integer; expected int; got INT$")
def attribute_that_refers_to_a_function(model, at, rng):
    chosen = attribute(model, any_of(rng, *at))
    chosen.ClearField("i")
    chosen.ref_attr_name = "K"


@kind(NODE + r"unknown mode; expected 0\.\.2 \(exact, int8, int16\); got")
def unknown_mode(model, at, rng):
    layer(model).attribute.append(helper.make_attribute("mode", any_of(rng, 3, -1, 2**50, 1.0, "int8")))


# --- inputs and outputs


@kind(NODE + r"wrong inputs; expected X, B, S, Z, C, none left out")
def input_left_out(model, at, rng):
    layer(model).input[rng.integers(5)] = ""


@kind(NODE + r"wrong inputs; ")
def too_few_inputs(model, at, rng):
    del layer(model).input[int(rng.integers(5)) :]


@kind(NODE + r"wrong inputs; ")
def too_many_inputs(model, at, rng):
    layer(model).input.extend(["C"] * int(rng.integers(1, 4)))


@kind(NODE + r"wrong number of outputs; expected 1; got [23]$")
def too_many_outputs(model, at, rng):
    layer(model).output.extend(f"more_{i}" for i in range(int(rng.integers(1, 3))))


@kind(NODE + r"[BSZC] is not constant; expected an initializer; got")
def weights_that_a_node_makes(model, at, rng):
    place = int(rng.integers(1, 5))
    made = helper.make_node("Identity", [layer(model).input[place]], ["made"], name="maker")
    layer(model).input[place] = "made"
    model.graph.node.insert(0, made)


@kind(NODE + r"[BSZC] is not constant; expected an initializer; got")
def weights_that_the_caller_gives(model, at, rng):
    name = any_of(rng, "B", "S", "Z", "C")
    tensor = initializer(model, name)
    model.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))


@kind(NODE + r"[BSZC] is not constant; expected an initializer; got gone$")
def weights_that_are_not_there(model, at, rng):
    layer(model).input[int(rng.integers(1, 5))] = "gone"


@kind(NODE + r"(wrong shape|wrong type) of [BSZC]; ")
def weights_in_each_others_place(model, at, rng):
    inputs = layer(model).input
    inputs[1], inputs[2] = inputs[2], inputs[1]


@kind(NODE + r"wrong type of X; expected FLOAT or FLOAT16; got (DOUBLE|INT32)$")
def activations_of_another_type(model, at, rng):
    model.graph.input[0].type.tensor_type.elem_type = any_of(rng, TensorProto.DOUBLE, TensorProto.INT32)


@kind(NODE + r"wrong shape of X; expected \[\.\.\., \d+\]; got")
def activations_of_another_width(model, at, rng):
    model.graph.input[0].type.tensor_type.shape.dim[-1].dim_value = at["K"] + any_of(rng, 1, 32, -1)


@kind(NODE + r"wrong shape of X; expected \[\.\.\., \d+\]; got \[\]$")
def activations_without_dimensions(model, at, rng):
    del model.graph.input[0].type.tensor_type.shape.dim[:]


# --- tensors


@kind(NODE + r"wrong type of B; expected UINT32; got")
def planes_of_another_type(model, at, rng):
    replace(model, "B", array_of(model, "B").astype(any_of(rng, np.int32, np.uint64, np.float32)))


@kind(NODE + r"wrong type of S; expected FLOAT or FLOAT16; got")
def scales_of_another_type(model, at, rng):
    replace(model, "S", array_of(model, "S").astype(any_of(rng, np.float64, np.int32)))


@kind(NODE + r"wrong type of [ZC]; expected FLOAT; got")
def offset_or_bias_of_another_type(model, at, rng):
    name = any_of(rng, "Z", "C")
    replace(model, name, array_of(model, name).astype(any_of(rng, np.float64, np.float16)))


@kind(NODE + r"wrong shape of B; ")
def planes_cut(model, at, rng):
    planes = array_of(model, "B")
    axis = int(rng.integers(planes.ndim))
    replace(model, "B", np.concatenate([planes, planes.take([0], axis)], axis))


@kind(NODE + r"wrong shape of S; ")
def scales_cut(model, at, rng):
    scales = array_of(model, "S")
    axis = int(rng.integers(scales.ndim))
    replace(model, "S", np.concatenate([scales, scales.take([0], axis)], axis))


@kind(NODE + r"wrong shape of Z; ")
def offset_cut(model, at, rng):
    replace(model, "Z", any_of(rng, np.zeros(1, "f4"), np.zeros((1, 2), "f4"), np.zeros((3, 7, 5), "f4")))


@kind(NODE + r"wrong shape of C; ")
def bias_cut(model, at, rng):
    replace(model, "C", np.zeros(any_of(rng, at["N"] + 1, max(2, at["N"] - 1) if at["N"] != 2 else 3, 0), "f4"))


@kind(NODE + r"wrong shape of [BSZC]; ")
def weights_without_dimensions(model, at, rng):
    name = any_of(rng, "B", "S", "Z", "C")
    replace(model, name, array_of(model, name).flat[0].reshape(()))


@kind(r"(ONNX's checker refuses the model|not an ONNX model).*\b[BSZC]\b")
def tensor_with_too_few_bytes(model, at, rng):
    tensor = initializer(model, any_of(rng, "B", "S", "Z", "C"))
    tensor.raw_data = tensor.raw_data[: -int(rng.integers(1, 4))]


@kind(r"(ONNX's checker refuses the model|not an ONNX model).*\b[BSZC]\b")
def tensor_with_no_bytes(model, at, rng):
    initializer(model, any_of(rng, "B", "S", "Z", "C")).ClearField("raw_data")


@kind(NODE + r"wrong (shape|type) of [BSZC]|not an ONNX model|ONNX's checker refuses the model")
def tensor_with_dimensions_of_another_planet(model, at, rng):
    initializer(model, any_of(rng, "B", "S", "Z", "C")).dims[0] = any_of(rng, -1, 2**62, 2**63 - 1, 2**31)


# --- operators and functions


@kind(NODE + r"unknown operator; expected BinaryBasisMatMul; got qbb::")
def unknown_operator_of_ours(model, at, rng):
    layer(model).op_type = any_of(rng, "BinaryBasisConv", "", "binarybasismatmul")


@kind(r"node 'evil': operator of an unknown domain; expected a domain of ONNX Runtime or a function in the file; got")
def operator_of_a_stranger(model, at, rng):
    domain = any_of(rng, "evil", "com.evil", "QBB", "ai.onnx.preview")
    model.graph.node.append(helper.make_node("Run", ["x"], ["evil"], name="evil", domain=domain))
    model.opset_import.append(helper.make_opsetid(domain, 1))


@kind(r"ONNX's checker refuses the model; got No Op registered for NoSuchOperator")
def unknown_operator_of_onnx(model, at, rng):
    model.graph.node.append(helper.make_node("NoSuchOperator", ["x"], ["other"], name="other"))


@kind(r"opset_import: unknown version of our operators; expected 1; got")
def newer_operators(model, at, rng):
    next(o for o in model.opset_import if o.domain == "qbb").version = any_of(rng, 2, 3, 99)


@kind(r"function body is missing; expected one function; got 0")
def no_body(model, at, rng):
    del model.functions[:]


@kind(r"function body is not ours|ONNX's checker refuses the model; got Model contains multiple local functions")
def two_bodies(model, at, rng):
    body = model.functions.add()
    body.CopyFrom(model.functions[0])
    body.node[-1].op_type = "Neg"


@kind(r"function body is not ours|not an ONNX model")
def one_step_of_the_body_changed(model, at, rng):
    nodes = model.functions[0].node
    nodes[rng.integers(len(nodes))].op_type = any_of(rng, "Relu", "NoSuchOperator", "Loop")


@kind(r"function body is not ours|not an ONNX model")
def one_step_of_the_body_less(model, at, rng):
    nodes = model.functions[0].node
    del nodes[rng.integers(len(nodes))]


@kind(r"function body is not ours")
def one_number_of_the_body_changed(model, at, rng):
    numbers = [a.t for n in model.functions[0].node for a in n.attribute if a.t.int64_data or a.t.uint64_data]
    chosen = numbers[rng.integers(len(numbers))]
    values = chosen.int64_data or chosen.uint64_data
    values[rng.integers(len(values))] += int(rng.integers(1, 99))


@kind(r"function 'f::\d+': functions are nested too deeply, or call themselves; expected at most 100 levels")
def functions_in_a_circle(model, at, rng):
    functions(model, [[(i + 1) % 3] for i in range(3)])


@kind(r"functions inlined: too many nodes; expected at most 1000000; got \d+")
def functions_that_grow(model, at, rng):
    functions(model, [[i + 1] * int(rng.integers(2, 5)) for i in range(40)] + [[]])


def functions(model: onnx.ModelProto, bodies: list[list[int]]) -> None:
    """Functions f::0, f::1, … of which the graph calls the first; each body lists those that it calls."""
    for number, called in enumerate(bodies):
        steps = [helper.make_node(str(c), [f"v{i}"], [f"v{i + 1}"], domain="f") for i, c in enumerate(called)]
        steps = steps or [helper.make_node("Relu", ["v0"], ["v1"])]
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("f", 1)]
        model.functions.append(helper.make_function("f", str(number), ["v0"], [f"v{len(steps)}"], steps, opsets))
    model.graph.node.append(helper.make_node("0", ["x"], ["called"], domain="f", name="caller"))
    model.opset_import.append(helper.make_opsetid("f", 1))


# --- the graph


@kind(r"ONNX's checker refuses the model; got Nodes in a graph must be topologically sorted|not an ONNX model")
def nodes_in_a_circle(model, at, rng):
    model.graph.node.append(helper.make_node("Relu", ["around"], ["again"]))
    model.graph.node.append(helper.make_node("Relu", ["again"], ["around"]))


@kind(r"not an ONNX model|ONNX's checker refuses the model; got Graph must be in single static assignment")
def one_name_for_two_values(model, at, rng):
    model.graph.node.append(helper.make_node("Neg", ["x"], [any_of(rng, "y", "h")]))


@kind(r"ONNX's checker refuses the model; got [BSZC] initializer name is not unique|not an ONNX model")
def one_name_for_two_initializers(model, at, rng):
    tensor = model.graph.initializer.add()
    tensor.CopyFrom(initializer(model, any_of(rng, "B", "S", "Z", "C")))


@kind(r"ONNX's checker refuses the model; got Attribute '\w+' appeared multiple times|not an ONNX model|" + NODE)
def one_attribute_twice(model, at, rng):
    again = layer(model).attribute.add()
    again.CopyFrom(attribute(model, any_of(rng, *at)))


@kind(r"not an ONNX model; got ValueError: no graph in it$")
def no_graph(model, at, rng):
    model.ClearField("graph")


@kind(r"not an ONNX model; got ValueError: no graph in it$")
def no_opset(model, at, rng):
    del model.opset_import[:]


@kind(r"ONNX's checker refuses the model|opset is too old|function body is not ours|model mixes activation types")
def opset_of_another_time(model, at, rng):
    next(o for o in model.opset_import if o.domain == "").version = any_of(rng, 1, 12, 14, 1000)


@kind(r"ONNX's checker refuses the model; got Your model ir_version \d+ is higher than the checker's")
def ir_version_of_another_time(model, at, rng):
    model.ir_version = int(rng.integers(100, 10000))


# --- external data


def external(model: onnx.ModelProto, rng: np.random.Generator, **entries: str) -> None:
    """Move a tensor to a data file beside the model (``weights``, 64 KB of zeros), or where the entries say."""
    tensor = initializer(model, any_of(rng, "B", "S", "Z", "C"))
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "weights", "offset": "0", **entries}.items():
        tensor.external_data.add(key=key, value=value)


@kind(r"tensor '[BSZC]': external data leaves the model's folder; expected a file beside it; got")
def data_outside(model, at, rng):
    external(model, rng, location=any_of(rng, "../weights", "/etc/passwd", "a/b", "..", ".", "a\\b", "", "\0"))


@kind(r"tensor '[BSZC]': external data is missing; expected a file gone$")
def data_that_is_gone(model, at, rng):
    external(model, rng, location="gone")


@kind(r"tensor '[BSZC]': external data is too short; expected \d+ bytes; got 65536 bytes in weights|not an ONNX model")
def data_past_the_end(model, at, rng):
    external(model, rng, offset=any_of(rng, "65535", str(2**40), str(2**63 - 1), str(2**64)))


@kind(r"tensor '[BSZC]': external data is too short; |not an ONNX model")
def data_before_the_start(model, at, rng):
    external(model, rng, offset=any_of(rng, "-1", "-4096", str(-(2**63))))


@kind(r"tensor '[BSZC]': external data is too short; |not an ONNX model")
def data_of_another_length(model, at, rng):
    external(model, rng, length=any_of(rng, "-1", "65537", str(2**62), "ten", ""))


@kind(r"tensor '[BSZC]': external data has no type")
def data_without_a_type(model, at, rng):
    external(model, rng)
    next(t for t in model.graph.initializer if t.external_data).data_type = 0
