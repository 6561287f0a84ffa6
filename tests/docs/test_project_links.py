"""The metadata of the package leads to the repository that built it, and to pages that are in it."""

import ast
import tomllib
from typing import Any
from urllib.parse import urlsplit

from docs.blocks import ROOT

SOURCE = (ROOT / "setup.py").read_text()
HERE = {"GITHUB_SERVER_URL": "https://forge.example", "GITHUB_REPOSITORY": "somebody/onionskin"}


def project_links(environment: dict[str, str]) -> dict[str, str]:
    """Call the function of setup.py alone: the rest of it builds."""
    (function,) = [node for node in ast.parse(SOURCE).body if getattr(node, "name", "") == "project_links"]
    found: dict[str, Any] = {"Mapping": dict}
    exec(compile(ast.Module([function], []), "setup.py", "exec"), found)
    links = found["project_links"](environment)
    assert isinstance(links, dict)
    return links


def test_what_the_workflow_builds_leads_to_its_repository() -> None:
    links = project_links(HERE)
    assert set(links) == {"Homepage", "Documentation", "Source", "Changelog", "Issues"}
    for link in links.values():
        assert link.startswith("https://forge.example/somebody/onionskin")
        _, _, path = urlsplit(link).path.partition("/blob/HEAD/")
        assert (ROOT / path).exists()


def test_what_is_built_elsewhere_names_no_repository() -> None:
    links = project_links({})
    assert links["Homepage"] == "https://pypi.org/project/onionskin/"
    assert all(link.startswith(links["Homepage"]) for link in links.values())


def test_the_links_are_in_the_metadata_of_wheels_too() -> None:
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "urls" in about["project"]["dynamic"]
    assert "project_urls=project_links(os.environ)" in SOURCE
    assert set(HERE) <= set(about["tool"]["cibuildwheel"]["linux"]["environment-pass"])
