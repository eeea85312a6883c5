"""Measure HessianFree against tuned rivals at equal seconds, its own parts against each other, or its product G v.

The other commands are studies: one question about products with Jacobians each, with a table and a picture.

python scripts/benchmark.py optimizers
python scripts/benchmark.py optimizers --tune --trials 4 --problems digits
python scripts/benchmark.py optimizers --problems digits poisson --optimizers hessfree adam --seeds 0 1 --out runs/mine
python scripts/benchmark.py ablation --problems 8gaussians-stable
python scripts/benchmark.py replay --problems digits --seeds 0
python scripts/benchmark.py floor --problems 8gaussians moons
python scripts/benchmark.py products --models toy784 conv --out runs/mine
python scripts/benchmark.py matmul-vjp --quick --out runs/mine
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

try:
    from experiments.benchmark import suite
    from experiments.benchmark.ablation import PROBLEMS
    from experiments.benchmark.averaging import FloorJob
    from experiments.benchmark.averaging import run as run_floor
    from experiments.benchmark.job import Job, run_ablation, run_optimizers
    from experiments.benchmark.products.implementations import IMPLEMENTATIONS
    from experiments.benchmark.products.job import ProductsJob
    from experiments.benchmark.products.job import run as run_products
    from experiments.benchmark.products.workloads import NAMES
    from experiments.benchmark.replay import ReplayJob
    from experiments.benchmark.replay import run as run_replay
    from experiments.command_line import Parser, home_path
    from experiments.environment import UsageError
    from experiments.studies import STUDIES
    from experiments.studies.job import StudyJob
    from experiments.studies.job import run as run_study
except ModuleNotFoundError as error:
    print(f'benchmark.py: error: {error}; run in the clone: pip install -e ".[experiments]"', file=sys.stderr)
    sys.exit(2)

COMMANDS: dict[str, tuple[Callable[..., Any], Callable[[Any], Any]]] = {
    "optimizers": (Job, run_optimizers),
    "ablation": (Job, run_ablation),
    "products": (ProductsJob, run_products),
    "replay": (ReplayJob, run_replay),
    "floor": (FloorJob, run_floor),
    **{name: (functools.partial(StudyJob, study=name), run_study) for name in STUDIES},
}


def parse(arguments: Sequence[str] | None = None) -> tuple[str, Any]:
    """Read the command line.

    Args:
        arguments: Words after the program's name; None: those the process was given.

    Returns:
        The command, and what to do, not yet checked.
    """
    default = Job()
    every = Parser(add_help=False)
    every.add_argument("--quick", action="store_true", help="as little as shows that all runs, and no more")
    every.add_argument(
        "--out", type=home_path, metavar="DIR", help="where results go [runs/COMMAND, or runs/benchmark]"
    )
    every.add_argument("--threads", type=int, default=default.threads, metavar="N", help="of torch [%(default)d]")
    every.add_argument("--device", default=default.device, help="auto, cpu, cuda, cuda:1, mps [%(default)s]")
    common = Parser(add_help=False, parents=[every])
    common.add_argument("--fresh", action="store_true", help="start over: leave out the results that --out holds")
    common.add_argument(
        "--seeds", nargs="+", type=int, default=default.seeds, metavar="N", help="runs [0 1 2; quick: 0]"
    )
    common.add_argument("--budget-seconds", type=float, metavar="S", help="of each run, in place of the problem's")
    common.add_argument("--tuned", type=home_path, metavar="FILE", help="settings found by --tune [the published ones]")
    common.add_argument(
        "--data-root", type=home_path, metavar="DIR", help="where the images of fashion-mnist are, or shall go"
    )
    common.add_argument(
        "--jobs",
        type=int,
        default=default.jobs,
        metavar="N",
        help="trials at a time, which share the threads; reported runs go one by one in any case [%(default)d]",
    )
    common.add_argument("--trials", type=int, metavar="N", help="how many of each grid are tried [all]")
    parser = Parser(prog="benchmark.py", description=__doc__.partition("\n")[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    optimizers = commands.add_parser(
        "optimizers", parents=[common], allow_abbrev=False, help="HessianFree against its rivals"
    )
    optimizers.add_argument("--tune", action="store_true", help="find the settings of each, instead of running them")
    optimizers.add_argument(
        "--problems", nargs="+", metavar="NAME", help=f"all, or {', '.join(suite.BUDGETS)} [{' '.join(suite.CORE)}]"
    )
    optimizers.add_argument(
        "--optimizers",
        nargs="+",
        metavar="NAME",
        help=f"{', '.join(suite.CONTENDERS)} [all on {' '.join(suite.EXTENDED)}; elsewhere the first five]",
    )
    ablation = commands.add_parser(
        "ablation", parents=[common], allow_abbrev=False, help="HessianFree with one thing changed at a time"
    )
    ablation.add_argument(
        "--problems", nargs="+", metavar="NAME", help=f"{', '.join(suite.BUDGETS)} [{' '.join(PROBLEMS)}]"
    )
    ablation.add_argument(
        "--variations", dest="optimizers", nargs="+", metavar="NAME", help="of the table's first column [all]"
    )
    products = commands.add_parser(
        "products", parents=[every], allow_abbrev=False, help="the product G v against every library that has one"
    )
    products.add_argument("--models", nargs="+", metavar="NAME", help=f"{', '.join(NAMES)} [all]")
    products.add_argument("--implementations", nargs="+", metavar="NAME", help=f"{'; '.join(IMPLEMENTATIONS)} [all]")
    for name, study in STUDIES.items():
        one = commands.add_parser(name, parents=[every], allow_abbrev=False, help=study.question)
        one.add_argument("--parts", nargs="+", metavar="NAME", help=f"{', '.join(study.parts)} [all]; others are kept")
        one.add_argument("--memory-gb", type=float, metavar="GB", help="what one form may need [half of what is free]")
    floor = commands.add_parser(
        "floor", allow_abbrev=False, help="the statistical floor beside what averaging Adam's iterates comes to"
    )
    usual = FloorJob()
    floor.add_argument("--problems", nargs="+", default=usual.problems, metavar="NAME", help="[8gaussians]")
    floor.add_argument("--seeds", nargs="+", type=int, default=usual.seeds, metavar="N", help="[0]")
    floor.add_argument("--steps", type=int, default=usual.steps, metavar="N", help="of Adam [%(default)d]")
    floor.add_argument("--threads", type=int, default=usual.threads, metavar="N", help="of torch [%(default)d]")
    replay = commands.add_parser(
        "replay", allow_abbrev=False, help="the runs of `optimizers` again: are their losses the same to the last bit?"
    )
    replay.add_argument("--out", type=home_path, metavar="DIR", help="where results.json is [runs/benchmark]")
    replay.add_argument("--problems", nargs="+", metavar="NAME", help="whose runs are repeated [all]")
    replay.add_argument("--optimizers", nargs="+", metavar="NAME", help="whose runs are repeated [all]")
    replay.add_argument("--seeds", nargs="+", type=int, metavar="N", help="whose runs are repeated [all]")
    replay.add_argument("--tuned", type=home_path, metavar="FILE", help="the settings of the runs [the published ones]")
    replay.add_argument("--jobs", type=int, default=1, metavar="N", help="0: all in this process [%(default)d]")
    replay.add_argument("--data-root", type=home_path, metavar="DIR", help="where the images of fashion-mnist are")
    words = vars(parser.parse_args(arguments))
    command = words.pop("command")
    return command, COMMANDS[command][0](**words)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark.

    Args:
        arguments: Words after the program's name; None: those the process was given.

    Returns:
        The exit code: 0, or 2 for input that makes no sense.
    """
    command, job = parse(arguments)
    try:
        COMMANDS[command][1](job)
    except UsageError as error:
        print(f"benchmark.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
