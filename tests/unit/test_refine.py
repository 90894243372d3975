"""QBB's iterative refinement: never worse than its start, one basis at a time beats all at once, the same bytes."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import array_api_compat.numpy as xp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qbb_export.errors import QbbError
from qbb_export.format import unpack_words
from qbb_export.quantize import Quantized, QuantizeSettings, dequantize, quantize
from qbb_export.quantize.recipes import RECIPES
from qbb_export.quantize.refine import EPSILON, _train, flipped_shares, initial, random_signs, refine
from qbb_export.quantize.settings import INITS, ORDERS, RefineSettings

Array = np.ndarray[Any, Any]


def matrix_of(seed: int, N: int, K: int, kind: str = "normal") -> Array:
    rng = np.random.default_rng(seed)
    values = rng.integers(-3, 4, (N, K)) if kind == "grid" else getattr(rng, kind)(size=(N, K))
    return (0.02 * np.asarray(values, dtype=np.float64)).astype(np.float32)


def chosen(bases: int = 3, group: int = 32, dtype: str = "float32", **fields: Any) -> QuantizeSettings:
    return QuantizeSettings(bases, group, False, scale_dtype=dtype, refine=RefineSettings(**fields))


def same_bytes(a: Quantized, b: Quantized) -> bool:
    return a.errors == b.errors and a.words.tobytes() == b.words.tobytes() and a.scales.tobytes() == b.scales.tobytes()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.tuples(st.integers(1, 9), st.integers(1, 70)),
    st.sampled_from(["normal", "laplace", "exponential", "grid"]),
    st.integers(1, 5),
    st.sampled_from(ORDERS),
    st.sampled_from(["float16", "float32"]),
)
def test_no_group_is_ever_worse_than_before_and_than_greedy(
    seed: int, shape: tuple[int, int], kind: str, bases: int, order: str, dtype: str
) -> None:
    groups = matrix_of(seed, *shape, kind)
    options = chosen(bases, dtype=dtype, order=order, steps=12)
    refined = RECIPES["refine"](xp, groups, options, dtype)
    stages = bases if order == "sequential" else 1
    assert len(refined.errors) == 1 + 1 + stages + 1 + 1
    # Decided in float64 on the numbers that are reported: no tolerance.
    assert all((after <= before).all() for before, after in pairwise(refined.errors[1:-1]))
    greedy = RECIPES["greedy"](xp, groups, options, dtype)
    assert np.array_equal(refined.errors[1], greedy.errors[-2])
    assert (refined.errors[-1] <= greedy.errors[-1]).all()


def test_what_is_reported_is_what_is_stored() -> None:
    w = matrix_of(1, 24, 150, "laplace")
    q = quantize(w, chosen(4, 64), "refine")
    gap = dequantize(q).astype(np.float64) - w
    true = float((gap**2).sum() / (w.astype(np.float64) ** 2).sum())
    # dequantize adds four float32 numbers: at most 3 roundings of 2^-24 of the sum of the scales.
    rounding = 3 * 2.0**-24 * float(q.scales.sum(axis=0).max()) * np.sqrt(w.size / (w.astype(np.float64) ** 2).sum())
    assert abs(np.sqrt(true) - np.sqrt(q.relative_error)) <= rounding
    assert (q.scales >= 0).all()


def test_the_last_step_is_least_squares_for_the_codes() -> None:
    groups = matrix_of(2, 20, 48)
    result = refine(xp, groups, chosen(3, 0, steps=30))
    for row in range(20):
        columns = (result.codes[row][:, None] >> np.arange(3) & 1) * 2.0 - 1.0
        best = np.linalg.lstsq(columns, groups[row].astype(np.float64), rcond=None)[0]
        error = float(((columns @ best - groups[row]) ** 2).sum())
        assert result.errors[-1][row] == pytest.approx(error, rel=1e-8)  # the ridge is 1e-10 of the diagonal
        np.testing.assert_allclose(result.scales[row], best, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bases", [2, 3, 4])
@pytest.mark.parametrize("kind", ["normal", "laplace"])
def test_one_basis_at_a_time_beats_all_at_once(kind: str, bases: int) -> None:
    """The paper's Figure 7. Seen here: from 0.975 (normal, 2 bases) to 0.90 (Laplace, 4 bases) of the error."""
    w = matrix_of(3, 64, 512, kind)
    sequential = quantize(w, chosen(bases, 128), "refine").relative_error
    simultaneous = quantize(w, chosen(bases, 128, order="simultaneous"), "refine").relative_error
    assert sequential < 0.985 * simultaneous


@pytest.mark.parametrize("kind", ["normal", "laplace"])
def test_bits_flip_and_it_pays(kind: str) -> None:
    groups = matrix_of(4, 256, 128, kind)
    result = refine(xp, groups, chosen(4, 0))
    shares = flipped_shares(xp, result.start_codes, result.codes, 4)
    assert len(shares) == 4 and max(shares) > 0.01 and max(shares) < 0.5
    fixed = refine(xp, groups, chosen(4, 0, steps=0, latent_rate=0.0))  # least squares for nearly the first codes
    assert result.errors[-1].sum() < 0.9 * fixed.errors[-1].sum()


def test_flipped_shares_counts_signs() -> None:
    before = np.array([[0b00, 0b01], [0b11, 0b10]], dtype=np.uint8)
    after = np.array([[0b01, 0b01], [0b01, 0b11]], dtype=np.uint8)
    assert flipped_shares(xp, before, after, 3) == [0.5, 0.25, 0.0]


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("order", ORDERS)
def test_every_init_is_refined(init: str, order: str) -> None:
    groups = matrix_of(5, 64, 96)
    result = refine(xp, groups, chosen(4, 0, init=init, order=order))
    assert all((after <= before).all() for before, after in pairwise(result.errors[1:]))
    assert result.errors[-1].sum() < 0.8 * result.errors[1].sum()


def test_cascaded_is_the_best_start() -> None:
    w = matrix_of(6, 64, 256, "laplace")
    ends = {init: quantize(w, chosen(4, 128, init=init), "refine").relative_error for init in INITS}
    assert min(ends, key=ends.__getitem__) == "cascaded"


def test_independent_init_is_what_it_says() -> None:
    groups = matrix_of(7, 3, 40)
    codes, scales = initial(xp, groups, 4, "independent")
    mean = np.abs(groups.astype(np.float64)).mean(axis=1, keepdims=True)
    for i, threshold in enumerate((-0.75, -0.25, 0.25, 0.75)):
        assert np.array_equal(codes >> i & 1, groups >= threshold * mean)
    np.testing.assert_allclose(scales, np.repeat(mean / 4, 4, axis=1), rtol=1e-14)


def test_random_init_is_fixed_for_ever_and_balanced() -> None:
    assert "".join("01"[int(bit)] for bit in random_signs(40, 0)) == "0111101110111101011011011100100101111100"
    assert "".join("01"[int(bit)] for bit in random_signs(40, 1)) == "1011111011101101101111111110110010111101"
    signs = np.stack([random_signs(4096, i) for i in range(8)]) * 2.0 - 1.0
    # Means of 4096 fair coins and their products: a standard deviation of 1/64.
    assert np.abs(signs @ signs.T / 4096 - np.eye(8)).max() < 5 / 64 and np.abs(signs.mean(axis=1)).max() < 5 / 64
    codes, _ = initial(xp, matrix_of(8, 2, 40), 2, "random")
    assert np.array_equal(codes[0], codes[1]) and np.array_equal(codes[0] & 1, random_signs(40, 0))


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("order", ORDERS)
def test_torch_gives_the_same_bytes(init: str, order: str) -> None:
    torch = pytest.importorskip("torch")
    w = matrix_of(9, 20, 150, "laplace")
    options = chosen(3, 64, "float16", init=init, order=order, steps=40)
    assert same_bytes(quantize(w, options, "refine"), quantize(torch.from_numpy(w), options, "refine"))


@pytest.mark.parametrize("order", ORDERS)
def test_a_row_does_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    w = matrix_of(10, 21, 70)
    options = chosen(3, 32, order=order, steps=20)
    whole = quantize(w, options, "refine")
    part = quantize(w[5:9] * 1.0, options, "refine")
    assert np.array_equal(whole.words[:, 5:9], part.words) and np.array_equal(whole.scales[:, 5:9], part.scales)
    monkeypatch.setattr("qbb_export.quantize.rows.BLOCK", 4 * 70)
    monkeypatch.setattr("qbb_export.quantize.matrix.GROUP_BLOCK", 7 * 32)
    monkeypatch.setattr("qbb_export.quantize.refine.PIECE", 2 * 32)
    assert same_bytes(whole, quantize(w, options, "refine"))


@pytest.mark.parametrize("trained", [[0], [2], [0, 1, 2]])
def test_a_stage_is_straight_through_estimation_with_adamax(trained: list[int]) -> None:
    """Against autograd and PyTorch's own Adamax: the same signs after every step, scales equal up to float32."""
    torch = pytest.importorskip("torch")
    groups = matrix_of(11, 6, 64)
    groups = groups / np.abs(groups).mean(axis=1, keepdims=True)
    codes, start = initial(xp, groups, 3, "cascaded")
    start = start * [0.8, 1.1, 1.2]  # no gradient near zero, where rounding would decide the direction
    signs = [((codes >> i & 1) * np.float32(2) - np.float32(1)).astype(np.float32) for i in range(3)]
    rule = RefineSettings(steps=12, latent_rate=0.03, scale_rate=0.02)

    target = torch.from_numpy(groups)
    bases = [torch.from_numpy(sign) for sign in signs]
    scales = torch.from_numpy(start.astype(np.float32)).requires_grad_()
    rest = (target - sum(scales[:, i : i + 1] * bases[i] for i in range(3))).detach()
    seen = {i: rest + scales[:, i : i + 1].detach() * bases[i] for i in trained}
    latent = {i: (seen[i] / seen[i].abs().mean(dim=1, keepdim=True)).requires_grad_() for i in trained}
    fit = torch.optim.Adamax(
        [
            {"params": list(latent.values()), "lr": rule.latent_rate, "eps": EPSILON},
            {"params": [scales], "lr": rule.scale_rate, "eps": EPSILON * groups.shape[1]},  # means, not sums, in ours
        ],
        betas=rule.betas,
    )
    falling = torch.optim.lr_scheduler.LambdaLR(fit, lambda step: 1.0 - step / rule.steps)
    best = (rest**2).sum(dim=1)
    best_signs, best_scales = [b.clone() for b in bases], scales.detach().clone()
    for _ in range(rule.steps + 1):
        for i in trained:
            hard = torch.where(latent[i] >= 0, 1.0, -1.0)
            bases[i] = hard + (latent[i] - latent[i].detach())  # the value of one, the gradient of the other
        errors = ((target - sum(scales[:, i : i + 1] * bases[i] for i in range(3))) ** 2).sum(dim=1)
        wins = (errors < best).detach()
        best = torch.where(wins, errors, best).detach()
        best_scales = torch.where(wins[:, None], scales, best_scales).detach().clone()
        best_signs = [torch.where(wins[:, None], b, old).detach() for b, old in zip(bases, best_signs, strict=True)]
        fit.zero_grad()
        (errors.sum() / 2).backward()
        fit.step()
        falling.step()

    got_signs, got_scales = _train(xp, groups, signs, start.astype(np.float32), trained, rule.steps, rule)
    for mine, theirs in zip(got_signs, best_signs, strict=True):
        assert np.array_equal(mine, theirs.numpy())
    np.testing.assert_allclose(got_scales, best_scales.numpy(), atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-30, 1e30, 1e37])
def test_extreme_groups_stay_finite(scale: float) -> None:
    w = (np.random.default_rng(12).standard_normal((5, 70)) * scale).astype(np.float32)
    w[2] = 0.0
    w[3] = w[3, 0]
    w[4, 1:] = 0.0
    q = quantize(w, chosen(3, 32, "auto", steps=10), "refine")
    assert np.isfinite(q.scales).all() and np.isfinite(q.errors).all() and not dequantize(q)[2].any()
    np.testing.assert_allclose(dequantize(q)[3], w[3], rtol=1e-3, atol=1e-44)


def test_offset_is_refused() -> None:
    with pytest.raises(QbbError, match=r"^--offset: the recipe refine knows no offset"):
        quantize(matrix_of(13, 2, 32), QuantizeSettings(offset=True), "refine")


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"init": "zero"}, "init"),
        ({"order": "both"}, "order"),
        ({"steps": -1}, "steps"),
        ({"latent_rate": float("nan")}, "latent_rate"),
        ({"latent_rate": 1.5}, "latent_rate"),
        ({"scale_rate": -0.1}, "scale_rate"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"betas": (0.9,)}, "betas"),
    ],
)
def test_settings_are_checked(fields: dict[str, Any], where: str) -> None:
    with pytest.raises(QbbError, match=f"^RefineSettings.{where}: "):
        RefineSettings(**fields)


def test_settings_are_plain_values() -> None:
    settings = QuantizeSettings(refine=RefineSettings(steps=7))
    assert settings.as_dict()["refine"] == asdict(settings.refine) and hash(settings) != hash(QuantizeSettings())
    assert replace(settings, refine=RefineSettings()) == QuantizeSettings()


def test_words_hold_the_codes() -> None:
    w = matrix_of(14, 4, 64)
    q = quantize(w, chosen(2, 0, steps=10), "refine")
    codes = refine(xp, w, chosen(2, 0, steps=10)).codes
    for i in range(2):
        assert np.array_equal(unpack_words(q.words[i], 64), (codes >> i & 1).astype(bool))


@pytest.mark.parametrize("bases", [2, 3, 4])
def test_settled_is_better_than_refined(bases: int) -> None:
    """No group is worse, and in sum levels that are all in view gain more than a tenth from 3 bases on."""
    w = matrix_of(bases, 8, 256)
    before, after = (quantize(w, chosen(bases, 128), name).relative_error for name in ("refine", "settled"))
    assert after <= before * (0.9 if bases > 2 else 1.0)
    groups = w.reshape(-1, 128)
    each = [RECIPES[name](xp, groups, chosen(bases, 128), "float16").errors for name in ("refine", "settled")]
    assert (each[1][-1] <= each[0][-1]).all() and (each[1][-1] <= each[1][1]).all()
