"""A decoder's graph with its KV cache, as onnxruntime-genai's model builder makes it.

*Why its builder:* one graph serves prompt and decoding, made of operators that ONNX Runtime has kernels for, and the
configuration that onnxruntime-genai needs comes with it. transformers' exporter with ONNX Runtime's fusions makes two
graphs, one of them fixed to a single new token, takes half a minute instead of one second for a small model, and packs
weights into constants without the parameters' names.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir

from qbb_export.errors import QbbError
from qbb_export.generation.adapt import adapt_config, routing_of, subtracts_mean
from qbb_export.generation.folder import CONFIG
from qbb_export.generation.mixture import inline_mixtures, make_mixture
from qbb_export.generation.rotations import compute_tables, rotation_of
from qbb_export.generation.tie import Slice, tie_weights
from qbb_export.passes.standard_norms import StandardNorms
from qbb_export.source import LoadOptions, TorchModel

_INSTALL: Final = "pip install 'qbb-export[genai]'"
# The builder's attention operator exists on CPUs for float32 only, ONNX Runtime's for float16, too.
_PRECISIONS: Final = {"float32": "fp32", "float16": "fp16"}


@dataclass(frozen=True)
class DecoderGraph:
    """What the builder made.

    Attributes:
        model: the graph; its initializers are named after the parameters that they read, at the moment of need.
        config: ``genai_config.json``.
        files: tokenizer files, by name.
    """

    model: ir.Model
    config: dict[str, Any]
    files: dict[str, bytes]


def build_decoder(loaded: TorchModel, source: str, load: LoadOptions, *, dtype: str, provider: str) -> DecoderGraph:
    """The graph of a transformers decoder, in which every linear layer is one MatMul.

    Args:
        loaded: the model; it is left as it is.
        source: its folder or hub id, where config and tokenizer are read from.
        load: how it was opened.
        dtype: of activations and cache, ``"float32"`` or ``"float16"``.
        provider: ``"cpu"`` or ``"cuda"``: what the configuration asks for.

    Raises:
        QbbError: onnxruntime-genai is not installed, it does not know the architecture, there is no tokenizer, or one
            of the model's linear layers is not in its graph.
    """
    builder = _import_builder(source)
    place = source if load.config is None else str(load.config)
    if loaded.tokenizer is None:
        raise QbbError("no tokenizer", where=place, expected="tokenizer.json in the model's folder")
    parameters = dict(loaded.module.named_parameters(remove_duplicate=False))
    packed = [name for name, parameter in parameters.items() if parameter.dim() == 3 and ".experts." in name]
    if packed:
        raise _unknown(place, f"a mixture whose experts are no plain linear layers, {packed[0]}")
    slices: dict[str, Slice] = {}
    models: list[ir.Model] = []
    uses = _builder_uses(builder, _shallow(loaded.module), parameters, slices, models)
    with tempfile.TemporaryDirectory() as folder, uses:
        _run_builder(builder, place, Path(folder), dtype, provider)
        if len(models) != 1:
            raise _unknown(place, f"{len(models)} graphs")
        written = {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir()) if file.is_file()}
    config = json.loads(written.pop(CONFIG))
    if provider == "cpu":
        config["model"]["decoder"]["session_options"]["provider_options"] = []
    _name_head_size(models[0], config["model"]["decoder"]["head_size"])
    inline_mixtures(models[0])
    compute_tables(models[0], rotation_of(loaded.module))
    StandardNorms()(models[0])
    tie_weights(models[0], slices, parameters, _linear_parameters(loaded.module))
    return DecoderGraph(models[0], config, written)


def _name_head_size(model: ir.Model, head_size: int) -> None:
    """The last dimension of a cache is known; whoever makes an empty one reads it from the graph."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None and value.shape[-1] == "kv_cache_dim":
            value.shape[-1] = head_size


def _import_builder(source: str) -> Any:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        from onnxruntime_genai.models import builder
    except ImportError:
        raise QbbError("onnxruntime-genai is not installed", where=source, expected=_INSTALL) from None
    finally:  # ONNX Runtime's quantiser, which the builder imports, sets up logging for the whole program
        root.handlers[:], root.level = handlers, level
    return builder


def _unknown(where: object, got: object) -> QbbError:
    return QbbError(
        "architecture cannot be exported with a KV cache",
        where=where,
        expected="Llama, Qwen, Phi, Gemma or another that onnxruntime-genai's builder knows, or -o FILE.onnx",
        got=got,
    )


def _run_builder(builder: Any, place: str, folder: Path, dtype: str, provider: str) -> None:
    is_folder = Path(place).is_dir()
    arguments = ("" if is_folder else place, place if is_folder else "", str(folder), _PRECISIONS[dtype])
    # The builder's choice of operators: float16 means a GPU to it.
    operators = "cuda" if dtype == "float16" else provider
    options = ("fuse_qkv=false", "fuse_mlp_gate_up=false", "fuse_qk_norm_gqa=false", "windowed_kv_cache=false")
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            extra = builder.parse_extra_options(*arguments, operators, str(folder / "cache"), list(options))
            adapt_config(extra["hf_details"]["hf_config"])
            builder.create_model(*arguments, operators, str(folder / "cache"), **extra)
    except QbbError:
        raise
    except NotImplementedError as error:
        raise _unknown(place, error) from error
    except Exception as error:  # whatever the builder, transformers or the tokenizer raise
        raise QbbError(
            "onnxruntime-genai's builder fails", where=place, got=f"{type(error).__name__}: {error}"
        ) from error


@contextmanager
def _builder_uses(
    builder: Any, module: Any, parameters: Mapping[str, Any], slices: dict[str, Slice], models: list[ir.Model]
) -> Iterator[None]:
    """Let the builder read ``module`` instead of loading a second copy, note which parameter each of its initializers
    reads, take mixtures of experts from us, and keep the graph instead of writing all weights to disk.
    """
    base = builder.Model
    make_mlp = base.make_mlp
    make_layernorm = base.make_layernorm
    make_initializer = base.make_initializer
    find = _finder(module)

    def noted(self: Any, tensor: Any, /, name: str, **options: Any) -> None:
        found = find(tensor)
        if found is not None:
            slices[name] = found
        make_initializer(self, tensor, name, **options)

    def make_norm(self: Any, layer: int, norm: Any, skip: bool, simple: bool, location: str) -> None:
        make_layernorm(self, layer, norm, skip, simple and not subtracts_mean(norm), location)

    def make_mlp_or_mixture(self: Any, layer: int, mlp: Any, root_input: str) -> None:
        if not hasattr(mlp, "experts"):
            make_mlp(self, layer, mlp, root_input)
            return
        place = next(name for name, part in module.named_modules() if part is mlp)
        routing, shared = routing_of(mlp, place), getattr(mlp, "shared_expert", None)
        if shared is not None:
            dense, self.intermediate_size = self.intermediate_size, shared.down_proj.in_features
            make_mlp(self, layer, shared, root_input)
            self.intermediate_size = dense
            shared = self.make_value(self.layernorm_attrs["skip_input"])
        y = make_mixture(self.model, self.make_value(root_input), place, routing, parameters, shared)
        self.values[y.name] = y
        self.layernorm_attrs["skip_input"] = y.name

    def keep(self: Any, folder: str) -> None:
        for node in self.model.graph:
            node.domain = node.domain or ""  # the builder leaves it None in places
            value = node.attributes.get("value") if node.op_type == "Constant" else None
            if value is not None:
                node.outputs[0].shape = value.as_tensor().shape  # it calls vectors scalars
        models.append(self.model)

    with contextlib.ExitStack() as stack:
        for owner in [base, *_subclasses(base)]:
            for name, replacement in (("load_weights", lambda self, path: module), ("save_model", keep)):
                if name in vars(owner):
                    stack.enter_context(_replaced(owner, name, replacement))
        stack.enter_context(_replaced(base, "make_initializer", noted))
        stack.enter_context(_replaced(base, "make_layernorm", make_norm))
        stack.enter_context(_replaced(base, "make_mlp", make_mlp_or_mixture))
        yield


def _subclasses(base: type) -> list[type]:
    children: list[type] = base.__subclasses__()
    return [found for child in children for found in (child, *_subclasses(child))]


@contextmanager
def _replaced(owner: Any, name: str, value: Callable[..., Any]) -> Iterator[None]:
    old = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, old)


def _shallow(module: Any) -> Any:
    """A copy of the tree of modules that shares all tensors: the builder hangs modules of its own into it."""
    tensors = (*module.parameters(), *module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def _finder(module: Any) -> Callable[[Any], Slice | None]:
    """Tells which rows of which matrix a tensor views, by its place in memory."""
    import torch

    # Of names for one parameter the last: a tied head's, not the embedding's, as in an export without cache.
    places = {p.data_ptr(): (name, p) for name, p in module.named_parameters(remove_duplicate=False) if p.dim() == 2}
    starts = sorted(places)

    def find(tensor: Any) -> Slice | None:
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 2:
            return None
        at = tensor.data_ptr()
        start = max((s for s in starts if s <= at), default=None)
        if start is None:
            return None
        name, owner = places[start]
        transposed = not (tensor.stride(1) == 1 and tensor.stride(0) == owner.stride(0))
        rows = tensor.T if transposed else tensor
        row_bytes = owner.stride(0) * owner.element_size()
        first, rest = divmod(at - start, row_bytes)
        fits = rest == 0 and rows.shape[1] == owner.shape[1] and first + rows.shape[0] <= owner.shape[0]
        same = rows.dtype == owner.dtype and rows.stride() == owner.stride()
        return Slice(name, first, first + rows.shape[0], transposed) if fits and same else None

    return find


def _linear_parameters(module: Any) -> set[str]:
    """Names of the weights of all linear layers in numbered blocks; each has to be in the graph."""
    from torch import nn

    return {
        f"{place}.weight"
        for place, child in module.named_modules()
        if isinstance(child, nn.Linear) and any(part.isdigit() for part in place.split("."))
    }
