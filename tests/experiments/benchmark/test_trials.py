from pathlib import Path

from experiments.benchmark import trials, tuning

RECORD: tuning.Tuned = {
    "moons": {
        "adam": {
            "chosen": {"lr": 0.1},
            "at_edge": ["lr"],
            "budget_seconds": 4.8,
            "trials": [
                {"changes": {"lr": 0.01}, "score": 3.0},
                {"changes": {"lr": 0.1}, "score": 0.5},
                {"changes": {"lr": 1.0}, "score": None},
            ],
        },
        "sgd": {
            "chosen": {"lr": 0.1},
            "at_edge": [],
            "budget_seconds": 2.0,
            "clock": "cpu",
            "trials": [{"changes": {"lr": 0.1}, "score": 0.25}],
        },
    }
}


def test_all_trials_are_shown_from_the_best() -> None:
    lines = trials.table(RECORD, ["moons", "digits"]).splitlines()
    assert lines[2] == "| moons | adam (at the edge: lr) | 4.8 | lr 0.1: 0.5; lr 0.01: 3; lr 1: diverged |"
    assert lines[3] == "| moons | sgd | 2 of the processor | lr 0.1: 0.25 |"
    assert len(lines) == 4


def test_the_figure(tmp_path: Path) -> None:
    path = trials.write_figure(tmp_path / "trials.png", RECORD, ["moons", "digits"])
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert trials.write_figure(tmp_path / "none.png", {}, ["moons"]).stat().st_size > 0


def test_every_published_setting_has_its_trials() -> None:
    published = tuning.load()
    for problem, contenders in published.items():
        for name, one in contenders.items():
            scores = {str(trial["changes"]): trial["score"] for trial in one["trials"]}
            assert len(scores) >= 4, (problem, name)
            best = min(score for score in scores.values() if score is not None)
            assert scores[str(one["chosen"])] == best and one["seed"] == tuning.SEED
