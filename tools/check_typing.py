"""Types as those see them who use the package: every public name has one, and the examples of the documentation hold.

Run by a Python that has onionskin and its extra ``lint``. mypy is strict; pyright looks at the examples once more, and at
the public names with ``--verifytypes``.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from docs.examples import write_examples  # noqa: E402

import onionskin  # noqa: E402

PYRIGHT = [sys.executable, "-m", "pyright"]
# pyright asks the first Python on the PATH for its packages; its --verifytypes heeds no --pythonpath.
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def check_examples() -> bool:
    """Check the Python blocks of README.md and docs."""
    with tempfile.TemporaryDirectory(prefix="onionskin-examples-") as directory:
        files = [str(path) for path in write_examples(Path(directory))]
        mypy = subprocess.run([sys.executable, "-m", "mypy", "--strict", "--config-file", "", *files])
        pyright = subprocess.run([*PYRIGHT, *files], env=ENVIRONMENT)
    return mypy.returncode == pyright.returncode == 0


def check_public_names() -> bool:
    """Check that pyright knows the whole type of every public name: nothing is left to what a checker infers."""
    command = [*PYRIGHT, "--verifytypes", "onionskin", "--ignoreexternal", "--outputjson"]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT).stdout
    symbols = {symbol["name"]: symbol for symbol in json.loads(answer)["typeCompleteness"]["symbols"]}
    unknown = [name for name in onionskin.__all__ if not symbols.get(f"onionskin.{name}", {}).get("isTypeKnown")]
    for name in unknown:
        print(f"the type of onionskin.{name} is not wholly known: pyright --verifytypes onionskin says where")
    return not unknown


def check_uses() -> bool:
    """Check that both refuse what is marked in tests/typing/uses.py, and nothing else in it."""
    file = ROOT / "tests" / "typing" / "uses.py"
    marked = {number for number, line in enumerate(file.read_text().splitlines(), 1) if line.endswith("# wrong")}
    mypy = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file", "", "--no-error-summary", file],
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    pyright = subprocess.run([*PYRIGHT, file], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT).stdout
    holds = True
    for checker, said in (("mypy", mypy), ("pyright", pyright)):
        refused = {int(line) for line in re.findall(r"uses\.py:(\d+):(?:\d+)?.*\berror\b", said)}
        for number in sorted(refused ^ marked):
            print(f"{file}:{number}: {checker} {'takes' if number in marked else 'refuses'} this")
        holds &= refused == marked
    return holds


if __name__ == "__main__":
    sys.exit(not all([check_examples(), check_public_names(), check_uses()]))
