"""How far a catalog has come: numbers that only grow, in any change that makes or frees a file."""

from onionskin.base.named_tuples import NamedTuple
from onionskin.catalog.connection import Connection
from onionskin.catalog.schema import STORE_VALUES


class Progress(NamedTuple):
    """The id of the store, the last lock byte that was handed out, and the last number that pending work was given."""

    uuid: bytes
    lock_bytes: int
    works: int


class ProgressOfStore(Connection):
    """The query about how far the catalog has come."""

    def progress(self) -> Progress | None:
        """Return how far the catalog has come; None where its row of the store is not sound."""
        with self._guard, self._errors():
            found = self._connection.execute(
                "SELECT uuid, next_lock_byte, coalesce((SELECT max(seq) FROM sqlite_sequence WHERE name = 'pending'), 0)"
                " FROM store"
            ).fetchone()
        if found is None or type(found[2]) is not int:
            return None
        is_sound = STORE_VALUES["uuid"].holds(found[0]) and STORE_VALUES["next_lock_byte"].holds(found[1])
        return Progress(*found) if is_sound and found[2] >= 0 else None

    def durable_progress(self) -> Progress | None:
        """Return how far the catalog has come, if a commit of this connection has made all that it sees durable, or None."""
        with self._guard, self._errors():
            if not self._commits or self._is_log_lost or self._is_unknown or self._connection.in_transaction:
                return None
            self._connection.execute("BEGIN")  # one state for both questions
            try:
                return self.progress() if self._synced_version == self._version_of_others() else None
            finally:
                self._roll_back()
