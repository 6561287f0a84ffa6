"""The server as a process: where it listens, who may connect, how it begins and how it ends."""

import json
import os
import re
import shlex
import socket
import ssl
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.nbd_client import NbdClient
from support.servers import COMMAND, END_SECONDS, Serve, onionskin, onionskin_json, run_tool, short_socket

from onionskin.nbd import tls

MIB = 1 << 20
Start = Callable[..., Serve]


def port_of(server: Serve) -> int:
    (uri,) = server.ready["uris"]
    return int(uri.rstrip("/").rpartition(":")[2])


@pytest.mark.parametrize("umask", [0, 0o77, 0o777])
def test_a_unix_socket_is_its_owners_whatever_the_umask(vms: Path, serve: Start, umask: int) -> None:
    server = serve(f"{vms}/web", umask=umask)
    assert stat.S_IMODE(server.socket.stat().st_mode) == 0o600


def test_the_mode_of_the_socket_can_be_chosen(vms: Path, serve: Start) -> None:
    assert stat.S_IMODE(serve(f"{vms}/web", "--socket-mode", "0660").socket.stat().st_mode) == 0o660


def test_a_stale_socket_is_replaced_and_a_live_one_or_a_file_is_not(vms: Path, serve: Start, tmp_path: Path) -> None:
    onionskin("create", f"{vms}/db", "--size", "1M")
    first = serve(f"{vms}/web")
    assert "another server listens" in onionskin("serve", f"{vms}/db", "--socket", first.socket, status=5).stderr
    first.kill()
    assert first.socket.exists()
    serve(f"{vms}/web", "--socket", first.socket).client().close()
    (tmp_path / "file").touch()
    assert "not a socket" in onionskin("serve", f"{vms}/db", "--socket", tmp_path / "file", status=4).stderr
    assert (tmp_path / "file").exists()


def test_sigterm_flushes_removes_the_sockets_and_ends_with_zero(vms: Path, serve: Start) -> None:
    server = serve(f"{vms}/web")
    with server.client() as client:
        client.write(0, b"kept" * 1024)
        assert server.terminate() == 0
        with pytest.raises(OSError):
            client.read(0, 4096)
    assert not server.socket.exists()
    assert not list((vms / "volumes").glob("*.control"))
    assert onionskin("read", f"{vms}/web", 0, 4).stdout == "kept"
    log = server.log.read_text()
    assert f"process {os.getpid()} of user {os.getuid()}" in log
    assert "Traceback" not in log


def test_a_volume_that_is_held_cannot_be_served_a_second_time(vms: Path, serve: Start, tmp_path: Path) -> None:
    serve(f"{vms}/web")
    assert "open for writing" in onionskin("serve", f"{vms}/web", "--socket", tmp_path / "2", status=5).stderr
    assert not (tmp_path / "2").exists()


@pytest.mark.parametrize(
    ("arguments", "said", "status"),
    [
        ([], "--socket PATH or --tcp", 2),
        (["--tcp", "0.0.0.0:0"], "--tls-ca", 5),
        (["--tcp", "[::]:0"], "--tls-ca", 5),
        (["--tcp", "127.0.0.1:x"], "HOST:PORT", 2),
        (["--tcp", "127.0.0.1:0", "--tls-key", "k"], "--tls-certificate", 2),
        (["--tcp", "127.0.0.1:0", "--tls-key", "/no/k", "--tls-certificate", "/no/c"], "/no/c", 3),
        (["--socket", "/no/where/at/all"], "/no/where", 3),
        (["--socket", "x", "--socket-mode", "999"], "--socket-mode", 2),
    ],
)
def test_wrong_usage_is_one_line_that_says_what_to_do(vms: Path, arguments: list[str], said: str, status: int) -> None:
    ended = onionskin("serve", f"{vms}/web", *arguments, status=status)
    assert said in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_tcp_listens_on_loopback_unless_told_otherwise(vms: Path, serve: Start) -> None:
    server = serve(f"{vms}/web", "--tcp", ":0")
    assert server.ready["uris"][0].startswith("nbd://127.0.0.1:")
    with NbdClient(socket.create_connection(("127.0.0.1", port_of(server))), "") as client:
        assert client.read(7 * MIB, 1) == b"\x07"


def activated(listener: socket.socket, *arguments: object, **environment: str) -> "subprocess.Popen[str]":
    """Start a server as systemd does: the socket is descriptor 3, and the process id is its own."""
    code = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1');"
        "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(listener.fileno()), *COMMAND[1:], "serve", *map(str, arguments), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        close_fds=False,
        env=os.environ | environment,
    )


def test_sockets_from_systemd_are_served_and_it_is_told(vms: Path, tmp_path: Path) -> None:
    path = short_socket(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        listener.bind(str(path))
        listener.listen()
        os.set_inheritable(listener.fileno(), True)
        manager.bind(f"\0onionskin-test-{os.getpid()}")
        manager.settimeout(END_SECONDS)
        with activated(listener, f"{vms}/web", NOTIFY_SOCKET=f"@onionskin-test-{os.getpid()}") as process:
            assert manager.recv(100) == b"READY=1"
            with NbdClient.unix(path, "web") as client:
                assert client.read(3 * MIB, 1) == b"\x03"
            process.terminate()
            assert manager.recv(100) == b"STOPPING=1"
            assert process.wait(END_SECONDS) == 0, process.stderr.read() if process.stderr else ""
        assert path.exists()  # systemd's, and not ours to remove


@pytest.mark.parametrize("stdout", [">&-", "1</dev/null"])
def test_a_server_that_nobody_listens_to_serves(vms: Path, tmp_path: Path, stdout: str) -> None:
    path = short_socket(tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0onionskin-test-{os.getpid()}")
        manager.settimeout(END_SECONDS)
        line = f"exec {shlex.join(COMMAND)} serve {vms}/web --socket {path} {stdout}"
        with subprocess.Popen(
            ["bash", "-c", line], env=os.environ | {"NOTIFY_SOCKET": f"@onionskin-test-{os.getpid()}"}
        ) as process:
            assert manager.recv(100) == b"READY=1"
            with NbdClient.unix(path, "web") as client:
                assert client.read(3 * MIB, 1) == b"\x03"
            process.terminate()
            assert process.wait(END_SECONDS) == 0


def test_systemd_itself_starts_the_server_when_a_client_comes(vms: Path, tmp_path: Path) -> None:
    path = short_socket(tmp_path)
    activate = ["systemd-socket-activate", f"--listen={path}", f"--setenv=PYTHONPATH={os.pathsep.join(sys.path)}"]
    with subprocess.Popen([*activate, *COMMAND, "serve", f"{vms}/web"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "Listening" in process.stderr.readline()
        with NbdClient.unix(path, "web") as client:
            assert client.read(3 * MIB, 1) == b"\x03"
        process.terminate()
        said = process.stderr.read()
        assert process.wait(END_SECONDS) == 0, said
    assert path.exists()


def test_a_descriptor_that_is_no_listening_socket_is_refused(vms: Path) -> None:
    with socket.socket(socket.AF_UNIX) as fresh:
        os.set_inheritable(fresh.fileno(), True)
        with activated(fresh, f"{vms}/web") as process:
            assert process.wait(END_SECONDS) == 5
            assert "ListenStream=" in (process.stderr.read() if process.stderr else "")


# ---- TLS ----


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """A directory with ca, server and client, each a pair of -cert.pem and -key.pem, as QEMU and libnbd want them."""
    made = tmp_path / "pki"
    made.mkdir()

    def openssl(*arguments: str) -> None:
        run_tool("openssl", *arguments)

    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    authority = ("-subj", "/CN=CA", "-addext", "keyUsage=critical,keyCertSign")
    openssl("req", "-x509", *new_key, "-keyout", f"{made}/ca-key.pem", "-out", f"{made}/ca-cert.pem", *authority)
    for name in ("server", "client"):
        (made / "ext").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        openssl("req", *new_key, "-keyout", f"{made}/{name}-key.pem", "-out", f"{made}/csr", "-subj", f"/CN={name}")
        openssl(
            *("x509", "-req", "-in", f"{made}/csr", "-CA", f"{made}/ca-cert.pem", "-CAkey", f"{made}/ca-key.pem"),
            *("-CAcreateserial", "-out", f"{made}/{name}-cert.pem", "-extfile", f"{made}/ext", "-days", "2"),
        )
    return made


@pytest.fixture
def with_tls(vms: Path, serve: Start, certificates: Path) -> Serve:
    at = certificates
    files = ("--tls-certificate", at / "server-cert.pem", "--tls-key", at / "server-key.pem")
    return serve(f"{vms}/web", "--tcp", "127.0.0.1:0", *files, "--tls-ca", at / "ca-cert.pem")


def exports_in(listed: str) -> dict[str, int]:
    """Name and size of each export in what `qemu-nbd --list` prints."""
    return {name: int(size) for name, size in re.findall(r"^ export: '(.*)'\n(?:  .*\n)*?  size:  (\d+)", listed, re.M)}


def test_qemu_nbd_lists_volumes_and_snapshots(vms: Path, serve: Start) -> None:
    onionskin("snapshot", f"{vms}/web@a")
    listed = run_tool("qemu-nbd", "--list", "--socket", serve(f"{vms}/web").socket)
    assert exports_in(listed) == {"web": 64 * MIB, "web@a": 64 * MIB}


def test_nbdinfo_qemu_nbd_and_qemu_img_come_in_over_tls_with_a_certificate(
    with_tls: Serve, certificates: Path, vms: Path, tmp_path: Path
) -> None:
    port = port_of(with_tls)
    info = json.loads(run_tool("nbdinfo", "--json", f"nbds://localhost:{port}/web?tls-certificates={certificates}"))
    assert info["TLS"] is True
    assert info["exports"][0]["export-size"] == 64 * MIB
    credentials = f"tls-creds-x509,id=tls,dir={certificates},endpoint=client"
    onionskin("snapshot", f"{vms}/web@a")
    tls_client = ("--object", credentials, "--tls-creds", "tls", "--bind", "localhost", "--port", port)
    assert exports_in(run_tool("qemu-nbd", "--list", *tls_client)) == {"web": 64 * MIB, "web@a": 64 * MIB}
    source = f"driver=nbd,host=localhost,port={port},export=web,tls-creds=tls"
    run_tool("qemu-img", "convert", "--object", credentials, "--image-opts", source, "-O", "raw", tmp_path / "out.raw")
    assert (tmp_path / "out.raw").read_bytes() == (tmp_path / "base.raw").read_bytes()


def test_what_is_written_over_tls_is_there(with_tls: Serve, certificates: Path) -> None:
    plain = socket.create_connection(("127.0.0.1", port_of(with_tls)))
    context = ssl.create_default_context(cafile=str(certificates / "ca-cert.pem"))
    context.load_cert_chain(certificates / "client-cert.pem", certificates / "client-key.pem")
    client = NbdClient.__new__(NbdClient)
    client.connection, client._handle = plain, 0
    client.greet()
    assert client.option(7, b"\0\0\0\3web\0\0")[-1][0] == 1 << 31 | 5  # ERR_TLS_REQD
    assert client.option(5) == [(1, b"")]
    client.connection = context.wrap_socket(plain, server_hostname="localhost")
    client.go("web")
    payload = os.urandom(8 * MIB)
    client.write(MIB, payload)
    client.flush()
    assert client.read(MIB, len(payload)) == payload
    client.close()
    with_tls.says("TLSv1.3, 'client'")


def test_a_client_without_a_certificate_or_without_tls_is_refused(with_tls: Serve, certificates: Path) -> None:
    port = port_of(with_tls)
    lonely = certificates.parent / "lonely"
    lonely.mkdir()
    (lonely / "ca-cert.pem").write_bytes((certificates / "ca-cert.pem").read_bytes())
    for uri in (f"nbds://localhost:{port}/web?tls-certificates={lonely}", f"nbd://localhost:{port}/web"):
        assert subprocess.run(["nbdinfo", uri], capture_output=True).returncode != 0
    with socket.create_connection(("127.0.0.1", port)) as rude:
        rude.sendall(b"\0\0\0\3" + b"IHAVEOPT\0\0\0\7\xff\xff\xff\xff")
        while rude.recv(4096):  # the server hangs up, and takes nothing of the 4 GiB
            pass
    with_tls.says("refused")
    assert json.loads(run_tool("nbdinfo", "--json", f"nbds://localhost:{port}/web?tls-certificates={certificates}"))


def test_handshakes_that_do_not_go_on_give_way(vms: Path, serve: Start, certificates: Path) -> None:
    at = certificates
    files = (
        "--tls-certificate",
        at / "server-cert.pem",
        "--tls-key",
        at / "server-key.pem",
        "--tls-ca",
        at / "ca-cert.pem",
    )
    server = serve(f"{vms}/web", "--tcp", "127.0.0.1:0", *files, "--connections", 4)
    port = port_of(server)
    with ExitStack() as stack:
        for number in range(20):
            silent = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            if number % 2:
                silent.sendall(b"\0\0\0\3" + b"IHAVEOPT" + struct.pack(">II", 5, 0))  # and no word of TLS behind it
        run_tool("nbdinfo", f"nbds://localhost:{port}/web?tls-certificates={certificates}")


@pytest.mark.parametrize(
    ("options", "said", "status"),
    [
        ("--tls-certificate server-cert.pem --tls-key server-key.pem", "can be reached from other machines", 5),
        ("--tls-clients any", "goes with --tls-certificate", 2),
        ("--tls-certificate server-cert.pem --tls-key server-key.pem --tls-psk keys", "or with a key", 2),
    ],
)
def test_other_machines_come_in_on_terms_that_are_said(
    vms: Path, certificates: Path, monkeypatch: pytest.MonkeyPatch, options: str, said: str, status: int
) -> None:
    monkeypatch.chdir(certificates)
    serve = ("serve", f"{vms}/web", "--tcp", "0.0.0.0:0", *options.split())
    assert said in onionskin(*serve, status=status).stderr


def test_any_client_with_tls_comes_in_where_that_is_asked_for(vms: Path, serve: Start, certificates: Path) -> None:
    files = ("--tls-certificate", certificates / "server-cert.pem", "--tls-key", certificates / "server-key.pem")
    server = serve(f"{vms}/web", "--tcp", "0.0.0.0:0", *files, "--tls-clients", "any")
    lonely = certificates.parent / "lonely"
    lonely.mkdir()
    (lonely / "ca-cert.pem").write_bytes((certificates / "ca-cert.pem").read_bytes())
    uri = f"nbds://localhost:{port_of(server)}/web?tls-certificates={lonely}"
    assert json.loads(run_tool("nbdinfo", "--json", uri))["TLS"] is True


# ---- pre-shared keys ----


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A directory with keys.psk, as QEMU wants it: of web-client, and of another."""
    directory = tmp_path / "keys"
    directory.mkdir()
    for name in ("other", "web-client"):
        run_tool("psktool", "--username", name, "--pskfile", directory / "keys.psk")
    return directory


if getattr(ssl, "HAS_PSK", False):

    def test_nbdinfo_nbdcopy_and_qemu_img_come_in_with_a_pre_shared_key(
        vms: Path, serve: Start, keys: Path, tmp_path: Path
    ) -> None:
        server = serve(f"{vms}/web", "--tcp", "0.0.0.0:0", "--tls-psk", keys / "keys.psk")
        port, base = port_of(server), (tmp_path / "base.raw").read_bytes()
        uri = f"nbds://web-client@localhost:{port}/web?tls-psk-file={keys}/keys.psk"
        assert json.loads(run_tool("nbdinfo", "--json", uri))["TLS"] is True
        run_tool("nbdcopy", uri, tmp_path / "copied.raw")
        assert (tmp_path / "copied.raw").read_bytes() == base
        credentials = f"tls-creds-psk,id=tls,dir={keys},username=web-client,endpoint=client"
        source = f"driver=nbd,host=localhost,port={port},export=web,tls-creds=tls"
        run_tool(
            "qemu-img", "convert", "--object", credentials, "--image-opts", source, "-O", "raw", tmp_path / "out.raw"
        )
        assert (tmp_path / "out.raw").read_bytes() == base
        server.says("'web-client'")

    def test_a_client_with_a_wrong_key_or_an_unknown_name_is_refused(
        vms: Path, serve: Start, keys: Path, tmp_path: Path
    ) -> None:
        server = serve(f"{vms}/web", "--tcp", "127.0.0.1:0", "--tls-psk", keys / "keys.psk")
        wrong = tmp_path / "wrong.psk"
        run_tool("psktool", "--username", "web-client", "--pskfile", wrong)
        run_tool("psktool", "--username", "nobody", "--pskfile", wrong)
        at = f"localhost:{port_of(server)}/web"
        for uri in (f"nbds://{who}@{at}?tls-psk-file={wrong}" for who in ("web-client", "nobody")):
            assert subprocess.run(["nbdinfo", uri], capture_output=True).returncode != 0
        assert subprocess.run(["nbdinfo", f"nbd://{at}"], capture_output=True).returncode != 0
        run_tool("nbdinfo", f"nbds://web-client@{at}?tls-psk-file={keys}/keys.psk")

else:

    def test_a_python_without_pre_shared_keys_says_what_to_use_instead(vms: Path, keys: Path) -> None:
        said = onionskin("serve", f"{vms}/web", "--tcp", ":0", "--tls-psk", keys / "keys.psk", status=5).stderr
        assert "Python 3.13" in said and "--tls-certificate" in said


def test_keys_are_read_as_psktool_writes_them(keys: Path) -> None:
    found = tls.read_keys(keys / "keys.psk")
    assert set(found) == {"web-client", "other"} and {len(key) for key in found.values()} == {32}


# ---- looking ----


def test_stats_are_counted_for_programs_people_and_prometheus(vms: Path, serve: Start) -> None:
    server = serve(f"{vms}/web")
    with server.client() as client:
        client.write(0, bytes(4096))
        client.read(0, 8192)
        client.flush()
        found = onionskin_json("stats", f"{vms}/web")
        assert found["volume"] == "web"
        assert found["counters"]["bytes"]["write"] == 4096
        assert found["counters"]["requests"]["flush"] == 1
        assert [one["export"] for one in found["connections"]] == ["web"]
        text = onionskin("stats", f"{vms}/web", "--prometheus").stdout
        assert 'onionskin_nbd_bytes_total{volume="web",command="read"} 8192\n' in text
        assert 'onionskin_connections{volume="web"} 1\n' in text
        for line in text.splitlines():
            assert line.startswith("# ") or len(line.rsplit(" ", 1)) == 2
        assert "CLIENT" in onionskin("stats", f"{vms}/web").stdout
    server.terminate()
    assert "nobody serves" in onionskin("stats", f"{vms}/web", status=5).stderr


def exports_without_clients(path: str) -> list[dict[str, Any]]:
    """Return the exports when the server has seen that its clients left. Each latency is counted behind its reply."""
    while (found := onionskin_json("stats", path))["connections"]:
        pass
    return found["exports"]


def test_each_export_has_counters_of_its_own(vms: Path, serve: Start) -> None:
    onionskin("snapshot", f"{vms}/web@a")
    onionskin("clone", f"{vms}/web@a", f"{vms}/db")
    server = serve(vms)
    with server.client() as client, server.client("db") as other, server.client("web@a") as view:
        client.write(0, bytes(8192))
        client.flush()
        other.write(0, bytes(4096))
        view.read(0, 512)
        with pytest.raises(OSError):
            view.write(0, bytes(512))
    web, db = (exports_without_clients(f"{vms}/{name}") for name in ("web", "db"))
    assert [one["export"] for one in (*web, *db)] == ["web", "web@a", "db"]
    assert [one["bytes"]["write"] for one in (*web, *db)] == [8192, 512, 4096]
    assert [one["errors"] for one in (*web, *db)] == [0, 1, 0]
    assert web[0]["requests"]["flush"] == 1 and 0 < web[0]["latency_seconds"]["flush"] < 60
    assert web[1]["bytes"]["read"] == 512 and 0 < web[1]["latency_seconds"]["read"] < 60
    assert web[0]["latency_seconds"]["write"] > 0 == web[0]["latency_seconds"]["read"]
    text = onionskin("stats", f"{vms}/web", "--prometheus").stdout
    assert 'onionskin_export_bytes_total{volume="web",export="web@a",command="read"} 512\n' in text
    assert 'onionskin_export_errors_total{volume="web",export="web"} 0\n' in text
    assert text.count("# TYPE onionskin_export_requests_total counter\n") == 1


def test_more_clients_than_allowed_are_turned_away(vms: Path, serve: Start) -> None:
    server = serve(f"{vms}/web", "--connections", "1")
    with server.client() as client:
        with pytest.raises(OSError):
            server.client()
        assert client.read(2 * MIB, 1) == b"\x02"


def test_one_snapshot_is_served_alone_and_the_volume_stays_free(vms: Path, serve: Start) -> None:
    onionskin("snapshot", f"{vms}/web@a")
    server = serve(f"{vms}/web@a")
    with server.client("") as client:
        onionskin("write", f"{vms}/web", 0, input="changed")
        assert client.read(0, 7) == bytes(7)


def test_mount_shows_a_snapshot_as_a_file_and_umount_ends_it(vms: Path, serve: Start, tmp_path: Path) -> None:
    serve(f"{vms}/web")
    onionskin("snapshot", f"{vms}/web@a")
    directory = tmp_path / "mnt"
    directory.mkdir()
    path = Path(onionskin_json("mount", f"{vms}/web@a", directory)["path"])
    try:
        assert path.name == "web@a.raw"
        assert path.read_bytes() == (tmp_path / "base.raw").read_bytes()
        with pytest.raises(OSError):
            path.open("r+b").close()
        assert "mounted" in onionskin("mount", f"{vms}/web@a", directory, status=5).stderr
    finally:
        onionskin("umount", directory)
    assert not path.exists()
    assert "nothing is mounted" in onionskin("umount", directory, status=5).stderr


def test_mount_names_the_package_where_nbdfuse_is_missing(
    vms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onionskin("snapshot", f"{vms}/web@a")
    monkeypatch.setenv("PATH", "/nowhere")
    ended = onionskin("mount", f"{vms}/web@a", tmp_path, status=1)
    assert "install the package nbdfuse" in ended.stderr
