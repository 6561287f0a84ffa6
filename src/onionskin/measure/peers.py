"""What a user would pick instead, as far as it is a program: cp, qemu-img, qemu-io."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path


def missing(*programs: str) -> str | None:
    """Return the reason to skip a peer, or None where all of its programs are here."""
    gone = [program for program in programs if shutil.which(program) is None]
    return f"not installed: {', '.join(gone)}" if gone else None


def run(*command: object, stdin: str | None = None) -> str:
    """Run a program that has to succeed; returns what it printed.

    Raises
    ------
    OSError
        It failed; the message has what it said.
    """
    words = [str(word) for word in command]
    result = subprocess.run(words, input=stdin, capture_output=True, text=True, check=False)
    if result.returncode:
        raise OSError(f"{' '.join(words[:3])} failed: {result.stderr.strip()}")
    return result.stdout


def sync_file(path: Path) -> None:
    """Make a file durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def full_copy(source: Path, target: Path) -> None:
    """Copy all bytes, and sync them."""
    run("cp", "--reflink=never", source, target)
    sync_file(target)


def reflink_copy(source: Path, target: Path) -> None:
    """Copy by sharing extents, and sync; fails where the file system cannot."""
    run("cp", "--reflink=always", source, target)
    sync_file(target)


def can_reflink(directory: Path) -> bool:
    """Whether files of a directory can share extents."""
    source, target = directory / "reflink-source", directory / "reflink-target"
    source.write_bytes(bytes(4096))
    try:
        reflink_copy(source, target)
    except OSError:
        return False
    finally:
        source.unlink()
        target.unlink(missing_ok=True)
    return True


def create_qcow2(path: Path, *, size: int | None = None, backing: Path | None = None, options: str = "") -> Path:
    """Make a qcow2 image over nothing or over another image."""
    command: list[object] = ["qemu-img", "create", "-q", "-f", "qcow2"]
    if options:
        command += ["-o", options]
    if backing:
        command += ["-b", backing, "-F", "qcow2" if backing.suffix == ".qcow2" else "raw"]
    run(*command, path, *([size] if size is not None else []))
    return path


def qemu_io_write(path: Path, offsets: Iterable[int], length: int, pattern: int) -> None:
    """Write one extent of a repeated byte at each offset of a qcow2 image, and flush."""
    commands = [f"write -P {pattern} {offset} {length}" for offset in offsets]
    run("qemu-io", "-f", "qcow2", path, stdin="\n".join([*commands, "flush", "quit\n"]))


def qemu_bench(
    image: Path | str, *, count: int, step: int, write: bool = False, depth: int = 1, kind: str = "qcow2"
) -> float:
    """Return the seconds that qemu-img bench takes for `count` requests of 4 KiB, `step` bytes apart, modulo the size.

    A write run ends with a flush, which is counted.
    """
    command: list[object] = ["qemu-img", "bench", "-f", kind, "-c", count, "-d", depth, "-s", 4096, "-S", step]
    command += ["-t", "writeback"]
    if write:
        command += ["-w", "--flush-interval", count, "--pattern", 90]
    printed = run(*command, image)
    found = re.search(r"Run completed in ([\d.]+) seconds", printed)
    if not found:
        raise OSError(f"qemu-img bench printed no time: {printed.strip()}")
    return float(found[1])
