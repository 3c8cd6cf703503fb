"""Any WebDataset tar: what is a sample, and what is refused by name."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from shards.errors import DataError
from shards.exchange.adopt import adopt
from shards.format.index import read_index
from shards.format.verify import verify
from tests.unit.shards.making import mp4, pictures


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, payload in files:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_interleaved_keys_folders_and_members_that_are_not_needed(tmp_path: Path) -> None:
    first, second = mp4(pictures(6)), mp4(pictures(7, seed=1))
    files = [
        ("a/one.seg.mp4", first), ("b/one.MP4", second), ("__info__", b"x"), ("a/._one.mp4", b"mac"),
        ("b/one.txt", b"zweiter"), ("a/one.json", b'{"text": "erster", "id": "1"}'),
        ("a/one.pose.npy", b"unused"), ("a/one.jpg", b"unused"),
    ]  # fmt: skip
    write_tar(tmp_path / "val-0.tar", files)
    adopt(tmp_path, "mine")
    rows = list(read_index(tmp_path).rows())
    found = [(row.key, row.sample_id, row.text, row.frames, row.split) for row in rows]
    assert found == [("a/one", "1", "erster", 6, "dev"), ("b/one", "b/one", "zweiter", 7, "dev")]
    assert verify(tmp_path) == []


def test_features_are_addressed_behind_their_header(tmp_path: Path) -> None:
    values = np.arange(24, dtype="<f2").reshape(6, 4)
    write_tar(tmp_path / "t.tar", [("a.npy", npy(values)), ("a.json", b'{"text": "x", "fps": 12.5, "height": 1}')])
    assert adopt(tmp_path).kind == "features"
    row = read_index(tmp_path).row(0)
    blob = (tmp_path / "t.tar").read_bytes()
    assert blob[row.offset : row.offset + row.size] == values.tobytes()
    assert (row.frames, row.width, row.duration_seconds) == (6, 4, 0.48) and verify(tmp_path) == []


def test_features_made_elsewhere_are_told_to_be_of_no_use_in_training(tmp_path: Path) -> None:
    files = [("a.npy", npy(np.zeros((6, 4), "<f2"))), ("a.json", b'{"text": "x"}')]
    write_tar(tmp_path / "t.tar", files)
    notes: list[str] = []
    adopt(tmp_path, on_note=notes.append)
    assert "no training on these: manifest.json lacks options.features, which backbone made them is" in notes[-1]


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ((3, 5), r"features of several widths: 4 \(t\.tar:a\), 5 \(t\.tar:b\)"),
        ((0, 4), r"t\.tar:b: features of no frame"),
    ],
)
def test_features_that_no_batch_can_join(tmp_path: Path, second: tuple[int, int], said: str) -> None:
    arrays = {"a": np.zeros((6, 4), "<f2"), "b": np.zeros(second, "<f2")}
    files = [(f"{key}.npy", npy(array)) for key, array in arrays.items()]
    write_tar(tmp_path / "t.tar", [*files, *((f"{key}.json", b'{"text": "x"}') for key in arrays)])
    with pytest.raises(DataError, match=said):
        adopt(tmp_path)


@pytest.mark.parametrize(
    ("fps", "said"), [("null", ""), ('"25"', "fps is '25' in its json, no number"), ("NaN", "fps is 'nan' in its json")]
)
def test_frame_rates_of_features(tmp_path: Path, fps: str, said: str) -> None:
    meta = f'{{"text": "x", "fps": {fps}}}'.encode()
    write_tar(tmp_path / "t.tar", [("a.npy", npy(np.zeros((6, 4), "<f2"))), ("a.json", meta)])
    if not said:
        adopt(tmp_path)
        assert read_index(tmp_path).row(0).fps == 0.0
        return
    with pytest.raises(DataError, match=rf"t\.tar:a: {said}"):
        adopt(tmp_path)


@pytest.mark.parametrize(
    ("kind", "said"), [(tarfile.LNKTYPE, "a hard link to a.mp4"), (tarfile.SYMTYPE, "a symbolic link to a.mp4")]
)
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_links_are_called_links(tmp_path: Path, kind: bytes, said: str, form: int) -> None:
    with tarfile.open(tmp_path / "t.tar", "w", format=form) as tar:
        tar.addfile(tarfile.TarInfo("folder/"))
        link = tarfile.TarInfo("b.mp4")
        link.type, link.linkname = kind, "a.mp4"
        tar.addfile(link)
    with pytest.raises(DataError, match=rf"t\.tar@\d+: link: b\.mp4 is {said}; a member needs its bytes in the tar"):
        adopt(tmp_path)


META = ("a.json", b'{"text": "x"}')


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            [("a.000.jpg", b""), ("a.001.jpg", b""), META],
            r"t\.tar:a: 2 still images such as a\.000\.jpg; a clip",
        ),
        ([("a.x.mp4", b""), ("a.y.mp4", b""), META], r"t\.tar:a: several videos, \['a\.x\.mp4', 'a\.y\.mp4'\]"),
        ([("a.mp4", b""), ("a.mp4", b""), META], r"t\.tar:a: two members named a\.mp4"),
        ([("a.mp4", b"junk"), META], r"t\.tar:a: a\.mp4 cannot be used: not a readable video"),
        (
            [("a.npy", npy(np.zeros(3, "<u2"))), ("a.json", b'{"documents": [{"id": "1", "start": 0}]}')],
            r"t\.tar:a: npy and json members do not describe documents \(KeyError: 'tokens'\)\n  fix: json needs doc",
        ),
        ([("a.npy", npy(np.zeros((2, 3)))), META], r"t\.tar:a: a\.npy is float64 \[2, 3\], and its json lists no doc"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, files: list[tuple[str, bytes]], said: str) -> None:
    write_tar(tmp_path / "t.tar", files)
    with pytest.raises(DataError, match=said):
        adopt(tmp_path)


def test_a_tar_of_several_kinds_is_refused(tmp_path: Path) -> None:
    feature = [("b.npy", npy(np.zeros((2, 3), "<f2"))), ("b.json", b'{"text": "x"}')]
    write_tar(tmp_path / "t.tar", [("a.mp4", mp4(pictures(5))), META, *feature])
    with pytest.raises(DataError, match=r"t\.tar: samples of several kinds: video \(a\) and features \(b\)"):
        adopt(tmp_path)
