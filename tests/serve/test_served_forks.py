"""Forks of a store that is served: each can be had at once by its name, and has no files before it is written to."""

from collections.abc import Callable
from pathlib import Path

from support.servers import Serve, onionskin, onionskin_json

Start = Callable[..., Serve]

MIB = 1 << 20


def files(vms: Path) -> set[str]:
    """The map files and segments of a store."""
    return {str(path.relative_to(vms)) for folder in ("layers", "segments") for path in (vms / folder).iterdir()}


def test_a_fork_that_another_process_makes_is_served_at_once_and_has_no_files_before_its_first_write(
    vms: Path, serve: Start
) -> None:
    onionskin("snapshot", f"{vms}/web@clean")
    server = serve(vms)
    before = files(vms)
    assert onionskin_json("fork", f"{vms}/web@clean", "-n", 3, "--pattern", "job-{n}")["forks"] == [
        "job-1",
        "job-2",
        "job-3",
    ]
    with server.client("job-1") as first, server.client("job-2") as second:
        for client in (first, second):
            assert client.read(5 * MIB, 4096) == bytes([5]) * 4096
        first.flush()
        assert files(vms) == before
        first.write(5 * MIB, b"mine" * 1024)
        first.flush()
        made = files(vms) - before
        assert {path.partition("/")[0] for path in made} == {"layers", "segments"} and len(made) == 2
        assert second.read(5 * MIB, 4096) == bytes([5]) * 4096
    with server.client("job-3") as third:
        assert third.read(0, 1) == b"\0"
    assert server.terminate() == 0
    assert files(vms) == before | made
