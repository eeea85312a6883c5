"""What every implementation of the product looks like to the stop-watch."""

import abc
import importlib.util
from typing import Any, ClassVar

from torch import Tensor

from experiments.benchmark.products.workloads import Workload


class UnsupportedError(RuntimeError):
    """An implementation cannot serve a workload; the message says why."""


class Product(abc.ABC):
    """One way to multiply by the Gauss-Newton matrix of a workload.

    A vector is brought into the library's own form by `encode`, and its answer back by `decode`: neither is timed, for
    a user of that library has no torch vectors to convert.

    Attributes:
        name: What tables call it.
        package: The import name that it needs; None: torch alone.
        requirement: What pip installs for it.
        is_product: Whether it computes G v, and not something that products are measured against.
        counts_memory: Whether torch's allocator sees its memory.
        workload: What it multiplies by.
        kept: What a set-up keeps for the products that follow it.
    """

    name: ClassVar[str]
    package: ClassVar[str | None] = None
    requirement: ClassVar[str] = ""
    is_product: ClassVar[bool] = True
    counts_memory: ClassVar[bool] = True

    def __init__(self, workload: Workload) -> None:
        """Prepare what is prepared once in a process.

        Args:
            workload: What to multiply by.

        Raises:
            UnsupportedError: If it cannot serve the workload.
        """
        self.workload = workload
        self.kept: Any = None

    @property
    def detail(self) -> str:
        """In a word: what it chose to do, where it chooses; known after a set-up."""
        return ""

    @classmethod
    def is_installed(cls) -> bool:
        """Tell whether its package can be imported here."""
        return cls.package is None or importlib.util.find_spec(cls.package) is not None

    def refresh(self) -> None:
        """Take over parameters that have changed, where they are not torch's own; not timed."""
        return

    def setup(self) -> None:
        """Do what a new value of the parameters asks for; timed."""
        return

    @abc.abstractmethod
    def product(self, v: Any) -> Any:
        """Return G v; timed.

        Args:
            v: What `encode` returned.

        Returns:
            What `decode` takes, all of it computed.
        """

    def start(self, v: Any) -> Any:
        """Do both for a new value of the parameters: the set-up, and the first product.

        Args:
            v: What `encode` returned.

        Returns:
            What `decode` takes.
        """
        self.setup()
        return self.product(v)

    def encode(self, v: Tensor) -> Any:
        """Bring a flat vector `[P]` into the library's own form; not timed."""
        return v

    def decode(self, product: Any) -> Tensor:
        """Bring the library's answer into a flat vector `[P]`; not timed."""
        return product
