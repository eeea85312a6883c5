"""Two processes take the step that one process takes on the mean of their losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hessfree import HessianFree
from tests.distributed import pair
from tests.distributed.checks import PRECONDITIONERS, SHARDED, TENSOR_PARALLEL
from tests.distributed.failures import FAILURES
from tests.distributed.training import PINNED, alone, batches, difference, network, same_bits, state_of

Both = tuple[Any, Any]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Both]:
    folder: Path = tmp_path_factory.mktemp("pair")
    return pair.run("tests.distributed.checks", folder)


def both(found: dict[str, Both], name: str) -> Both:
    for rank, result in enumerate(found[name]):
        assert not isinstance(result, pair.Failed), f"rank {rank}: {result.words}"
        assert result is not None, f"rank {rank} never came to it"
    return found[name]


def test_twenty_pinned_steps_are_those_of_one_process(found: dict[str, Both]) -> None:
    first, second = both(found, "pinned")
    assert same_bits(first, second)
    assert difference(first, alone(network(), batches(40, 24), 20, **PINNED)) <= 1e-10


@pytest.mark.parametrize("name", ["defaults", "recipes", "preconditioners", "resumed"])
def test_ranks_are_equal_bit_for_bit(found: dict[str, Both], name: str) -> None:
    first, second = both(found, name)
    assert same_bits(first, second)


@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_preconditioners_are_those_of_one_process(found: dict[str, Both], name: str) -> None:
    state = both(found, "preconditioners")[0][name]
    # Woodbury takes its 20 samples from both ranks, where one process takes the first 20
    joined = [
        tuple(torch.cat([*(t[:10] for t in p), *(t[10:] for t in p)]) for p in zip(*batches(32, 32), strict=True))
    ]
    if name == "kfac":
        joined = [tuple(torch.cat(p) for p in zip(*batches(32, 32), strict=True))]
    reference = alone(network(), joined, 6, preconditioner=PRECONDITIONERS[name], linearization="graph")
    assert difference(state, reference) <= 1e-8
    assert state["damping"] == state_of(reference)["damping"]


@pytest.mark.parametrize("case", range(len(SHARDED)))
def test_vectors_in_parts_give_the_same_step(found: dict[str, Both], case: int) -> None:
    first, second = both(found, "sharded")
    assert same_bits(first[case], second[case])
    make, settings = SHARDED[case]
    joined = [tuple(torch.cat(p) for p in zip(*batches(32, 32), strict=True))]
    assert difference(first[case], alone(make(), joined, 5, **settings)) <= 1e-10


def test_bytes_are_those_derived(found: dict[str, Both]) -> None:
    first, second = both(found, "traffic")
    assert first == second
    numbers = sum(p.numel() for p in network().parameters())
    status = 8 * 8
    for sent, iterations in first["pinned"][1:]:
        # before forward and backward, with the loss, two at the set-up, after the solve, at the replay
        assert sent == 7 * status + 8 * iterations * numbers
    for sent, iterations in first["sharded"][1:]:
        products = iterations * (numbers // 2 + numbers + 6)  # gather p, scatter Gp, inner products
        assert sent == 7 * status + 8 * (products + 3 + numbers)  # and gather x and r
    assert first["defaults"][6] == (6 * status + 4 * 3 * numbers, 3)
    factors = 4**2 + 17**2 + 17**2 + 16**2 + 16**2 + 2 + 3  # A of each layer, S (of the last its diagonal), rows
    assert first["defaults"][7] == (10 * status + 4 * (3 * numbers + factors), 3)


def test_tensor_parallel_steps_are_those_of_one_process(found: dict[str, Both]) -> None:
    (first, refused), (second, _) = both(found, "tensor_parallel")
    assert same_bits(first, second)
    for state, settings in zip(first, TENSOR_PARALLEL, strict=True):
        assert state["backend"] == "graph"
        settings = settings | {"linearization": "graph", "weight_decay": 0.01}
        assert difference(state, alone(network(), batches(40), 5, **settings)) <= 1e-10
    assert len(refused) == 2 and "Identity()" in refused[0] and "choose 'graph'" in refused[1]


def test_fully_sharded_modules_are_refused(found: dict[str, Both]) -> None:
    for words, stayed, nothing in both(found, "fully_sharded"):
        assert "fully_shard" in words and "DistributedDataParallel" in words and stayed
        assert all(nothing)  # else torch has learned it, and the refusal can go


def test_settings_of_the_wrapper_change_nothing(found: dict[str, Both]) -> None:
    first, second = both(found, "wrappers")
    assert same_bits(first, second)
    for state in first[1:]:
        assert same_bits(state["parameters"], first[0]["parameters"])


def test_buffers_are_those_of_one_forward_pass(found: dict[str, Both]) -> None:
    (first, state), (second, other) = both(found, "buffers")
    assert first == second == [True] * 3
    assert state["evaluations"] == 1 and same_bits(state, other)


def test_batch_norm_over_ranks_is_refused(found: dict[str, Both]) -> None:
    for words in both(found, "mixed_samples"):
        assert "SyncBatchNorm mixes samples of 2 ranks" in words


def test_a_group_without_a_wrapper(found: dict[str, Both]) -> None:
    first, second = both(found, "plain_group")
    assert same_bits(first, second)
    reference = alone(network(), batches(40, 24), 5, **PINNED)
    for state in first:
        assert difference(state, reference) <= 1e-10


def test_accumulated_micro_batches(found: dict[str, Both]) -> None:
    first, second = both(found, "accumulated")
    assert same_bits(first, second)
    parts = [(x[i : i + len(x) // 2], y[i : i + len(y) // 2]) for x, y in batches(40, 24) for i in (0, len(x) // 2)]
    model = network()
    optimizer = HessianFree(model.parameters(), **PINNED)
    for _ in range(5):
        optimizer.zero_grad()
        (sum(F.mse_loss(model(x), y) for x, y in parts[::2]) / 4).backward()

        def closure() -> torch.Tensor:
            loss = sum(F.mse_loss(model(x), y) for x, y in parts[1::2]) / 4
            loss.backward()
            return loss

        optimizer.step(closure)
    assert difference(first, optimizer) <= 1e-10
    assert optimizer.last_step is not None
    assert first["ratio"] == pytest.approx(optimizer.last_step.reduction_ratio, rel=1e-6)


def test_a_resumed_run_is_an_unbroken_one(found: dict[str, Both]) -> None:
    whole, resumed = both(found, "resumed")[0]
    assert same_bits(whole["parameters"], resumed["parameters"])
    assert same_bits(whole["state"], resumed["state"])


@pytest.mark.parametrize("name", FAILURES)
def test_trouble_on_one_rank_is_trouble_on_all(found: dict[str, Both], name: str) -> None:
    (here, state), (there, other) = both(found, name)
    assert same_bits(state, other)  # steps before and after it were taken by both
    for healthy, ill in zip(here, there, strict=True):
        assert healthy["stayed"] and ill["stayed"]
        if name == "nan":
            assert not healthy["raised"] and healthy["status"] == ill["status"] == "rejected: the loss is nan"
        else:
            assert ill["raised"].startswith("Trouble: ")
            assert healthy["raised"].startswith("RankError: rank 1 of 2 failed") and ill["raised"] in healthy["raised"]


def test_a_closure_that_translates_errors_is_told_once(found: dict[str, Both]) -> None:
    (here, state), (there, other) = both(found, "translated")
    assert same_bits(state, other)
    for wrong, right in (here, there):
        assert wrong["stayed"] and wrong["raised"] == "ValueError: translated"
        assert right["raised"] == "" and right["status"] == "accepted"


def test_a_fallback_on_one_rank_is_a_fallback_on_all(found: dict[str, Both]) -> None:
    first, second = both(found, "fallback")
    assert first["backend"] == second["backend"] == "graph"
    assert same_bits(first, second)


def test_ranks_that_nothing_joins_are_an_error(found: dict[str, Both]) -> None:
    for result in both(found, "no_wrapper"):
        assert result["stayed"] and "process_group=torch.distributed.group.WORLD" in result["raised"]


def test_gradients_that_differ_are_an_error(found: dict[str, Both]) -> None:
    for wrong, right in both(found, "not_averaged"):
        assert wrong["stayed"] and "the norm of the gradient differs between the ranks" in wrong["raised"]
        assert right["raised"] == "" and right["status"] == "accepted"
