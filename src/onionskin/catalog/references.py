"""Whether what rows name is there: asked before anything is dropped or freed because no row names it.

A reference of which one bit is wrong names nothing, and what it named seems to be needed by nobody. SQLite keeps wrong
references out (`foreign_keys`) and does not notice those that are there: a page may be damaged, and another program may have
written one. So a layer, a snapshot or a volume counts as not needed only in a catalog in which each reference names a row.

What must hold: the answer is found once for each opening, when it is first needed, since nothing that this package commits
leaves a reference to nothing. It takes one step of an index for each snapshot, and one for each layer that others stand on.
"""

from onionskin.catalog.connection import Connection
from onionskin.catalog.rows import LayerRow, VolumeRow
from onionskin.catalog.sqlite_errors import damaged
from onionskin.errors import FormatError

# The parents of layers, each once: a hundred thousand forks may stand on one, and are passed over in one step.
_PARENTS = (
    "WITH RECURSIVE parents(id) AS ("
    "SELECT * FROM (SELECT parent FROM layers WHERE parent IS NOT NULL ORDER BY parent LIMIT 1)"
    " UNION ALL SELECT (SELECT parent FROM layers WHERE parent > parents.id ORDER BY parent LIMIT 1) FROM parents"
    " WHERE parents.id IS NOT NULL LIMIT ?) SELECT id FROM parents WHERE id IS NOT NULL"
)
_PARENTS_FEW = 256  # if there are more, a step for each layer that stands on one takes less
# Each gives what names a row that is not there: the key of the row, its name, and the id that it has.
# The layers of snapshots alone lie in an index; to read the row of each with it took four times as long.
_SNAPSHOTS = (
    "SELECT volume, name, layer FROM snapshots WHERE layer = (SELECT layer FROM snapshots AS one"
    " WHERE NOT EXISTS (SELECT 1 FROM layers WHERE id = one.layer) ORDER BY layer LIMIT 1)"
)
_VOLUMES = (
    "SELECT layer, name, volume FROM snapshots"
    " WHERE NOT EXISTS (SELECT 1 FROM volumes WHERE id = snapshots.volume) LIMIT 1"
)
_LAYERS = (
    "SELECT id, '', parent FROM layers"
    " WHERE parent IS NOT NULL AND NOT EXISTS (SELECT 1 FROM layers AS below WHERE below.id = layers.parent) LIMIT 1"
)
_BASES = (
    "SELECT id, '', base FROM layers WHERE base IS NOT NULL"
    " AND NOT EXISTS (SELECT 1 FROM bases WHERE id = layers.base) LIMIT 1"
)


class References(Connection):
    """The question whether each reference that keeps something from being dropped names a row."""

    def refuse_dangling(self) -> None:
        """Raise FormatError where a row names a layer or a base that is not there.

        Before a layer that no row names is dropped or joined with another: it may be what that row should name.
        """
        if not self._are_references_sound:
            self._refuse("snapshots", "layer", _SNAPSHOTS)
            if not self._are_few_parents_there():
                self._refuse("layers", "layer", _LAYERS)
            self._refuse("layers", "base", _BASES)
            self._are_references_sound = True

    def refuse_snapshots_of_nobody(self) -> None:
        """Raise FormatError where a snapshot names a volume that is not there: it may be of any that seems to have none."""
        self._refuse("snapshots", "volume", _VOLUMES)

    def _are_few_parents_there(self) -> bool:
        """Whether what layers stand on is few layers, and each of them is there."""
        with self._guard, self._errors():
            parents = [id for (id,) in self._connection.execute(_PARENTS, (_PARENTS_FEW,))]
        return len(parents) < _PARENTS_FEW and len(self.values_found(LayerRow, "id", parents)) == len(parents)

    def _refuse(self, table: str, what: str, query: str) -> None:
        with self._guard, self._errors():
            row = self._connection.execute(query).fetchone()
        if row is not None:
            key, name, named = map(_shown, row)
            called = f"{key} ({name!r})" if name else key
            raise FormatError(
                f"{self.path} is damaged: the row {called} of {table} names the {what} {named}, which is not there; so "
                "nothing is dropped, joined or freed that only seems to be needed by nobody. Restore the catalog from a copy "
                "of the store; 'onionskin check' lists what is wrong"
            )

    def refuse_other_id(self, volume: VolumeRow) -> None:
        """Raise FormatError where the lineage of a volume has another id for it.

        Under a wrong id it has no unflushed writes, no snapshots and no forks, so what they hold would be freed or dropped. A
        volume that has a name has its lineage. So where there is none under its id, and there is one of its name under the id
        of no volume, the id of one of the two rows is wrong. One that a version without lineage made has none.
        """
        with self._guard, self._errors():
            if self._connection.execute("SELECT 1 FROM lineage WHERE volume = ?", (volume.id,)).fetchone():
                return
            found = self._connection.execute(
                "SELECT volume FROM lineage WHERE name = ? AND dropped_ns IS NULL"
                " AND NOT EXISTS (SELECT 1 FROM volumes WHERE id = lineage.volume)",
                (volume.name,),
            ).fetchone()
        if found:
            raise damaged(
                self.path,
                f"the row {volume.id.hex()} of volumes is {volume.name!r}, and lineage has the id {_shown(found[0])} for "
                "that; nothing of it is freed or written",
            )


def _shown(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)
