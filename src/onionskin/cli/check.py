"""The verbs around a store: check, demo, completion."""

from typing import TYPE_CHECKING, Any

import click

from onionskin.base.paths import FilePath
from onionskin.cli import exit_status, output
from onionskin.cli.arguments import FILE, SIZE, STORE, open_store, trust_option
from onionskin.cli.output import json_option

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from onionskin.measure.demo import Result
    from onionskin.measure.machine_demo import Result as MachineResult
    from onionskin.measure.steps import Step


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
@click.option("--machine", is_flag=True, help="Show it with a machine that runs: CPU, RAM and disk as one snapshot.")
@click.option("--size", type=SIZE, help="Size of the disk; by default 256M, and 32M with --machine.")
@click.option(
    "--packages",
    type=FILE,
    help="With --machine: where the package of Debian's kernel is; by default it is looked for on this machine.",
)
@click.option("--keep", type=FILE, help="Work in this new directory and leave everything in it.")
@json_option
def demo(machine: bool, size: int | None, packages: "Path | None", keep: "Path | None", as_json: bool) -> None:
    """Show and prove the main job on a real disk image.

    It builds two ext4 systems from files of this machine, without root. It snapshots the first, overwrites the disk
    with the second, and proves by SHA-256 and e2fsck that revert brings the first one back. Exit status 6 if
    any proof fails.

    With --machine, a Linux guest runs on that disk: it counts, and holds a secret in RAM. It is taken as a snapshot while it
    runs, installs another system over its disk, is put back, and goes on at the next tick. Then eight machines are forked
    from the snapshot. QEMU's own savevm and loadvm are timed beside it.
    """

    def report(step: "Step") -> None:
        if not as_json:
            proof = f"  [{step.proof}]" if step.proof else ""
            output.echo(f"{step.seconds * 1000:10.1f} ms  {step.what}{proof}")

    if machine:
        _demonstrate_machine(size, keep, packages, report, as_json)
        return
    if packages is not None:
        raise click.UsageError("--packages is for the guest of --machine")
    from onionskin.measure.demo import demonstrate

    result = demonstrate(256 << 20 if size is None else size, keep, report)
    value = {
        "size_bytes": result.size_bytes,
        "file_system": result.file_system,
        "full_copy_seconds": result.full_copy_seconds,
        "steps": _values(result.steps),
    }
    output.show(as_json, value, lambda: _draw_result(result))


def _values(steps: "Sequence[Step]") -> list[dict[str, Any]]:
    return [{"what": s.what, "seconds": s.seconds, "operation": s.operation, "proof": s.proof} for s in steps]


def _demonstrate_machine(
    size: int | None, keep: "Path | None", packages: "Path | None", report: "Callable[[Step], None]", as_json: bool
) -> None:
    from onionskin.measure.machine_demo import demonstrate

    result = demonstrate(32 << 20 if size is None else size, keep, packages, report)
    value = {
        "kernel": result.kernel,
        "hypervisor": result.hypervisor,
        "memory_bytes": result.memory_bytes,
        "size_bytes": result.size_bytes,
        "forks": result.forks,
        "forks_with_random_numbers_of_their_own": result.different,
        "machine_resident_bytes": result.machine_bytes,
        "forks_resident_bytes": result.forks_bytes,
        "steps": _values(result.steps),
        "times": [
            {"what": one.what.strip(), "seconds": one.seconds, "other": one.other, "other_seconds": one.other_seconds}
            for one in result.times
        ],
    }
    output.show(as_json, value, lambda: _draw_machine_result(result))


def _draw_machine_result(result: "MachineResult") -> str:
    rows = [
        (
            one.what,
            f"{one.seconds * 1000:.1f} ms",
            one.other,
            f"{one.other_seconds * 1000:.1f} ms",
            f"{one.faster:.1f} x",
        )
        for one in result.times
    ]
    headings = ("OPERATION", "TOOK", "QEMU-ALONE", "TAKES", "FASTER-BY")
    listed = output.table(headings, rows, right="TOOK TAKES FASTER-BY")
    proofs = sum(bool(step.proof) for step in result.steps)
    about = (
        f"{result.hypervisor}, Linux {result.kernel}, {output.size(result.memory_bytes)} of RAM, "
        f"{output.size(result.size_bytes)} disk; all {proofs} proofs held"
    )
    memory = (
        f"{result.forks} forks take {output.size(result.forks_bytes)} of memory together; "
        f"the machine that booted takes {output.size(result.machine_bytes)}"
    )
    own = "each fork draws random numbers of its own"
    same = "forks draw the same random numbers: this kernel does not notice that it was forked; see docs/machines.md"
    return f"\n{listed}\n\n{about}\n{memory}\n{own if result.different == result.forks else same}"


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
    """Print the script by which a shell completes names.

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
