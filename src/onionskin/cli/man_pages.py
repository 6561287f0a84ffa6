"""Pages for man(1), made from the command line itself when a wheel is built: setup.py puts them under share/man/man1.

What must hold: this runs without the extension modules and without NumPy, since a build has neither; and the pages of one
source are always the same bytes.
"""

import re

import click

from onionskin.cli.app import onionskin
from onionskin.cli.sections import SECTION_OF

_STATUS = re.compile(r"^  (\d+)\s+(.*)$", re.MULTILINE)


def pages(version: str) -> dict[str, str]:
    """Return the source of each page by the name of its file."""
    top = click.Context(onionskin, info_name="onionskin", **onionskin.context_settings)
    made = {"onionskin.1": _overview(top, version)}
    for name, command in onionskin.commands.items():
        ctx = click.Context(command, info_name=name, parent=top)
        made[f"onionskin-{name}.1"] = _page(ctx, f"onionskin-{name}", version)
        if isinstance(command, click.Group):
            for verb, its in command.commands.items():
                below = click.Context(its, info_name=verb, parent=ctx)
                made[f"onionskin-{name}-{verb}.1"] = _page(below, f"onionskin-{name}-{verb}", version)
    return made


def _page(ctx: click.Context, title: str, version: str) -> str:
    command = ctx.command
    lines = [*_head(title, command.get_short_help_str(200), version), ".SH SYNOPSIS", f".B {_text(ctx.command_path)}"]
    lines.append(_text(" ".join(command.collect_usage_pieces(ctx))))
    lines += [".SH DESCRIPTION", *_paragraphs(command.help or ""), *_options(ctx)]
    if isinstance(command, click.Group):
        lines.append(".SH VERBS")
        for name, its in command.commands.items():
            lines += [".TP", f".BR {_text(title)}\\-{_text(name)} (1)", _text(its.get_short_help_str(200))]
    lines += [".SH SEE ALSO", ".BR onionskin (1)"]
    return "\n".join(lines) + "\n"


def _overview(ctx: click.Context, version: str) -> str:
    lines = [*_head("onionskin", ctx.command.get_short_help_str(200), version), ".SH SYNOPSIS"]
    lines += [".B onionskin", _text("VERB [OPTIONS] NAME ..."), ".SH DESCRIPTION"]
    lines += _paragraphs(
        "A name is STORE/VOLUME or STORE/VOLUME@SNAPSHOT; a store is a directory, and the last component of the path is the "
        "volume. Sizes are bytes, or a number with K, M, G, T or P (powers of 1024)."
    )
    section = ""
    for name, command in onionskin.commands.items():
        if SECTION_OF[name] != section:
            section = SECTION_OF[name]
            lines.append(f".SH {_text(section.upper())}")
        lines += [".TP", f".BR onionskin\\-{_text(name)} (1)", _text(command.get_short_help_str(200))]
    lines.append(".SH EXIT STATUS")
    for status, meaning in _STATUS.findall(onionskin.epilog or ""):
        lines += [".TP", f".B {status}", _text(meaning)]
    return "\n".join(lines) + "\n"


def _head(title: str, about: str, version: str) -> list[str]:
    header = f'.TH "{_text(title.upper())}" "1" "" "onionskin {_text(version)}" "onionskin"'
    return [header, ".SH NAME", f"{_text(title)} \\- {_text(about.rstrip('.'))}"]


def _options(ctx: click.Context) -> list[str]:
    records = [record for param in ctx.command.get_params(ctx) if (record := param.get_help_record(ctx))]
    lines = [".SH OPTIONS"]
    for names, about in records:
        if about:  # the synopsis has the arguments
            lines += [".TP", f".B {_text(names)}", _text(about)]
    return lines


def _paragraphs(text: str) -> list[str]:
    """Write paragraphs; those that begin with a \\b of click keep their lines."""
    lines: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        kept = paragraph.lstrip().startswith("\b")
        words = [line.strip() for line in paragraph.replace("\b", "").splitlines() if line.strip()]
        lines += [".PP", *([".nf", *map(_text, words), ".fi"] if kept else [_text(" ".join(words))])]
    return lines


def _text(text: str) -> str:
    """Escape what roff would take for its own."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped[:1] in (".", "'") else escaped
