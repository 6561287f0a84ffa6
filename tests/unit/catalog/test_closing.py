"""A catalog that one thread closes while another one is in it."""

import threading
from pathlib import Path

import onionskin


def test_a_catalog_is_closed_when_the_transaction_of_another_thread_has_ended(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "vms") as store:
        catalog = store._opened.catalog
        close = threading.Thread(target=store.close)
        with catalog.transaction():
            close.start()
            close.join(0.3)  # it has the time to close it, if nothing keeps it
            number = catalog.take_lock_byte()
        close.join()
    with onionskin.Store(tmp_path / "vms") as store:
        assert store._opened.change(store._opened.catalog.take_lock_byte) > number
