"""The verb that measures: bench."""

import errno
import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from onionskin.cli import output
from onionskin.cli.arguments import FILE, SIZE, FileType
from onionskin.cli.output import json_option

if TYPE_CHECKING:
    from pathlib import Path

    from onionskin.measure.headline import Comparison


class NewFileType(FileType):
    """A file that is written at the end: that it can be one is asked at the beginning."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> "Path":
        """Make a path of it, or fail as a usage error."""
        path = super().convert(value, param, ctx)
        if path.is_dir():
            self.fail(f"{path} is a directory: name a file", param, ctx)
        there = path if path.exists() else path.parent
        if not os.access(there, os.W_OK):  # a directory that is not there is none, too
            self.fail(f"{path} cannot be written: {there} is missing, or not for you to write to", param, ctx)
        return path


NEW_FILE = NewFileType()


@click.command()
@click.argument("directory", type=FILE, default=".")
@click.option("--size", type=SIZE, default="512M", show_default=True, help="Size of the disk that is measured.")
@click.option(
    "--rounds", type=click.IntRange(2, 1000), default=7, show_default=True, help="How often each row is measured."
)
@click.option("--report", type=NEW_FILE, help="Write a page of HTML with charts.")
@click.option("--chart", type=NEW_FILE, help="Write the chart alone, as SVG.")
@click.option("--save", type=NEW_FILE, help="Write JSON that pytest-benchmark compares.")
@click.option("--markdown", is_flag=True, help="Print the table in Markdown.")
@json_option
def bench(
    directory: "Path",
    size: int,
    rounds: int,
    report: "Path | None",
    chart: "Path | None",
    save: "Path | None",
    markdown: bool,
    as_json: bool,
) -> None:
    """Compare onionskin with copies and qcow2 on a disk.

    The disk is that of DIRECTORY. It works in a new directory that is removed afterwards, and needs about six times the
    size in space. Peers that are not installed are left out and reported.
    """
    directory.stat()  # of a link that leads back to itself, pathlib raises no OSError
    directory = directory.resolve(strict=True)  # the peers are programs, which are started elsewhere
    if not directory.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory))
    from onionskin.measure.headline import compare
    from onionskin.measure.report import draw_chart, draw_page, draw_table
    from onionskin.measure.results import as_benchmarks, describe_machine

    comparisons = compare(directory, size, rounds, lambda step: click.echo(f"measuring: {step}", err=True))
    machine, now = describe_machine(directory), datetime.now(UTC)
    document = as_benchmarks(comparisons, machine, now)
    if save:
        save.write_text(output.as_json_text(document))
    if chart:
        chart.write_text(draw_chart(comparisons), encoding="utf-8")
    if report:
        report.write_text(draw_page(comparisons, machine, now), encoding="utf-8")
    output.show(as_json, document, lambda: draw_table(comparisons) if markdown else _draw(comparisons))


def _draw(comparisons: "list[Comparison]") -> str:
    from onionskin.measure.headline import ENGINE
    from onionskin.measure.report import times
    from onionskin.measure.timing import duration, ratio

    rows = []
    for comparison in comparisons:
        title = comparison.title
        for member, samples in comparison.samples.items():
            factor = "" if member == ENGINE else times(ratio(comparison.samples, member, ENGINE))
            rows.append((title, member, duration(samples.median), f"±{samples.spread:.0%}", factor))
            title = ""
    drawn = output.table(("WHAT", "WAY", "MEDIAN", "SPREAD", "TIMES-OURS"), rows, right="MEDIAN SPREAD TIMES-OURS")
    skipped = [f"not measured: {m}: {reason}" for c in comparisons for m, reason in c.skipped.items()]
    return "\n".join([drawn, *skipped])
