"""The pytest plugin, as projects use it: each test here runs a pytest of its own."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import onionskin
import onionskin.store
from onionskin.operations import load_all

# All of the engine before a test begins: pytester forgets what is imported in a test, and one half of the package that is
# imported anew would not know the classes of the other.
load_all()

pytest_plugins = ["pytester"]

TESTS = """
def test_one(onionskin_volume):
    assert onionskin_volume.read(0, 6) == b"golden"
    onionskin_volume.write(0, b"soiled")
    onionskin_volume.snapshot("mine")

def test_two(onionskin_volume):
    assert onionskin_volume.read(0, 6) == b"golden"
"""

Run = Callable[..., pytest.RunResult]


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run pytest with this plugin, and with no other that happens to be installed."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p onionskin.pytest_plugin")
    return lambda *arguments: pytester.runpytest_subprocess("--basetemp=temporary", *arguments)


@pytest.fixture
def image(pytester: pytest.Pytester) -> Path:
    path = pytester.path / "golden.raw"
    path.write_bytes(b"golden".ljust(1 << 20, b"\0"))
    return path


@pytest.fixture
def snapshot(pytester: pytest.Pytester, image: Path) -> str:
    with onionskin.Store(pytester.path / "store") as store, store.create("web", base=image) as volume:
        volume.snapshot("clean")
    return "store/web@clean"


def names_in(path: Path) -> list[str]:
    with onionskin.Store(path, create=False) as store:
        return [info.name for info in store.volumes()]


def test_each_test_has_a_clean_clone_of_an_image_that_an_option_names(
    pytester: pytest.Pytester, run: Run, image: Path
) -> None:
    pytester.makepyfile(TESTS)
    run("--onionskin-golden=golden.raw").assert_outcomes(passed=2)
    assert names_in(next((pytester.path / "temporary").glob("onionskin*"))) == ["golden"]
    assert image.read_bytes()[:6] == b"golden"


@pytest.mark.slow
def test_an_ini_file_names_a_snapshot_beside_it(pytester: pytest.Pytester, run: Run, snapshot: str) -> None:
    pytester.makeini(f"[pytest]\nonionskin_golden = {snapshot}")
    pytester.makepyfile(TESTS)
    inner = pytester.mkdir("inner")
    result = run("--rootdir", inner, "-c", "tox.ini")
    result.assert_outcomes(passed=2)
    assert names_in(pytester.path / "store") == ["web"]


@pytest.mark.slow
def test_a_project_makes_its_golden_image_itself(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makeconftest(
        """
        import pytest

        @pytest.fixture(scope="session")
        def onionskin_golden(onionskin_store):
            with onionskin_store.create("made", size="1G") as volume:
                volume.write(0, b"golden")
                volume.snapshot("ready")
            return f"{onionskin_store.path}/made@ready"
        """
    )
    pytester.makepyfile(TESTS)
    run().assert_outcomes(passed=2)


@pytest.mark.slow
def test_clones_go_behind_a_test_that_fails_or_closes_or_deletes_them(
    pytester: pytest.Pytester, run: Run, snapshot: str
) -> None:
    pytester.makepyfile(
        """
        def test_fails(onionskin_volume):
            assert not onionskin_volume.read(0, 6)

        def test_closes(onionskin_volume):
            onionskin_volume.close()

        def test_deletes(onionskin_volume):
            onionskin_volume.close()
            onionskin_volume.store.delete(onionskin_volume._opened.row.name)

        def test_poisons(onionskin_volume):
            onionskin_volume._path.poison()

        def test_renames(onionskin_volume):
            onionskin_volume.store.rename(onionskin_volume.name, "mine")

        def test_makes_two(onionskin_clone):
            first, second = onionskin_clone(), onionskin_clone()
            first.write(0, b"soiled")
            assert second.read(0, 6) == b"golden"
        """
    )
    run(f"--onionskin-golden={snapshot}").assert_outcomes(passed=5, failed=1)
    assert names_in(pytester.path / "store") == ["web"]


@pytest.mark.slow
def test_a_clone_that_a_test_keeps_in_use_is_an_error_behind_it_and_the_others_go(
    pytester: pytest.Pytester, run: Run, snapshot: str
) -> None:
    pytester.makepyfile(
        """
        def test_clones(onionskin_clone):
            first, second, third = onionskin_clone(), onionskin_clone(), onionskin_clone()
            second.snapshot("s")
            second.store.clone(second.name, "s", "kept")
        """
    )
    result = run(f"--onionskin-golden={snapshot}")
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*StateError*kept*"])
    assert len(names_in(pytester.path / "store")) == 3  # web, the second clone, and what stands on it


@pytest.mark.slow
def test_clones_of_a_run_that_was_killed_go_with_the_next(pytester: pytest.Pytester, run: Run, snapshot: str) -> None:
    pytester.makepyfile(
        test_killed="""
        import os, signal

        def test_is_killed(onionskin_volume):
            os.kill(os.getpid(), signal.SIGKILL)
        """,
        test_after=TESTS,
    )
    run(f"--onionskin-golden={snapshot}", "test_killed.py")
    assert len(names_in(pytester.path / "store")) == 2
    run(f"--onionskin-golden={snapshot}", "test_after.py").assert_outcomes(passed=2)
    assert names_in(pytester.path / "store") == ["web"]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.slow
def test_workers_of_xdist_do_not_meet(pytester: pytest.Pytester, run: Run, snapshot: str, shared: bool) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.parametrize("number", range(8))
        def test_clone(onionskin_volume, number):
            assert onionskin_volume.read(0, 6) == b"golden"
            onionskin_volume.write(0, b"soiled")
        """
    )
    golden = snapshot if shared else "golden.raw"
    run("-p", "xdist", "-n2", f"--onionskin-golden={golden}").assert_outcomes(passed=8)
    assert names_in(pytester.path / "store") == ["web"]


@pytest.mark.slow
def test_a_run_without_a_golden_image_says_how_to_name_one(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(TESTS)
    result = run()
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(["*there is no golden image: give --onionskin-golden*"])


def test_a_run_that_uses_no_fixture_imports_nothing_of_the_engine(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        """
        import sys

        def test_imports():
            assert "onionskin.pytest_plugin" in sys.modules
            assert not {"numpy", "sqlite3", "onionskin.store"} & sys.modules.keys()
        """
    )
    run().assert_outcomes(passed=1)


def test_pytest_finds_the_plugin_where_the_package_is_installed() -> None:
    text = Path(__file__).parents[2].joinpath("pyproject.toml").read_text()
    assert '[project.entry-points.pytest11]\nonionskin = "onionskin.pytest_plugin"\n' in text
    subprocess.run([sys.executable, "-c", "import onionskin.pytest_plugin"], check=True)
