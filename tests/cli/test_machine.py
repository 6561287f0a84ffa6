"""The verbs of machines, as far as they need no hypervisor: machines that are off."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from support.machines import snapshot_live

import onionskin as library
from onionskin.machine.hypervisor import Recorded
from onionskin.machine.machine import Machine
from onionskin.machine.record import Record, make_directory

Run = Callable[..., Result]


@pytest.fixture
def vms(tmp_path: Path, run: Run) -> str:
    """A store with volumes web and data, and machine lab of both."""
    vms = str(tmp_path / "vms")
    for name in ("web", "data"):
        assert run("create", f"{vms}/{name}", "--size", "1M").exit_code == 0
    made = run("machine", "create", f"{vms}/lab", "--disk", "web", "--disk", f"{vms}/data", "--memory", "1M")
    assert (made.exit_code, made.stdout) == (0, f"made machine {vms}/lab: 2 disks and 1 MiB of RAM\n"), made.stderr
    return vms


def as_json(run: Run, *words: str) -> object:
    done = run("machine", *words, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def live(vms: str, name: str, text: bytes) -> None:
    with library.Store(vms) as store:
        snapshot_live(store, "lab", name, {"web": text, "lab.ram": text})


def test_a_machine_is_made_and_listed_and_its_ram_is_in_no_list_of_volumes(run: Run, vms: str) -> None:
    (about,) = as_json(run, "list", vms)  # type: ignore[misc]
    assert about["name"] == "lab" and about["state"] == "off" and about["memory_bytes"] == 1 << 20
    assert about["disks"] == [{"name": name, "volume": name, "owned": False} for name in ("web", "data")]
    assert [one["name"] for one in json.loads(run("list", vms, "--json").stdout)] == ["data", "web"]
    assert [one["name"] for one in json.loads(run("list", vms, "--all", "--json").stdout)] == ["data", "lab.ram", "web"]
    assert "lab" in run("machine", "list", vms).stdout
    assert run("machine", "list", vms, "-H", "-o", "name,memory", "-p").stdout == "lab\t1048576\n"


@pytest.mark.parametrize(
    ("given", "instead"),
    [
        (("-smp", "2"), "give --cpus instead"),
        (("-m", "2G"), "give --memory instead"),
        (("-cpu", "host"), "give --cpu-model instead"),
        (("-machine", "q35"), "give --machine-type instead"),
        (("-kernel", "vmlinuz"), "give --kernel instead"),
        (("-pflash", "OVMF.fd"), "boot with SeaBIOS or --kernel"),
    ],
)
def test_an_argument_that_an_option_stands_for_is_refused_with_that_option(
    run: Run, vms: str, given: tuple[str, ...], instead: str
) -> None:
    refused = run("machine", "create", f"{vms}/other", "--memory", "2M", "--", *given)
    assert refused.exit_code == 5
    assert instead in refused.stderr


def test_what_is_given_behind_two_dashes_goes_to_the_hypervisor(run: Run, vms: str, tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    made = run(
        *("machine", "create", f"{vms}/other", "--memory", "2M", "--cpus", "2", "--kernel", str(kernel)),
        *("--append", "quiet", "--", "-vga", "none"),
    )
    assert made.exit_code == 0, made.stderr
    with library.Store(vms) as store:
        found = store.open_machine("other").configuration
    assert (found.cpus, found.kernel, found.append, found.qemu_args) == (2, str(kernel), "quiet", ("-vga", "none"))


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["create", "{vms}/lab", "--memory", "1M"], 4, "already has a machine 'lab'"),
        (["create", "{vms}/new", "--memory", "1M", "--disk", "web"], 5, "belongs to machine 'lab'"),
        (["create", "{vms}/new", "--memory", "1M", "--disk", "no"], 3, "no volume 'no'"),
        (["create", "{vms}/new", "--memory", "1000"], 2, "whole number of MiB"),
        (["create", "{vms}/new", "--memory", "1M", "--disk", "{vms}/web@a"], 2, "is a snapshot"),
        (["status", "{vms}/no"], 3, "no machine 'no'"),
        (["status", "lab"], 2, "names no store"),
        (["revert", "{vms}/lab@no"], 3, "has no snapshot 'no'"),
        (["revert", "{vms}/lab"], 2, "names no snapshot"),
        (["revert", "{vms}/lab@no", "--beginning"], 2, "leave out the snapshot"),
        (["revert", "{vms}/lab", "--beginning"], 5, "'lab' is no fork"),
        (["merge", "{vms}/lab@a", "{vms}/other@b"], 2, "of several machines"),
        (["merge", "{vms}/lab@a", "--dry-run"], 3, "has no snapshot 'a'"),
        (["delete", "{vms}/lab", "/other/lab"], 2, "not of one store"),
        (["rename", "{vms}/lab", "/other/lab"], 2, "renamed within its store"),
        (["console", "{vms}/lab"], 5, "is off"),
        (["pause", "{vms}/lab"], 5, "is off"),
        (["start", "{vms}"], 2, "'{vms}' is a store: write {vms}/MACHINE"),
        (["delete", "{vms}/lab@a"], 2, "names a snapshot where a machine is wanted"),
        (["list", "{vms}/lab"], 3, "{vms}/lab is no store, but a name in the store {vms}: give {vms}"),
        (["reboot", "{vms}/lab"], 2, "here that is onionskin machine stop, and then start"),
        (["restore", "{vms}/lab"], 2, "here that is onionskin machine revert"),
    ],
)
def test_what_cannot_be_done_is_said_with_its_status(
    run: Run, vms: str, words: list[str], status: int, said: str
) -> None:
    refused = run("machine", *(word.format(vms=vms) for word in words))
    assert (refused.exit_code, refused.stdout) == (status, "")
    assert said.format(vms=vms) in refused.stderr and refused.stderr.count("\n") == 1


def test_volume_verbs_say_whose_a_disk_is(run: Run, vms: str) -> None:
    live(vms, "ready", b"disk")
    for words in (("delete", f"{vms}/web", "--recursive", "--yes"), ("rename", f"{vms}/web", "new")):
        refused = run(*words)
        assert refused.exit_code == 5 and "belongs to machine 'lab'" in refused.stderr
    refused = run("merge", f"{vms}/web@ready")
    assert refused.exit_code == 5 and "belong to snapshots of machines: web@ready to lab@ready" in refused.stderr


def test_a_snapshot_of_a_machine_that_is_off_says_what_it_has(run: Run, vms: str) -> None:
    taken = run("machine", "snapshot", f"{vms}/lab@cold", "--note", "as made")
    assert (taken.exit_code, taken.stdout) == (
        0,
        f"took {vms}/lab@cold: disks and configuration, as it is off\n",
    ), taken.stderr
    value = as_json(run, "snapshot", f"{vms}/lab")
    assert value["mode"] == "off" and value["disks"] == ["web", "data"]  # type: ignore[index]
    first, second = as_json(run, "snapshots", f"{vms}/lab")  # type: ignore[misc]
    assert (first["name"], first["note"], second["parent"]) == ("cold", "as made", "cold")
    assert first["disks"] == {"web": "web@cold", "data": "data@cold"} and first["ram"] is None
    assert "cold" in run("machine", "snapshots", f"{vms}/lab").stdout


def test_the_tree_shows_branches_and_where_the_machine_stands(run: Run, vms: str) -> None:
    for name in ("a", "b"):
        live(vms, name, name.encode())
    with library.Store(vms) as store:
        store._revert_machine("lab", "a")
    live(vms, "c", b"c")
    drawn = run("machine", "tree", f"{vms}/lab").stdout.splitlines()
    assert [line.strip("├└│─| `-").split("  ")[0] for line in drawn] == ["a", "b", "c", "lab"]
    assert as_json(run, "tree", f"{vms}/lab")["stands_on"] == "c"  # type: ignore[index]


def test_usage_tells_disks_from_ram(run: Run, vms: str) -> None:
    live(vms, "a", b"a")
    first, now = as_json(run, "usage", f"{vms}/lab")  # type: ignore[misc]
    assert (first["snapshot"], first["disk_bytes_held"], first["ram_bytes_held"]) == ("a", 4096, 4096)
    assert (now["snapshot"], now["disk_bytes_held"]) == (None, 0)
    assert "(now)" in run("machine", "usage", f"{vms}/lab").stdout


def test_discard_asks_and_says_before_what_goes(run: Run, vms: str) -> None:
    for name in ("a", "b"):
        live(vms, name, name.encode())
    told = run("machine", "discard", f"{vms}/lab@a", "--recursive", "--dry-run")
    assert told.exit_code == 0 and "would drop the snapshots lab@a, lab@b and" in told.stdout
    refused = run("machine", "discard", f"{vms}/lab@b")
    assert refused.exit_code == 5 and "--yes" in refused.stderr
    refused = run("machine", "discard", f"{vms}/lab@a", "--yes")
    assert refused.exit_code == 5 and "give --recursive to discard them too" in refused.stderr
    assert as_json(run, "discard", f"{vms}/lab@b", "--yes") == {"machine": "lab", "discarded": ["b"]}
    assert as_json(run, "merge", f"{vms}/lab@a") == {"machine": "lab", "merged": ["a"]}
    assert as_json(run, "snapshots", f"{vms}/lab") == []


def test_forks_that_are_not_started_wait_for_their_first_start(run: Run, vms: str) -> None:
    live(vms, "ready", b"disk")
    made = run("machine", "fork", f"{vms}/lab@ready", "-n", "2", "--no-start", "--label", "task=42")
    assert made.stdout == f"{vms}/lab-1\n{vms}/lab-2\n", made.stderr
    found = as_json(run, "list", vms, "--label", "task=42")
    assert [(one["name"], one["begins"]) for one in found] == [("lab-1", "resumes"), ("lab-2", "resumes")]  # type: ignore[attr-defined]
    said = run("machine", "status", f"{vms}/lab-1").stdout
    assert "goes on from RAM" in said and "lab@ready" in said and "task=42" in said


def test_delete_is_told_agreed_and_done_for_all(run: Run, vms: str) -> None:
    live(vms, "ready", b"disk")
    run("machine", "fork", f"{vms}/lab@ready", "--no-start")
    refused = run("machine", "delete", f"{vms}/lab", "--recursive", "--yes")
    assert refused.exit_code == 5 and "machines were forked from lab: lab-1" in refused.stderr
    both = (f"{vms}/lab", f"{vms}/lab-1", "--recursive")
    assert "the machines lab, lab-1 and the volumes" in run("machine", "delete", *both, "--dry-run").stdout
    value = as_json(run, "delete", *both, "--yes")
    assert value["deleted"] == ["lab", "lab-1"]  # type: ignore[index]
    assert [one["name"] for one in json.loads(run("list", vms, "--all", "--json").stdout)] == ["data", "web"]


def test_rename_takes_a_name_or_a_whole_one(run: Run, vms: str) -> None:
    assert run("machine", "rename", f"{vms}/lab", "new").stdout == f"{vms}/lab is {vms}/new now\n"
    assert run("machine", "rename", f"{vms}/new", f"{vms}/lab").exit_code == 0
    assert run("machine", "rename", f"{vms}/lab", "/other/lab").exit_code == 2


def test_names_of_machines_and_their_snapshots_are_completed(run: Run, vms: str) -> None:
    from onionskin.cli.arguments import MACHINE, MACHINE_SNAPSHOT, VOLUME

    live(vms, "ready", b"disk")

    def offered(kind: object, typed: str) -> list[str]:
        return [item.value for item in kind.shell_complete(None, None, typed)]  # type: ignore[attr-defined]

    assert offered(MACHINE, f"{vms}/") == [f"{vms}/lab"]
    assert offered(MACHINE_SNAPSHOT, f"{vms}/l") == [f"{vms}/lab@ready"]
    assert offered(VOLUME, f"{vms}/l") == []


def test_the_word_alone_lists_its_verbs(run: Run) -> None:
    alone = run("machine")
    assert alone.exit_code == 2 and all(
        f"\n  {verb} " in alone.stdout for verb in ("create", "start", "fork", "delete")
    )


def test_a_dry_run_of_a_merge_says_what_goes_and_changes_nothing(run: Run, vms: str) -> None:
    for name in ("a", "b"):
        live(vms, name, name.encode())
    value = as_json(run, "merge", f"{vms}/lab@a", "--dry-run")
    assert value == {"dry_run": True, "machines": [], "volumes": [], "snapshots": ["lab@a"], "bytes_freed": 8192}
    told = run("machine", "merge", f"{vms}/lab@a", f"{vms}/lab@b", "--dry-run")
    assert told.exit_code == 0 and "merge would drop the snapshots lab@a, lab@b and" in told.stdout, told.stderr
    assert [one["name"] for one in as_json(run, "snapshots", f"{vms}/lab")] == ["a", "b"]  # type: ignore[attr-defined]
    with library.Store(vms) as store:
        store._revert_machine("lab", "b")
    refused = run("machine", "merge", f"{vms}/lab@b", "--dry-run")
    assert refused.exit_code == 5 and "about to go on from a snapshot" in refused.stderr


def test_a_fork_under_a_key_is_made_once(run: Run, vms: str) -> None:
    live(vms, "a", b"a")
    for _ in range(2):
        value = as_json(run, "fork", f"{vms}/lab@a", "-n", "2", "--key", "task 7", "--no-start")
        assert value == {"source": f"{vms}/lab@a", "forks": ["lab-1", "lab-2"], "warnings": []}


def test_a_dry_run_says_what_a_fork_loses_that_is_put_back_to_its_beginning(run: Run, vms: str) -> None:
    assert run("machine", "snapshot", f"{vms}/lab@off").exit_code == 0
    assert run("machine", "fork", f"{vms}/lab@off", "--no-start").exit_code == 0
    told = run("machine", "revert", f"{vms}/lab-1", "--beginning", "--dry-run")
    assert told.exit_code == 0 and "0 B of data" in told.stdout, told.stderr
    live(vms, "ready", b"a")  # by nobody who could say on what it ran
    assert run("machine", "fork", f"{vms}/lab@ready", "--no-start").exit_code == 0
    refused = run("machine", "revert", f"{vms}/lab-2", "--beginning", "--dry-run")
    assert refused.exit_code == 6 and "cannot be read" in refused.stderr


def test_a_kernel_that_does_not_notice_a_fork_is_warned_of(run: Run, vms: str) -> None:
    recorded = Recorded("qemu", "7.2", "pc", "tcg", "max", 1 << 20, 1, guest_kernel="6.1.0-53-cloud-amd64")
    with library.Store(vms) as store:
        snapshot_live(store, "lab", "a", {}, recorded=recorded.to_json())
    made = run("machine", "fork", f"{vms}/lab@a", "--no-start")
    assert made.exit_code == 0 and made.stdout == f"{vms}/lab-1\n"
    assert "warning: forks of lab@a: its guest booted Linux 6.1.0-53-cloud-amd64" in made.stderr
    (said,) = as_json(run, "fork", f"{vms}/lab@a", "--no-start")["warnings"]  # type: ignore[index]
    assert "the same random numbers" in said


VERBS_THAT_DROP = ["discard {vms}/lab@a --recursive", "delete {vms}/lab --recursive"]


@pytest.mark.parametrize("verb", [*VERBS_THAT_DROP, "merge {vms}/lab@a --dry-run"])
def test_a_snapshot_that_somebody_holds_is_refused_before_anything_is_asked(run: Run, vms: str, verb: str) -> None:
    live(vms, "a", b"a")
    assert run("hold", f"{vms}/web@a", "backup").exit_code == 0
    words = verb.format(vms=vms).split()
    for more in ([], ["--dry-run"], ["--yes"][: "merge" not in verb]):
        refused = run("machine", *words, *more)
        assert refused.exit_code == 5 and "held: lab@a by 'backup'" in refused.stderr


def test_a_removal_of_snapshots_says_what_only_they_read_of_disks_that_stay(run: Run, vms: str) -> None:
    for name in ("a", "b"):
        assert run("write", f"{vms}/web", 0, input=name.encode() * 8192).exit_code == 0
        assert run("machine", "snapshot", f"{vms}/lab@{name}").exit_code == 0
    value = as_json(run, "delete", f"{vms}/lab", "--recursive", "--dry-run")
    assert value["snapshots"] == ["lab@a", "lab@b"] and value["bytes_freed"] == 8192  # type: ignore[index]
    refused = run("machine", "delete", f"{vms}/lab", "--recursive")
    assert refused.exit_code == 5 and "8 KiB of data that nothing else holds; give --yes" in refused.stderr
    assert run("machine", "delete", f"{vms}/lab", "--recursive", "--yes").exit_code == 0
    assert run("read", f"{vms}/web", 0, 8192).stdout_bytes == b"b" * 8192


@pytest.mark.parametrize("verb", ["discard", "revert"])
def test_a_disk_that_somebody_has_open_is_refused_before_anything_is_asked(run: Run, vms: str, verb: str) -> None:
    assert run("machine", "snapshot", f"{vms}/lab@a").exit_code == 0
    with library.Store(vms) as store, store.open("web") as web:
        web.write(0, b"later")
        web.flush()
        for more in ([], ["--dry-run"]):
            refused = run("machine", verb, f"{vms}/lab@a", *more)
            assert refused.exit_code == 5 and "volume 'web'" in refused.stderr and "--yes" not in refused.stderr


@pytest.mark.parametrize(("is_paused", "said"), [(True, "is paused at a"), (False, "goes on from a")])
def test_a_revert_of_a_machine_that_its_user_paused_says_that_it_stays_so(
    run: Run, vms: str, monkeypatch: pytest.MonkeyPatch, is_paused: bool, said: str
) -> None:
    assert run("machine", "snapshot", f"{vms}/lab@a").exit_code == 0

    def revert(self: Machine, snapshot: str) -> None:
        directory = make_directory(vms, self._id)
        Record(None, None, None, "{}", "{}", "", "", "", False, None, is_paused=is_paused).write(directory)

    monkeypatch.setattr(Machine, "revert", revert)
    assert run("machine", "revert", f"{vms}/lab@a", "--yes").stdout == f"{vms}/lab {said}\n"
