"""Pieces of work that threads take by themselves, and the order in which what they make is placed."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from services.enumeration.lattice import Cancelled
from services.enumeration.work_units import Crew, Watch


def crew(threads: int, cancelled=None) -> Crew:
    return Crew(threads, Watch(None, cancelled))


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_results_are_placed_in_order_whoever_is_done_first(threads):
    placed, after = [], []
    turns = np.random.default_rng(0).integers(0, 20_000, 200).tolist()

    def work(number: int) -> int:
        sum(range(turns[number]))  # takes long for some
        return number

    def place(number: int):
        placed.append(number)
        return lambda: after.append(number)

    crew(threads).place(range(200), work, place)
    assert placed == list(range(200))
    assert sorted(after) == placed


def test_few_results_wait_for_one_that_takes_long():
    slow, made, most = threading.Event(), [], 0

    def work(number: int) -> int:
        nonlocal most
        if number == 0:
            assert not slow.wait(0.3)  # all others that may be made are made by then
            most = len(made)
        else:
            made.append(number)
        return number

    crew(2).place(range(100), work, lambda _: lambda: None)
    assert 0 < most < 4
    assert len(made) == 99


@pytest.mark.parametrize("where", ["work", "place", "then"])
@pytest.mark.parametrize("threads", [1, 3])
def test_what_a_thread_meets_is_raised_and_the_others_stop(where, threads):
    begun = []

    def fail(here: str, number: int) -> None:
        if here == where and number == 5:
            raise ValueError("piece 5")

    def work(number: int) -> int:
        begun.append(number)
        fail("work", number)
        return number

    def place(number: int):
        fail("place", number)
        return lambda: fail("then", number)

    with pytest.raises(ValueError, match="piece 5"):
        crew(threads).place(range(1_000), work, place)
    assert len(begun) < 100


def test_nothing_is_begun_for_a_caller_who_has_cancelled():
    begun = []
    with pytest.raises(Cancelled):
        crew(2, lambda: True).place(range(50), begun.append, lambda _: lambda: None)
    assert len(begun) < 5


def test_no_pieces_are_no_work():
    crew(2).place([], lambda _: None, lambda _: lambda: None)
