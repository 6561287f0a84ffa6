"""Each verb does what it says, and its JSON has the documented shape."""

import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

import onionskin

Run = Callable[..., Result]

VOLUME_KEYS = {"name", "size_bytes", "block_size", "wipe", "base", "created", "snapshots", "holder"} | {
    "used_bytes",
    "written_bytes",
    "expires",
    "labels",
}
SNAPSHOT_KEYS = {"name", "guid", "created", "parent", "note", "size_bytes"}


def ok(result: Result) -> str:
    assert result.exit_code == 0, result.stderr
    return result.stdout


def as_json(result: Result) -> Any:
    return json.loads(ok(result))


def test_create_tells_what_it_made(run: Run, tmp_path: Path) -> None:
    made = as_json(run("create", f"{tmp_path}/vms/web", "--size", "20M", "--wipe", "zero", "--json"))
    assert set(made) == VOLUME_KEYS
    assert (made["name"], made["size_bytes"], made["block_size"]) == ("web", 20 << 20, 4096)
    assert (made["wipe"], made["base"], made["snapshots"], made["holder"]) == ("zero", None, 0, None)
    assert made["created"].endswith("Z")


@pytest.mark.parametrize("verb", ["create", "import"])
def test_no_store_is_made_where_somebody_keeps_something_else(run: Run, tmp_path: Path, verb: str) -> None:
    image = tmp_path / "image.raw"
    image.write_bytes(os.urandom(8192))
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "one.jpg").write_bytes(b"jpg")
    words = ["create", f"{photos}/web", "--size", "1M"] if verb == "create" else ["import", image, f"{photos}/web"]
    refused = run(*words)
    assert refused.exit_code == 4
    assert str(photos) in refused.stderr and "one.jpg" in refused.stderr and "empty or not there" in refused.stderr
    assert [path.name for path in photos.iterdir()] == ["one.jpg"]


def test_a_store_is_made_in_an_empty_directory_and_goes_on_where_one_was_begun(run: Run, tmp_path: Path) -> None:
    """The directory of a new file system is one too; a creation that was killed leaves directories and a lock."""
    for name in ("empty", "begun"):
        (tmp_path / name / "lost+found").mkdir(parents=True)
    ok(run("create", f"{tmp_path}/empty/web", "--size", "1M"))
    (tmp_path / "begun" / "layers").mkdir()
    for left in ("lock", "reserve", "catalog.db-wal", "catalog.db.71.5310.new", "catalog.db.71.5310.new-journal"):
        (tmp_path / "begun" / left).touch()
    ok(run("create", f"{tmp_path}/begun/web", "--size", "1M"))
    (tmp_path / "empty" / "notes.txt").touch()
    ok(run("create", f"{tmp_path}/empty/db", "--size", "1M"))  # it is a store now, whatever lies beside


def test_create_over_a_base_takes_its_size(run: Run, tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(os.urandom(8192))
    made = as_json(run("create", f"{tmp_path}/vms/web", "--base", base, "--json"))
    assert (made["size_bytes"], made["base"]) == (8192, str(base))
    assert run("read", f"{tmp_path}/vms/web", 0, "8K").stdout_bytes == base.read_bytes()


def test_write_then_read(run: Run, vms: Path) -> None:
    wrote = as_json(run("write", f"{vms}/web", "4K", "--json", input=b"\x00\xffabc"))
    assert wrote == {"offset": 4096, "length": 5}
    assert run("read", f"{vms}/web", 4096, 5).stdout_bytes == b"\x00\xffabc"
    read = as_json(run("read", f"{vms}/web", 4096, 5, "--json"))
    assert base64.b64decode(read["base64"]) == b"\x00\xffabc"


def test_a_snapshot_is_read_by_its_name(run: Run, vms: Path) -> None:
    ok(run("write", f"{vms}/web", 0, input=b"dirty"))
    assert run("read", f"{vms}/web@clean", 0, 5).stdout_bytes == b"clean"


@pytest.mark.parametrize("verb", ["trim", "zero"])
def test_trim_and_zero_make_a_range_read_zero(run: Run, vms: Path, verb: str) -> None:
    assert as_json(run(verb, f"{vms}/web", 0, "4K", "--json")) == {"offset": 0, "length": 4096}
    assert run("read", f"{vms}/web", 0, 5).stdout_bytes == bytes(5)


def test_snapshots_are_listed(run: Run, vms: Path) -> None:
    taken = as_json(run("snapshot", f"{vms}/web@two", "--json"))
    listed = as_json(run("snapshots", f"{vms}/web", "--json"))
    assert [set(one) for one in listed] == [SNAPSHOT_KEYS | {"used_bytes", "written_bytes"}] * 2
    assert [(one["name"], one["parent"], one["note"]) for one in listed] == [
        ("clean", None, "as installed"),
        ("two", "clean", ""),
    ]
    about = as_json(run("info", f"{vms}/web@two", "--json"))
    assert [layer["name"] for layer in about.pop("chain")] == ["web@two", "web@clean"]
    assert listed[1] == about
    assert listed[1] == taken | {"used_bytes": 0, "written_bytes": 0}
    assert len(taken["guid"]) == 32
    text = ok(run("snapshots", f"{vms}/web")).splitlines()
    assert text[0].split() == ["SNAPSHOT", "SIZE", "USED", "WRITTEN", "TAKEN", "PARENT", "NOTE"]
    assert text[1].endswith("as installed")


def test_info_and_list_agree(run: Run, vms: Path) -> None:
    about = as_json(run("info", f"{vms}/web", "--json"))
    assert [layer["name"] for layer in about.pop("chain")] == ["web", "web@clean"]
    assert set(about) == VOLUME_KEYS
    assert as_json(run("list", vms, "--json")) == [about]
    assert "1 MiB (1048576 bytes)" in ok(run("info", f"{vms}/web"))
    assert ok(run("list", vms)).splitlines()[1].split()[:3] == ["web", "1", "MiB"]


def test_the_tree_shows_heads_under_what_they_stand_on(run: Run, vms: Path) -> None:
    ok(run("snapshot", f"{vms}/web@two"))
    ok(run("revert", f"{vms}/web@clean"))
    lines = ok(run("tree", vms)).splitlines()
    clean, two, head = (
        next(line for line in lines if word in line and kind in line)
        for word, kind in (("clean", "snapshot"), ("two", "snapshot"), ("web", "head"))
    )
    depth = [next(i for i, c in enumerate(line) if c.isalnum()) for line in (clean, two, head)]
    assert depth[1] == depth[2] == depth[0] + 4
    assert "as installed" in clean


def test_the_tree_as_json_is_nested(run: Run, vms: Path) -> None:
    nodes = as_json(run("tree", vms, "--json"))
    pending, kinds = list(nodes), []
    while pending:
        node = pending.pop()
        assert set(node) == {"kind", "name", "size_bytes", "created", "note", "bytes_held", "origins", "children"}
        kinds.append(node["kind"])
        pending.extend(node["children"])
    assert {"snapshot", "head"} <= set(kinds)


def test_usage_of_forks_is_shown_by_fork_and_together(run: Run, vms: Path) -> None:
    ok(run("fork", f"{vms}/web@clean", "-n", 2, "--pattern", "job-{n}"))
    ok(run("write", f"{vms}/job-2", 0, input=b"dirty"))
    found = as_json(run("usage", f"{vms}/web@clean", "--forks", "--json"))
    assert [(one["fork"], one["private_bytes"]) for one in found] == [("job-1", 0), ("job-2", 4096), (None, 4096)]
    assert {one["shared_bytes"] for one in found} == {4096}
    assert ok(run("usage", f"{vms}/web", "--forks")).splitlines()[-1].split() == ["(together)", "4", "KiB", "4", "KiB"]
    assert run("usage", f"{vms}/web@clean").exit_code == 2


def test_the_tree_says_where_forks_come_from_that_stand_elsewhere(run: Run, vms: Path) -> None:
    ok(run("fork", f"{vms}/web@clean", "--name", "direct"))
    ok(run("fork", f"{vms}/web@clean", "--name", "job"))
    ok(run("write", f"{vms}/job", 0, input=b"dirty"))
    ok(run("fork", f"{vms}/job", "--name", "first"))
    ok(run("fork", f"{vms}/job", "--name", "second"))
    drawn = ok(run("tree", vms))
    assert "from job" in next(line for line in drawn.splitlines() if "first  head" in line)
    assert "from" not in next(line for line in drawn.splitlines() if "direct  head" in line)
    ok(run("delete", f"{vms}/job", "--yes"))
    for line in ok(run("tree", vms)).splitlines():
        assert ("from job (dropped " in line and line.endswith("), from web@clean")) == (
            "first  head" in line or "second  head" in line
        )
    assert "from job" in ok(run("tree", vms, "-o", "-"))
    nodes = as_json(run("tree", vms, "--json"))
    found = {}
    while nodes:
        node = nodes.pop()
        nodes += node["children"]
        found[node["name"]] = [(one["volume"], one["snapshot"], one["dropped"] is None) for one in node["origins"]]
    assert found["first"] == [("job", None, False), ("web", "clean", True)]
    assert found["direct"] == [("web", "clean", True)] and found["web"] == found["web@clean"] == []
    ok(run("delete", f"{vms}/first", f"{vms}/second", "--yes"))
    assert "job" not in ok(run("tree", vms))


def test_revert_brings_the_old_bytes_back(run: Run, vms: Path) -> None:
    ok(run("write", f"{vms}/web", 0, input=b"dirty"))
    reverted = as_json(run("revert", f"{vms}/web@clean", "--yes", "--json"))
    assert reverted == {"volume": "web", "snapshot": "clean", "size_bytes": 1 << 20}
    assert run("read", f"{vms}/web", 0, 5).stdout_bytes == b"clean"


def test_merge_keeps_the_data_and_drops_the_name(run: Run, vms: Path) -> None:
    ok(run("write", f"{vms}/web", 4096, input=b"later"))
    merged = as_json(run("merge", f"{vms}/web@clean", "--json"))
    assert merged == {"volume": "web", "merged": ["clean"], "into_base": False}
    assert run("read", f"{vms}/web", 0, 5).stdout_bytes == b"clean"
    assert run("read", f"{vms}/web", 4096, 5).stdout_bytes == b"later"


def test_merge_into_the_base_writes_the_base(run: Run, tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(64 << 10))
    ok(run("create", f"{tmp_path}/vms/web", "--base", base))
    ok(run("write", f"{tmp_path}/vms/web", 8192, input=b"folded"))
    assert as_json(run("merge", f"{tmp_path}/vms/web", "--into-base", "--json"))["into_base"] is True
    assert base.read_bytes()[8192:8198] == b"folded"
    assert run("read", f"{tmp_path}/vms/web", 8192, 6).stdout_bytes == b"folded"


def test_discard_takes_descendants_where_asked(run: Run, vms: Path) -> None:
    ok(run("snapshot", f"{vms}/web@two"))
    gone = as_json(run("discard", f"{vms}/web@clean", "--recursive", "--json"))
    assert gone == {"volume": "web", "discarded": ["clean", "two"]}
    assert as_json(run("snapshots", f"{vms}/web", "--json")) == []


def test_a_clone_starts_as_the_snapshot(run: Run, vms: Path) -> None:
    ok(run("write", f"{vms}/web", 0, input=b"dirty"))
    made = as_json(run("clone", f"{vms}/web@clean", f"{vms}/web-2", "--json"))
    assert set(made) == VOLUME_KEYS
    assert made["name"] == "web-2"
    assert run("read", f"{vms}/web-2", 0, 5).stdout_bytes == b"clean"


def test_a_flat_volume_needs_no_base(run: Run, tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"base" * 4096)
    ok(run("create", f"{tmp_path}/vms/web", "--base", base))
    assert as_json(run("flatten", f"{tmp_path}/vms/web", "--json"))["base"] is None
    base.unlink()
    assert run("read", f"{tmp_path}/vms/web", 0, 4).stdout_bytes == b"base"


def test_resize_shrinks_only_where_forced(run: Run, vms: Path) -> None:
    assert as_json(run("resize", f"{vms}/web", "2M", "--json"))["size_bytes"] == 2 << 20
    assert run("resize", f"{vms}/web", "1M").exit_code == 5
    assert as_json(run("resize", f"{vms}/web", "1M", "--force", "--json"))["size_bytes"] == 1 << 20


def test_rename_takes_the_bare_name_or_the_whole(run: Run, vms: Path) -> None:
    assert as_json(run("rename", f"{vms}/web", "www", "--json"))["name"] == "www"
    assert as_json(run("rename", f"{vms}/www", f"{vms}/web", "--json"))["name"] == "web"
    assert run("rename", f"{vms}/web", f"{vms}-2/web").exit_code == 2


def test_relocate_finds_a_moved_base(run: Run, tmp_path: Path) -> None:
    base, moved = tmp_path / "base.raw", tmp_path / "moved.raw"
    base.write_bytes(b"base" * 4096)
    ok(run("create", f"{tmp_path}/vms/web", "--base", base, "--digest"))
    base.rename(moved)
    assert run("read", f"{tmp_path}/vms/web", 0, 4).exit_code in (3, 6)
    about = as_json(run("relocate", f"{tmp_path}/vms/web", "--base", moved, "--verify", "--json"))
    assert about["base"] == str(moved)
    assert run("read", f"{tmp_path}/vms/web", 0, 4).stdout_bytes == b"base"


def test_delete_takes_snapshots_only_where_asked(run: Run, vms: Path) -> None:
    assert run("delete", f"{vms}/web").exit_code == 5
    gone = as_json(run("delete", f"{vms}/web", "--recursive", "--yes", "--json"))
    assert gone["deleted"] == ["web"] and gone["bytes_freed"] > 0
    assert as_json(run("list", vms, "--json")) == []


def test_diff_lists_what_changed(run: Run, vms: Path) -> None:
    ok(run("write", f"{vms}/web", 8192, input=b"x"))
    ok(run("snapshot", f"{vms}/web@two"))
    expected = [{"offset": 8192, "length": 4096, "state": "data"}]
    found = as_json(run("diff", f"{vms}/web@clean", f"{vms}/web@two", "--json"))
    assert found == {"from": "clean", "to": "two", "bytes": 4096, "extents": expected}
    ok(run("zero", f"{vms}/web", 0, "4K"))
    found = as_json(run("diff", f"{vms}/web@two", f"{vms}/web", "--json"))
    assert (found["to"], found["extents"]) == (None, [{"offset": 0, "length": 4096, "state": "zero"}])
    assert ok(run("diff", f"{vms}/web@two", f"{vms}/web@two")) == "no difference\n"


def test_usage_has_a_row_for_each_snapshot_and_the_head(run: Run, vms: Path) -> None:
    rows = as_json(run("usage", f"{vms}/web", "--json"))
    assert [row["snapshot"] for row in rows] == ["clean", None]
    assert set(rows[0]) == {"snapshot", "bytes_held", "bytes_freed_by_discard", "bytes_freed_by_merge"}
    assert rows[0]["bytes_held"] == 4096
    assert "(head)" in ok(run("usage", f"{vms}/web"))


def test_export_to_stdout_is_raw_and_makes_no_file(run: Run, vms: Path, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "onionskin", "export", f"{vms}/web@clean", "-"]
    done = subprocess.run([*program, "--json"], cwd=tmp_path, check=True, capture_output=True)
    with onionskin.Store(vms) as store, store.open("web", snapshot="clean") as view:
        assert done.stdout == view.read(0, view.size_bytes)
    assert json.loads(done.stderr)["format"] == "raw"
    refused = subprocess.run([*program, "--format", "qcow2"], cwd=tmp_path, check=False, capture_output=True)
    assert refused.returncode == 2
    assert not (tmp_path / "-").exists()


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_export_then_import(run: Run, vms: Path, tmp_path: Path, kind: str) -> None:
    image = tmp_path / f"out.{kind}"
    wrote = as_json(run("export", f"{vms}/web@clean", image, "--json"))
    assert (wrote["path"], wrote["format"], wrote["size_bytes"]) == (str(image), kind, 1 << 20)
    assert wrote["allocated_bytes"] == image.stat().st_blocks * 512
    assert set(as_json(run("import", image, f"{tmp_path}/other/web", "--json"))) == VOLUME_KEYS
    assert run("read", f"{tmp_path}/other/web", 0, 5).stdout_bytes == b"clean"


def test_delta_then_apply(run: Run, vms: Path, tmp_path: Path) -> None:
    ok(run("write", f"{vms}/web", 0, input=b"later"))
    ok(run("snapshot", f"{vms}/web@two", "--note", "a note"))
    ok(run("create", f"{tmp_path}/other/web", "--size", "4K"))
    whole = run("delta", f"{vms}/web@clean")
    ok(run("apply", f"{tmp_path}/other/web", input=whole.stdout_bytes))
    sent = as_json(run("delta", f"{vms}/web@clean", f"{vms}/web@two", "-o", tmp_path / "stream", "--json"))
    expected = {"from": "clean", "to": "two", "full": False, "size_bytes": 1 << 20}
    assert sent == expected | {"data_bytes": 4096, "zero_bytes": 0}
    taken = as_json(run("apply", f"{tmp_path}/other/web", tmp_path / "stream", "--json"))
    assert set(taken) == SNAPSHOT_KEYS
    assert (taken["name"], taken["note"]) == ("two", "a note")
    assert run("read", f"{tmp_path}/other/web", 0, 5).stdout_bytes == b"later"


def test_check_finds_nothing_in_a_good_store(run: Run, vms: Path) -> None:
    assert as_json(run("check", vms, "--json")) == []
    assert "no problem" in ok(run("check", vms))


def test_check_ends_with_damage_where_a_segment_is_missing(run: Run, vms: Path) -> None:
    for segment in (vms / "segments").iterdir():
        segment.unlink()
    result = run("check", vms, "--json")
    assert result.exit_code == 6
    problems = json.loads(result.stdout)
    assert all(set(problem) == {"severity", "what", "where", "advice"} for problem in problems)
    assert "error" in {problem["severity"] for problem in problems}


@pytest.mark.parametrize("what", ["base", "gone base", "map", "gone map", "segment", "gone segment"])
def test_what_cannot_be_opened_any_more_can_be_deleted(run: Run, tmp_path: Path, what: str) -> None:
    base, vms = tmp_path / "base.raw", tmp_path / "vms"
    base.write_bytes(b"b" * 65536)
    with onionskin.Store(vms) as store, store.create("kept", size="1M") as kept:
        kept.write(0, b"kept")
    before = sorted(path.name for path in vms.glob("*/*"))
    with onionskin.Store(vms) as store, store.create("web", base=base) as web:
        web.write(0, b"1" * 4096)
        web.snapshot("a")
        web.write(4096, b"2" * 4096)
    damaged = {"base": [base], "map": vms.glob("layers/*"), "segment": vms.glob("segments/*")}.get(what.split()[-1], [])
    for path in [path for path in damaged if path.name not in before]:
        path.unlink() if "gone" in what else path.write_bytes(b"?" * path.stat().st_size)
    assert run("read", f"{vms}/web", 0, 1).exit_code != 0
    assert run("delete", f"{vms}/web", "--recursive").exit_code == 5  # it asks all the same
    ok(run("delete", f"{vms}/web", "--recursive", "--yes"))
    assert [volume["name"] for volume in as_json(run("list", vms, "--json"))] == ["kept"]
    assert run("read", f"{vms}/kept", 0, 4).stdout == "kept"
    assert run("check", vms).exit_code == 0
    assert sorted(path.name for path in vms.glob("*/*")) == before


def test_the_demo_proves_what_it_shows(run: Run, tmp_path: Path) -> None:
    result = as_json(run("demo", "--size", "24M", "--keep", tmp_path / "kept", "--json"))
    assert set(result) == {"size_bytes", "file_system", "full_copy_seconds", "steps"}
    proved = [step["what"] for step in result["steps"] if step["proof"]]
    assert "SHA-256 of the whole disk: the first is back" in proved
    assert "no file of the store holds it any more" in proved
    assert as_json(run("list", tmp_path / "kept" / "store", "--json"))[0]["name"] == "disk"


def test_a_demo_whose_revert_did_nothing_fails(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onionskin.volume.Volume.revert", lambda volume, name: None)
    result = run("demo", "--size", "16M")
    assert result.exit_code == 6
    assert "the first is back" in result.stderr


def test_without_mkfs_the_demo_says_so_and_proves_the_rest(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onionskin.measure.demo.program", lambda name: None)
    assert "mkfs.ext4 is not installed" in ok(run("demo", "--size", "16M"))


def test_a_diff_is_json_lines_for_programs_that_read_lines(tmp_path: Path, run: Run) -> None:
    vms = tmp_path / "vms"
    with onionskin.Store(vms) as store, store.create("web", size="1M") as volume:
        volume.snapshot("a")
        volume.write(4096, b"x" * 8192)
        volume.write(65536, b"y")
        volume.snapshot("b")
    lines = ok(run("diff", f"{vms}/web@a", f"{vms}/web@b", "--json-lines")).splitlines()
    extents = as_json(run("diff", f"{vms}/web@a", f"{vms}/web@b", "--json"))["extents"]
    assert [json.loads(line) for line in lines] == extents and len(lines) == 2
    assert ok(run("diff", f"{vms}/web@a", f"{vms}/web@a", "--json-lines")) == ""
    assert run("diff", f"{vms}/web@a", f"{vms}/web@b", "--json-lines", "--json").exit_code == 2


def test_a_diff_of_one_name_shows_what_changed_since_then(run: Run, vms: Path) -> None:
    ok(run("write", f"{vms}/web", 8192, input=b"x"))
    since_clean = as_json(run("diff", f"{vms}/web", "--json"))
    assert (since_clean["from"], since_clean["to"], since_clean["bytes"]) == ("clean", None, 4096)
    ok(run("snapshot", f"{vms}/web@later"))
    ok(run("write", f"{vms}/web", 16384, input=b"x"))
    assert as_json(run("diff", f"{vms}/web", "--json"))["from"] == "later"
    assert as_json(run("diff", f"{vms}/web@clean", "--json"))["bytes"] == 8192
    ok(run("revert", f"{vms}/web@clean", "--yes"))
    assert as_json(run("diff", f"{vms}/web", "--json")) == {"from": "clean", "to": None, "bytes": 0, "extents": []}
    ok(run("create", f"{vms}/new", "--size", "1M"))
    refused = run("diff", f"{vms}/new")
    assert refused.exit_code == 3 and "stands on no snapshot of its own" in refused.stderr
    for words in ((f"{vms}/new", f"{vms}/web"), (f"{vms}/web@clean",) * 3):
        assert run("diff", *words).exit_code == 2


def test_expire_says_what_it_would_delete(run: Run, vms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ok(run("fork", f"{vms}/web@clean", "--pattern", "job-{n}", "-n", "4", "--lifetime", "1h"))
    ok(run("snapshot", f"{vms}/job-2@kept"))
    with onionskin.Store(vms) as store:
        store.create_machine("lab", disks=["job-4"], memory="64M")
        now = time.time_ns()
        monkeypatch.setattr(time, "time_ns", lambda: now + 7_200_000_000_000)
        with store.open("job-3"):
            assert store.expire(dry_run=True) == ["job-1"]
    found = as_json(run("expire", vms, "--dry-run", "--json"))
    assert found == {"dry_run": True, "would_delete": ["job-1", "job-3"]}
    assert ok(run("expire", vms, "--dry-run")) == "expire would delete job-1, job-3; nothing was changed\n"
    assert as_json(run("expire", vms, "--json")) == {"deleted": ["job-1", "job-3"]}
    assert ok(run("expire", vms, "--dry-run")) == "expire would delete nothing; nothing was changed\n"


def test_a_delta_says_how_much_it_would_hold(run: Run, vms: Path, tmp_path: Path) -> None:
    ok(run("write", f"{vms}/web", 8192, input=b"x" * 8192))
    ok(run("trim", f"{vms}/web", 0, 4096))
    ok(run("snapshot", f"{vms}/web@b"))
    for names in ((f"{vms}/web@b",), (f"{vms}/web@clean", f"{vms}/web@b")):
        told = as_json(run("delta", *names, "--dry-run", "--json"))
        assert told.pop("dry_run") is True
        file = tmp_path / f"{len(names)}.delta"
        assert "8 KiB of data at most" in ok(run("delta", *names, "--dry-run", "--output", file)) and not file.exists()
        assert as_json(run("delta", *names, "--output", file, "--json")) == told


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        ("qcow2", ("-c",)),
        ("qcow2", ("--compress", "-o", "compression_type=zstd", "-o", "cluster_size=128K")),
        ("vmdk", ("-c",)),
        ("vhd", ("-o", "subformat=fixed")),
    ],
)
def test_an_export_is_compressed_and_has_the_options_of_its_format(
    run: Run, vms: Path, tmp_path: Path, suffix: str, options: tuple[str, ...]
) -> None:
    ok(run("resize", f"{vms}/web", "8M"))
    ok(run("write", f"{vms}/web", 4096, input=b"compressible" * 400_000))
    image = tmp_path / f"out.{suffix}"
    ok(run("export", f"{vms}/web", image, *options))
    assert ok(run("compare", f"{vms}/web", image)).startswith("the same")
    compressed = "-c" in options or "--compress" in options
    assert image.stat().st_size < 1 << 20 if compressed else image.stat().st_size == (8 << 20) + 512


@pytest.mark.parametrize(
    ("goal", "options", "said"),
    [
        ("out.raw", ("-c",), "a raw image is not compressed"),
        ("-", ("-c",), "a raw image is not compressed"),
        ("out.vhdx", ("-c",), "a vhdx image is not compressed"),
        ("out.raw", ("-o", "a=b"), "raw has none"),
        ("out.qcow2", ("-o", "backing_file=/etc/passwd"), "those of qcow2 are"),
        ("out.qcow2", ("-o", "cluster_size=64K,backing_file=/etc/passwd"), "those of qcow2 are"),
        ("out.vmdk", ("-o", "subformat=monolithicFlat"), "makes several files"),
        ("out.vmdk", ("-o", 'toolsversion=1"\nRW 8 FLAT "/etc/passwd" 0\n#"'), "is no option here"),
        ("out.qcow2", ("-o", "compat=1.1\nbacking_file=x"), "is no option here"),
        ("out.qcow2", ("-o", "cluster_size=3"), "Cluster size must be a power of two"),
        ("out.qcow2", ("-c", "-o", "preallocation=full"), "has no preallocation"),
        ("out.vmdk", ("-c", "-o", "subformat=monolithicSparse"), "subformat=streamOptimized"),
    ],
)
def test_an_option_that_an_export_cannot_have_is_refused_before_anything_is_written(
    run: Run, vms: Path, tmp_path: Path, goal: str, options: tuple[str, ...], said: str
) -> None:
    before = sorted(tmp_path.iterdir())
    refused = run("export", f"{vms}/web", goal if goal == "-" else tmp_path / goal, *options)
    assert refused.exit_code == 2 and said in refused.stderr and refused.stdout == ""
    assert sorted(tmp_path.iterdir()) == before


def test_a_disk_grows_by_so_much(run: Run, vms: Path) -> None:
    assert as_json(run("resize", f"{vms}/web", "+1M", "--json"))["size_bytes"] == 2 << 20
    assert as_json(run("resize", f"{vms}/web", "+4096", "--json"))["size_bytes"] == (2 << 20) + 4096
    assert as_json(run("resize", f"{vms}/web", "3M", "--json"))["size_bytes"] == 3 << 20
    assert run("resize", f"{vms}/web", "++1M").exit_code == 2
