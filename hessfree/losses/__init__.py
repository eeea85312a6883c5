"""The Hessian of the loss in the network's outputs: products, samples and factors."""

from hessfree.losses.forms import DiagonalForm, Form
from hessfree.losses.joined_form import JoinedForm
from hessfree.losses.layout import layouts
from hessfree.losses.output_hessian import OutputHessian

__all__ = ["DiagonalForm", "Form", "JoinedForm", "OutputHessian", "layouts"]
