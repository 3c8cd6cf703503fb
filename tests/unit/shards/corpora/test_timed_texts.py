"""Timed texts are read from every format, and what is written reads back the same."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from shards.corpora.captions import read_captions
from shards.corpora.timed_texts import UNFINISHED, SubtitleFile, read_timed, stamp
from shards.errors import DataError, OptionError

CUES = [(0.0, 1.5, "rain & sun <in> the north"), (1.5, 3.04, "a --> b"), (3661.5, 3662.0, "one\ntwo")]


@pytest.mark.parametrize("suffix", [".vtt", ".srt"])
def test_written_subtitles_read_back(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / f"out{suffix}"
    with SubtitleFile(path) as subtitles:
        for cue in CUES:
            subtitles.write(*cue)
        assert not path.exists() and path.with_name(path.name + UNFINISHED).exists()
    read = [(c.start_seconds, c.end_seconds, c.text) for c in read_captions(path)]
    arrow = "a --> b" if suffix == ".vtt" else "a → b"
    assert read == [CUES[0] if suffix == ".vtt" else read[0], (1.5, 3.04, arrow), (3661.5, 3662.0, "one two")]
    assert [path.name for path in path.parent.iterdir()] == [path.name]


def test_json_lines_and_a_stream() -> None:
    stream = io.StringIO()
    with SubtitleFile(stream, ".jsonl") as subtitles:
        subtitles.write(0.1234567, 2.0, "öl")
        assert json.loads(stream.getvalue()) == {"number": 1, "start": 0.123, "end": 2.0, "text": "öl"}
    stream = io.StringIO()
    with SubtitleFile(stream) as subtitles:
        assert stream.getvalue() == "WEBVTT\n\n"


def test_subtitles_that_were_not_finished_keep_their_other_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="damaged"), SubtitleFile(tmp_path / "out.vtt") as subtitles:
        subtitles.write(*CUES[0])
        raise DataError("damaged", where="video", fix="fetch it again")
    assert [path.name for path in tmp_path.iterdir()] == [f"out.vtt{UNFINISHED}"]


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"'.ass' names no format that is written(?s:.*)use .vtt, .srt, .jsonl"):
        SubtitleFile(tmp_path / "out.ass")
    with pytest.raises(OptionError, match=r"'.ass' names no format of timed texts(?s:.*)\.vtt.*\.eaf, \.tsv"):
        read_timed(tmp_path / "in.ass")


def test_times_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "times.tsv"
    path.write_text("start\tend\ttext\n4\t5.5\tsun\n1\t2\train\n")
    assert [(c.start_seconds, c.end_seconds, c.text) for c in read_timed(path)] == [(1, 2, "rain"), (4, 5.5, "sun")]
    path.write_text("start\tend\n4\tlater\n")
    with pytest.raises(DataError, match="start '4' and end 'later' are no seconds"):
        read_timed(path)
    path.write_text("start\tend\n4\t4\n")
    with pytest.raises(DataError, match=r"times\.tsv:2: a span ends at 4 s, not after its start at 4 s"):
        read_timed(path)


def test_times_of_an_elan_tier(tmp_path: Path) -> None:
    path = tmp_path / "a.eaf"
    tier = (
        '<TIER TIER_ID="{0}"><ANNOTATION><ALIGNABLE_ANNOTATION ANNOTATION_ID="a{0}" TIME_SLOT_REF1="t1"'
        ' TIME_SLOT_REF2="t2"><ANNOTATION_VALUE>{0}</ANNOTATION_VALUE></ALIGNABLE_ANNOTATION></ANNOTATION></TIER>'
    )
    slots = '<TIME_SLOT TIME_SLOT_ID="t1" TIME_VALUE="500"/><TIME_SLOT TIME_SLOT_ID="t2" TIME_VALUE="900"/>'
    path.write_text(
        f"<ANNOTATION_DOCUMENT><TIME_ORDER>{slots}</TIME_ORDER>{tier.format('rain')}{tier.format('sun')}"
        "</ANNOTATION_DOCUMENT>"
    )
    assert [(c.start_seconds, c.end_seconds, c.text) for c in read_timed(path, ["sun"])] == [(0.5, 0.9, "sun")]
    with pytest.raises(OptionError, match="2 tiers hold annotations"):
        read_timed(path)


def test_stamps() -> None:
    assert stamp(3661.0005) == "01:01:01.000" and stamp(59.9996, ",") == "00:01:00,000"
