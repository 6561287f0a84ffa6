"""What is asked of the catalog about the volumes that will be made: how they are, where their maker does not say.

The row of the store has it. A volume keeps what it was made with, whatever the defaults become.
"""

from typing import TYPE_CHECKING

from onionskin.base.named_tuples import NamedTuple
from onionskin.catalog.connection import Connection
from onionskin.catalog.schema import STORE_VALUES
from onionskin.catalog.sqlite_errors import damaged

if TYPE_CHECKING:
    from onionskin.base.annotations import WipePolicy


class Defaults(NamedTuple):
    """How a store makes a volume for which nothing else is said.

    Attributes
    ----------
    wipe : {"release", "zero"}
        Whether freed space is overwritten with zeros before it can be used again.
    block_size : int
        The unit of copy-on-write, in bytes.
    """

    wipe: "WipePolicy"
    block_size: int


class StoreDefaults(Connection):
    """The queries about the defaults of a store."""

    def defaults(self) -> Defaults:
        """Return the defaults; raise FormatError where one cannot be."""
        with self._guard, self._errors():
            found = Defaults(*self._connection.execute("SELECT wipe, block_size FROM store").fetchone() or ("", 0))
        for column, value in found._asdict().items():
            if not STORE_VALUES[column].holds(value):
                raise damaged(self.path, f"the default {column} of its volumes cannot be {value!r}")
        return found

    def set_defaults(self, defaults: Defaults) -> None:
        """Replace the defaults. Inside a transaction."""
        for column, value in defaults._asdict().items():
            if not STORE_VALUES[column].holds(value):
                raise ValueError(f"the default {column} of a store cannot be {value!r}; nothing was changed")
        self._execute("UPDATE store SET wipe = ?, block_size = ?", *defaults)
