"""Who may include whom in csrc, and what an extension module may import: .importlinter says the same of the Python files.

Prints each line that reaches the wrong way; the exit status is 1 where there is one.

    python tools/check_layers.py [TREE]
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

# Room of csrc -> the rooms whose headers it may include, beside its own.
INCLUDES = {
    "base": set(),
    "index": {"base"},
    "layer": {"base", "index"},
    "bulk": {"base"},
    "volume": {"base", "index", "layer", "bulk"},
    "nbd": {"base", "volume"},
}
# Of the volume the server knows the contract, and nothing else.
ONLY = {("nbd", "volume"): {"volume/volume.h"}}
# Room of src/onionskin -> what its extension modules may import, beside other packages.
IMPORTS = {"kernels": {"errors", "base"}, "nbd": {"errors", "base", "kernels"}}

INCLUDE = re.compile(r'^\s*#\s*include "(?P<header>[^"]+)"')
IMPORT = re.compile(r"^\s*(?:from\s+onionskin\.(\w+)|from\s+(onionskin)\s+c?import|c?import\s+onionskin(?:\.(\w+))?)")


def wrong_includes(csrc: Path) -> Iterator[str]:
    """Yield each include that is not written from csrc, or that reaches into a room which is not below."""
    for file in sorted(csrc.rglob("*.[ch]")):
        room = file.relative_to(csrc).parts[0]
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if not (found := INCLUDE.match(line)):
                continue
            header = found["header"]
            of = header.partition("/")[0]
            if not (csrc / header).is_file():
                yield f"{file}:{number}: {header} is not a path from {csrc}"
            elif of != room and (
                of not in INCLUDES[room]
                or header not in ONLY.get((room, of), {header})
                or header.endswith("/internal.h")
            ):
                yield f"{file}:{number}: {room} may not include {header}"


def wrong_imports(package: Path) -> Iterator[str]:
    """Yield each import of an extension module from a room that is not below."""
    for file in sorted(package.rglob("*.pyx")):
        room = file.relative_to(package).parts[0]
        for number, line in enumerate(file.read_text().splitlines(), 1):
            found = IMPORT.match(line)
            if found and (found[1] or found[3]) not in IMPORTS[room]:
                yield f"{file}:{number}: an extension module of {room} may not import: {line.strip()}"


def main() -> int:
    """Check a tree."""
    tree = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1]
    wrong = [*wrong_includes(tree / "csrc"), *wrong_imports(tree / "src" / "onionskin")]
    for line in wrong:
        print(line)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
