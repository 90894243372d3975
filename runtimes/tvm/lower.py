"""``LowerBinaryBasis``: every call of the reference function becomes the variant that suits the target.

The importer leaves one call of a tagged function for each ``BinaryBasisMatMul`` (``operator.reference``). That compiles
for every target, slowly. This pass replaces the calls; where no variant fits, they stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from qbb_export.format import Spec
from qbb_export.runtimes.tvm import cpu, gpu, operator


@dataclass(frozen=True)
class Call:
    """One product as the importer left it.

    Attributes:
        x: float32 ``[M, K]``; M may be free.
        planes: constant uint32 ``[bases, tiles, words, 16]``.
        scales: constant float16 or float32 ``[bases, tiles, groups, 16]``.
        offset: constant float32 ``[tiles, groups, 16]``.
        bias: constant float32 ``[tiles, 16]``.
        spec: layout 1.
        mode: 0 exact, 1 int8, 2 int16: what a variant may do to X (docs/format.md).
    """

    x: Any
    planes: Any
    scales: Any
    offset: Any
    bias: Any
    spec: Spec
    mode: int

    @property
    def rows(self) -> Any:
        """M: a number or TVM's expression."""
        return self.x.ty.shape.values[0]


@dataclass(frozen=True)
class Variant:
    """One way to compute a product.

    Attributes:
        name: for messages and tests.
        fits: whether it is good for a target and a call.
        emit: of a builder, a call and a target: the product, float32 ``[M, N]``. What it makes of X alone should
            be a call of its own: linear layers with the same X share it once common subexpressions are eliminated.
    """

    name: str
    fits: Callable[[Any, Call], bool]
    emit: Callable[[Any, Call, Any], Any]


def variants() -> tuple[Variant, ...]:
    """All of them, best first."""
    return (
        Variant("gpu", lambda target, _: gpu.is_gpu(target), gpu.emit),
        Variant("cpu", lambda target, _: target.kind.name == "llvm" and not is_hexagon(target), _on_cpu),
    )


def is_hexagon(target: Any) -> bool:
    """For which LLVM takes minutes over vectors that the machine does not have; the reference function has fewer."""
    return str(target.attrs.get("mtriple", "")).startswith("hexagon")


def _on_cpu(builder: Any, call: Call, target: Any) -> Any:
    return cpu.emit(builder, call, cpu.isa_of(target))


def LowerBinaryBasis(target: Any) -> Any:
    """The pass for a ``tvm.target.Target``."""

    def lower(module: Any, _: Any) -> Any:
        rewriter = _Rewriter(module, target)
        for name, function in module.functions.items():
            if isinstance(function, relax.Function):
                rewriter.builder_.update_func(name, rewriter.visit_expr(function))
        return relax.transform.DeadCodeElimination()(rewriter.builder_.get())

    return tvm.transform.module_pass(lower, opt_level=0, name="LowerBinaryBasis")


@mutator
class _Rewriter(PyExprMutator):  # type: ignore[misc]
    def __init__(self, module: Any, target: Any) -> None:
        super().__init__(module)
        self._module = module
        self._target = target
        self._variants = variants()

    def visit_call_(self, call: Any) -> Any:
        call = super().visit_call_(call)
        if call.op != tvm.ir.Op.get("relax.call_tir"):
            return call
        tag = operator.tag_of(self._module[call.args[0]])
        if tag is None:
            return call
        x, planes, scales, offset, bias = call.args[1]
        found = Call(x, planes, scales, offset, bias, *tag)
        for variant in self._variants:
            if variant.fits(self._target, found):
                return variant.emit(self.builder_, found, self._target)
        return call
