"""The contenders of cpu.py: models of one operator, over weights in files, as ONNX Runtime sessions.

Weights lie in two files of random data that ONNX Runtime maps, as it does with the weights of an exported model. Our
kernels read them there; what MatMulNBits and MatMul pack when a session opens is theirs, as for any user of them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime

from qbb_export.custom_ops import library_path
from qbb_export.format import DOMAIN, OP_TYPE, OPSET_VERSION, Spec
from qbb_export.passes.function_body import AttachFunctionBody
from timing import Turn, timed

GROUP_SIZE = 128
PAGE = 4096
# A run over all copies that takes longer is cut into runs of one copy.
LONGEST_CHAIN = 0.04
Tensors = list[tuple[str, npt.DTypeLike, tuple[int, ...]]]


@dataclass(frozen=True)
class Kind:
    """A kernel with its settings, whatever the shape.

    Attributes:
        kernel: ``qbb``, ``MatMulNBits``, ``fp32``, or ``body``: the function body in stock ONNX Runtime.
        width: bases of ours, bits of the others.
        mode: activations are floats (``exact``), ``int8`` or ``int16``; ``lut``: MatMulNBits with look-up tables.
        block_size: weights that share a scale; 0 where there is none.
        accuracy_level: of MatMulNBits: 0 is float activations, 4 int8.
    """

    kernel: str
    width: int
    mode: str = "exact"
    block_size: int = GROUP_SIZE
    accuracy_level: int | None = None

    @property
    def ours(self) -> bool:
        return self.kernel in ("qbb", "body")

    def tensors(self, k: int, n: int) -> Tensors:
        """Name, type and shape of the weights of one K×N node: bits first, then floats."""
        if self.ours:
            spec = self.spec(k, n)
            return [("b", np.uint32, spec.planes_shape), ("s", np.float16, spec.scales_shape)]
        if self.kernel == "fp32":
            return [("w", np.float32, (k, n))]
        blocks = -(-k // self.block_size)
        return [
            ("b", np.uint8, (n, blocks, self.block_size * self.width // 8)),
            ("s", np.float32, (n * blocks,)),
        ]

    def spec(self, k: int, n: int) -> Spec:
        return Spec(k, n, self.width, min(self.block_size, k))

    def weight_bytes(self, k: int, n: int) -> int:
        """Bytes of one node's weights and scales."""
        return sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for _, dtype, shape in self.tensors(k, n))

    def node(self, k: int, n: int, inputs: Sequence[ir.Value]) -> ir.Node:
        if self.ours:
            none = [constant("z", np.zeros((1, 1), np.float32)), constant("c", np.zeros(1, np.float32))]
            return ir.node(OP_TYPE, [*inputs, *none], asdict(self.spec(k, n)), domain=DOMAIN)
        if self.kernel == "fp32":
            return ir.node("MatMul", inputs)
        sizes = {"K": k, "N": n, "bits": self.width, "block_size": self.block_size}
        return ir.node(
            "MatMulNBits", inputs, {**sizes, "accuracy_level": self.accuracy_level or 0}, domain="com.microsoft"
        )


FLOAT = Kind("fp32", 32, block_size=0)
# Blocks of 32 at 4 bits: with many rows of X the float path is faster with them.
RIVALS = (
    FLOAT,
    *(Kind("MatMulNBits", 2, mode, 128, level) for mode, level in (("exact", 0), ("int8", 4), ("lut", 0))),
    *(Kind("MatMulNBits", 4, mode, block, level) for block in (128, 32) for mode, level in (("exact", 0), ("int8", 4))),
    *(Kind("MatMulNBits", 8, mode, 128, level) for mode, level in (("exact", 0), ("int8", 4))),
)


def constant(name: str, array: npt.NDArray[Any]) -> ir.Value:
    """An initializer inside the model."""
    return value_of(name, ir.tensor(array, name=name))


def value_of(name: str, tensor: Any) -> ir.Value:
    return ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)


class Weights:
    """Random weights in a folder: bits in one file, floats in the other.

    Every tensor that is asked for begins at the next page, and at the start again when the file is at its end. Files
    are so large that the same bytes come again only after several times the cache.

    Args:
        folder: files are written there.
        cache: what all copies of a contender's weights have to exceed, in bytes.
        largest: bytes of the largest tensor of all.
    """

    def __init__(self, folder: Path, cache: int, largest: int) -> None:
        self.folder, self.cache = folder, cache
        rng = np.random.default_rng(0)
        size = max(4 * cache, 2 * largest, PAGE) // PAGE * PAGE + PAGE
        # Each half of a float32 is a float16 between 0.5 and 1, and such two are a small normal float32.
        self.bits = folder / "bits.bin"
        self.floats = folder / "floats.bin"
        self._size = size
        self._next = {self.bits: 0, self.floats: 0}
        with self.bits.open("wb") as bits, self.floats.open("wb") as floats:
            left = size
            while left:
                part = min(left, 64 << 20)
                bits.write(rng.bytes(part))
                floats.write(rng.integers(0x3800, 0x3C00, part // 2, dtype=np.uint16).tobytes())
                left -= part
            for file in (bits, floats):  # else the disk would be busy while we measure
                file.flush()
                os.fsync(file.fileno())

    def value(self, name: str, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> ir.Value:
        """An initializer at the next free place."""
        dtype = np.dtype(dtype)
        path = self.floats if dtype.kind == "f" else self.bits
        length = int(np.prod(shape)) * dtype.itemsize
        offset = self._next[path] if self._next[path] + length <= self._size else 0
        self._next[path] = -(-(offset + length) // PAGE) * PAGE
        tensor = ir.ExternalTensor(
            path.name,
            offset,
            length,
            ir.DataType.from_numpy(dtype),
            shape=ir.Shape(shape),
            name=name,
            base_dir=self.folder,
        )
        return value_of(name, tensor)

    def write(self, kind: Kind, k: int, n: int, copies: int) -> Path:
        """A model of ``copies`` nodes that all take x and have their own weights; outputs are y0, y1, …"""
        x = ir.Value(name="x", shape=ir.Shape(["m", k]), type=ir.TensorType(ir.DataType.FLOAT))
        nodes = []
        for copy in range(copies):
            own = [self.value(f"{name}{copy}", dtype, shape) for name, dtype, shape in kind.tensors(k, n)]
            nodes.append(kind.node(k, n, [x, *own]))
            for value in nodes[-1].inputs[len(own) + 1 :]:
                value.name = f"{value.name}{copy}"
            y = nodes[-1].outputs[0]
            y.name, y.shape, y.type = f"y{copy}", ir.Shape(["m", n]), ir.TensorType(ir.DataType.FLOAT)
        weights = [value for node in nodes for value in node.inputs[1:] if value is not None]
        opsets = {"": 20, DOMAIN: OPSET_VERSION, "com.microsoft": 1}
        outputs = [node.outputs[0] for node in nodes]
        graph = ir.Graph([x], outputs, nodes=nodes, initializers=weights, opset_imports=opsets, name="bench")
        model = ir.Model(graph, ir_version=10)
        if kind.kernel == "body":
            AttachFunctionBody()(model)
        path = self.folder / "model.onnx"
        path.write_bytes(ir.to_proto(model).SerializeToString())
        return path


class Chain:
    """A session over some copies of the weights that a run uses one after the other, as a model does.

    *Why not a session for each:* starting a run costs up to a tenth of what our fastest kernel needs.
    """

    def __init__(self, kind: Kind, k: int, n: int, threads: int, copies: int, weights: Weights) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Idle threads of one session would otherwise spin on the processors that the next one needs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if kind.mode == "lut":
            options.add_session_config_entry("mlas.use_lut_gemm", "1")
        if kind.kernel == "qbb":
            options.add_session_config_entry("qbb.mode", kind.mode)  # before the library, which reads it
            options.register_custom_ops_library(str(library_path()))
        options.log_severity_level = 3
        path = weights.write(kind, k, n, copies)
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._names = [output.name for output in self._session.get_outputs()]
        self._n = n

    def bind(self, x: npt.NDArray[np.float32]) -> None:
        """Prepare runs on ``x``, into memory that is there already."""
        self._y = onnxruntime.OrtValue.ortvalue_from_shape_and_type([len(x), self._n], np.float32, "cpu")
        self._binding = self._session.io_binding()
        self._binding.bind_cpu_input("x", x)
        for name in self._names:
            self._binding.bind_ortvalue_output(name, self._y)

    def __call__(self) -> None:
        self._session.run_with_iobinding(self._binding)

    def output(self) -> npt.NDArray[np.float32]:
        return np.asarray(self._y.numpy())


class Contender:
    """A kernel at one shape and number of threads, with as many copies of its weights as exceed the cache.

    Raises:
        Exception: ONNX Runtime has no such kernel; its exceptions share no base class.
    """

    def __init__(self, kind: Kind, k: int, n: int, threads: int, weights: Weights) -> None:
        self.kind, self.bytes = kind, kind.weight_bytes(k, n)
        self.copies = max(1, -(-weights.cache // self.bytes))
        self.where = (kind, k, n, threads)
        self._threads, self._weights = threads, weights
        self._single = [self._open(1)]
        self._chain: Chain | None = None
        self._running: list[Chain] = []
        self._turn = 0

    def _open(self, copies: int) -> Chain:
        return Chain(*self.where, copies, self._weights)

    def prepare(self, x: npt.NDArray[np.float32], round_bytes: int) -> float:
        """Get ready for turns on ``x``.

        Args:
            x: float32 [M, K].
            round_bytes: what all contenders together read when each uses one copy.

        Returns:
            About how many seconds a turn takes.
        """
        seconds = self._warm(self._single[0], x)
        if self.copies > 1 and seconds * self.copies <= LONGEST_CHAIN:
            self._chain = self._chain or self._open(self.copies)
            self._running = [self._chain]
        else:
            self._chain = None
            # A copy comes again after all others: with one copy more than needed, in whatever order they take turns.
            wanted = 1 if self.copies == 1 else min(self.copies, 1 + -(-self._weights.cache // round_bytes))
            self._single += [self._open(1) for _ in range(wanted - len(self._single))]
            self._running = self._single[:wanted]
        return max([seconds, *(self._warm(chain, x) for chain in self._running if chain is not self._single[0])])

    def _warm(self, chain: Chain, x: npt.NDArray[np.float32]) -> float:
        chain.bind(x)
        turn: Turn = timed(chain, self._threads)
        y = chain.output()
        if not np.isfinite(y).all() or not y.any():
            raise RuntimeError(f"{self.kind} computes nothing")
        return min(turn.seconds, timed(chain, self._threads).seconds) if turn.seconds < LONGEST_CHAIN else turn.seconds

    @property
    def nodes(self) -> int:
        """Nodes in a turn."""
        return self.copies if self._running == [self._chain] else 1

    def __call__(self) -> None:
        chain = self._running[self._turn % len(self._running)]
        self._turn += 1
        chain()
