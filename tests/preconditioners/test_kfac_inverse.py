"""The inverse that K-FAC's factors stand for, what it does for conjugate gradients, its state and its settings."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hessfree import CG, KFAC, GaussNewton
from tests.preconditioners.kfac_cases import (
    DOUBLE,
    EXACT,
    Scaled,
    bits,
    by_hand,
    close,
    cross_entropy,
    learn,
    mean_square,
    mixed_state,
    mlp,
    randn,
)
from tests.preconditioners.oracles import Loss, dense, gauss_newton, sample_of


def columns(apply: Any, size: int) -> Tensor:
    return torch.stack([apply(unit) for unit in torch.eye(size, dtype=DOUBLE)], 1)


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("shifts", [(0.3, 0.3, 0.3, 0.3), (0.01, 0.5, 0.5, 2.0), (1e3, 1e-6, 1e-6, 1.0)], ids=str)
def test_the_inverse_is_that_of_the_damped_matrix(shifts: tuple[float, ...], scale: float) -> None:
    sample, state, _, _ = mixed_state()
    apply = KFAC(damping_scale=0.2).inverse(state, sample.parameters, scale, shifts)
    damping = sample.parameters.uniform_or_vector(shifts) * torch.ones(sample.parameters.size, dtype=DOUBLE)
    expected = torch.linalg.inv(scale * dense(state, sample.parameters) + 0.2 * torch.diag(damping))
    found = columns(apply, sample.parameters.size)
    close(found, expected, 1e-9)


def test_a_block_takes_the_damping_of_its_weight() -> None:
    sample, state, _, _ = mixed_state()
    first = columns(EXACT.inverse(state, sample.parameters, 1.0, (0.1, 0.5, 9.0, 0.2)), sample.parameters.size)
    second = columns(EXACT.inverse(state, sample.parameters, 1.0, (0.1, 0.5, 0.5, 0.2)), sample.parameters.size)
    assert torch.equal(first, second)


def test_without_anything_learned_there_is_no_preconditioner() -> None:
    sample, _, _, _ = mixed_state()
    assert KFAC().inverse({}, sample.parameters, 1.0, [0.1] * 4) is None
    assert KFAC().describe({}) == "none yet"


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("case", ["singular", "no curvature", "one direction tiny"])
def test_without_damping_singular_factors_stay_finite_and_positive(case: str, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(Scaled(), nn.Linear(3, 2, dtype=DOUBLE)).to(dtype)
    x = randn(2, 3, seed=12).to(dtype)
    if case == "singular":
        x[:, 1] = 0
    elif case == "one direction tiny":
        x[:, 1] *= 1e-20
    loss = (lambda z: 0 * mean_square(z) + 0 * z.square().sum()) if case == "no curvature" else mean_square
    sample = sample_of(model, x, loss)
    state, _ = EXACT.update({}, sample, 1)
    apply = EXACT.inverse(state, sample.parameters, 1.0, [0.0] * len(sample.parameters.params))
    found = torch.stack([apply(unit) for unit in torch.eye(sample.parameters.size, dtype=dtype)], 1)
    assert bool(torch.isfinite(found).all())
    values = torch.linalg.eigvalsh(0.5 * (found + found.T).double())
    assert float(values.min()) >= -1e-6 * float(values.max())
    if case == "no curvature":
        torch.testing.assert_close(found, torch.eye(sample.parameters.size, dtype=dtype))


def test_a_state_is_never_changed() -> None:
    sample, state, model, x = mixed_state()
    before = bits(copy.deepcopy(state))
    after, _ = KFAC().update(state, sample_of(model, -2 * x, by_hand, seed=5), 7)
    EXACT.inverse(after, sample.parameters, 1.0, [0.1] * 4)(randn(sample.parameters.size))
    EXACT.inverse(state, sample.parameters, 1.0, [0.1] * 4)(randn(sample.parameters.size))
    assert bits(state) == before and bits(after) != before


def test_a_state_goes_through_disk_bit_for_bit() -> None:
    _, state, model, x = mixed_state()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert bits(loaded) == bits(state)
    again = sample_of(model, -2 * x, by_hand, seed=5)
    assert bits(KFAC().update(loaded, again, 7)[0]) == bits(KFAC().update(state, again, 7)[0])


def test_parameters_of_half_precision_have_factors_of_single_precision() -> None:
    torch.manual_seed(0)
    model = mlp(3, 4, 2).to(torch.bfloat16)
    sample = sample_of(model, randn(6, 3).to(torch.bfloat16), mean_square)
    state = learn(sample, KFAC())
    assert all(b[name].dtype == torch.float32 for b in state["blocks"] for name in ("inner", "outer", "spectrum"))
    apply = KFAC().inverse(state, sample.parameters, 1.0, [0.1] * 4)
    out = apply(torch.ones(sample.parameters.size))
    assert out.dtype == torch.float32 and bool(torch.isfinite(out).all())


@pytest.mark.parametrize("name", ["noisy targets", "cross-entropy"])
def test_conjugate_gradients_reach_the_same_solution_and_are_near_it_earlier(name: str) -> None:
    model, x, targets, shift = mlp(20, 12, 12, 3), randn(256, 20, seed=13), randn(256, 3, seed=14), 1e-3
    loss: Loss = cross_entropy if name == "cross-entropy" else lambda z: F.mse_loss(z, targets)
    sample = sample_of(model, x, loss)
    params = sample.parameters
    operator = GaussNewton.from_loss(model, lambda z, _: loss(z), x, None)
    rhs = -params.flatten(torch.autograd.grad(loss(model(x)), params.params))
    matrix = gauss_newton(model, x, loss) + shift * torch.eye(params.size, dtype=DOUBLE)
    apply = KFAC(damping_scale=1.0).inverse(learn(sample), params, 1.0, [shift] * 6)
    assert apply is not None
    for precondition in (None, apply):
        solution = CG(max_iterations=3000, tolerance=1e-12).solve(operator, rhs, shift, precondition)
        close(solution.value, torch.linalg.solve(matrix, rhs), 1e-8)
    # The first iterations are what an optimizer pays for. (To many digits K-FAC may take more of them: what it
    # knows nothing of, the correlation of layers, becomes a few very large eigenvalues.)
    near = CG(max_iterations=3000, tolerance=0.1)
    plain, better = (near.solve(operator, rhs, shift, m).iterations for m in (None, apply))
    assert better <= 0.5 * plain, (better, plain)
    inverse = columns(apply, params.size)
    close(inverse, inverse.T, 1e-12)
    assert float(torch.linalg.eigvalsh(0.5 * (inverse + inverse.T)).min()) > 0


def test_what_a_report_says() -> None:
    _, state, _, _ = mixed_state()
    assert EXACT.describe(state) == "K-FAC of 2 layers (exact factors), diagonal of 1 other parameter"
    alone = {"blocks": state["blocks"][:1], "diagonal": {}, "declined": []}
    assert KFAC().describe(alone) == "K-FAC of 1 layer (sampled factors)"
    assert nn.Linear in KFAC().taps


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"factors": "empirical"}, "factors='empirical' must be 'sampled' or 'exact'"),
        ({"wide": 4, "rank": 8}, "wide=4 and rank=8 must be integers with 1 <= rank <= wide"),
        ({"decay": math.nan}, "decay=nan must satisfy 0 <= decay < 1"),
        ({"damping_scale": math.inf}, "damping_scale=inf must be"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        KFAC(**settings)
