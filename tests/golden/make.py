"""Write the golden files of a format. Run once for each format, at its first release, and never again:

    python tests/golden/make.py tests/golden/format-1

What is written stays in the repository for ever; test_golden.py opens it with every later release. Scales are powers of
two and activations small whole numbers, so that sums are exact in float32 in whatever order they are made, and outputs
can be compared bit by bit.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from qbb_export import artifact
from qbb_export.format import FORMAT_VERSION, LAYOUTS, Spec, pack_words, to_layout
from qbb_export.passes.function_body import AttachFunctionBody
from qbb_export.passes.verify import VerifyBinaryBasis
from qbb_export.reference import binary_basis_matmul

ROWS = 3
# name: K, N, bases, group_size, scale type, offset, bias, mode
CASES = {
    "one-weight": (1, 1, 1, 1, "f2", False, False, None),
    "plain": (64, 32, 2, 64, "f2", False, False, None),
    "tails": (70, 19, 3, 32, "f2", True, True, None),
    "eight-bases": (33, 5, 8, 33, "f4", True, False, None),
    "bias": (96, 17, 4, 64, "f2", False, True, None),
    "external": (160, 64, 4, 32, "f4", True, True, None),
    "mode-exact": (64, 16, 2, 32, "f2", True, True, 0),
    "mode-int8": (64, 16, 3, 32, "f2", True, True, 1),
    "mode-int16": (64, 16, 3, 32, "f2", False, False, 2),
}


def make(folder: Path, name: str, layout: int) -> None:
    K, N, bases, group_size, scale_type, offset, bias, mode = CASES[name]
    rng = np.random.default_rng([FORMAT_VERSION, layout, list(CASES).index(name)])
    spec = Spec(K, N, bases, group_size, layout)
    signs = rng.integers(0, 2, (bases, N, K)).astype(bool)
    scales = (2.0 ** rng.integers(-3, 3, (bases, N, spec.groups)) * rng.choice([-1, 1])).astype(scale_type)
    z = (rng.integers(-4, 5, (N, spec.groups)) / 4).astype("f4") if offset else None
    c = (rng.integers(-20, 21, N) / 2).astype("f4") if bias else np.zeros(1, "f4")
    planes, scales, z = to_layout(pack_words(signs), scales, z, spec)
    x = rng.integers(-4, 5, (ROWS, K)).astype("f4")
    y = binary_basis_matmul(x.astype("f8"), planes, scales, z, c, spec)
    assert np.array_equal(y.astype("f4"), y), "not exact in float32"

    attributes = {n: getattr(spec, n) for n in ("K", "N", "bases", "group_size", "layout", "format")}
    attributes |= {} if mode is None else {"mode": mode}
    node = onnx.helper.make_node(
        "BinaryBasisMatMul", ["x", "B", "S", "Z", "C"], ["y"], name="layer", domain="qbb", **attributes
    )
    graph = onnx.helper.make_graph(
        [node],
        f"format {FORMAT_VERSION}, {name}",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["m", K])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["m", N])],
        [onnx.numpy_helper.from_array(a, n) for n, a in zip("BSZC", (planes, scales, z, c), strict=True)],
    )
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("qbb", 1)]
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10))
    AttachFunctionBody()(model)
    VerifyBinaryBasis()(model)
    stem = f"{name}-layout-{layout}"
    artifact.save(model, folder / f"{stem}.onnx")
    np.savez(folder / f"{stem}.npz", x=x, y=y.astype("f4"), signs=np.packbits(signs))


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)  # an error if it is there: golden files are not made anew
    for layout in LAYOUTS:
        for name in CASES:
            make(folder, name, layout)
    for path in sorted(folder.iterdir()):
        print(f"{path.stat().st_size:8} {path}")


if __name__ == "__main__":
    main()
