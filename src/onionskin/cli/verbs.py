"""What the verbs are for, which one is meant by a word that is none, and the verb help."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from onionskin.cli import output
from onionskin.cli.output import json_option
from onionskin.cli.sections import SECTION_OF
from onionskin.cli.values import PROPERTIES

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

# What other programs call it: qemu-img, zfs, rbd, LVM, git, restic, borg, virsh.
_CALLED = {
    **dict.fromkeys(
        (
            "rollback",
            "roll-back",
            "restore",
            "reset",
            "undo",
            "rewind",
            "snapshot-revert",
            "checkout",
            "switch",
            "recover",
        ),
        "revert",
    ),
    **dict.fromkeys(("commit", "blockcommit", "block-commit"), "merge --into-base"),
    **dict.fromkeys(("promote", "blockpull", "block-stream"), "flatten"),
    "rebase": "flatten, or onionskin relocate",
    **dict.fromkeys(
        (
            "destroy",
            "rm",
            "rmi",
            "remove",
            "del",
            "drop",
            "erase",
            "purge",
            "trash",
            "undefine",
            "vol-delete",
            "lvremove",
        ),
        "delete",
    ),
    **dict.fromkeys(
        ("snap", "checkpoint", "save", "stash", "snapshot-create", "snapshot-create-as", "checkpoint-create"),
        "snapshot",
    ),
    **dict.fromkeys(("history", "log", "snapshot-list", "checkpoint-list", "versions"), "snapshots"),
    **dict.fromkeys(("branch", "cp", "copy", "duplicate", "dup", "vol-clone", "virt-clone"), "clone"),
    **dict.fromkeys(("new", "init", "mk", "make", "vol-create", "vol-create-as", "lvcreate"), "create"),
    **dict.fromkeys(("ls", "volumes", "images", "vol-list", "lvs", "lvdisplay"), "list"),
    **dict.fromkeys(
        ("show", "describe", "inspect", "vol-info", "snapshot-info", "snapshot-current", "dumpxml", "size"), "info"
    ),
    **dict.fromkeys(("df", "du", "disk-usage", "space", "measure", "domblkinfo"), "usage"),
    **dict.fromkeys(("send", "push", "export-diff", "merge-diff", "backup", "backup-begin"), "delta"),
    **dict.fromkeys(("receive", "recv", "pull", "import-diff"), "apply"),
    **dict.fromkeys(("squash", "fold", "delete-snapshot", "snapshot-delete"), "merge"),
    **dict.fromkeys(
        (
            "grow",
            "shrink",
            "truncate",
            "expand",
            "extend",
            "enlarge",
            "reduce",
            "blockresize",
            "vol-resize",
            "lvresize",
        ),
        "resize",
    ),
    **dict.fromkeys(("lvextend", "lvreduce"), "resize"),
    **dict.fromkeys(("mv", "move", "domrename", "lvrename"), "rename"),
    **dict.fromkeys(("fsck", "verify", "validate", "scrub", "repair"), "check"),
    **dict.fromkeys(("unmount", "fusermount"), "umount"),
    **dict.fromkeys(("nbd", "share", "attach", "connect", "device"), "serve"),
    **dict.fromkeys(("iostat", "top", "monitor", "metrics", "watch", "domblkstat"), "stats"),
    **dict.fromkeys(("cmp",), "compare"),
    **dict.fromkeys(("bitmap", "changes"), "diff"),
    **dict.fromkeys(("convert",), "import, or onionskin export"),
    **dict.fromkeys(("load", "upload", "vol-upload", "fetch"), "import"),
    **dict.fromkeys(("download", "vol-download", "dump", "extract", "blockcopy"), "export"),
    **dict.fromkeys(("release", "unprotect", "unpin", "unlock"), "unhold"),
    **dict.fromkeys(("pin", "keep", "lock"), "hold"),
    **dict.fromkeys(("forget", "expire-snapshots"), "prune"),
    **dict.fromkeys(("tag", "annotate", "snapshot-edit"), "note"),
    **dict.fromkeys(("amend", "modify", "change", "config", "inherit", "label"), "set"),
    **dict.fromkeys(("properties", "property"), "get"),
    **dict.fromkeys(("discard-range", "blkdiscard", "fstrim", "unmap", "sparsify", "punch"), "trim"),
    **dict.fromkeys(("graph", "chain", "snapshot-tree"), "tree"),
    **dict.fromkeys(("parents", "origin", "ancestors"), "lineage"),
    "cat": "read",
    "dd": "read, or onionskin write",
    "protect": "hold",
    **dict.fromkeys(("children", "clones"), "forks"),
    "man": "help",
    # Verbs of machines, without the word machine.
    **{verb: f"machine {verb}" for verb in ("stop", "pause", "resume", "console", "pool")},
    "start": "serve, or onionskin machine start",
    "status": "info, or onionskin machine status",
    "run": "machine start",
}

# What has two words elsewhere, as rbd snap ls: the thing, and what is done with a snapshot. What is done with other things is
# what is done with a volume here.
_OF_SNAPSHOTS = {
    **dict.fromkeys(("ls", "list", "show"), "snapshots"),
    **dict.fromkeys(("create", "add", "new", "save"), "snapshot"),
    **dict.fromkeys(
        ("rm", "remove", "delete", "del", "destroy", "purge"), "merge, which keeps all data, or onionskin discard"
    ),
}
_VOLUME_FIRST = {  # and not behind the rest, as with zfs
    "set": "STORE/VOLUME wipe=zero",
    "get": "STORE/VOLUME wipe",
    "hold": "STORE/VOLUME@SNAPSHOT HOLDER",
    "unhold": "STORE/VOLUME@SNAPSHOT HOLDER",
}
_THINGS = ("snap", "image", "volume", "vol", "disk", "drive", "lv", "device", "subvolume")

# What others call a verb of machines: virsh, qm, VBoxManage, limactl, multipass, prlctl. Before what is above.
_CALLED_OF_MACHINES = {
    **dict.fromkeys(("loadvm",), "revert"),
    **dict.fromkeys(("reboot", "restart", "reset"), "stop, and then start"),
    **dict.fromkeys(("savevm", "snapshot-create"), "snapshot"),
    **dict.fromkeys(("shutdown", "poweroff", "destroy", "kill"), "stop"),
    **dict.fromkeys(("run", "boot", "up"), "start"),
    **dict.fromkeys(("suspend", "freeze"), "pause"),
    **dict.fromkeys(("unpause", "continue", "cont"), "resume"),
    **dict.fromkeys(("attach", "shell", "serial"), "console"),
    **dict.fromkeys(("ps", "machines"), "list"),
    **dict.fromkeys(("info", "show", "state", "describe"), "status"),
    **dict.fromkeys(("clone", "copy", "cp", "branch"), "fork"),
    **dict.fromkeys(("define",), "create"),
    **dict.fromkeys(("delvm", "snapshot-delete"), "merge, which keeps all data, or onionskin machine discard"),
    **dict.fromkeys(("warm",), "pool"),
}


def suggestion(word: str, verbs: Iterable[str], *, of_machines: bool = False, behind: str = "") -> str:
    """Say which verb a mistyped word may mean, with the word behind it; the text is empty if no verb is like it."""
    verbs = list(verbs)
    called = _of_two_words(word.lower(), behind.lower(), verbs) or _CALLED.get(word.lower())
    if of_machines:
        called = _CALLED_OF_MACHINES.get(word.lower(), called if called in verbs else None)
    if called is not None:
        return f": here that is onionskin {'machine ' * of_machines}{called}"
    import difflib

    near = difflib.get_close_matches(word.lower(), verbs, n=1, cutoff=0.7)
    return f": did you mean {near[0]}?" if near else ""


def hint(verb: str | None, word: str) -> str:
    """Say what may be meant by a word that stands where a volume is wanted; the text is empty if nobody knows."""
    if verb == "snapshot" and (meant := _OF_SNAPSHOTS.get(word)) and meant != verb:
        return f"; here that is onionskin {meant}"
    # What is no property is a store that is missing.
    if verb in _VOLUME_FIRST and (verb not in ("set", "get") or "=" in word or word in (*PROPERTIES, "all")):
        return f"; the volume comes first, as in 'onionskin {verb} {_VOLUME_FIRST[verb]}'"
    return ""


def _of_two_words(thing: str, done: str, verbs: Iterable[str]) -> str | None:
    if thing not in _THINGS:
        return None
    of_snapshots = _OF_SNAPSHOTS.get(done) if thing == "snap" else None
    return of_snapshots or _CALLED.get(done) or (done if done in verbs else None)


# Options by which other programs, or the verbs of one program, say what is an option or a verb here.
_OPTIONS = {"-n": "--dry-run", "-O": "--format", "-F": "--format", "-V": "--size", "--output": "--json"}
_VERBS_OF_OPTIONS = {
    ("snapshot", "-l"): "snapshots STORE/VOLUME",
    ("snapshot", "-c"): "snapshot STORE/VOLUME@NAME",
    ("snapshot", "-a"): "revert STORE/VOLUME@NAME",
    ("snapshot", "-d"): "merge STORE/VOLUME@NAME",
    ("list", "-t"): "snapshots STORE",
}


def option_meant(verb: str | None, option: str, options: Iterable[str]) -> str:
    """Say which option a mistyped one of a verb may mean; the text is empty if none is like it.

    Of one letter, that is an option whose name begins with it.
    """
    if option[1:].isdigit():
        return f": no number is below zero here{'; give the new size, and --force' if verb == 'resize' else ''}"
    if instead := _VERBS_OF_OPTIONS.get((verb or "", option)):
        return f": here that is 'onionskin {instead}'"
    options = list(options)
    if (called := _OPTIONS.get(option)) in options:
        return f": did you mean {called}?"
    letter = option.lstrip("-").lower()
    near = [one for one in options if one.startswith(f"--{letter}")] if len(letter) == 1 else []
    return f": did you mean {' or '.join(near)}?" if near else ""


def format_sections(group: click.Group, ctx: click.Context, formatter: click.HelpFormatter) -> None:
    """Write the verbs of a group under what they are for."""
    rows: dict[str, list[tuple[str, str]]] = {}
    limit = formatter.width - 6 - max(map(len, group.commands), default=0)
    for name, command in group.commands.items():
        rows.setdefault(SECTION_OF[name], []).append((name, command.get_short_help_str(limit)))
    for title, listed in rows.items():
        with formatter.section(title):
            formatter.write_dl(listed)


def complete_verbs(ctx: click.Context, param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """Offer the verbs, or those of the verb that is there already."""
    from click.shell_completion import CompletionItem

    command: click.Command | None = ctx.find_root().command
    for word in ctx.params.get("words") or ():
        command = command.get_command(ctx, word) if isinstance(command, click.Group) else None
    verbs = command.list_commands(ctx) if isinstance(command, click.Group) else []
    return [CompletionItem(verb) for verb in verbs if verb.startswith(incomplete)]


@click.command(name="help")
@click.argument("words", nargs=-1, metavar="[VERB]...", shell_complete=complete_verbs)
@click.pass_context
@json_option
def help_(ctx: click.Context, words: tuple[str, ...], as_json: bool) -> None:
    """Print what VERB does, and its options.

    Without VERB, list the verbs. Those of machines have two words: help machine start.
    """
    its = ctx.find_root()
    for word in words:
        group = its.command
        if not isinstance(group, click.Group):
            raise click.UsageError(f"{its.command_path} has no verbs of its own, so no {word}", its)
        _, command, _ = group.resolve_command(its, [word])
        if command is None:
            raise AssertionError(f"{word} was resolved to nothing")
        its = command.make_context(word, [], parent=its, resilient_parsing=True)
    text = its.get_help()
    output.show(as_json, {"verb": " ".join(words) or None, "text": text}, lambda: text)
