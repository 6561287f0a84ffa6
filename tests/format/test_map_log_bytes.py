"""The bytes of headers and map logs: the C code against golden files and an encoder in plain Python."""

import struct
from pathlib import Path

import pytest
from format import reference_encoder as reference
from format.reference_encoder import MAP_ID, SEGMENT_A, SEGMENT_B
from hypothesis import given
from hypothesis import strategies as st

from onionskin.errors import FormatError
from onionskin.kernels import _maplog
from onionskin.kernels._maplog import LayerMap

SMALL = reference.GOLDEN["small.map"]
# Where each frame of SMALL begins, and its end.
FRAME_EDGES = [4096]
for _records in reference.GOLDEN_FRAMES:
    FRAME_EDGES.append(FRAME_EDGES[-1] + 32 + 24 * len(_records))


def load(path: Path, log: bytes, **sealed: int) -> LayerMap:
    path.write_bytes(log)
    return LayerMap.load(str(path), map_id=MAP_ID, block_size=4096, block_count=256, **sealed)


def records_of(log: bytes) -> list[list[reference.Record]]:
    return [
        [reference.Record(*(int(field) for field in record)) for record in frame.records]
        for frame in _maplog.decode_log(log)[0]
    ]


@pytest.mark.parametrize("file_name", sorted(reference.GOLDEN))
def test_golden_files_are_what_the_reference_encodes(file_name: str) -> None:
    assert (reference.GOLDEN_DIRECTORY / file_name).read_bytes() == reference.GOLDEN[file_name]


def test_golden_segment_header_is_what_c_encodes_and_decodes() -> None:
    golden = (reference.GOLDEN_DIRECTORY / "header.seg").read_bytes()
    assert _maplog.encode_header(b"ONIONSEG", block_size=65536, uuid=SEGMENT_A, wipe_zero=True) == golden
    assert _maplog.decode_header(golden, b"ONIONSEG") == (1, 65536, 0, 1, SEGMENT_A)


def test_golden_map_log_decodes_to_its_records() -> None:
    golden = (reference.GOLDEN_DIRECTORY / "small.map").read_bytes()
    frames, length, torn = _maplog.decode_log(golden)
    assert records_of(golden) == reference.GOLDEN_FRAMES
    assert (length, torn) == (len(golden), False)
    assert [frame.offset for frame in frames] == FRAME_EDGES[:-1]
    assert [frame.sequence for frame in frames] == [1, 2, 3]
    assert frames[-1].crc == reference.frame_crc(golden[FRAME_EDGES[2] :])


def test_golden_map_log_loads_to_its_runs(tmp_path: Path) -> None:
    layer = load(tmp_path / "m", SMALL, length=len(SMALL), frames=3)
    assert layer.runs().tolist() == [
        (0, 4, 1, 1, 0),
        (4, 2, 2, 0, 0),
        (6, 2, 1, 1, 6),
        (200, 56, 1, 2, 0xFFFFFF00),
        (256, 255, 2, 0, 0),
        (511, 1, 1, 1, 8),
    ]
    assert layer.segments == [SEGMENT_A, SEGMENT_B]
    assert (layer.size_bytes, layer.block_count) == (2 << 20, 512)


def test_an_empty_log_is_an_empty_layer(tmp_path: Path) -> None:
    layer = load(tmp_path / "m", reference.GOLDEN["empty.map"], length=4096, frames=0, crc=0)
    assert len(layer.runs()) == 0
    assert layer.size_bytes is None


def test_a_log_cut_at_any_byte_keeps_exactly_its_whole_frames() -> None:
    for length in range(4096, len(SMALL) + 1):
        frames, end, torn = _maplog.decode_log(SMALL[:length])
        whole = sum(edge <= length for edge in FRAME_EDGES[1:])
        assert (len(frames), end, torn) == (whole, FRAME_EDGES[whole], length != FRAME_EDGES[whole])


def test_a_header_cut_at_any_byte_is_refused() -> None:
    for length in range(4096):
        with pytest.raises(FormatError):
            _maplog.decode_log(SMALL[:length])


def test_a_head_cut_at_any_byte_opens_with_its_whole_frames(tmp_path: Path) -> None:
    for length in [*range(0, 4096, 61), *range(4096, len(SMALL) + 1)]:
        layer = load(tmp_path / "m", SMALL[:length])
        whole = sum(edge <= length for edge in FRAME_EDGES[1:])
        assert layer.map_frames == whole
        assert layer.map_length == (FRAME_EDGES[whole] if length >= 4096 else 0)
        assert layer.torn == (length < 4096 or length != FRAME_EDGES[whole])


def test_a_sealed_layer_that_is_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    for length in [*range(0, 4096, 61), *range(4096, len(SMALL))]:
        with pytest.raises(FormatError, match="the catalog says"):
            load(tmp_path / "m", SMALL[:length], length=len(SMALL), frames=3)


def test_any_flipped_bit_is_noticed() -> None:
    for position in range(len(SMALL)):
        for bit in range(8):
            damaged = bytearray(SMALL)
            damaged[position] ^= 1 << bit
            if position < FRAME_EDGES[2]:
                with pytest.raises(FormatError):
                    _maplog.decode_log(damaged)
            else:  # the last frame: what a crash leaves looks the same
                frames, end, torn = _maplog.decode_log(damaged)
                assert (len(frames), end, torn) == (2, FRAME_EDGES[2], True)


def test_any_damaged_byte_of_a_sealed_layer_is_refused(tmp_path: Path) -> None:
    for position in [*range(0, 4096, 61), *range(4096, len(SMALL))]:
        damaged = bytearray(SMALL)
        damaged[position] ^= 0x10
        with pytest.raises(FormatError, match=str(tmp_path)):
            load(tmp_path / "m", damaged, length=len(SMALL), frames=3)


def test_what_stands_behind_a_sealed_log_is_ignored(tmp_path: Path) -> None:
    layer = load(tmp_path / "m", SMALL + b"x" * 999, length=len(SMALL), frames=3)
    assert (layer.map_length, layer.torn) == (len(SMALL), False)


@pytest.mark.parametrize("wrong", [{"frames": 2}, {"crc": 1}])
def test_a_sealed_log_with_other_frames_or_crc_is_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(FormatError, match="catalog says otherwise"):
        load(tmp_path / "m", SMALL, **{"length": len(SMALL), "frames": 3, **wrong})


@pytest.mark.parametrize("change", [{"version": 0}, {"version": 2}, {"incompatible": 1}, {"incompatible": 1 << 63}])
def test_an_unknown_version_or_incompatible_feature_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(FormatError, match="newer onionskin"):
        _maplog.decode_header(reference.encode_header(b"ONIONMAP", MAP_ID, **change), b"ONIONMAP")


def test_an_unknown_compatible_feature_is_accepted() -> None:
    header = reference.encode_header(b"ONIONMAP", MAP_ID, compatible=1 << 40)
    assert _maplog.decode_header(header, b"ONIONMAP").compatible == 1 << 40


@pytest.mark.parametrize("block_size", [0, 512, 4097, 12288, 1 << 22, 0xFFFFFFFF])
def test_an_impossible_block_size_is_refused(block_size: int) -> None:
    with pytest.raises(FormatError, match="impossible"):
        _maplog.decode_header(reference.encode_header(b"ONIONMAP", MAP_ID, block_size), b"ONIONMAP")


@pytest.mark.parametrize("rest", [b"\1", bytes(4043) + b"\1"])
def test_reserved_bytes_of_a_header_must_be_zero(rest: bytes) -> None:
    with pytest.raises(FormatError):
        _maplog.decode_header(reference.encode_header(b"ONIONMAP", MAP_ID, rest=rest), b"ONIONMAP")


def test_a_segment_is_not_taken_for_a_map() -> None:
    with pytest.raises(FormatError, match="not a ONIONMAP file"):
        _maplog.decode_header(reference.GOLDEN["header.seg"], b"ONIONMAP")


@pytest.mark.parametrize(("uuid", "block_size"), [(SEGMENT_A, 4096), (MAP_ID, 8192)])
def test_the_map_of_another_layer_is_refused(tmp_path: Path, uuid: bytes, block_size: int) -> None:
    with pytest.raises(FormatError, match="right file"):
        load(tmp_path / "m", reference.encode_log([], uuid, block_size))


def test_a_header_of_zeros_is_a_head_that_was_never_synced(tmp_path: Path) -> None:
    layer = load(tmp_path / "m", bytes(4096) + SMALL[4096:4120])
    assert (layer.torn, layer.map_length) == (True, 0)


def test_a_header_of_zeros_before_a_whole_frame_is_damage(tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        load(tmp_path / "m", bytes(4096) + SMALL[4096:])


def test_a_head_that_begins_with_foreign_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        load(tmp_path / "m", b"foreign")


UNSOUND = {
    "unknown kind": reference.Record(0, 1, 0, 6, 0),
    "kind zero": reference.Record(0, 1, 0, 0, 0),
    "reserved": reference.zero(0, 1)._replace(reserved=1),
    "no blocks": reference.zero(0, 0),
    "behind the end": reference.zero(256, 1),
    "over the end": reference.zero(255, 2),
    "index overflows": reference.zero((1 << 64) - 1, 2),
    "hostile count": reference.zero(0, 0xFFFFFFFF),
    "hole with a slot": reference.hole(0, 1)._replace(slot=1),
    "zero with a segment": reference.zero(0, 1)._replace(segment=1),
    "data without a segment": reference.data(0, 1, 0, 0),
    "data in a segment not named": reference.data(0, 1, 2, 0),
    "segment number too large": reference.segment(0xFFFF, SEGMENT_A),
    "segment number zero": reference.segment(0, SEGMENT_A),
    "slot too large": reference.data(0, 1, 1, 0xFFFFFFFF),
    "slots over the last": reference.data(0, 2, 1, 0xFFFFFFFE),
    "size with a count": reference.size(4096)._replace(block_count=1),
    "size too large": reference.size((1 << 46) + 1),
    "size that no memory has an index for": reference.size(1 << 62),
    "another segment of that number": reference.segment(1, SEGMENT_B),
    "another number of that segment": reference.segment(2, SEGMENT_A),
}


@pytest.mark.parametrize("record", UNSOUND.values(), ids=UNSOUND)
def test_an_unsound_record_is_refused(tmp_path: Path, record: reference.Record) -> None:
    frames = [[reference.segment(1, SEGMENT_A)], [reference.zero(0, 1), record]]
    with pytest.raises(FormatError, match=str(tmp_path)):
        load(tmp_path / "m", reference.encode_log(frames, MAP_ID))


def test_the_offset_of_an_unsound_record_is_told(tmp_path: Path) -> None:
    log = reference.encode_log([[reference.zero(0, 1), reference.zero(0, 0)]], MAP_ID)
    with pytest.raises(FormatError, match=f"byte {4096 + 32 + 24}:"):
        load(tmp_path / "m", log)


def test_the_last_slot_and_the_last_segment_are_sound(tmp_path: Path) -> None:
    frames = [[reference.segment(0xFFFE, SEGMENT_A), reference.data(255, 1, 0xFFFE, 0xFFFFFFFE)]]
    layer = load(tmp_path / "m", reference.encode_log(frames, MAP_ID))
    assert layer.lookup(255) == 1 << 32 | 0xFFFFFFFE


@pytest.mark.parametrize("record_count", [2, 1000, 0x0AAAAAAB, 0xFFFFFFFF])
def test_a_hostile_record_count_is_torn_or_damage_but_never_read_past(record_count: int) -> None:
    bad = reference.encode_frame([reference.zero(0, 1)], 1, 0, 0, record_count=record_count)
    header = reference.encode_header(b"ONIONMAP", MAP_ID)
    assert _maplog.decode_log(header + bad) == ([], 4096, True)
    later = reference.encode_frame([reference.zero(0, 1)], 2, 0, reference.frame_crc(bad))
    with pytest.raises(FormatError):
        _maplog.decode_log(header + bad + later)


@pytest.mark.parametrize(("sequence", "previous_crc"), [(3, None), (1, None), (2, 1)])
def test_a_whole_frame_that_does_not_follow_is_damage(sequence: int, previous_crc: int | None) -> None:
    first = reference.encode_frame([reference.zero(0, 1)], 1, 0, 0)
    chain = reference.frame_crc(first) if previous_crc is None else previous_crc
    second = reference.encode_frame([reference.zero(1, 1)], sequence, 0, chain)
    with pytest.raises(FormatError, match=f"byte {4096 + len(first)}:"):
        _maplog.decode_log(reference.encode_header(b"ONIONMAP", MAP_ID) + first + second)


def test_zeros_behind_a_log_are_a_torn_frame() -> None:
    frames, end, torn = _maplog.decode_log(SMALL + bytes(5000))
    assert (len(frames), end, torn) == (3, len(SMALL), True)


def test_records_that_look_like_a_frame_do_not_make_a_torn_frame_look_damaged() -> None:
    # A trim of 0x4d52464f blocks has the frame magic in it, and 3 where a frame has its sequence; the record
    # behind it makes the CRC of a frame without records hold. Only the top bit of the salt is not there.
    magic = int.from_bytes(reference.FRAME_MAGIC, "little")
    fake = struct.pack("<4sIQQI", reference.FRAME_MAGIC, 0, 3, 5, 1)
    lookalike = [reference.zero(0, magic), reference.data(5, 1, 1, reference.crc32c(fake + bytes(4)))]
    frame = reference.encode_frame(lookalike, 1, 0, 0)
    for length in range(1, len(frame)):
        torn = reference.encode_header(b"ONIONMAP", MAP_ID) + frame[:length]
        assert _maplog.decode_log(torn) == ([], 4096, True)


@pytest.mark.parametrize("sequence", [1, 4, 99])
def test_a_frame_behind_a_torn_one_that_cannot_be_a_later_one_does_not_count(sequence: int) -> None:
    other = reference.encode_frame([reference.zero(0, 1)], sequence, 0, 0)
    assert _maplog.decode_log(SMALL + bytes(32) + other)[2]


def test_a_flood_of_frame_headers_is_damage_and_ends_soon() -> None:
    header = reference.encode_frame([], 5, 0, 0)[:28] + bytes(4)
    flood = SMALL + bytes(32) + header * 100_000
    with pytest.raises(FormatError):
        _maplog.decode_log(flood)


records = st.one_of(
    st.builds(reference.hole, st.integers(0, 200), st.integers(1, 56)),
    st.builds(reference.zero, st.integers(0, 200), st.integers(1, 56)),
    st.builds(
        reference.data,
        st.integers(0, 200),
        st.integers(1, 56),
        st.sampled_from([9, 4]),
        st.integers(0, 1 << 31),
    ),
)


@given(st.lists(st.lists(records, max_size=6), max_size=5), st.integers(0, (1 << 64) - 1))
def test_any_log_of_the_reference_is_read_alike(frames: list[list[reference.Record]], salt: int) -> None:
    log = reference.encode_log(frames, MAP_ID, salt=salt)
    assert records_of(log) == frames
    assert all(frame.salt == salt | reference.SALT_MARK for frame in _maplog.decode_log(log)[0])


@given(st.lists(st.lists(records, max_size=6), max_size=5))
def test_any_log_of_the_reference_loads_as_its_records_say(
    tmp_path_factory: pytest.TempPathFactory, frames: list[list[reference.Record]]
) -> None:
    # The numbers of the log (9 and 4) become those of the layer (1 and 2).
    named = [[reference.segment(9, SEGMENT_A), reference.segment(4, SEGMENT_B)], *frames]
    layer = load(tmp_path_factory.mktemp("log") / "m", reference.encode_log(named, MAP_ID))
    model = [0] * 256
    for record in (record for frame in frames for record in frame):
        for i in range(record.block_count):
            number = {9: 1, 4: 2}.get(record.segment, 0)
            data = number << 32 | record.slot + i
            place = {reference.HOLE: 0, reference.ZERO: _maplog.LOCATION_ZERO}.get(record.kind, data)
            model[record.block_index + i] = place
    assert [layer.lookup(i) for i in range(256)] == model


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),  # RFC 3720, B.4, from here on
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_crc32c_gives_the_published_values(data: bytes, expected: int) -> None:
    assert _maplog.crc32c(data) == _maplog.crc32c(data, reference=True) == reference.crc32c(data) == expected


def test_crc32c_by_instruction_equals_the_table_for_all_lengths_and_tails() -> None:
    data = bytes(i * 73 % 251 for i in range(3200))
    for length in [*range(64), *range(1500, 1560), *range(3060, 3090), 3199]:
        for begin in (0, 1):
            part = data[begin : begin + length]
            assert _maplog.crc32c(part, 77) == _maplog.crc32c(part, 77, reference=True)
    assert _maplog.crc32c(data) == reference.crc32c(data)


@given(st.binary(max_size=4000), st.integers(0, 4000))
def test_crc32c_may_be_computed_in_parts(data: bytes, cut: int) -> None:
    assert _maplog.crc32c(data[cut:], _maplog.crc32c(data[:cut])) == _maplog.crc32c(data, reference=True)
