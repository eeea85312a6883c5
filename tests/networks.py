"""The table of networks that many tests go through."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests import closures
from tests.architectures import (
    DOUBLE,
    Attention,
    Checkpointed,
    CheckpointedAttention,
    ConvNet,
    Custom,
    FusedAttention,
    InPlace,
    Partial,
    Recurrent,
    Segmenter,
    TiedLanguageModel,
    classes,
    mlp,
    randn,
)
from tests.problem import Problem, hand_written, simple, softplus_pairs


def mean_squared_error() -> Problem:
    return simple(mlp(3, 4, 2), randn(5, 3), F.mse_loss, randn(5, 2, seed=3))


def weighted_cross_entropy() -> Problem:
    weight = torch.tensor([0.5, 1.0, 3.0], dtype=DOUBLE)
    return simple(
        mlp(3, 4, 3), randn(5, 3), lambda z, y: F.cross_entropy(z, y, weight, label_smoothing=0.1), classes(5, high=3)
    )


def bce_with_logits() -> Problem:
    weight = torch.tensor([0.5, 2.0], dtype=DOUBLE)
    return simple(
        mlp(3, 4, 2),
        randn(5, 3),
        lambda z, y: F.binary_cross_entropy_with_logits(z, y, pos_weight=weight),
        classes(5, 2, high=2).to(DOUBLE),
    )


def huber() -> Problem:
    return simple(
        mlp(3, 4, 2), randn(6, 3), lambda z, y: F.huber_loss(z, y, reduction="sum", delta=0.8), randn(6, 2, seed=3)
    )


def indefinite() -> Problem:
    return simple(mlp(3, 4, 2), randn(5, 3), hand_written, randn(5, 2, seed=3))


def ranking() -> Problem:
    return simple(
        nn.Sequential(*mlp(3, 4, 1), nn.Flatten(0)), randn(4, 3), softplus_pairs, randn(4, seed=3)
    )


def conv_batchnorm() -> Problem:
    return simple(ConvNet(), randn(4, 1, 4, 4), F.cross_entropy, classes(4, high=3))


def segmentation() -> Problem:
    return simple(Segmenter(), randn(2, 1, 2, 3), F.cross_entropy, classes(2, 2, 3, high=3))


def gru() -> Problem:
    return simple(Recurrent(nn.GRU), randn(2, 3, 2), F.mse_loss, randn(2, 3, 2, seed=3), functional=False)


def lstm() -> Problem:
    return simple(Recurrent(nn.LSTM), randn(2, 3, 2), F.mse_loss, randn(2, 3, 2, seed=3), functional=False)


def multihead_attention() -> Problem:
    return simple(Attention(), randn(2, 3, 4), F.smooth_l1_loss, randn(2, 3, 2, seed=3))


def fused_attention() -> Problem:
    return simple(
        FusedAttention(), randn(2, 3, 4), lambda z, y: F.cross_entropy(z.transpose(1, 2), y), classes(2, 3, high=3)
    )


def tied_tokens() -> Problem:
    targets = classes(2, 4, high=5, seed=4)
    targets[0, 1] = targets[1, 3] = -100
    return simple(
        TiedLanguageModel(),
        classes(2, 4, high=5),
        lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten(), ignore_index=-100),
        targets,
    )


def dropout() -> Problem:
    model = nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.4), nn.Tanh(), nn.Linear(6, 2), nn.Dropout(0.2))
    return simple(model, randn(5, 3), F.mse_loss, randn(5, 2, seed=3))


def weight_norm() -> Problem:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))
    return simple(model, randn(5, 3), F.mse_loss, randn(5, 2, seed=3), functional=False)


def custom_function() -> Problem:
    return simple(Custom(), randn(5, 3), F.mse_loss, randn(5, 2, seed=3), functional=False)


def checkpointed() -> Problem:
    return simple(Checkpointed(), randn(5, 3), F.mse_loss, randn(5, 2, seed=3), functional=False)


def checkpointed_attention() -> Problem:
    return simple(
        CheckpointedAttention(), randn(2, 3, 4), F.mse_loss, randn(6, 2, seed=3), functional=False
    )


def in_place() -> Problem:
    return simple(InPlace(), randn(5, 3), F.mse_loss, randn(5, 2, seed=3), functional=False)


def shared_module() -> Problem:
    inner = mlp(3, 4, 3)
    return simple(nn.Sequential(inner, nn.Tanh(), inner), randn(4, 3), F.mse_loss, randn(4, 3, seed=3))


def partly_frozen() -> Problem:
    return simple(Partial(), randn(5, 3), F.mse_loss, randn(5, 2, seed=3))


PROBLEMS: dict[str, Callable[[], Problem]] = {
    f.__name__: f
    for f in (
        mean_squared_error,
        weighted_cross_entropy,
        bce_with_logits,
        huber,
        indefinite,
        ranking,
        conv_batchnorm,
        segmentation,
        gru,
        lstm,
        multihead_attention,
        fused_attention,
        tied_tokens,
        dropout,
        closures.named_outputs,
        closures.nested_outputs,
        closures.encoder_decoder,
        closures.regularised_code,
        closures.called_twice,
        closures.logits_and_loss,
        closures.wrapped,
        closures.weight_penalty,
        closures.bare_parameter,
        closures.differential_equation,
        weight_norm,
        custom_function,
        checkpointed,
        checkpointed_attention,
        in_place,
        shared_module,
        closures.in_place_after,
        partly_frozen,
    )
}


def make(name: str) -> Problem:
    """Build a problem anew, from fixed seeds; the global generator is left at seed 0."""
    torch.manual_seed(7)
    problem = PROBLEMS[name]()
    torch.manual_seed(0)
    return problem
