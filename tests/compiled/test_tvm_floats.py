"""Products of floats, softmax and normalisations on this CPU, within the bounds of their rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

tvm = pytest.importorskip("tvm", reason="TVM was NOT tested: pip install 'qbb-export[tvm]'")
from tvm import relax, tirx  # noqa: E402

from qbb_export.runtimes.tvm.pipeline import pipelines  # noqa: E402
from qbb_export.runtimes.tvm.targets import TARGETS, describe  # noqa: E402

EPS = float(np.finfo(np.float32).eps)
WEIGHTS = np.random.default_rng(5).standard_normal((37, 70), dtype=np.float32)


TARGET = tvm.target.Target(describe(TARGETS["native"]))


def module_of(build: Any, *inputs: tuple[Any, ...]) -> Any:
    """Relax's, of ``build(builder, *values)``, tensors of these sizes; a name in place of a number is free."""
    builder = relax.BlockBuilder()
    names: dict[str, Any] = {}
    sizes = [[n if isinstance(n, int) else names.setdefault(n, tirx.Var(n, "int64")) for n in s] for s in inputs]
    values = [relax.Var(f"x{i}", relax.TensorType(size, "float32")) for i, size in enumerate(sizes)]
    with builder.function("main", values):
        with builder.dataflow():
            out = builder.emit_output(build(builder, *values))
        builder.emit_func_output(out)
    return builder.get()


def compiled(build: Any, *inputs: tuple[Any, ...]) -> Any:
    executable = relax.build(module_of(build, *inputs), TARGET, **pipelines(TARGET))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    return lambda *arrays: machine["main"](*map(tvm.runtime.tensor, arrays)).numpy()


def product(_: Any, a: Any, b: Any) -> Any:
    return relax.op.matmul(a, b)


def scores(builder: Any, a: Any, b: Any) -> Any:
    return relax.op.matmul(a, builder.emit(relax.op.permute_dims(b, [0, 1, 3, 2])))


def scores_and_keys(builder: Any, a: Any, b: Any) -> Any:
    """The transpose has another reader."""
    turned = builder.emit(relax.op.permute_dims(b, [0, 1, 3, 2]))
    return relax.op.add(relax.op.matmul(a, turned), relax.op.mean(turned))


def by_constant(_: Any, a: Any) -> Any:
    return relax.op.matmul(a, relax.const(WEIGHTS))


def check_product(found: Any, a: Any, b: Any, more: float = 0.0) -> None:
    exact = a.astype(np.float64) @ b.astype(np.float64) + more
    bound = (a.shape[-1] + 2) * EPS * (np.abs(a).astype(np.float64) @ np.abs(b).astype(np.float64) + abs(more))
    assert found.shape == exact.shape
    assert (np.abs(found - exact) <= bound).all()


@pytest.mark.parametrize("width", [64, "d", 19])
def test_scores(width: int | str) -> None:
    """Queries times keys as they lie: with few rows, many, and keys that fill no panel."""
    function = compiled(scores, (1, 2, "m", width), (1, 2, "n", width))
    rng = np.random.default_rng(0)
    D = 45 if width == "d" else width
    for M, N in ((1, 1), (1, 33), (3, 70), (8, 32), (9, 31), (40, 65)):
        a = rng.standard_normal((1, 2, M, D), dtype=np.float32)
        b = rng.standard_normal((1, 2, N, D), dtype=np.float32)
        check_product(function(a, b), a, b.swapaxes(2, 3))


def functions(build: Any, *inputs: tuple[Any, ...]) -> set[str]:
    with TARGET:
        return {name.name_hint for name in pipelines(TARGET)["relax_pipeline"](module_of(build, *inputs)).functions}


def test_a_transpose_that_is_read_elsewhere_stays() -> None:
    sizes = ((1, 2, "m", 16), (1, 2, "n", 16))
    assert "transpose" not in functions(scores, *sizes) and "transpose" in functions(scores_and_keys, *sizes)
    function = compiled(scores_and_keys, *sizes)
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((1, 2, rows, 16), dtype=np.float32) for rows in (3, 40))
    mean = float(b.astype(np.float64).mean())
    found = function(a, b)
    exact = a.astype(np.float64) @ b.swapaxes(2, 3).astype(np.float64) + mean
    size = np.abs(a).astype(np.float64) @ np.abs(b).swapaxes(2, 3).astype(np.float64) + np.abs(b).mean()
    assert (np.abs(found - exact) <= (b.size + 2) * EPS * size).all()  # the mean is of so many numbers


def test_batched_products() -> None:
    function = compiled(product, ("b", "m", "k"), ("b", "k", "n"))
    rng = np.random.default_rng(0)
    for B, M, K, N in ((1, 1, 1, 1), (2, 3, 20, 33), (3, 17, 64, 64), (2, 5, 7, 31)):
        a = rng.standard_normal((B, M, K), dtype=np.float32)
        b = rng.standard_normal((B, K, N), dtype=np.float32)
        check_product(function(a, b), a, b)


def test_products_by_a_constant() -> None:
    function = compiled(by_constant, ("b", "m", 37))
    rng = np.random.default_rng(0)
    for B, M in ((1, 1), (2, 3), (1, 19)):
        a = rng.standard_normal((B, M, 37), dtype=np.float32)
        check_product(function(a), a, WEIGHTS)


@pytest.mark.parametrize("width", [48, 5, "n"])
def test_softmax(width: int | str) -> None:
    function = compiled(lambda _, x: relax.op.nn.softmax(x, -1), (2, "m", width))
    rng = np.random.default_rng(0)
    for M, N in ((1, 1), (3, 37)) if width == "n" else ((1, width), (5, width)):
        x = (10 * rng.standard_normal((2, M, N))).astype(np.float32)
        e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
        exact = e / e.sum(-1, keepdims=True)
        # Each e^x is off by 2 units or so, and by what its argument is off: at most half a unit of a number below 128.
        assert (np.abs(function(x) - exact) <= (N + 4 + 64) * EPS * exact).all()


@pytest.mark.parametrize("width", [64, 21])
def test_normalisations(width: int) -> None:
    rng = np.random.default_rng(0)
    scale, shift = (rng.standard_normal(width, dtype=np.float32) for _ in range(2))
    x = rng.standard_normal((2, 7, width), dtype=np.float32) + 3
    exact = x.astype(np.float64)

    def close(found: Any, y: Any) -> bool:
        """Sums of ``width`` numbers, of size 3 before the mean goes, divided by about 1, and a few more steps."""
        return bool((np.abs(found - y) <= (width + 8) * EPS * (np.abs(y) + 3 * np.abs(scale) + np.abs(shift))).all())

    layer = compiled(
        lambda _, v: relax.op.nn.layer_norm(v, relax.const(scale), relax.const(shift), axes=[-1], epsilon=1e-5),
        ("b", "m", width),
    )
    centred = exact - exact.mean(-1, keepdims=True)
    assert close(layer(x), centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + shift)
    root = compiled(
        lambda _, v: relax.op.nn.rms_norm(v, relax.const(scale), axes=[-1], epsilon=1e-5), ("b", "m", width)
    )
    assert close(root(x), exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5) * scale)
