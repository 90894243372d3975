"""A disk that is full, broken or not ours: one line, the earlier output as it was, no temporary files (R6)."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.forked import WARM, WARM_TORCH, Commands, Ended, differing, files
from tests.faults.models import chain

CC = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
OPEN, WRITE, SYNC, RENAME, MKDIR = 1, 2, 4, 8, 16  # see shim.c
ALL = OPEN | WRITE | SYNC | RENAME | MKDIR
# Errors of the system with the calls that have them; those of a whole disk go on from the first one.
ERRORS = {
    "EIO": (errno.EIO, ALL, False),
    "ENOSPC": (errno.ENOSPC, ALL, True),
    "EDQUOT": (errno.EDQUOT, OPEN | WRITE | MKDIR, True),
    "EACCES": (errno.EACCES, OPEN | RENAME | MKDIR, True),
    "EROFS": (errno.EROFS, OPEN | RENAME | MKDIR, True),
}
COUNT = "import ctypes; lib = ctypes.CDLL(None); lib.faults_seen.restype = ctypes.c_long; "
COUNT += "print('calls:', lib.faults_seen(), file=sys.stderr)"


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if CC is None or os.uname().sysname != "Linux":
        pytest.skip("no C compiler, or no Linux: set CC")
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run([CC, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", source, "-o", library, "-ldl"], check=True)
    return library


def arm(folder: Path, kinds: int, nth: int, error: int, *, all_after: bool) -> str:
    """Python that sets the shim in a process."""
    values = f"{os.fspath(folder)!r}.encode(), {kinds}, ctypes.c_long({nth}), {error}, {int(all_after)}"
    return f"import ctypes; ctypes.CDLL(None).faults_arm({values})"


class Place:
    """A folder with an earlier output that a command is to replace."""

    def __init__(self, commands: Commands, folder: Path, command: list[object], earlier: list[object]) -> None:
        self.commands, self.folder, self.command = commands, folder, command
        folder.mkdir()
        made = commands.run(*earlier)
        assert made.code == 0, made.errors
        self.old = files(folder)
        whole = commands.run(*command)
        assert whole.code == 0, whole.errors
        self.new = files(folder)
        self.restore()

    def restore(self) -> None:
        shutil.rmtree(self.folder)
        for name, data in self.old.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def output(self, of: dict[str, bytes]) -> dict[str, bytes]:
        """Without the record, which keeps what is finished."""
        return {name: data for name, data in of.items() if ".qbb/" not in name}

    def check(self, ended: Ended) -> None:
        """The error is told, and the output is as it was; or the error came once the new one had its name."""
        assert ended.is_clean_error(), ended
        now = files(self.folder)
        assert [name for name in now if ".tmp" in name] == []
        found, old = self.output(now), self.output(self.old)
        if differing(found, old):
            assert not differing(found, {**old, **self.output(self.new)}), f"mixed: {differing(found, old)}; {ended}"
            assert "fsync" in self.why, ended

    why = ""

    def calls(self, kinds: int) -> int:
        """How many calls of these kinds the command makes."""
        before = arm(self.folder, kinds, -1, errno.EIO, all_after=False)
        whole = self.commands.run(*self.command, before=before, after=COUNT)
        assert whole.code == 0, whole.errors
        self.restore()
        return int(whole.errors.split("calls:")[1])


def sweep(place: Place, name: str, stride: int = 1, last: int = 2) -> Counter[str]:
    """The error at each call in turn. ``last``: calls that come once the new output has its name."""
    error, kinds, all_after = ERRORS[name]
    outcomes: Counter[str] = Counter()
    total = place.calls(kinds)
    assert total >= 10
    for nth in range(0, total, stride):
        before = arm(place.folder, kinds, nth, error, all_after=all_after)
        ended = place.commands.run(*place.command, before=before)
        if ended.code == 0:  # it was not needed: a folder that exists is made again
            found = files(place.folder)
            assert not differing(place.output(found), place.output(place.new)), (nth, ended)
            outcomes["did not matter"] += 1
        else:
            place.why = "fsync" if kinds & SYNC and nth >= total - last else ""
            place.check(ended)
            outcomes["one line, nothing lost"] += 1
        place.restore()
    # Afterwards the same command succeeds.
    ended = place.commands.run(*place.command)
    assert ended.code == 0 and not differing(place.output(files(place.folder)), place.output(place.new)), ended
    place.restore()
    print(f"{name}: {total} calls, {dict(outcomes)}")
    return outcomes


@pytest.fixture(scope="module")
def onnx_place(shim: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("onnx")
    source = chain(folder / "in.onnx", 4, 128)
    with Commands(folder, WARM, LD_PRELOAD=str(shim)) as commands:
        command = [
            "qbb-export",
            source,
            "-o",
            folder / "out" / "m.onnx",
            "--no-verify",
            "--force",
            "--recipe",
            "greedy",
        ]
        yield Place(commands, folder / "out", [*command, "--bases", "3"], [*command, "--bases", "2"])


def test_every_call_of_an_export_fails_once(onnx_place: Place) -> None:
    outcomes = sweep(onnx_place, "EIO")
    assert outcomes["one line, nothing lost"] >= 30


@pytest.mark.parametrize("name", ["ENOSPC", "EACCES"])
def test_a_disk_that_fails_for_good(onnx_place: Place, name: str) -> None:
    sweep(onnx_place, name, stride=4)


@pytest.mark.soak
@pytest.mark.parametrize("name", list(ERRORS))
def test_a_disk_that_fails_for_good_at_every_call(onnx_place: Place, name: str) -> None:
    sweep(onnx_place, name)


LLAMA = """
from types import MappingProxyType
from dataclasses import replace
from qbb_export.distill import settings
def small(recipe):
    phases = tuple(replace(d, steps=2, batch=4) for d in recipe.distill)
    sweep = recipe.sweep and replace(recipe.sweep, sequences=4)
    text = replace(recipe.text, sequences=12, length=20, validation=4)
    return replace(recipe, text=text, sweep=sweep, distill=phases)
settings.MODEL_RECIPES = MappingProxyType({n: small(r) for n, r in settings.MODEL_RECIPES.items()})
from qbb_export.distill import run as learning_run
learning_run.SAVE_SECONDS = 0.0
"""


@pytest.mark.soak
@pytest.mark.parametrize("output", ["m.onnx", "folder"])
@pytest.mark.parametrize("recipe", ["fast", "best"])
@pytest.mark.parametrize("name", ["EIO", "ENOSPC"])
def test_exports_of_a_language_model(shim: Path, tmp_path: Path, output: str, recipe: str, name: str) -> None:
    """With a tokenizer beside the file, or into a folder; with the text, the sweep and the training in the record."""
    pytest.importorskip("torch")
    from tests.unit.models import byte_tokenizer, tiny_llama

    model = tiny_llama(tmp_path / "model")
    byte_tokenizer(model)
    with Commands(tmp_path, WARM_TORCH + LLAMA, LD_PRELOAD=str(shim)) as commands:
        command: list[object] = ["qbb-export", model, "-o", tmp_path / "out" / output, "--no-verify", "--force"]
        command += ["--group-size", "32", "--recipe", recipe]
        place = Place(commands, tmp_path / "out", [*command, "--bases", "3"], [*command, "--bases", "2"])
        total = place.calls(ERRORS[name][1])
        # Beside a file the tokenizer, too, gets its name, and the folder is synced once more.
        sweep(place, name, stride=max(1, total // 15), last=5 if output == "m.onnx" else 2)


# --- without the shim -------------------------------------------------------------------------------------------------


def export_into(commands: Commands, folder: Path, source: Path, before: str = "", bases: int = 3) -> Ended:
    arguments = [
        "qbb-export",
        source,
        "-o",
        folder / "m.onnx",
        "--no-verify",
        "--force",
        "--bases",
        bases,
        "--recipe",
        "greedy",
    ]
    return commands.run(*arguments, before=before)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Commands, Path]]:
    folder = tmp_path_factory.mktemp("plain")
    source = chain(folder / "in.onnx", 4, 256)
    late = f"run({['qbb-export', str(source), '-o', str(folder / 'm.onnx'), '--no-verify', '--recipe', 'greedy']})"
    with Commands(folder, f"{WARM}\n{late}") as commands:
        yield commands, source


def unchanged(folder: Path, old: dict[str, bytes], ended: Ended) -> None:
    assert ended.is_clean_error(), ended
    now = files(folder)
    assert [name for name in now if ".tmp" in name] == []
    kept = {name: data for name, data in now.items() if ".qbb/" not in name}
    assert not differing(kept, {name: data for name, data in old.items() if ".qbb/" not in name}), ended


@pytest.mark.parametrize("limit", [1000, 5000, 20000, 50000])
def test_file_size_limit(plain: tuple[Commands, Path], tmp_path: Path, limit: int) -> None:
    """EFBIG: what `ulimit -f` does. The manifest takes 400 bytes, a layer 31 KB, the data file 120 KB."""
    commands, source = plain
    assert export_into(commands, tmp_path, source, bases=2).code == 0
    old = files(tmp_path)
    before = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    unchanged(tmp_path, old, export_into(commands, tmp_path, source, before))
    assert export_into(commands, tmp_path, source).code == 0


@pytest.mark.parametrize("kilobytes", [0, 50, 150, 300])
def test_a_full_disk(plain: tuple[Commands, Path], tmp_path: Path, kilobytes: int) -> None:
    """A real one: a small file system in memory with so much room left; 450 KB are wanted."""
    commands, source = plain
    earlier, small = tmp_path / "earlier", tmp_path / "small"
    earlier.mkdir()
    small.mkdir()
    assert export_into(commands, earlier, source, bases=2).code == 0
    used = sum(-(-len(data) // 4096) * 4 for data in files(earlier).values()) + 4 * len(list(earlier.rglob("*")))
    options = ["-t", "tmpfs", "-o", f"size={used + kilobytes}k", "none", str(small)]
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0 or subprocess.run([mount, *options], capture_output=True).returncode != 0:
        pytest.skip("cannot mount a small file system here (needs root): a full disk was tried with the shim only")
    try:
        shutil.copytree(earlier, small, dirs_exist_ok=True)
        unchanged(small, files(earlier), export_into(commands, small, source, bases=8))
    finally:
        subprocess.run(["umount", str(small)], check=True)


READ_ONLY: dict[str, Callable[[Path], list[Path]]] = {
    "the folder": lambda folder: [folder],
    "the record": lambda folder: [folder / "m.qbb"],
    "the layers": lambda folder: [folder / "m.qbb" / "layers"],
    "all": lambda folder: [folder, folder / "m.qbb", folder / "m.qbb" / "layers"],
}


@pytest.mark.parametrize("what", list(READ_ONLY))
def test_no_permission(plain: tuple[Commands, Path], what: str) -> None:
    """EACCES as an ordinary user gets it."""
    commands, source = plain
    outer = Path(tempfile.mkdtemp(prefix="qbb-faults-"))  # pytest's own folders are closed to other users
    try:
        outer.chmod(0o755)
        folder, model = outer / "out", outer / "in.onnx"
        folder.mkdir()
        shutil.copy(source, model)
        assert export_into(commands, folder, model, bases=2).code == 0
        before = ""
        if os.geteuid() == 0:
            for path in (folder, *folder.rglob("*")):
                os.chown(path, 65534, 65534)
            before = "import os; os.setgroups([]); os.setgid(65534); os.setuid(65534)"
        old = files(folder)
        for path in READ_ONLY[what](folder):
            path.chmod(0o555)
        unchanged(folder, old, export_into(commands, folder, model, before))
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)
        assert export_into(commands, folder, model, before).code == 0
    finally:
        shutil.rmtree(outer)
