"""Our NBD server beside qemu-nbd (qcow2 overlay) and nbdkit (cow filter): same client, same base image, fresh overlays.

    PYTHONPATH=src python bench/nbd_compare.py [--size 2G] [--seconds 3] [--rounds 5] [--only WORKLOAD ...] [--json FILE]

Servers take turns within each round, so that what else the machine does falls on all of them. Reported are medians, and
the median and the range of the ratios of each round. Client: fio with the nbd engine, and nbdcopy to null. Needs
qemu-utils, nbdkit, fio, libnbd-bin.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

FIO = {
    "randread-qd16": ["--rw=randread", "--bs=4k", "--iodepth=16"],
    "randwrite-qd16": ["--rw=randwrite", "--bs=4k", "--iodepth=16"],
    "seqread-1M": ["--rw=read", "--bs=1M", "--iodepth=4"],
    "randread-qd1": ["--rw=randread", "--bs=4k", "--iodepth=1"],
    "randwrite-qd1": ["--rw=randwrite", "--bs=4k", "--iodepth=1"],
    # Each block once, and a flush behind all but the last ten: fio does not count one that comes at the end.
    "first-writes": ["--rw=randwrite", "--bs=4k", "--iodepth=16", "--number_ios=50000", "--fsync=49990"],
}
WORKLOADS = [*FIO, "nbdcopy"]
GOALS = {  # (workload, peer) -> least ratio
    ("randread-qd16", "qemu-nbd"): 3.0,
    ("randread-qd16", "nbdkit-cow"): 1.2,
    ("randwrite-qd16", "qemu-nbd"): 8.0,
    ("seqread-1M", "qemu-nbd"): 2.0,
    ("randread-qd1", "qemu-nbd"): 1.0,
    ("randwrite-qd1", "qemu-nbd"): 1.0,
    ("first-writes", "qemu-nbd"): 6.0,
    ("first-writes", "qemu-nbd-l2"): 2.0,
    ("nbdcopy", "qemu-nbd"): 1.5,
}


def make_base(path: Path, size: int) -> None:
    block = os.urandom(1 << 20)
    with path.open("wb") as out:
        for at in range(0, size, len(block)):
            out.write(at.to_bytes(8, "little") + block[8:])
        os.fsync(out.fileno())


def warm(path: Path) -> None:
    """Have all of it in the page cache, for every server alike."""
    with path.open("rb", buffering=0) as base:
        while base.read(1 << 20):
            pass


def wait_for_socket(path: Path, process: "subprocess.Popen[bytes]") -> None:
    while not path.exists():
        if process.poll() is not None:
            raise SystemExit(f"a server ended with status {process.returncode}")
        time.sleep(0.01)


@contextmanager
def running(command: list[str], path: Path) -> Iterator[str]:
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    try:
        wait_for_socket(path, process)
        yield f"nbd+unix:///?socket={path}"
    finally:
        assert process.stdin
        process.stdin.close()
        process.terminate()
        process.wait()
        path.unlink(missing_ok=True)


@contextmanager
def ours(base: Path, directory: Path) -> Iterator[str]:
    with running([sys.executable, __file__, "--serve", str(base), str(directory)], directory / "onionskin.sock") as uri:
        yield uri


@contextmanager
def qemu_nbd(base: Path, directory: Path, options: str = "") -> Iterator[str]:
    overlay, path = directory / "overlay.qcow2", directory / "qemu.sock"
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(base), *options.split(), str(overlay)]
    subprocess.run(create, check=True)
    command = ["qemu-nbd", "-f", "qcow2", "-t", "-e", "8", "--cache=writeback", "-k", str(path), str(overlay)]
    with running(command, path) as uri:
        yield uri


@contextmanager
def nbdkit_cow(base: Path, directory: Path) -> Iterator[str]:
    path = directory / "nbdkit.sock"
    with running(["nbdkit", "-f", "-U", str(path), "--filter=cow", "file", str(base)], path) as uri:
        yield uri


# extended_l2 is another way to write first blocks, and nothing else.
ONLY_IN = {"qemu-nbd-l2": ["first-writes"]}

SERVERS: dict[str, Callable[..., "Iterator[str]"]] = {
    "onionskin": ours,
    "qemu-nbd": qemu_nbd,
    "qemu-nbd-l2": partial(qemu_nbd, options="-o extended_l2=on"),
    "nbdkit-cow": nbdkit_cow,
}


def run_fio(arguments: list[str], uri: str, size: int, seconds: float) -> float:
    """Operations a second."""
    command = ["fio", "--name=job", "--ioengine=nbd", f"--uri={uri}", f"--size={size}", "--randrepeat=0"]
    if not any(argument.startswith("--number_ios") for argument in arguments):
        command += ["--time_based", f"--runtime={seconds}", "--ramp_time=0.5"]
    command += ["--output-format=json", *arguments]
    output = subprocess.run(command, check=True, capture_output=True).stdout
    job = json.loads(output[output.index(b"{") :])["jobs"][0]
    return float(job["read"]["iops"] + job["write"]["iops"])


def run_nbdcopy(uri: str) -> float:
    """Copies a second."""
    start = time.perf_counter()
    subprocess.run(["nbdcopy", uri, "null:"], check=True)
    return 1 / (time.perf_counter() - start)


def measure(name: str, workload: str, base: Path, size: int, seconds: float) -> float:
    warm(base)
    with tempfile.TemporaryDirectory(dir=base.parent) as directory, SERVERS[name](base, Path(directory)) as uri:
        if workload == "nbdcopy":
            return run_nbdcopy(uri)
        return run_fio(FIO[workload], uri, size, seconds)


def report(results: dict[tuple[str, str], list[float]]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for workload in dict.fromkeys(workload for workload, _ in results):
        mine = results[workload, "onionskin"]
        for peer in (peer for at, peer in results if at == workload):
            theirs = results[workload, peer]
            median, goal = statistics.median(theirs), GOALS.get((workload, peer))
            ratios = sorted(ours / other for ours, other in zip(mine, theirs, strict=True))
            row = {"workload": workload, "server": peer, "median": median, "each": theirs, "goal": goal}
            rows.append({**row, "ratio": statistics.median(ratios), "ratios": ratios})
            text = "" if peer == "onionskin" else f"  x{statistics.median(ratios):.2f}"
            text += f" ({ratios[0]:.2f} to {ratios[-1]:.2f})" if text else ""
            text += f", goal {goal}" if goal else ""
            print(f"{workload:16} {peer:12} {median:12.2f}/s{text}", flush=True)
    return rows


def compare(options: argparse.Namespace) -> None:
    size = int(options.size.removesuffix("G")) << 30
    results: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        base = Path(directory) / "base.raw"
        make_base(base, size)
        for workload in options.only or WORKLOADS:
            for _ in range(options.rounds):
                for server in options.servers or SERVERS:
                    if workload not in ONLY_IN.get(server, [workload]):
                        continue
                    value = measure(server, workload, base, size, options.seconds)
                    results.setdefault((workload, server), []).append(value)
        rows = report(results)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))


def serve(base: Path, directory: Path) -> None:
    """Serve a fresh overlay on the base until standard input ends."""
    from onionskin.nbd._nbd import NbdServer
    from onionskin.store import Store

    with Store(directory / "store") as store, store.create("web", base=base) as volume:
        server = NbdServer()
        server.add_export("web", volume._path, read_only=False)
        server.set_default("web")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(directory / "onionskin.sock"))
        listener.listen(16)

        def accept() -> None:
            while True:
                server.serve(listener.accept()[0].detach(), "client")

        threading.Thread(target=accept, daemon=True).start()
        sys.stdin.read()
        # The overlay is thrown away: what it holds need not reach the disk.
        os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="2G")
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=WORKLOADS)
    parser.add_argument("--servers", nargs="*", choices=list(SERVERS))
    parser.add_argument("--directory")
    parser.add_argument("--json")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(Path(options.serve[0]), Path(options.serve[1]))
    else:
        compare(options)


if __name__ == "__main__":
    main()
