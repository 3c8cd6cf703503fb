"""Frame features as shards: the rows an encoder gives, at the address the index says, restartable, honest on damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.build.build import BuildOptions, build
from shards.build.features import FeatureOptions, write_features
from shards.build.work import SKIPPED_NAME
from shards.errors import DataError
from shards.exchange.adopt import adopt
from shards.exchange.subset import head
from shards.format.index import INDEX_NAME, MANIFEST_NAME, read_index
from shards.format.verify import verify
from shards.inspect.lint import lint
from shards.load.features import read_features, read_views
from shards.load.loader import EvalLoader
from shards.load.reader import Reader, wanted_frames
from shards.media.square import Placement
from shards.order.plan import Plan, PlanOptions, Source
from tests.unit.shards.making import video_corpus
from tests.unit.shards.shard_sets import write_texts

SIZE = 16


class MeanColours:
    """Mean colour of each frame and its number within the call."""

    image_pixels = SIZE

    def __init__(self, scale: float = 1.0) -> None:
        self.identity: dict[str, Any] = {"fingerprint": f"mean-{scale}", "width": 3}
        self.scale, self.calls = scale, 0

    def __call__(self, frames_THWC: np.ndarray) -> np.ndarray:
        self.calls += 1
        assert frames_THWC.shape[1:] == (SIZE, SIZE, 3)
        return frames_THWC.mean(axis=(1, 2), dtype=np.float64) * self.scale


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    out = folder / "videos"
    build(video_corpus(folder / "source", 7), out, BuildOptions(samples_per_shard=3))
    return out


def plan_of(folder: Path) -> Plan:
    return Plan([Source(read_index(folder))], PlanOptions("clip", shuffle=False))


def fetch_features(reader: Reader, item: np.ndarray) -> list[np.ndarray]:
    return [read_features(reader, int(sample)) for sample in item["sample"]]


def stack(items: list[list[np.ndarray]]) -> dict[str, Any]:
    return {"features": [features for item in items for features in item]}


def test_features_are_those_of_the_frames_the_reader_decodes(videos: Path, tmp_path: Path) -> None:
    encoder = MeanColours()
    seen: list[tuple[int, int]] = []
    manifest = write_features(videos, tmp_path / "out", encoder, FeatureOptions(), lambda *counts: seen.append(counts))
    assert manifest.kind == "features" and manifest.counts == {"samples": 7, "skipped": 0}
    assert manifest.options["features"] == {"fingerprint": "mean-1.0", "width": 3, "frame_stride": 1, "dtype": "<f2"}
    assert manifest.options["video"] == read_index(videos).manifest.options["video"]
    assert seen == [(number, 7) for number in range(1, 8)]
    assert verify(tmp_path / "out") == []

    frames, features = Reader(plan_of(videos)), Reader(plan_of(tmp_path / "out"))
    for sample in range(7):
        whole = encoder(frames.frames(sample, size=SIZE))
        np.testing.assert_allclose(read_features(features, sample), whole, atol=0.07)  # float16 at 255
        some = encoder(frames.frames(sample, max_frames=3, frame_stride=2, size=SIZE))
        np.testing.assert_allclose(read_features(features, sample, 3, 2), some, atol=0.07)
        ours, theirs = features.plan.samples.row(sample), frames.plan.samples.row(sample)
        assert (ours.key, ours.text, ours.signer, ours.frames, ours.width) == (
            *(theirs.key, theirs.text, theirs.signer, theirs.frames), 3,
        )  # fmt: skip
        assert features.meta(sample)["text"] == ours.text

    loader = EvalLoader(plan_of(tmp_path / "out"), fetch_features, stack, micro_batch=3)
    assert [len(batch["features"]) for batch, _ in loader] == [3, 3, 1]


def test_thinned_features_keep_the_clip_s_duration(videos: Path, tmp_path: Path) -> None:
    write_features(videos, tmp_path / "out", MeanColours(), FeatureOptions(frame_stride=4))
    thin, full = read_index(tmp_path / "out").row(0), read_index(videos).row(0)
    assert thin.frames == -(-full.frames // 4) and thin.fps == full.fps / 4
    assert thin.duration_seconds == full.duration_seconds


def test_the_same_bytes_for_any_number_of_workers_and_after_a_kill(videos: Path, tmp_path: Path) -> None:
    write_features(videos, tmp_path / "one", MeanColours(), FeatureOptions())

    class Killed(Exception):
        pass

    def kill(done: int, total: int) -> None:
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        write_features(videos, tmp_path / "two", MeanColours(), FeatureOptions(), kill)
    assert not (tmp_path / "two").exists()
    encoder = MeanColours()
    write_features(videos, tmp_path / "two", encoder, FeatureOptions(workers=2))
    assert encoder.calls == 4, "the first shard of three clips was finished"
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted([INDEX_NAME, MANIFEST_NAME, SKIPPED_NAME, *(f"train-{n:06d}.tar" for n in range(3))])
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert write_features(videos, tmp_path / "one", encoder, FeatureOptions()).splits == {"train": 7}
    assert encoder.calls == 4, "a finished set is returned as it is"


def test_another_encoder_does_not_continue_or_replace(videos: Path, tmp_path: Path) -> None:
    write_features(videos, tmp_path / "out", MeanColours(), FeatureOptions())
    with pytest.raises(DataError, match=r"made otherwise; different: features"):
        write_features(videos, tmp_path / "out", MeanColours(2.0), FeatureOptions())


class Darker:
    """Views that are darker by the view's number times ten and the sample's; the square further right."""

    def placement(self, sample: int, showing: int) -> Placement:
        del sample
        return Placement(right=0.125 * showing)

    def picture(self, frames_THWC: np.ndarray, sample: int, showing: int) -> np.ndarray:
        return np.maximum(frames_THWC, 20) - np.uint8(10 * showing + sample % 10)


def test_views_are_of_changed_clips_and_the_first_is_of_the_clip_as_it_is(videos: Path, tmp_path: Path) -> None:
    encoder, change, options = MeanColours(), Darker(), FeatureOptions(frame_stride=2, views=3)
    manifest = write_features(videos, tmp_path / "out", encoder, options, change=change)
    assert manifest.options["features"]["views"] == 3
    frames, features = Reader(plan_of(videos)), Reader(plan_of(tmp_path / "out"))
    for sample in range(7):
        row, views_KTD = features.row(sample), read_views(features, sample)
        wanted = list(range(0, frames.row(sample).frames, 2))
        assert views_KTD.shape == (3, len(wanted), 3) == (row.height, row.frames, row.width)
        for view in range(3):
            shown = frames.decoded(sample, wanted, SIZE, change.placement(sample, view) if view else Placement())
            shown = change.picture(shown, sample, view) if view else shown
            np.testing.assert_allclose(views_KTD[view], encoder(shown), atol=0.07)
        assert (read_features(features, sample, 3) == views_KTD[0][wanted_frames(len(wanted), 3)]).all()
    write_features(videos, tmp_path / "two", encoder, FeatureOptions(2, 2, views=3), change=change)
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_sets_with_views_are_intact_for_the_other_commands(videos: Path, tmp_path: Path) -> None:
    out, copy = tmp_path / "out", tmp_path / "copy"
    made = write_features(videos, out, MeanColours(), FeatureOptions(views=2), change=Darker())
    assert verify(out) == [] and not [problem for problem in lint(out).problems if problem.rule == "features"]
    head(out, copy, 7)
    ours, theirs = Reader(plan_of(out)), Reader(plan_of(copy))
    assert all((read_views(ours, n) == read_views(theirs, n)).all() for n in range(7))
    (out / INDEX_NAME).unlink()
    assert adopt(out).fingerprint == made.fingerprint


def damaged(videos: Path, folder: Path, samples: list[int]) -> Path:
    shard_set = read_index(videos)
    folder.mkdir()
    for path in videos.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for sample in samples:
        row = shard_set.row(sample)
        payload = bytearray((folder / row.shard).read_bytes())
        payload[row.offset + row.size // 2] ^= 1
        (folder / row.shard).write_bytes(payload)
    return folder


def test_a_damaged_clip_is_skipped_by_name_and_too_many_fail(videos: Path, tmp_path: Path) -> None:
    source = damaged(videos, tmp_path / "damaged", [1])
    manifest = write_features(source, tmp_path / "out", MeanColours(), FeatureOptions(max_skipped_fraction=0.2))
    assert manifest.counts == {"samples": 6, "skipped": 1}
    skipped = json.loads((tmp_path / "out" / SKIPPED_NAME).read_text())
    assert skipped["id"] == "clip.1" and "do not match the CRC-32" in skipped["detail"]
    with pytest.raises(DataError, match=r"1 of 7 clips cannot be read\. First: train-000000.tar:clip_1.*CRC-32"):
        write_features(source, tmp_path / "strict", MeanColours(), FeatureOptions())
    assert not (tmp_path / "strict").exists()


def test_what_cannot_be_extracted(videos: Path, tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts", [np.arange(4, dtype="<u2")])
    with pytest.raises(DataError, match=r"texts: holds text samples"):
        write_features(texts, tmp_path / "out", MeanColours(), FeatureOptions())
    with pytest.raises(DataError, match="beyond the range of float16"), np.errstate(over="ignore"):
        write_features(videos, tmp_path / "out", MeanColours(1e9), FeatureOptions())
    with pytest.raises(DataError, match="frame_stride 0 is not positive"):
        FeatureOptions(frame_stride=0)
    with pytest.raises(DataError, match=r"views 0 is not positive"):
        FeatureOptions(views=0)


def test_rows_that_do_not_fit_are_refused(videos: Path) -> None:
    with pytest.raises(DataError, match=r"bytes are not 10 rows of float16"):
        read_features(Reader(plan_of(videos)), 0)  # a video is no array of features


def test_a_lost_index_is_made_again(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = write_features(videos, out, MeanColours(), FeatureOptions())
    (out / INDEX_NAME).unlink()
    assert adopt(out).fingerprint == made.fingerprint
