"""Caption files: what each format holds, what is refused with its line, and that no bytes break the parsers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.corpora import captions
from shards.corpora.captions import SUFFIXES, Caption, parse_track, read_captions, read_track, sound_only
from shards.errors import DataError

VTT = """WEBVTT - made by hand
Kind: captions
Language: en

NOTE translated by
two people

STYLE
::cue { color: red }

REGION
id:fred

intro
00:01.000 --> 00:02.500 align:start position:0%
<v Mary>Hello <i>there</i>,
it&apos;s 3 &lt; 4&nbsp;&amp; I <3 you

01:00:00.000 --> 01:00:01.000
 \u200b

00:00:05.000 --> 00:00:04.000
- backwards
"""
ROLLING = """WEBVTT
Kind: captions
Language: en

00:00:00.160 --> 00:00:02.629 align:start position:0%
 
hello<00:00:00.480><c> everyone</c>

00:00:02.629 --> 00:00:02.639 align:start position:0%
hello everyone
 

00:00:02.639 --> 00:00:05.000 align:start position:0%
hello everyone
welcome<00:00:03.000><c> back</c>

00:00:05.000 --> 00:00:05.010 align:start position:0%
welcome back
 

00:00:05.010 --> 00:00:07.000 align:start position:0%
welcome back
hello<00:00:06.000><c> everyone</c>
"""
SRT = """1
00:00:03,000 --> 00:00:04,5
{\\an8}<i>Second</i>
line

00:00:01.250 --> 00:00:02,000 X1:10 X2:20
first, unnumbered

3
00:00:09,000 --> 00:00:10,000
"""
JSON3 = {
    "wireMagic": "pb3",
    "events": [
        {"tStartMs": 0, "dDurationMs": 9000, "id": 1, "wpWinPosId": 1},
        {"tStartMs": 2000, "dDurationMs": 1500, "segs": [{"utf8": "two\nlines"}, {"utf8": " more"}]},
        {"tStartMs": 3500, "aAppend": 1, "segs": [{"utf8": "\n"}]},
        {"tStartMs": 1000, "dDurationMs": 500, "segs": [{"utf8": "one"}]},
    ],
}
TTML = """<?xml version="1.0" encoding="utf-8"?>
<tt xmlns="http://www.w3.org/ns/ttml"><!-- fine --><body><div>
<p begin="00:00:01.5" end="3s">one<br/>line &amp; more</p>
<p begin="4000ms" dur="0.5s"><span>two</span></p>
<p begin="00:00:06" end="00:00:07"> </p>
</div></body></tt>"""


def parsed(text: str, suffix: str = ".vtt") -> list[Caption]:
    return parse_track(text.encode(), suffix, "a" + suffix).captions


class TestFormats:
    def test_webvtt(self) -> None:
        for text in (VTT, VTT.replace("\n", "\r\n"), VTT.replace("\n", "\r"), "\ufeff" + VTT):
            assert parsed(text) == [
                Caption(1.0, 2.5, "Hello there, it's 3 < 4 & I <3 you", 15),
                Caption(5.0, 4.0, "- backwards", 22),
            ]
        assert parsed("WEBVTT") == [] and parsed("WEBVTT\n00:01.000 --> 00:02.000\nx")[0].text == "x"
        assert parsed("WEBVTT\n\n00:01.000 --> 00:02.000\n&#0;&#7;a&#10;b&#" + "9" * 5000 + ";")[0].text == "�a b�"

    def test_rolling_captions_say_each_line_once(self) -> None:
        track = parse_track(ROLLING.encode(), ".vtt", "a.vtt")
        assert track.automatic
        assert [(c.start_seconds, c.text) for c in track.captions] == [
            (0.16, "hello everyone"),
            (2.639, "welcome back"),
            (5.01, "hello everyone"),
        ]
        manual = "WEBVTT\n\n00:01.000 --> 00:02.000\nYes.\n\n00:02.000 --> 00:03.000\nYes.\n"
        assert [c.text for c in parsed(manual)] == ["Yes.", "Yes."], "only rolling captions repeat themselves"

    def test_subrip(self) -> None:
        for text in (SRT, SRT.replace("\n", "\r\n"), "\ufeff" + SRT):
            assert parsed(text, ".srt") == [
                Caption(1.25, 2.0, "first, unnumbered", 6),
                Caption(3.0, 4.5, "Second line", 2),
            ]

    def test_json3(self) -> None:
        track = parse_track(json.dumps(JSON3).encode(), ".json3", "a")
        assert track == captions.Track([Caption(1.0, 1.5, "one", 4), Caption(2.0, 3.5, "two lines more", 2)], False)
        words = {"events": [{"tStartMs": 1, "dDurationMs": 2, "segs": [{"utf8": "a"}, {"utf8": " b", "tOffsetMs": 1}]}]}
        assert parse_track(json.dumps(words).encode(), ".json3", "a").automatic

    def test_lists_of_captions(self) -> None:
        entries = [{"text": "a", "start": 2, "duration": 1.5}, {"text": "b", "start": 0.5, "end": 2.5}]
        entries.append({"text": "\u200b", "start": 0, "duration": 1})
        assert parsed(json.dumps(entries), ".json") == [Caption(0.5, 2.5, "b", 2), Caption(2.0, 3.5, "a", 1)]

    def test_ttml(self) -> None:
        assert parsed(TTML, ".ttml") == [Caption(1.5, 3.0, "one line & more", 1), Caption(4.0, 4.5, "two", 2)]

    def test_overlaps_and_equal_times_stay(self) -> None:
        cues = [("00:03.000", "00:09.000", "c"), ("00:01.000", "00:04.000", "b"), ("00:01.000", "00:04.000", "a")]
        text = "WEBVTT\n\n" + "\n".join(f"{start} --> {end}\n{words}\n" for start, end, words in cues)
        assert [c.text for c in parsed(text)] == ["b", "a", "c"]

    def test_files(self, tmp_path: Path) -> None:
        path = tmp_path / "-x.en.vtt"
        path.write_text(VTT, encoding="utf-8")
        assert len(read_captions(path)) == 2 and not read_track(path).automatic
        with pytest.raises(DataError, match=r"unknown caption format '\.ass'\n  fix: use \.vtt, \.srt, "):
            read_captions(tmp_path / "a.ass")
        with pytest.raises(DataError, match=r"b\.vtt: captions cannot be read \(No such file"):
            read_captions(tmp_path / "b.vtt")

    def test_huge_files_are_no_captions(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "a.vtt"
        path.write_text(VTT, encoding="utf-8")
        monkeypatch.setattr(captions, "MAX_FILE_BYTES", 100)
        with pytest.raises(DataError, match="bytes are no captions"):
            read_captions(path)

    @pytest.mark.parametrize(
        ("text", "alone"),
        [
            ("[Music]", True), ("(applause)  [laughs]", True), ("♪ la la ♪", True), ("♪ la", True), ("【音楽】", True),
            ("...", True), ("[Mary] Hello", False), ("Hello (again)", False), ("3", False), ("你好", False),
            ("* Applaus *", True), ("*Musik*", True), ("[NOT-SIGNED]", True), ("＊拍手＊", True), 
            ("* Musik * Hallo", False), ("5 * 3", False),
        ],
    )  # fmt: skip
    def test_sounds(self, text: str, alone: bool) -> None:
        assert sound_only(text) is alone


class TestRefused:
    @pytest.mark.parametrize(
        ("text", "suffix", "message"),
        [
            ("", ".vtt", r"a\.vtt:1: the first line is '', not WEBVTT"),
            ("<html>", ".vtt", r"a\.vtt:1: the first line is '<html>', not WEBVTT"),
            ("WEBVTTx", ".vtt", "not WEBVTT"),
            ("WEBVTT\n\nstray text\n", ".vtt", r"a\.vtt:3: no times in the block that begins 'stray text'"),
            ("WEBVTT\n\n1\n2\n00:01.000 --> 00:02.000\nx", ".vtt", r"a\.vtt:3: no times in the block"),
            ("WEBVTT\n\n00:01.000 --> soon\nx", ".vtt", r"a\.vtt:3: cannot read the times '00:01\.000 --> soon'"),
            ("WEBVTT\n\n00:01.000 --> 00:61.000\nx", ".vtt", "cannot read the times"),
            ("WEBVTT\n\n00:01.000 --> 00:02.000\nx\n00:02.000 --> 00:03.000\ny", ".vtt",
             r"a\.vtt:5: times in the middle of a caption: an empty line is missing"),
            ("1\n00:00:01,000 -> 00:00:02,000\nx", ".srt", r"a\.srt:1: no times in the block that begins '1'"),
            ("{", ".json3", r"a\.json3:1: not JSON \(Expecting"),
            ("[" * 100_000, ".json", r"a\.json:1: not JSON"),
            ("3", ".json", "neither json3 events nor a list of captions; found int"),
            ('{"events": 3, "a": 1}', ".json3", r"neither json3 events .* found \['a', 'events'\]"),
            ('{"events": [1]}', ".json3", "event 1: a json3 event whose segs are no list of objects"),
            ('{"events": [{"segs": [{"utf8": 3}]}]}', ".json3", "event 1: the text is int"),
            ('{"events": [{"segs": [{"utf8": "x"}]}]}', ".json3", "event 1 tStartMs: None is no time"),
            ('{"events": [{"tStartMs": 1, "segs": [{"utf8": "x"}]}]}', ".json3", "1 dDurationMs: None is no time"),
            ('[{"text": "x", "start": NaN, "duration": 1}]', ".json", "entry 1 start: nan is no time"),
            ('[{"text": "x", "start": true, "duration": 1}]', ".json", "entry 1 start: True is no time"),
            ('[{"text": "x", "start": 0, "duration": -1}]', ".json", "entry 1 duration: -1 is no time"),
            ('[{"text": "x", "start": 1' + "0" * 400 + ', "duration": 1}]', ".json", "entry 1 start: 10+ is no time"),
            ('[{"text": "\\ud800", "start": 1, "duration": 1}]', ".json", "entry 1: the text holds half a character"),
            ('[{"text": "x"}]', ".json", r"entry 1: no caption with text, start and duration or end; found \['text'\]"),
            ("[[]]", ".json", "no caption with text, start and duration or end; found list"),
            ("<tt><p begin='x'>a</p></tt>", ".ttml", "paragraph 1 begin: cannot read the time 'x'"),
            ("<tt><p begin='1s'>a</p></tt>", ".ttml", "paragraph 1 end: cannot read the time ''"),
            ("<tt>\n<p>", ".ttml", r"a\.ttml:2: not TTML"),
            ("<!DOCTYPE tt [<!ENTITY a 'b'>]><tt/>", ".ttml", "a document type or entity in TTML"),
        ],
    )  # fmt: skip
    def test_by_line(self, text: str, suffix: str, message: str) -> None:
        with pytest.raises(DataError, match=message):
            parsed(text, suffix)

    def test_other_encodings(self) -> None:
        with pytest.raises(DataError, match=r"a\.srt:2: not UTF-8: byte 0xf6\n  fix: convert the file to UTF-8"):
            parse_track("1\nschön".encode("latin-1"), ".srt", "a.srt")


WORDS = st.text(
    st.characters(exclude_categories=["Cc", "Cs", "Cf", "Zl", "Zp", "Zs"], exclude_characters="<>&-{}"), min_size=1
)
MILLISECONDS = st.integers(0, 99 * 3_600_000)
CUES = st.lists(st.tuples(MILLISECONDS, MILLISECONDS, st.lists(WORDS, min_size=1, max_size=3)), max_size=8)


def clock(milliseconds: int, mark: str) -> str:
    seconds, part = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{mark}{part:03}"


def written(cues: list[tuple[int, int, list[str]]], suffix: str) -> str:
    """The cues as a file of this format."""
    if suffix == ".json3":
        events = [{"tStartMs": a, "dDurationMs": b, "segs": [{"utf8": "\n".join(t)}]} for a, b, t in cues]
        return json.dumps({"events": events})
    if suffix == ".json":
        return json.dumps([{"start": a / 1000, "duration": b / 1000, "text": "\n".join(t)} for a, b, t in cues])
    if suffix == ".ttml":
        inside = "".join(f"<p begin='{a}ms' dur='{b}ms'>{'<br/> '.join(t)}</p>" for a, b, t in cues)
        return f"<tt>{inside}</tt>"
    mark, head = (".", "WEBVTT\n\n") if suffix == ".vtt" else (",", "")
    times = [f"{clock(a, mark)} --> {clock(a + b, mark)}" for a, b, _ in cues]
    return head + "\n".join(
        f"{n}\n{time}\n" + "\n".join(c[2]) + "\n" for n, (time, c) in enumerate(zip(times, cues, strict=True))
    )


class TestAnyInput:
    @pytest.mark.parametrize("suffix", SUFFIXES)
    @given(cues=CUES)
    @settings(max_examples=40, deadline=None)
    def test_what_is_written_is_read(self, suffix: str, cues: list[tuple[int, int, list[str]]]) -> None:
        found = parsed(written(cues, suffix), suffix)
        expected = sorted((a, a + b, " ".join(text)) for a, b, text in cues)
        assert [(round(c.start_seconds * 1000), round(c.end_seconds * 1000)) for c in found] == [
            e[:2] for e in expected
        ]
        assert sorted(c.text for c in found) == sorted(e[2] for e in expected)

    @pytest.mark.parametrize("suffix", SUFFIXES)
    @given(payload=st.binary(max_size=200), text=st.text(max_size=80))
    @settings(max_examples=60, deadline=None)
    def test_random_bytes_raise_nothing_else(self, suffix: str, payload: bytes, text: str) -> None:
        for candidate in (payload, text.encode("utf-8", "surrogatepass"), b"WEBVTT\n\n" + payload):
            self.assert_refused_or_sound(candidate, suffix)

    @pytest.mark.parametrize(
        ("original", "suffix"),
        [(VTT, ".vtt"), (ROLLING, ".vtt"), (SRT, ".srt"), (json.dumps(JSON3), ".json3"), (TTML, ".ttml")],
    )
    @given(data=st.data())
    @settings(max_examples=80, deadline=None)
    def test_damaged_files_raise_nothing_else(self, original: str, suffix: str, data: st.DataObject) -> None:
        payload = bytearray(original.encode())
        for _ in range(data.draw(st.integers(1, 4))):
            start = data.draw(st.integers(0, len(payload)))
            end = data.draw(st.integers(start, min(len(payload), start + 30)))
            payload[start:end] = data.draw(st.binary(max_size=8))
        self.assert_refused_or_sound(bytes(payload), suffix)

    def assert_refused_or_sound(self, payload: bytes, suffix: str) -> None:
        try:
            track = parse_track(payload, suffix, "a")
        except DataError:
            return
        for caption in track.captions:
            assert caption.text == " ".join(caption.text.split()) != "" and caption.text.encode()
            assert 0 <= caption.start_seconds < 1e9 and 0 <= caption.end_seconds < 1e9
