"""TVM's CUDA kernels against our own ones and cuBLAS: time per product, and how exact they are.

    python benchmarks/tvm_gpu.py --compile DIR          where TVM and nvcc are; no GPU needed
    python benchmarks/tvm_gpu.py DIR --json tvm.json    where the GPU is; TVM's runtime is enough

Contenders at one shape: TVM with our schedule, TVM with dlight's (what TVM makes of the operator by itself, one row
of X), our CUDA library if it was built where nvcc is, cuBLAS float16 and float32 through PyTorch, and a plain read of
memory. Graphs of copies past the cache, replayed in turns, as in gpu.py. Everything is first compared with float64.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' view of layers

from qbb_export import format as fmt
from tests.kernels.layers import Layer, make_layer, with_garbage

GROUP_SIZE: Final = 128
SHAPES: Final = ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 28672))
EXACT: Final = (  # K, N, bases, group size, offset: through every path and remainder
    *((1, 1, 1, 1, True), (31, 3, 2, 31, False), (130, 33, 3, 64, True), (300, 40, 4, 300, False)),
    *((1000, 70, 8, 96, True), (4096, 520, 3, 128, False), (1024, 16400, 2, 128, True)),
    *((512, 512, 2, 128, False), (4096, 4096, 2, 128, False), (8192, 8192, 2, 128, False)),
)
FUNCTION: Final = "binary_basis_matmul"


@dataclass(frozen=True)
class Row:
    """One kernel at one shape and batch; ``gbps`` counts weights and scales, ``share`` is of the read bandwidth."""

    kernel: str
    bases: int
    shape: str
    batch: int
    median_us: float
    gbps: float
    share: float
    times_fp16: float


def file_of(spec: fmt.Spec, offset: bool, label: str) -> str:
    """Of a module."""
    return f"{spec.K}x{spec.N}_{spec.bases}_{spec.group_size}{'z' if offset else ''}_{label}.so"


# --- where TVM is -----------------------------------------------------------------------------------------------------


def compile_all(folder: Path, bases: list[int], sweep: bool) -> None:
    """Write all modules."""
    target = prepare(folder)
    jobs: list[tuple[str, Any]] = []
    for K, N in SHAPES:
        for b in bases:
            spec = fmt.Spec(K, N, b, GROUP_SIZE, fmt.LAYOUT_TILED)
            jobs.append((file_of(spec, False, "tvm"), product(spec)))
            jobs.append((file_of(spec, False, "dlight"), dlight_product(spec, target)))
            jobs += [
                (file_of(spec, False, label), product(spec, cut=cut)) for label, cut in (swept(spec) if sweep else [])
            ]
    compile_jobs(folder, target, jobs)


def compile_exact(folder: Path) -> None:
    """Write what :func:`check` needs."""
    target = prepare(folder)
    specs = [(fmt.Spec(*numbers, fmt.LAYOUT_TILED), offset) for *numbers, offset in EXACT]
    jobs = [(file_of(s, z, "tvm"), product(s, offset=z)) for s, z in specs]
    compile_jobs(folder, target, jobs)


def product(spec: fmt.Spec, **options: Any) -> Any:
    """The operator with our schedule."""
    from qbb_export.runtimes.tvm import gpu

    return gpu.product(spec, "float16", **{"cuda": True, "offset": False, "begins_early": True, **options})


def prepare(folder: Path) -> Any:
    """The target."""
    import tvm

    from qbb_export.runtimes.tvm import cuda
    from qbb_export.runtimes.tvm.targets import TARGETS

    folder.mkdir(exist_ok=True)
    cuda.use_nvcc()
    return tvm.target.Target(dict(TARGETS["cuda-sm90"].description))


def compile_jobs(folder: Path, target: Any, jobs: list[tuple[str, Any]]) -> None:
    """Those whose file is not there yet."""
    import tvm

    from qbb_export.runtimes.tvm.gpu_pipeline import KERNELS

    for name, function in track(jobs, "compiling"):
        if not (folder / name).is_file():
            with target:
                tvm.compile(function, target, tir_pipeline=KERNELS).export_library(str(folder / "part.so"))
            (folder / "part.so").rename(folder / name)


def swept(spec: fmt.Spec) -> list[tuple[str, Any]]:
    """Launches for one row of X to choose from; the other kernels are there in name only."""
    from qbb_export.runtimes.tvm.gpu_launch import Launch

    least = Launch(1, 1, 1)
    cuts = [(t, s, w) for t in (1, 2, 4) for s in (8, 16, 32) for w in (2, 4)]
    return [(f"t{t}s{s}w{w}", (Launch(1, t, s, w, look_up=True), least, least, least)) for t, s, w in cuts]


def dlight_product(spec: fmt.Spec, target: Any) -> Any:
    """The operator as a dense weight and a product, for one row of X, scheduled by TVM's rules."""
    import tvm
    from tvm import te, tirx
    from tvm.s_tir import dlight

    K, N, b, T, G = spec.K, spec.N, spec.bases, spec.tiles, spec.groups
    x = te.placeholder((1, K), "float32", "x")
    planes = te.placeholder((b, T, spec.words, 16), "uint32", "planes")
    scales = te.placeholder((b, T, G, 16), "float16", "scales")

    def weight(base: Any, n: Any, k: Any) -> Any:
        place = k % 16 // 4 * 8 + k % 4 + k % 32 // 16 * 4
        bit = (planes[base, n // 16, k // 32, n % 16] >> place.astype("uint32")) & tirx.const(1, "uint32")
        scale = scales[base, n // 16, k // spec.group_size, n % 16].astype("float32")
        return tirx.Select(bit == tirx.const(1, "uint32"), scale, -scale)

    dense = te.compute((b, N, K), weight, "dequantize")
    base, k = te.reduce_axis((0, b), "base"), te.reduce_axis((0, K), "k")
    y = te.compute((1, N), lambda m, n: te.sum(x[m, k] * dense[base, n, k], axis=[base, k]), "matmul")
    function = te.create_prim_func([x, planes, scales, y]).with_attr("global_symbol", FUNCTION)
    with target:
        rules = (dlight.gpu.GEMV(), dlight.gpu.Matmul(), dlight.gpu.Reduction(), dlight.gpu.Fallback())
        return dlight.ApplyDefaultSchedule(*rules)(tvm.IRModule({FUNCTION: function}))[FUNCTION]


# --- where the GPU is -------------------------------------------------------------------------------------------------


def load_runtime() -> None:
    """TVM's runtime with CUDA, without its Python package."""
    import tvm_ffi  # noqa: F401  its library comes first

    spec = importlib.util.find_spec("tvm")
    if spec is None or spec.origin is None:
        raise SystemExit("error: no TVM: carry its folder tvm/lib, see --help")
    for name in ("libtvm_runtime.so", "libtvm_runtime_cuda.so"):
        ctypes.CDLL(str(Path(spec.origin).parent / "lib" / name), mode=ctypes.RTLD_GLOBAL)


def constants(layer: Layer) -> list[Any]:
    """What a module's function reads besides X."""
    import torch

    spec = layer.spec
    z = np.broadcast_to(layer.offset, (spec.tiles, spec.groups, 16)).astype(np.float32)
    bias = np.zeros((spec.tiles, 16), np.float32)
    bias.reshape(-1)[: spec.N] = np.broadcast_to(layer.bias, spec.N)
    arrays = (layer.planes, layer.scales, z if z.any() else z[:1, :1], bias)
    return [torch.from_numpy(np.ascontiguousarray(array)).cuda() for array in arrays]


def function_of(folder: Path, spec: fmt.Spec, offset: bool, label: str) -> Callable[..., None]:
    """A compiled product."""
    import tvm_ffi

    function = tvm_ffi.load_module(str(folder / file_of(spec, offset, label)))[FUNCTION]

    def run(*tensors: Any) -> None:
        with tvm_ffi.use_torch_stream():
            function(*tensors)

    return run


def check(folder: Path) -> list[dict[str, Any]]:
    """The largest error over the promised bound, 2·K·eps·Σ|s||x|, at each shape; above 1 is wrong."""
    import torch

    told = []
    for K, N, b, group, offset in EXACT:
        rng = np.random.default_rng(K)
        layer = with_garbage(rng, make_layer(rng, K, N, b, group, dtype=np.float16, offset=offset))
        run, weights = function_of(folder, layer.spec, offset, "tvm"), constants(layer)
        for rows in (1, 2, 3, 8, 9, 40):
            x = rng.standard_normal((rows, K), dtype=np.float32)
            y = torch.full((rows, N), float("nan"), device="cuda")
            run(torch.from_numpy(x).cuda(), *weights, y)
            first = y.clone()
            run(torch.from_numpy(x).cuda(), *weights, y)
            torch.cuda.synchronize()
            error = np.abs(y.cpu().numpy() - layer.exact(x)) / (2 * K * 2.0**-23 * layer.terms(x))
            worst = float(error.max()) if np.isfinite(error).all() else float("inf")
            told.append({"K": K, "N": N, "bases": b, "group": group, "M": rows, "of_bound": worst})
            told[-1]["repeats"] = bool(torch.equal(first, y))
    return told


def measure(folder: Path, k: int, n: int, batch: int, options: argparse.Namespace) -> list[Row]:
    """All contenders at one shape and batch, in turns."""
    import torch

    import gpu as bench

    made = [("read", 0, bench.reader()), ("cuBLAS fp16", 16, bench.cublas(k, n, batch))]
    single = torch.randn(n, k, device="cuda")
    copies = [single, *(single.clone() for _ in range(bench.copies_of(4 * k * n) - 1))]
    x = torch.randn(batch, k, device="cuda")
    replay = bench.captured([partial(torch.nn.functional.linear, x, w) for w in copies])
    made.append(("cuBLAS fp32", 32, bench.Contender("fp32", 32, "", 4 * k * n, len(copies), replay)))
    for b in options.bases:
        layer = bench.layer_of(k, n, b)
        size = layer.planes.nbytes + layer.scales.nbytes
        labels = sorted(f.stem.split("_")[-1] for f in folder.glob(f"{k}x{n}_{b}_{GROUP_SIZE}_*.so"))
        weights = [constants(layer) for _ in range(bench.copies_of(size))]
        y = torch.empty(batch, n, device="cuda")
        for label in labels if batch == 1 else ["tvm"]:
            run = function_of(folder, layer.spec, False, label)
            parts = 2 if label == "dlight" else 4
            replay = bench.captured([partial(run, x, *w[:parts], y) for w in weights])
            made.append((f"TVM {label}", b, bench.Contender("tvm", b, label, size, len(weights), replay)))
        try:
            made.append(("our library", b, bench.ours(k, n, batch, b, 0)))
        except Exception as error:  # not built where nvcc is
            print(f"left out: our library: {error}".splitlines()[0], file=sys.stderr)
    for _, _, contender in made:
        for _ in range(3):
            contender.replay()
    torch.cuda.synchronize()
    times: list[list[float]] = [[] for _ in made]
    rng = np.random.default_rng(0)
    for _ in range(options.turns):
        for i in rng.permutation(len(made)):
            times[i].append(bench.milliseconds(made[i][2].replay) / made[i][2].copies)
    medians = [1e3 * statistics.median(t) for t in times]
    read = bench.READ / medians[0] / 1e3
    rows = []
    for (kernel, b, contender), median in zip(made[1:], medians[1:], strict=True):
        gbps = contender.bytes / median / 1e3
        rows.append(Row(kernel, b, f"{k}x{n}", batch, median, gbps, gbps / read, medians[1] / median))
    return rows


def show(rows: list[Row]) -> Table:
    """All rows as a table."""
    table = Table()
    for column in ("shape", "M", "kernel", "bases or bits", "µs", "GB/s", "of read", "times fp16"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for row in rows:
        figures = (f"{row.median_us:.1f}", f"{row.gbps:.0f}", f"{row.share:.0%}", f"{row.times_fp16:.2f}")
        table.add_row(row.shape, str(row.batch), row.kernel, str(row.bases), *figures)
    return table


def main() -> None:
    """Compile, or check and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="of compiled modules")
    parser.add_argument("--compile", type=Path, metavar="DIR", help="write the modules")
    parser.add_argument("--sweep", action="store_true", help="with --compile: more launches")
    parser.add_argument("--bases", default="2,3,4")
    parser.add_argument("--batch", default="1,2,8,64", help="M,…")
    parser.add_argument("--turns", type=int, default=31)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.bases = [int(b) for b in options.bases.split(",")]
    if options.compile is not None:
        compile_exact(options.compile)
        compile_all(options.compile, options.bases, options.sweep)
        return
    if options.folder is None:
        parser.error("a folder of compiled modules is needed, or --compile")
    import torch

    load_runtime()
    console = Console(width=120)
    checks = check(options.folder)
    wrong = [c for c in checks if c["of_bound"] > 1 or not c["repeats"]]
    console.print(f"{torch.cuda.get_device_name()}: {len(checks) - len(wrong)} of {len(checks)} products right", wrong)
    rows: list[Row] = []
    cases = [(k, n, int(m)) for k, n in SHAPES for m in options.batch.split(",")]
    for k, n, batch in track(cases, "measuring", console=console):
        rows += measure(options.folder, k, n, batch, options)
        if options.json is not None:
            told = {"gpu": torch.cuda.get_device_name(), "checks": checks, "rows": [asdict(row) for row in rows]}
            options.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        torch.cuda.empty_cache()
    console.print(show(rows))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
