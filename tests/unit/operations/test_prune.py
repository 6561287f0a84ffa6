"""Retention keeps what its rules say, whatever the clock, and drops names without dropping data."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

import onionskin
from onionskin.operations import prune
from onionskin.operations.prune import Rules, retained

BLOCK = 4096
BERLIN = ZoneInfo("Europe/Berlin")


def taken(*times: datetime) -> list[onionskin.Snapshot]:
    return [onionskin.Snapshot(f"s{n}", "0" * 32, at, None, "", BLOCK) for n, at in enumerate(times)]


def at(text: str, zone: "ZoneInfo | None" = None) -> datetime:
    found = datetime.fromisoformat(text)
    return found.replace(tzinfo=zone or UTC).astimezone(UTC)


def kept(snapshots: list[onionskin.Snapshot], rules: Rules, **more: Any) -> list[str]:
    return [one.snapshot for one in retained(snapshots, rules, **more) if one.kept_by]


def test_the_newest_of_each_of_the_last_days_is_kept() -> None:
    found = taken(*(at(f"2026-03-{day:02} {hour}:00") for day in range(1, 8) for hour in (10, 22)))
    assert kept(found, Rules(daily=3)) == ["s9", "s11", "s13"]
    assert kept(found, Rules(daily=3, last=2)) == ["s9", "s11", "s12", "s13"]


def test_days_without_a_snapshot_do_not_count() -> None:
    found = taken(at("2026-01-01"), at("2026-02-01"), at("2026-02-01 12:00"), at("2026-05-01"))
    assert kept(found, Rules(daily=2)) == ["s2", "s3"]


def test_the_oldest_is_kept_while_a_rule_is_not_full() -> None:
    found = taken(*(at(f"2026-03-01 {hour:02}:00") for hour in range(5)))
    assert kept(found, Rules(monthly=12)) == ["s0", "s4"]
    assert kept(found, Rules(monthly=1)) == ["s4"]


@pytest.mark.parametrize(
    ("rule", "first", "second"),
    [
        ("weekly", "2026-12-28", "2027-01-03"),  # one ISO week, and two years
        ("hourly", "2026-03-01 10:00", "2026-03-01 10:59"),
        ("monthly", "2026-03-01", "2026-03-31"),
        ("yearly", "2026-01-01", "2026-12-31"),
    ],
)
def test_two_of_one_period_leave_the_newer(rule: str, first: str, second: str) -> None:
    found = taken(at("2020-01-01"), at(first), at(second))
    assert kept(found, Rules(**{rule: 2})) == ["s0", "s2"]
    assert kept(found, Rules(**{rule: 1})) == ["s2"]


def test_the_time_zone_says_where_a_day_ends() -> None:
    found = taken(at("2020-01-01"), at("2026-03-01 22:30"), at("2026-03-01 23:30"))
    assert kept(found, Rules(daily=2)) == ["s0", "s2"]
    assert kept(found, Rules(daily=2, zone=BERLIN)) == ["s1", "s2"]


def test_an_hour_that_comes_twice_is_two_hours() -> None:
    """In Berlin 02:30 came twice on 2026-10-25."""
    found = taken(at("2020-01-01"), at("2026-10-25 00:30"), at("2026-10-25 01:30"))
    assert kept(found, Rules(hourly=2, zone=BERLIN)) == ["s1", "s2"]


def test_within_counts_from_the_newest_snapshot_and_not_from_now() -> None:
    found = taken(at("2001-01-01"), at("2001-01-09"), at("2001-01-10"))
    assert kept(found, Rules(within=timedelta(days=1))) == ["s1", "s2"]


def test_a_day_within_which_all_is_kept_has_25_hours_where_clocks_are_set_back() -> None:
    within = Rules(within=timedelta(days=3), zone=BERLIN)
    newest = at("2025-10-27 12:00", BERLIN)
    assert kept(taken(at("2025-10-24 12:00", BERLIN), newest), within) == ["s0", "s1"]  # 73 hours
    assert kept(taken(at("2025-10-24 11:59", BERLIN), newest), within) == ["s1"]
    spring = taken(at("2025-03-29 12:00", BERLIN), at("2025-03-30 13:00", BERLIN))  # 24 hours
    assert kept(spring, Rules(within=timedelta(days=1), zone=BERLIN)) == ["s0", "s1"]


def test_a_newest_snapshot_of_a_time_to_come_makes_none_of_the_others_old() -> None:
    """The clock was wrong as it was taken, and is right again; it was a reason to drop all the others."""
    found = taken(at("2026-03-01"), at("2026-03-07"), at("2026-03-08"), at("2099-01-01"))
    week = Rules(within=timedelta(days=7))
    assert kept(found, week, now=at("2026-03-08 12:00")) == ["s1", "s2", "s3"]
    assert kept(found[:3], week, now=at("2099-01-01")) == kept(found[:3], week) == ["s0", "s1", "s2"]


@pytest.mark.parametrize("wrong", ["1970-01-01", "2036-01-01"])
@pytest.mark.parametrize(
    "rules", [Rules(last=2), Rules(hourly=2), Rules(daily=2), Rules(yearly=2), Rules(within=timedelta(days=3))]
)
def test_what_was_taken_last_is_kept_whatever_the_clock_said(rules: Rules, wrong: str) -> None:
    right = [at("2025-03-01"), at("2026-03-02")]
    assert "s2" in kept(taken(*right, at(wrong)), rules)
    assert "s3" in kept(taken(right[0], at(wrong), at(wrong), right[1]), rules)


def test_a_day_that_comes_again_as_the_clock_was_set_back_is_one_day() -> None:
    found = taken(at("2026-03-01"), at("2026-03-02"), at("2026-03-03"), at("2026-03-02 12:00"), at("2026-03-03 12:00"))
    assert kept(found, Rules(daily=2)) == ["s3", "s4"]


def test_what_is_held_is_kept() -> None:
    found = taken(at("2026-01-01"), at("2026-01-02"), at("2026-01-03"))
    assert retained(found, Rules(last=1), held=["s0"])[0].kept_by == ("held",)
    assert kept(found, Rules(last=1), held=["s0"]) == ["s0", "s2"]


def test_without_a_rule_nothing_is_decided() -> None:
    with pytest.raises(ValueError, match="nothing would be kept"):
        retained(taken(at("2026-01-01")), Rules())
    with pytest.raises(ValueError, match="-1 keeps all"):
        retained([], Rules(daily=-2))
    with pytest.raises(TypeError, match="is a number"):
        retained([], Rules(daily=True))
    with pytest.raises(ValueError, match="not negative"):
        retained([], Rules(within=timedelta(-1)))
    with pytest.raises(TypeError, match="is a timedelta, not 5"):
        Rules(within=5).check()  # type: ignore[arg-type]


TIMES = st.lists(st.datetimes(datetime(2025, 12, 1), datetime(2026, 2, 1), timezones=st.just(UTC)), max_size=30)
COUNT = st.integers(-1, 6)
FORMATS = {"hourly": "%Y-%m-%d %H", "daily": "%Y-%m-%d", "weekly": "%G %V", "monthly": "%Y-%m", "yearly": "%Y"}


@given(TIMES, COUNT, st.fixed_dictionaries(dict.fromkeys(FORMATS, COUNT)))
def test_the_rules_keep_what_a_plain_reading_of_them_keeps(
    times: list[datetime], last: int, counts: dict[str, int]
) -> None:
    if not (last or any(counts.values())):
        return
    found = taken(*times)
    newest = found[::-1]
    wanted = {one.name for one in (newest if last == -1 else newest[:last])}
    for name, count in counts.items():
        groups: dict[str, str] = {}
        for one in newest:
            groups.setdefault(one.created.strftime(FORMATS[name]), one.name)
        wanted |= set(list(groups.values())[: len(groups) if count == -1 else count])
        if newest and (count == -1 or len(groups) < count):
            wanted.add(newest[-1].name)
    assert set(kept(found, Rules(last=last, **counts))) == wanted


# ---- of a store ----


@pytest.fixture
def store(tmp_path: Path) -> Iterator[onionskin.Store]:
    """A store whose web has five snapshots, of which the second has a clone."""
    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", size="1M") as web:
            for number in range(5):
                web.write(number * BLOCK, bytes([number + 1]) * BLOCK)
                web.snapshot(f"s{number}")
        store.clone("web", "s1", "copy")
        yield store


def test_a_dry_run_says_what_would_go_and_drops_nothing(store: onionskin.Store) -> None:
    with store.open("web"):
        found = store.prune("web", keep_last=2, dry_run=True)
    assert [(one.snapshot, one.kept_by) for one in found][2:4] == [("s2", ()), ("s3", ("last",))]
    assert len(store.snapshots("web")) == 5


@pytest.mark.parametrize("is_open", [False, True])
def test_names_go_and_all_that_is_left_reads_as_before(store: onionskin.Store, is_open: bool) -> None:
    store.hold("web", "s0", "backup")
    if is_open:
        with store.open("web") as web:
            store.prune("web", keep_last=2)
            assert not web.closed
    else:
        store.prune("web", keep_last=2)
    assert [row.name for row in store.snapshots("web")] == ["s0", "s3", "s4"]
    with store.open("web") as web, store.open("copy") as copy, store.open("web", snapshot="s3") as view:
        whole = b"".join(bytes([number + 1]) * BLOCK for number in range(5))
        assert web[: 5 * BLOCK] == whole
        assert view[: 5 * BLOCK] == whole[: 4 * BLOCK] + bytes(BLOCK)
        assert copy[: 5 * BLOCK] == whole[: 2 * BLOCK] + bytes(3 * BLOCK)
    assert store.check() == []


def test_a_store_without_rules_is_left_alone(store: onionskin.Store) -> None:
    with pytest.raises(ValueError, match="no rule"):
        store.prune("web")
    with pytest.raises(onionskin.VolumeNotFoundError):
        store.prune("mail", keep_last=1)
    assert len(store.snapshots("web")) == 5


def test_a_volume_that_gets_another_name_meanwhile_is_pruned_all_the_same(
    store: onionskin.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, plans = prune.planned, []

    def renamed_before(*arguments: Any) -> Any:
        plans.append(arguments)
        if len(plans) == 2:  # the volume is open by then
            store.rename("web", "moved")
            store.create("web", size=BLOCK).close()
        return planned(*arguments)

    monkeypatch.setattr(prune, "planned", renamed_before)
    dropped = [one.snapshot for one in store.prune("web", keep_last=1) if not one.kept_by]
    assert dropped and len(plans) == 2
    assert len(store.snapshots("moved")) == 1
