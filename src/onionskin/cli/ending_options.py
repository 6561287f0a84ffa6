"""The options that print something and end the command: --help.

Not click's own, which look for translations and for the package's metadata: that takes longer than to list a store.
"""

from collections.abc import Callable

import click


def ending_option(*names: str, act: Callable[[click.Context, click.Parameter, bool], None], about: str) -> click.Option:
    """Return an option that is looked at before the others, by the function that acts on it."""
    return click.Option(names, is_flag=True, expose_value=False, is_eager=True, callback=act, help=about)


def _show_help(ctx: click.Context, _: click.Parameter, is_wanted: bool) -> None:
    if is_wanted and not ctx.resilient_parsing:
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()


HELP = ending_option("-h", "--help", act=_show_help, about="Show this message and exit.")


def with_help(command: click.Command) -> click.Command:
    """Give a command the option --help in the place of click's own."""
    command.add_help_option = False
    command.params.append(HELP)
    return command
