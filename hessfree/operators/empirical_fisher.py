"""The empirical Fisher matrix: outer products of the gradients of single samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hessfree.linearization import check_backend, linearize_recorded
from hessfree.losses import OutputHessian
from hessfree.operators.base import cut_trace
from hessfree.operators.independence import check_independent
from hessfree.operators.known_cuts import trace_in_parts
from hessfree.operators.outer_products import OuterProducts
from hessfree.vectors import ParameterVector


class EmpiricalFisher(OuterProducts):
    """(1/T) Σ_n ∇l_n ∇l_nᵀ for a loss L = (1/T) Σ_n l_n over samples n.

    That is T Σ_n g_n g_nᵀ, with g_n the gradient of sample n's share of L itself: the uncentred second moment of the
    gradients, in the scale of G for a mean (T = N) as for a sum (T = 1). It is no estimate of G: targets are those of
    the data in place of draws from the model (Kunstner, Balles & Hennig 2019), and, other than G, it is quadratic in
    the loss: twice the loss with the same T has four times the matrix.

    Samples are the indices of dimension 0 of the outputs. g_n is all that sample n contributes, the positions of a
    sequence or an image together. Weights and ignored targets count as they do in L.

    curvlinops' EFLinearOperator has the same matrix for outputs `[N, C]` with T = 1 for reduction="sum", and for
    reduction="mean" with T = N for CrossEntropyLoss (weights and ignored targets or not) and T = N·C for MSELoss and
    BCEWithLogitsLoss, where l_n is the sum over the C outputs of a sample and not their mean. It takes the positions
    of a sequence or an image for samples.
    """

    @classmethod
    def from_loss(
        cls,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        inputs: Any,
        targets: Any,
        *,
        terms: float | None = None,
        linearization: str = "auto",
        microbatch: int | None = None,
        compile: bool = False,
    ) -> EmpiricalFisher:
        """Return the empirical Fisher matrix of `loss_fn(model(inputs), targets)` at the present parameters.

        That samples do not meet in the network or in the loss is found out by four more runs of the model.

        Args:
            model: A module with parameters that require grad; vectors follow their order.
            loss_fn: Takes what the model returned, and `targets`; returns a scalar: a sum or a mean over samples.
            inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
            targets: Passed on to `loss_fn`.
            terms: T, what the loss divides the sum over samples by. None for 1 where `loss_fn.reduction` is "sum", as
                in torch's loss modules, and for the number of samples elsewhere.
            linearization: The back end, as for `GaussNewton`.
            microbatch: Samples that the network is evaluated on at a time, as for `GaussNewton`; a product then costs
                two forward passes more.
            compile: Hand the trace to torch.compile; see `linearize`.

        Returns:
            The operator, positive semidefinite and of rank N at most.

        Raises:
            ValueError: The network mixes samples (BatchNorm in train mode), or the loss does; or see
                `GaussNewton.from_loss`; or the loss uses parameters directly; or `terms` is not positive.
            LinearizationError: The back end was asked for by name and cannot be used; or the network mixes samples, and
                `microbatch` is given.
        """
        check_backend(linearization)
        if terms is not None and not 0 < terms < math.inf:
            raise ValueError(f"terms={terms!r} must be positive and finite: what the loss divides the sum of terms by")
        parameters = ParameterVector([p for p in model.parameters() if p.requires_grad])
        recorded, cut, parts = trace_in_parts(model, loss_fn, inputs, targets, parameters, microbatch)
        if cut.tail.has_direct:
            raise ValueError(
                "EmpiricalFisher needs the gradient of every sample, but the loss uses parameters directly (a weight "
                "penalty?), and that part belongs to no sample; leave it out of loss_fn"
            )
        # the recorded outputs are of lower precision than the linearisation's where the loss was under autocast
        hessian = OutputHessian.of(cut)
        if hessian.vanishes():
            cut_trace(recorded, parameters)  # the loss may have become linear since it was cut there
        check_independent(recorded, cut, hessian, parameters, parts)
        network = linearize_recorded(linearization, model, recorded, cut.outputs, cut.calls, parameters, parts, compile)
        if terms is None:
            terms = 1 if getattr(loss_fn, "reduction", None) == "sum" else cut.outputs[0].shape[0]
        gradient = hessian.space.flatten(cut.tail.gradients).to(network.space.dtype)
        return cls(network, gradient.mul_(math.sqrt(terms)).unsqueeze(0), parameters)
