"""Three ways to run a GPU's source code without that GPU: CUDA as C++ with a fiber for each thread, OpenCL, WebGPU."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.compiled.gpu_sources import Sources, arrays
from tests.kernels.layers import Layer

ROOT = Path(__file__).parents[2]
CXX = shutil.which("g++") or shutil.which("clang++")
CUDA_HEADERS = next((p for p in Path("/usr/local").glob("cuda*/include") if (p / "cuda.h").is_file()), None)
Run = Callable[[np.ndarray], np.ndarray]

_NAMES = ("planes", "scales", "z", "bias", "x", "y")
_C_ARGUMENTS = ", ".join(f"void* {name}" for name in _NAMES) + ", int64_t M, unsigned gx, unsigned gy, int threads"


def need_cuda_headers() -> None:
    if CXX is None or CUDA_HEADERS is None:
        pytest.skip("TVM's CUDA kernels were NOT tested: no C++ compiler, or no CUDA headers in /usr/local/cuda")


def need_opencl() -> None:
    opencl = pytest.importorskip("pyopencl", reason="TVM's OpenCL kernels were NOT tested: pip install pyopencl")
    try:
        assert opencl.get_platforms()
    except (opencl.Error, AssertionError):
        pytest.skip("TVM's OpenCL kernels were NOT tested: no OpenCL device: apt-get install pocl-opencl-icd")


def need_webgpu() -> None:
    wgpu = pytest.importorskip("wgpu", reason="TVM's WebGPU kernels were NOT tested: pip install wgpu")
    if not any(adapter.info["backend_type"] == "Vulkan" for adapter in wgpu.gpu.enumerate_adapters_sync()):
        pytest.skip("TVM's WebGPU kernels were NOT tested: no Vulkan: apt-get install mesa-vulkan-drivers")


def emulated_cuda(sources: Sources, layer: Layer, folder: Path) -> Run:
    """CUDA's source, compiled for this machine."""
    wait, launch = (f'asm volatile("griddepcontrol.{w};" :  :  : "memory");' for w in ("wait", "launch_dependents"))
    assert wait in sources.source
    source = sources.source.replace(wait, "wait_for_kernel_before();").replace(launch, "")
    (folder / "source.cuh").write_text(source)
    calls = ""
    for kernel in sources.kernels:
        values = ", ".join(a if a == "M" else f"Pointer{{{a}}}" for a in kernel.arguments)
        run = f"x = not_yet(x, M * {sources.spec.K}); "
        run += f"return emulate::run(dim3(gx, gy), threads, 0, [=] {{ {kernel.name}({values}); }}) && waited;"
        calls += f'extern "C" bool run_{kernel.name}({_C_ARGUMENTS}) {{ {run} }}\n'
    (folder / "all.cc").write_text(f'#include "{ROOT}/tests/compiled/cuda_source.cc"\n{calls}')
    include = [f"-I{path}" for path in (ROOT / "tests/native/cuda_on_cpu", CUDA_HEADERS)]
    command = [str(CXX), "-std=c++17", "-O1", "-w", "-fPIC", "-shared", f'-DSOURCE="{folder}/source.cuh"', *include]
    subprocess.run([*command, "-o", str(folder / "all.so"), str(folder / "all.cc")], check=True)
    library = ctypes.CDLL(str(folder / "all.so"))
    constants = list(arrays(layer, "cuda").values())

    def run_once(x: np.ndarray) -> np.ndarray:
        y = np.full((len(x), sources.spec.N), np.nan, np.float32)
        kernel = sources.kernel(len(x))
        function = getattr(library, f"run_{kernel.name}")
        function.restype = ctypes.c_bool
        grid = kernel.launch.grid(sources.spec, len(x))
        numbers = (ctypes.c_int64(len(x)), *map(ctypes.c_uint, grid), kernel.launch.threads)
        memory = [ctypes.c_void_p(array.ctypes.data) for array in (*constants, np.ascontiguousarray(x), y)]
        assert function(*memory, *numbers), "threads wait for each other, or not for the kernel before"
        return y

    return run_once


def on_opencl(sources: Sources, layer: Layer, _: Path) -> Run:
    """On the first OpenCL device."""
    import pyopencl as cl

    device = cl.get_platforms()[0].get_devices()[0]
    context = cl.Context([device])
    queue = cl.CommandQueue(context)
    program = cl.Program(context, sources.source).build()
    flags = cl.mem_flags.READ_ONLY | cl.mem_flags.COPY_HOST_PTR
    constants = {name: cl.Buffer(context, flags, hostbuf=a) for name, a in arrays(layer, "opencl").items()}

    def run_once(x: np.ndarray) -> np.ndarray:
        y = np.full((len(x), sources.spec.N), np.nan, np.float32)
        output = cl.Buffer(context, cl.mem_flags.READ_WRITE | cl.mem_flags.COPY_HOST_PTR, hostbuf=y)
        given = cl.Buffer(context, flags, hostbuf=np.ascontiguousarray(x))
        values = {**constants, "x": given, "y": output, "M": np.int64(len(x))}
        kernel = sources.kernel(len(x))
        gx, gy = kernel.launch.grid(sources.spec, len(x))
        threads = kernel.launch.threads
        function = cl.Kernel(program, kernel.name)
        function(queue, (gx * threads, gy), (threads, 1), *(values[name] for name in kernel.arguments))
        cl.enqueue_copy(queue, y, output).wait()
        return y

    return run_once


def on_webgpu(sources: Sources, layer: Layer, _: Path) -> Run:
    """On the first Vulkan device."""
    import wgpu

    adapters = wgpu.gpu.enumerate_adapters_sync()
    device = next(a for a in adapters if a.info["backend_type"] == "Vulkan").request_device_sync()
    storage = wgpu.BufferUsage.STORAGE | wgpu.BufferUsage.COPY_SRC
    constants = {n: device.create_buffer_with_data(data=a, usage=storage) for n, a in arrays(layer, "webgpu").items()}

    def run_once(x: np.ndarray) -> np.ndarray:
        kernel = sources.kernel(len(x))
        gx, gy = kernel.launch.grid(sources.spec, len(x))
        y = np.full((len(x), sources.spec.N), np.nan, np.float32)
        part = re.search(rf"(@group[^/]*fn {kernel.name}\(.*?)(?=\n//|\Z)", sources.source, re.DOTALL)
        assert part is not None
        code = part.group(1)
        fields = re.findall(r"^  (\w+): \w+", code[code.index("struct PODArgs") :].split("}")[0], re.MULTILINE)
        numbers = np.array([{"M": len(x), "packGridDimX": gx - 1}[field] for field in fields], np.int32)
        padded = np.resize(numbers, -(-len(numbers) // 4) * 4)
        output = device.create_buffer_with_data(data=y, usage=storage)
        values = {**constants, "y": output, "x": device.create_buffer_with_data(data=x, usage=storage)}
        values["podArgs"] = device.create_buffer_with_data(data=padded, usage=wgpu.BufferUsage.UNIFORM)
        names = re.findall(r"@binding\((\d+)\) var<[^>]*> (\w+) ", code)
        pipeline = device.create_compute_pipeline(
            layout="auto", compute={"module": device.create_shader_module(code=code), "entry_point": kernel.name}
        )
        entries = [{"binding": int(i), "resource": {"buffer": values[name.removesuffix("_ptr")]}} for i, name in names]
        encoder = device.create_command_encoder()
        work = encoder.begin_compute_pass()
        work.set_pipeline(pipeline)
        work.set_bind_group(0, device.create_bind_group(layout=pipeline.get_bind_group_layout(0), entries=entries))
        work.dispatch_workgroups(gx, gy, 1)
        work.end()
        device.queue.submit([encoder.finish()])
        return np.frombuffer(device.queue.read_buffer(output), np.float32).reshape(y.shape)

    return run_once
