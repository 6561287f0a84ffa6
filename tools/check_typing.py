"""Types as those see them who use the package: every public name has one, and the examples of the documentation hold.

Run by a Python that has onionskin and its extra ``lint``. mypy is strict; pyright looks at the examples once more, and at
the public names with ``--verifytypes``.
"""

import json
import os
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


if __name__ == "__main__":
    sys.exit(not all([check_examples(), check_public_names()]))
