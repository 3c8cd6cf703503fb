"""Reading samples: the right bytes, damage named, handles bounded, nothing shared between processes."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shards.errors import DataError
from shards.format.index import read_index
from shards.load.read_ahead import ReadAhead
from shards.load.reader import Reader, wanted_frames
from shards.media.video import VideoOptions, transcode
from shards.order.items import as_items
from shards.order.options import PlanOptions, Source, kept_frames
from shards.order.plan import Plan
from shards.schema import FrameFolder
from tests.unit.shards.shard_sets import in_memory, write_texts, write_videos

PAYLOADS = [bytes([number]) * (700 + 97 * number) for number in range(25)]


@pytest.fixture
def videos(tmp_path: Path) -> Reader:
    return clip_reader(write_videos(tmp_path / "videos", PAYLOADS, [4] * 25))


def clip_reader(folder: Path, open_files: int = 64) -> Reader:
    return Reader(Plan([Source(read_index(folder))], PlanOptions("clip")), open_files=open_files)


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as handle:
        handle.seek(offset)
        handle.write(data)


def open_files() -> list[str]:
    """Tars this process holds open."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # another thread closed it
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return [target for target in found if target.endswith(".tar")]


def test_payload_and_meta(videos: Reader) -> None:
    for sample in (0, 24, 7):
        assert videos.payload(sample) == PAYLOADS[sample]
        assert videos.payload(sample, 100, 50) == PAYLOADS[sample][100:150]
        assert videos.meta(sample)["text"] == f"text number {sample}"


def test_a_reader_that_reads_ahead_gives_what_the_reader_gives(videos: Reader) -> None:
    ahead = ReadAhead(videos, as_items([videos.plan.epoch(0).item(number) for number in (3, 5, 3)]))
    for sample in range(25):
        assert ahead.row(sample) == videos.row(sample) == videos.plan.samples.row(sample)
        assert ahead.payload(sample) == PAYLOADS[sample] and ahead.meta(sample) == videos.meta(sample)


def test_a_range_outside_the_payload_is_refused(videos: Reader) -> None:
    with pytest.raises(DataError, match=r"000000.tar:clip0003 \(made/clip0003\): bytes 900..1100 asked of a payload"):
        videos.payload(3, 900, 200)


def test_changed_bytes_name_shard_and_key(videos: Reader) -> None:
    plan = videos.plan
    overwrite(plan.samples.shard_path(13), int(plan.samples.columns["offset"][13]) + 5, b"\xff")
    with pytest.raises(DataError, match=r"train-000001.tar:clip0013 .*: the bytes do not match the CRC-32"):
        videos.payload(13)
    assert Reader(plan, verify=False).payload(13) != PAYLOADS[13]
    assert videos.payload(13, 6, 4) == PAYLOADS[13][6:10], "a part cannot be checked"
    assert videos.payload(12) == PAYLOADS[12]


def test_changed_metadata_is_named(videos: Reader) -> None:
    plan = videos.plan
    overwrite(plan.samples.shard_path(2), int(plan.samples.columns["meta_offset"][2]), b"#")
    with pytest.raises(DataError, match=r"clip0002 .*the metadata does not match its CRC-32"):
        videos.meta(2)
    with pytest.raises(DataError, match=r"clip0002 .*the metadata cannot be parsed"):
        Reader(plan, verify=False).meta(2)


def test_a_truncated_shard_is_named(videos: Reader) -> None:
    plan = videos.plan
    os.truncate(plan.samples.shard_path(0), int(plan.samples.columns["offset"][5]) + 10)
    assert videos.payload(4) == PAYLOADS[4]
    with pytest.raises(DataError, match=r"clip0005 .*the shard is truncated: bytes"):
        videos.payload(5)


def test_a_missing_shard_is_named(videos: Reader) -> None:
    videos.plan.samples.shard_path(20).unlink()
    with pytest.raises(DataError, match=r"train-000002.tar:clip0020 .*cannot read the shard \(No such file"):
        videos.payload(20)


def test_other_operating_system_errors_are_not_blamed_on_the_data(
    videos: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(OSError, match="Too many open files"):
        videos.payload(0)


def test_few_files_stay_open_and_the_oldest_goes_first(tmp_path: Path) -> None:
    reader = clip_reader(write_videos(tmp_path / "set", PAYLOADS, [4] * 25, per_shard=5), open_files=2)
    for sample in (0, 6, 1, 12):  # shards 0, 1, 0 again, 2: shard 1 is the one unused longest
        reader.payload(sample)
    tars = sorted(Path(name).name for name in open_files() if name.startswith(str(tmp_path)))
    assert tars == ["train-000000.tar", "train-000002.tar"]
    reader.close()
    assert not [name for name in open_files() if name.startswith(str(tmp_path))]
    assert reader.payload(3) == PAYLOADS[3]
    del reader
    assert not [name for name in open_files() if name.startswith(str(tmp_path))]


def test_a_pickled_reader_opens_its_own_files(videos: Reader) -> None:
    videos.payload(0)
    copy = pickle.loads(pickle.dumps(videos))
    assert copy.payload(11) == PAYLOADS[11] and copy.verify and copy.open_files == videos.open_files


def test_a_forked_reader_reads_and_leaves_the_parents_files_alone(videos: Reader) -> None:
    videos.payload(0)
    child = os.fork()
    if not child:
        correct = videos.payload(1) == PAYLOADS[1] and videos.payload(0) == PAYLOADS[0]
        videos.close()
        os._exit(0 if correct else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert videos.payload(0) == PAYLOADS[0]


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_tokens_of_whole_documents_and_pieces(tmp_path: Path, dtype: str) -> None:
    documents = [np.arange(start, start + 3 + 11 * start, dtype=dtype) for start in range(20)]
    folder = write_texts(tmp_path / "texts", documents)
    plan = Plan([Source(read_index(folder))], PlanOptions("pack", block_tokens=64))
    reader = Reader(plan)
    seen = [np.zeros(len(document), dtype=int) for document in documents]
    for element in plan.epoch(0).elements:
        tokens = reader.tokens(element)
        sample, start, length = element.item()
        assert tokens.dtype == dtype and np.array_equal(tokens, documents[sample][start : start + length])
        seen[sample][start : start + length] += 1
    assert all((counts == 1).all() for counts in seen)
    with pytest.raises(DataError, match="a text document has no metadata member"):
        reader.meta(0)


def test_a_damaged_document_of_a_pack_is_named(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts", [np.arange(n, n + 9, dtype="<u2") for n in range(40)], per_shard=8)
    plan = Plan([Source(read_index(folder))], PlanOptions("pack", block_tokens=360, shuffle=False))
    item = plan.epoch(0).item(0)
    for open_at_once in (64, 2):  # all shards of the pack fit, or not
        documents = Reader(plan, open_files=open_at_once).documents(item)
        assert [document[0] for document in documents] == list(range(40))
    overwrite(plan.samples.shard_path(21), int(plan.samples.columns["offset"][21]), b"##")
    with pytest.raises(DataError, match=r"train-000002.tar:docs-.* \(made/clip0021\): the bytes do not match"):
        Reader(plan).documents(item)
    assert len(Reader(plan, verify=False).documents(item)) == 40
    os.truncate(plan.samples.shard_path(39), int(plan.samples.columns["offset"][39]))
    with pytest.raises(DataError, match=r"clip0039.*the shard is truncated"):
        Reader(plan, verify=False).documents(item)


def test_a_token_count_that_contradicts_the_bytes_is_named() -> None:
    plan = Plan([Source(in_memory("text", [5], size=[13]))], PlanOptions("pack", block_tokens=8))
    with pytest.raises(DataError, match="13 bytes cannot hold 5 tokens of 2 or 4 bytes"):
        Reader(plan).tokens(plan.epoch(0).elements[0])


@given(st.integers(1, 400), st.integers(0, 64), st.integers(1, 7))
def test_wanted_frames_are_evenly_spread(stored: int, limit: int, stride: int) -> None:
    wanted = wanted_frames(stored, limit, stride)
    frames = list(range(stored)) if wanted is None else wanted
    assert len(frames) == kept_frames(stored, limit, stride)
    assert frames == sorted(set(frames)) and frames[0] >= 0 and frames[-1] < stored
    assert all(frame % stride == 0 for frame in frames)
    if len(frames) > 1:
        steps = np.diff(frames)
        assert steps.max() - steps.min() <= stride


def test_frames_are_decoded_and_selected(tmp_path: Path) -> None:
    stills = tmp_path / "stills"
    stills.mkdir()
    for number in range(12):
        Image.new("RGB", (64, 48), (20 * number, 128, 128)).save(stills / f"{number:03d}.png")
    video = transcode(FrameFolder(stills, "*.png", 25.0), VideoOptions(short_side=48, crf=10, preset="ultrafast"))
    reader = clip_reader(write_videos(tmp_path / "set", [video, video[:-200]], [12, 12]))
    whole = reader.frames(0)
    assert whole.shape == (12, 48, 64, 3) and whole.dtype == np.uint8
    few = reader.frames(0, max_frames=4, frame_stride=2, size=32)
    assert few.shape == (4, 32, 32, 3)
    assert wanted_frames(12, 4, 2) == [0, 4, 6, 10]
    reds = few[:, 16, 16, 0].astype(int)
    assert np.abs(reds - [0, 80, 120, 200]).max() < 16
    with pytest.raises(DataError, match=r"train-000000.tar:clip0001"):
        reader.frames(1)


def test_a_copied_shard_set_reads_from_its_new_place(tmp_path: Path) -> None:
    write_videos(tmp_path / "old", PAYLOADS, [4] * 25)
    shutil.move(tmp_path / "old", tmp_path / "new")
    assert clip_reader(tmp_path / "new").payload(9) == PAYLOADS[9]
