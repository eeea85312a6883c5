"""K-FAC against dense Gauss-Newton matrices, in double precision."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hessfree import CG, KFAC, GaussNewton
from hessfree.preconditioners import Sample
from tests.preconditioners.oracles import Loss, block_places, dense, exact_factors, full, gauss_newton, sample_of

DOUBLE = torch.float64
EXACT = KFAC(factors="exact")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def mlp(*widths: int, bias: bool = True, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, o in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(i, o, bias=bias, dtype=DOUBLE), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def mean_square(z: Tensor) -> Tensor:
    return F.mse_loss(z, torch.ones_like(z))


def cross_entropy(z: Tensor) -> Tensor:
    classes = torch.arange(z[..., 0].numel()) % z.shape[-1]
    return F.cross_entropy(z.reshape(-1, z.shape[-1]), classes)


def by_hand(z: Tensor) -> Tensor:
    """Every sample with a dense block of its own."""
    return ((z.sum(-1) ** 2).exp() + z.sin().square().sum(-1) + 2 * z.square().sum(-1)).mean()


LOSSES = {"mean square": mean_square, "cross-entropy": cross_entropy, "by hand": by_hand}


def learn(sample: Sample, preconditioner: KFAC = EXACT) -> dict[str, Any]:
    state, warning = preconditioner.update({}, sample, 1)
    assert warning is None
    return state


def close(found: Tensor, expected: Tensor, relative: float = 1e-10) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).norm()) <= relative * float(expected.norm())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 3), (1, 1, 1, 3)], ids=str)
def test_exact_factors_are_the_block_of_one_sample(shape: tuple[int, ...], bias: bool, loss: str) -> None:
    model, x = mlp(3, 4, 5, bias=bias), randn(*shape, seed=1)
    sample = sample_of(model, x, LOSSES[loss])
    state, expected = learn(sample), gauss_newton(model, x, LOSSES[loss])
    assert len(state["blocks"]) == 2 and state["diagonal"] == {}
    for block in state["blocks"]:
        assert (block["bias"] is not None) == bias
        places = block_places(block, sample.parameters)
        close(torch.kron(full(block["outer"]), block["inner"]), expected[places[:, None], places])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 3), (4, 2, 3)], ids=str)
def test_a_linear_net_under_mean_square_is_exact_for_any_number_of_samples(shape: tuple[int, ...], bias: bool) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4, bias=bias, dtype=DOUBLE)), randn(*shape, seed=2)
    sample = sample_of(model, x, mean_square)
    close(dense(learn(sample), sample.parameters), gauss_newton(model, x, mean_square))


class Twice(nn.Module):
    """One layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(3, 4, dtype=DOUBLE), nn.Linear(4, 4, dtype=DOUBLE)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(torch.tanh(self.first(x)))))


class Mixing(nn.Module):
    """Positions that look at each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4, dtype=DOUBLE), nn.Linear(4, 3, dtype=DOUBLE)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last((h @ h.mT).softmax(-1) @ h)


MODELS: dict[str, Any] = {
    "mlp": lambda: (mlp(3, 4, 4, 3), randn(6, 3, seed=3)),
    "no bias": lambda: (mlp(3, 4, 3, bias=False), randn(6, 3, seed=3)),
    "leading dimensions": lambda: (mlp(3, 4, 3), randn(4, 2, 3, seed=3)),
    "called twice": lambda: (Twice(), randn(5, 3, seed=3)),
    "mixing": lambda: (Mixing(), randn(3, 4, 3, seed=3)),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", MODELS)
def test_exact_factors_of_many_rows(name: str, loss: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name]()
    sample = sample_of(model, x, LOSSES[loss])
    expected = exact_factors(model, x, LOSSES[loss])
    blocks = learn(sample)["blocks"]
    assert len(blocks) == len(expected)
    for block in blocks:
        factors = expected[id(sample.parameters.params[block["weight"]])]
        close(block["inner"], factors.inner)
        close(full(block["outer"]), factors.outer)


def test_a_shared_bias_belongs_to_the_first_weight() -> None:
    model, x = mlp(3, 3, 3), randn(5, 3, seed=4)
    model[2].bias = model[0].bias
    sample = sample_of(model, x, by_hand)
    first, second = learn(sample)["blocks"]
    index = sample.parameters.index_of(model[0].bias)
    assert (first["bias"], second["bias"]) == (index, None)
    assert first["inner"].shape == (4, 4) and second["inner"].shape == (3, 3)
    expected = exact_factors(model, x, by_hand)
    close(first["inner"], expected[id(model[0].weight)].inner)
    close(second["inner"], expected[id(model[2].weight)].inner[:-1, :-1])
    close(full(second["outer"]), expected[id(model[2].weight)].outer)


def test_a_shared_weight_with_two_biases() -> None:
    model, x = mlp(3, 3, 3), randn(5, 3, seed=5)
    model[2].weight = model[0].weight
    sample = sample_of(model, x, by_hand)
    state = learn(sample)
    (block,) = state["blocks"]
    expected = exact_factors(model, x, by_hand)[id(model[0].weight)]
    close(full(block["outer"]), expected.outer)  # of both calls
    expected.rows[1][:, -1] = 0  # the second call does not use the first's bias
    close(block["inner"], expected.inner)
    assert set(state["diagonal"]) == {sample.parameters.index_of(model[2].bias)}


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_frozen_half_of_a_layer(frozen: str) -> None:
    model, x = mlp(3, 4, 2), randn(1, 3, seed=6)
    getattr(model[0], frozen).requires_grad_(False)
    sample = sample_of(model, x, by_hand)
    state, expected = learn(sample), gauss_newton(model, x, by_hand)
    if frozen == "bias":
        block = state["blocks"][0]
        places = block_places(block, sample.parameters)
        assert block["bias"] is None and state["diagonal"] == {}
        close(torch.kron(full(block["outer"]), block["inner"]), expected[places[:, None], places])
    else:
        assert [b["weight"] for b in state["blocks"]] == [1] and set(state["diagonal"]) == {0}
        close(state["diagonal"][0], expected.diagonal()[:4])  # one sample: no sign matters


def test_input_by_keyword() -> None:
    layer = nn.Linear(3, 2, dtype=DOUBLE)
    sample = sample_of(layer, {"input": randn(1, 3)}, mean_square)
    (block,) = learn(sample)["blocks"]
    expected = gauss_newton(layer, randn(1, 3), mean_square)
    close(torch.kron(full(block["outer"]), block["inner"]).trace(), expected.trace())


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, dtype=DOUBLE)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(input=x)


def test_a_layer_whose_input_was_not_recorded_has_the_diagonal_at_least() -> None:
    sample = sample_of(ByKeyword(), randn(1, 3), mean_square)
    state = learn(sample)
    assert [b["weight"] for b in state["blocks"]] == [0] or set(state["diagonal"]) == {0, 1}


def draw(sample: Sample, count: int, factors: str) -> list[dict[str, Any]]:
    preconditioner = KFAC(factors=factors)  # type: ignore[arg-type]
    return [learn(dataclasses.replace(sample, seed=seed), preconditioner) for seed in range(count)]


def test_without_a_batch_dimension_the_outputs_count_as_samples() -> None:
    model, x = mlp(3, 4, 5), randn(3, seed=1)
    sample = sample_of(model, x, mean_square)
    expected = exact_factors(model, x, mean_square)
    states = draw(sample, 300, "exact")
    for i, block in enumerate(states[0]["blocks"]):
        factors = expected[id(sample.parameters.params[block["weight"]])]
        unbiased([full(state["blocks"][i]["outer"]) for state in states], factors.outer)


def unbiased(draws: list[Tensor], expected: Tensor) -> None:
    """The mean of the draws is within five standard errors of what is expected, entry by entry."""
    stacked = torch.stack(draws)
    error = (stacked.mean(0) - expected).abs()
    assert bool((error <= 5 * stacked.std(0) / len(draws) ** 0.5 + 1e-12 * expected.abs().max()).all())
    assert float(error.norm()) <= 0.3 * float(expected.norm())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["mlp", "leading dimensions", "called twice", "mixing"])
def test_sampled_factors_are_the_exact_ones_on_average(name: str, loss: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name]()
    sample = sample_of(model, x, LOSSES[loss])
    expected = exact_factors(model, x, LOSSES[loss])
    states = draw(sample, 300, "sampled")
    for i, block in enumerate(states[0]["blocks"]):
        factors = expected[id(sample.parameters.params[block["weight"]])]
        unbiased([full(state["blocks"][i]["outer"]) for state in states], factors.outer)
        close(block["inner"], factors.inner)


class Scaled(nn.Module):
    """A parameter of no Linear layer, that every sample shares."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(randn(3, seed=7))
        self.layer = nn.Linear(3, 3, dtype=DOUBLE)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.scale * x))


@pytest.mark.parametrize("factors", ["sampled", "exact"])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_diagonal_of_other_parameters_on_average(loss: str, factors: str) -> None:
    torch.manual_seed(0)
    model, x = Scaled(), randn(6, 3, seed=8)
    sample = sample_of(model, x, LOSSES[loss])
    expected = gauss_newton(model, x, LOSSES[loss]).diagonal()[:3]
    draws = [state["diagonal"][0] for state in draw(sample, 400, factors)]
    unbiased(draws, expected)


def coupled(z: Tensor) -> Tensor:
    """A loss that no sample has to itself."""
    return (z.mean(0) ** 2).sum() + (z.flatten() @ z.flatten().roll(1)) ** 2 + z.square().mean()


def test_the_empirical_fisher_where_the_loss_has_no_structure() -> None:
    model, x = mlp(3, 4, 2), randn(5, 3, seed=9)
    sample = sample_of(model, x, coupled)
    assert sample.hessian.form is None
    for preconditioner in (KFAC(), EXACT):
        state, warning = preconditioner.update({}, sample, 1)
        assert warning is not None and "empirical Fisher" in warning and "output gradients" in warning
        z = model(x)
        (g,) = torch.autograd.grad(coupled(z), z)
        s = (g @ model[2].weight) * (1 - model[1](model[0](x)) ** 2)  # at the output of the first layer
        close(full(state["blocks"][1]["outer"]), 5 * g.T @ g)
        close(full(state["blocks"][0]["outer"]), (5 * s.T @ s).detach())


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.a, self.b = (nn.Linear(3, n, dtype=DOUBLE) for n in (3, 2, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.layer(x)
        return self.a(h), self.b(h)


def test_the_empirical_fisher_keeps_the_outputs_of_a_sample_together() -> None:
    torch.manual_seed(0)
    model, x = TwoHeads(), randn(5, 3, seed=10)

    def loss(z: tuple[Tensor, Tensor]) -> Tensor:
        return coupled(torch.cat(z, 1))

    sample = sample_of(model, x, loss)  # type: ignore[arg-type]
    state, warning = KFAC().update({}, sample, 1)
    assert warning is not None
    h = model.layer(x).detach().requires_grad_()
    (s,) = torch.autograd.grad(loss((model.a(h), model.b(h))), h)
    close(full(state["blocks"][0]["outer"]), 5 * s.T @ s)


def test_factors_are_averaged_plainly_at_first_and_then_exponentially() -> None:
    model = mlp(3, 4, 2)
    samples = [sample_of(model, randn(5, 3, seed=20 + k), by_hand) for k in range(6)]
    alone = [learn(sample) for sample in samples]
    for decay, weights in ((0.75, [1, 1, 1, 1, 4 / 3, 16 / 9]), (0.0, [0, 0, 0, 0, 0, 1])):
        preconditioner, state = KFAC(factors="exact", decay=decay), {}
        for k, sample in enumerate(samples):
            state, _ = preconditioner.update(state, sample, 10 + k)
        assert (state["updates"], state["step"]) == (6, 15)
        share = torch.tensor(weights, dtype=DOUBLE) / sum(weights)
        for i, block in enumerate(state["blocks"]):
            for name in ("inner", "outer"):
                expected = sum(w * full(s["blocks"][i][name]) for w, s in zip(share, alone, strict=True))
                close(block[name], expected)
            basis, other = block["outer_basis"], block["inner_basis"]
            both, matrix = torch.kron(basis, other), torch.kron(full(block["outer"]), block["inner"])
            values = both.T @ matrix @ both
            close(values, torch.diag(block["spectrum"].reshape(-1)))


def mixed_state() -> tuple[Sample, dict[str, Any], nn.Module, Tensor]:
    torch.manual_seed(1)
    model, x = nn.Sequential(Scaled(), nn.Tanh(), nn.Linear(3, 2, bias=False, dtype=DOUBLE)), randn(8, 3, seed=11)
    sample = sample_of(model, x, by_hand)
    return sample, learn(sample), model, x


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


def bits(state: Any) -> Any:
    """Turn a state into something that compares bit for bit, with types, dtypes and strides."""
    if isinstance(state, Tensor):
        return (state.dtype, state.shape, state.stride(), state.contiguous().view(torch.uint8).tolist())
    if isinstance(state, dict):
        return {key: bits(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [bits(value) for value in state]
    return (type(state), state)


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


def test_the_same_seed_draws_the_same_factors() -> None:
    sample, _, _, _ = mixed_state()
    assert bits(learn(sample, KFAC())) == bits(learn(sample, KFAC()))
    assert bits(learn(sample, KFAC())) != bits(learn(dataclasses.replace(sample, seed=1), KFAC()))


def test_the_global_random_state_is_left_alone() -> None:
    sample, _, _, _ = mixed_state()
    before = torch.get_rng_state()
    learn(sample, KFAC())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("every", [1, 4])
def test_the_first_three_steps_and_every_nth_are_due(every: int) -> None:
    preconditioner, state, updated = KFAC(update_every=every), {}, []
    for step in range(1, 16):
        if preconditioner.due(state, step):
            updated.append(step)
            state = {"updates": len(updated), "step": step}
    assert updated == (list(range(1, 16)) if every == 1 else [1, 2, 3, 7, 11, 15])


class Aside(nn.Module):
    """A layer whose result is thrown away, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.lost, self.idle = (nn.Linear(3, 3, dtype=DOUBLE) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        self.lost(x)
        with torch.no_grad():
            self.idle(x)
        return self.layer(x)


def test_layers_off_the_path_to_the_outputs() -> None:
    torch.manual_seed(0)
    model = Aside()
    sample = sample_of(model, randn(4, 3), mean_square)
    state = learn(sample)
    weights = [model.lost.weight, model.layer.weight]  # in the order of the calls
    assert [b["weight"] for b in state["blocks"]] == [sample.parameters.index_of(w) for w in weights]
    assert torch.equal(full(state["blocks"][0]["outer"]), torch.zeros(3, 3, dtype=DOUBLE))
    assert set(state["diagonal"]) == {4, 5} and not any(bool(d.any()) for d in state["diagonal"].values())
    for shift in (0.0, 0.1):
        apply = EXACT.inverse(state, sample.parameters, 1.0, [shift] * 6)
        assert bool(torch.isfinite(apply(randn(sample.parameters.size))).all())


class Skipping(nn.Module):
    """A layer that rests in some batches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, dtype=DOUBLE), nn.Linear(3, 3, dtype=DOUBLE)
        self.rests = False

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) if self.rests else self.second(self.first(x))


def test_a_layer_that_rests_keeps_its_factors() -> None:
    torch.manual_seed(0)
    model, x = Skipping(), randn(4, 3)
    state = learn(sample_of(model, x, mean_square))
    model.rests = True
    later, _ = EXACT.update(state, sample_of(model, x, mean_square), 2)
    by_weight = {b["weight"]: b for b in later["blocks"]}
    assert set(by_weight) == {0, 2} and later["diagonal"] == {}
    assert bits(by_weight[2]) == bits(state["blocks"][1])
    assert bits(by_weight[0]) != bits(state["blocks"][0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_not_learned(bad: float) -> None:
    sample, state, model, x = mixed_state()
    x = x.clone()
    x[2, 1] = bad
    spoiled = sample_of(model, x, lambda z: mean_square(z[:2]) + mean_square(z))
    for before in (state, {}):
        after, warning = KFAC().update(before, spoiled, 9)
        assert after == before if before == {} else after is before
        assert warning is not None and "not finite" in warning


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


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("together", [True, False], ids=["weight and bias", "weight alone"])
@pytest.mark.parametrize("loss", ["mean square", "cross-entropy"])
def test_equals_the_kfac_of_curvlinops(loss: str, together: bool) -> None:
    curvlinops = pytest.importorskip("curvlinops")
    model, x = mlp(3, 4, 4, 3, bias=together), randn(6, 3, seed=15)
    target = torch.ones(6, 3, dtype=DOUBLE) if loss == "mean square" else torch.arange(6) % 3
    sample = sample_of(model, x, LOSSES[loss])
    theirs = curvlinops.KFACLinearOperator(
        model,
        nn.MSELoss() if loss == "mean square" else nn.CrossEntropyLoss(),
        [p for p in model.parameters() if p.requires_grad],
        [(x, target)],
        fisher_type="type-2",
        separate_weight_and_bias=False,
    )
    identity = torch.eye(sample.parameters.size, dtype=DOUBLE)
    close(dense(learn(sample), sample.parameters), torch.as_tensor(theirs @ identity), 1e-10)


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
        ({"update_every": 0}, "update_every=0 must be an integer, 1 or more"),
        ({"update_every": 2.5}, "update_every=2.5 must be"),
        ({"decay": 1.0}, "decay=1.0 must satisfy 0 <= decay < 1"),
        ({"decay": math.nan}, "decay=nan must"),
        ({"damping_scale": 0.0}, "damping_scale=0.0 must be positive and finite"),
        ({"damping_scale": math.inf}, "damping_scale=inf must be"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        KFAC(**settings)
