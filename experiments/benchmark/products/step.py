"""A whole step of the optimizer over the sum of its parts."""

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.benchmark.memory import peak_bytes
from experiments.benchmark.products.workloads import Workload
from experiments.models import ToyMLP
from experiments.timing import seconds
from hessfree import CG, KFAC, GaussNewton, HessianFree, Identity, LevenbergMarquardt
from hessfree.preconditioners import Preconditioner

PRODUCTS = 3
_WIDEST = 1024  # inputs of a layer up to which K-FAC's eigenvalues take no longer than the benchmark itself


def make(small: bool = False, device: torch.device | str = "cpu") -> Workload:
    """Return the two-dimensional ToyMLP on 4096 samples; `small`: on 32.

    Args:
        small: Whether it only has to run.
        device: Where.

    Returns:
        The workload.
    """
    n = 32 if small else 4096
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs, targets = ToyMLP(2, time_varying=True), torch.randn(n, 3), torch.randn(n, 2)
    name = f"ToyMLP 2, w 64, N {n}"
    return Workload("toy2-step", name, model.to(device), nn.MSELoss(), inputs.to(device), targets.to(device))


def measure(workload: Workload, rounds: int) -> dict[str, Any]:
    """Time steps of three CG iterations and, in turn with them, what such a step cannot do without.

    No preconditioner, and the damping rule asks for a replay at every step. The set-up is the smaller of what the step
    says that it took and of what `GaussNewton.from_loss` takes, which evaluates the network once more.

    Args:
        workload: The network and batch; its parameters move.
        rounds: How many of each.

    Returns:
        Median milliseconds of the step and of its parts, and `ratio`: the step over their sum.

    Raises:
        RuntimeError: If a step did something else than it was asked for.
    """
    model, loss_fn, inputs, targets = workload.model, workload.loss, workload.inputs, workload.targets
    optimizer = HessianFree(
        model.parameters(),
        solver=CG(max_iterations=PRODUCTS, progress=None),
        preconditioner=Identity(),
        damping_rule=LevenbergMarquardt(every=1),
    )
    closure = _closure(workload, optimizer)

    def replay() -> Tensor:
        with torch.no_grad():
            return loss_fn(model(inputs), targets)

    kept: dict[str, GaussNewton] = {}

    def start(v: Tensor) -> Tensor:
        kept["operator"] = GaussNewton.from_loss(model, loss_fn, inputs, targets)
        return kept["operator"] @ v

    clock = functools.partial(seconds, device=workload.device)
    generator = torch.Generator().manual_seed(0)
    times: dict[str, list[float]] = {name: [] for name in ("step", "reported", "closure", "setup", "product", "replay")}
    for index in range(rounds + 2):
        found = {"step": clock(functools.partial(optimizer.step, closure))}
        report = optimizer.last_step
        assert report is not None
        if index >= 2 and (report.iterations != PRODUCTS or report.evaluations != 1):
            raise RuntimeError(f"a step of {PRODUCTS} products and one replay was to be timed, and this came: {report}")
        found["reported"] = report.seconds_setup
        found["closure"], found["replay"] = clock(closure), clock(replay)
        first, *vectors = (workload.vector(generator) for _ in range(PRODUCTS + 1))
        begun = clock(functools.partial(start, first))
        operator = kept["operator"]
        found["product"] = statistics.median(clock(functools.partial(operator.__matmul__, v)) for v in vectors)
        found["setup"] = max(0.0, begun - found["product"])
        if index >= 2:  # the first ones trace
            for name, taken in found.items():
                times[name].append(taken)
    medians = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    least = min(medians["setup"], medians["reported"])
    parts = medians["closure"] + least + PRODUCTS * medians["product"] + medians["replay"]
    return {
        "model": workload.title,
        "k": PRODUCTS,
        "step_ms": medians["step"],
        "closure_ms": medians["closure"],
        "setup_ms": least,
        "setup_reported_ms": medians["reported"],
        "setup_from_loss_ms": medians["setup"],
        "product_ms": medians["product"],
        "replay_ms": medians["replay"],
        "ratio": medians["step"] / parts,
    }


def setup_ratio(workload: Workload, rounds: int) -> float:
    """Return what a step spends on its linearization at new parameters, over one gradient.

    A step has evaluated the network and its loss for the gradient already, and takes what it needs from there.

    Args:
        workload: The network and batch; its parameters move.
        rounds: Steps, in turn with as many gradients.

    Returns:
        Median seconds over median seconds.
    """
    optimizer = HessianFree(workload.model.parameters(), solver=CG(max_iterations=1), preconditioner=Identity())
    closure = _closure(workload, optimizer)
    setups, gradients = [], []
    with sdpa_kernel(SDPBackend.MATH):
        for index in range(rounds + 2):
            optimizer.step(closure)
            gradient = seconds(closure, workload.device)
            report = optimizer.last_step
            assert report is not None
            if index >= 2:  # the first ones trace
                setups.append(report.seconds_setup)
                gradients.append(gradient)
    optimizer.zero_grad()
    return statistics.median(setups) / statistics.median(gradients)


def peak_ratios(workload: Workload, steps: int = 2) -> dict[str, float]:
    """Return the peaks of a step with the default preconditioner and with none, over that of one gradient.

    Args:
        workload: The network and batch; its parameters move.
        steps: Steps before the one that is measured, which build what stays (factors, traces).

    Returns:
        By name of the preconditioner; K-FAC is left out where a layer is too wide for a benchmark of minutes.
    """
    ratios = {"no preconditioner": peak_ratio(workload, Identity(), steps)}
    if max(parameter[0].numel() for parameter in workload.parameters) <= _WIDEST:
        ratios["K-FAC"] = peak_ratio(workload, KFAC(), steps)
    return ratios


def peak_ratio(workload: Workload, preconditioner: Preconditioner, steps: int) -> float:
    """Return the most memory that a step of the default optimizer holds, over that of one gradient.

    Args:
        workload: The network and batch, on the CPU or CUDA; its parameters move.
        preconditioner: Of the optimizer, in the place of the default.
        steps: Steps before the one that is measured.

    Returns:
        Bytes over bytes, both above what is held between steps.
    """
    optimizer = HessianFree(workload.model.parameters(), preconditioner=preconditioner)
    closure = _closure(workload, optimizer)
    with sdpa_kernel(SDPBackend.MATH):
        for _ in range(steps):
            optimizer.step(closure)
        step = peak_bytes(lambda: optimizer.step(closure), workload.device)
        optimizer.zero_grad()
        gradient = peak_bytes(closure, workload.device)
    optimizer.zero_grad()
    return step / gradient


def _closure(workload: Workload, optimizer: HessianFree) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = workload.loss(workload.model(workload.inputs), workload.targets)
        loss.backward()
        return loss

    return closure
