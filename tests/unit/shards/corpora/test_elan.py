"""ELAN files: tiers, times of time slots and of parents, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards.corpora.captions import Caption
from shards.corpora.elan import parse_elan, read_elan
from shards.errors import DataError, OptionError

HEAD = """<?xml version="1.0" encoding="UTF-8"?>
<ANNOTATION_DOCUMENT FORMAT="3.0" VERSION="3.0">
<HEADER MEDIA_FILE="" TIME_UNITS="milliseconds">
<MEDIA_DESCRIPTOR MEDIA_URL="file:///C:/a/talk.mp4" MIME_TYPE="video/mp4" TIME_ORIGIN="1500"/>
<MEDIA_DESCRIPTOR MEDIA_URL="file:///C:/a/side.mp4" MIME_TYPE="video/mp4"/>
</HEADER>
<TIME_ORDER>
<TIME_SLOT TIME_SLOT_ID="ts1" TIME_VALUE="1000"/><TIME_SLOT TIME_SLOT_ID="ts2"/>
<TIME_SLOT TIME_SLOT_ID="ts3" TIME_VALUE="3000"/><TIME_SLOT TIME_SLOT_ID="ts4" TIME_VALUE="3500"/>
</TIME_ORDER>
"""


def timed(name: str, first: str, second: str, text: str) -> str:
    return (
        f'<ANNOTATION><ALIGNABLE_ANNOTATION ANNOTATION_ID="{name}" TIME_SLOT_REF1="{first}" TIME_SLOT_REF2="{second}">'
        f"<ANNOTATION_VALUE>{text}</ANNOTATION_VALUE></ALIGNABLE_ANNOTATION></ANNOTATION>"
    )


def referring(name: str, parent: str, text: str) -> str:
    return (
        f'<ANNOTATION><REF_ANNOTATION ANNOTATION_ID="{name}" ANNOTATION_REF="{parent}">'
        f"<ANNOTATION_VALUE>{text}</ANNOTATION_VALUE></REF_ANNOTATION></ANNOTATION>"
    )


def tier(name: str, *annotations: str, participant: str = "") -> str:
    return f'<TIER TIER_ID="{name}" PARTICIPANT="{participant}">{"".join(annotations)}</TIER>'


def document(*tiers: str) -> str:
    return HEAD + "".join(tiers) + "</ANNOTATION_DOCUMENT>"


GLOSSES = tier(
    "Gloss_A", timed("a1", "ts1", "ts2", "ICH"), timed("a2", "ts2", "ts3", "GEHEN"), timed("a0", "ts3", "ts4", " ")
)


def test_tiers_times_and_media(tmp_path: Path) -> None:
    path = tmp_path / "talk.eaf"
    path.write_text(document(GLOSSES, tier("Leer")), encoding="utf-8")
    elan = read_elan(path)
    (glosses,) = elan.chosen([], "x")
    # ts2 has no time: it lies midway, as ELAN shows it; the empty annotation is no caption
    assert glosses.captions == [Caption(1.0, 2.0, "ICH", 1), Caption(2.0, 3.0, "GEHEN", 2)]
    assert [found.name for found in elan.tiers] == ["Gloss_A", "Leer"] and elan.origins == {"talk": 1.5}


def test_annotations_take_the_time_of_their_parents() -> None:
    translation = tier("Text", referring("b1", "a1", "Ich\ngehe &amp; komme"), participant=" Anna ")
    words = tier("Wort", referring("c1", "b1", "Ich"), referring("c2", "b1", "gehe"))
    elan = parse_elan(document(translation, words, GLOSSES), "x")
    by_name = {found.name: found for found in elan.tiers}
    assert by_name["Text"].captions == [Caption(1.0, 2.0, "Ich gehe & komme", 1)]
    assert by_name["Text"].participant == "Anna"
    assert [(c.start_seconds, c.end_seconds) for c in by_name["Wort"].captions] == [(1.0, 1.5), (1.5, 2.0)]
    assert elan.chosen(["Text", "Anders"], "x") == [by_name["Text"]]
    with pytest.raises(OptionError, match=r"x: 3 tiers hold annotations: Text, Wort, Gloss_A\n  fix: choose those"):
        elan.chosen([], "x")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no xml", r"x:1: not ELAN \(.*\): the XML is not well formed"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', "a document type or entity in ELAN"),
        ("<tt/>", "x: the document is a tt, not an ANNOTATION_DOCUMENT"),
        (document(GLOSSES).replace("milliseconds", "PAL-frames"), "x: times in PAL-frames"),
        (document(tier("T", timed("a1", "ts1", "ts9", "a"))), "'a1' refers to the time slot 'ts9', which has no time"),
        (document(tier("T", referring("b1", "a7", "a"))), "the annotation 'b1' leads to 'a7', which has no time"),
        (document(tier("T", referring("b1", "b2", "a"), referring("b2", "b1", "a"))), "'b1' leads to 'b2', which"),
        (document(GLOSSES).replace('"3000"', '"3,0"'), "x ts3: '3,0' is no number of milliseconds"),
    ],
)
def test_what_is_refused(text: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        parse_elan(text, "x")
