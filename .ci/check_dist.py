"""Check what is in the sdist and the wheel: ``check_dist.py dist/x.tar.gz dist/x.whl``.

Prints every fault it finds and ends with 1 if there is one.
"""

from __future__ import annotations

import stat
import sys
import tarfile
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath

FOLDERS = ("passes", "custom_ops", "runtimes")
LIBRARY = "qbb_export/_lib/libqbb_ops.so"
SOURCE_SUFFIXES = {".h", ".hpp", ".c", ".cc", ".cpp", ".cu", ".cuh", ".inc", ".cmake", ".o", ".a"}


def python_files(root: Path) -> set[str]:
    """Names that the wheel must hold: every Python file of the four folders, under its import path."""
    names = {
        (PurePosixPath("qbb_export") / folder / path.relative_to(root / folder)).as_posix()
        for folder in FOLDERS
        for path in (root / folder).rglob("*.py")
    }
    package = root / "qbb_export"
    links = {package / folder for folder in FOLDERS}
    names |= {
        path.relative_to(root).as_posix() for path in package.rglob("*.py") if not links.intersection(path.parents)
    }
    return names


def check_wheel(wheel: Path, root: Path) -> list[str]:
    """Faults of the wheel."""
    faults = []
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata_folder = next(name.split("/")[0] for name in names if name.endswith(".dist-info/METADATA"))
        headers = HeaderParser().parsestr(archive.read(f"{metadata_folder}/WHEEL").decode())
        links = [item.filename for item in archive.infolist() if stat.S_ISLNK(item.external_attr >> 16)]
    tops = {name.split("/")[0] for name in names}
    if tops != {"qbb_export", metadata_folder}:
        faults.append(f"top level holds {sorted(tops)}, not only qbb_export and its metadata")
    if LIBRARY not in names:
        faults.append(f"{LIBRARY} is missing")
    tags = headers.get_all("Tag") or []
    if not tags or not all(tag.startswith("py3-none-") for tag in tags) or "py3-none-any" in tags:
        faults.append(f"tags {tags}, not py3-none-<platform>")
    if headers["Root-Is-Purelib"] != "false":
        faults.append("a wheel with a library must not be pure")
    for name in sorted(names):
        path = PurePosixPath(name)
        if path.suffix in SOURCE_SUFFIXES or path.name == "CMakeLists.txt":
            faults.append(f"source file {name}")
        if "tests" in path.parts or "__pycache__" in path.parts:
            faults.append(f"does not belong here: {name}")
    faults += [f"link {name}" for name in links]
    faults += [f"{name} is missing" for name in sorted(python_files(root) - names)]
    if not any(name.startswith(f"{metadata_folder}/licenses/") for name in names):
        faults.append("no licence file")
    return faults


def check_sdist(sdist: Path) -> list[str]:
    """Faults of the sdist."""
    faults = []
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    names = {member.name.partition("/")[2] for member in members}
    for needed in (
        "pyproject.toml",
        "constraints.txt",
        "Makefile",
        "LICENSE",
        "README.md",
        "custom_ops/CMakeLists.txt",
        "custom_ops/__init__.py",
        "passes/__init__.py",
        "runtimes/__init__.py",
        "tests/conftest.py",
    ):
        if needed not in names:
            faults.append(f"{needed} is missing")
    for member in members:
        name = member.name.partition("/")[2]
        if member.issym() or member.islnk():
            faults.append(f"link {name}")
        if name.startswith(tuple(f"qbb_export/{folder}/" for folder in FOLDERS)):
            faults.append(f"second copy {name}")
        if name.endswith((".so", ".pyc")) or name.startswith((".venv/", "build/", ".git/")):
            faults.append(f"does not belong here: {name}")
    return faults


def main() -> int:
    """Check the two files named on the command line."""
    sdist, wheel = map(Path, sys.argv[1:])
    root = Path(__file__).resolve().parents[1]
    version = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    faults = [f"{file.name}: version is not {version}" for file in (sdist, wheel) if f"-{version}" not in file.name]
    faults += [f"{sdist.name}: {fault}" for fault in check_sdist(sdist)]
    faults += [f"{wheel.name}: {fault}" for fault in check_wheel(wheel, root)]
    for fault in faults:
        print("error:", fault)
    print(f"{sdist.name} ({sdist.stat().st_size:,} bytes), {wheel.name} ({wheel.stat().st_size:,} bytes):", end=" ")
    print(f"{len(faults)} faults" if faults else "contents as they should be")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
