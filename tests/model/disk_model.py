"""A plain model of a store: every disk state is a bytes object, every rule of the design a few lines.

It knows nothing of layers, segments or maps: snapshots of a volume are a tree of copies. What a store must refuse, the
model says so too.
"""

from dataclasses import dataclass, field


@dataclass
class SnapshotModel:
    """A name, the disk then, and the snapshot it descends from (of any volume)."""

    volume: str
    name: str
    disk: bytes
    parent: "SnapshotModel | None"


@dataclass
class VolumeModel:
    """A disk, and the snapshot that it descends from."""

    name: str
    disk: bytearray
    parent: "SnapshotModel | None" = None


@dataclass
class StoreModel:
    """All volumes and snapshots of a store."""

    volumes: dict[str, VolumeModel] = field(default_factory=dict)
    snapshots: list[SnapshotModel] = field(default_factory=list)

    def of(self, volume: str) -> dict[str, SnapshotModel]:
        return {snapshot.name: snapshot for snapshot in self.snapshots if snapshot.volume == volume}

    def write(self, volume: str, offset: int, data: bytes) -> None:
        self.volumes[volume].disk[offset : offset + len(data)] = data

    def resize(self, volume: str, size: int) -> None:
        disk = self.volumes[volume].disk
        del disk[size:]
        disk.extend(bytes(size - len(disk)))

    def snapshot(self, volume: str, name: str) -> None:
        model = self.volumes[volume]
        model.parent = SnapshotModel(volume, name, bytes(model.disk), model.parent)
        self.snapshots.append(model.parent)

    def revert(self, volume: str, name: str) -> None:
        snapshot = self.of(volume)[name]
        self.volumes[volume].disk = bytearray(snapshot.disk)
        self.volumes[volume].parent = snapshot

    def descends(self, snapshot: "SnapshotModel | None", from_: SnapshotModel) -> bool:
        while snapshot is not None:
            if snapshot is from_:
                return True
            snapshot = snapshot.parent
        return False

    def above(self, snapshot: SnapshotModel) -> list[SnapshotModel]:
        return [other for other in self.snapshots if other is not snapshot and self.descends(other, snapshot)]

    def may_discard(self, volume: str, name: str, recursive: bool) -> bool:
        snapshot = self.of(volume)[name]
        others = [s for s in self.above(snapshot) if s.volume != volume]
        heads = [v for v in self.volumes.values() if v.name != volume and self.descends(v.parent, snapshot)]
        own = [s for s in self.above(snapshot) if s.volume == volume]
        return not others and not heads and (recursive or not own)

    def discard(self, volume: str, name: str) -> None:
        snapshot = self.of(volume)[name]
        gone = [snapshot, *self.above(snapshot)]
        head = self.volumes[volume]
        if self.descends(head.parent, snapshot):
            head.disk = bytearray(snapshot.disk)
            head.parent = snapshot.parent
        self.snapshots = [other for other in self.snapshots if not any(other is one for one in gone)]

    def merge(self, volume: str, name: str) -> None:
        snapshot = self.of(volume)[name]
        for other in [*self.snapshots, *self.volumes.values()]:
            if other.parent is snapshot:
                other.parent = snapshot.parent
        self.snapshots.remove(snapshot)

    def clone(self, volume: str, name: str, new: str) -> None:
        snapshot = self.of(volume)[name]
        self.volumes[new] = VolumeModel(new, bytearray(snapshot.disk), snapshot)

    def flatten(self, volume: str) -> None:
        # The disk stands on nothing from then on, so a discard of a snapshot that it stood on leaves it alone.
        self.volumes[volume].parent = None

    def may_delete(self, volume: str, recursive: bool) -> bool:
        own = self.of(volume).values()
        users = [s for s in self.snapshots if s.volume != volume and any(self.descends(s, one) for one in own)]
        heads = [
            v for v in self.volumes.values() if v.name != volume and any(self.descends(v.parent, one) for one in own)
        ]
        return not users and not heads and (recursive or not own)

    def delete(self, volume: str) -> None:
        del self.volumes[volume]
        self.snapshots = [snapshot for snapshot in self.snapshots if snapshot.volume != volume]
