"""A verb that is killed has been done or has not been begun: the store opens, and check finds nothing in it."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

import onionskin

Run = Callable[..., Result]
COMMAND = [sys.executable, "-m", "onionskin"]
# What changes files. A verb is killed as it makes the n-th of these calls.
CALLS = (
    "pwrite64,pwritev,write,fsync,fdatasync,rename,renameat2,unlink,unlinkat,ftruncate,fallocate,mkdir,link,linkat,"
    "copy_file_range,sync_file_range,syncfs"
)
EVERY = 7  # so many calls apart a verb is killed; each verb is begun at another one
VERBS = [
    "rename VMS/web VMS/www",
    "rename VMS/web@a z",
    "note VMS/web@a later",
    "hold VMS/web@a VMS/web@b me",
    "unhold VMS/web@d keep",
    "set VMS/web wipe=zero",
    "set VMS/web label:a=b",
    "set VMS/old lifetime=2h",
    "set VMS wipe=zero",
    "prune VMS/web --keep-last 1",
    "fork VMS/web@b -n 3 --lifetime 2h --label a=b",
    "fork VMS/web -n 2",
    "delete VMS/old VMS/older --recursive --yes",
    "merge VMS/web@a..@c",
    "discard VMS/copy@x --yes",
    "snapshot VMS/web@n VMS/copy@n",
    "resize VMS/old +1M",
    "revert VMS/web@c --yes",
    "expire VMS",
]


@pytest.fixture
def before(run: Run, tmp_path: Path) -> Path:
    """A store whose snapshots are held, cloned and forked, in a directory from which it is copied."""
    vms = tmp_path / "before" / "vms"
    run("create", f"{vms}/web", "--size", "1M")
    for name in "abcd":
        run("write", f"{vms}/web", 0, input=os.urandom(20_000))
        run("snapshot", f"{vms}/web@{name}")
    run("write", f"{vms}/web", 0, input=os.urandom(9_000))
    run("clone", f"{vms}/web@b", f"{vms}/copy")
    run("write", f"{vms}/copy", 8192, input=os.urandom(9_000))
    run("snapshot", f"{vms}/copy@x")
    run("create", f"{vms}/old", "--size", "1M")
    run("create", f"{vms}/older", "--size", "1M", "--wipe", "zero")
    run("write", f"{vms}/older", 0, input=b"secret" * 1000)
    run("snapshot", f"{vms}/older@q")
    run("hold", f"{vms}/web@d", "keep")
    with onionskin.Store(vms) as store:  # they are to go at once
        store.fork("web", "a", names=["over-1", "over-2"], lifetime=0.001)
    return vms


def state_of(vms: Path) -> str:
    """All that a user sees of a store."""

    def digest(volume: onionskin.Volume) -> str:
        return hashlib.sha256(volume.read(0, volume.size_bytes)).hexdigest()

    with onionskin.Store(vms) as store:
        holds = sorted([one.volume, one.snapshot, one.holder] for one in store.holds())
        state: dict[str, Any] = {"holds": holds, "defaults": str(store.defaults())}
        for name in store:
            about = store.info(name)
            with store.open(name) as volume:
                names = [(one.name, one.note) for one in volume.snapshots]
                state[name] = [about.wipe, about.labels, about.expires is not None, digest(volume), names]
            for snapshot, _ in names:
                with store.open(name, snapshot=snapshot) as view:
                    state[f"{name}@{snapshot}"] = digest(view)
    return json.dumps(state, sort_keys=True)


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_killed_verb_was_done_or_was_not(before: Path, tmp_path: Path, verb: str) -> None:
    vms = tmp_path / "now" / "vms"
    command = [*COMMAND, *verb.replace("VMS", str(vms)).split()]

    def anew() -> None:
        shutil.rmtree(vms, ignore_errors=True)
        shutil.copytree(before, vms)

    anew()
    unchanged = state_of(vms)
    subprocess.run(command, check=True, capture_output=True)
    changed = state_of(vms)
    assert unchanged != changed
    kills = 0
    for call in range(1 + VERBS.index(verb) % EVERY, 1000, EVERY):
        anew()
        kill = ["-e", f"trace={CALLS}", "-e", f"inject={CALLS}:signal=SIGKILL:when={call}"]
        ended = subprocess.run(["strace", "-f", "-qq", "-o", "/dev/null", *kill, *command], capture_output=True)
        if ended.returncode == 0:
            break
        kills += 1
        assert state_of(vms) in (unchanged, changed), call
        found = subprocess.run([*COMMAND, "check", vms, "--json"], check=True, capture_output=True)
        assert [one for one in json.loads(found.stdout) if "its mode is" not in one["what"]] == [], call
    assert kills > 0
