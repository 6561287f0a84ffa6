"""usage, diff, layering, check and list see one state of the tree while another handle merges and discards."""

import threading
from pathlib import Path

import onionskin

BLOCK = 4096
ROUNDS = 60


def change(path: Path, done: threading.Event) -> None:
    try:
        with onionskin.Store(path) as store, store.open("web") as web:
            for number in range(ROUNDS):
                web.write(number * BLOCK, b"x" * BLOCK)
                web.snapshot(f"s{number}")
                names = [snapshot.name for snapshot in web.snapshots]
                if len(names) > 4:
                    web.merge(names[-2])
                if number % 7 == 6:
                    web.revert("first")
                    web.discard(f"s{number}")
    finally:
        done.set()


def test_who_looks_is_told_neither_damage_nor_errors_while_another_changes_the_tree(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", size=ROUNDS * BLOCK) as web:
            web.snapshot("first")
        done = threading.Event()
        other = threading.Thread(target=change, args=(store.path, done))
        other.start()
        while not done.is_set():
            assert [problem for problem in store.check() if problem.severity == "error"] == []
            assert store.usage("web")[-1].snapshot is None
            store.diff("web", "first")
            # The head, or what it was when it was read and has become since: sealed, and without its name again.
            assert store.layering("web").chain[0].kind in ("head", "snapshot", "layer")
            assert [volume.name for volume in store.volumes()] == ["web"]
        other.join()
