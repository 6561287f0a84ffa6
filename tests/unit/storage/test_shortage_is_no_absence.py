"""Who has no descriptor or no memory left to look with does not take that for: there is nothing."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import onionskin
from onionskin.base.paths import FilePath
from onionskin.machine import orphans, record
from onionskin.machine.record import ProcessId
from onionskin.operations import check
from onionskin.storage import locks
from onionskin.storage.chain import is_same_file


def failing(number: int) -> Callable[..., Any]:
    def fail(*given: Any, **named: Any) -> Any:
        raise OSError(number, os.strerror(number), str(given[0]))

    return fail


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM])
def test_a_process_that_runs_is_not_taken_for_dead(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    own = ProcessId.of(os.getpid())
    assert own.is_alive
    monkeypatch.setattr(locks, "open", failing(number), raising=False)
    with pytest.raises(OSError, match=os.strerror(number)):
        _ = own.is_alive


def test_a_process_that_has_begun_to_end_is_looked_at_too(monkeypatch: pytest.MonkeyPatch) -> None:
    own = ProcessId.of(os.getpid())
    monkeypatch.setattr(record.Path, "read_text", failing(errno.EMFILE))
    with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        _ = own.is_alive


def test_a_process_that_listens_is_not_overlooked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orphans, "connect_unix", failing(errno.EMFILE))
    with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        orphans.processes([tmp_path])


def test_a_record_that_cannot_be_read_now_is_not_to_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "read_json", failing(errno.EMFILE))
    with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        record.Record.read(tmp_path)


def test_data_that_cannot_be_looked_for_is_not_reported_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check.os, "open", failing(errno.EMFILE))
    with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        check._data_from(FilePath(tmp_path / "file"), 0)


def test_a_base_that_cannot_be_looked_at_may_be_the_one_that_is_merged_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("base", "other"):
        (tmp_path / name).write_bytes(bytes(8192))
    with onionskin.Store(tmp_path / "store") as store:
        store.create("beside", base=tmp_path / "other").close()
        with store.create("web", base=tmp_path / "base") as web:
            web.write(0, b"web")
            stat = os.stat

            def refused(path: Any, **named: Any) -> os.stat_result:
                return failing(errno.EACCES)(path) if str(path) == str(tmp_path / "other") else stat(path, **named)

            with monkeypatch.context() as patch, pytest.raises(PermissionError):
                patch.setattr(os, "stat", refused)
                web.merge_into_base()
            web.merge_into_base()
            assert (tmp_path / "base").read_bytes()[:3] == b"web"


def test_a_file_that_is_gone_is_no_other_one(tmp_path: Path) -> None:
    gone, there = FilePath(tmp_path / "gone"), FilePath(tmp_path / "there")
    Path(there).touch()
    assert not is_same_file(gone, there)
    assert is_same_file(gone, gone)
