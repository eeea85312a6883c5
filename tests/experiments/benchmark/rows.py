"""Made-up runs."""

from typing import Any


def row(problem: str, optimizer: str, seed: int, scores: list[float | None], **changes: Any) -> dict[str, Any]:
    """A run evaluated at every second from 1 on."""
    seconds = [float(second) for second in range(1, len(scores) + 1)]
    return {
        "problem": problem,
        "optimizer": optimizer,
        "seed": seed,
        "budget_seconds": float(len(scores)),
        "score": "excess_loss",
        "settings": {},
        "seconds": seconds[-1],
        "final": scores[-1],
        "losses": {},
        "steps": 10 * len(scores),
        "samples": 640 * len(scores),
        "curve": {"seconds": seconds, "score": scores, "samples": [640 * k for k in range(len(scores))]},
    } | changes
