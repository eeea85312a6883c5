"""The same runs on Lightning's Trainer: same seed, same rows, same step lengths, same points of evaluation.

The Trainer's own work between two steps is in the seconds. It handicaps optimizers with cheap steps, so that figures
from here are not to be compared with those of the plain loop.
"""

import logging
import warnings
from collections import deque
from collections.abc import Iterator
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from experiments.records import Run
from experiments.training import Task, Training, Watch


class _Lightning(Training):
    """A run whose rows are fetched ahead by a data loader: the place in the stream is that of the step."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._fetched: deque[dict[str, Any]] = deque()  # the stream's state after each batch that waits
        self._place = self._stream_state()

    def _stream_state(self) -> dict[str, Any]:
        stream: Any = self.stream
        return stream.state_dict()

    def fetch(self) -> Any:
        """Draw a batch ahead of its step."""
        batch = self.draw()
        self._fetched.append(self._stream_state())
        return batch

    def use(self) -> None:
        """Take note that the oldest batch fetched is used."""
        self._place = self._fetched.popleft()

    def state_dict(self) -> dict[str, Any]:
        """Give everything from which the run goes on."""
        return super().state_dict() | {"stream": self._place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another run was."""
        super().load_state_dict(state)
        self._place = state["stream"]


class _Rows(IterableDataset[Any]):
    """The problem's stream as a dataset of whole batches."""

    def __init__(self, training: _Lightning) -> None:
        self._training = training

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self._training.fetch()


class _Module(lightning.LightningModule):
    """The problem's network and loss under automatic optimization."""

    def __init__(self, training: _Lightning, watch: Watch | None) -> None:
        super().__init__()
        self.model = training.model
        self._training = training  # no module: Lightning leaves it alone
        self._watch = watch
        self._first: Tensor | None = None  # of the batch, as the plain loop has it

    def configure_optimizers(self) -> Optimizer:
        return self._training.optimizer

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # the stream has put it there

    def on_train_start(self) -> None:
        self._training.clock.__enter__()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._first = None
        self._training.set_step_length()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self._training.loss(batch)
        # Lightning hands on the last evaluation of the step, which for L-BFGS is that of its last trial.
        if self._first is None:
            self._first = loss.detach()
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        training = self._training
        training.clock.__exit__()
        training.use()
        assert self._first is not None
        training.count(self._first)
        if self._watch is not None:
            self._watch(training)
        if training.done:
            self.trainer.should_stop = True
        else:
            training.clock.__enter__()


def train_on_lightning(task: Task, *, watch: Watch | None = None, state: dict[str, Any] | None = None) -> Run:
    """Train one network for a time, as `experiments.training.train` does.

    Args:
        task: What is to be done.
        watch: Called after every step.
        state: Where to go on; None: at the start.

    Returns:
        The run; the losses at each step are those of the plain loop.
    """
    training, device = _Lightning(task), task.problem.device
    training.begin(state)
    if training.done:
        return training.run()
    rows = DataLoader(_Rows(training), batch_size=None, num_workers=0)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # which devices there are, and tips
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")  # drawing rows takes no time
        trainer = lightning.Trainer(
            accelerator="gpu" if device.type == "cuda" else device.type,
            devices=[device.index or 0] if device.type == "cuda" else 1,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(_Module(training, watch), rows)
    return training.run()
