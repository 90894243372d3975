"""The trainable copy: it begins as what is stored, its gradients are the formula's, and it is stored as it is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch import nn  # noqa: E402

from qbb_export.distill.student import (  # noqa: E402
    BinaryBases,
    Student,
    Target,
    block_of,
    levels_of,
    nearest,
    to_codes,
    to_quantized,
)
from qbb_export.load import load_torch  # noqa: E402
from qbb_export.quantize import Quantized, QuantizeSettings, dequantize, quantize  # noqa: E402
from qbb_export.quantize.sweep import Codes  # noqa: E402
from qbb_export.source import LoadOptions  # noqa: E402
from tests.unit.models import tiny  # noqa: E402

EPS = float(np.finfo(np.float32).eps)
CASES = pytest.mark.parametrize(
    ("bases", "K", "offset"),
    [(1, 64, True), (2, 40, False), (2, 64, True), (3, 72, True), (4, 40, True), (4, 64, False)],
)


def settings(bases: int, offset: bool, **other: Any) -> QuantizeSettings:
    return QuantizeSettings(bases, 32, offset, rounds=3, shakes=0, **other)


def matrix(N: int, K: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = 0.05 * torch.randn(N, K, generator=generator)
    weight[0, :32] = 0.0  # a group without anything in it
    weight[1] *= 40.0  # and outliers
    return weight


class Model(nn.Module):
    """A numbered block, and a head that is tied to another module."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(weight.shape[1], weight.shape[0], bias=False)])
        self.tied = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.layers[0].weight = self.tied.weight = nn.Parameter(weight.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x) + 2 * self.tied(x)


def bound(layer: Quantized) -> np.ndarray[Any, Any]:
    """How far a sum of the bases in another order, of numbers divided by a unit and multiplied again, may lie."""
    size = np.abs(layer.scales.astype(np.float64)).sum(0) + (0.0 if layer.offset is None else np.abs(layer.offset))
    group = np.arange(layer.spec.K) // layer.spec.group_size
    return np.asarray((layer.spec.bases + 4) * EPS * size[:, group])


@CASES
@pytest.mark.parametrize("train_codes", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("recipe", ["fast", "rtn", "greedy"])
def test_it_begins_as_what_is_stored(
    bases: int, K: int, offset: bool, train_codes: bool, transposed: bool, recipe: str
) -> None:
    weight = matrix(6, K)
    start = quantize(weight, settings(bases, offset and recipe != "greedy", scale_dtype="float16"), recipe)
    # What is there may have been made for other weights: most of these lie outside the cells of their codes.
    other = matrix(6, K, seed=1)
    model = Model(other.T.contiguous() if transposed else other)
    target = Target("w", "layers.0.weight", transposed, settings(bases, offset))
    student = Student(model, [target], {"w": start}, train_codes=train_codes)
    for owner in (student.model.layers[0], student.model.tied):  # type: ignore[union-attr, index]
        made = owner.weight.detach().numpy()
        assert (np.abs((made.T if transposed else made) - dequantize(start)) <= bound(start)).all()
    assert torch.equal(model.tied.weight, other.T if transposed else other)  # the float model is left alone
    ((_, form, parameter),) = student.matrices()
    codes = to_codes(start, "cpu")
    levels = levels_of(codes.scales, codes.offset).sort(-1).values
    apart = (levels.diff(dim=-1) > 1e-2 * levels.abs().amax(-1, keepdim=True)).all(-1)
    known = apart.repeat_interleave(32, dim=1)[:, :K]  # of levels that are the same but for rounding either will do
    assert bool(known.any()) and torch.equal(form.state(parameter).codes[known], codes.codes[known])
    stored = student.quantized({"w": start}, model)["w"]
    assert np.array_equal(stored.scales, start.scales)
    assert stored.scales.dtype == np.float16 and stored.spec == start.spec
    assert stored.errors[:-1] == start.errors


@CASES
def test_the_unit_of_the_rates_is_the_mean_distance_of_neighbouring_levels(bases: int, K: int, offset: bool) -> None:
    weight = matrix(6, K)
    state = to_codes(quantize(weight, settings(bases, offset)), "cpu")
    state.scales[2, 0, 0] *= -1  # names the same levels
    form = BinaryBases(state, weight, transposed=False, train_codes=True)
    values = levels_of(state.scales, state.offset).sort(-1).values
    wanted = values.double().diff(dim=-1).mean(-1)
    assert wanted[0, 0] == 0  # a group of zeros
    wanted[0, 0] = 1
    slack = 8 * EPS * values.abs().amax(-1)  # rounding of the levels and of the sum of up to eight scales
    assert bool(((form.unit - wanted).abs() <= slack).all())


@CASES
def test_latents_are_the_float_weights_where_these_lie_well_inside_their_cells(
    bases: int, K: int, offset: bool
) -> None:
    weight = matrix(6, K)
    state = to_codes(quantize(weight, settings(bases, offset)), "cpu")
    form = BinaryBases(state, weight, transposed=False, train_codes=True)
    latent = form.start
    grouped, relative = form._grouped(latent), form._grouped(weight) / form.unit.unsqueeze(-1)
    levels = levels_of(form.scales, form.offset).detach()
    chosen, stored = nearest(grouped, levels)[1], levels.gather(-1, form._grouped(state.codes).long())
    assert torch.equal(form._flat(chosen), form._flat(stored))
    values = levels.sort(-1).values
    middles = (values[..., 1:] + values[..., :-1]) / 2
    step = (values[..., -1:] - values[..., :1]) / (values.shape[-1] - 1)
    edges = torch.cat([values[..., :1] - step, middles, values[..., -1:] + step], dim=-1)
    cell = torch.searchsorted(middles, grouped.contiguous())
    low, high = edges.gather(-1, cell), edges.gather(-1, cell + 1)
    margin = 0.25 * (high - low)  # a code on the edge of its cell would be undone by the first noise
    slack = EPS * values.abs().max()
    assert bool(form._flat((grouped >= low + margin - slack) & (grouped <= high - margin + slack)).all())
    deep = (relative > low + margin) & (relative < high - margin)
    assert bool(form._flat(((grouped - relative).abs() <= slack) | ~deep).all())


@CASES
@pytest.mark.parametrize("train_codes", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_are_those_of_the_formula(
    bases: int, K: int, offset: bool, train_codes: bool, transposed: bool
) -> None:
    weight = matrix(6, K)
    state = to_codes(quantize(weight, settings(bases, offset)), "cpu")
    form = BinaryBases(state, weight, transposed=transposed, train_codes=train_codes)
    parameter = nn.Parameter(form.start, requires_grad=train_codes)
    upstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    form(parameter).backward(upstream.T if transposed else upstream)

    def reference(upstream: torch.Tensor, signs: torch.Tensor) -> list[torch.Tensor]:
        """float64 autograd of ``unit * (sum_b scale * sign + offset)``."""
        group = torch.arange(K) // 32
        scales = form.scales.detach().double().requires_grad_()
        shift = torch.zeros(weight.shape[0], scales.shape[1], dtype=torch.float64, requires_grad=True)
        unit = form.unit.detach().double()[:, group]
        made = unit * ((scales[:, group] * signs.double()).sum(-1) + shift[:, group])
        return list(torch.autograd.grad(made, [scales, shift], upstream.double()))

    signs = (state.codes.unsqueeze(-1) >> torch.arange(bases) & 1).int() * 2 - 1
    wanted = reference(upstream, signs)
    sizes = reference(upstream.abs(), signs.abs())  # sums of the terms' magnitudes
    found = [form.scales.grad, form.offset.grad if offset else None]
    for got, exact, size in zip(found, wanted, sizes, strict=True):
        assert got is None or bool(((got - exact).abs() <= (32 + 2) * EPS * size).all())
    assert (found[1] is None) == (not offset)
    if train_codes:  # straight through
        assert torch.equal(parameter.grad, upstream * form.unit[:, torch.arange(K) // 32])
    assert form.unit.grad is None and (form.codes is None or form.codes.grad is None)


def test_a_tied_weight_learns_from_all_its_owners() -> None:
    weight = matrix(6, 64)
    start = {"w": quantize(weight, settings(2, True))}
    target = Target("w", "layers.0.weight", False, settings(2, True))
    student = Student(Model(weight), [target], start, train_codes=True)
    groups = student.parameter_groups(1.0, 2.0)
    assert [(len(group["params"]), group["lr"]) for group in groups] == [(1, 1.0), (2, 2.0)]
    assert sum(p.requires_grad for p in student.model.parameters()) == 3
    student.model(torch.eye(64)).sum().backward()
    unit = next(student.matrices())[1].unit
    # The sum over all outputs: each weight once through the block, twice through the other owner.
    assert torch.equal(groups[0]["params"][0].grad, 3 * unit.repeat_interleave(32, dim=1))


@pytest.mark.parametrize("family", ["albert", "gpt2"])
def test_a_model_of_transformers_with_its_stored_weights(family: str, tmp_path: Path) -> None:
    model = load_torch(str(tiny(family, tmp_path)[0]), LoadOptions()).module.float()
    targets = [
        Target(f"layer {name}", name, family == "gpt2", settings(2, True))
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and (".h." in name or "albert_layers" in name)
    ]
    assert targets
    start = {t.name: quantize(t.weight(model), t.settings, "rtn") for t in targets}
    dense = copy.deepcopy(model)
    for target in targets:
        made = torch.from_numpy(dequantize(start[target.name]))
        dense.get_parameter(target.parameter).data = made.T.contiguous() if target.transposed else made
    ids = torch.arange(24).reshape(2, 12) % 60
    with torch.no_grad():
        wanted, without = dense(input_ids=ids)[0], model(input_ids=ids)[0]
        for train_codes in (False, True):
            student = Student(model, targets, start, train_codes=train_codes)
            found = student.model(input_ids=ids)[0]
            # Relative rounding errors of the weights, 8 ulps at most, go through two blocks of matrices; what
            # quantising changes is larger by orders.
            assert float((found - wanted).norm() / wanted.norm()) < 2 * 8 * 8 * EPS
            assert float((found - without).norm() / wanted.norm()) > 1e-3
    assert len(student.blocks()) == (1 if family == "albert" else 2)


def test_negative_scales_are_turned_around() -> None:
    weight = matrix(6, 40)
    start = quantize(weight, settings(3, True, scale_dtype="float32"))
    state = to_codes(start, "cpu")
    generator = torch.Generator().manual_seed(4)
    scales = state.scales * torch.where(torch.rand(state.scales.shape, generator=generator) < 0.5, -1.0, 1.0)
    stored = to_quantized(Codes(state.codes, scales, state.offset, 32), start, weight)
    assert bool((scales < 0).any()) and (stored.scales >= 0).all()
    group = torch.arange(40) // 32
    signs = (state.codes.unsqueeze(-1) >> torch.arange(3) & 1).double() * 2 - 1
    exact = (signs * scales.double()[:, group]).sum(-1) + state.offset.double()[:, group]
    assert (np.abs(dequantize(stored) - exact.numpy()) <= bound(stored)).all()


def test_blocks_are_told_by_the_first_number_in_a_name() -> None:
    assert block_of("model.layers.3.mlp.experts.7.up_proj.weight") == "model.layers.3"
    assert block_of("lm_head.weight") == "lm_head"
