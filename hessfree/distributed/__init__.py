"""Several processes, one step.

Under DistributedDataParallel, or in a process group given as `HessianFree(..., process_group=...)`, the objective is
the mean of the ranks' losses, whatever their batches hold, and every rank takes the same step, bit for bit:

- Parameters, gradients and the solver's vectors are the same on all ranks. Only two things are of a rank's own batch,
  the loss and the product G_r v, and their means are all that is exchanged: one reduction of P numbers a CG
  iteration.
- A status of 64 bytes goes round before the forward and the backward pass of DistributedDataParallel, with the loss,
  after the solve and at each replay. An error on one rank is an error on all and leaves the parameters alone; a NaN
  is a rejection on all. Norms that must be equal are compared on the way.
- What a preconditioner learns is reduced before it is used: K-FAC's A over the rows of all ranks, S and diagonals as
  means, Woodbury's rows gathered, Nystrom by averaged products. The answer of conjugate gradients run to the end
  would not depend on it, the equality of ranks does. Random cotangents are drawn for the batches of all ranks from
  (seed, step), and each takes its slice. `curvature_batch` and `microbatch` count samples of each rank's batch.
- A back end that cannot be used on one rank is used on none.
- A step of k iterations at which nothing is learned or evaluated hands over 4kP + 6·64 bytes in float32.

`shard_vectors=True` divides the vectors of conjugate gradients: during a product each rank holds P/n numbers of b, x,
r, p and Gp. A product gathers p and scatters Gp, which sends what the one reduction did, and inner products are three
messages of at most two numbers an iteration. K-FAC's inverse gathers r once more.

Tensor parallel parameters (DTensor of `parallelize_module`) work through the autograd graph: each process multiplies
by its part of the network, and flat vectors are whole on all. `fully_shard` is refused: the forward pass uses
gathered copies, in which autograd finds no derivative (torch 2.14).

How a network of P = 7e9 parameters in bfloat16 would run, on n = 64 accelerators, three iterations a step, curvature
on an eighth of 4 million tokens. These numbers are derived, not measured; a rank is taken to sustain 4e14 operations
and to send and receive 50 GB in a second, and vectors are float32, 28 GB each:

| | a rank |
| --- | --- |
| b, x, r, p, Gp | 140 GB; 2.2 GB in parts |
| p and Gp while they are whole | 56 GB |
| gradient, recorded gradient, decay, θ, right-hand side, last step | 168 GB |
| parameters, `p.grad` and the backup, bfloat16 | 42 GB |
| messages an iteration, vectors in parts | 2, in each of which it sends and receives 28 GB; 3 of 4 or 8 bytes |
| gradient, 6 operations a parameter and token, and its reduction | 6.6 s + 0.6 s |
| one forward pass of the curvature batch and three products of 8 operations | 0.3 s + 3.3 s |
| their messages, 56 GB each way an iteration | 3.4 s |
| a replay of 2 operations at every fifth step | 0.4 s |

That is 15 s a step, where Adam takes 7. The time is bearable; the memory is not: with parts it fits where (6 + 2 +
5/n)·4P + 3·2P bytes do, P = 2e9 in 80 GB, activations not counted. For 7e9 the six whole vectors would have to be
divided like the five, and products made layer by layer, so that p and Gp are never whole; neither is done here.
"""

from hessfree.distributed.membership import (
    average_gradients,
    check_process_group,
    guessed_ranks,
    ranks_of,
    same_bits,
    silent,
    synchronises,
    world,
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
    "world",
]
