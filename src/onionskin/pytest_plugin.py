"""The pytest plugin: each test gets a fresh clone of a golden image, which is dropped behind it (docs/testing.md).

What must hold: pytest imports this at every start, also for projects that use none of it, so it imports the engine only
in fixtures; a golden image is never changed; whatever ends a test, its clones go: behind it, or with the next run.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from onionskin.store import Store
    from onionskin.volume import Volume

_PREFIX = "pytest"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option and the ini key that name the golden image."""
    what = "the disk that each test gets a clone of: a raw image file, or STORE/VOLUME@SNAPSHOT"
    parser.getgroup("onionskin").addoption("--onionskin-golden", metavar="IMAGE", help=what)
    parser.addini("onionskin_golden", f"{what}; relative to this file")


@pytest.fixture(scope="session")
def onionskin_store(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Store]":
    """A store of the test run's own, in pytest's temporary directory: one for each worker of pytest-xdist."""
    from onionskin.store import Store

    with Store(tmp_path_factory.mktemp("onionskin")) as store:
        yield store


@pytest.fixture(scope="session")
def onionskin_golden(pytestconfig: pytest.Config) -> "str | Path":
    """The golden image: the path of a raw image file, or STORE/VOLUME@SNAPSHOT. Override it to make one."""
    option = pytestconfig.getoption("--onionskin-golden")
    if option:
        return Path(pytestconfig.invocation_params.dir, option)
    found = str(pytestconfig.getini("onionskin_golden"))
    if not found:
        pytest.fail(
            "there is no golden image: give --onionskin-golden, set onionskin_golden in the ini file, or override the "
            "fixture onionskin_golden",
            pytrace=False,
        )
    return (pytestconfig.inipath.parent if pytestconfig.inipath else pytestconfig.rootpath) / found


@pytest.fixture(scope="session")
def _onionskin_source(onionskin_golden: "str | Path", request: pytest.FixtureRequest) -> "Iterator[_Golden]":
    golden = Path(onionskin_golden)
    source = golden.name
    if "@" in source and not golden.exists():
        from onionskin.store import Store

        with Store(golden.parent, create=False) as store:
            yield _Golden(store, source)
        return
    store = request.getfixturevalue("onionskin_store")
    with store.create("golden", base=golden) as made:
        made.snapshot("golden")
    yield _Golden(store, "golden@golden")


@pytest.fixture
def onionskin_clone(_onionskin_source: "_Golden") -> "Iterator[Callable[[], Volume]]":
    """Return a function that makes a clone of the golden image and opens it for writing; all are dropped after the test."""
    with ExitStack() as clones:  # what the test left of one, and in whatever state, keeps no other from being dropped
        yield lambda: clones.enter_context(_onionskin_source.clone())


@pytest.fixture
def onionskin_volume(onionskin_clone: "Callable[[], Volume]") -> "Volume":
    """A fresh clone of the golden image, open for writing, which is dropped after the test."""
    return onionskin_clone()


class _Golden:
    """A snapshot that clones are made of. Their names say which process they belong to."""

    def __init__(self, store: "Store", source: str) -> None:
        self._store, self._source = store, source
        self._count = 0
        self._drop_leftovers()

    def clone(self) -> "AbstractContextManager[Volume]":
        from os import getpid

        from onionskin.storage.locks import start_ticks

        self._count += 1
        name = f"{_PREFIX}-{getpid()}-{start_ticks(getpid())}-{self._count}"
        return self._store.temporary(self._source, name=name)

    def _drop_leftovers(self) -> None:
        """Drop the clones of runs that were killed; one that is open somewhere stays."""
        from onionskin.errors import OnionskinError
        from onionskin.storage.locks import start_ticks

        for name in self._store:
            fields = name.split("-")
            if len(fields) != 4 or fields[0] != _PREFIX or not all(field.isdigit() for field in fields[1:]):
                continue
            if start_ticks(int(fields[1])) != int(fields[2]):
                with suppress(OnionskinError):
                    self._store.delete(name, recursive=True)


def pytest_report_header(config: pytest.Config) -> Any:
    """Say which golden image is used, where one is named."""
    golden = config.getoption("--onionskin-golden") or config.getini("onionskin_golden")
    return f"onionskin: clones of {golden}" if golden else None
