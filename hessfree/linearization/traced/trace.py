"""A network traced once: z and residuals at any parameters, and both linear maps."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hessfree.linearization.base import LinearizationError
from hessfree.linearization.traced.bindings import bind_directly
from hessfree.linearization.traced.capture import Joint, capture, first_line, plain_world, saved_state
from hessfree.linearization.traced.checks import check
from hessfree.linearization.traced.cleaning import ALIASES, clean
from hessfree.linearization.traced.compiling import compiled
from hessfree.linearization.traced.cutting import Parts, cut, separate
from hessfree.linearization.traced.draws import lay_out_draws
from hessfree.linearization.traced.exponentials import speed_up_elu
from hessfree.linearization.traced.factors import hoist_derivatives, regroup_products
from hessfree.linearization.traced.fusing import fuse_additions
from hessfree.linearization.traced.masks import keep_masks
from hessfree.linearization.traced.network import Network
from hessfree.linearization.traced.nodes import describe, is_random
from hessfree.linearization.traced.program import Program
from hessfree.linearization.traced.saved import SavedState, read_saved
from hessfree.linearization.traced.slots import Slots
from hessfree.precision import unit
from hessfree.recording import Output, RandomState, autocast_as
from hessfree.vectors import FlatSpace, ParameterVector

READS = {torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__}


class NotFiniteError(LinearizationError):
    """The network gave numbers that nothing can be compared with."""


class Trace:
    """What tracing a network gave.

    Attributes:
        space: The flat space of the outputs.
        jvp: (v, residuals) -> J v.
        vjp: (u, residuals) -> Jᵀ u.
        random: Whether the network draws random numbers.
        constants: Attributes of modules that the trace holds on to.
        trusted: Whether its products were compared with those of another back end.
        fault: Why it must not be used; None if it may.
        opaque: Whether custom Functions or hooks decide on the backward pass: they may do so by what no trace sees.
        surroundings: What else was seen beside the signature when its products were compared.
    """

    def __init__(self, network: Network, parameters: ParameterVector) -> None:
        """Trace `network`.

        Args:
            network: The network, with its present inputs.
            parameters: The parameters, with their present values.

        Raises:
            LinearizationError: It cannot be traced, or its trace gives other outputs than it does.
            NotFiniteError: Its outputs are no numbers to compare with.
        """
        self.trusted = False
        self.fault: str | None = None
        self.surroundings: tuple[Any, ...] | None = None
        with plain_world(network, parameters.device), _quiet():
            values, hooked, saved = _evaluate(network, parameters)
            self.space = FlatSpace([t.shape for t in values], [t.dtype for t in values], values[0].device)
            joint = Joint(network, parameters, self.space, None if saved is None else saved.structure)
            recorded = capture(joint)
        self.opaque = hooked or network.custom
        self.constants = check(recorded, network)
        count = len(parameters.params)
        parts = _cleaned(recorded.graph, range(count, count + len(network.state)), len(values))
        self._slots: Slots | None = None
        if saved is not None and joint.structure is not None:
            self._slots = Slots.of(parts, joint.structure, {i: saved.tensors[i].clone() for i in joint.literals})
        self.random = any(is_random(n) for n in parts.primal.nodes)
        bind_directly(parts.primal)
        self._primal = fx.GraphModule(recorded, parts.primal).forward
        self.jvp, self.vjp = Program(parts.jvp), Program(parts.vjp)
        traced, _ = self.evaluate(network, parameters)
        truth = self.space.flatten(values)
        if not bool(truth.isfinite().all()):
            raise NotFiniteError("the outputs of the network are not finite")
        precision = max(unit(t.dtype, t.device) for t in values)
        if not bool((traced - truth).norm() <= 8 * precision * truth.norm()):
            raise LinearizationError("the traced network gives other outputs than the network")

    def compile(self, network: Network, parameters: ParameterVector) -> None:
        """Hand the graphs to torch.compile: both maps, and the primal unless it draws random numbers.

        Compiled code draws other random numbers than the network does.

        Args:
            network: A network of the same signature as the one traced.
            parameters: The parameters, with their present values.

        Raises:
            CompilationError: One of them cannot be compiled; all run as they did.
        """
        z, residuals = self.evaluate(network, parameters)
        with autocast_as((), parameters.device):
            jvp = self.jvp.compiled(parameters.values(), self.jvp.arguments(residuals))
            vjp = self.vjp.compiled(z, self.vjp.arguments(residuals))
            if not self.random:
                self._primal = compiled(self._primal, self._arguments(network, parameters))
        self.jvp.use(jvp)
        self.vjp.use(vjp)

    def evaluate(self, network: Network, parameters: ParameterVector) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run the network at the present parameters.

        Args:
            network: A network of the same signature as the one traced.
            parameters: The parameters.

        Returns:
            z `[Z]`, and the residuals, some of which are views of the parameters and the inputs.

        Raises:
            LinearizationError: It failed, or random numbers are needed and their state is not known.
        """
        with torch.no_grad(), autocast_as((), parameters.device), self._randomness(network, parameters.device):
            try:
                values, residuals = self._primal(*self._arguments(network, parameters))
            except RuntimeError as error:
                raise LinearizationError(f"the traced network failed: {first_line(error)}") from error
            return self.space.flatten(values), residuals

    def _arguments(self, network: Network, parameters: ParameterVector) -> list[Tensor]:
        return [*(p.detach() for p in parameters.params), *network.state, *network.inputs]

    def saved_residuals(
        self, outputs: Sequence[Output], parameters: ParameterVector, truth: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, ...] | None:
        """Take the residuals from what autograd saved when the network ran at the present parameters.

        Args:
            outputs: z, their graph alive.
            parameters: The parameters.
            truth: The residuals of `evaluate`, to compare with at the first use; None later.

        Returns:
            The residuals, some of which are saved tensors themselves; None where the network has to be run again.
        """
        if self._slots is None:
            return None
        edges = [(o.edge.node, o.edge.output_nr) for o in outputs]
        state = read_saved(edges, {id(p): i for i, p in enumerate(parameters.params)})
        found = None if state is None else self._slots.residuals(state)
        if found is not None and truth is not None and not all(map(_agree, found, truth)):
            self._slots = None
            return None
        return found

    @contextlib.contextmanager
    def _randomness(self, network: Network, device: torch.device) -> Generator[None]:
        if not self.random:
            yield
            return
        if network.random is None:
            raise LinearizationError("the network draws random numbers, and their state before its call is not known")
        now = RandomState.capture(device)
        network.random.restore()
        try:
            yield
        finally:
            now.restore()


def _evaluate(network: Network, parameters: ParameterVector) -> tuple[list[Tensor], bool, SavedState | None]:
    """Return z as the network itself gives it, and see that nothing but tensors decides on it.

    Returns:
        z, whether hooks were put on tensors, and what autograd saved: None where not all of that can be seen.

    Raises:
        LinearizationError: Something else decides on z.
    """
    leaves = [p.detach().requires_grad_() for p in parameters.params]
    before = RandomState.capture(parameters.device)
    with torch.enable_grad(), _NothingReadOut() as seen:
        values = network.within(leaves, network.state, lambda: network.outputs(network.inputs))
    after = RandomState.capture(parameters.device)
    if before.python != after.python or str(before.numpy) != str(after.numpy):
        raise LinearizationError("the network draws random numbers from Python's or numpy's generator")
    with _NothingComputed():
        saved = saved_state(values, leaves)
    return [t.detach() for t in values], seen.hooked, saved


class _NothingComputed(TorchDispatchMode):
    """Refuses saved tensors that are not there but computed when they are asked for, as in a checkpoint."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in ALIASES:
            raise RuntimeError(f"{func} runs when a saved tensor is read")
        return func(*args, **(kwargs or {}))


class _NothingReadOut(TorchFunctionMode):
    """Refuses what carries numbers from tensors to Python unseen: they would stay as they are today.

    Attributes:
        hooked: Whether a hook was put on a tensor.
    """

    hooked = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in READS:
            raise LinearizationError(f"the network reads numbers out of its tensors ({func.__name__})")
        self.hooked = self.hooked or func is torch.Tensor.register_hook
        return func(*args, **(kwargs or {}))


def _cleaned(graph: fx.Graph, state: range, outputs: int) -> Parts:
    lay_out_draws(graph)
    describe(graph)
    separate(graph)
    tangents = [n for n in graph.nodes if n.op == "placeholder"][-2:]
    clean(graph)
    hoist_derivatives(graph, tangents)
    regroup_products(graph, tangents)
    fuse_additions(graph, tangents)
    keep_masks(graph, tangents)
    speed_up_elu(graph)
    graph.lint()
    (output,) = (n for n in graph.nodes if n.op == "output")
    return cut(graph, state, len(tree_leaves(output.args[0])) - outputs - 2)


def _agree(found: Tensor, truth: Tensor) -> bool:
    """Tell whether two residuals are the same but for the rounding of the operators that led to them."""
    if found.shape != truth.shape or found.dtype != truth.dtype or found.device != truth.device:
        return False
    if truth.dtype == torch.bool:  # a ReLU may open or close by rounding
        return bool((found != truth).sum() <= 1e-4 * truth.numel())
    if not truth.is_floating_point():
        return bool((found == truth).all())
    return bool((found - truth).norm() <= unit(truth.dtype, truth.device) ** 0.75 * truth.norm())


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    with warnings.catch_warnings():
        # the first trace of a process scripts some decompositions with torch.jit, which is deprecated
        warnings.filterwarnings("ignore", message=".*torch.jit.*", category=Warning)
        yield
