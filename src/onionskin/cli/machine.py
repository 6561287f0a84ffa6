"""The verbs of machines, all behind the word `machine`.

What must hold: these verbs only read the command line and print. What runs is asked of `onionskin.Machine`, and what the
store alone knows of `Store`.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import click

from onionskin.base.naming import some_of
from onionskin.base.paths import FilePath
from onionskin.base.sizes import format_size
from onionskin.cli import losses, machine_keeping, output
from onionskin.cli.arguments import (
    FILE,
    MACHINE,
    MACHINE_OR_SNAPSHOT,
    MACHINE_SNAPSHOT,
    MACHINE_SNAPSHOT_OR_RANGE,
    NEW_MACHINE,
    NEW_MACHINE_SNAPSHOT_OR_NONE,
    SIZE,
    STORE,
    VOLUME,
    WIPE,
    Name,
    label_option,
    open_store,
    parse_name,
    trust_option,
)
from onionskin.cli.chosen import same_store
from onionskin.cli.columns import Asked, Column, column_options, draw, in_order
from onionskin.cli.ending_options import with_help
from onionskin.cli.losses import dry_run_option, yes_option
from onionskin.cli.machine_keeping import chosen_of, same_machine
from onionskin.cli.machine_pool import pool
from onionskin.cli.output import json_option

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from onionskin.machine.machine import Machine
    from onionskin.operations.losses import Loss
    from onionskin.operations.machine_tree import MachineSnapshotInfo
    from onionskin.operations.machines import MachineInfo

_LEAVE = b"\x1d"  # Ctrl-]


class _Verbs(click.Group):
    """The verbs of machines, in the order in which a user meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the verbs in that order."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb, or say which one may be meant."""
        word = args[0] if args else ""
        if word and not word.startswith("-") and word not in self.commands:
            from onionskin.cli import verbs

            raise click.UsageError(
                f"No such command {word!r}{verbs.suggestion(word, self.commands, of_machines=True)}", ctx
            )
        return super().resolve_command(ctx, args)


@click.group(cls=_Verbs, invoke_without_command=True)
@click.pass_context
def machine(ctx: click.Context) -> None:
    """Keep CPU, RAM, devices and disks as one snapshot.

    A snapshot of a machine has its configuration, too. Machines have names of their own in a store, beside volumes.
    Every verb takes --json.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
        ctx.exit(2)


def _verb(name: str | None = None) -> "Callable[[Callable[..., Any]], click.Command]":
    def add(function: "Callable[..., Any]") -> click.Command:
        command = with_help(click.command(name)(function))
        machine.add_command(command)
        return command

    return add


# ---- making ----


def complete_disk(ctx: click.Context, _: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """Offer the volumes of the store in which the machine is made."""
    from click.shell_completion import CompletionItem

    # An option without its value ends click's parsing, so what stands before it is still as it was typed.
    directories = [word.rpartition("/")[0] for word in ctx.args if "/" in word]
    there = VOLUME.names_in(FilePath(os.path.expanduser(directories[0]) or "/"), False) if directories else []  # noqa: PTH111
    return [CompletionItem(one) for one in there if one.startswith(incomplete)]


@_verb()
@click.argument("name", type=NEW_MACHINE, metavar="STORE/MACHINE")
@click.argument("qemu_args", nargs=-1, type=click.UNPROCESSED, metavar="[-- ARGUMENT...]")
@click.option(
    "--disk",
    "disks",
    multiple=True,
    metavar="VOLUME",
    shell_complete=complete_disk,
    help="A volume of the store; for several, give it again.",
)
@click.option("--memory", type=SIZE, required=True, help="How much RAM it has, as 512M.")
@click.option("--cpus", type=click.IntRange(min=1), default=1, show_default=True, help="How many virtual CPUs.")
@click.option("--kernel", type=FILE, help="A kernel; by default the boot loader of the first disk starts.")
@click.option("--initrd", type=FILE, help="The initrd of that kernel.")
@click.option("--append", default="", help="The command line of that kernel.")
@click.option(
    "--network", type=click.Choice(["none", "user"]), default="none", show_default=True, help="Its network card."
)
@click.option("--no-agent", is_flag=True, help="Leave out the port for a guest agent.")
@click.option("--program", metavar="FILE", help="The hypervisor; by default qemu-system-x86_64.")
@click.option("--machine-type", metavar="TYPE", help="The type of machine; by default the newest of the hypervisor.")
@click.option("--cpu-model", metavar="MODEL", help="The model of its CPUs; by default max.")
@click.option(
    "--wipe", type=WIPE, help="What happens to freed blocks of its RAM; by default as its strictest disk has it."
)
@trust_option
@json_option
def create(
    name: Name,
    qemu_args: tuple[str, ...],
    disks: tuple[str, ...],
    memory: int,
    no_agent: bool,
    wipe: Literal["release", "zero"] | None,
    as_json: bool,
    **configuration: Any,
) -> None:
    """Make a machine of volumes of a store. It is off.

    What comes behind -- are further arguments for the hypervisor.
    """
    given = {key: value for key, value in configuration.items() if value is not None}
    with name.open_store() as store:
        given |= {"agent": not no_agent, "qemu_args": qemu_args}
        store._make_machine(name.volume, [_disk(name, disk) for disk in disks], memory, wipe, given)
        about = store.machine_info(name.volume)
    what = f"{len(about.disks)} disk{'s' * (len(about.disks) != 1)} and {output.size(about.memory_bytes)} of RAM"
    output.tell(as_json, _value(about), lambda: f"made machine {name}: {what}")


def _disk(name: Name, text: str) -> str:
    """Return the volume that --disk names, alone or with the store of the machine."""
    if "/" not in text:
        return text
    disk = parse_name(text)
    if disk.snapshot is not None:
        raise click.UsageError(f"{text!r} is a snapshot, and a disk is a volume; clone it")
    same_store(name, disk)
    return disk.volume


def _value(about: "MachineInfo") -> dict[str, Any]:
    return {
        "name": about.name,
        "state": about.state,
        "pid": about.pid,
        "memory_bytes": about.memory_bytes,
        "cpus": about.cpus,
        "disks": [{"name": disk.name, "volume": disk.volume, "owned": disk.is_owned} for disk in about.disks],
        "ram": about.ram,
        "snapshots": about.snapshots,
        "stands_on": about.stands_on,
        "begins": about.begins,
        "created": output.timestamp(about.created),
        "expires": output.timestamp(about.expires),
        "labels": dict(about.labels),
    }


# ---- running ----


@_verb()
@click.argument("name", type=MACHINE, metavar="STORE/MACHINE")
@click.option("--paused", is_flag=True, help="Leave it standing still, until resume.")
@click.option("--foreground", is_flag=True, help="Run it in this process until it ends, for a service manager.")
@click.option("--fresh", is_flag=True, help="Boot from the disks as they are, also where it would go on from its RAM.")
@yes_option
@trust_option
@json_option
def start(name: Name, paused: bool, foreground: bool, fresh: bool, yes: bool, as_json: bool) -> None:
    """Start a machine.

    It boots from its disks; or it goes on from its RAM, if it was put back to a snapshot or is a fork that never ran. A
    process stays that supervises it and serves its disks.
    """
    with name.open_store() as store:
        opened = store.open_machine(name.volume)
        if fresh:
            _agree_to_boot(opened, name, yes=yes)
        if foreground:
            status = opened.run(paused=paused, fresh=fresh)
            if status:
                click.get_current_context().exit(1)
            return
        opened.start(paused=paused, fresh=fresh)
        state = opened.state
    output.tell(as_json, {"name": name.volume, "state": state}, lambda: f"{name} is {state}")


def _agree_to_boot(opened: "Machine", name: Name, *, yes: bool) -> None:
    """Ask before RAM is given up that no snapshot has."""
    from onionskin.operations import machines

    if not yes and machines.has_unnamed_ram(opened._store._opened, opened._id):
        from onionskin.cli.question import confirm_loss

        what = f"the RAM that {name.volume} would go on from, which no snapshot has"
        confirm_loss(f"start --fresh drops {what}. Drop it?", f"start --fresh would drop {what}")


@_verb()
@click.argument("name", type=MACHINE, metavar="STORE/MACHINE")
@click.option(
    "--timeout", type=click.FloatRange(min=0), metavar="SECONDS", help="How long its guest has; by default 90."
)
@click.option("--force", is_flag=True, help="End it without asking its guest, as if the power went.")
@trust_option
@json_option
def stop(name: Name, timeout: float | None, force: bool, as_json: bool) -> None:
    """Have a machine shut down, and wait for it."""
    with name.open_store() as store:
        store.open_machine(name.volume).stop(timeout, force=force)
    output.tell(as_json, {"name": name.volume, "state": "off"}, lambda: f"{name} is off")


@_verb()
@click.argument("name", type=MACHINE, metavar="STORE/MACHINE")
@trust_option
@json_option
def pause(name: Name, as_json: bool) -> None:
    """Have a machine stand still until resume, also behind snapshots."""
    with name.open_store() as store:
        store.open_machine(name.volume).pause()
    output.tell(as_json, {"name": name.volume, "state": "paused"}, lambda: f"{name} is paused")


@_verb()
@click.argument("name", type=MACHINE, metavar="STORE/MACHINE")
@trust_option
@json_option
def resume(name: Name, as_json: bool) -> None:
    """Let a machine go on that is paused."""
    with name.open_store() as store:
        store.open_machine(name.volume).resume()
    output.tell(as_json, {"name": name.volume, "state": "running"}, lambda: f"{name} is running")


@_verb()
@click.argument("name", type=MACHINE, metavar="STORE/MACHINE")
@trust_option
@json_option
def console(name: Name, as_json: bool) -> None:
    """Connect to the serial console of a machine; Ctrl-] leaves it."""
    if as_json:
        raise click.UsageError("a console is no JSON; 'onionskin machine status --json' has the path of its socket")
    from onionskin.cli.console import talk

    with name.open_store() as store, store.open_machine(name.volume).console() as connection:
        talk(connection, leave=_LEAVE)


# ---- looking ----


@_verb()
@click.argument("name", type=MACHINE, metavar="STORE/MACHINE")
@trust_option
@json_option
def status(name: Name, as_json: bool) -> None:
    """Say what a machine does, and what it is made of."""
    with name.open_store() as store:
        now = store.open_machine(
            name.volume
        ).status()  # first: it may find that the supervisor was killed, and start one
        about = store.machine_info(name.volume)
        origins = store.machine_lineage(name.volume)
    value = _value(about) | {"now": now, "state": now["state"], "why": now.get("why", "")}
    disks = ", ".join(f"{disk.name} ({disk.volume})" for disk in about.disks)
    origin = f"{origins[0].name}@{origins[0].snapshot}" if origins and origins[0].snapshot else ""
    pairs = [
        ("machine", about.name),
        ("state", now["state"]),
        ("why", now.get("why", "")),
        ("process", str(about.pid or "")),
        ("RAM", f"{output.size(about.memory_bytes)}, kept in {about.ram}"),
        ("CPUs", str(about.cpus)),
        ("disks", disks or "none"),
        ("snapshots", str(about.snapshots)),
        ("stands on", about.stands_on or "no snapshot"),
        (
            "a start",
            {"boots": "boots from the disks", "resumes": "goes on from RAM"}.get(about.begins, "ends a revert"),
        ),
        ("forked from", origin),
        ("made", output.when(about.created)),
        ("expires", output.when(about.expires)),
        ("labels", ", ".join(f"{key}={text}" for key, text in about.labels.items())),
        ("guest's kernel", now.get("recorded", {}).get("guest_kernel", "")),
        ("changed RAM", _tracking(now)),
        ("no snapshot", "; ".join(now.get("no_snapshot", ()))),
    ]
    output.show(as_json, value, lambda: output.fields([(what, text) for what, text in pairs if text]))


def _tracking(now: dict[str, Any]) -> str:
    """Say how changes of RAM are found, of a machine that runs."""
    if "is_tracked" not in now:
        return ""
    return "is tracked" if now["is_tracked"] else "is compared, since it cannot be tracked here: mode pause alone"


_COLUMNS: "tuple[Column[MachineInfo], ...]" = (
    Column("name", "MACHINE", lambda about: about.name),
    Column("state", "STATE", lambda about: about.state),
    Column("memory", "MEMORY", lambda about: about.memory_bytes, is_size=True),
    Column("cpus", "CPUS", lambda about: about.cpus, is_number=True),
    Column("disks", "DISKS", lambda about: ",".join(disk.volume for disk in about.disks) or None),
    Column("snapshots", "SNAPSHOTS", lambda about: about.snapshots, is_number=True),
    Column("stands-on", "STANDS-ON", lambda about: about.stands_on),
    Column("begins", "BEGINS", lambda about: about.begins),
    Column("created", "CREATED", lambda about: about.created),
    Column("expires", "EXPIRES", lambda about: about.expires),
)
_SHOWN = ("name", "state", "memory", "cpus", "disks", "snapshots", "stands-on")


@_verb("list")
@click.argument("store", type=STORE)
@label_option("List those alone that have this label.")
@column_options(_COLUMNS)
@trust_option
@json_option
def list_machines(store: FilePath, labels: tuple[tuple[str, str], ...], asked: Asked, as_json: bool) -> None:
    """List the machines of a store.

    One is running if a process has it, whatever its guest does; status asks that process.
    """
    with open_store(store) as opened:
        found = in_order(asked, _COLUMNS, opened.machines(labels=dict(labels)))
    output.show(as_json, [_value(about) for about in found], lambda: draw(asked, _COLUMNS, found, _SHOWN))


def _snapshot_value(taken: "MachineSnapshotInfo") -> dict[str, Any]:
    return {
        "name": taken.name,
        "created": output.timestamp(taken.created),
        "parent": taken.parent,
        "mode": taken.mode,
        "note": taken.note,
        "disks": dict(taken.disks),
        "ram": taken.ram,
        "state_bytes": taken.state_bytes,
    }


_SNAPSHOT_COLUMNS: "tuple[Column[MachineSnapshotInfo], ...]" = (
    Column("name", "SNAPSHOT", lambda taken: taken.name),
    Column("created", "CREATED", lambda taken: taken.created),
    Column("mode", "MODE", lambda taken: taken.mode),
    Column("parent", "PARENT", lambda taken: taken.parent),
    Column("note", "NOTE", lambda taken: taken.note),
    Column("state", "STATE", lambda taken: taken.state_bytes, is_size=True),
)


@_verb()
@click.argument("name", type=MACHINE, metavar="STORE/MACHINE")
@column_options(_SNAPSHOT_COLUMNS)
@trust_option
@json_option
def snapshots(name: Name, asked: Asked, as_json: bool) -> None:
    """List the snapshots of a machine, in the order of taking."""
    with name.open_store() as store:
        found = in_order(asked, _SNAPSHOT_COLUMNS, store.machine_snapshots(name.volume))
    shown = ("name", "created", "mode", "parent", "note")
    output.show(as_json, [_snapshot_value(one) for one in found], lambda: draw(asked, _SNAPSHOT_COLUMNS, found, shown))


@_verb()
@click.argument("name", type=MACHINE, metavar="STORE/MACHINE")
@trust_option
@json_option
def tree(name: Name, as_json: bool) -> None:
    """Draw the snapshots of a machine, and where it stands.

    Each is above those that were taken after it.
    """
    with name.open_store() as store:
        found = store.machine_snapshots(name.volume)
        at = store.machine_info(name.volume).stands_on
    value = {"machine": name.volume, "stands_on": at, "snapshots": [_snapshot_value(one) for one in found]}
    output.show(as_json, value, lambda: _draw_tree(name.volume, found, at))


def _draw_tree(machine_name: str, found: "Sequence[MachineSnapshotInfo]", at: str | None) -> str:
    """Draw a tree; what has one child goes straight down, so that a long chain stays on the page."""
    fancy = output.printable("├└│") == "├└│"
    branch, last, pipe = ("├── ", "└── ", "│   ") if fancy else ("|-- ", "`-- ", "|   ")
    here = click.style(f"{output.cell(machine_name)}  the machine", fg="yellow", bold=True)
    children: dict[str | None, list[str]] = {}
    lines_of = {}
    for one in found:
        note = f"  {output.cell(one.note)}" if one.note else ""
        called = click.style(output.cell(one.name), fg="green", bold=True)
        lines_of[one.name] = f"{called}  {one.mode}, {output.when(one.created)}{note}"
        children.setdefault(one.parent, []).append(one.name)
    drawn = []
    pending: list[tuple[str | None, str, str]] = [("", "", "")] if at is None else []
    pending += [(root, "", "") for root in reversed(children.get(None, []))]
    while pending:
        one_name, lead, below = pending.pop()
        drawn.append(lead + (lines_of[one_name] if one_name else here))
        under: list[str | None] = [*children.get(one_name, [])] if one_name else []
        under += [""] if one_name and one_name == at else []
        for index, child in enumerate(reversed(under)):
            mark, rest = (last, "    ") if index == 0 else (branch, pipe)
            pending.append((child, below + mark, below + rest))
    return "\n".join(drawn)


@_verb()
@click.argument("name", type=MACHINE, metavar="STORE/MACHINE")
@trust_option
@json_option
def usage(name: Name, as_json: bool) -> None:
    """Show what each snapshot holds, of disks and of RAM.

    It also says what dropping it would free.
    """
    with name.open_store() as store:
        found = store.machine_usage(name.volume)
    value = [
        {
            "snapshot": one.snapshot,
            "disk_bytes_held": one.disk_bytes_held,
            "ram_bytes_held": one.ram_bytes_held,
            "bytes_freed_by_discard": one.bytes_freed_by_discard,
            "bytes_freed_by_merge": one.bytes_freed_by_merge,
        }
        for one in found
    ]
    rows = [
        (
            one.snapshot or "(now)",
            output.size(one.disk_bytes_held),
            output.size(one.ram_bytes_held),
            output.size(one.bytes_freed_by_discard) if one.snapshot else "-",
            output.size(one.bytes_freed_by_merge) if one.snapshot else "-",
        )
        for one in found
    ]
    headings = ("SNAPSHOT", "DISKS", "RAM", "DISCARD-FREES", "MERGE-FREES")
    output.show(as_json, value, lambda: output.table(headings, rows, right="DISKS RAM DISCARD-FREES MERGE-FREES"))


# ---- snapshots ----


@_verb()
@click.argument("name", type=NEW_MACHINE_SNAPSHOT_OR_NONE, metavar="STORE/MACHINE[@SNAPSHOT]")
@click.option("--note", default="", help="A few words that tree and snapshots show.")
@click.option(
    "--mode", type=click.Choice(["live", "pause"]), help="Collect RAM while it runs, or while it stands still."
)
@click.option("--freeze", is_flag=True, help="Have the agent in the guest freeze its file systems meanwhile.")
@trust_option
@json_option
def snapshot(name: Name, note: str, mode: Literal["live", "pause"] | None, freeze: bool, as_json: bool) -> None:
    """Take a snapshot of a machine: RAM, devices and disks.

    They are of one instant, and the configuration is kept, too. The machine runs on if it ran, and stays paused if it
    was. Of a machine that is off it has disks and configuration.
    """
    with name.open_store() as store:
        taken = store.open_machine(name.volume).snapshot(name.snapshot, note, mode=mode, freeze=freeze)
    value = {
        "machine": name.volume,
        "name": taken.name,
        "note": taken.note,
        "mode": taken.mode,
        "pause_seconds": taken.pause_seconds,
        "bytes_stored": taken.bytes_stored,
        "disks": list(taken.disks),
        "frozen": list(taken.frozen),
    }
    stood = f", it stood still for {taken.pause_seconds * 1000:.1f} ms" if taken.pause_seconds else ""
    what = "disks and configuration, as it is off" if taken.mode == "off" else f"mode {taken.mode}{stood}"
    output.tell(as_json, value, lambda: f"took {name.store}/{name.volume}@{taken.name}: {what}")


@_verb()
@click.argument("name", type=MACHINE_OR_SNAPSHOT, metavar="STORE/MACHINE@SNAPSHOT")
@click.option("--beginning", is_flag=True, help="Of a fork that is off: to the snapshot that it was made from.")
@yes_option
@dry_run_option
@trust_option
@json_option
def revert(name: Name, beginning: bool, yes: bool, dry_run: bool, as_json: bool) -> None:
    """Put a machine back to a snapshot, and let it run.

    Its disks, its RAM and its devices are as they were then.

    One that runs goes on from there in the same process; one that is off is started. What was done since the last snapshot
    is dropped; all snapshots stay.
    """
    from onionskin.operations import machine_usage

    if beginning:
        _revert_to_beginning(name, yes=yes, dry_run=dry_run, as_json=as_json)
        return
    if name.snapshot is None:
        raise click.UsageError(f"'{name}' names no snapshot: write {name}@SNAPSHOT, or --beginning for a fork")
    with name.open_store() as store:
        target = store.open_machine(name.volume)
        if dry_run or not yes:
            target._refuse_revert(name.required_snapshot)
        loss = machine_usage.loss_of_revert(store._opened, target._id, name.required_snapshot)
        runs = target.info().state != "off"
        if dry_run:
            _tell_dry_run(as_json, "revert", (), loss)
            return
        _agree("revert", (), loss, yes=yes, also="what its guest has not written" if runs else "")
        target.revert(name.required_snapshot)
        how = "is paused at" if target._is_kept_paused else "goes on from"
    output.tell(
        as_json,
        {"machine": name.volume, "snapshot": name.snapshot},
        lambda: f"{name.store}/{name.volume} {how} {name.snapshot}",
    )


def _revert_to_beginning(name: Name, *, yes: bool, dry_run: bool, as_json: bool) -> None:
    from onionskin.operations import machine_usage

    if name.snapshot is not None:
        raise click.UsageError("--beginning is of a fork itself: leave out the snapshot")
    with name.open_store() as store:
        target = store.open_machine(name.volume)
        if dry_run or not yes:
            target._refuse_beginning()
        loss = machine_usage.loss_of_beginning(store._opened, target._id)
        if dry_run:
            _tell_dry_run(as_json, "revert", (), loss)
            return
        _agree("revert", (), loss, yes=yes)
        target.revert_to_beginning()
    value = {"machine": name.volume, "snapshot": None}
    output.tell(as_json, value, lambda: f"{name} goes on from what it was forked from")


@_verb()
@click.argument("names", type=MACHINE_SNAPSHOT_OR_RANGE, nargs=-1, required=True, metavar="STORE/MACHINE@SNAPSHOT...")
@click.option("--recursive", is_flag=True, help="Discard the snapshots that were taken after it too.")
@yes_option
@dry_run_option
@trust_option
@json_option
def discard(names: tuple[Name, ...], recursive: bool, yes: bool, dry_run: bool, as_json: bool) -> None:
    """Drop snapshots of a machine and what was written after them.

    That is of its disks, and of its RAM. Several, and ranges as vms/lab@a..@c, are dropped together, or none is.

    One that is off and stands on that branch is put back to the lowest of them; one that runs on it is refused.
    """
    from onionskin.operations import machine_usage

    same_machine(names)
    name = names[0]
    with name.open_store() as store:
        target = store.open_machine(name.volume)
        chosen = chosen_of(store, names)
        target._end_left_in_pools()
        loss = machine_usage.loss_of_discard(store._opened, target._id, chosen, recursive=recursive)
        if dry_run:
            _tell_dry_run(as_json, "discard", (), loss)
            return
        _agree("discard", (), loss, yes=yes)
        gone = target.discard(chosen, recursive=recursive)
    value = {"machine": name.volume, "discarded": gone}
    output.tell(as_json, value, lambda: f"discarded {', '.join(f'{name.volume}@{one}' for one in gone)}")


@_verb()
@click.argument("names", type=MACHINE_SNAPSHOT_OR_RANGE, nargs=-1, required=True, metavar="STORE/MACHINE@SNAPSHOT...")
@dry_run_option
@trust_option
@json_option
def merge(names: tuple[Name, ...], dry_run: bool, as_json: bool) -> None:
    """Drop snapshots of a machine and keep all data that was written.

    Several, and ranges as vms/lab@a..@c, are dropped together, or none is.
    """
    from onionskin.operations import machine_usage

    same_machine(names)
    name = names[0]
    with name.open_store() as store:
        chosen = chosen_of(store, names)
        if dry_run:
            _tell_dry_run(as_json, "merge", (), machine_usage.loss_of_merge(store._opened, name.volume, chosen))
            return
        gone = store.open_machine(name.volume).merge(chosen)
    value = {"machine": name.volume, "merged": gone}
    output.tell(as_json, value, lambda: f"merged {', '.join(f'{name.volume}@{one}' for one in gone)}")


for one in (
    machine_keeping.hold,
    machine_keeping.unhold,
    machine_keeping.holds,
    machine_keeping.note,
    machine_keeping.prune,
):
    machine.add_command(one)


# ---- many of them, and their end ----


@_verb()
@click.argument("name", type=MACHINE_SNAPSHOT, metavar="STORE/MACHINE@SNAPSHOT")
@click.option("-n", "--count", type=click.IntRange(min=1), help="How many; by default one.")
@click.option("--pattern", help="What they are called, such as 'job-{n}' or 'job-{n:03}'; by default '{source}-{n}'.")
@click.option("--name", "names", multiple=True, metavar="NEW", help="What one is called; for several, give it again.")
@click.option(
    "--lifetime", metavar="TIME", help="From then on 'onionskin expire' drops those that are off: 15m, 2h, 7d."
)
@label_option("Mark them, as task=42; for several labels, give it again.")
@click.option(
    "--key", help="The same call again under this key, within a day, makes nothing, and prints the same names."
)
@click.option("--wipe", type=WIPE, help="What happens to freed blocks; by default as where they come from.")
@click.option("--network", is_flag=True, help="Let them reach what the machine reaches; by default they reach nothing.")
@click.option("--no-start", is_flag=True, help="Leave them off; the first start goes on from the snapshot.")
@trust_option
@json_option
def fork(
    name: Name,
    names: tuple[str, ...],
    labels: tuple[tuple[str, str], ...],
    key: str | None,
    no_start: bool,
    as_json: bool,
    **how: Any,
) -> None:
    """Make machines that go on from a snapshot.

    Each has disks and RAM of its own. All are made, or none. Nothing is copied. They have the addresses and the clock
    of the machine that they come from; docs/machines.md says what changes by itself.
    """
    how |= {"names": names or None, "labels": dict(labels) or None, "idempotency_key": key, "start": not no_start}
    with name.open_store() as store, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", RuntimeWarning)
        made = store.open_machine(name.volume).fork(name.required_snapshot, **how)
        called = [one.name for one in made]
    said = [str(one.message) for one in warned if one.category is RuntimeWarning]
    value = {"source": str(name), "forks": called, "warnings": said}
    for one in said:
        output.echo(f"onionskin: warning: {one}", err=True)
    output.tell(as_json, value, lambda: "\n".join(f"{name.store}/{one}" for one in called))


machine.add_command(pool)


@_verb()
@click.argument("name", type=MACHINE_OR_SNAPSHOT, metavar="STORE/MACHINE[@SNAPSHOT]")
@click.argument("new_name", metavar="NEW")
@trust_option
@json_option
def rename(name: Name, new_name: str, as_json: bool) -> None:
    """Give a machine that is off, or a snapshot, another name.

    A snapshot of a machine that runs, too. Its snapshots of disks and RAM get that name as well. NEW is the name alone, or
    STORE/NEW; of a snapshot also STORE/MACHINE@NEW.
    """
    if name.snapshot is not None:
        _rename_snapshot(name, new_name, as_json=as_json)
        return
    new = NEW_MACHINE.convert(new_name, None, None) if "/" in new_name else Name(name.store, new_name)
    if new.store.resolve() != name.store.resolve():
        raise click.UsageError(f"{new} is not of the store of {name}: a machine is renamed within its store")
    with name.open_store() as store:
        store.rename_machine(name.volume, new.volume)
        about = store.machine_info(new.volume)
    output.tell(as_json, _value(about), lambda: f"{name} is {new} now")


def _rename_snapshot(name: Name, new_name: str, *, as_json: bool) -> None:
    from onionskin.operations import machine_tree

    new = Name(name.store, name.volume, new_name.removeprefix("@"))
    if "/" in new_name:
        new = NEW_MACHINE_SNAPSHOT_OR_NONE.convert(new_name, None, None)
    if new.store.resolve() != name.store.resolve() or new.volume != name.volume or new.snapshot is None:
        raise click.UsageError(f"a snapshot stays with its machine: write {name.store}/{name.volume}@NEW")
    with name.open_store() as store:
        store.open_machine(name.volume).rename_snapshot(name.required_snapshot, new.snapshot)
        about = machine_tree.snapshot_info(store._opened, name.volume, new.snapshot)
    output.tell(as_json, _snapshot_value(about), lambda: f"{name} is {new} now")


@_verb()
@click.argument("names", type=MACHINE, nargs=-1, required=True, metavar="STORE/MACHINE...")
@click.option("--recursive", is_flag=True, help="Delete their snapshots too.")
@yes_option
@dry_run_option
@trust_option
@json_option
def delete(names: tuple[Name, ...], recursive: bool, yes: bool, dry_run: bool, as_json: bool) -> None:
    """Delete machines that are off.

    Their RAM goes with them, and so do the disks of those that are forks. All are deleted, or none. Other disks stay as
    they are.
    """
    from onionskin.operations import machine_removal

    for name in names[1:]:
        same_store(names[0], name)
    called = list(dict.fromkeys(name.volume for name in names))
    with names[0].open_store() as store:
        ids = machine_removal.ids_of(store._opened.catalog, called)
        for one in called:
            store.open_machine(one)._end_left_in_pools()
        loss = machine_removal.loss_of_delete(store._opened, called, recursive=recursive)
        if dry_run:
            _tell_dry_run(as_json, "delete", called, loss)
            return
        _agree("delete", called, loss, yes=yes)
        freed = store._delete_machines(called, recursive=recursive, agreed=ids)
    back = f"; {format_size(freed)} come back" if freed else ""
    output.tell(as_json, {"deleted": called, "bytes_freed": freed}, lambda: f"deleted {', '.join(called)}{back}")


def _described(machines: Sequence[str], loss: "Loss", also: str = "") -> str:
    """Write what goes, for people."""
    parts = [f"the machine{'s' * (len(machines) > 1)} {some_of(sorted(machines))}"] if machines else []
    parts += [also] if also else []
    return " and ".join([*parts, losses.describe([loss])])


def _tell_dry_run(as_json: bool, verb: str, machines: Sequence[str], loss: "Loss") -> None:
    value = {
        "dry_run": True,
        "machines": sorted(machines),
        "volumes": list(loss.volumes),
        "snapshots": list(loss.snapshots),
        "bytes_freed": loss.bytes_freed,
    }
    output.show(as_json, value, lambda: f"{verb} would drop {_described(machines, loss)}; nothing was changed")


def _agree(verb: str, machines: Sequence[str], loss: "Loss", *, yes: bool, also: str = "") -> None:
    """Ask before something is lost; where nothing is, ask nothing."""
    if not yes and (loss.is_lost or also):
        from onionskin.cli.question import confirm_loss

        what = _described(machines, loss, also)
        confirm_loss(f"{verb} drops {what}. Drop them?", f"{verb} would drop {what}")
