"""What a measurement stands on. No test looks at a clock."""

from __future__ import annotations

import gc

import torch

from experiments.timing import few_objects, quartiles, rotated, seconds, torch_threads, without_collector


def test_quartiles() -> None:
    assert quartiles([3.0]) == (3.0, 3.0)
    assert quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 4.0)


def test_every_round_begins_with_another() -> None:
    assert [rotated("abc", index) for index in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]


def test_a_call_is_timed_once() -> None:
    calls = []
    assert seconds(lambda: calls.append(1), torch.device("cpu")) > 0 and calls == [1]


def test_the_collector_rests_and_comes_back() -> None:
    with few_objects():
        assert gc.get_freeze_count() > 0
        with without_collector():
            assert not gc.isenabled()
        assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_threads_come_back() -> None:
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
