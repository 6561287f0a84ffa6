"""The verbs around a store: check, demo, completion."""

from typing import TYPE_CHECKING

import click

from onionskin.base.paths import FilePath
from onionskin.cli import exit_status, output
from onionskin.cli.arguments import FILE, SIZE, STORE, open_store, trust_option
from onionskin.cli.output import json_option

if TYPE_CHECKING:
    from pathlib import Path

    from onionskin.measure.demo import Result, Step


@click.command()
@click.argument("store", type=STORE)
@click.option("--repair", is_flag=True, help="Mend what can be mended without losing data.")
@trust_option
@json_option
def check(store: FilePath, repair: bool, as_json: bool) -> None:
    """Look for damage in a store."""
    with open_store(store) as opened:
        problems = opened.check(repair=repair)
    value = [{"severity": p.severity, "what": p.what, "where": str(p.where), "advice": p.advice} for p in problems]
    lines = [output.cell(f"{p.severity}: {p.where}: {p.what}; {p.advice}") for p in problems]
    output.show(as_json, value, lambda: "\n".join(lines) or f"{store}: no problem found")
    if any(p.severity == "error" for p in problems):
        raise click.exceptions.Exit(exit_status.DAMAGE)


@click.command()
@click.option("--size", type=SIZE, default="256M", show_default=True, help="Size of the disk.")
@click.option("--keep", type=FILE, help="Work in this new directory and leave everything in it.")
@json_option
def demo(size: int, keep: "Path | None", as_json: bool) -> None:
    """Show and prove the main job on a real disk image.

    It builds two ext4 systems from files of this machine, without root. It snapshots the first, overwrites the disk
    with the second, and proves by SHA-256 and e2fsck that revert brings the first one back. Exit status 6 if
    any proof fails.
    """

    from onionskin.measure.demo import demonstrate

    def report(step: "Step") -> None:
        if not as_json:
            proof = f"  [{step.proof}]" if step.proof else ""
            output.echo(f"{step.seconds * 1000:10.1f} ms  {step.what}{proof}")

    result = demonstrate(size, keep, report)
    steps = [{"what": s.what, "seconds": s.seconds, "operation": s.operation, "proof": s.proof} for s in result.steps]
    value = {
        "size_bytes": result.size_bytes,
        "file_system": result.file_system,
        "full_copy_seconds": result.full_copy_seconds,
        "steps": steps,
    }
    output.show(as_json, value, lambda: _draw_result(result))


def _draw_result(result: "Result") -> str:
    copy = result.full_copy_seconds
    rows = [(s.what, f"{s.seconds * 1000:.1f} ms", f"{copy / s.seconds:.1f} x") for s in result.steps if s.operation]
    rows.append(("a full copy of the image, fsync included", f"{copy * 1000:.1f} ms", "1.0 x"))
    listed = output.table(("OPERATION", "TOOK", "FASTER-BY"), rows, right="TOOK FASTER-BY")
    proofs = sum(bool(s.proof) for s in result.steps)
    about = f"{output.size(result.size_bytes)} disk, {result.file_system}; all {proofs} proofs held"
    return f"\n{listed}\n\n{about}"


@click.command()
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
@click.pass_context
@json_option
def completion(ctx: click.Context, shell: str, as_json: bool) -> None:
    """Print the script that makes a shell complete commands and names.

    \b
    eval "$(onionskin completion bash)"
    """
    from click.shell_completion import get_completion_class

    from onionskin.cli import completion as scripts  # noqa: F401  it tells click of its bash

    complete = get_completion_class(shell)
    if complete is None:
        raise AssertionError(f"{shell} is offered and not registered")
    script = complete(ctx.find_root().command, {}, "onionskin", "_ONIONSKIN_COMPLETE").source()
    output.echo(output.as_json_text({"shell": shell, "script": script}) if as_json else script)
