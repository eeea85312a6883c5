import pytest

from experiments.benchmark.pace import STAIRS, Pace


def course(pace: Pace, seconds: list[float]) -> list[float]:
    return [pace.fraction(second, step) for step, second in enumerate(seconds)]


def test_stairs_follow_the_clock_and_are_repeated_without_it() -> None:
    seconds = [0.0, 0.001, 0.3, 0.3001, 1.7, 1.99, 2.1]
    pace = Pace(2.0)
    first = course(pace, seconds)
    assert first == [0.0, 0.0, 60 / STAIRS, 60 / STAIRS, 340 / STAIRS, 398 / STAIRS, 1.0]
    assert len(pace.reached) == STAIRS and pace.reached[-1] == 6
    again = Pace(2.0, pace.reached)
    assert course(again, [50.0 - second for second in seconds]) == first


def test_asking_twice_changes_nothing() -> None:
    pace = Pace(1.0)
    assert pace.fraction(0.5, 3) == pace.fraction(0.5, 3) == 0.5
    assert pace.fraction(0.5, 4) == 0.5 and pace.reached == [3] * (STAIRS // 2)


def test_a_course_that_is_none() -> None:
    with pytest.raises(ValueError, match="reached has 2 entries; 400"):
        Pace(1.0, [1, 2])
    with pytest.raises(ValueError, match="no budget"):
        Pace(0.0)
