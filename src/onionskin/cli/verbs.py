"""What the verbs are for, which one is meant by a word that is none, and the verb help."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from onionskin.cli import output
from onionskin.cli.output import json_option
from onionskin.cli.sections import SECTION_OF

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

# What other programs call it: qemu-img, zfs, rbd, git, restic, virsh.
_CALLED = {
    **dict.fromkeys(("rollback", "restore", "reset", "undo", "snapshot-revert", "checkout"), "revert"),
    **dict.fromkeys(("commit", "blockcommit", "block-commit"), "merge --into-base"),
    **dict.fromkeys(("rebase", "promote", "blockpull", "block-stream"), "flatten"),
    **dict.fromkeys(("destroy", "rm", "remove", "del", "undefine"), "delete"),
    **dict.fromkeys(("snap", "checkpoint", "save"), "snapshot"),
    **dict.fromkeys(("history", "log"), "snapshots"),
    **dict.fromkeys(("branch", "cp", "copy"), "clone"),
    **dict.fromkeys(("new", "init", "mk", "make"), "create"),
    **dict.fromkeys(("ls", "volumes"), "list"),
    **dict.fromkeys(("show", "describe", "inspect"), "info"),
    **dict.fromkeys(("df", "du", "space"), "usage"),
    **dict.fromkeys(("send", "export-diff", "backup"), "delta"),
    **dict.fromkeys(("receive", "recv", "import-diff"), "apply"),
    **dict.fromkeys(("squash", "fold", "delete-snapshot"), "merge"),
    **dict.fromkeys(("grow", "shrink", "truncate"), "resize"),
    **dict.fromkeys(("mv", "move"), "rename"),
    **dict.fromkeys(("fsck", "verify", "scrub", "repair"), "check"),
    **dict.fromkeys(("unmount", "fusermount"), "umount"),
    **dict.fromkeys(("nbd", "share"), "serve"),
    **dict.fromkeys(("cmp",), "compare"),
    **dict.fromkeys(("convert",), "import, or onionskin export"),
    **dict.fromkeys(("load",), "import"),
    **dict.fromkeys(("release", "unprotect"), "unhold"),
    **dict.fromkeys(("forget", "expire-snapshots"), "prune"),
    **dict.fromkeys(("tag", "annotate"), "note"),
    "dd": "read, or onionskin write",
    "protect": "hold",
    "children": "forks",
    # Verbs of machines, without the word machine.
    **{verb: f"machine {verb}" for verb in ("stop", "pause", "resume", "console", "pool")},
    "start": "serve, or onionskin machine start",
    "status": "info, or onionskin machine status",
}

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


def suggestion(word: str, verbs: Iterable[str], *, of_machines: bool = False) -> str:
    """Say which verb a mistyped word may mean; the text is empty if no verb is like it."""
    verbs = list(verbs)
    called = _CALLED.get(word.lower())
    if of_machines:
        called = _CALLED_OF_MACHINES.get(word.lower(), called if called in verbs else None)
    if called is not None:
        return f": here that is onionskin {'machine ' * of_machines}{called}"
    import difflib

    near = difflib.get_close_matches(word.lower(), verbs, n=1, cutoff=0.7)
    return f": did you mean {near[0]}?" if near else ""


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
