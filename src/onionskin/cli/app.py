"""All verbs, as one click group.

What must hold: a command line imports the module of its own verb alone. A verb is a process of its own, and most of what
a short one costs would be imports that it does not need.
"""

import importlib
from collections.abc import Iterator, MutableMapping

import click

import onionskin as package
from onionskin.cli import exit_status
from onionskin.cli.ending_options import HELP, ending_option, with_help
from onionskin.cli.sections import SECTIONS

__all__ = ["onionskin"]


def _show_version(ctx: click.Context, _: click.Parameter, is_wanted: bool) -> None:
    if is_wanted and not ctx.resilient_parsing:
        click.echo(f"onionskin {package.__version__}")
        ctx.exit()


_VERSION = ending_option("--version", act=_show_version, about="Show the version and exit.")
_HOME = {verb: home for homes in SECTIONS.values() for verb, home in homes.items()}


class _Commands(MutableMapping[str, click.Command]):
    """The commands of the group by their verbs. The module of a command is imported when it is first asked for."""

    def __init__(self) -> None:
        self._loaded: dict[str, click.Command] = {}

    def __getitem__(self, verb: str) -> click.Command:
        if verb not in self._loaded:
            module, attribute = _HOME[verb].split(".")
            command: click.Command = getattr(importlib.import_module(f"onionskin.cli.{module}"), attribute)
            self._loaded[verb] = with_help(command)
        return self._loaded[verb]

    def __contains__(self, verb: object) -> bool:
        return verb in _HOME

    def __iter__(self) -> Iterator[str]:
        return iter(_HOME)

    def __len__(self) -> int:
        return len(_HOME)

    def __setitem__(self, verb: str, command: click.Command) -> None:
        raise TypeError(f"the verb {verb} cannot be set: add it to the sections above")

    def __delitem__(self, verb: str) -> None:
        raise TypeError(f"the verb {verb} cannot be removed")


@click.group(
    cls=exit_status.Verbs,
    commands=_Commands(),
    epilog=exit_status.EPILOG,
    invoke_without_command=True,
    params=[_VERSION, HELP],
    add_help_option=False,
)
@click.pass_context
def onionskin(ctx: click.Context) -> None:
    """Copy-on-write snapshots of virtual disks: snapshot, revert, merge, discard, clone."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
        ctx.exit(exit_status.USAGE)
