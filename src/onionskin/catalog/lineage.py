"""What is asked of the catalog about where volumes come from, and about the forks that were asked for under a key."""

from collections.abc import Iterable

from onionskin.catalog.connection import Connection
from onionskin.catalog.rows import ForkCallRow, LineageRow, VolumeRow


class Lineage(Connection):
    """The queries about lineage. Each raises FormatError where a row that it returns breaks a condition."""

    def lineage_of(self, volume: bytes | None) -> LineageRow | None:
        """Return where a volume comes from, also of one that is gone and that others come from; or None."""
        return self.row(LineageRow, "volume = ?", volume)

    def forks_of(self, volume: bytes) -> list[VolumeRow]:
        """Return the volumes that were cloned or forked from one, by name; those that are gone are left out."""
        return self.rows(VolumeRow, "id IN (SELECT volume FROM lineage WHERE parent = ?) ORDER BY name", volume)

    def forks_of_snapshot(self, volume: bytes, guid: bytes) -> list[VolumeRow]:
        """Return the volumes that began as this snapshot of a volume, by name; those that are gone are left out."""
        return self.rows(
            VolumeRow, "id IN (SELECT volume FROM lineage WHERE parent = ? AND guid = ?) ORDER BY name", volume, guid
        )

    def has_forks(self, volume: bytes) -> bool:
        """Whether a volume is there that was cloned or forked from one."""
        # Of one that an older onionskin dropped, which was open when the catalog was upgraded, `dropped_ns` says nothing.
        return self.has(VolumeRow, "id IN (SELECT volume FROM lineage WHERE parent = ?)", volume)

    def end_lineage(self, volumes: Iterable[bytes], dropped_ns: int) -> None:
        """Note that volumes are gone, and forget them and all above them that nothing comes from. Inside a transaction."""
        ended = set(volumes)
        kept = self.values_found(LineageRow, "parent", ended)
        self._connection.executemany(
            "UPDATE lineage SET dropped_ns = ? WHERE volume = ?", [(dropped_ns, volume) for volume in kept]
        )
        gone = self.rows_in(LineageRow, "volume", ended - kept)
        while gone:
            self.delete_all(LineageRow, "volume", [row.volume for row in gone])
            above = {row.parent for row in gone if row.parent is not None}
            dropped = self.rows_in(LineageRow, "volume", above, "dropped_ns IS NOT NULL")
            parents = self.values_found(LineageRow, "parent", [row.volume for row in dropped])
            gone = [row for row in dropped if row.volume not in parents]

    def fork_call(self, key: str) -> ForkCallRow | None:
        """Return what was forked under a key, or None."""
        return self.row(ForkCallRow, "key = ?", key)

    def remember_fork_call(self, row: ForkCallRow) -> None:
        """Note what was forked under a key; what was forked under it before is forgotten. Inside a transaction."""
        self.delete(ForkCallRow, "key = ?", row.key)
        self.insert(row)

    def fork_calls_before(self, time_ns: int) -> list[ForkCallRow]:
        """Return the calls under keys that were noted before a time, in no order. Unsound rows are left out."""
        return self.sound_rows(ForkCallRow, "created_ns < ?", time_ns)

    def forget_fork_calls(self, keys: Iterable[str]) -> None:
        """Forget these keys of forks. Inside a transaction."""
        self._connection.executemany("DELETE FROM fork_calls WHERE key = ?", [(key,) for key in keys])
