"""How tokens are chosen."""

import numpy as np
import pytest

from qbb_export.errors import QbbError
from qbb_export.runtimes.sampling import Sampler, Sampling

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3], dtype=np.float32))


def draw(count: int, **options: object) -> np.ndarray:
    sampler = Sampler(Sampling(seed=1, **options))
    return np.bincount([sampler.choose(LOGITS, [1]) for _ in range(count)], minlength=4) / count


def test_greedy():
    assert draw(3).tolist() == [0, 1, 0, 0]


def test_penalty():
    """Negative logits are multiplied: the token that was there falls behind."""
    assert Sampler(Sampling(penalty=2.0)).choose(LOGITS, [1]) == 3
    assert Sampler(Sampling(penalty=2.0)).choose(LOGITS + 3, [1]) == 3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_k": 0}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.65}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 0.01}, [0, 1, 0, 0]),
    ],
)
def test_shares(options, expected):
    """5000 draws; five standard deviations of a share are at most 5 · 0.5 / √5000 < 0.036."""
    assert np.abs(draw(5000, temperature=1.0, **options) - expected).max() < 0.036


def test_temperature():
    p = np.array([0.1, 0.4, 0.2, 0.3]) ** 2
    assert np.abs(draw(5000, temperature=0.5, top_k=0) - p / p.sum()).max() < 0.036


def test_a_seed_gives_the_same_tokens():
    a, b = (Sampler(Sampling(temperature=1.0, seed=5)) for _ in range(2))
    assert [a.choose(LOGITS, []) for _ in range(20)] == [b.choose(LOGITS, []) for _ in range(20)]


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"penalty": 0}],
)
def test_options_out_of_range(options):
    with pytest.raises(QbbError, match="out of range"):
        Sampling(**options)
