"""What people are shown: times with their zone, amounts that are known, what a request took on average."""

import os
import time
from datetime import UTC, datetime

import pytest

from onionskin.cli import output, serve

COUNTERS = {
    "requests": {"read": 4, "write": 0, "disc": 1},
    "bytes": {"read": 16384, "write": 0},
    "latency_seconds": {"read": 0.002, "write": 0.0},
    "errors": 0,
    "sends": 4,
}


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()


def test_a_time_is_shown_in_the_local_zone_with_its_offset(zone: None) -> None:
    assert output.when(datetime(2026, 7, 1, 12, 0, 0, tzinfo=UTC)) == "2026-07-01 14:00:00+02:00"
    assert output.when(datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)) == "2026-01-01 13:00:00+01:00"
    del os.environ["TZ"]
    time.tzset()


def test_a_time_for_programs_says_that_it_is_utc() -> None:
    assert output.timestamp(datetime(2026, 7, 1, 12, 0, 0, tzinfo=UTC)) == "2026-07-01T12:00:00.000Z"


def test_an_amount_has_no_question_marks() -> None:
    assert output.amount(1 << 20, 4 << 20) == "1 MiB of 4 MiB"
    assert output.amount(1 << 20, 0) == "1 MiB"


def test_a_latency_is_that_of_a_request() -> None:
    counted = serve.with_means(COUNTERS)
    assert counted["mean_latency_seconds"] == {"read": 0.0005, "write": None}
    assert counted["latency_seconds"] == COUNTERS["latency_seconds"]
    value = {"volume": "web", "uptime_seconds": 1.0, "memory_bytes": 0, "exports": [], "connections": []}
    shown = serve._draw_stats({**value, "counters": counted})
    assert "COMMAND  REQUESTS   BYTES  MEAN-TIME" in shown
    assert "read            4  16 KiB     500 us" in shown
    assert "write" not in shown
