"""Who may include whom in csrc, and what an extension module may import: .importlinter says the same of the Python files.

No two files of csrc call each other either, whether at once or through others: so a file is understood, built and tested
with those under it alone.

Prints each line that reaches the wrong way; the exit status is 1 where there is one.

    python tools/check_layers.py [TREE]
"""

import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

# Room of csrc -> the rooms whose headers it may include, beside its own.
INCLUDES = {
    "base": set(),
    "index": {"base"},
    "layer": {"base", "index"},
    "bulk": {"base"},
    "machine": {"base"},
    "volume": {"base", "index", "layer", "bulk"},
    "nbd": {"base", "volume"},
}
# Of the volume the server knows the contract, and nothing else.
ONLY = {("nbd", "volume"): {"volume/volume.h"}}
# Room of src/onionskin -> what its extension modules may import, beside other packages.
IMPORTS = {"kernels": {"errors", "base", "kernels"}, "nbd": {"errors", "base", "kernels"}}

INCLUDE = re.compile(r'^\s*#\s*include "(?P<header>[^"]+)"')
COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
# A function that other files see begins at the start of a line; all their names begin so.
DEFINED = re.compile(r"^(?!static\b)\w[\w *]*\b(onion_\w+)\(", re.MULTILINE)
USED = re.compile(r"(?<!struct )(?<!enum )\bonion_\w+\b")
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


def circles(csrc: Path) -> Iterator[str]:
    """Yield a circle of files that call each other's functions, where there is one."""
    code = {file: COMMENT.sub("", file.read_text()) for file in sorted(csrc.rglob("*.c"))}
    home = {name: file for file, text in code.items() for name in DEFINED.findall(text)}
    calls = {file: {home[name] for name in USED.findall(text) if name in home} - {file} for file, text in code.items()}
    try:
        TopologicalSorter(calls).prepare()
    except CycleError as error:
        _, circle = error.args
        yield "a circle of calls: " + " -> ".join(str(file) for file in reversed(circle))


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
    csrc = tree / "csrc"
    wrong = [*wrong_includes(csrc), *circles(csrc), *wrong_imports(tree / "src" / "onionskin")]
    for line in wrong:
        print(line)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
