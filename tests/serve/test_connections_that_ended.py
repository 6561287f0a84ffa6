"""What a program does with the connection to a served volume that is closed, or is its parent's."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.servers import Serve

import onionskin

Start = Callable[..., Serve]


def test_a_closed_connection_says_so_and_how_it_is_opened_again(vms: Path, serve: Start) -> None:
    serve(f"{vms}/web")
    with onionskin.connect(vms, "web") as live:
        assert repr(live).startswith("<LiveVolume web served by process ")
    assert repr(live) == "<LiveVolume web closed>"
    live.close()
    for call in (live.flush, live.info, lambda: live.snapshot("a"), lambda: live.size_bytes):
        with pytest.raises(onionskin.StateError, match="closed; connect again"):
            call()


def test_the_child_of_a_fork_takes_no_answer_of_its_parent(vms: Path, serve: Start) -> None:
    serve(f"{vms}/web")
    with onionskin.connect(vms, "web") as live:
        child = os.fork()
        if child == 0:
            try:
                live.info()
            except onionskin.StateError as error:
                os._exit(0 if "before fork" in str(error) else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert live.info()["name"] == "web"
