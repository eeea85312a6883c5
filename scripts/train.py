"""Train a flow-matching network with several optimizers, side by side and for equal seconds.

python scripts/train.py
python scripts/train.py --data digits --optimizers hessfree adam --budget-seconds 30 --seed 1 --device auto \
    --out runs/digits --set hessfree.damping=0.1 adam.lr=0.01
python scripts/train.py --data fashion-mnist --data-root ~/data --width 512
python scripts/train.py --target stable --budget-steps 400
python scripts/train.py --config mine.toml --coupling ot
python scripts/train.py --resume
"""

import argparse
import sys
import textwrap
from collections.abc import Sequence

try:
    from experiments import data
    from experiments.command_line import Parser, home_path
    from experiments.configuration import EXAMPLE, words_of
    from experiments.environment import UsageError
    from experiments.interruption import Interrupted
    from experiments.main_job import Job, run_job
    from experiments.optimizers import OPTIMIZERS
    from experiments.paths import COUPLINGS, TIMES
    from experiments.problems.flow import TARGETS
    from experiments.sampling import METHODS
except ModuleNotFoundError as error:
    print(f'train.py: error: {error}; run in the clone: pip install -e ".[experiments]"', file=sys.stderr)
    sys.exit(2)


def parse(arguments: Sequence[str] | None = None) -> Job:
    """Read the command line, and the file that it names.

    Args:
        arguments: Words after the program's name; None: those the process was given.

    Returns:
        What to do, not yet checked.

    Raises:
        UsageError: If the file makes no sense.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    own = parser.parse_args(words)
    if own.config is not None:
        file = words_of(own.config, parser, OPTIMIZERS)
        if own.budget_seconds is not None or own.budget_steps is not None:
            # A flag wins over the file, whichever of the two each of them names.
            file = [word for word in file if not word.startswith("--budget-")]
        words = [*file, *words]
    values = vars(parser.parse_args(words))
    del values["config"]
    return Job(**values)


def _parser() -> Parser:
    default = Job()
    parser = Parser(
        prog="train.py",
        description="Train a flow-matching network with several optimizers, side by side and for equal seconds.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"a file for --config:\n\n{textwrap.indent(EXAMPLE, '  ')}",
    )
    parser.add_argument(
        "--config", type=home_path, metavar="FILE", help="TOML: flags by name, settings by table; flags win"
    )
    add = parser.add_argument_group("data and paths").add_argument
    add("--data", default=default.data, metavar="NAME", help=f"{', '.join(data.NAMES)} [%(default)s]")
    add("--dim", type=int, metavar="64|784", help="size of the digits [64]")
    add(
        "--data-root",
        type=home_path,
        metavar="DIR",
        help=f"where images are, or shall be downloaded [{data.DEFAULT_ROOT}]",
    )
    add("--target", default=default.target, metavar="NAME", help=f"{', '.join(TARGETS)} [%(default)s]")
    add("--coupling", default=default.coupling, metavar="NAME", help=f"{', '.join(COUPLINGS)} [%(default)s]")
    add("--times", default=default.times, metavar="NAME", help=f"{', '.join(TIMES)} [%(default)s]")
    add("--sigma", type=float, default=default.sigma, help="noise of the paths about straight lines [%(default)g]")
    training = parser.add_argument_group("training")
    add = training.add_argument
    add("--width", type=int, default=default.width, metavar="N", help="of the hidden layers [%(default)d]")
    add("--hidden-layers", type=int, default=default.hidden_layers, metavar="N", help="number of these [%(default)d]")
    add(
        "--optimizers",
        nargs="+",
        metavar="NAME",
        help=f"{', '.join(OPTIMIZERS)} [hessfree dense-fisher adam; without the second above two dimensions]",
    )
    add(
        "--set",
        dest="assignments",
        nargs="+",
        action="extend",
        default=[],
        metavar="OPTIMIZER.SETTING=VALUE",
        help="change settings, e.g. hessfree.damping=0.1 adam.lr=0.01 (the latter skips Adam's sweep)",
    )
    budget = training.add_mutually_exclusive_group().add_argument
    budget("--budget-seconds", type=float, metavar="S", help="seconds of training for each optimizer [12]")
    budget("--budget-steps", type=int, metavar="N", help="steps of each instead: repeats bit for bit")
    add("--seed", type=int, default=default.seed, help="of initial weights and data [%(default)d]")
    add("--device", default=default.device, help="auto, cpu, cuda, cuda:1, mps [%(default)s]")
    add("--lightning", action=argparse.BooleanOptionalAction, default=False, help="run on Lightning's Trainer")
    add = parser.add_argument_group("samples and results").add_argument
    add("--sampler", default=default.sampler, metavar="NAME", help=f"{', '.join(METHODS)} [%(default)s]")
    add("--sampler-steps", type=int, default=default.sampler_steps, metavar="N", help="of equal length [%(default)d]")
    add(
        "--sampler-tolerance",
        type=float,
        default=default.sampler_tolerance,
        metavar="X",
        help="of dopri5 [%(default)g]",
    )
    add(
        "--out", type=home_path, metavar="DIR", help="where results go; those of an earlier run are renamed [runs/NAME]"
    )
    add("--resume", action="store_true", help="go on with what was stopped in --out; give the same flags again")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison.

    Args:
        arguments: Words after the program's name; None: those the process was given.

    Returns:
        The exit code: 0; 2 for input that makes no sense; 130 if it was stopped and can go on.
    """
    try:
        run_job(parse(arguments))
    except UsageError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except Interrupted:
        return 130
    except KeyboardInterrupt:
        print(
            "train.py: stopped", file=sys.stderr
        )  # how to go on has been said, where there is something to go on with
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
