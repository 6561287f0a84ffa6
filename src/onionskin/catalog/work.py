"""The queries about pending work: the merges into a base, and the files and slots that are to be reclaimed.

All pending work other than a merge into a base frees something, either a file or slots of a file. `rows.WorkRow`
describes each kind.
"""

from collections.abc import Iterable

from onionskin.catalog.connection import Connection, check_rows, check_values
from onionskin.catalog.rows import WorkRow


class Work(Connection):
    """The queries about pending work. Each raises FormatError if a row that it returns breaks a condition."""

    # ---- work of any kind ----

    def add_work(self, kind: str, target: bytes, lock_byte: int, wipe: str) -> WorkRow:
        """Note work that has to be done. Inside a transaction."""
        values = {"kind": kind, "target": target, "lock_byte": lock_byte, "wipe": wipe}
        check_values(WorkRow, values.items())
        cursor = self._connection.execute(
            "INSERT INTO pending (kind, target, lock_byte, wipe) VALUES (?, ?, ?, ?)", tuple(values.values())
        )
        assert cursor.lastrowid is not None
        return WorkRow(cursor.lastrowid, kind, target, lock_byte, wipe)

    def add_all_work(self, rows: Iterable[tuple[str, bytes, int, str]]) -> None:
        """Note work: (kind, target, lock byte, wipe) of each. Inside a transaction."""
        columns = ("kind", "target", "lock_byte", "wipe")
        noted = list(rows)
        check_rows(WorkRow, columns, noted)
        self._connection.executemany(f"INSERT INTO pending ({', '.join(columns)}) VALUES (?, ?, ?, ?)", noted)

    def work_with_id(self, id: int) -> WorkRow | None:
        """Return pending work by its id, or None if it was done or need not be done any more."""
        return self.row(WorkRow, "id = ?", id)

    def work_with_ids(self, ids: Iterable[int]) -> list[WorkRow]:
        """Return the part of this work that still has to be done, in no order."""
        return self.rows_in(WorkRow, "id", ids)

    def remove_work(self, id: int) -> None:
        """Forget work that was done or need not be done any more. Inside a transaction."""
        self.delete(WorkRow, "id = ?", id)

    def last_work(self) -> int:
        """Return the greatest id of any work. Work that this transaction notes from now on has greater ones."""
        with self._guard, self._errors():
            (last,) = self._connection.execute("SELECT max(id) FROM pending").fetchone()
        return last if type(last) is int else 0

    def segments_freed_since(self, work: int) -> list[bytes]:
        """Return the segments that later work than this is to free as a whole."""
        return [id for (id,) in self.values(WorkRow, "target", "id > ? AND kind = 'segment'", work)]

    # ---- merges into a base ----

    def base_merges(self) -> list[WorkRow]:
        """Return the merges into a base that were begun and not ended, in no order. There seldom are any.

        Unsound rows are left out.
        """
        return self.sound_rows(WorkRow, "kind = 'base-merge'")

    def base_merge_of(self, layer: bytes) -> WorkRow | None:
        """Return the merge into the base up to this layer that was begun and not ended, or None."""
        return self.row(WorkRow, "kind = 'base-merge' AND target = ?", layer)

    def remove_base_merge_of(self, *layers: bytes) -> None:
        """Forget the merges into the base up to these layers, where one was begun. Inside a transaction."""
        if self.has(WorkRow, "kind = 'base-merge'"):  # there seldom is one
            for layer in layers:
                self.delete(WorkRow, "kind = 'base-merge' AND target = ?", layer)

    # ---- work that reclaims files and slots ----

    def reclaims(self, wipe: str | None = None) -> list[WorkRow]:
        """Return the work that reclaims something, of one wipe policy or of all, in the order in which it was noted.

        Unsound rows are left out.
        """
        if wipe is None:
            return self.sound_rows(WorkRow, "kind != 'base-merge' ORDER BY id")
        return self.sound_rows(WorkRow, "kind != 'base-merge' AND wipe = ? ORDER BY id", wipe)

    def has_reclaims(self, wipe: str | None = None) -> bool:
        """Whether anything is to be reclaimed, with one wipe policy or with any. The row of the work may be unsound."""
        if wipe is None:
            return self.has(WorkRow, "kind != 'base-merge'")
        return self.has(WorkRow, "kind != 'base-merge' AND wipe = ?", wipe)

    def slot_work_of(self, segments: Iterable[bytes]) -> list[WorkRow]:
        """Return the pending work on slots of these segments, in no order."""
        return self.rows_in(WorkRow, "target", segments, "kind = 'scrub'")
