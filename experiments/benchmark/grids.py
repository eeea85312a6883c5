"""The settings that each contender may try on a problem, by what the problem is like and not by its name."""

import itertools
from collections.abc import Sequence
from typing import Any

from experiments.problems import Problem

Changes = dict[str, Any]  # settings by name, where they differ from the defaults for a problem

TRIALS = 8  # settings that each contender may try on each problem: as many for ours as for the rivals
_HIGH_LOSS = 100.0  # at initial weights: the problem of a sum over pixels, or of second derivatives


def _product(**values: Sequence[Any]) -> list[Changes]:
    """Combine the values of several settings, the last named running fastest."""
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def _around(centre: Changes, *others: Changes) -> list[Changes]:
    """List a best guess, and what differs from it in a setting or two."""
    return [centre, *(centre | changes for changes in others)]


def _classifies(problem: Problem) -> bool:
    """Whether the outputs are classes: the velocities of a flow are as many as its coordinates."""
    return problem.rows is None and problem.outputs != problem.dim


def adam(problem: Problem) -> list[Changes]:
    """Rates a factor of three apart around the best known, and two batches.

    Args:
        problem: What is to be solved.

    Returns:
        `TRIALS` changes, the best guess first.
    """
    if _repeats_points(problem):
        return _few_and_many(problem, 3e-2, 1e-2, 1e-1)
    return _product(lr=_adam_rates(problem), batch_size=_first_order_batches(problem))


def _few_and_many(problem: Problem, best: float, second: float, third: float) -> list[Changes]:
    """On fixed points of the plane steps are cheap, and the best batch is far from the whole: four are tried."""
    assert problem.rows is not None
    few = problem.rows // 16
    return _around(
        {"lr": best, "batch_size": 4 * few},
        {"lr": second},
        {"lr": third},
        {"batch_size": few},
        {"lr": second, "batch_size": few},
        {"lr": third, "batch_size": few},
        {"lr": second, "batch_size": few // 4},
        {"batch_size": problem.rows},
    )


def _repeats_points(problem: Problem) -> bool:
    """Whether a flow is matched to fixed rows in the plane."""
    return problem.rows is not None and problem.dim == 2 and problem.outputs > 1


def _adam_rates(problem: Problem) -> tuple[float, float, float, float]:
    if problem.first_loss > _HIGH_LOSS:
        return 1e-2, 3e-3, 3e-2, 1e-3
    if _classifies(problem):
        return (3e-2, 1e-2, 1e-1, 3e-3)
    return (1e-2, 3e-2, 1e-1, 3e-3) if problem.dim == 2 else (1e-2, 3e-3, 3e-2, 1e-3)


def adamw(problem: Problem) -> list[Changes]:
    """Adam's rates and batches, and steps of constant length.

    Args:
        problem: What is to be solved.

    Returns:
        `TRIALS` changes, the best guess first.
    """
    return _scheduled(_adam_rates(problem), _first_order_batches(problem))


def muon(problem: Problem) -> list[Changes]:
    """Adam's rates, for its steps are scaled to Adam's.

    Args:
        problem: What is to be solved.

    Returns:
        `TRIALS` changes, the best guess first.
    """
    return _scheduled(_adam_rates(problem), _first_order_batches(problem))


def shampoo(problem: Problem) -> list[Changes]:
    """Rates like Adam's, for its steps have RMSProp's length; best known are those after a warm-up.

    Args:
        problem: What is to be solved.

    Returns:
        `TRIALS` changes, the best guess first.
    """
    return _scheduled((1e-2, 3e-2, 3e-3, 1e-1), _first_order_batches(problem))


def sgd(problem: Problem) -> list[Changes]:
    """Rates that the curvature allows: a loss that is high at the start is steep.

    Args:
        problem: What is to be solved.

    Returns:
        `TRIALS` changes, the best guess first.
    """
    if problem.first_loss > _HIGH_LOSS:
        rates = (1e-4, 3e-4, 3e-5, 1e-5)
    elif _classifies(problem):
        rates = (1e-1, 3e-1, 3e-2, 1.0)
    else:
        rates = (1e-2, 3e-2, 3e-3, 1e-3) if problem.dim == 2 else (3e-2, 1e-1, 1e-2, 3e-1)
    return _scheduled(rates, _first_order_batches(problem))


def _scheduled(rates: Sequence[float], batches: Sequence[int]) -> list[Changes]:
    """Eight of the rates, the two batches and the two schedules; `final_length` 0 is a cosine, 1 a constant step."""
    best, second, third, fourth = rates
    few, many = batches
    return _around(
        {"lr": best, "batch_size": few, "final_length": 0.0},
        {"lr": second},
        {"final_length": 1.0},
        {"lr": third},
        {"batch_size": many},
        {"lr": second, "batch_size": many},
        {"lr": third, "final_length": 1.0},
        {"lr": fourth},
    )


def soap(problem: Problem) -> list[Changes]:
    """Adam's batches; its rotated steps bear, and want, higher rates.

    Args:
        problem: What is to be solved.

    Returns:
        `TRIALS` changes, the best guess first.
    """
    if problem.rows is None and problem.dim == 2:  # its steps are dear beside its rows: the batch is worth a trial
        return _around(
            {"lr": 3e-2, "batch_size": 2048},
            {"lr": 1e-2},
            {"lr": 1e-1},
            {"batch_size": 1024},
            {"batch_size": 4096},
            {"lr": 1e-2, "batch_size": 1024},
            {"lr": 1e-1, "batch_size": 4096},
            {"batch_size": 512},
        )
    if _repeats_points(problem):
        return _few_and_many(problem, 3e-2, 1e-2, 1e-1)
    rates = (3e-2, 1e-2, 1e-1, 3e-3) if _classifies(problem) else (1e-2, 3e-3, 3e-2, 1e-1)
    return _product(lr=rates, batch_size=_first_order_batches(problem))


def _first_order_batches(problem: Problem) -> tuple[int, int]:
    """Give two batches, the likelier first; in hundreds of dimensions steps are dear, and batches small."""
    if problem.rows is not None:
        if problem.dim > 64:
            return 256, 64
        # the residuals of an equation are few, and all of them serve best
        return (problem.rows, problem.rows // 4) if problem.outputs == 1 else (problem.rows // 4, problem.rows // 16)
    if problem.dim == 2:
        return 1024, 4096
    return (256, 1024) if problem.dim <= 64 else (256, 512)


def hessian_free(problem: Problem) -> list[Changes]:
    """On fixed rows the start and fall of λ, and the preconditioner's cost; else what trades noise for speed.

    Args:
        problem: What is to be solved.

    Returns:
        `TRIALS` changes, the best guess first.
    """
    if problem.rows is not None and problem.outputs == 1:
        return _product(omega=(2 / 3, 0.5), update_every=(3, 2, 5, 1))
    if problem.rows is not None and problem.first_loss > _HIGH_LOSS:
        return _around(
            {"damping": 150.0, "omega": 0.5, "minimum_damping": 1e-5, "curvature_batch": 512},
            {"damping": 30.0},
            {"damping": 500.0},
            {"omega": 2 / 3},
            {"minimum_damping": 1e-4},
            {"minimum_damping": 1e-6},
            {"curvature_batch": 750},
            {"curvature_batch": 256},
        )
    if problem.rows is not None:
        return _around(
            {"samples": 256, "weight": 0.1, "update_every": 10},
            {"samples": 128},
            {"samples": 512},
            {"weight": 0.3},
            {"update_every": 20},
            {"samples": 512, "update_every": 20},
            {"weight": 0.3, "update_every": 20},
            {"samples": 512, "weight": 0.3, "update_every": 20},
        )
    if problem.dim == 2:
        return _product(omega=(0.8, 0.9), minimum_damping=(1e-3, 1e-5), batch_size=(8192, 4096))
    if _classifies(problem):  # the loss falls to a fiftieth, and steps of few rows are cheap
        return _around(
            {"minimum_damping": 1e-6, "omega": 0.8, "batch_size": 1024},
            {"batch_size": 512},
            {"batch_size": 512, "damping": 0.03},
            {"batch_size": 512, "omega": 0.9},
            {"batch_size": 512, "test_every": 20},
            {"batch_size": 256},
            {"batch_size": 512, "minimum_damping": 1e-4},
            {"batch_size": 2048},
        )
    if problem.dim <= 64:
        return _product(minimum_damping=(1e-6, 1e-4), omega=(0.8, 0.9), batch_size=(1024, 2048))
    return _around(
        {"batch_size": 512, "power": 0.5, "every": 4, "curvature_batch": 64},
        {"power": 1.0},
        {"power": 1.0, "curvature_batch": 256},
        {"power": 1.0, "curvature_batch": 512},
        {"power": 1.0, "batch_size": 1024},
        {"batch_size": 256, "every": 8},
        {"batch_size": 256, "every": 16},
        {"every": 1},
    )


def kfac(problem: Problem) -> list[Changes]:
    """High rates, held back by a bound on the step.

    Args:
        problem: What is to be solved.

    Returns:
        `TRIALS` changes, the best guess first.
    """
    if problem.rows is None and problem.dim > 64:
        return _product(batch_size=(512, 1024), largest_step=(1e-1, 3e-1), lr=(2.0, 4.0))
    return _around(
        {"batch_size": 512, "largest_step": 1e-1, "lr": 2.0},
        {"batch_size": 1024},
        {"lr": 0.5},
        {"largest_step": 1e-2},
        {"batch_size": 1024, "lr": 0.5},
        {"batch_size": 256},
        {"largest_step": 1e-2, "lr": 0.5},
        {"largest_step": 3e-1},
    )


def lbfgs(problem: Problem) -> list[Changes]:
    """The line search's first trial length, and how much is remembered.

    Args:
        problem: What is to be solved.

    Returns:
        `TRIALS` changes, the best guess first.
    """
    return _product(lr=(1.0, 0.5), history=(100, 300, 30, 1000))


def gram(problem: Problem) -> list[Changes]:
    """The floor under the damping, which a few rows of curvature hang on, and how many they are.

    Args:
        problem: What is to be solved.

    Returns:
        `TRIALS` changes, the best guess first.
    """
    rows = max(1, 512 // problem.outputs)
    return _around(
        {"minimum_damping": 1e-2, "batch_size": 1024, "curvature_batch": rows},
        {"minimum_damping": 1e-3},
        {"minimum_damping": 1e-1},
        {"curvature_batch": 2 * rows},
        {"batch_size": 512, "curvature_batch": rows},
        {"minimum_damping": 1e-3, "curvature_batch": 2 * rows},
        {"minimum_damping": 1e-1, "batch_size": 512},
        {"minimum_damping": 1e-3, "batch_size": 512},
    )


def dense_fisher(problem: Problem) -> list[Changes]:
    """The rows, on which the time of a step depends, and where the damping starts.

    Args:
        problem: What is to be solved.

    Returns:
        `TRIALS` changes, the best guess first.
    """
    rows = 256 if problem.dim == 2 else 32
    return _around(
        {"batch_size": rows, "damping": 0.3, "final_length": 0.0},
        {"damping": 0.03},
        {"batch_size": 4 * rows},
        {"final_length": 1.0},
        {"batch_size": rows // 4},
        {"damping": 1.0},
        {"batch_size": 4 * rows, "damping": 0.03},
        {"damping": 0.03, "final_length": 1.0},
    )
