"""The files and functions that docs/design.md lists for each journey are where it says."""

import re

import pytest
from docs.blocks import ROOT

DESIGN = (ROOT / "docs/design.md").read_text()
JOURNEYS = re.search(r"^## Journeys$(.*?)^## ", DESIGN, re.DOTALL | re.MULTILINE)
STEPS = sorted(set(re.findall(r"`([\w/]+\.(?:py|pyx|c|h)):([\w.]+)`", JOURNEYS[1] if JOURNEYS else "")))


@pytest.mark.parametrize(("path", "function"), STEPS, ids=":".join)
def test_a_step_of_a_journey_is_there(path: str, function: str) -> None:
    text = (ROOT / (path if path.startswith("csrc/") else f"src/onionskin/{path}")).read_text()
    for name in function.split("."):
        assert re.search(
            rf"^ *(?:async )?(?:def|class|cdef class) {name}\b|^[a-z][\w *]*\b{name}\(", text, re.MULTILINE
        )


def test_the_two_journeys_are_listed_from_python_to_the_system() -> None:
    listed = {function for _, function in STEPS}
    assert {"Volume.readinto", "read_range", "Volume.snapshot", "onion_volumes_cut", "onion_head_log_append"} <= listed
