import importlib.util
import textwrap
from pathlib import Path

import pytest

from experiments.configuration import EXAMPLE
from experiments.environment import UsageError
from experiments.main_job import Job
from tests.experiments.scripts import SCRIPTS

spec = importlib.util.spec_from_file_location("train_script_for_flags", SCRIPTS / "train.py")
assert spec is not None and spec.loader is not None
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def parse(tmp_path: Path, text: str, *flags: str) -> Job:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return script.parse(["--config", str(path), *flags])


FILE = """
data = "moons"
budget_seconds = 6
sigma = 0.5
seed = -3
optimizers = ["adam", "dense-fisher"]
lightning = true
[adam]
lr = 0.01
batch-size = 32
[dense-fisher]
damping = 0.1
"""


def test_a_file_says_what_flags_say(tmp_path: Path) -> None:
    job = parse(tmp_path, FILE)
    assert job.data == "moons" and job.budget_seconds == 6 and job.sigma == 0.5 and job.seed == -3 and job.lightning
    assert job.optimizers == ["adam", "dense-fisher"]
    assert job.assignments == ["adam.lr=0.01", "adam.batch_size=32", "dense-fisher.damping=0.1"]
    assert parse(tmp_path, "") == script.parse([]) == Job(assignments=[])


def test_flags_win(tmp_path: Path) -> None:
    flags = ["--data", "digits", "--budget-steps", "7", "--optimizers", "adam", "--no-lightning", "--set", "adam.lr=1"]
    job = parse(tmp_path, FILE, *flags)
    assert job.data == "digits" and job.optimizers == ["adam"] and not job.lightning
    assert job.budget_seconds is None and job.budget_steps == 7
    assert job.assignments[-1] == "adam.lr=1"  # the last assignment counts
    assert job.sigma == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dta = 1", "unknown key 'dta'; did you mean 'data'"),
        ("colour = 1", "unknown key 'colour'; the keys are: .*sigma"),
        ("set = ['adam.lr=1']", "unknown key 'set'"),
        ("[sundial]\nlr = 1", "unknown key 'sundial'"),
        ("data = ['moons']", r"data = \['moons'\]; give one number or one text"),
        ("optimizers = []", "optimizers = .*; give a list of words"),
        ("resume = true", "resume = True .*give --resume on the command line"),
        ("budget-seconds = 1\nbudget_steps = 2", "budget-seconds and budget_steps stand together.*leave one out"),
        ("lightning = 1", "lightning = 1; give true or false"),
        ("adam = 1", r"adam = 1 is no table; write \[adam\]"),
        ("[adam]\nlr = [1]", r"adam.lr = \[1\]; give a number"),
        ("data = ", "is no TOML"),
    ],
)
def test_files_that_make_no_sense(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"mine.toml.*{message}"):
        parse(tmp_path, text)


def test_a_value_that_is_no_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(tmp_path, "seed = 'one'")
    assert "argument --seed: invalid int value: 'one'" in capsys.readouterr().err


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.toml").write_text('out = "~/runs"\ndata-root = "~/data"')
    job = script.parse(["--config=~/mine.toml"])
    assert job.out == tmp_path / "runs" and job.data_root == tmp_path / "data"


def test_help_shows_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = parse(tmp_path, EXAMPLE)
    assert job.budget_seconds == 30 and job.assignments == ["hessfree.damping=0.1"]
    with pytest.raises(SystemExit):
        script.parse(["--help"])
    assert textwrap.indent(EXAMPLE, "  ") in capsys.readouterr().out


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="no.toml.*cannot be read"):
        script.parse(["--config", "no.toml"])
