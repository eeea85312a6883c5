"""What a Lightning Trainer may show of `HessianFree`; importing this imports Lightning, and nothing else here does."""

from hessfree.lightning.monitor import HessianFreeMonitor

__all__ = ["HessianFreeMonitor"]
