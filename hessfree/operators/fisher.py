"""The Fisher matrix by sampling, an unbiased estimate of G = JᵀHJ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hessfree.operators.base import check_samples
from hessfree.operators.gauss_newton import GaussNewton
from hessfree.operators.outer_products import OuterProducts


class MonteCarloFisher(OuterProducts):
    """The mean of (Jᵀu_n)(Jᵀu_n)ᵀ over draws of u_n with E[u_n u_nᵀ] = H_n, summed over samples n.

    H_n is the Hessian of the loss in the outputs of sample n, so that the expectation is the Gauss-Newton matrix
    G = Σ_n J_nᵀH_nJ_n, in the loss's own scale. Where the loss is the negative log-likelihood of an exponential family
    in its natural parameters (squared error, cross-entropy, binary cross-entropy of logits), G is the Fisher matrix
    (Martens 2020, sec. 9.2). The draws are random signs times a square root of H_n, which needs no family: weights,
    label smoothing and ignored targets of the loss are all in H. Every draw is positive semidefinite and is kept:
    the operator is one fixed matrix.

    curvlinops' FisherMCLinearOperator draws targets from the likelihood in place of signs. Its expectation is the same
    for MSELoss (where G is 2JᵀJ times the loss's 1/(N·C) or 1), CrossEntropyLoss and BCEWithLogitsLoss; class weights
    and ignore_index it does not see.
    """

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        inputs: Any,
        *,
        samples: int = 1,
        seed: int = 0,
        linearization: str = "auto",
        compile: bool = False,
    ) -> MonteCarloFisher:
        """Return an estimate of JᵀJ, the Fisher matrix of outputs with unit variance.

        Args:
            model: A module with parameters that require grad; vectors follow their order.
            inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
            samples: Draws for each sample. The variance falls as 1/samples, a product's cost does not rise.
            seed: Of the draws.
            linearization: The back end, as for `GaussNewton`.
            compile: Hand the trace to torch.compile; see `linearize`.

        Returns:
            The operator, a sum (not a mean) over samples and outputs.

        Raises:
            ValueError: See `GaussNewton.from_model`; or `samples` is not a positive integer.
        """
        check_samples(samples)
        exact = GaussNewton.from_model(model, inputs, linearization=linearization, compile=compile)
        return cls._drawn(exact, samples, seed)

    @classmethod
    def from_loss(
        cls,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        inputs: Any,
        targets: Any,
        *,
        samples: int = 1,
        seed: int = 0,
        linearization: str = "auto",
        microbatch: int | None = None,
        compile: bool = False,
    ) -> MonteCarloFisher:
        """Return an estimate of the Gauss-Newton matrix of `loss_fn(model(inputs), targets)`.

        Args:
            model: A module with parameters that require grad; vectors follow their order.
            loss_fn: Takes what the model returned, and `targets`; returns a scalar.
            inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
            targets: Passed on to `loss_fn`.
            samples: Draws for each sample. The variance falls as 1/samples, a product's cost does not rise.
            seed: Of the draws.
            linearization: The back end, as for `GaussNewton`.
            microbatch: Samples that the network is evaluated on at a time, as for `GaussNewton`; a product then costs
                two forward passes more.
            compile: Hand the trace to torch.compile; see `linearize`.

        Returns:
            The operator, in the loss's own scale (a mean stays a mean).

        Raises:
            ValueError: See `GaussNewton.from_loss`; or the Hessian in the outputs has no square root; or the loss uses
                parameters directly; or `samples` is not a positive integer.
        """
        check_samples(samples)
        exact = GaussNewton.from_loss(
            model, loss_fn, inputs, targets, linearization=linearization, microbatch=microbatch, compile=compile
        )
        return cls._drawn(exact, samples, seed)

    @classmethod
    def _drawn(cls, exact: GaussNewton, samples: int, seed: int) -> MonteCarloFisher:
        form, space = exact.root_form("MonteCarloFisher"), exact.linearization.space
        generator = torch.Generator(space.device).manual_seed(seed)
        drawn = torch.stack([form.sample(generator, space) for _ in range(samples)])
        return cls(exact.linearization, drawn.div_(samples**0.5), exact.parameters)
