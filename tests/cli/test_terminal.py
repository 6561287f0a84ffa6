"""What happens on a terminal: questions before changes are lost, progress, colours; none of it elsewhere."""

import fcntl
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import IO

import click
import pytest
from click.testing import Result

from onionskin.cli import output

Run = Callable[..., Result]
Spawn = Callable[..., "subprocess.Popen[bytes]"]


def on_terminal(
    spawn: Spawn,
    answer: bytes | signal.Signals,
    *arguments: object,
    columns: int = 80,
    asked: bytes = b"",
    stdout: IO[bytes] | None = None,
    **environment: str,
) -> tuple[int, bytes]:
    """Run a command on a terminal of its own, type an answer once it has asked, and give its status and what it showed.

    What is no text is a signal. Keys that end something do so of this command alone.
    """
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (24, columns))
    environment |= {"TERM": "xterm-256color", "COLUMNS": "", "LINES": ""}  # the width is that of the terminal

    process = spawn(
        *arguments,
        stdin=its,
        stdout=its if stdout is None else stdout,
        stderr=its,
        env=environment,
        start_new_session=True,  # whose terminal this one is then
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(its)
    shown = b""
    while asked not in shown:
        shown += os.read(ours, 4096)
    if isinstance(answer, signal.Signals):
        process.send_signal(answer)
    else:
        os.write(ours, answer)
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # how a terminal says that its other side is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    return process.wait(), shown


@pytest.fixture
def dirty(run: Run, vms: Path) -> Path:
    assert run("write", f"{vms}/web", 0, input=b"dirty").exit_code == 0
    return vms


def first_bytes(run: Run, store: Path) -> bytes:
    return run("read", f"{store}/web", 0, 5).stdout_bytes


@pytest.mark.parametrize("verb", ["revert", "discard"])
def test_no_keeps_the_changes(spawn: Spawn, run: Run, dirty: Path, verb: str) -> None:
    status, shown = on_terminal(spawn, b"n\n", verb, f"{dirty}/web@clean")
    assert status == 1
    assert b"nothing else holds. Drop them?" in shown
    assert b"onionskin: nothing was changed" in shown
    assert first_bytes(run, dirty) == b"dirty"


@pytest.fixture(params=["revert", "discard", "delete --recursive", "resize --force"])
def question(request: pytest.FixtureRequest, run: Run, dirty: Path) -> list[str]:
    """Each verb of volumes that asks."""
    verb, *options = request.param.split()
    assert run("write", f"{dirty}/web", "64K", input=b"behind the end").exit_code == 0
    names = {"delete": [f"{dirty}/web"], "resize": [f"{dirty}/web", "4K"]}
    return [verb, *names.get(verb, [f"{dirty}/web@clean"]), *options]


CUT_SHORT = {
    "an interrupt": (b"\x03", 130, b"onionskin: interrupted; "),
    "an interrupt behind a part of an answer": (b"ye\x03", 130, b"onionskin: interrupted; "),
    "an interrupt behind a wrong answer": (b"maybe\n\x03", 130, b"onionskin: interrupted; "),
    "the end of the input": (b"\x04", 1, b"\r\nonionskin: nothing was changed"),
    "the end of the input behind yes": (b"yes\x04\x04", 1, b"onionskin: nothing was changed"),
    "an empty line": (b"\n", 1, b"onionskin: nothing was changed"),
    "no, behind what is no answer": (b"yyy\n\xff\nno\n", 1, b"onionskin: nothing was changed"),
}


@pytest.mark.parametrize("how", CUT_SHORT)
def test_a_question_that_is_not_answered_with_yes_changes_nothing_and_says_one_line(
    spawn: Spawn, run: Run, dirty: Path, question: list[str], how: str
) -> None:
    typed, wanted, line = CUT_SHORT[how]
    status, shown = on_terminal(spawn, typed, *question, asked=b"[y/N]: ")
    assert status == wanted and shown.count(b"onionskin: ") == 1, shown
    assert line in shown
    assert first_bytes(run, dirty) == b"dirty"
    assert run(*question, "--yes").exit_code == 0  # nothing is locked


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_at_a_question_ends_it(
    spawn: Spawn, run: Run, dirty: Path, hangup: None, number: signal.Signals
) -> None:
    status, shown = on_terminal(spawn, number, "revert", f"{dirty}/web@clean", asked=b"[y/N]: ")
    assert status == 128 + number and shown.count(b"onionskin: ") == 1, shown
    assert first_bytes(run, dirty) == b"dirty"


def test_an_interrupt_just_before_an_answer_is_awaited_ends_the_question(
    spawn: Spawn, run: Run, dirty: Path, tmp_path: Path
) -> None:
    source = Path(__file__).parents[1] / "support" / "interrupt_before_waiting.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "strike.so", source], check=True)
    status, shown = on_terminal(spawn, b"", "revert", f"{dirty}/web@clean", LD_PRELOAD=str(tmp_path / "strike.so"))
    assert status == 130 and b"onionskin: interrupted; " in shown
    assert first_bytes(run, dirty) == b"dirty"


def test_an_answer_is_not_mixed_with_the_output(spawn: Spawn, dirty: Path, tmp_path: Path) -> None:
    with (tmp_path / "out").open("w+b") as out:
        status, _ = on_terminal(spawn, b"y\n", "revert", f"{dirty}/web@clean", "--json", stdout=out)
        assert status == 0
        assert (tmp_path / "out").read_bytes().startswith(b"{")


@pytest.mark.parametrize("verb", ["revert", "discard"])
def test_yes_drops_the_changes(spawn: Spawn, run: Run, dirty: Path, verb: str) -> None:
    status, _ = on_terminal(spawn, b"y\n", verb, f"{dirty}/web@clean")
    assert status == 0
    assert first_bytes(run, dirty) == b"clean"


@pytest.mark.parametrize("verb", ["revert", "discard"])
def test_without_a_terminal_yes_is_wanted(run: Run, dirty: Path, verb: str) -> None:
    result = run(verb, f"{dirty}/web@clean")
    assert result.exit_code == 5
    assert "--yes" in result.stderr
    assert first_bytes(run, dirty) == b"dirty"
    assert run(verb, f"{dirty}/web@clean", "--yes").exit_code == 0
    assert first_bytes(run, dirty) == b"clean"


@pytest.mark.parametrize("verb", ["revert", "discard"])
def test_nothing_is_asked_where_nothing_is_lost(run: Run, vms: Path, verb: str) -> None:
    assert run(verb, f"{vms}/web@clean").exit_code == 0
    assert first_bytes(run, vms) == b"clean"


def test_a_discard_beside_the_head_asks_too_where_data_would_be_lost(run: Run, vms: Path) -> None:
    assert run("write", f"{vms}/web", 0, input=b"other").exit_code == 0
    assert run("snapshot", f"{vms}/web@other").exit_code == 0
    assert run("revert", f"{vms}/web@clean").exit_code == 0
    assert run("write", f"{vms}/web", 0, input=b"dirty").exit_code == 0
    refused = run("discard", f"{vms}/web@other")
    assert refused.exit_code == 5 and "web@other" in refused.stderr
    assert run("discard", f"{vms}/web@other", "--yes").exit_code == 0
    assert first_bytes(run, vms) == b"dirty"


def test_zeroed_ranges_are_changes_too(run: Run, vms: Path) -> None:
    assert run("zero", f"{vms}/web", 0, "4K").exit_code == 0
    assert run("revert", f"{vms}/web@clean").exit_code == 5


def test_a_new_size_is_a_change_too(run: Run, vms: Path) -> None:
    assert run("resize", f"{vms}/web", "512K", "--force").exit_code == 0
    assert run("revert", f"{vms}/web@clean").exit_code == 5


def test_a_terminal_gets_colours_and_a_pipe_does_not(spawn: Spawn, run: Run, vms: Path) -> None:
    _, shown = on_terminal(spawn, b"", "tree", vms)
    assert b"\x1b[" in shown
    assert "\x1b[" not in run("tree", vms).stdout


def test_a_note_cannot_steer_the_terminal(run: Run, vms: Path) -> None:
    run("snapshot", f"{vms}/web@two", "--note", "\x1b[2Jgone")
    for command in (["tree", vms], ["snapshots", f"{vms}/web"], ["info", f"{vms}/web@two"]):
        assert "\x1b" not in run(*command).stdout


def test_a_terminal_without_line_characters_gets_a_tree_too(spawn: Spawn, vms: Path) -> None:
    environment = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    process = spawn("tree", vms, stdout=subprocess.PIPE, env=environment)
    assert b"`-- " in process.communicate()[0]
    assert process.returncode == 0


LONG_VERBS = {
    "import": ("import", "{dir}/image.raw", "{vms}/new"),
    "export": ("export", "{vms}/web", "{dir}/out.raw"),
    "flatten": ("flatten", "{vms}/copy"),
    "merge": ("merge", "{vms}/based", "--into-base"),
}


@pytest.fixture(params=LONG_VERBS)
def long_verb(request: pytest.FixtureRequest, run: Run, vms: Path, tmp_path: Path) -> list[str]:
    """A verb that copies a MiB, with what it works on."""
    for image in ("image.raw", "base.raw"):
        (tmp_path / image).write_bytes(os.urandom(1 << 20))
    run("clone", f"{vms}/web@clean", f"{vms}/copy")
    run("create", f"{vms}/based", "--base", tmp_path / "base.raw")
    run("write", f"{vms}/based", 0, input=b"written" * 1000)
    return [word.format(dir=tmp_path, vms=vms) for word in LONG_VERBS[request.param]]


@pytest.mark.parametrize("columns", [30, 80])
def test_progress_is_drawn_on_a_terminal_of_any_width_and_goes(
    spawn: Spawn, long_verb: list[str], columns: int
) -> None:
    status, shown = on_terminal(spawn, b"", *long_verb, columns=columns)
    assert status == 0
    *frames, said = re.split(rb"\r\x1b\[2K|\r\x1b\[1A\x1b\[2K", shown)
    assert len(frames) > 1 and long_verb[0].encode() in frames[1]
    for frame in frames:
        assert len(click.unstyle(frame.decode()).rstrip("\r\n")) <= columns
    assert b"\x1b" not in said and said.count(b"\r\n") == 1  # the cursor is shown again before


def test_progress_leaves_the_cursor_visible_for_whoever_stops_or_kills_it(spawn: Spawn, long_verb: list[str]) -> None:
    status, shown = on_terminal(spawn, b"", *long_verb)
    assert status == 0 and b"\x1b[?25l" not in shown


def test_a_pipe_gets_no_progress(spawn: Spawn, long_verb: list[str]) -> None:
    process = spawn(*long_verb, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    said, errors = process.communicate()
    assert (process.returncode, errors) == (0, b"")
    assert said.count(b"\n") == 1 and b"\x1b" not in said


def test_rich_is_not_imported_without_a_terminal(vms: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from onionskin.cli.app import onionskin\n"
        "try: onionskin(sys.argv[1:])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert 'rich' not in sys.modules\n"
    )
    command = [sys.executable, "-c", program, "export", f"{vms}/web", f"{tmp_path}/out.raw"]
    subprocess.run(command, check=True, capture_output=True)


@pytest.mark.parametrize("verb", ["write", "apply"])
def test_bytes_are_not_taken_from_a_terminal(spawn: Spawn, vms: Path, verb: str) -> None:
    status, shown = on_terminal(spawn, b"", verb, f"{vms}/web", *(["0"] if verb == "write" else []))
    assert status == 2
    assert b"pipe" in shown


def test_a_stream_is_not_written_to_a_terminal(spawn: Spawn, vms: Path) -> None:
    status, shown = on_terminal(spawn, b"", "delta", f"{vms}/web@clean")
    assert status == 2
    assert b"ONIONDLT" not in shown


def test_bytes_of_a_disk_are_not_written_to_a_terminal_but_their_base64_is(spawn: Spawn, vms: Path) -> None:
    status, shown = on_terminal(spawn, b"", "read", f"{vms}/web", "0", "5")
    assert status == 2
    assert b"pipe" in shown
    assert b"clean" not in shown
    status, shown = on_terminal(spawn, b"", "read", f"{vms}/web", "0", "5", "--json")
    assert (status, b"Y2xlYW4=" in shown) == (0, True)


@pytest.mark.parametrize("path", ["-", "/dev/tty"])
def test_an_image_is_not_written_to_a_terminal_by_any_of_its_names(spawn: Spawn, vms: Path, path: str) -> None:
    status, shown = on_terminal(spawn, b"", "export", f"{vms}/web", path)
    assert status == 2
    assert b"pipe" in shown
    assert b"clean" not in shown


def test_columns_stand_below_each_other_whatever_width_their_characters_have() -> None:
    drawn = output.table(("NAME", "SIZE"), [("磁碟", "1"), ("e\u0301t\u00e9", "22"), ("plain", "333")], right="SIZE")
    lines = [click.unstyle(line) for line in drawn.splitlines()]
    assert lines == ["NAME   SIZE", "磁碟      1", "e\u0301t\u00e9      22", "plain   333"]
