"""The verbs for many copies: fork, forks, lineage, expire."""

from typing import Any, Literal

import click

from onionskin.base.paths import FilePath
from onionskin.cli import output
from onionskin.cli.arguments import (
    STORE,
    VOLUME,
    VOLUME_OR_SNAPSHOT,
    WIPE,
    Name,
    label_option,
    open_store,
    trust_option,
)
from onionskin.cli.chosen import same_store
from onionskin.cli.output import json_option


@click.command()
@click.argument("sources", type=VOLUME_OR_SNAPSHOT, nargs=-1, required=True, metavar="STORE/VOLUME[@SNAPSHOT]...")
@click.option("-n", "--count", type=click.IntRange(min=1), help="How many, of each disk; by default one.")
@click.option("--pattern", help="What they are called, such as 'job-{n}' or 'job-{n:03}'; by default '{source}-{n}'.")
@click.option("--name", "names", multiple=True, metavar="NEW", help="What one is called; for several, give it again.")
@click.option("--lifetime", metavar="TIME", help="From then on 'onionskin expire' drops them: 90s, 15m, 2h, 7d, 2w.")
@label_option("Mark them, as task=42; for several labels, give it again.")
@click.option(
    "--key", help="The same call again under this key, within a day, makes nothing, and prints the same names."
)
@click.option("--wipe", type=WIPE, help="What happens to freed blocks; by default as where they come from.")
@trust_option
@json_option
def fork(
    sources: tuple[Name, ...],
    count: int | None,
    pattern: str | None,
    names: tuple[str, ...],
    lifetime: str | None,
    labels: tuple[tuple[str, str], ...],
    key: str | None,
    wipe: Literal["release", "zero"] | None,
    as_json: bool,
) -> None:
    """Make volumes that begin as a snapshot, or as a disk is now.

    All of them are made, or none. Nothing is copied. Numbers go on from the highest that there is. Several disks of one
    store are forked together: as many of each, with the same numbers, and those without a snapshot as they are at one
    instant.
    """
    how: dict[str, Any] = {
        "count": count,
        "pattern": pattern,
        "idempotency_key": key,
        "lifetime": lifetime,
        "labels": dict(labels) or None,
        "wipe": wipe,
    }
    if len(sources) > 1:
        _fork_group(sources, names, how, as_json)
        return
    (source,) = sources
    with source.open_store() as store:
        made = store.fork(source.volume, source.snapshot, names=names or None, **how)
    value = {"source": str(source), "forks": made}
    output.tell(as_json, value, lambda: "\n".join(f"{source.store}/{one}" for one in made))


def _fork_group(sources: tuple[Name, ...], names: tuple[str, ...], how: dict[str, Any], as_json: bool) -> None:
    if names:
        raise click.UsageError("--name is for the forks of one disk; those of several have a --pattern with {source}")
    for source in sources[1:]:
        same_store(sources[0], source)
    wanted = {f"{one.volume}@{one.snapshot}" if one.snapshot else one.volume: None for one in sources}
    if len(wanted) < len(sources):
        raise click.UsageError("a disk is named twice")
    with sources[0].open_store() as store:
        made = store.fork_group(wanted, **how)
    value = [{"source": str(source), "forks": found} for source, found in zip(sources, made.values(), strict=True)]
    together = zip(*made.values(), strict=True)
    output.tell(
        as_json, value, lambda: "\n".join(" ".join(f"{sources[0].store}/{one}" for one in forks) for forks in together)
    )


@click.command()
@click.argument("name", type=VOLUME_OR_SNAPSHOT, metavar="STORE/VOLUME[@SNAPSHOT]")
@trust_option
@json_option
def forks(name: Name, as_json: bool) -> None:
    """List what was forked or cloned from a snapshot or a volume."""
    with name.open_store() as store:
        found = store.forks_of(name.volume, name.snapshot)
    output.show(as_json, found, lambda: "\n".join(found) or "none")


@click.command()
@click.argument("name", type=VOLUME, metavar="STORE/VOLUME")
@trust_option
@json_option
def lineage(name: Name, as_json: bool) -> None:
    """Show what a volume was forked or cloned from.

    What that came from follows, up to the first.
    """
    with name.open_store() as store:
        found = store.lineage(name.volume)
    value = [
        {
            "volume": one.name,
            "snapshot": one.snapshot,
            "created": output.timestamp(one.created),
            "dropped": one.dropped and output.timestamp(one.dropped),
        }
        for one in found
    ]
    rows = [
        (one.name, one.snapshot or "-", output.when(one.created), output.when(one.dropped) if one.dropped else "-")
        for one in found
    ]
    output.show(as_json, value, lambda: output.table(("VOLUME", "SNAPSHOT", "MADE", "DROPPED"), rows))


@click.command()
@click.argument("store", type=STORE)
@trust_option
@json_option
def expire(store: FilePath, as_json: bool) -> None:
    """Delete the volumes whose lifetime is over.

    One stays that is open, that has snapshots, or from which others were forked; it goes with a later call.
    """
    with open_store(store) as opened:
        gone = opened.expire()
    output.tell(as_json, {"deleted": gone}, lambda: f"deleted {', '.join(gone)}" if gone else "nothing has expired")
