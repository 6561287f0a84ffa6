"""The verbs for volumes in use: serve, stats, mount, umount."""

import os
import signal
import sys
import threading
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import click

from onionskin.base.paths import FilePath
from onionskin.cli import output
from onionskin.cli.arguments import (
    FILE,
    SIZE,
    SNAPSHOT,
    VOLUME,
    VOLUME_OR_SNAPSHOT,
    Name,
    is_store,
    is_trusted,
    parse_name,
    trust_option,
)
from onionskin.cli.output import json_option
from onionskin.errors import StateError

if TYPE_CHECKING:
    from pathlib import Path

    from click.shell_completion import CompletionItem

    from onionskin.nbd.listener import Listener
    from onionskin.nbd.server import Server
    from onionskin.nbd.tls import Terms


def complete_served(ctx: click.Context, param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """Offer what can be served: stores and, in one, volumes and snapshots."""
    return VOLUME_OR_SNAPSHOT.shell_complete(ctx, param, incomplete)


def complete_mounted(ctx: click.Context, param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """Offer the directories on which `mount` shows a snapshot; where none fits, directories."""
    from click.shell_completion import CompletionItem

    from onionskin.nbd.fuse_mount import mounted

    found = [path for path in map(str, mounted()) if path.startswith(os.path.abspath(incomplete or "/"))]  # noqa: PTH100
    return [CompletionItem(path) for path in found] or [CompletionItem(incomplete, type="dir")]


class Log:
    """Lines on stderr, each whole, from any thread."""

    def __init__(self) -> None:
        self._guard = threading.Lock()

    def __call__(self, line: str) -> None:
        """Write a line; a stderr that is gone does not stop the server."""
        text = f"onionskin serve: {output.cell(line)}\n"
        with self._guard:
            try:
                sys.stderr.write(text)
                sys.stderr.flush()
            except (OSError, ValueError):
                pass


@click.command()
@click.argument(
    "names", nargs=-1, required=True, metavar="STORE | STORE/VOLUME[@SNAPSHOT]...", shell_complete=complete_served
)
@click.option("--socket", "socket_path", type=FILE, metavar="PATH", help="Listen on a Unix socket of mode 0600.")
@click.option(
    "--socket-mode",
    metavar="MODE",
    default="0600",
    show_default=True,
    help="Mode of that socket: who may connect to it.",
)
@click.option("--tcp", multiple=True, metavar="HOST:PORT", help="Listen on TCP; other machines need TLS.")
@click.option("--tls-certificate", type=FILE, metavar="PEM", help="The server's certificate: TCP then wants TLS.")
@click.option("--tls-key", type=FILE, metavar="PEM", help="The key of that certificate.")
@click.option("--tls-ca", type=FILE, metavar="PEM", help="Who signs the certificates that clients must show.")
@click.option("--tls-psk", type=FILE, metavar="KEYS", help="Pre-shared keys instead of certificates (Python 3.13).")
@click.option(
    "--tls-clients",
    type=click.Choice(["known", "any"]),
    default="known",
    show_default=True,
    help="'any' lets other machines in without --tls-ca.",
)
@click.option("--allow-revert", is_flag=True, help="Let revert and discard change the disk under connected clients.")
@click.option(
    "--dirty-bitmap",
    metavar="SNAPSHOT",
    help="List the qemu:dirty-bitmap context of that snapshot alone, for backup clients that want one.",
)
@click.option("--no-expire", is_flag=True, help="Keep volumes of a whole store whose lifetime is over.")
@click.option(
    "--connections",
    type=click.IntRange(1, 4096),
    default=64,
    show_default=True,
    help="At most so many clients at a time.",
)
@click.option(
    "--in-flight", type=SIZE, default="64M", show_default=True, help="At most so many bytes under way for one client."
)
@click.option(
    "--idle",
    type=click.IntRange(0, (1 << 32) - 1),
    default=0,
    metavar="SECONDS",
    help="Drop clients that ask for nothing for so long.",
)
@click.option("--stdio", is_flag=True, hidden=True, help="Serve one client, whose socket is stdin.")
@click.option(
    "--as", "labels", multiple=True, hidden=True, help="What each volume is called, whatever its name becomes."
)
@click.option("--tell-listening", is_flag=True, hidden=True, help="With --json, a line before that: clients can wait.")
@trust_option
@json_option
def serve(
    names: tuple[str, ...],
    labels: tuple[str, ...],
    socket_path: "Path | None",
    socket_mode: str,
    tcp: tuple[str, ...],
    tls_certificate: "Path | None",
    tls_key: "Path | None",
    tls_ca: "Path | None",
    tls_psk: "Path | None",
    tls_clients: str,
    allow_revert: bool,
    dirty_bitmap: str | None,
    no_expire: bool,
    connections: int,
    in_flight: int,
    idle: int,
    stdio: bool,
    tell_listening: bool,
    as_json: bool,
) -> None:
    """Serve volumes to machines over NBD, until SIGTERM or Ctrl-C.

    A volume is served under its name, and each of its snapshots, read-only, as VOLUME@SNAPSHOT. While it is served,
    the other commands work on it through the server.

    Volumes of a whole store whose lifetime is over are dropped, as 'onionskin expire' does, once no client has them.

    Once clients can connect, a line on stdout gives the addresses. Sockets can come from systemd, too (ListenStream=).
    """
    from onionskin.nbd import own_process
    from onionskin.nbd.server import Limits, Server
    from onionskin.nbd.systemd import notify
    from onionskin.operations import load_all

    mode = _mode(socket_mode)
    _refuse_contradictions(tls_certificate, tls_key, tls_ca, tls_psk, any_client=tls_clients == "any")
    if in_flight < Limits().request_bytes_max:
        raise click.UsageError(f"--in-flight is at least {Limits().request_bytes_max >> 20}M, the largest request")
    limits = Limits(connections_max=connections, bytes_in_flight_max=in_flight, idle_seconds=idle)
    own_process.allow_all_descriptors()
    own_process.make_room_for_descriptors()  # before the server has threads
    server = Server(
        limits=limits,
        allow_revert=allow_revert,
        log=Log(),
        trust=is_trusted(),
        listed_bitmap=dirty_bitmap,
        expire=not no_expire,
    )
    try:
        # Sockets first: their errors show before a volume is opened, which may have work left to do.
        terms = _tls_terms(tls_certificate, tls_key, tls_ca, tls_psk)
        found = [] if stdio else _listeners(socket_path, mode, tcp, terms)
        server.listen(found, anybody=tls_clients == "any")
        if tell_listening and output.is_heard():
            output.echo(output.as_json_line({"listening": True}))
        for name, label in zip_longest(names, labels[: len(names)]):
            _add(server, name, label)
        server.exports.set_default()
        _stop_at_signals(server)
        load_all()
        own_process.keep_collections_short()
        if stdio:
            _serve_stdio(server)
            return

        def ready() -> None:
            value = {"ready": True, "exports": server.exports.names(), "uris": server.uris}
            if output.is_heard():
                output.echo(output.as_json_line(value) if as_json else f"ready: {' '.join(server.uris)}")
            notify("READY=1")

        server.run(ready)
    finally:
        notify("STOPPING=1")
        server.close()


def _mode(text: str) -> int:
    """Read the mode of a socket."""
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise click.UsageError(f"--socket-mode {text} is no mode: write it as 0600 or 0660")
    return mode


def _refuse_contradictions(
    certificate: "Path | None", key: "Path | None", authority: "Path | None", psk: "Path | None", *, any_client: bool
) -> None:
    """Refuse options of TLS that do not go together."""
    if (certificate is None) != (key is None) or (authority and not key):
        raise click.UsageError("TLS wants --tls-certificate and --tls-key, and --tls-ca goes with them")
    if psk and certificate:
        raise click.UsageError("clients come with a certificate or with a key: give --tls-certificate or --tls-psk")
    if any_client and (authority or not certificate):
        raise click.UsageError("--tls-clients any goes with --tls-certificate, and without --tls-ca")


def _tls_terms(
    certificate: "Path | None", key: "Path | None", authority: "Path | None", psk: "Path | None"
) -> "Terms | None":
    from onionskin.nbd import tls

    if psk is not None:
        return tls.terms_by_key(psk)
    return tls.terms_by_certificate(certificate, key, authority) if certificate and key else None


def _listeners(path: "Path | None", mode: int, tcp: tuple[str, ...], terms: "Terms | None") -> "list[Listener]":
    """Make or take over the sockets to listen on."""
    from onionskin.base.sockets import parse_address
    from onionskin.nbd.listener import open_listeners
    from onionskin.nbd.systemd import inherited_listeners

    given = inherited_listeners()
    if given and (path or tcp):
        raise click.UsageError("the sockets come from LISTEN_FDS; give no --socket and no --tcp")
    if not given and not path and not tcp:
        raise click.UsageError("say where to listen: --socket PATH or --tcp HOST:PORT")
    addresses = [parse_address(text) for text in tcp]
    return open_listeners(given, path=path, mode=mode, addresses=addresses, terms=terms)


def _add(server: "Server", text: str, label: str | None = None) -> None:
    """Serve a name of the command line: a directory that is a store, or else a volume in one."""
    store = FilePath(text)
    if is_store(store):
        server.exports.add_store(store)
        return
    name = parse_name(text)
    if name.snapshot is None:
        server.exports.add_volume(name.store, name.volume, label)
    else:
        server.exports.add_snapshot(name.store, name.volume, name.snapshot)


def _stop_at_signals(server: "Server") -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays so
            signal.signal(number, lambda *_: server.stop())


def _serve_stdio(server: "Server") -> None:
    """Serve the one client whose socket is stdin, as inetd does; return when it has gone."""
    import socket

    try:
        client = socket.socket(fileno=0)
    except OSError:
        raise StateError("--stdio wants a connected socket as stdin; give --socket or --tcp to listen") from None
    server.serve_one(client)


@click.command()
@click.argument("name", type=VOLUME, metavar="STORE/VOLUME")
@click.option("--prometheus", is_flag=True, help="Print the text form of Prometheus.")
@trust_option
@json_option
def stats(name: Name, prometheus: bool, as_json: bool) -> None:
    """Show the counters of the server of a volume.

    They include its clients, and the data that was read and written since it started.
    """
    from onionskin.control import client
    from onionskin.nbd import prometheus as counters

    with name.open_store() as store, client.connect(store, name.volume) as volume:
        value = volume.stats()
    if prometheus:
        output.echo(counters.prometheus(value), nl=False)
        return
    value["counters"] = with_means(value["counters"])
    for part in ("exports", "connections"):
        value[part] = [with_means(one) for one in value[part]]
    output.show(as_json, value, lambda: _draw_stats(value))


def with_means(value: dict[str, Any]) -> dict[str, Any]:
    """Add to counters what a request of each command took on average: None where there was none."""
    numbers = value["requests"]
    means = {
        command: seconds / numbers[command] if numbers.get(command) else None
        for command, seconds in value["latency_seconds"].items()
    }
    return {**value, "mean_latency_seconds": means}


def _draw_stats(value: dict[str, Any]) -> str:
    counters = value["counters"]
    pairs = [("volume", value["volume"]), ("serving for", f"{value['uptime_seconds']:.0f} s")]
    pairs.append(("index", output.size(value["memory_bytes"])))
    pairs += [(key, str(number)) for key, number in counters.items() if not isinstance(number, dict)]
    commands = [
        (command, str(number), output.size(counters["bytes"].get(command, 0)), _latency(counters, command))
        for command, number in counters["requests"].items()
        if number
    ]
    asked = output.table(("COMMAND", "REQUESTS", "BYTES", "MEAN-TIME"), commands, right="REQUESTS BYTES MEAN-TIME")
    rows = [(str(one.get("id", "")), one.get("export") or "-", one.get("peer", "")) for one in value["connections"]]
    listed = output.table(("CLIENT", "EXPORT", "FROM"), rows)
    exports = [
        (one["export"], str(one["connections"]), output.size(one["bytes"]["read"]), output.size(one["bytes"]["write"]))
        for one in value["exports"]
    ]
    counted = output.table(("EXPORT", "CLIENTS", "READ", "WRITTEN"), exports)
    return "\n\n".join(filter(None, (output.fields(pairs), asked, counted, listed)))


def _latency(counters: dict[str, Any], command: str) -> str:
    mean = counters["mean_latency_seconds"].get(command)
    return "-" if mean is None else f"{mean * 1e6:.0f} us" if mean < 1e-3 else f"{mean * 1e3:.3g} ms"


@click.command()
@click.argument("name", type=SNAPSHOT, metavar="STORE/VOLUME@SNAPSHOT")
@click.argument("directory", type=FILE)
@trust_option
@json_option
def mount(name: Name, directory: "Path", as_json: bool) -> None:
    """Show a snapshot as a raw, read-only file in DIRECTORY.

    It uses nbdfuse and copies nothing; umount ends it.
    """
    from onionskin.nbd.fuse_mount import mount as mount_it

    with name.open_store() as store, store.open(name.volume, snapshot=name.snapshot) as view:
        size_bytes = view.size_bytes  # this command reports errors of the snapshot, and not nbdfuse
    text = f"{name.store.absolute()}/{name.volume}@{name.required_snapshot}"
    path = mount_it(text, directory, f"{name.volume}@{name.required_snapshot}.raw", trust=is_trusted())
    value = {"path": str(path), "size_bytes": size_bytes}
    import shlex

    end = f"onionskin umount {shlex.quote(str(directory))}"
    output.tell(as_json, value, lambda: f"{name} is {path} now; end it with: {end}")


@click.command()
@click.argument("directory", type=FILE, shell_complete=complete_mounted)
@json_option
def umount(directory: "Path", as_json: bool) -> None:
    """Remove a mount."""
    from onionskin.nbd.fuse_mount import unmount

    unmount(directory)
    output.tell(as_json, {"unmounted": str(directory)}, lambda: f"unmounted {directory}")
