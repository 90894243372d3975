"""R13: weights and inputs at the edge, from the command to both ways of running: refused by name, or right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from qbb_export.artifact import read_graph
from qbb_export.cli import export_main
from qbb_export.passes.function_body import binary_basis_nodes
from qbb_export.passes.verify import node_spec
from qbb_export.runtimes.ort import session
from tests.kernels.layers import Layer

RNG = np.random.default_rng(13)
PLAIN = RNG.normal(size=(70, 24))


def with_rows(value: float) -> np.ndarray:
    """Every third row of W (a column of the stored [K, N]) is one value."""
    w = PLAIN.copy()
    w[:, ::3] = value
    return w


# Stored [K, N]. In float16 those that are subnormal in float32 are zero.
WEIGHTS = {
    "all zero": np.zeros((70, 24)),
    "zero rows": with_rows(0.0),
    "constant rows": with_rows(-0.375),
    "two values": np.where(PLAIN > 0, 0.5, -0.25),
    "subnormal in float32": PLAIN * 1e-40,
    "subnormal in float16": PLAIN * 1e-6,
    "one input": PLAIN[:1],
    "one output": PLAIN[:, :1],
    "one weight": PLAIN[:1, :1],
}
DTYPES = {"float32": onnx.TensorProto.FLOAT, "float16": onnx.TensorProto.FLOAT16}
CASES = [(w, d, m) for w in WEIGHTS for d in DTYPES for m in (0, 3)]
REFUSED = [(v, d, r) for v in (np.nan, np.inf, -np.inf) for d in DTYPES for r in ("fast", "refine")]


def write(path: Path, weights: np.ndarray, dtype: str) -> Path:
    k, n = weights.shape
    short = {"float32": "float", "float16": "float16"}[dtype]
    text = f"g ({short}[m, {k}] x) => ({short}[m, {n}] y) {{ y = MatMul (x, fc1) }}"
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> {text}')
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weights.astype(dtype), "fc1"))
    onnx.save(proto, path)
    return path


def export(source: Path, recipe: str = "fast") -> int:
    options = ["--bases", "3", "--group-size", "32", "--recipe", recipe, "--include", "*", "--no-verify"]
    return export_main([str(source), "-o", str(source.with_name("m.onnx")), *options])


def test_there_are_forty() -> None:
    assert len(CASES) + len(REFUSED) >= 40


@pytest.mark.parametrize(("name", "dtype", "rows"), CASES, ids=lambda v: str(v).replace(" ", "-"))
def test_weights_at_the_edge(tmp_path: Path, name: str, dtype: str, rows: int) -> None:
    source = write(tmp_path / "in.onnx", WEIGHTS[name], dtype)
    assert export(source) == 0
    (node,) = binary_basis_nodes(read_graph(tmp_path / "m.onnx"))
    layer = Layer(node_spec(node), *(value.const_value.numpy() for value in node.inputs[1:]))
    assert all(np.isfinite(array).all() for array in (layer.scales, layer.offset, layer.bias))
    x = np.random.default_rng(rows).normal(size=(rows, layer.spec.K)).astype(dtype)
    for library in (True, False):
        (got,) = session(tmp_path / "m.onnx", library=library).run(None, {"x": x})
        assert got.shape == (rows, layer.spec.N) and got.dtype == np.dtype(dtype)
        exact = layer.exact(x)
        # The promise for float32, then one rounding to the type of Y: half its spacing, or half its least subnormal.
        bound = 2 * layer.spec.K * 2.0**-23 * layer.terms(x) + 2.0**-149
        if dtype == "float16":
            bound += 2.0**-11 * (np.abs(exact) + bound) + 2.0**-25
        assert (np.abs(got - exact) <= bound).all()
    if name in ("all zero", "constant rows", "two values", "one weight"):  # what one or two levels hold is kept
        stored = WEIGHTS[name].astype(dtype).astype("f8")
        kept = Layer.exact(layer, np.eye(layer.spec.K))
        column = slice(None, None, 3) if name == "constant rows" else slice(None)
        np.testing.assert_allclose(kept[:, column], stored[:, column], atol=2e-3 * np.abs(stored[:, column]).max())


@pytest.mark.parametrize(("value", "dtype", "recipe"), REFUSED, ids=str)
def test_weights_that_are_no_numbers_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float, dtype: str, recipe: str
) -> None:
    weights = PLAIN.copy()
    weights[69, 23] = value
    assert export(write(tmp_path / "in.onnx", weights, dtype), recipe) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: fc1: weights hold NaN, Inf")
    assert not (tmp_path / "m.onnx").exists()
