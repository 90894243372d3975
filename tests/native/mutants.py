"""Every check of the C++ validators, and the same line without it (R18). Each has to be missed by a test.

Not here, because nothing but a lack of memory gets past the checks before them: the status of a run in ``compute``; and
``if (M == 0)`` there, which ``qbb_kernel_run`` repeats.

An entry: file below custom_ops, the text (which occurs once, or its number is given), what stands there instead.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    file: str
    old: str
    new: str
    nth: int = 0


SPEC, GUARD, OPS, NODE, ADAPTER = "core/spec.cc", "core/guard.h", "cpu/ops.cc", "ort/node.h", "ort/adapter.cc"
MATRIX, DISPATCH = "core/matrix.cc", "cpu/dispatch.cc"

MUTANTS = [
    # Attributes.
    Mutant(SPEC, "m.format != QBB_FORMAT_VERSION", "false"),
    Mutant(SPEC, "m.layout < 0 || ", ""),
    Mutant(SPEC, " || m.layout >= QBB_NUM_LAYOUTS", ""),
    Mutant(SPEC, "m.K < 1 || ", ""),
    Mutant(SPEC, " || m.N < 1", ""),
    Mutant(SPEC, "m.bases < 1 || ", ""),
    Mutant(SPEC, " || m.bases > QBB_MAX_BASES", ""),
    Mutant(SPEC, "m.group_size > 0 && ", ""),
    Mutant(SPEC, "m.group_size < m.K && ", ""),
    Mutant(SPEC, " && m.group_size % QBB_WORD_BITS == 0", ""),
    Mutant(SPEC, "!grouped && m.group_size != m.K", "false"),
    # Sizes.
    Mutant(SPEC, "  check_size(s);\n", ""),
    Mutant(SPEC, " || mul_overflows(size, s.words, &size)", ""),
    Mutant(SPEC, "if (a > std::numeric_limits<int64_t>::max() / b) return true;", ""),
    # Tensors.
    Mutant(SPEC, "if (!good) throw", "if (false) throw"),
    Mutant(SPEC, "tensor.rank < 0 || ", ""),
    Mutant(SPEC, " || (tensor.rank > 0 && tensor.dims == nullptr)", ""),
    Mutant(SPEC, "if (!good) throw", "if (false) throw", nth=1),
    Mutant(SPEC, "if (tensor.data == nullptr)", "if (false)"),
    Mutant(SPEC, "good || tensor.dtype == dtype", "true"),
    Mutant(SPEC, "good || dims == shape", "true"),
    Mutant(SPEC, ", Dims{1, 1}", ""),
    Mutant(SPEC, ", Dims{1}", ""),
    Mutant(MATRIX, "const Spec s = validate(m);", "const Spec s = validate(m); (void)s; return;"),
    # Arguments.
    Mutant(GUARD, "mode < 0 || ", ""),
    Mutant(GUARD, " || mode >= QBB_NUM_MODES", ""),
    Mutant(GUARD, "if (M < 0)", "if (false)"),
    Mutant(GUARD, "mul_overflows(M, 4, &size) || ", ""),
    Mutant(GUARD, " || mul_overflows(size, K > N ? K : N, &size)", ""),
    Mutant(GUARD, "K > N ? K : N", "N"),
    Mutant(GUARD, "if (pointer == nullptr)", "if (false)"),
    Mutant(GUARD, "error == nullptr || ", ""),
    Mutant(GUARD, " || size == 0", ""),
    Mutant(GUARD, "static_cast<unsigned char>(text[i]) < ' ' ? ' ' : text[i]", "text[i]"),
    Mutant(OPS, 'need(matrix, "matrix");', ""),
    Mutant(OPS, 'need(matrix, "matrix");', "", nth=1),
    Mutant(OPS, 'need(kernel, "kernel");', ""),
    Mutant(OPS, 'need(kernel, "kernel");', "", nth=1),
    Mutant(OPS, "*kernel = nullptr;", ""),
    Mutant(OPS, "qbb::core::check_mode(mode);", ""),
    Mutant(OPS, "x_dtype != QBB_FLOAT32 && x_dtype != QBB_FLOAT16", "false"),
    Mutant(OPS, "qbb::core::check_rows(M, w.K, w.N);", ""),
    Mutant(OPS, "if (M == 0) return;", ""),
    Mutant(OPS, 'need(x, "x");', ""),
    Mutant(OPS, 'need(y, "y");', ""),
    Mutant(DISPATCH, "if (kernel.available()) return kernel;", "return kernel;"),
    Mutant(DISPATCH, "if (forced && std::strcmp(isa, kernel.name) != 0) continue;", ""),
    # The node.
    Mutant(NODE, "if (status != nullptr) {\n    ReleaseStatus(api, status);\n    throw", "if (false) {\n    throw"),
    Mutant(NODE, "is_constant == 0 || value == nullptr", "false"),
    Mutant(NODE, "value < 0 || ", ""),
    Mutant(NODE, " || value >= QBB_NUM_MODES", ""),
    Mutant(ADAPTER, "shape.dims.empty() || ", ""),
    Mutant(ADAPTER, " || shape.dims.back() != k.K", ""),
]
