"""Calls that run side by side: at the same time, with the first error in order, and where no thread can be started."""

import threading

import pytest

from onionskin.base import side_by_side as module
from onionskin.base.side_by_side import side_by_side


def test_all_calls_run_at_the_same_time() -> None:
    together = threading.Barrier(4)
    with side_by_side(4) as beside:
        for _ in range(2):
            beside.run([lambda: together.wait(300)] * 4)


def test_more_calls_than_threads_all_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "THREADS_MAX", 2)
    done: list[int] = []
    with side_by_side(9) as beside:
        beside.run([lambda number=number: done.append(number) for number in range(9)])  # type: ignore[misc]
    assert sorted(done) == list(range(9))


def test_the_error_of_the_first_in_order_is_raised_when_all_have_ended() -> None:
    done: list[str] = []

    def fail(what: str) -> None:
        done.append(what)
        raise ValueError(what)

    with side_by_side(3) as beside:
        with pytest.raises(ValueError, match="b"):
            beside.run([lambda: done.append("a"), lambda: fail("b"), lambda: fail("c")])
        assert sorted(done) == ["a", "b", "c"]
        beside.run([lambda: done.append("d")])
    assert done[-1] == "d"


def test_where_no_thread_can_be_started_the_calls_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    done: list[int] = []
    with side_by_side(3) as beside:
        beside.run([lambda number=number: done.append(number) for number in range(3)])  # type: ignore[misc]
    assert done == [0, 1, 2]
