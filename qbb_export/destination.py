"""Where an export goes: one ``.onnx`` file, or the folder of a language model that generates."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common

from qbb_export import artifact, folders
from qbb_export.capture import capture
from qbb_export.errors import QbbError
from qbb_export.files import written_with
from qbb_export.generation.build import DecoderGraph, build_decoder
from qbb_export.generation.folder import CONFIG, MODEL, write_companions
from qbb_export.load import load_torch
from qbb_export.passes.fold_weights import FoldWeights
from qbb_export.passes.function_body import binary_basis_nodes
from qbb_export.passes.pack_attention import PackAttention
from qbb_export.source import LoadOptions, TorchModel


@dataclass(frozen=True)
class FolderOptions:
    """What a folder holds.

    Args:
        dtype: of activations and cache, ``"float32"`` or ``"float16"``; None: float32 for CPUs, float16 for GPUs.
        provider: ``"cpu"`` or ``"cuda"``: where onnxruntime-genai is to run it.
        portable: leave our library out; the function body in the file does its work, slower.

    Raises:
        QbbError: float32 on a GPU, where ONNX Runtime's attention has no kernel for it.
    """

    dtype: str | None = None
    provider: str = "cpu"
    portable: bool = False

    def __post_init__(self) -> None:
        if (self.provider, self.dtype) == ("cuda", "float32"):
            raise QbbError("no attention of this type on GPUs", where="--dtype", expected="float16", got=self.dtype)

    @property
    def activations(self) -> str:
        """The type, chosen."""
        return self.dtype or ("float16" if self.provider == "cuda" else "float32")


class Destination(ABC):
    """Where an export goes.

    Attributes:
        file: the graph, as it is written and verified.
        record: default folder of the per-layer results.
    """

    file: Path
    record: Path

    @abstractmethod
    def check(self, *, force: bool) -> None:
        """Refuse an output that cannot or must not be written, before any work is done.

        Raises:
            QbbError: why.
        """

    @abstractmethod
    def open(self, source: str, load: LoadOptions) -> tuple[ir.Model, TorchModel | None]:
        """The graph that is to be written, and the PyTorch model behind it, if any; see ``capture``."""

    @abstractmethod
    def write(self, model: ir.Model, loaded: TorchModel | None, on_tensor: artifact.OnTensor) -> int:
        """Write the graph and what belongs to it; returns the bytes of graph and data. See ``artifact.save``."""

    @abstractmethod
    def commit(self) -> None:
        """Give what was written and verified its name."""

    @abstractmethod
    def abandon(self) -> None:
        """Remove what was written and has no name yet."""


class FileDestination(Destination):
    """One ``.onnx`` file, with its data and tokenizer beside it. It has its name as soon as it is written."""

    def __init__(self, output: Path) -> None:
        self.file, self.record = output, output.with_suffix(".qbb")

    def check(self, *, force: bool) -> None:
        """See :class:`Destination`."""
        artifact.check_writable(self.file, force=force)

    def open(self, source: str, load: LoadOptions) -> tuple[ir.Model, TorchModel | None]:
        """See :class:`Destination`."""
        return capture(source, load)

    def write(self, model: ir.Model, loaded: TorchModel | None, on_tensor: artifact.OnTensor) -> int:
        """See :class:`Destination`."""
        # A float model is there to be compared with, and other quantisers may work on it.
        seal = bool(binary_basis_nodes(model))
        if loaded is None or loaded.tokenizer is None:
            return artifact.save(model, self.file, on_tensor=on_tensor, seal=seal)
        path = self.file.with_suffix(".tokenizer.json")  # so that `qbb eval` needs nothing else
        try:
            with written_with(path, loaded.tokenizer.read_bytes()):
                return artifact.save(model, self.file, on_tensor=on_tensor, seal=seal)
        except OSError as error:  # the model's own are a QbbError already
            raise QbbError("cannot write the tokenizer", where=path, got=error) from error

    def commit(self) -> None:
        """See :class:`Destination`."""

    def abandon(self) -> None:
        """See :class:`Destination`."""


class FolderDestination(Destination):
    """The folder of a language model. It has another name until it is complete."""

    def __init__(self, output: Path, options: FolderOptions) -> None:
        self._folder, self._options = output, options
        self._scratch = folders.scratch_path(output)
        self._decoder: DecoderGraph | None = None
        self.file = self._scratch / MODEL
        self.record = self._scratch.with_suffix(".qbb")

    def check(self, *, force: bool) -> None:
        """See :class:`Destination`."""
        folders.check_folder_writable(self._folder, CONFIG, force=force)

    def open(self, source: str, load: LoadOptions) -> tuple[ir.Model, TorchModel | None]:
        """See :class:`Destination`."""
        if Path(source).suffix == ".onnx":
            expected = "a Hugging Face folder or hub id of a decoder, or -o FILE.onnx"
            raise QbbError("a folder is made from a model of transformers", where=source, expected=expected)
        loaded = load_torch(source, load)
        options = self._options
        self._decoder = build_decoder(loaded, source, load, dtype=options.activations, provider=options.provider)
        return self._decoder.model, loaded

    def write(self, model: ir.Model, loaded: TorchModel | None, on_tensor: artifact.OnTensor) -> int:
        """See :class:`Destination`."""
        assert self._decoder is not None
        PackAttention()(model)
        FoldWeights()(model)
        common.RemoveUnusedNodesPass()(model)
        folders.make_scratch(self._scratch)
        size = artifact.save(model, self.file, on_tensor=on_tensor, seal=bool(binary_basis_nodes(model)))
        portable = self._options.portable or not binary_basis_nodes(model)
        write_companions(self._scratch, self._decoder.config, self._decoder.files, portable=portable)
        return size

    def commit(self) -> None:
        """See :class:`Destination`."""
        folders.commit(self._scratch, self._folder)

    def abandon(self) -> None:
        """See :class:`Destination`."""
        shutil.rmtree(self._scratch, ignore_errors=True)


def destination(output: Path, options: FolderOptions) -> Destination:
    """A file for a path that ends in ``.onnx``, a folder for any other.

    Raises:
        QbbError: options of a folder for a file.
    """
    if output.suffix != ".onnx":
        return FolderDestination(output, options)
    if options != FolderOptions():
        raise QbbError("--dtype, --provider and --portable are for folders", where=output, expected="-o DIR")
    return FileDestination(output)
