"""One lock for each key: who wants another key does not wait, and none is kept that nobody wants."""

import threading

from onionskin.base.keyed_locks import KeyedLocks


def test_another_key_is_not_waited_for() -> None:
    locks = KeyedLocks()
    with locks.holding("a"), locks.holding("b"):
        pass
    assert not locks._locks and not locks._wanted


def test_the_same_key_is_waited_for() -> None:
    locks, order = KeyedLocks(), []

    def late() -> None:
        with locks.holding("a"):
            order.append("late")

    thread = threading.Thread(target=late)
    with locks.holding("a"):
        thread.start()
        thread.join(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "late"]
    assert not locks._locks
