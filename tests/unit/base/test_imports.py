"""What is imported, and when: NumPy takes most of the time that a start takes, and no start waits for it in vain.

Modules are counted, and not milliseconds, which a busy machine stretches.
"""

import subprocess
import sys
from pathlib import Path

import pytest

import onionskin
from onionskin import delta
from onionskin.cli import app
from onionskin.cli.machine import machine
from onionskin.nbd import server as server_module
from onionskin.nbd.server import Limits, Server

HEAVY = "{'numpy', 'rich', 'sqlite3', 'asyncio'}"


def run(program: str) -> None:
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


def test_importing_the_package_imports_nothing_heavy() -> None:
    run(f"import sys, onionskin; assert not {HEAVY} & sys.modules.keys(), sys.modules.keys()")


def test_errors_can_be_named_without_numpy() -> None:
    run("import sys, onionskin; onionskin.StateError; onionskin.parse_size; assert 'numpy' not in sys.modules")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["bench", "--help"], ["demo", "--help"], ["read"]])
def test_a_command_line_that_opens_nothing_imports_no_numpy(arguments: list[str]) -> None:
    run(
        "import sys; from onionskin.cli.app import onionskin\n"
        f"try: onionskin({arguments!r})\n"
        "except SystemExit: pass\n"
        f"assert not {HEAVY} & sys.modules.keys(), {HEAVY} & sys.modules.keys()\n"
    )


@pytest.mark.parametrize(
    "module",
    ["aio", "pytest_plugin", "images", "delta", "control.client", "nbd.server", "machine.machine", "machine.pool"],
)
def test_a_module_that_programs_import_loads_neither_numpy_nor_rich(module: str) -> None:
    run(
        f"import sys, onionskin.{module}\n"
        "loaded = {'numpy', 'rich', 'click', 'onionskin.machine.ram'} & sys.modules.keys()\n"
        "assert not loaded, loaded\n"
    )


def test_a_program_with_an_event_loop_works_on_a_volume_without_numpy(tmp_path: Path) -> None:
    run(
        "import asyncio, sys, onionskin.aio\n"
        "async def work():\n"
        f"    async with onionskin.aio.Store({str(tmp_path / 'vms')!r}) as store, store.create('web', size='1M') as web:\n"
        "        await web.write(0, b'x')\n"
        "        await web.snapshot('clean')\n"
        "        await store.fork('web', 'clean')\n"
        "        await web.revert('clean')\n"
        "asyncio.run(work())\n"
        "assert 'numpy' not in sys.modules\n"
    )


UNNEEDED = {
    *("logging", "hashlib", "tempfile", "shutil", "traceback", "difflib", "click.shell_completion"),
    *("onionskin.cli.serve", "onionskin.cli.exchange", "onionskin.cli.byte_ranges", "onionskin.volume"),
    *("json", "pkgutil", "onionskin.kernels._volume", "onionskin.kernels._copy", "onionskin.kernels._wipe"),
    *("onionskin.operations.prune", "onionskin.operations.reclaim", "onionskin.operations.check"),
    *(
        "onionskin.operations.losses",
        "pathlib",
        "urllib",
        "dataclasses",
        "locale",
        "unicodedata",
        "select",
        "onionskin.cli.verbs",
    ),
}


def test_the_list_of_verbs_is_printed_without_what_they_work_with() -> None:
    unneeded = "{'pathlib', 'socket', 'subprocess', 'tempfile', 'json', 'dataclasses', 'click.shell_completion'}"
    run(
        "import sys; from onionskin.cli.app import onionskin\n"
        "try: onionskin(['help'])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"assert not {unneeded} & sys.modules.keys(), {unneeded} & sys.modules.keys()\n"
    )


@pytest.mark.parametrize("words", [["snapshots"], ["holds"], ["info"], ["usage"]], ids=lambda words: words[0])
def test_a_verb_that_looks_imports_what_it_needs_and_no_other_verb(tmp_path: Path, words: list[str]) -> None:
    with onionskin.Store(tmp_path / "vms") as store, store.create("web", size="1M") as volume:
        volume.snapshot("clean")
    run(
        "import sys; from onionskin.cli.app import onionskin\n"
        f"try: onionskin({[*words, str(tmp_path / 'vms/web')]!r})\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"assert not {UNNEEDED} & sys.modules.keys(), {UNNEEDED} & sys.modules.keys()\n"
    )


def test_a_snapshot_imports_nothing_of_what_reads_maps_or_copies(tmp_path: Path) -> None:
    onionskin.Store(tmp_path / "vms").create("web", size="1M").close()
    unneeded = {
        *("json", "pkgutil", "tempfile", "shutil", "numpy", "pathlib", "dataclasses", "locale", "unicodedata"),
        *("onionskin.kernels._copy", "onionskin.operations.usage", "onionskin.operations.fold"),
        *("onionskin.cli.dropping", "onionskin.cli.listing", "onionskin.cli.verbs"),
    }
    run(
        "import sys; from onionskin.cli.app import onionskin\n"
        f"try: onionskin({['snapshot', str(tmp_path / 'vms/web')]!r})\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"assert not {unneeded} & sys.modules.keys(), {unneeded} & sys.modules.keys()\n"
    )


def test_a_merge_that_frees_nothing_imports_no_numpy(tmp_path: Path) -> None:
    with onionskin.Store(tmp_path / "vms") as store, store.create("web", size="1M") as web:
        for at, name in enumerate(("a", "b", "c")):
            web.write(4096 * at, b"x")
            web.snapshot(name)
    run(
        "import sys; from onionskin.cli.app import onionskin\n"
        f"try: onionskin({['merge', str(tmp_path / 'vms/web@b')]!r})\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'numpy' not in sys.modules\n"
    )


@pytest.mark.parametrize(
    "words", [["discard", "@c"], ["discard", "@b", "--recursive"], ["revert", "@b"], ["prune", ""]]
)
def test_a_verb_that_frees_slots_imports_no_numpy(tmp_path: Path, words: list[str]) -> None:
    with onionskin.Store(tmp_path / "vms") as store, store.create("web", size="1M") as web:
        for name in ("a", "b", "c"):
            web.write(0, name.encode() * 8192)
            web.snapshot(name)
        web.write(4096, b"head")
    verb, name, *rest = words
    rest += ["--keep-last", "1"] if verb == "prune" else ["--yes"]
    run(
        "import sys; from onionskin.cli.app import onionskin\n"
        f"try: onionskin({[verb, str(tmp_path / 'vms/web') + name, *rest]!r})\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'numpy' not in sys.modules\n"
    )


def test_a_machine_is_made_without_what_only_running_or_forking_it_needs(tmp_path: Path) -> None:
    onionskin.Store(tmp_path / "vms").create("web", size="1M").close()
    unneeded = {
        *("concurrent.futures", "logging", "hashlib", "numpy", "pathlib", "socket", "subprocess", "urllib"),
        *("onionskin.control.client", "onionskin.machine.machine", "onionskin.operations.fold"),
    }
    run(
        "import sys; from onionskin.cli.app import onionskin\n"
        f"try: onionskin({['machine', 'create', str(tmp_path / 'vms/lab'), '--disk', 'web', '--memory', '1M']!r})\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"assert not {unneeded} & sys.modules.keys(), {unneeded} & sys.modules.keys()\n"
    )


def test_the_version_is_said_without_the_metadata_of_the_package() -> None:
    run(
        "import sys; from onionskin.cli.app import onionskin\n"
        "try: onionskin(['--version'])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'importlib.metadata', 'email', 'pathlib'} & sys.modules.keys()\n"
    )


END = """
import atexit, gc, os, sys, threading
from onionskin.cli import main

at_once = os._exit
os._exit = lambda status: (print("ended at once", flush=True), at_once(status))
if sys.argv[1] == "atexit":
    atexit.register(lambda: print("asked at the end,", gc.isenabled() and gc.get_threshold()[0] > 10_000))
if sys.argv[1] == "thread":
    threading.Thread(target=lambda: (threading.main_thread().join(), print("ended after it"))).start()
sys.argv = ["onionskin", *sys.argv[2:]]
main()
"""


def end_of(*words: str) -> tuple[int, str]:
    ended = subprocess.run([sys.executable, "-c", END, *words], check=False, stdout=subprocess.PIPE, text=True)
    return ended.returncode, ended.stdout


def test_a_verb_ends_at_once_and_with_its_status() -> None:
    assert end_of("nothing", "--version") == (0, f"onionskin {onionskin.__version__}\nended at once\n")
    assert end_of("nothing", "no-such-verb") == (2, "ended at once\n")


def test_the_command_line_starts_with_a_collector_that_waits() -> None:
    status, said = end_of("atexit", "--version")
    assert status == 0 and "asked at the end, True" in said


def test_who_waits_for_the_end_of_a_verb_is_waited_for() -> None:
    assert "ended after it" in end_of("thread", "--version")[1]
    status, said = end_of("atexit", "no-such-verb")
    assert status == 2 and "asked at the end" in said


def test_all_operations_can_be_imported_at_once() -> None:
    run(
        "import pkgutil, sys, onionskin.operations as operations\n"
        "operations.load_all()\n"
        "names = {f'onionskin.operations.{m.name}' for m in pkgutil.iter_modules(operations.__path__)}\n"
        "assert len(names) > 20 and names <= sys.modules.keys(), names - sys.modules.keys()\n"
    )


def test_a_server_imports_all_operations_before_it_says_that_it_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(server_module, "load_all", lambda: calls.append("loaded"))
    server = Server(limits=Limits(), allow_revert=False, log=lambda line: None)

    def ready() -> None:
        calls.append("ready")
        server.stop()

    server.run(ready)
    server.close()
    assert calls == ["loaded", "ready"]


CALLS = """
import os, sys, onionskin
with onionskin.Store(sys.argv[1]) as store:
    with store.create("web", size="64M", wipe="zero") as volume:
        volume.write(5000, b"kept")
        volume.snapshot("clean")
        volume.write(5000, b"lost")
        volume.snapshot("later")
        volume.trim(0, 1 << 20)
        volume.readinto(0, bytearray(4096))
        volume.open_file().read(4096)
        assert volume.head_changed
        volume.revert("clean")
        volume.discard("later")
        assert volume.read(5000, 4) == b"kept"
        volume.resize("65M")
    store.clone("web", "clean", "copy")
    with store.open("copy") as copy, store.open("web", snapshot="clean") as view:
        copy.write(0, view.read(5000, 4))
    store.delete("copy")
    assert store.tree() and store.volumes()
    assert "numpy" not in sys.modules
    with store.open("web") as volume:
        assert volume.extents()["state"].any() and "numpy" in sys.modules
"""


def test_volumes_are_made_written_and_taken_back_without_numpy(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", CALLS, tmp_path / "store"], check=True)


# Every verb but those below, in the store that `make_store` makes.
VERBS = (
    "create STORE/new --size 1G", "snapshot STORE/web@b", "revert STORE/web@a --yes", "tree STORE", "info STORE/web",
    "clone STORE/web@a STORE/clone", "write STORE/web 5000", "read STORE/web 5000 4", "snapshots STORE/web",
    "list STORE -o name,used,written", "info STORE", "info STORE/web@a", "snapshots STORE/web -o name,used,written",
    "fork STORE/web@a -n 2", "fork STORE/web", "forks STORE/web@a", "lineage STORE/web", "expire STORE",
    "resize STORE/web 65M", "resize STORE/web 1M --force --yes", "rename STORE/web www", "rename STORE/web@a b",
    "set STORE/web wipe=zero", "set STORE wipe=zero", "get STORE/web", "hold STORE/web@a me", "unhold STORE/held@a me",
    "holds STORE/web", "note STORE/web@a why", "prune STORE/web --keep-last 1",
    "prune STORE/web --keep-daily 1 --dry-run", "usage STORE/web", "usage STORE/web@a --forks",
    "trim STORE/web 0 64K", "zero STORE/web 0 64K", "check STORE", "delete STORE/alone", "discard STORE/based@b --yes",
    "merge STORE/web@a", "merge STORE/based@a --into-base", "flatten STORE/copy", "relocate STORE/based --base IMAGE",
    "import IMAGE STORE/new", "import IMAGE STORE/new --format raw", "export STORE/based OUT", "export STORE/web@a OUT",
    "diff STORE/web@a", "diff STORE/based@a STORE/based@b", "diff STORE/web@a STORE/based", "compare STORE/web STORE/copy",
    "compare STORE/based@a IMAGE", "delta STORE/web@a --output OUT", "delta STORE/based@a STORE/based@b --output OUT",
    "delta STORE/web@a STORE/based@b --output OUT", "delta STORE/based@a STORE/based@b --dry-run",
    "apply STORE/alone STREAM", "completion bash", "help diff",
    "machine create STORE/lab --disk alone --memory 64M", "machine list STORE", "machine status STORE/guest",
    "machine snapshot STORE/guest@s", "machine snapshots STORE/guest", "machine tree STORE/guest",
    "machine usage STORE/guest", "machine rename STORE/guest box", "machine delete STORE/guest",
    "machine discard STORE/taken@s --yes", "machine merge STORE/taken@s",
    "machine hold STORE/taken@s me", "machine unhold STORE/kept@s me", "machine holds STORE/taken",
    "machine note STORE/taken@s why", "machine prune STORE/taken --keep-last 1",
    "map STORE/web", "map STORE/based@a --json", "map STORE/web -o OUT.svg", "map STORE/web -o OUT.png",
)  # fmt: skip
# They run until they are stopped, ask a server or a hypervisor that has to run, or measure.
NOT_TRIED = {"serve", "stats", "mount", "umount", "demo", "bench"} | {
    f"machine {verb}" for verb in ("start", "stop", "pause", "resume", "console", "revert", "fork", "pool")
}


def make_store(directory: Path) -> None:
    (directory / "disk.img").write_bytes(b"data".ljust(1 << 20, b"\0"))
    with onionskin.Store(directory / "store") as store:
        for name in ("disk", "alone", "other", "third", "held"):
            store.create(name, size="1M").close()
        store.create_machine("guest", disks=["disk"], memory="64M")
        store.create_machine("taken", disks=["other"], memory="64M").snapshot("s")
        kept = store.create_machine("kept", disks=["third"], memory="64M")
        kept.snapshot("s")
        kept.hold("s", "me")
        with store.open("held") as held:
            held.snapshot("a")
        store.hold("held", "a", "me")
        with store.create("web", size="64M") as web, store.create("based", base=directory / "disk.img") as based:
            for volume in (web, based):
                volume.write(5000, b"kept")
                volume.snapshot("a")
                volume.write(9000, b"more")
            based.snapshot("b")
        store.clone("web", "a", "copy")
        with open(directory / "stream", "wb") as stream:
            delta.delta(store, "web", None, "a", stream)


@pytest.mark.parametrize(
    "arguments",
    ["import IMAGE STORE/new", "export STORE/web@a OUT", "flatten STORE/copy", "delta STORE/web@a --output OUT",
     "compare STORE/based@a IMAGE"],
)  # fmt: skip
def test_a_verb_that_reads_or_writes_an_image_imports_no_pathlib(tmp_path: Path, arguments: str) -> None:
    make_store(tmp_path)
    run_verb(tmp_path, arguments, "{'numpy', 'pathlib', 'urllib', 'dataclasses', 'socket', 'subprocess'}")


@pytest.mark.parametrize(
    "arguments",
    ["export STORE/web@a OUT", "compare STORE/web STORE/copy", "delta STORE/based@a STORE/based@b --output OUT"],
)
def test_a_verb_that_reads_snapshots_imports_nothing_of_what_seals_folds_or_restages(
    tmp_path: Path, arguments: str
) -> None:
    make_store(tmp_path)
    unneeded = ("fold", "hidden_blocks", "compact_segments", "seal", "snapshots", "staged_volumes", "resize")
    run_verb(tmp_path, arguments, str({f"onionskin.operations.{name}" for name in unneeded}))


@pytest.mark.parametrize("arguments", ["map STORE/web", "map STORE/web -o OUT.svg"])
def test_a_map_that_is_no_png_imports_nothing_of_one(tmp_path: Path, arguments: str) -> None:
    make_store(tmp_path)
    run_verb(tmp_path, arguments, "{'zlib', 'html', 'pathlib', 'onionskin.pictures.png'}")


@pytest.mark.parametrize("arguments", VERBS)
def test_a_verb_imports_no_numpy(tmp_path: Path, arguments: str) -> None:
    make_store(tmp_path)
    run_verb(tmp_path, arguments, "{'numpy', 'zoneinfo'}")


def run_verb(directory: Path, arguments: str, unneeded: str) -> None:
    """Run a verb, and check that it imports nothing that is unneeded."""
    places = {"STORE": "store", "IMAGE": "disk.img", "OUT": "out", "STREAM": "stream"}
    words = arguments.split()
    for word, name in places.items():
        words = [one.replace(word, str(directory / name)) for one in words]
    program = (
        "import sys; from onionskin.cli.app import onionskin\n"
        f"try: onionskin({words!r})\n"
        f"except SystemExit as end: assert not end.code or {words[0]!r} == 'compare', end.code\n"
        f"assert not {unneeded} & sys.modules.keys(), {unneeded} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL, input=b"")


def test_each_verb_is_tried_or_it_is_said_why_not() -> None:
    every = {*app.onionskin.commands, *(f"machine {verb}" for verb in machine.commands)} - {"machine"}
    tried = {" ".join(words[: 1 + (words[0] == "machine")]) for words in map(str.split, VERBS)}
    assert tried | NOT_TRIED == every
    assert not tried & NOT_TRIED


def test_every_public_name_is_there() -> None:
    run("import onionskin; assert all(getattr(onionskin, name) for name in onionskin.__all__)")


def test_dir_and_help_show_every_public_name_and_nothing_of_how_it_is_loaded() -> None:
    shown = {name for name in dir(onionskin) if not name.startswith("_")}
    assert shown == set(onionskin.__all__)
    helped = subprocess.run(
        [sys.executable, "-c", "import onionskin; help(onionskin)"], check=True, capture_output=True, text=True
    ).stdout
    for name in ("class Store", "class Volume", "connect(", "parse_size("):
        assert name in helped
