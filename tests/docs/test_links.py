"""Links between the Markdown files of the repository lead somewhere, as GitHub resolves them.

Sphinx checks those of the site with ``-n``; here nothing but the files is needed.
"""

import re
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from docs.blocks import PAGES, ROOT
from markdown_it import MarkdownIt
from markdown_it.token import Token

FILES = [*PAGES, *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"))]
PARSER = MarkdownIt("commonmark").enable("table")


def inline(page: Path) -> list[Token]:
    return [child for token in PARSER.parse(page.read_text()) for child in token.children or ()]


def links(page: Path) -> list[str]:
    """Return the targets of links and images."""
    found = [str(token.attrs.get("href") or token.attrs.get("src") or "") for token in inline(page)]
    return [target for target in found if target]


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes from headings."""
    tokens = PARSER.parse(page.read_text())
    titles = [
        "".join(child.content for child in tokens[index + 1].children or () if child.type in ("text", "code_inline"))
        for index, token in enumerate(tokens)
        if token.type == "heading_open"
    ]
    seen: Counter[str] = Counter()
    made = set()
    for title in titles:
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        made.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return made


def broken(page: Path, target: str) -> str | None:
    """Say what is wrong with a link, if anything; addresses elsewhere are not looked at."""
    parts = urlsplit(target)
    if parts.scheme or parts.netloc:
        return None if parts.scheme in ("https", "http") else f"{target}: of an unknown scheme"
    path = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if not path.is_relative_to(ROOT) or not path.exists():
        return f"{target}: no such file"
    if parts.fragment and (path.suffix != ".md" or parts.fragment not in anchors(path)):
        return f"{target}: no such heading"
    return None


@pytest.mark.parametrize("page", FILES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    assert [wrong for target in links(page) if (wrong := broken(page, target))] == []


def test_every_page_is_linked_from_the_first() -> None:
    first = ROOT / "docs" / "index.md"
    linked = {(first.parent / urlsplit(target).path).resolve() for target in links(first)}
    assert {page for page in PAGES if page not in (first, *linked)} == set()


def named_paths(page: str, heading: str) -> list[str]:
    """Return the files and directories that a section names in backquotes."""
    section = re.split(rf"^## {heading}$", (ROOT / page).read_text(), flags=re.MULTILINE)[1]
    section = re.split(r"^## ", section, flags=re.MULTILINE)[0]
    return re.findall(r"`((?:[a-z_]+/)*[a-z_]+(?:/|\.(?:py|pyx|c|h|md)))`", section)


@pytest.mark.parametrize(("page", "heading"), [("CONTRIBUTING.md", "Find your way"), ("docs/design.md", "Journeys")])
def test_the_ways_through_the_source_name_files_that_are_there(page: str, heading: str) -> None:
    paths = named_paths(page, heading)
    assert len(paths) > 12
    roots = (ROOT, ROOT / "src" / "onionskin")
    assert [path for path in paths if not any((root / path).exists() for root in roots)] == []


@pytest.mark.parametrize("target", ["nowhere.md", "#no-such-heading", "docs/cli.md#errors-", "../outside.md"])
def test_a_link_to_nowhere_is_noticed(target: str) -> None:
    assert broken(ROOT / "README.md", target)
