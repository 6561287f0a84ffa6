"""A snapshot that was given no name gets one from the time."""

import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import onionskin


@pytest.fixture
def web(tmp_path: Path) -> Iterator[onionskin.Volume]:
    with onionskin.Store(tmp_path / "store") as store, store.create("web", size="1M") as web:
        yield web


def test_a_snapshot_without_a_name_is_called_by_its_time_in_utc(web: onionskin.Volume) -> None:
    taken = web.snapshot(note="no name")
    assert re.fullmatch(r"\d{8}T\d{6}\.\d{3}Z", taken.name)
    said = datetime.strptime(taken.name, "%Y%m%dT%H%M%S.%fZ").replace(tzinfo=UTC)
    assert timedelta(0) <= taken.created - said < timedelta(milliseconds=1.001)
    assert [(row.name, row.note) for row in web.snapshots] == [(taken.name, "no name")]


def test_names_of_one_instant_differ_and_sort_as_they_were_taken(
    web: onionskin.Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 1_798_761_599_998_000_000)
    names = [web.snapshot().name for _ in range(4)]
    assert names == ["20261231T235959.998Z", "20261231T235959.999Z", "20270101T000000.000Z", "20270101T000000.001Z"]
    assert names == sorted(names) == [row.name for row in web.snapshots]


def test_a_name_that_was_given_is_kept_and_an_empty_one_refused(web: onionskin.Volume) -> None:
    assert web.snapshot("a").name == "a"
    with pytest.raises(ValueError, match="empty"):
        web.snapshot("")
    with pytest.raises(onionskin.SnapshotExistsError, match="'a'"):
        web.snapshot("a")
