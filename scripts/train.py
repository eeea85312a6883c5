"""Train a flow-matching network with several optimizers, side by side and for equal seconds.

python scripts/train.py
python scripts/train.py --data digits --optimizers hessfree adam --budget-seconds 30 --seed 1 --device auto \
    --out runs/digits --set hessfree.damping=0.1 adam.lr=0.01
"""

import sys
from collections.abc import Sequence
from pathlib import Path

try:
    from experiments import data
    from experiments.command_line import Parser
    from experiments.environment import UsageError
    from experiments.main_job import Job, run_job
    from experiments.optimizers import OPTIMIZERS
except ModuleNotFoundError as error:
    print(f'train.py: error: {error}; run in the clone: pip install -e ".[experiments]"', file=sys.stderr)
    sys.exit(2)


def parse(arguments: Sequence[str] | None = None) -> Job:
    """Read the command line.

    Args:
        arguments: Words after the program's name; None: those the process was given.

    Returns:
        What to do, not yet checked.
    """
    parser = Parser(
        prog="train.py",
        description="Train a flow-matching network with several optimizers, side by side and for equal seconds.",
        allow_abbrev=False,
    )
    default = Job()
    parser.add_argument("--data", default=default.data, metavar="NAME", help=f"{', '.join(data.NAMES)} [%(default)s]")
    parser.add_argument("--dim", type=int, metavar="64|784", help="size of the digits [64]")
    parser.add_argument(
        "--optimizers",
        nargs="+",
        metavar="NAME",
        help=f"{', '.join(OPTIMIZERS)} [all for two-dimensional data, all but dense-fisher for digits]",
    )
    parser.add_argument(
        "--budget-seconds",
        type=float,
        default=default.budget_seconds,
        metavar="S",
        help="seconds of training for each optimizer [%(default)g]",
    )
    parser.add_argument("--seed", type=int, default=default.seed, help="of initial weights and data [%(default)d]")
    parser.add_argument("--device", default=default.device, help="auto, cpu, cuda, cuda:1, mps [%(default)s]")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where results go; replaces those of an earlier run [runs/NAME]"
    )
    parser.add_argument(
        "--set",
        dest="assignments",
        nargs="+",
        action="extend",
        default=[],
        metavar="OPTIMIZER.SETTING=VALUE",
        help="change settings, e.g. hessfree.damping=0.1 adam.lr=0.01 (the latter skips Adam's sweep)",
    )
    return Job(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison.

    Args:
        arguments: Words after the program's name; None: those the process was given.

    Returns:
        The exit code: 0, or 2 for input that makes no sense.
    """
    job = parse(arguments)
    try:
        run_job(job)
    except UsageError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
