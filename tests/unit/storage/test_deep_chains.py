"""Two thousand layers, in a process that may open few files."""

import resource
from pathlib import Path

import pytest

import onionskin

LAYERS = 2000
BLOCK = 4096


@pytest.fixture
def few_descriptors():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
def test_a_chain_of_2000_layers_is_made_opened_read_and_merged(tmp_path: Path, few_descriptors: None) -> None:
    def block(i: int) -> bytes:
        return i.to_bytes(4, "little") * (BLOCK // 4)

    with onionskin.Store(tmp_path / "store") as store:
        with store.create("web", size=LAYERS * BLOCK) as web:
            for i in range(LAYERS):
                web.write(i * BLOCK, block(i))
                web.snapshot(f"s{i}")
        whole = b"".join(block(i) for i in range(LAYERS))
        with store.open("web") as web:
            assert web.read(0, web.size_bytes) == whole
            for i in range(0, LAYERS, 20):
                web.merge(f"s{i}")
            assert web.read(0, web.size_bytes) == whole
        with store.open("web", snapshot="s999") as view:
            assert view.read(0, 1000 * BLOCK) == whole[: 1000 * BLOCK]
            assert view.read(1000 * BLOCK, BLOCK) == bytes(BLOCK)
