"""R15: files of every format that was ever released open and give the same bits, with and without our library.

For a new format, release it with a folder of its own (see make.py) and leave the old ones as they are.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from qbb_export import artifact
from qbb_export.errors import QbbError
from qbb_export.format import FORMAT_VERSION, MODES, from_layout, unpack_words
from qbb_export.passes.function_body import binary_basis_nodes
from qbb_export.passes.verify import node_mode, node_spec
from qbb_export.runtimes import gate
from qbb_export.runtimes.ort import session

HERE = Path(__file__).parent
FILES = sorted(HERE.glob("format-*/*.onnx"))
FILES_OF_FORMAT = {1: 18}
# SHA-256 over all files of a format: nobody may change them, not even by making them anew.
DIGESTS = {1: "c87156c86697fcf85812d287c05fde953a7f387af39cc8890796329016a86384"}


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
def test_every_format_has_its_files_untouched(version: int) -> None:
    files = sorted((HERE / f"format-{version}").iterdir(), key=lambda path: path.name)
    assert sum(path.suffix == ".onnx" for path in files) == FILES_OF_FORMAT[version]
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    assert digest.hexdigest() == DIGESTS[version]


@pytest.mark.parametrize("library", [True, False], ids=["library", "body"])
@pytest.mark.parametrize("path", FILES, ids=name)
def test_outputs_are_the_same_bits(path: Path, library: bool) -> None:
    kept = np.load(path.with_suffix(".npz"))
    (got,) = session(path, library=library, mode="exact" if library else None).run(None, {"x": kept["x"]})
    assert got.dtype == np.float32 and got.tobytes() == kept["y"].tobytes()


@pytest.mark.parametrize("path", FILES, ids=name)
def test_onnx_own_reference_gives_the_same_bits(path: Path) -> None:
    kept = np.load(path.with_suffix(".npz"))
    (got,) = ReferenceEvaluator(onnx.load(path)).run(None, {"x": kept["x"]})
    assert got.tobytes() == kept["y"].tobytes()


@pytest.mark.parametrize("path", FILES, ids=name)
def test_the_stored_signs_are_read_as_they_were_meant(path: Path) -> None:
    kept = np.load(path.with_suffix(".npz"))
    (node,) = binary_basis_nodes(artifact.read_graph(path))
    spec = node_spec(node)
    planes, scales, offset = (value.const_value.numpy() for value in node.inputs[1:4])
    words, _, _ = from_layout(planes, scales, offset, spec)
    count = spec.bases * spec.N * spec.K
    signs = np.unpackbits(kept["signs"], count=count).reshape(spec.bases, spec.N, spec.K).astype(bool)
    assert np.array_equal(unpack_words(words, spec.K), signs)


@pytest.mark.parametrize("path", [path for path in FILES if "mode" in path.stem], ids=name)
def test_modes_stay_within_their_bound(path: Path) -> None:
    """docs/format.md: four inputs are off by at most q/250 (int8) or q/16256 (int16) times Σ|S| + |Z| in a segment."""
    kept = np.load(path.with_suffix(".npz"))
    (node,) = binary_basis_nodes(artifact.read_graph(path))
    assert path.stem.startswith(f"mode-{MODES[node_mode(node)]}-")
    (got,) = session(path).run(None, {"x": kept["x"]})
    spec = node_spec(node)
    planes, scales, offset = (value.const_value.numpy() for value in node.inputs[1:4])
    _, scales, offset = from_layout(planes, scales, offset, spec)
    levels = np.abs(scales.astype("f8")).sum(0) + np.abs(offset)  # [N, G]
    quads = np.abs(kept["x"].astype("f8")).reshape(len(kept["x"]), spec.groups, -1, 4).sum(-1)
    largest, count = quads.max(-1), quads.shape[-1]  # [M, G]
    off = {0: 0.0, 1: 1 / 250, 2: 1 / 16256}[node_mode(node)]
    # What float32 adds is 2K·2⁻²³ of all terms at most, which the largest quad of each group bounds.
    bound = count * (off + 2 * spec.K * 2.0**-23 * bool(off)) * largest @ levels.T
    assert (np.abs(got - kept["y"].astype("f8")) <= bound).all()


@pytest.mark.parametrize("path", [path for path in FILES if "tails" in path.stem], ids=name)
def test_a_file_of_the_future_is_refused_by_number(path: Path, tmp_path: Path) -> None:
    proto = onnx.load(path)
    del proto.metadata_props[:]  # its digest, which would be refused first
    (version,) = (a for a in proto.graph.node[0].attribute if a.name == "format")
    version.i = FORMAT_VERSION + 1
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    expected = rf"'layer': .*unknown format version .*newer qbb-export\?\); expected {FORMAT_VERSION}; got {version.i}$"
    with pytest.raises(QbbError, match=expected):
        gate.check(tmp_path / "m.onnx")
