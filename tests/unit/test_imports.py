"""What is imported, and when: NumPy takes most of the time that a start takes, and no start waits for it in vain.

Modules are counted, and not milliseconds, which a busy machine stretches.
"""

import subprocess
import sys

import pytest

HEAVY = "{'numpy', 'rich', 'sqlite3', 'asyncio'}"


def run(program: str) -> None:
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


def test_importing_the_package_imports_nothing_heavy() -> None:
    run(f"import sys, onionskin; assert not {HEAVY} & sys.modules.keys(), sys.modules.keys()")


def test_errors_can_be_named_without_numpy() -> None:
    run("import sys, onionskin; onionskin.StateError; onionskin.parse_size; assert 'numpy' not in sys.modules")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["bench", "--help"], ["demo", "--help"], ["read"]])
def test_a_command_line_that_opens_nothing_imports_no_numpy(arguments: list[str]) -> None:
    run(
        "import sys; from onionskin.cli.verbs import onionskin\n"
        f"try: onionskin({arguments!r})\n"
        "except SystemExit: pass\n"
        f"assert not {HEAVY} & sys.modules.keys(), {HEAVY} & sys.modules.keys()\n"
    )


def test_every_public_name_is_there() -> None:
    run("import onionskin; assert all(getattr(onionskin, name) for name in onionskin.__all__)")
