"""The source code that TVM writes for GPUs, and what its kernels take: to be run without TVM's runtime."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm

from qbb_export.format import TILE_ROWS, Spec
from qbb_export.runtimes.tvm import gpu, gpu_launch
from qbb_export.runtimes.tvm.pipeline import pipelines
from qbb_export.runtimes.tvm.targets import TARGETS
from tests.kernels.layers import Layer


@dataclass(frozen=True)
class Kernel:
    """One kernel of a product.

    Attributes:
        name: in the source.
        arguments: names of its parameters, in order.
        launch: how it is cut.
    """

    name: str
    arguments: tuple[str, ...]
    launch: gpu_launch.Launch


@dataclass(frozen=True)
class Sources:
    """A compiled product.

    Attributes:
        spec: layout 1.
        source: in the target's language.
        kernels: for one row, for two, at most ``gpu_launch.FEW`` and more.
    """

    spec: Spec
    source: str
    kernels: tuple[Kernel, ...]

    def kernel(self, rows: int) -> Kernel:
        """The one that the host's code takes."""
        return self.kernels[min(rows, 3) - 1 if rows <= gpu_launch.FEW else 3]


def arrays(layer: Layer, kind: str) -> dict[str, np.ndarray]:
    """The constants as the kernels read them, by parameter."""
    spec = layer.spec
    scales = layer.scales.astype(np.float32) if kind in gpu.NO_HALF else layer.scales
    bias = np.zeros((spec.tiles, TILE_ROWS), np.float32)
    bias.reshape(-1)[: spec.N] = np.broadcast_to(layer.bias, spec.N)
    z = np.broadcast_to(layer.offset, (spec.tiles, spec.groups, TILE_ROWS)).astype(np.float32)
    z = z if z.any() else z[:1, :1]
    return {"planes": layer.planes, "scales": scales, "z": z, "bias": bias}


def compile_product(layer: Layer, target: str, kind: str) -> Sources:
    """Compile for a named target and take the source out."""
    spec = layer.spec
    constants = arrays(layer, kind)
    cut = gpu_launch.launches(spec, cuda=kind == "cuda")
    described = tvm.target.Target(dict(TARGETS[target].description))
    options = {"cuda": kind == "cuda", "offset": bool(constants["z"].any())}
    early = gpu.begins_early(described)
    function = gpu.product(spec, str(constants["scales"].dtype), begins_early=early, cut=cut, **options)
    with described:  # where an earlier test has brought in nvcc, its callback asks for it
        module = tvm.compile(function, described, **pipelines(described)).mod
    source = next(part.inspect_source() for part in _all(module) if part.kind == kind)
    order = [cut[0], cut[1], cut[3], cut[2]]  # as the host's code asks for them
    found = {}
    for i, launch in enumerate(order):
        name = "binary_basis_matmul_kernel" + (f"_{i}" if i else "")
        found[launch] = Kernel(name, _arguments(source, name), launch)
    return Sources(spec, source, tuple(found[launch] for launch in cut))


def _all(module: Any) -> Any:
    yield module
    for part in module.imports:
        yield from _all(part)


def _arguments(source: str, name: str) -> tuple[str, ...]:
    inside = re.search(rf"\b{name}\(([^)]*)\)", source)
    assert inside, name
    return tuple(text.split()[-1].removesuffix("_ptr") for text in inside[1].split(","))
