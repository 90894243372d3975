"""From a model to an ``onnx_ir`` graph whose weights are read only when someone asks for them."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from qbb_export.artifact import read_graph, run_checker
from qbb_export.errors import QbbError
from qbb_export.files import page_out
from qbb_export.load import load_torch
from qbb_export.source import InputSpec, LoadOptions, TorchModel

if TYPE_CHECKING:
    import torch
    from torch import nn

# Sizes that stand for dynamic dimensions while a model is traced; any but 0 and 1, which the tracer takes as special.
_TRACE_SIZE = 3


def capture(source: str, options: LoadOptions) -> tuple[ir.Model, TorchModel | None]:
    """Open MODEL and get its graph.

    Args:
        source: an .onnx file, or anything that ``load_torch`` reads.
        options: how to open it.

    Returns:
        The graph, and the PyTorch model behind it (None for an .onnx file).

    Raises:
        QbbError: MODEL cannot be opened, or PyTorch cannot export it.
    """
    if Path(source).suffix == ".onnx":
        model = read_graph(Path(source))
        run_checker(Path(source), full=False)
        return model, None
    loaded = load_torch(source, options)
    return capture_torch(loaded), loaded


def capture_torch(loaded: TorchModel) -> ir.Model:
    """Export a module without copying its weights.

    A copy with fake tensors of the same shapes is traced; floats become float32, whatever the file holds. Afterwards
    each initializer is tied to the real parameter of the same name.

    Raises:
        QbbError: PyTorch cannot export the module.
    """
    try:
        with _quiet_exporter():
            model = _export_program(loaded) if loaded.program is not None else _export_module(loaded)
    except QbbError:
        raise
    except Exception as error:  # the exporter raises many types; their first line says what is wrong
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise QbbError(
            "PyTorch cannot export the model",
            where=type(loaded.module).__name__,
            got=f"{type(error).__name__}: {first_line}",
        ) from error
    _name_dimensions(model, loaded.inputs)
    return model


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporters print their stages and warn about operators that the model does not have."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _export_module(loaded: TorchModel) -> ir.Model:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    module = _fake_copy(loaded.module, fake)
    with fake, torch.no_grad():
        inputs: dict[str, Any] = {spec.name: _trace_input(spec) for spec in loaded.inputs}
        shapes = {spec.name: _dynamic_dims(spec) for spec in loaded.inputs}
        if loaded.pretrained:
            from transformers.exporters.configs import OnnxConfig
            from transformers.exporters.exporter_onnx import OnnxExporter

            exported = OnnxExporter().export(
                module, inputs, config=OnnxConfig(dynamic=True, dynamic_shapes=shapes, optimize=False)
            )
            model: ir.Model = exported.program
        else:
            program = torch.onnx.export(
                module,
                kwargs=inputs,
                dynamic_shapes=shapes,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
            assert program is not None
            model = program.model
    _tie_weights(model, loaded.module)
    return model


def _export_program(loaded: TorchModel) -> ir.Model:
    import torch

    exported = torch.onnx.export(loaded.program, dynamo=True, optimize=False, verbose=False)  # type: ignore[arg-type]
    assert exported is not None
    return exported.model


def _fake_copy(module: nn.Module, fake: Any) -> Any:
    """A copy whose parameters and buffers have shapes but no data, floats as float32. Ties between weights are kept."""
    import torch
    from torch import nn

    memo: dict[int, torch.Tensor] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        with fake:
            empty = torch.empty(tensor.shape, dtype=dtype)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, memo)


def _trace_input(spec: InputSpec) -> torch.Tensor:
    import torch

    dims = [_TRACE_SIZE if isinstance(d, str) else d for d in spec.dims]
    return torch.ones(dims, dtype=getattr(torch, spec.dtype))


def _dynamic_dims(spec: InputSpec) -> dict[int, Any]:
    import torch

    return {axis: torch.export.Dim.DYNAMIC for axis, d in enumerate(spec.dims) if isinstance(d, str)}


def _tie_weights(model: ir.Model, module: nn.Module) -> None:
    """Let every initializer read the real parameter or buffer of its name, as float32, at the moment of need."""
    real = dict(module.named_buffers(remove_duplicate=False)) | dict(module.named_parameters(remove_duplicate=False))
    for name, value in model.graph.initializers.items():
        tensor = real.get(name)
        if tensor is not None and value.dtype is not None and value.shape is not None:
            value.const_value = parameter_tensor(tensor, name, value.dtype, value.shape)


def parameter_tensor(tensor: torch.Tensor, name: str, dtype: ir.DataType, shape: ir.Shape) -> ir.LazyTensor:
    """A parameter or buffer as an initializer that is read at the moment of need; floats as float32."""

    def read() -> ir.TensorProtocol:
        data = tensor.detach().cpu()
        values = ir.tensor((data.float() if data.is_floating_point() else data).numpy(), name=name)
        if data.is_floating_point() and data.element_size() < 4 and data.is_contiguous():  # values are a copy
            page_out(data.data_ptr(), data.numel() * data.element_size())
        return values

    return ir.LazyTensor(read, dtype=dtype, shape=shape, name=name)


def _name_dimensions(model: ir.Model, inputs: tuple[InputSpec, ...]) -> None:
    """Give dynamic dimensions the names that the input descriptions use, instead of the tracer's."""
    names: dict[str, str] = {}
    specs = {spec.name: spec for spec in inputs}
    for value in model.graph.inputs:
        spec = specs.get(value.name or "")
        if spec is None or value.shape is None:
            continue
        for traced, wanted in zip(value.shape, spec.dims, strict=False):
            if isinstance(traced, ir.SymbolicDim) and isinstance(traced.value, str) and isinstance(wanted, str):
                names[traced.value] = wanted
    values = [*model.graph.inputs, *(v for node in model.graph.all_nodes() for v in node.outputs)]
    for value in values:
        if value.shape is None or value.shape.frozen:
            continue
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, ir.SymbolicDim) and dim.value in names:
                value.shape[axis] = ir.SymbolicDim(names[dim.value])
