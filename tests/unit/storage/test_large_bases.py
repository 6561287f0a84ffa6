"""A base of so many bytes that a process has no addresses for them."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import pathlib, resource, sys
import onionskin

with onionskin.Store(sys.argv[1]) as store:
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (6 << 30),) * 2)
    with store.create("web", base=sys.argv[2]) as web:
        web.write(0, b"w")
        try:
            web.export(sys.argv[3])
        except OSError as error:
            print(error)
        web.write(4096, b"w")
        web.flush()
        assert web.read(0, 4097) == b"w" + bytes(4095) + b"w"
"""


def test_a_base_for_which_a_process_has_no_addresses_is_refused_by_its_size(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    with base.open("wb") as file:
        file.truncate(4 << 30)  # one handle has room for it, and a second one has none
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "store", base, tmp_path / "copy.raw"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    assert "too few addresses to map the 4 GiB of the base" in ran.stdout and str(base) in ran.stdout
    assert not (tmp_path / "copy.raw").exists()
