"""The tasks of development: ``nox -l`` lists them, ``nox -s lint`` runs one. ``.ci/run`` is all that must pass.

Each runs in an environment of its own under ``.nox``; those that need the engine install the tree as it is.
"""

import shlex
import tempfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["lint", "types", "test"]
nox.options.reuse_existing_virtualenvs = True

PYTHON_FILES = ("src", "tests", "bench", "tools", "docs", "examples", "setup.py", "noxfile.py")
KERNELS = ("csrc/*/*.[ch]", "tests/kernels/*.c", "tests/fuzz/*.c")


@nox.session
def lint(session: nox.Session) -> None:
    """Style of Python and of the kernels; who imports and includes whom; shape and safety of the workflow files."""
    session.install("ruff>=0.9,<1", "import-linter>=2,<3", "check-jsonschema>=0.31,<1", "zizmor>=1.20,<2")
    session.install("clang-format==19.1.7")
    session.run("ruff", "check", *PYTHON_FILES)
    session.run("ruff", "format", "--check", *PYTHON_FILES)
    kernels = sorted(str(file) for pattern in KERNELS for file in Path().glob(pattern))
    session.run("clang-format", "--dry-run", "--Werror", *kernels)
    session.run("lint-imports", "--no-cache", env={"PYTHONPATH": "src"})
    session.run("python", "tools/check_layers.py")
    workflows = sorted(map(str, Path(".github/workflows").glob("*.yml")))
    session.run("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows)
    session.run("zizmor", "--offline", "--quiet", ".github")


@nox.session
def types(session: nox.Session) -> None:
    """Types of the package, as its users see them too, and the stubs of the extension modules beside what these are."""
    session.install(".[lint]")
    session.run("mypy")
    session.run("python", "tools/check_typing.py")
    session.run("bash", "tools/check_stubs.sh", external=True)


@nox.session
def docs(session: nox.Session) -> None:
    """The site of the documentation, in build/html; ``-- linkcheck`` asks for the addresses elsewhere instead."""
    session.install(".[docs]")
    for builder in session.posargs or ["html"]:
        options = ("-W", "-n", "--keep-going", "-c", "docs", "-b", builder)
        session.run("sphinx-build", *options, ".", f"build/{builder}")


@nox.session
def test(session: nox.Session) -> None:
    """The tests; arguments go to pytest: ``nox -s test -- tests/unit -k wipe``."""
    session.install(".[test]")
    session.run("pytest", *(session.posargs or ["-m", "not slow and not soak"]))


@nox.session
def parallel(session: nox.Session) -> None:
    """Tests that share nothing, each in four threads at once; arguments go to pytest."""
    session.install(".[test]", "pytest-run-parallel>=0.10,<1")
    tests = session.posargs or ["-m", "not slow and not soak and not thread_unsafe", "tests/unit", "tests/format"]
    session.run("pytest", "--parallel-threads=4", "--iterations=1", *tests)


@nox.session
def sanitize(session: nox.Session) -> None:
    """The C kernels alone under the sanitizers; ``-- DIRECTORY thread`` for the thread sanitizer."""
    session.run("bash", "tools/check_kernels.sh", *session.posargs, external=True)


@nox.session(venv_backend="none")
def fuzz(session: nox.Session) -> None:
    """Fuzz what reads bytes of others, each for a minute; ``-- SECONDS`` for longer. Wants clang."""
    session.run("bash", "tools/fuzz.sh", *(session.posargs or ["60"]), external=True)


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmark suite; arguments go to pytest: ``nox -s bench -- --size 1G --disk /mnt``."""
    session.install(".[test,bench]")
    session.run("pytest", "bench", *session.posargs)


@nox.session
def coverage(session: nox.Session) -> None:
    """Which lines of Python and of C the tests run; arguments go to pytest."""
    with tempfile.TemporaryDirectory(prefix="onionskin-coverage-") as tree:
        session.run("bash", "-c", f"git ls-files -z | xargs -0 cp --parents -t {shlex.quote(tree)}", external=True)
        session.install("setuptools>=77", "Cython>=3.1,<4", "gcovr>=8", "numpy", f"{tree}[test,coverage]")
        with session.chdir(tree):
            switch = {"ONIONSKIN_COVERAGE": "1"}
            session.run("python", "setup.py", "-q", "build_ext", "--inplace", "--force", env=switch)
            tests = session.posargs or [
                "-m",
                "not slow and not soak",
                "tests/unit",
                "tests/format",
                "tests/cli",
                "tests/nbd",
            ]
            session.run("coverage", "run", "-m", "pytest", "-q", *tests, env={"PYTHONPATH": "src"})
            session.run("coverage", "combine", "-q")
            session.run("coverage", "report")
            session.run("gcovr", "--root", ".", "--filter", "csrc/", "--merge-lines", "build")


@nox.session(venv_backend="none")
def wheels(session: nox.Session) -> None:
    """The sdist and the Linux wheels in dist, without a container, each tried where no compiler is."""
    session.run("python3", "tools/build_wheels.py", *session.posargs, external=True)
