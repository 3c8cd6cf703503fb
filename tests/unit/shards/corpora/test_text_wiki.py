"""Wiki dumps and extracted articles: markup, namespaces, redirects, parts, damage."""

from __future__ import annotations

import bz2
import json
import random
import time
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import pytest

from shards.corpora import make_corpus
from shards.corpora.wiki import Wiki
from shards.corpora.wiki_markup import plain_text
from shards.errors import DataError

PAGE = """{{Infobox|name=Regen|note={{nested|{{deep}}}}}}
'''Regen''' ist [[Wasser|flüssiges Wasser]].<ref name="a">{{cite|Quelle}}</ref> Er ''fällt''.<ref name="a"/>
Fünf&nbsp;mm ({{convert|5|mm}}).
[[Datei:Regen.jpg|mini|Regen in [[Wien]]]]
== Entstehung ==
<!-- nicht gezeigt -->
=== Leer ===
=== Wolken ===
* erster Punkt mit [http://example.org Verweis]
{| class="wikitable"
! Kopf !! Zwei
|}
== Galerie ==
<gallery>
Datei:A.jpg|Bild
</gallery>
[[Kategorie:Wetter|Regen]]
[[en:Rain]]
__NOTOC__
"""


def dump(*pages: str, head: str = "") -> bytes:
    text = '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="de">'
    text += "<siteinfo><namespaces>"
    text += '<namespace key="6">Datei</namespace><namespace key="14">Kategorie</namespace></namespaces></siteinfo>'
    return (text + head + "".join(pages) + "</mediawiki>").encode()


def page(number: int, text: str, ns: int = 0, extra: str = "") -> str:
    return (
        f"<page><title>T{number}</title><ns>{ns}</ns><id>{number}</id>{extra}<revision><id>9{number}</id><contributor>"
        f"<id>77</id></contributor><text>{escape(text)}</text></revision></page>"
    )


def test_markup_becomes_text() -> None:
    assert plain_text(PAGE, ("Datei", "Kategorie")).splitlines() == [
        "Regen ist flüssiges Wasser. Er fällt.",
        "Fünf\xa0mm.",
        "Entstehung",
        "Wolken",
        "erster Punkt mit Verweis",
    ]
    assert plain_text("a<ref>b c <!-- d --> e") == "ab c  e", "an element left open is text"
    assert plain_text("a<math>x<ref>y</math>b</ref>c") == "abc"
    assert plain_text("") == "" and plain_text("{{only|templates}}") == ""


@pytest.mark.parametrize("mark", ["<ref>", "<!--", "{{", "[[", "{|\n|", "[[a|", "''", "<ref name=x", "[http://a "])
def test_markup_left_open_takes_no_quadratic_time(mark: str) -> None:
    began = time.process_time()
    plain_text(mark * 3000)
    assert time.process_time() - began < 2.0


def test_dump(tmp_path: Path) -> None:
    pages = (
        page(1, PAGE),
        page(2, "#REDIRECT [[T1]]", extra='<redirect title="T1"/>'),
        page(3, "talk", ns=1),
        page(4, "Zweiter Artikel."),
    )
    path = tmp_path / "dewiki-pages-articles1.xml-p1p4.bz2"
    path.write_bytes(bz2.compress(dump(*pages[:2])[:300]) + bz2.compress(dump(*pages)[300:]))
    corpus = make_corpus("wiki", {"paths": f"train={path}", "language": "de"})
    first, second = corpus.segments()
    assert (first.id, second.id, second.text, second.language) == ("1", "4", "Zweiter Artikel.", "de")
    assert first.text.startswith("Regen ist") and second.origin == f"{path}:page 4 'T4'"
    lines = list(Wiki(paths={"train": str(tmp_path)}, unit="paragraph", namespaces=["0", "1"]).segments())
    assert [line.id for line in lines] == ["1#0", "1#1", "1#2", "1#3", "1#4", "3#0", "4#0"]


def test_extracted_folder_and_held_out_articles(tmp_path: Path) -> None:
    for number in range(400):
        path = tmp_path / f"A{'AB'[number % 2]}" / f"wiki_{number // 200:02d}.bz2"
        path.parent.mkdir(exist_ok=True)
        row = {"id": str(number), "url": "x", "title": f"T{number}", "text": f"T{number}\n\nText {number}\n"}
        path.write_bytes((path.read_bytes() if path.exists() else b"") + bz2.compress(json.dumps(row).encode() + b"\n"))
    corpus = Wiki(paths={"train": str(tmp_path)}, dev_fraction=0.1)
    segments = list(corpus.segments())
    assert len(segments) == 400 and segments[0].text == "T0\n\nText 0" and segments[1].id == "2"
    held_out = [segment.id for segment in segments if segment.split == "dev"]
    assert 20 <= len(held_out) <= 60
    assert held_out == [segment.id for segment in corpus.segments() if segment.split == "dev"]


def test_wrong_options_and_files(tmp_path: Path) -> None:
    path = tmp_path / "w.xml"
    path.write_bytes(dump(page(1, "x")))
    options: dict[str, Any] = {"paths": {"train": str(path)}}
    with pytest.raises(DataError, match="unit 'line'\n  fix: use one of article, paragraph"):
        Wiki(**options, unit="line")
    with pytest.raises(DataError, match=r"dev_fraction 1\.5 is not within 0\.\.1"):
        Wiki(**options, dev_fraction=1.5)
    with pytest.raises(DataError, match=r"namespaces \['Talk'\]\n  fix: name them by number"):
        Wiki(**options, namespaces=["0", "Talk"])
    path.write_text("<html><body/></html>")
    with pytest.raises(DataError, match=r"w\.xml: the root element is <html>\n  fix: pass a pages-articles dump"):
        list(Wiki(**options).segments())
    path.write_bytes(dump(page(1, "x"), page(2, "y"))[:-40])
    with pytest.raises(DataError, match=r"w\.xml: broken XML \(.*\)\n  fix: fetch the dump again"):
        list(Wiki(**options).segments())
    packed = tmp_path / "w.xml.bz2"
    packed.write_bytes(bz2.compress(dump(*[page(n, str(random.random())) for n in range(500)]))[:-500])
    with pytest.raises(DataError, match=r"w\.xml\.bz2: cannot be read"):
        list(Wiki(paths={"train": str(packed)}).segments())
    with pytest.raises(DataError, match=r"lacks title"):
        (tmp_path / "wiki_00").write_text('{"id": "1", "text": "x"}\n')
        list(Wiki(paths={"train": str(tmp_path / "wiki_00")}).segments())


def test_damaged_dumps_give_articles_or_a_data_error(tmp_path: Path) -> None:
    whole = dump(*[page(number, PAGE) for number in range(4)])
    path = tmp_path / "w.xml"
    rng = random.Random(3)
    for _ in range(60):
        broken = bytearray(whole)
        for _ in range(rng.randint(1, 5)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        path.write_bytes(broken)
        try:
            list(Wiki(paths={"train": str(path)}).segments())
        except DataError as error:
            assert "w.xml" in str(error)
