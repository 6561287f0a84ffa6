"""What drops data that nothing else holds asks first, once it is known that it can be done; --dry-run says what would go."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from onionskin.store import Store

Run = Callable[..., Result]


def ok(result: Result) -> str:
    assert result.exit_code == 0, result.stderr
    return result.stdout


def as_json(result: Result) -> Any:
    return json.loads(ok(result))


@pytest.fixture
def grown(run: Run, vms: Path) -> Path:
    """web: clean (4 KiB), then more (8 KiB), then 4 KiB in the head at the end of the disk."""
    ok(run("write", f"{vms}/web", 4096, input=b"m" * 8192))
    ok(run("snapshot", f"{vms}/web@more"))
    ok(run("write", f"{vms}/web", (1 << 20) - 4096, input=b"h" * 4096))
    return vms


DROPS = {
    "revert": (("revert", "{}/web@clean"), [], [], 4096),
    "discard": (("discard", "{}/web@more"), [], ["web@more"], 4096),
    "discard recursive": (("discard", "{}/web@clean", "--recursive"), [], ["web@clean", "web@more"], 12288),
    "delete": (("delete", "{}/web", "--recursive"), ["web"], ["web@clean", "web@more"], 16384),
    "resize": (("resize", "{}/web", "512K", "--force"), [], [], 4096),
}


@pytest.mark.parametrize("what", DROPS)
def test_a_dry_run_says_what_would_go_and_changes_nothing(run: Run, grown: Path, what: str) -> None:
    words, volumes, snapshots, bytes_freed = DROPS[what]
    command = [word.format(grown) for word in words]
    before = as_json(run("snapshots", f"{grown}/web", "--json")), as_json(run("list", grown, "--json"))
    said = as_json(run(*command, "--dry-run", "--json"))
    assert said == {"dry_run": True, "volumes": volumes, "snapshots": snapshots, "bytes_freed": bytes_freed}
    text = ok(run(*command, "--dry-run"))
    assert "nothing was changed" in text and all(name in text for name in [*volumes, *snapshots])
    assert run("read", f"{grown}/web", (1 << 20) - 4096, 1).stdout == "h"
    assert (as_json(run("snapshots", f"{grown}/web", "--json")), as_json(run("list", grown, "--json"))) == before


@pytest.mark.parametrize("what", DROPS)
def test_without_a_terminal_it_wants_a_yes_and_then_gives_back_what_was_said(run: Run, grown: Path, what: str) -> None:
    words, _, _, bytes_freed = DROPS[what]
    command = [word.format(grown) for word in words]
    refused = run(*command)
    assert refused.exit_code == 5 and "--yes" in refused.stderr and "nothing else holds" in refused.stderr
    held = held_bytes(grown)
    ok(run(*command, "--yes"))
    assert held - held_bytes(grown) == bytes_freed


@pytest.mark.parametrize("words", [["0", "--force"], ["65T"], ["+64T"], ["4096"]], ids=" ".join)
def test_a_dry_run_of_a_resize_is_refused_in_the_words_in_which_the_resize_is(
    run: Run, grown: Path, words: list[str]
) -> None:
    refused = run("resize", f"{grown}/web", *words)  # also before anybody is asked
    would_be = run("resize", f"{grown}/web", *words, "--dry-run")
    assert refused.exit_code in (2, 5)
    assert "nothing else holds" not in refused.stderr
    assert (would_be.exit_code, would_be.stderr) == (refused.exit_code, refused.stderr)


def held_bytes(vms: Path) -> int:
    with Store(vms, create=False) as store:
        return sum(row.bytes_held for name in store for row in store.usage(name))


@pytest.mark.parametrize("flag", ["--dry-run", "--yes"])
def test_what_cannot_be_done_is_refused_before_anything(run: Run, grown: Path, flag: str) -> None:
    ok(run("clone", f"{grown}/web@more", f"{grown}/other"))
    for command, said in [
        (("discard", f"{grown}/web@clean"), "pass recursive|--recursive"),
        (("discard", f"{grown}/web@more"), "needed by other"),
        (("delete", f"{grown}/web"), "that other need"),
        (("resize", f"{grown}/web", "4096"), "--force"),
        (("revert", f"{grown}/web@none"), "no snapshot"),
    ]:
        refused = run(*command, flag)
        assert refused.exit_code in (3, 5)
        assert any(one in refused.stderr for one in said.split("|")) or "needed by" in refused.stderr
    with Store(grown) as store, store.open("web"):
        for words in (("delete", f"{grown}/web", "--recursive"), ("revert", f"{grown}/web@more")):
            refused = run(*words, flag)
            assert refused.exit_code == 5 and ("is open" in refused.stderr or "need" in refused.stderr)
    ok(run("hold", f"{grown}/web@more", "backup"))
    ok(run("delete", f"{grown}/other", flag))
    if flag == "--yes":
        assert "backup" in run("discard", f"{grown}/web@more", flag).stderr
        assert "backup" in run("delete", f"{grown}/web", "--recursive", flag).stderr


def test_volumes_are_deleted_together_with_their_clones_in_any_order(run: Run, grown: Path) -> None:
    ok(run("clone", f"{grown}/web@more", f"{grown}/other"))
    ok(run("snapshot", f"{grown}/other@a"))
    ok(run("clone", f"{grown}/other@a", f"{grown}/third"))
    names = [f"{grown}/{name}" for name in ("web", "third", "other")]
    assert run("delete", *names, "--recursive").exit_code == 5
    assert as_json(run("delete", *names, "--recursive", "--dry-run", "--json"))["bytes_freed"] == 16384
    assert as_json(run("delete", *names, "--recursive", "--yes", "--json")) == {
        "deleted": ["other", "third", "web"],
        "bytes_freed": 16384,
    }
    assert as_json(run("list", grown, "--json")) == []


def test_a_pattern_means_the_volumes_that_match_it_unless_one_has_that_name(run: Run, grown: Path) -> None:
    for name in ("job-1", "job-2", "Job-3", "job-*"):
        ok(run("create", f"{grown}/{name}", "--size", "1M"))
    assert as_json(run("delete", f"{grown}/job-*", "--json"))["deleted"] == ["job-*"]
    assert ok(run("delete", f"{grown}/job-*", f"{grown}/job-1")) == "deleted job-1, job-2\n"
    missing = run("delete", f"{grown}/job-*")
    assert missing.exit_code == 3 and "no volume that matches 'job-*'" in missing.stderr
    assert run("delete", f"{grown}/[Jw]*", "--recursive").exit_code == 5
    assert ok(run("delete", f"{grown}/[Jw]*", "--recursive", "--yes")) == "deleted Job-3, web; 16 KiB come back\n"


def test_nothing_is_deleted_where_one_of_several_cannot_be(run: Run, grown: Path) -> None:
    ok(run("create", f"{grown}/empty", "--size", "1M"))
    assert run("delete", f"{grown}/empty", f"{grown}/web", "--yes").exit_code == 5
    assert run("delete", f"{grown}/empty", f"{grown}/none", "--yes").exit_code == 3
    assert run("info", f"{grown}/empty").exit_code == 0


def test_a_volume_that_nobody_wrote_to_is_deleted_without_a_question(run: Run, vms: Path) -> None:
    ok(run("clone", f"{vms}/web@clean", f"{vms}/other"))
    ok(run("delete", f"{vms}/other"))


def test_a_damaged_volume_can_be_deleted(run: Run, grown: Path) -> None:
    for path in (grown / "layers").iterdir():
        path.unlink()
    assert as_json(run("delete", f"{grown}/web", "--recursive", "--dry-run", "--json"))["bytes_freed"] is None
    assert run("delete", f"{grown}/web", "--recursive").exit_code == 5
    ok(run("delete", f"{grown}/web", "--recursive", "--yes"))
