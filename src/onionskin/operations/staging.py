"""Files that are being made, and the catalog's promise that no file is there without a row.

What must hold: a file is named in the catalog before it is made. Until the transaction that gives it its place, its row
is one of pending work, so that a crash leaves work like any other, and nobody ever has to guess from a directory's list
what is not needed. While a file is being made its lock byte is held alone, so that nobody does that work.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from errno import EDQUOT, ENOSPC

from onionskin.catalog import PendingRow, new_id
from onionskin.errors import OnionskinError, StateError
from onionskin.operations import reclaim
from onionskin.storage.locks import ByteLocks
from onionskin.storage.open_store import OpenStore


@dataclass(frozen=True, slots=True)
class StagedFiles:
    """The rows of files that are being made, in the order in which they were asked for."""

    store: OpenStore
    rows: tuple[PendingRow, ...]
    readers: list[ByteLocks] = field(default_factory=list)

    def keep(self, reader: ByteLocks | None = None) -> None:
        """Forget that the files are to be freed. Inside the transaction that names them for good.

        Whoever reads them may take shared locks from now on, and `reader` does; nobody can free them before the commit, nor
        behind it.
        """
        for row in self.rows:
            self.store.catalog.remove_work(row.id)
            self.store.locks.share_exclusive(row.lock_byte)
        if reader:
            self.readers.append(reader)
            reader.must_share({row.lock_byte for row in self.rows})

    def let_go(self) -> None:
        """Have nobody keep what was not kept after all."""
        left = {row.lock_byte for row in self.store.catalog.work_with_ids(row.id for row in self.rows)}
        for reader in self.readers:
            reader.drop_shared(left)


@contextmanager
def staged_files(store: OpenStore, kinds: Sequence[str], wipe: str) -> Iterator[StagedFiles]:
    """Name files (`map`, `segment`) that are about to be made; what `keep` was not called for is freed.

    The names are durable when the block begins. Where the block raises, the catalog decides what is kept: an interrupt
    may have come behind the commit.
    """
    catalog = store.catalog
    with ExitStack() as alone:

        def intend() -> tuple[PendingRow, ...]:
            rows = []
            for kind in kinds:
                lock_byte = catalog.take_lock_byte()
                # One that was handed out by a transaction which failed may still be locked by its taker.
                while not alone.enter_context(store.locks.exclusive(lock_byte)):
                    lock_byte = catalog.take_lock_byte()
                rows.append(catalog.add_pending(kind, new_id(), lock_byte, wipe))
            return tuple(rows)

        files = StagedFiles(store, store.change(intend))
        try:
            yield files
        except BaseException:
            alone.close()
            with suppress(OSError, OnionskinError):  # what cannot be freed now stays pending
                files.let_go()
                reclaim.work_soon(store)
            raise


class TreeChangedError(StateError):
    """Another process changed the layers that were about to be joined."""


def put_off(change: Callable[[], None]) -> bool:
    """Do work that can wait for the next open: it is left where the tree changed meanwhile, or the disk is full."""
    try:
        change()
    except TreeChangedError:
        return False
    except OSError as error:
        if error.errno not in (ENOSPC, EDQUOT):
            raise
        return False
    return True
