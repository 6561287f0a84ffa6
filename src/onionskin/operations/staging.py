"""Makes files so that none exists without a row in the catalog.

What must hold: a file is named in the catalog before it is made. Until the transaction that names it for good, its row
says that the file has to be freed. So a crash leaves ordinary pending work, and nobody has to guess from the list of a
directory which files are not needed. While a file is being made, its lock byte is held alone, so nobody frees it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from errno import EDQUOT, ENOSPC

from onionskin.base.records import field, record
from onionskin.catalog import WorkRow, new_id
from onionskin.errors import OnionskinError, StateError
from onionskin.operations import reclaim
from onionskin.storage.locks import ByteLocks
from onionskin.storage.open_store import OpenStore


@record
class StagedFiles:
    """The rows of files that are being made, in the order in which they were asked for."""

    store: OpenStore
    rows: tuple[WorkRow, ...]
    readers: list[ByteLocks] = field(default_factory=list)

    def keep(self, reader: ByteLocks | None = None) -> None:
        """Forget that the files are to be freed. Inside the transaction that names them for good.

        Readers may take shared locks from now on, and `reader` does. Nobody can free the files before the commit or after
        it.
        """
        for row in self.rows:
            self.store.catalog.remove_work(row.id)
            self.store.locks.share_exclusive(row.lock_byte)
        if reader:
            self.readers.append(reader)
            reader.must_share({row.lock_byte for row in self.rows})

    def let_go(self) -> None:
        """Release the readers' locks on the files that were not kept after all."""
        left = {row.lock_byte for row in self.store.catalog.work_with_ids(row.id for row in self.rows)}
        for reader in self.readers:
            reader.drop_shared(left)


@contextmanager
def staged_files(store: OpenStore, kinds: Sequence[str], wipe: str) -> Iterator[StagedFiles]:
    """Name files (`map`, `segment`) that are about to be made. Those that `keep` was not called for are freed.

    The names are durable when the block begins. If the block raises, the catalog decides which files are kept: an
    interrupt may have come after the commit.
    """
    catalog = store.catalog
    with ExitStack() as alone:

        def intend() -> tuple[WorkRow, ...]:
            rows = []
            for kind in kinds:
                lock_byte = catalog.take_lock_byte()
                # A byte that a failed transaction handed out may still be locked by the process that took it.
                while not alone.enter_context(store.locks.exclusive(lock_byte)):
                    lock_byte = catalog.take_lock_byte()
                rows.append(catalog.add_work(kind, new_id(), lock_byte, wipe))
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
    """Another process changed the layers that an operation was about to join."""


def put_off(change: Callable[[], None]) -> bool:
    """Do work that can wait for the next open. If the tree changed meanwhile, or the disk is full, return False."""
    try:
        change()
    except TreeChangedError:
        return False
    except OSError as error:
        if error.errno not in (ENOSPC, EDQUOT):
            raise
        return False
    return True
