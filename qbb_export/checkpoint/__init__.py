"""Read the weights of a model that GPTQ or AWQ has quantised, as floats.

Layouts, with ``in`` and ``out`` the features of a layer and ``G`` its groups of inputs:

=========  ==========================================  =====================================
tensor     GPTQ                                        AWQ ("gemm")
=========  ==========================================  =====================================
qweight    int32 ``[in * bits / 32, out]``             int32 ``[in, out / 8]``
qzeros     int32 ``[G, out * bits / 32]``              int32 ``[G, out / 8]``
scales     float ``[G, out]``                          float ``[G, out]``
g_idx      int32 ``[in]``, the group of each input     none, inputs are in their order
=========  ==========================================  =====================================

``weight[o, i] = scales[g, o] * (code[i, o] - zero[g, o])`` with g the group of input i. GPTQ packs values as one stream
of bits, lowest first, so that 32 values of 3 bits fill 3 words and two of them cross from word to word; AWQ packs 8
values of 4 bits in the order 0, 2, 4, 6, 1, 3, 5, 7.

Sources: ``QuantLinear.pack`` in AutoGPTQ (``auto_gptq/nn_modules/qlinear/qlinear_cuda.py``), the conversions of zero
points in GPTQModel (``gptqmodel/utils/model.py``), ``WQLinear_GEMM`` in AutoAWQ (``awq/modules/linear/gemm.py``).
"""

from __future__ import annotations

from qbb_export.checkpoint.reader import QuantizedCheckpoint

__all__ = ["QuantizedCheckpoint"]
