"""The generalised Gauss-Newton matrix G = JᵀHJ, by products (Schraudolph 2002; Martens 2010, sec. 4.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hessfree.linearization import (
    ChunkedLinearization,
    Linearization,
    check_backend,
    linearize_recorded,
    run_model,
)
from hessfree.losses import DiagonalForm, Form, OutputHessian
from hessfree.operators.base import LowRank, SymmetricOperator, cut_trace
from hessfree.operators.factored_root import FactoredRoot
from hessfree.operators.known_cuts import trace_in_parts
from hessfree.operators.root import ProductRoot
from hessfree.operators.rows import unit_rows
from hessfree.operators.work import Work
from hessfree.recording import Output, Tail
from hessfree.rows import Counts, OutputGraph, counts_of
from hessfree.vectors import ParameterVector


class GaussNewton(SymmetricOperator):
    """G = JᵀHJ, plus the exact second derivatives of what the loss adds to the network's outputs.

    J `[Z, P]` is the Jacobian of the network's outputs z in the parameters, H `[Z, Z]` the Hessian of the
    loss in z. Where the loss uses parameters directly (a weight penalty), the Hessian of ell in (z, theta)
    takes the place of H, and G = [J; I]ᵀ (∇² ell) [J; I].

    Attributes:
        size: P.
        dtype: Dtype of its vectors.
        device: Device of its vectors.
        linearization: J.
        output_hessian: H; None stands for the identity (and G for JᵀJ).
        parameters: The parameters.
    """

    def __init__(
        self,
        linearization: Linearization,
        output_hessian: OutputHessian | None,
        parameters: ParameterVector,
        direct: Tail | None = None,
        network: Callable[[], Sequence[Output] | None] = lambda: None,
    ) -> None:
        """Compose the operator.

        Args:
            linearization: J.
            output_hessian: H; None for the identity.
            parameters: The parameters.
            direct: The loss behind z, where it uses parameters directly.
            network: Returns z with its graph, from which rows of J can be had without a product each; None where
                there is none.
        """
        self.size, self.dtype, self.device = parameters.size, parameters.dtype, parameters.device
        self.linearization = linearization
        self.output_hessian = output_hessian
        self.parameters = parameters
        self._direct = direct
        self._network = network

    @classmethod
    def from_model(
        cls, model: nn.Module, inputs: Any, *, linearization: str = "auto", compile: bool = False
    ) -> GaussNewton:
        """Return the plain JᵀJ of `model` at its present parameters: the Fisher matrix of unit-variance outputs.

        Args:
            model: A module with parameters that require grad; vectors follow their order.
            inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
            linearization: The back end: "auto", "traced", "graph" or "functional"; see `linearize`.
            compile: Hand the trace to torch.compile; see `linearize`.

        Returns:
            The operator, a sum (not a mean) over samples and outputs.

        Raises:
            ValueError: There is no such back end, no parameter, or no output that depends on one.
            LinearizationError: The back end was asked for by name and cannot be used.
        """
        parameters = ParameterVector([p for p in model.parameters() if p.requires_grad])
        check_backend(linearization)
        tree = run_model(model, inputs, parameters)
        (call,) = tree.roots
        z = call.outputs
        network = linearize_recorded(linearization, model, tree, z, [call], parameters, compile=compile)
        return cls(network, None, parameters, network=lambda: z)

    @classmethod
    def from_loss(
        cls,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        inputs: Any,
        targets: Any,
        *,
        linearization: str = "auto",
        microbatch: int | None = None,
        compile: bool = False,
    ) -> GaussNewton:
        """Return the Gauss-Newton matrix of `loss_fn(model(inputs), targets)` at the present parameters.

        Args:
            model: A module with parameters that require grad; vectors follow their order.
            loss_fn: Takes what the model returned, and `targets`; returns a scalar.
            inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
            targets: Passed on to `loss_fn`.
            linearization: The back end: "auto", "traced", "graph" or "functional"; see `linearize`.
            microbatch: Evaluate the network on at most so many samples at a time, so that memory is that of one chunk
                and of all outputs. Each product then costs one forward pass more, or two where the Hessian in the
                outputs is neither diagonal nor that of a softmax, and the parameters must stay what they are. None
                evaluates it once.
            compile: Hand the trace to torch.compile; see `linearize`.

        Returns:
            The operator, in the loss's own scale (a mean stays a mean). A model that computes its own loss, as
            `(logits, loss)` models do, is cut where the loss is no longer linear, as `HessianFree` cuts it.

        Raises:
            ValueError: The loss is not a scalar, or has no second derivative in any output of a module; or the samples
                cannot be divided along dimension 0.
            LinearizationError: The back end was asked for by name and cannot be used; or the network mixes samples
                (BatchNorm in train mode, dropout), and `microbatch` is given.
        """
        check_backend(linearization)
        parameters = ParameterVector([p for p in model.parameters() if p.requires_grad])
        traced, cut, parts = trace_in_parts(model, loss_fn, inputs, targets, parameters, microbatch)
        cut.tail.forget_values()
        hessian = OutputHessian.of(cut)
        hessian.find_closed()  # before the residuals need memory of their own
        if hessian.vanishes():
            cut_trace(traced, parameters)  # the loss may have become linear since it was cut there
        network = linearize_recorded(linearization, model, traced, cut.outputs, cut.calls, parameters, parts, compile)
        hessian = hessian.in_precision_of(network.space)
        direct = cut.tail if cut.tail.has_direct else None
        return cls(network, hessian, parameters, direct, lambda: None if parts else cut.outputs)

    def let_go(self) -> bool:
        """Let the graph of the outputs be freed, where J is traced and H of a closed form: products do without it.

        Returns:
            Whether they do. What else is made of the graph, a root by layers, is made of products from now on.
        """
        if self._direct is not None or not self.linearization.stands_alone:
            return False
        if self.output_hessian is not None and not self.output_hessian.find_closed():
            return False
        self._network = _no_graph
        return True

    def matvec(self, v: Tensor) -> Tensor:
        """Return G v `[P]` for `v` `[P]`."""
        if self._network is not _no_graph:
            self.let_go()
        if self._direct is None:
            return self._through_outputs(v)
        if not self._direct.coupled:
            _, direct = self._direct.product(None, self.parameters.split(v))
            return self.parameters.flatten(direct).add_(self._through_outputs(v))
        space = self.linearization.space
        along_z, along_theta = self._direct.product(space.split(self.linearization.jvp(v)), self.parameters.split(v))
        product = self.parameters.flatten(along_theta)
        return product.add_(self.linearization.vjp(space.flatten(along_z)))

    def _through_outputs(self, v: Tensor) -> Tensor:
        """Return JᵀHJ v, with H in its closed form where it has one: to differentiate a loss twice takes longer."""
        if self.output_hessian is None:
            return self.linearization.gauss_newton(v, 1.0)
        form = self.output_hessian.closed
        if isinstance(form, DiagonalForm):
            return self.linearization.gauss_newton(v, form.h)
        if form is not None and isinstance(self.linearization, ChunkedLinearization):
            return self.linearization.gauss_newton_by_samples(v, form)
        return self.linearization.vjp((form or self.output_hessian).matvec(self.linearization.jvp(v)))

    def quadratic_form(self, vectors: Tensor) -> Tensor:
        """Return V G Vᵀ `[K, K]` for rows V `[K, P]`: (JVᵀ)ᵀ H (JVᵀ), which is a third of the work of K products."""
        if self._direct is not None:
            return super().quadratic_form(vectors)
        z = torch.stack([self.linearization.jvp(v) for v in vectors])
        if self.output_hessian is None:
            return z @ z.T
        hessian = self.output_hessian.closed or self.output_hessian
        return z @ torch.stack([hessian.matvec(row) for row in z]).T

    def to_dense(self) -> Tensor:
        """Return G `[P, P]`, formed from rows of J: by one backward pass for an output of all samples where they fit.

        Returns:
            The exactly symmetric matrix.
        """
        if self._direct is not None:
            return super().to_dense()
        form = None if self.output_hessian is None else self.output_hessian.form
        if self.output_hessian is None or (form is not None and form.negative == 0):
            held = self.held_root(form, factor=False)  # a pass an output of a sample, in the place of a product a row
            if held is not None:
                return held.normal_matrix()
            dense = torch.zeros(self.size, self.size, dtype=self.dtype, device=self.device)
            for rows in self._root_rows():
                dense.addmm_(rows.T, rows)
            return 0.5 * (dense + dense.T)
        # H is indefinite, and a root cannot carry the sign; or it has no form
        dense = torch.zeros(self.size, self.size, dtype=self.dtype, device=self.device)
        jacobian = torch.cat(list(self._rows()))
        for i in range(0, self.size, 512):
            columns = jacobian[:, i : i + 512]
            assert self.output_hessian is not None
            weighted = torch.stack([self.output_hessian.matvec(c) for c in columns.unbind(1)], 1)
            dense[:, i : i + 512] = jacobian.T @ weighted
        return 0.5 * (dense + dense.T)

    def diagonal(self) -> Tensor:
        """Return the exact diagonal `[P]`."""
        form = None if self.output_hessian is None else self.output_hessian.form
        if self._direct is not None or (self.output_hessian is not None and (form is None or form.negative > 0)):
            return super().diagonal()
        out = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        for rows in self._root_rows():
            out.add_(rows.square_().sum(0))
        return out

    def root_form(self, purpose: str) -> Form:
        """Return H in a closed form that has a square root.

        Args:
            purpose: Who asks, for errors.

        Returns:
            The form; that of the identity where there is no loss.

        Raises:
            ValueError: H has no such form, or is indefinite; or G is more than JᵀHJ.
        """
        if self._direct is not None:
            raise ValueError(
                f"{purpose} is made of the network's outputs alone, but the loss uses parameters directly (a weight "
                "penalty?); leave that part out of loss_fn, or use GaussNewton, which adds its exact Hessian"
            )
        return self._output_form(purpose) or DiagonalForm(torch.ones((), dtype=self.dtype, device=self.device))

    def _output_form(self, purpose: str) -> Form | None:
        """Return H in a form that has a square root; None for the identity."""
        if self.output_hessian is None:
            return None
        form = self.output_hessian.form
        if form is None:
            raise ValueError(
                f"{purpose} needs a square root of the Hessian of the loss in the outputs, but that is neither "
                "diagonal nor made of small blocks within samples nor a softmax's; use GaussNewton, which needs none"
            )
        if form.negative > 0:
            raise ValueError(
                f"{purpose} needs a square root of the Hessian of the loss in the outputs, but the negative ones make "
                f"up {form.negative:.2%} of its eigenvalues' magnitudes; use GaussNewton, which keeps their sign"
            )
        return form

    def low_rank(self) -> LowRank:
        """Return G as UᵀU + diag(d) with U = BᵀJ, `[Z, P]`, where H = B Bᵀ.

        U is held where that can be: as factors at Linear layers, so that J is never formed. d holds what the loss adds
        to the network's outputs, where its Hessian is diagonal (weight decay inside the closure).

        Returns:
            Both parts.

        Raises:
            ValueError: H has no square root; or what the loss adds to the outputs has another Hessian.
        """
        diagonal = 0.0 if self._direct is None else self._direct_diagonal(self._direct)
        form = self._output_form("a Gram matrix")
        return LowRank(self.held_root(form) or ProductRoot(self.linearization, self.size, form), diagonal)

    def work(self) -> Work:
        """Return what a product, the Gram matrix and the dense matrix take, counted from shapes."""
        try:
            self._output_form("a Gram matrix")
            rooted = self._direct is None or self._direct_diagonal(self._direct) is not None
        except ValueError:
            rooted = False
        space, outputs = self.linearization.space, self._network()
        counts = {shape[0] if shape else 0 for shape in space.shapes}
        samples = counts.pop() if len(counts) == 1 and 0 not in counts else 1
        if outputs is None:
            unknown = Counts(samples * self.size, 0, 1, (), self.size, True)
            return Work(self.size, space.size, samples, unknown, rooted, False)
        found = counts_of(OutputGraph(self.parameters, outputs, space), samples)
        return Work(self.size, space.size, samples, found, rooted, True)

    def held_root(self, form: Form | None, factor: bool = True) -> FactoredRoot | None:
        """Return BᵀJ held, as factors at Linear layers and whole elsewhere.

        Args:
            form: H = B Bᵀ; None for B the identity.
            factor: Whether to leave layers in factors.

        Returns:
            The root; None where there is no graph of the outputs, or too many numbers to hold.
        """
        outputs = self._network()
        if outputs is None:
            return None
        return FactoredRoot.of(OutputGraph(self.parameters, outputs, self.linearization.space), form, factor)

    def _direct_diagonal(self, direct: Tail) -> Tensor:
        """Return the Hessian of what the loss adds to the outputs, if it is diagonal."""
        advice = "use solver=CG(), which needs products only"
        if direct.coupled:
            raise ValueError(
                f"the loss couples the network's outputs with parameters that it uses directly, so that G is no Gram "
                f"matrix plus a diagonal; {advice}"
            )
        generator = torch.Generator("cpu").manual_seed(0)
        probe = torch.rand(self.size, generator=generator, device="cpu").to(self.dtype).to(self.device) + 0.5
        ones = torch.ones_like(probe)
        h, y = (self.parameters.flatten(direct.product(None, self.parameters.split(v))[1]) for v in (ones, probe))
        if not bool((h * probe - y).norm() <= 100 * torch.finfo(self.dtype).eps * y.norm()):
            raise ValueError(
                "what the loss adds to the network's outputs has a Hessian that is not diagonal, so that G is no Gram "
                f"matrix plus a diagonal (½‖θ‖² would be: weight_decay=); {advice}"
            )
        return h

    def _root_rows(self) -> Iterator[Tensor]:
        """Yield rows of BᵀJ in chunks, where H = B Bᵀ: then G is their Gram matrix."""
        form = None if self.output_hessian is None else self.output_hessian.form
        for units in unit_rows(self.linearization.space, self.size):
            roots = units if form is None else torch.stack([form.root(unit) for unit in units])
            yield self.linearization.vjps(roots)

    def _rows(self) -> Iterator[Tensor]:
        for units in unit_rows(self.linearization.space, self.size):
            yield self.linearization.vjps(units)


def _no_graph() -> None:
    return None
