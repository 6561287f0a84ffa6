"""What a verb drops that nothing else holds: what --dry-run says, and what is asked before.

One rule for all verbs: once it is known that it can be done, and that something would be lost, the user is asked on a
terminal, and --yes is wanted elsewhere. Where nothing would be lost, nothing is asked.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from onionskin.base.naming import some_of
from onionskin.cli import output
from onionskin.cli.arguments import live
from onionskin.errors import StateError

if TYPE_CHECKING:
    from onionskin.control.client import LiveVolume
    from onionskin.operations.losses import Loss
    from onionskin.store import Store

_NAMES_SHOWN = 1000  # who is asked whether all of them may go sees them; --json has as many as there are
dry_run_option = click.option("--dry-run", is_flag=True, help="Change nothing, and say what would go.")
yes_option = click.option("--yes", is_flag=True, help="Drop what nothing else holds without asking.")


def describe(losses: "Sequence[Loss]") -> str:
    """Write what goes, for people: names, and how many bytes come back."""
    volumes = [name for loss in losses for name in loss.volumes]
    snapshots = [name for loss in losses for name in loss.snapshots]
    bytes_freed = freed(losses)
    parts = [f"the volume{'s' * (len(volumes) > 1)} {some_of(volumes, _NAMES_SHOWN)}"] if volumes else []
    parts += [f"the snapshot{'s' * (len(snapshots) > 1)} {some_of(snapshots, _NAMES_SHOWN)}"] if snapshots else []
    room = "data that cannot be counted" if bytes_freed is None else f"{output.size(bytes_freed)} of data"
    return " and ".join([*parts, f"{room} that nothing else holds"])


def freed(losses: "Sequence[Loss]") -> int | None:
    """Add up the bytes that come back; None where nobody knows."""
    counts = [loss.bytes_freed for loss in losses]
    return None if None in counts else sum(count for count in counts if count is not None)


def tell_dry_run(as_json: bool, verb: str, losses: "Sequence[Loss]") -> None:
    """Print what would go."""
    value: dict[str, Any] = {
        "dry_run": True,
        "volumes": [name for loss in losses for name in loss.volumes],
        "snapshots": [name for loss in losses for name in loss.snapshots],
        "bytes_freed": freed(losses),
    }
    output.show(as_json, value, lambda: f"{verb} would drop {describe(losses)}; nothing was changed")


def agree(verb: str, losses: "Sequence[Loss]", *, yes: bool) -> None:
    """Ask before something is lost; where nothing is, ask nothing."""
    if not yes and any(loss.is_lost for loss in losses):
        from onionskin.cli.question import confirm_loss

        what = describe(losses)
        # A snapshot saves nothing of a volume that goes itself.
        advice = "drop them" if any(loss.volumes for loss in losses) else "drop them, or take a snapshot first"
        confirm_loss(f"{verb} drops {what}. Drop them?", f"{verb} would drop {what}", advice=advice)


def flushed(store: "Store", name: str) -> "LiveVolume | None":
    """Connect to the server of a volume, if one holds it, and have it flush, so that what was written counts."""
    served = live(store, name)
    if served is not None:
        served.flush()
    return served


def refuse_unagreed(served: "LiveVolume", what: str) -> None:
    """Refuse to change the disk of a volume whose server was not started to allow that, as the server itself does."""
    if not served.info()["allow_revert"]:
        raise StateError(
            f"{what}: the disk would change under the clients of {served.name!r}; stop them and the server first, or serve "
            "with --allow-revert"
        )


def refuse_read(served: "LiveVolume", snapshots: Sequence[str]) -> None:
    """Refuse to drop snapshots that clients of a server read, as the server itself does."""
    going = {f"{served.name}@{one}" for one in snapshots}
    read = [one["export"] for one in served.stats()["exports"] if one["export"] in going and one["connections"]]
    if read:
        raise StateError(f"clients are reading {', '.join(sorted(read))}; disconnect them first")
