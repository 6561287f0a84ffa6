"""What is asked of the catalog about where volumes come from, and about the forks that were asked for under a key."""

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

    def end_lineage(self, volume: bytes, dropped_ns: int) -> None:
        """Note that a volume is gone, and forget it and all above it that nothing comes from. Inside a transaction."""
        self._execute("UPDATE lineage SET dropped_ns = ? WHERE volume = ?", dropped_ns, volume)
        at: bytes | None = volume
        while at is not None:
            row = self.lineage_of(at)
            if row is None or row.dropped_ns is None or self.has(LineageRow, "parent = ?", at):
                return
            self.delete(LineageRow, "volume = ?", at)
            at = row.parent

    def fork_call(self, key: str) -> ForkCallRow | None:
        """Return what was forked under a key, or None."""
        return self.row(ForkCallRow, "key = ?", key)

    def forget_fork_calls(self, before_ns: int) -> None:
        """Forget the keys of forks that were made before a time. Inside a transaction."""
        self.delete(ForkCallRow, "created_ns < ?", before_ns)
