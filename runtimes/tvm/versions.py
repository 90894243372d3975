"""The versions of TVM that we work with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Final

from qbb_export.errors import QbbError

# The API that we build on changes from version to version; apache-tvm-ffi 0.1.15 crashes in tensorize.
PINNED: Final = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1"}


def check_versions() -> None:
    """Raise QbbError unless exactly these versions are installed."""
    expected = " ".join(f"{name}=={wanted}" for name, wanted in PINNED.items())
    found = []
    for name in PINNED:
        try:
            found.append(f"{name}=={version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    if " ".join(found) != expected:
        raise QbbError(
            "TVM is not installed as we need it",
            where="pip install 'qbb-export[tvm]'",
            expected=expected,
            got=" ".join(found),
        )
