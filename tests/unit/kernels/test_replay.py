"""What opening makes of the logs of several layers, given byte by byte."""

from pathlib import Path

import pytest
from format.reference_encoder import Record, data, encode_header, encode_log, frame_crc, hole, segment, zero

from onionskin.errors import FormatError
from onionskin.kernels._volume import DataPath

BLOCK = 4096
HEADER = 4096


def make_segment(root: Path, id: bytes, blocks: list[bytes]) -> None:
    header = encode_header(b"ONIONSEG", id, BLOCK)
    (root / f"{id.hex()}.seg").write_bytes(header + b"".join(block * BLOCK for block in blocks))


def layer(root: Path, name: int, records: list[Record], segments: list[tuple[bytes, int]]) -> dict[str, object]:
    id = bytes([name]) * 16
    log = encode_log([records], id)
    path = root / f"{id.hex()}.map"
    path.write_bytes(log)
    crc = frame_crc(log[HEADER:])
    return {"map_path": str(path), "map_id": id, "length": len(log), "frames": 1, "crc": crc, "segments": segments}


def view(root: Path, *layers: dict[str, object]) -> DataPath:
    path = DataPath(
        block_size=BLOCK,
        size_bytes=8 * BLOCK,
        segments_directory=str(root),
        layers_directory=str(root),
        wipe_zero=False,
        writable=False,
    )
    for one in layers:
        path.add_layer(**one)
    path.fold_layers()
    return path


def test_a_hole_after_data_in_one_log_shows_what_lies_below(tmp_path: Path) -> None:
    low, high = b"L" * 16, b"H" * 16
    make_segment(tmp_path, low, [b"a", b"b"])
    make_segment(tmp_path, high, [b"x", b"y"])
    lower = layer(tmp_path, 1, [segment(1, low), data(0, 2, 1, 0)], [(low, 2)])
    upper = layer(tmp_path, 2, [segment(1, high), data(0, 2, 1, 0), zero(2, 1), hole(0, 1)], [(high, 2)])
    path = view(tmp_path, lower, upper)
    assert path.read(0, 3 * BLOCK) == b"a" * BLOCK + b"y" * BLOCK + bytes(BLOCK)


def test_a_hole_in_the_lowest_log_forgets_the_data_before_it(tmp_path: Path) -> None:
    low = b"L" * 16
    make_segment(tmp_path, low, [b"a", b"b"])
    path = view(tmp_path, layer(tmp_path, 1, [segment(1, low), data(0, 2, 1, 0), hole(0, 1)], [(low, 2)]))
    assert path.read(0, 2 * BLOCK) == bytes(BLOCK) + b"b" * BLOCK


def test_a_head_goes_on_with_the_numbers_of_its_log_also_where_that_has_holes(tmp_path: Path) -> None:
    low, own, map_id = b"L" * 16, b"O" * 16, b"M" * 16
    make_segment(tmp_path, low, [b"a", b"b"])
    make_segment(tmp_path, own, [b"x", b"y"])
    lower = layer(tmp_path, 1, [segment(1, low), data(0, 2, 1, 0)], [(low, 2)])
    map_path = tmp_path / f"{map_id.hex()}.map"
    map_path.write_bytes(encode_log([[segment(2, own), data(0, 2, 2, 0), hole(0, 1)]], map_id))

    def head() -> DataPath:
        path = DataPath(
            block_size=BLOCK, size_bytes=8 * BLOCK, segments_directory=str(tmp_path), layers_directory=str(tmp_path),
            wipe_zero=False, writable=True,
        )  # fmt: skip
        path.add_layer(**lower)
        path.open_head(map_path=str(map_path), map_id=map_id, inherited=[], own=own, spare=b"S" * 16)
        path.free_own_slots()
        return path

    path = head()
    path.write(3 * BLOCK, b"new" + bytes(BLOCK - 3))
    path.flush()
    path.close()
    path = head()
    assert path.read(0, 2 * BLOCK) == b"a" * BLOCK + b"y" * BLOCK
    assert path.read(3 * BLOCK, 3) == b"new"
    path.close()


def test_a_log_that_names_a_segment_of_another_layer_is_refused(tmp_path: Path) -> None:
    low = b"L" * 16
    make_segment(tmp_path, low, [b"a"])
    lower = layer(tmp_path, 1, [segment(1, low), data(0, 1, 1, 0)], [(low, 1)])
    upper = layer(tmp_path, 2, [segment(1, low), data(1, 1, 1, 0)], [])
    with pytest.raises(FormatError, match="not the file that the catalog names"):
        view(tmp_path, lower, upper)


def test_a_log_that_gives_a_segment_two_numbers_is_refused(tmp_path: Path) -> None:
    low = b"L" * 16
    make_segment(tmp_path, low, [b"a"])
    with pytest.raises(FormatError):
        view(tmp_path, layer(tmp_path, 1, [segment(1, low), segment(2, low), data(0, 1, 2, 0)], [(low, 1)]))


def test_a_slot_behind_the_end_of_its_segment_is_refused_with_the_segment_s_name(tmp_path: Path) -> None:
    low = b"L" * 16
    make_segment(tmp_path, low, [b"a"])
    with pytest.raises(FormatError, match=low.hex()):
        view(tmp_path, layer(tmp_path, 1, [segment(1, low), data(0, 1, 1, 1)], [(low, 1)]))
