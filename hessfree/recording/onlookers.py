"""Logs, metrics and a trainer's hooks see each batch once, however often a step evaluates it.

What they see is the closure's first run. Nothing is imported here: a package that the user has not imported watches
nobody. While a step evaluates again, the few functions by which the others are told anything are exchanged; on other
threads than the step's they go on to do what they do.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Generator
from typing import Any

from hessfree.recording.metric_states import MetricStates
from hessfree.recording.silence import SilentLogger

_local = threading.local()
_lock = threading.Lock()
_exchanged: list[tuple[Any, str, Any]] = []
_steps = 0  # in how many threads a step evaluates again


def is_replaying() -> bool:
    """Tell whether `HessianFree` evaluates a batch again, after the closure's first run.

    What Lightning and torchmetrics keep of a training step is looked after. For what the step keeps on its own:

    ```python
    if not hessfree.is_replaying():
        self.history.append(loss.item())
    ```

    Returns:
        True within a replay of the closure, or another evaluation of the network, on this thread.
    """
    return bool(getattr(_local, "depth", 0))


@contextlib.contextmanager
def unseen() -> Generator[None]:
    """Let nobody see what is evaluated inside.

    `self.log`, `self.print` and the loggers of Lightning and of Fabric are silent, hooks of callbacks and of the
    LightningModule are not called, a training step's result stays that of the first run, and every torchmetrics
    metric that is touched is put back as it was.

    Yields:
        Nothing.
    """
    if is_replaying():
        yield
        return
    _local.metrics = MetricStates()
    _exchange()
    _local.depth = 1
    try:
        yield
    finally:
        _local.depth = 0
        _restore()
        _local.metrics.restore()


def _exchange() -> None:
    global _steps
    with _lock:
        _steps += 1
        if _steps > 1:
            return
        for module, owner, name, changed in _WATCHERS:
            place = sys.modules.get(module)
            target = place if owner is None else getattr(place, owner, None)
            original = None if target is None else vars(target).get(name)
            if original is not None:
                _exchanged.append((target, name, original))
                setattr(target, name, changed(original))


def _restore() -> None:
    global _steps
    with _lock:
        _steps -= 1
        while not _steps and _exchanged:
            setattr(*_exchanged.pop())


def _mute(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        return None if is_replaying() else original(*args, **kwargs)

    return function


def _silent_loggers(original: property) -> property:
    def get(owner: Any) -> Any:
        found = original.__get__(owner)
        if not is_replaying():
            return found
        return [SilentLogger(logger) for logger in found] if isinstance(found, list) else SilentLogger(found)

    return property(get, original.fset)


def _keep_result(original: Callable[..., Any]) -> Callable[..., Any]:
    """Change `Closure.__call__` of Lightning, which keeps the last result for `on_train_batch_end`."""

    @functools.wraps(original)
    def call(closure: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_replaying():
            return original(closure, *args, **kwargs)
        return type(closure)(closure._step_fn, closure._backward_fn).closure(*args, **kwargs).loss

    return call


def _note_metric(original: Callable[..., None]) -> Callable[..., None]:
    """Change `Metric.__setattr__`: every update, forward, compute and reset sets a plain attribute before it acts."""

    @functools.wraps(original)
    def set_attribute(metric: Any, name: str, value: Any) -> None:
        if is_replaying():
            _local.metrics.see(metric)
        original(metric, name, value)

    return set_attribute


_Change = Callable[[Any], Any]
_WATCHERS: tuple[tuple[str, str | None, str, _Change], ...] = (  # module, class (or None), name, what it becomes
    *(
        (f"{package}.{module}", owner, name, change)
        for package in ("lightning.pytorch", "pytorch_lightning")
        for module, owner, name, change in (
            ("core.module", "LightningModule", "log", _mute),  # log_dict calls it
            ("core.module", "LightningModule", "print", _mute),
            ("trainer.trainer", "Trainer", "print", _mute),
            ("trainer.trainer", "Trainer", "loggers", _silent_loggers),  # self.logger and trainer.logger ask it
            ("trainer.call", None, "_call_callback_hooks", _mute),
            ("trainer.call", None, "_call_lightning_module_hook", _mute),  # training_step and backward go elsewhere
            ("loops.optimization.automatic", "Closure", "__call__", _keep_result),
        )
    ),
    *(
        (f"{package}.fabric", "Fabric", name, change)
        for package in ("lightning.fabric", "lightning_fabric")
        for name, change in (
            ("log_dict", _mute),
            ("call", _mute),
            ("print", _mute),
            ("logger", _silent_loggers),
            ("loggers", _silent_loggers),
        )
    ),
    ("torchmetrics.metric", "Metric", "__setattr__", _note_metric),
)
