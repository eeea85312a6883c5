"""Several processes, one step."""

from hessfree.distributed.membership import (
    average_gradients,
    check_process_group,
    guessed_ranks,
    ranks_of,
    same_bits,
    silent,
    synchronises,
)
from hessfree.distributed.ranks import ALONE, RankError, Ranks, mean
from hessfree.distributed.shards import Shards

__all__ = [
    "ALONE",
    "RankError",
    "Ranks",
    "Shards",
    "average_gradients",
    "check_process_group",
    "guessed_ranks",
    "mean",
    "ranks_of",
    "same_bits",
    "silent",
    "synchronises",
]
