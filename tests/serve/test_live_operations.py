"""The verbs of the command line on a volume that is being served, one by one; each does what it does at rest."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.nbd_client import NbdClient
from support.servers import Serve, onionskin, onionskin_json, run_tool

import onionskin as library

MIB = 1 << 20
Start = Callable[..., Serve]


def test_a_snapshot_holds_what_was_acknowledged_though_never_flushed(vms: Path, serve: Start) -> None:
    with serve(f"{vms}/web").client() as client:
        client.write(MIB, b"x" * 4096)
        assert onionskin_json("snapshot", f"{vms}/web@a", "--note", "n")["note"] == "n"
        client.write(MIB, b"y" * 4096)
        assert onionskin("read", f"{vms}/web@a", MIB, 4).stdout == "xxxx"
        assert onionskin("read", f"{vms}/web", MIB, 4).stdout == "yyyy"


def test_snapshots_taken_later_are_exports_too_and_read_only(vms: Path, serve: Start) -> None:
    server = serve(f"{vms}/web")
    with server.client() as client:
        client.write(0, b"a" * 4096)
        onionskin("snapshot", f"{vms}/web@a")
        client.write(0, b"b" * 4096)
        with server.client("web@a") as view:
            assert view.read(0, 4096) == b"a" * 4096
            with pytest.raises(OSError, match="error 1"):
                view.write(0, b"c" * 4096)
        with pytest.raises(ConnectionRefusedError):
            server.client("web@b")
        with pytest.raises(ConnectionRefusedError):
            server.client("db")


def exports_of(server: Serve) -> list[str]:
    exports = json.loads(run_tool("nbdinfo", "--list", "--json", f"nbd+unix://?socket={server.socket}"))["exports"]
    assert all(export["export-size"] and export["is_read_only"] == ("@" in export["export-name"]) for export in exports)
    return [export["export-name"] for export in exports]


def test_the_list_of_exports_has_every_snapshot_and_is_always_current(vms: Path, serve: Start) -> None:
    names = [f"s{number:02}" for number in range(20)]
    with library.Store(vms) as store, store.open("web") as volume:
        for name in names:
            volume.snapshot(name)
        store.clone("web", "s00", "db")
    server = serve(vms, "--allow-revert")
    assert exports_of(server) == ["db", "web", *(f"web@{name}" for name in names)]
    onionskin("snapshot", f"{vms}/web@new")
    onionskin("merge", f"{vms}/web@s03")
    onionskin("clone", f"{vms}/web@s05", f"{vms}/db-2")
    onionskin("snapshot", f"{vms}/db@first")
    names.remove("s03")
    assert exports_of(server) == ["db", "db@first", "db-2", "web", "web@new", *(f"web@{name}" for name in names)]
    onionskin("discard", f"{vms}/web@new", "--yes")
    assert "web@new" not in exports_of(server)


def test_one_snapshot_of_a_free_volume_is_listed_alone(vms: Path, serve: Start) -> None:
    with library.Store(vms) as store, store.open("web") as volume:
        volume.snapshot("a")
        volume.snapshot("b")
    assert exports_of(serve(f"{vms}/web@b")) == ["web@b"]


def test_a_snapshot_is_named_by_the_time_where_it_is_given_no_name(vms: Path, serve: Start) -> None:
    serve(f"{vms}/web")
    name = onionskin_json("snapshot", f"{vms}/web")["name"]
    assert name.endswith("Z")
    assert f"took {vms}/web@{name[:8]}" in onionskin("snapshot", f"{vms}/web").stdout
    assert onionskin_json("snapshots", f"{vms}/web")[0]["name"] == name


def test_a_renamed_snapshot_is_found_by_its_new_name_and_its_clients_go_on(vms: Path, serve: Start) -> None:
    server = serve(f"{vms}/web")
    with server.client() as client:
        client.write(0, b"a" * 4096)
        onionskin("snapshot", f"{vms}/web@a")
        client.write(0, b"b" * 4096)
        with server.client("web@a") as view:
            assert onionskin_json("rename", f"{vms}/web@a", "first")["name"] == "first"
            onionskin("snapshot", f"{vms}/web@a")
            assert view.read(0, 1) == b"a"
            with server.client("web@first") as renamed, server.client("web@a") as later:
                assert (renamed.read(0, 1), later.read(0, 1)) == (b"a", b"b")


def test_a_snapshot_is_compared_with_the_served_head_of_a_clone(vms: Path, serve: Start) -> None:
    onionskin("snapshot", f"{vms}/web@a")
    onionskin("clone", f"{vms}/web@a", f"{vms}/other")
    with serve(f"{vms}/other").client("other") as client:
        client.write(MIB, b"x" * 4096)
        found = onionskin_json("diff", f"{vms}/web@a", f"{vms}/other")
        assert found["extents"] == [{"offset": MIB, "length": 4096, "state": "data"}]


def test_a_taken_name_has_the_same_exit_status_as_at_rest(vms: Path, serve: Start) -> None:
    serve(f"{vms}/web")
    onionskin("snapshot", f"{vms}/web@a")
    assert "already has a snapshot" in onionskin("snapshot", f"{vms}/web@a", status=4).stderr
    assert "has no snapshot" in onionskin("merge", f"{vms}/web@b", status=3).stderr
    assert "do not lie in" in onionskin("trim", f"{vms}/web", "60M", "10M", status=2).stderr


def test_merge_discard_and_usage_work_and_no_byte_changes_for_the_client(vms: Path, serve: Start) -> None:
    with serve(f"{vms}/web").client() as client:
        for name in ("a", "b", "c"):
            client.write(0, name.encode() * 8192)
            onionskin("snapshot", f"{vms}/web@{name}")
        assert [row["snapshot"] for row in onionskin_json("usage", f"{vms}/web")] == ["a", "b", "c", None]
        assert onionskin_json("merge", f"{vms}/web@b")["merged"] == ["b"]
        assert client.read(0, 8192) == b"c" * 8192
        assert "--allow-revert" in onionskin("discard", f"{vms}/web@a", "--recursive", "--yes", status=5).stderr
        assert client.read(0, 8192) == b"c" * 8192
        assert onionskin("snapshots", f"{vms}/web").stdout.count("\n") == 3


def test_a_branch_that_the_disk_does_not_stand_on_can_be_discarded(vms: Path, serve: Start) -> None:
    onionskin("snapshot", f"{vms}/web@root")
    onionskin("snapshot", f"{vms}/web@side")
    onionskin("revert", f"{vms}/web@root")
    serve(f"{vms}/web")
    assert onionskin_json("discard", f"{vms}/web@side")["discarded"] == ["side"]


def test_several_snapshots_are_merged_and_discarded_together(vms: Path, serve: Start) -> None:
    onionskin("snapshot", f"{vms}/web@root")
    for name in "abcd":
        onionskin("snapshot", f"{vms}/web@{name}")
    onionskin("revert", f"{vms}/web@root")
    server = serve(f"{vms}/web")
    with server.client("web@b"):
        assert "clients are reading web@b" in onionskin("merge", f"{vms}/web@a..@c", status=5).stderr
        assert "clients are reading web@b" in onionskin("merge", f"{vms}/web@a..@c", "--dry-run", status=5).stderr
    assert "--allow-revert" in onionskin("discard", f"{vms}/web@root..", "--yes", status=5).stderr
    assert len(onionskin_json("snapshots", f"{vms}/web")) == 5
    assert onionskin_json("merge", f"{vms}/web@a..@b")["merged"] == ["a", "b"]
    assert onionskin_json("discard", f"{vms}/web@c..")["discarded"] == ["c", "d"]
    assert onionskin_json("merge", f"{vms}/web@root")["merged"] == ["root"]


def test_a_snapshot_that_a_client_reads_is_neither_merged_nor_discarded(vms: Path, serve: Start) -> None:
    server = serve(f"{vms}/web")
    onionskin("snapshot", f"{vms}/web@a")
    with server.client("web@a") as view:
        assert "clients are reading web@a" in onionskin("merge", f"{vms}/web@a", status=5).stderr
        assert view.read(5 * MIB, 1) == b"\x05"


def test_clone_diff_trim_zero_resize_info_and_list_work(vms: Path, serve: Start) -> None:
    server = serve(f"{vms}/web")
    with server.client() as client:
        onionskin("snapshot", f"{vms}/web@a")
        onionskin("clone", f"{vms}/web@a", f"{vms}/web-2")
        onionskin("trim", f"{vms}/web", "1M", "1M")
        onionskin("zero", f"{vms}/web", "2M", "64K")
        assert client.read(MIB, MIB + 65536) == bytes(MIB + 65536)
        extents = onionskin_json("diff", f"{vms}/web@a", f"{vms}/web")["extents"]
        assert extents == [{"offset": MIB, "length": MIB + 65536, "state": "zero"}]
        assert "stop the server" in onionskin("resize", f"{vms}/web", "1M", "--force", status=5).stderr
        onionskin("resize", f"{vms}/web", "80M")
    with server.client() as client:
        assert client.size_bytes == 80 * MIB
        assert client.read(79 * MIB, 4096) == bytes(4096)
    assert onionskin_json("info", f"{vms}/web")["holder"] == server.process.pid
    assert [about["name"] for about in onionskin_json("list", vms)] == ["web", "web-2"]
    assert onionskin("read", f"{vms}/web-2", "1M", 1).stdout == "\x01"


def test_a_volume_that_is_renamed_while_it_is_served_is_reached_by_its_new_name(vms: Path, serve: Start) -> None:
    with serve(f"{vms}/web").client() as client:
        onionskin("snapshot", f"{vms}/web@a")
        onionskin("rename", f"{vms}/web", "www")
        client.write(0, b"x" * 4096)
        onionskin("snapshot", f"{vms}/www@b")
        assert [row["snapshot"] for row in onionskin_json("usage", f"{vms}/www")] == ["a", "b", None]
        assert onionskin_json("diff", f"{vms}/www@a", f"{vms}/www")["bytes"] == 4096


def test_what_would_pull_the_disk_away_is_refused_in_words(vms: Path, serve: Start) -> None:
    serve(f"{vms}/web")
    for command in (["flatten", f"{vms}/web"], ["delete", f"{vms}/web"], ["export", f"{vms}/web", vms / "out.raw"]):
        assert "open for writing in process" in onionskin(*command, status=5).stderr


def test_export_and_delta_of_snapshots_work_beside_the_server(vms: Path, serve: Start, tmp_path: Path) -> None:
    with serve(f"{vms}/web").client() as client:
        onionskin("snapshot", f"{vms}/web@a")
        client.write(3 * MIB, b"n" * 65536)
        onionskin("snapshot", f"{vms}/web@b")
        client.write(3 * MIB, b"later" * 4096)
        onionskin("export", f"{vms}/web@b", tmp_path / "b.raw")
        onionskin("delta", f"{vms}/web@a", f"{vms}/web@b", "-o", tmp_path / "ab")
    onionskin("create", f"{tmp_path}/other/web", "--base", tmp_path / "base.raw")
    onionskin("delta", f"{vms}/web@a", "-o", tmp_path / "full")
    onionskin("create", f"{tmp_path}/other/copy", "--size", "64M")
    for stream in ("full", "ab"):
        onionskin("apply", f"{tmp_path}/other/copy", tmp_path / stream)
    onionskin("export", f"{tmp_path}/other/copy", tmp_path / "copy.raw")
    assert (tmp_path / "copy.raw").read_bytes() == (tmp_path / "b.raw").read_bytes()
    assert (tmp_path / "b.raw").read_bytes()[3 * MIB : 3 * MIB + 65536] == b"n" * 65536


def test_revert_works_under_connected_clients_where_they_agreed(vms: Path, serve: Start) -> None:
    with serve(f"{vms}/web", "--allow-revert").client() as client:
        client.write(0, b"a" * 4096)
        onionskin("snapshot", f"{vms}/web@a")
        client.write(0, b"b" * 4096)
        client.flush()
        assert "give --yes" in onionskin("revert", f"{vms}/web@a", status=5).stderr
        assert client.read(0, 4096) == b"b" * 4096
        onionskin("revert", f"{vms}/web@a", "--yes")
        assert client.read(0, 4096) == b"a" * 4096
        client.write(4096, b"c" * 4096)  # the same connection goes on, on the new disk
        client.flush()
        onionskin("snapshot", f"{vms}/web@c")
        onionskin("discard", f"{vms}/web@a", "--recursive", "--yes")
        assert client.read(4096, 4096) == b"\0" * 4096
    with library.Store(vms) as store, pytest.raises(library.StateError):
        store.open("web")


def test_changed_since_follows_the_head_and_is_exact_for_snapshots(vms: Path, serve: Start) -> None:
    server = serve(f"{vms}/web")

    def changed(export: str, since: str) -> list[tuple[int, int]]:
        found = json.loads(run_tool("nbdinfo", "--json", f"--map=onionskin:changed-since:{since}", server.uri(export)))
        runs: list[tuple[int, int]] = []
        for extent in found:
            if extent["type"] & 1:
                start, length = extent["offset"], extent["length"]
                runs = (
                    [*runs[:-1], (runs[-1][0], length + runs[-1][1])]
                    if runs and sum(runs[-1]) == start
                    else [
                        *runs,
                        (start, length),
                    ]
                )
        return runs

    with server.client() as client:
        onionskin("snapshot", f"{vms}/web@a")
        client.write(MIB, b"1" * 65536)
        onionskin("snapshot", f"{vms}/web@b")
        client.write(3 * MIB, b"2" * 65536)
        assert changed("web@b", "a") == [(MIB, 65536)]
        assert changed("web", "b") == [(3 * MIB, 65536)]
        client.write(5 * MIB, b"3" * 65536)
        assert changed("web", "b") == [(3 * MIB, 65536), (5 * MIB, 65536)]
        assert changed("web", "a") == [(MIB, 65536), (3 * MIB, 65536), (5 * MIB, 65536)]


def test_what_changed_is_a_dirty_bitmap_for_clients_that_know_qemu(vms: Path, serve: Start) -> None:
    server = serve(f"{vms}/web")
    name = "a, b: 100 % ä"
    with server.client() as client:
        onionskin("snapshot", f"{vms}/web@{name}")
        client.write(MIB, b"1" * 65536)
        onionskin("snapshot", f"{vms}/web@b")
        listed = json.loads(run_tool("nbdinfo", "--json", server.uri("web@b")))["exports"][0]["contexts"]
        assert listed[2:] == [f"onionskin:changed-since:{name}", f"qemu:dirty-bitmap:{name}"]
        found = json.loads(run_tool("nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{name}", server.uri("web@b")))
        assert [(one["offset"], one["length"]) for one in found if one["type"] & 1] == [(MIB, 65536)]
        quoted = f"qemu:dirty-bitmap:{name}".replace(",", ",,")
        options = f"driver=nbd,server.type=unix,server.path={server.socket},export=web@b,x-dirty-bitmap={quoted}"
        mapped = json.loads(run_tool("qemu-img", "map", "--output=json", "--image-opts", options))
        assert [(one["start"], one["length"]) for one in mapped if not one["data"]] == [(MIB, 65536)]
        with server.client("web@b"):  # keeps the export, and what it knows, from being closed
            run_tool("nbdinfo", f"--map=qemu:dirty-bitmap:{name}", server.uri("web@b"))
            onionskin("merge", f"{vms}/web@{name}")
            text = run_tool("nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{name}", server.uri("web@b"))
            assert all(extent["type"] & 1 for extent in json.loads(text))


def test_a_snapshots_name_that_comes_back_is_not_taken_for_the_old_one(vms: Path, serve: Start) -> None:
    server = serve(f"{vms}/web")
    with server.client() as client:
        onionskin("snapshot", f"{vms}/web@a")
        client.write(MIB, b"1" * 65536)
        onionskin("snapshot", f"{vms}/web@b")
        with server.client("web@b"):  # keeps the export, and what it knows, from being closed
            run_tool("nbdinfo", "--map=onionskin:changed-since:a", server.uri("web@b"))
            onionskin("merge", f"{vms}/web@a")
            text = run_tool("nbdinfo", "--json", "--map=onionskin:changed-since:a", server.uri("web@b"))
            assert all(extent["type"] & 1 for extent in json.loads(text))


def test_a_whole_store_is_served_and_volumes_made_later_too(vms: Path, serve: Start) -> None:
    onionskin("create", f"{vms}/db", "--size", "1M")
    server = serve(vms)
    assert server.ready["exports"] == ["db", "web"]
    with server.client("db") as client:
        client.write(0, b"d" * 4096)
    onionskin("snapshot", f"{vms}/web@a")
    onionskin("clone", f"{vms}/web@a", f"{vms}/web-2")
    with NbdClient.unix(server.socket, "web-2") as client:
        client.write(0, b"e" * 4096)
    onionskin("snapshot", f"{vms}/web-2@first")
    assert server.terminate() == 0
    assert onionskin("read", f"{vms}/web-2", 0, 4).stdout == "eeee"
    assert onionskin("read", f"{vms}/db", 0, 4).stdout == "dddd"


def test_the_map_shows_what_was_acknowledged_though_never_flushed(vms: Path, serve: Start) -> None:
    with serve(f"{vms}/web").client() as client:
        client.write(MIB, b"x" * MIB)
        client.write(5 * MIB, b"x" * MIB)
        shown = onionskin_json("map", f"{vms}/web", "--columns", 64, "--rows", 1)
        assert [cell["depth"] for cell in shown["cells"][:7]] == [1, 0, 1, 1, 1, 0, 1]
        onionskin("snapshot", f"{vms}/web@a")
        client.write(MIB, b"y" * MIB)
        shown = onionskin_json("map", f"{vms}/web@a", "--columns", 64, "--rows", 1)
        assert [cell["depth"] for cell in shown["cells"][:3]] == [1, 0, 1]
        assert client.read(MIB, 4) == b"yyyy"


def test_a_renamed_volume_is_exported_under_its_new_name_and_clients_go_on(vms: Path, serve: Start) -> None:
    server = serve(f"{vms}/web", "--allow-revert")
    with server.client() as client:
        client.write(0, b"a" * 4096)
        onionskin("snapshot", f"{vms}/web@a")
        with server.client("web@a") as view:
            onionskin("rename", f"{vms}/web", "www")
            assert view.read(0, 4096) == b"a" * 4096
            client.write(0, b"b" * 4096)
            assert exports_of(server) == ["www", "www@a"]
            assert "reading www@a" in onionskin("discard", f"{vms}/www@a", "--yes", status=5).stderr
        with pytest.raises(ConnectionRefusedError):
            server.client("web")
        with server.client("www") as other, server.client("") as default:
            assert other.read(0, 4096) == default.read(0, 4096) == b"b" * 4096
        onionskin("revert", f"{vms}/www@a", "--yes")
        assert client.read(0, 4096) == b"a" * 4096
        assert onionskin_json("stats", f"{vms}/www")["volume"] == "www"
        onionskin("clone", f"{vms}/www@a", f"{vms}/web")
        assert [one["name"] for one in onionskin_json("list", vms)] == ["web", "www"]
        assert "is open for writing in" in onionskin("delete", f"{vms}/www", status=5).stderr
        onionskin("delete", f"{vms}/web", "--yes")


def test_a_name_that_was_changed_by_another_process_is_followed(vms: Path, serve: Start) -> None:
    server = serve(vms)
    with library.Store(vms) as store, server.client() as client:
        client.write(0, b"a" * 4096)
        client.flush()
        store.rename("web", "www")
        store.create("web", size="1M").close()
        assert exports_of(server) == ["web", "www"]
        with server.client("www") as renamed, server.client("web") as new:
            assert (renamed.read(0, 1), new.read(0, 1)) == (b"a", b"\0")


@pytest.mark.slow
def test_a_volume_is_not_renamed_while_it_is_merged_into_its_base(vms: Path, serve: Start) -> None:
    with serve(f"{vms}/web").client() as client:
        for number in range(16):
            client.write(number * MIB, b"n" * MIB)
        refused = []

        def rename(done: int, total: int) -> None:
            refused.append(onionskin("rename", f"{vms}/web", "www", status=5).stderr)

        with library.connect(vms, "web") as web:
            web.merge_into_base(progress=rename, bytes_per_second=8 * MIB)
        assert "is under way" in refused[0]
        onionskin("rename", f"{vms}/web", "www")
