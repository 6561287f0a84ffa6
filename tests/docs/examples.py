"""Writes the Python of the documentation into files, for type checkers: ``cd tests && python -m docs.examples DIRECTORY``.

Each block is a program of its own, named by its page and line.
"""

import sys
from pathlib import Path

from docs.blocks import PAGES, blocks_of


def write_examples(directory: Path) -> list[Path]:
    """Write each Python block to a file of its own, and return the files."""
    written = []
    for page in PAGES:
        for block in blocks_of(page):
            if block.language == "python":
                path = directory / f"{page.stem.lower().replace('-', '_')}_{block.line}.py"
                path.write_text(block.text)
                written.append(path)
    return written


if __name__ == "__main__":
    for path in write_examples(Path(sys.argv[1])):
        print(path)
