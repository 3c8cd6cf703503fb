"""shards.format.index: tar parsing against tarfile, every kind of damage, and the index files themselves."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shards.build.build import BuildOptions, build
from shards.errors import DataError
from shards.format.index import fingerprint, index_schema, read_index, rows_to_table, write_index
from shards.format.tar import BLOCK, index_tar
from shards.format.verify import verify
from shards.schema import IndexRow
from tests.unit.shards.making import video_corpus


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("index") / "set"
    build(video_corpus(tmp_path_factory.mktemp("videos"), 5), out, BuildOptions(samples_per_shard=3))
    return out


@pytest.fixture
def shard_dir(original: Path, tmp_path: Path) -> Path:
    for path in original.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def make_tar(path: Path, files: dict[str, bytes], kind: int = tarfile.USTAR_FORMAT) -> None:
    with tarfile.open(path, "w", format=kind) as tar:
        for name, payload in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))


@given(
    files=st.dictionaries(st.text("abcüñ./_0", min_size=1, max_size=150), st.binary(max_size=1200), max_size=6),
    kind=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_members_equal_those_of_tarfile(tmp_path: Path, files: dict[str, bytes], kind: int) -> None:
    files = {f"x{name.strip('/')}y": payload for name, payload in files.items()}
    path = tmp_path / "any.tar"
    make_tar(path, files, kind)
    blob = path.read_bytes()
    members = index_tar(path)
    with tarfile.open(path) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar if info.isreg()]
    assert [(member.name, member.offset, member.size) for member in members] == expected
    for member in members:
        assert blob[member.offset : member.offset + member.size] == files[member.name]
        assert member.crc32 == zlib.crc32(files[member.name])


def test_ustar_prefix_and_folders(tmp_path: Path) -> None:
    name = "folder/" * 20 + "a.mp4"
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        info = tarfile.TarInfo(name)
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    assert [member.name for member in index_tar(tmp_path / "a.tar")] == [name]


def damage(path: Path, how: str) -> int:
    """Damage a shard and return the byte offset the error must name."""
    members, blob = index_tar(path), bytearray(path.read_bytes())
    second = members[2].offset - BLOCK
    if how == "inside":
        blob = blob[: members[2].offset + members[2].size // 2]
    elif how == "boundary":
        blob = blob[:second]
    elif how == "one_zero_block":
        end = members[-1].offset + -(-members[-1].size // BLOCK) * BLOCK
        blob, second = blob[: end + BLOCK], end
    elif how == "bad_header":
        blob[second + 3] ^= 0x55
    elif how == "zero_hole":
        blob[second : second + BLOCK] = bytes(BLOCK)
    elif how == "bad_size":
        header = bytearray(blob[second : second + BLOCK])
        header[124:136] = b"hello world\0"
        header[148:156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:]))
        blob[second : second + BLOCK] = header
    path.write_bytes(blob)
    return second


DAMAGES = {
    "inside": "truncated: member of .* bytes is cut off, the file ends at byte",
    "boundary": "truncated: the file ends without the two zero blocks that close a tar",
    "one_zero_block": "truncated: only one of the two zero blocks that close a tar",
    "bad_header": "bad_header: the member header does not match its checksum",
    "zero_hole": "zero_hole: zeros where a member header should be, data follows",
    "bad_size": "bad_header: unreadable member size b'hello world",
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_tars_name_shard_and_offset(shard_dir: Path, how: str) -> None:
    path = shard_dir / "train-000000.tar"
    offset = damage(path, how)
    with pytest.raises(DataError, match=DAMAGES[how]) as caught:
        index_tar(path)
    assert caught.value.where == f"{path}@{offset}" and "rebuild it" in caught.value.fix


@pytest.mark.parametrize("how", DAMAGES)
def test_verify_finds_damage(shard_dir: Path, how: str) -> None:
    damage(shard_dir / "train-000000.tar", how)
    problems = verify(shard_dir)
    assert {problem.shard for problem in problems} == {"train-000000.tar"}
    assert {"sha256", DAMAGES[how].split(":")[0]} <= {problem.rule for problem in problems}
    if how in ("inside", "boundary"):
        assert {problem.key for problem in problems if problem.rule == "crc32"}, "the lost samples are not named"


def test_broken_pax_record(tmp_path: Path) -> None:
    make_tar(tmp_path / "a.tar", {"ü" * 120: b"x"}, tarfile.PAX_FORMAT)
    blob = bytearray((tmp_path / "a.tar").read_bytes())
    blob[BLOCK : BLOCK + 4] = b"abc "
    (tmp_path / "a.tar").write_bytes(blob)
    with pytest.raises(DataError, match=r"a\.tar@0: bad_header: unreadable pax record"):
        index_tar(tmp_path / "a.tar")


def test_missing_tar(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.tar: cannot read the shard \(No such file"):
        index_tar(tmp_path / "gone.tar")


def test_verify_names_the_sample_with_a_flipped_byte(shard_dir: Path) -> None:
    row = next(iter(read_index(shard_dir).rows()))
    for offset, size in ((row.offset, row.size), (row.meta_offset, row.meta_size)):
        path = shard_dir / row.shard
        good = path.read_bytes()
        blob = bytearray(good)
        blob[offset + size // 2] ^= 1
        path.write_bytes(blob)
        problems = verify(shard_dir)
        assert {(problem.key, problem.rule) for problem in problems} == {("", "sha256"), (row.key, "crc32")}
        assert row.sample_id in str(problems[-1])
        path.write_bytes(good)
    assert verify(shard_dir) == []


def test_verify_notices_missing_and_unlisted_shards(shard_dir: Path) -> None:
    (shard_dir / "train-000001.tar").unlink()
    assert [problem.rule for problem in verify(shard_dir)] == ["missing_shard"]
    shard_set = read_index(shard_dir)
    shard_set.manifest.shards.pop()
    write_index(shard_dir, shard_set.table, shard_set.manifest)
    assert {problem.rule for problem in verify(shard_dir)} == {"fingerprint", "unlisted_shard"}


def test_columns_are_those_of_index_row(original: Path) -> None:
    table = pq.read_table(original / "index.parquet")
    assert table.column_names == list(IndexRow._fields)
    assert table.schema.field("text_hash").type == pa.int64()
    assert table.schema == index_schema()


def test_rows_survive_the_round_trip(original: Path) -> None:
    shard_set = read_index(original)
    rows = list(shard_set.rows())
    assert rows_to_table(rows).equals(shard_set.table.combine_chunks())
    assert shard_set.row(3) == rows[3] and len(shard_set) == 5
    assert shard_set.shard_path(rows[0].shard).is_file()


def test_some_columns(original: Path) -> None:
    assert read_index(original, ["text", "frames"]).table.column_names == ["text", "frames"]


def test_fingerprint_sees_every_value_but_not_the_layout(original: Path) -> None:
    shard_set = read_index(original)
    shards, rows = shard_set.manifest.shards, list(shard_set.rows())
    assert fingerprint(shards, rows_to_table(rows)) == shard_set.fingerprint
    chunked = pa.concat_tables([rows_to_table(rows[:2]), rows_to_table(rows[2:])])
    assert fingerprint(shards, chunked) == shard_set.fingerprint
    for change in ({"text": "other"}, {"offset": 1}, {"fps": 24.0}, {"split": "dev"}):
        other = [rows[0]._replace(**change), *rows[1:]]
        assert fingerprint(shards, rows_to_table(other)) != shard_set.fingerprint
    assert fingerprint([{**shards[0], "sha256": "0"}, *shards[1:]], shard_set.table) != shard_set.fingerprint


def test_unreadable_sets(shard_dir: Path) -> None:
    manifest = json.loads((shard_dir / "manifest.json").read_text())
    (shard_dir / "manifest.json").write_text(json.dumps({**manifest, "splits": {"train": 99}}))
    with pytest.raises(DataError, match=r"5 rows with columns .*; the manifest says 99 samples"):
        read_index(shard_dir)
    (shard_dir / "manifest.json").write_text(json.dumps({**manifest, "format_version": 7}))
    with pytest.raises(DataError, match="format version 7"):
        read_index(shard_dir)
    (shard_dir / "manifest.json").write_text(json.dumps(manifest))
    (shard_dir / "index.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"index\.parquet: unreadable index"):
        read_index(shard_dir)
    (shard_dir / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json: unreadable manifest"):
        read_index(shard_dir)
    (shard_dir / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"no manifest\.json: not a shard set, or its build did not finish"):
        read_index(shard_dir)
