"""R2: each named kind of damage gives its own error, whatever the model looks like."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from qbb_export.errors import QbbError
from qbb_export.runtimes import gate
from tests.corrupt.bases import varied_proto
from tests.corrupt.kinds import KINDS, Damage

SEEDS = 25


def test_there_are_enough() -> None:
    assert len({name for name, _, _ in KINDS}) == len(KINDS) >= 40


def test_the_undamaged_ones_are_sound(tmp_path: Path) -> None:
    for seed in range(SEEDS):
        model, _ = varied_proto(seed)
        (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
        gate.check(tmp_path / "m.onnx")


@pytest.mark.parametrize(("damage", "pattern"), [k[1:] for k in KINDS], ids=[k[0] for k in KINDS])
def test_each_kind_has_its_error(tmp_path: Path, damage: Damage, pattern: str) -> None:
    path = tmp_path / "m.onnx"
    (tmp_path / "weights").write_bytes(bytes(1 << 16))
    for seed in range(SEEDS):
        model, attributes = varied_proto(seed)
        rng = np.random.default_rng([seed, len(damage.__name__)])
        damage(model, attributes, rng)
        path.write_bytes(model.SerializeToString())
        with pytest.raises(QbbError) as caught:
            gate.check(path)
        text = str(caught.value)
        assert re.search(pattern, text), (seed, text)
        assert text.startswith(str(path)), text
