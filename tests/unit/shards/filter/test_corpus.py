"""Filters: each rule, duplicates, contamination, reports, and what a build makes of them."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from shards.build.build import BuildOptions, build
from shards.corpora.text import Text
from shards.errors import DataError, OptionError
from shards.filter.corpus import Filtered, contamination, filtered
from shards.filter.options import FilterOptions
from shards.filter.overlap import EvaluationTexts
from shards.filter.rules import TextRules
from shards.filter.sources import evaluation_texts, identity
from shards.schema import Segment, VideoFile
from shards.storage.store import open_folder
from shards.text import fold_text
from tests.unit.shards.making import ListCorpus, save_tokenizer

GERMAN = "und nun die wettervorhersage für morgen donnerstag den zwölften august"
ENGLISH = "The weather will be fine tomorrow, with light winds from the north east."


def corpus(*texts: str | tuple[str, str], video: bool = False) -> ListCorpus:
    """Train texts, or (split, text)."""
    media = VideoFile(Path("x.mp4")) if video else None
    pairs = [("train", text) if isinstance(text, str) else text for text in texts]
    items = [Segment("c", str(n), split, text, media, origin=f"c:{n}") for n, (split, text) in enumerate(pairs)]
    return ListCorpus(items, "c", {"made": "by hand"})


def reasons(source: ListCorpus, **options: Any) -> list[str]:
    return [segment.excluded for segment in filtered(source, FilterOptions(**options)).segments()]


def reason(text: str, **options: Any) -> str:
    return TextRules(FilterOptions(**options)).reason(text, fold_text(text))


class TestRules:
    def test_lengths(self) -> None:
        assert reason("ab", min_characters=3) == "too_short" == reason("one, two!", min_words=3)
        assert reason("abcd", max_characters=3) == "too_long" == reason("a b c", max_words=2)
        assert reason("abc", min_characters=3, max_characters=3, min_words=1, max_words=1) == ""
        assert reason("今天天气很好", min_words=6) == "" and reason("今天天气很好", min_words=7) == "too_short"

    def test_characters_and_lines(self) -> None:
        assert reason("$$ ## a b", max_symbol_fraction=0.5) == "symbols"
        assert reason("$$ aa", max_symbol_fraction=0.5) == ""
        assert reason("हिन्दी में", max_symbol_fraction=0.05) == "", "vowel signs are no symbols"
        assert reason("12 3a", max_digit_fraction=0.5) == "digits" and reason("1a", max_digit_fraction=0.5) == ""
        assert reason("x\ny\nx\n\nx\n", max_repeated_line_fraction=0.4) == "repeated_lines"
        assert reason("x\ny\nx\n", max_repeated_line_fraction=0.4) == ""

    def test_language(self) -> None:
        german: dict[str, Any] = {"languages": ["de-AT"]}
        assert reason(GERMAN, **german) == "" and reason(ENGLISH, **german) == "language"
        assert reason("this is short", **german) == "", "too short to be judged"
        assert reason(ENGLISH, languages=["de", "en"]) == ""
        assert reason(ENGLISH, languages=["de"], language_confidence=1.0) == "", "never that sure"
        assert reason("Som chlapec, ktorý rád chodí do školy a číta knihy.", languages=["sk"]) == ""
        with pytest.raises(DataError, match="no model for the language xx\n  fix: known: ace, af, am"):
            TextRules(FilterOptions(languages=["xx"]))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"min_characters": -1}, "min_characters is -1\n  fix: use 0 or more"),
            ({"permutations": 0}, "permutations is 0\n  fix: use 1 or more"),
            ({"min_words": 5, "max_words": 4}, "min_words 5 is above max_words 4"),
            ({"max_symbol_fraction": 1.5}, r"max_symbol_fraction 1\.5 is not within 0\.\.1"),
            ({"near_duplicates": 0.3}, r"near_duplicates 0\.3 is not within 0\.5\.\.1"),
            ({"contamination": "yes"}, "contamination 'yes'\n  fix: use one of auto, off, report, exclude"),
            ({"contamination": "off", "against": ["x"]}, "against has no effect with contamination off"),
        ],
    )
    def test_wrong_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(DataError, match=message):
            FilterOptions(**options)


class TestDuplicates:
    def test_the_first_stays(self) -> None:
        source = corpus("Guten Abend!", "x", "guten  abend", ("dev", "guten abend"), ("dev", "Guten Abend"), "x.")
        assert reasons(source, exact_duplicates=True, contamination="off") == [
            "", "", "duplicate", "", "", "duplicate",
        ]  # fmt: skip
        both = reasons(source, exact_duplicates=True, contamination="off", splits=["train", "dev"])
        assert both == ["", "", "duplicate", "", "duplicate", "duplicate"], "splits do not compete"

    def test_near_duplicates(self) -> None:
        words = [f"w{n}" for n in range(60)]
        near = " ".join([*words[:30], "other", *words[31:]])
        source = corpus(" ".join(words), near, " ".join(words[:30]), " ".join(words))
        assert reasons(source, near_duplicates=0.7) == ["", "near_duplicate", "", "near_duplicate"]
        assert reasons(source, near_duplicates=0.7, exact_duplicates=True) == ["", "near_duplicate", "", "duplicate"]

    def test_what_another_rule_excludes_is_no_original(self) -> None:
        source = corpus("aa bb", "aa bb cc", "aa bb cc")
        source.items[1] = dataclasses.replace(source.items[1], excluded="by_publication")
        assert reasons(source, exact_duplicates=True) == ["", "by_publication", ""]
        assert reasons(source, exact_duplicates=True, min_words=3) == ["too_short", "by_publication", ""]

    def test_empty_texts_are_left_to_the_build(self) -> None:
        source = corpus("", " ", "?!", "...", ("dev", "!"))
        assert reasons(source, exact_duplicates=True, languages=["de"]) == [""] * 5, "marks alone are no duplicates"
        assert reasons(source, min_words=1) == ["", "", "too_short", "too_short", ""]


LONG = "heute nacht regnet es im norden und westen teils kräftig im süden bleibt es trocken"


class TestContamination:
    def test_text_corpora_exclude_and_videos_report(self) -> None:
        texts = (
            "a b",
            LONG,
            f"vorher {LONG} nachher",
            f"{LONG} ".replace("norden", "osten"),
            ("test", "A b!"),
            ("dev", LONG),
        )
        assert reasons(corpus(*texts), contamination="auto") == ["contamination"] * 3 + ["", "", ""]
        assert reasons(corpus(*texts, video=True), contamination="auto") == [""] * 6
        assert reasons(corpus(*texts, video=True), contamination="exclude") == ["contamination"] * 3 + ["", "", ""]
        for mode in ("report", "off"):
            assert reasons(corpus(*texts), contamination=mode) == [""] * 6
        report = filtered(corpus(*texts, video=True), FilterOptions(contamination="auto")).report()["contamination"]
        assert (report["train_texts"], report["train_exact"], report["train_near"]) == (4, 2, 1)
        by_name = {split["name"]: split for split in report["splits"]}
        assert (by_name["test"]["texts"], by_name["test"]["exact"], by_name["test"]["short"]) == (1, 1, 1)
        assert by_name["dev"]["examples"] == [
            {"text": LONG, "origin": "c:5", "train_text": LONG, "train_origin": "c:1", "overlap": 1.0, "exact": True}
        ]

    def test_no_other_rule_switches_it_on(self) -> None:
        texts = ("guten abend", "guten abend", ("dev", "Guten Abend"))
        assert reasons(corpus(*texts)) == ["", "", ""]
        assert reasons(corpus(*texts), exact_duplicates=True, min_words=1) == ["", "duplicate", ""]
        found = filtered(corpus(*texts), FilterOptions(exact_duplicates=True))
        assert "contamination" not in found.report() and found.settings["filter"] == {"exact_duplicates": True}

    def test_a_short_sentence_inside_a_document(self) -> None:
        templates = ["{text}", "signs: {gloss} sentence: {text}", "{gloss} = {gloss} {text}"]
        texts = (
            "signs: ABEND GUTEN sentence: Guten Abend!",
            "ABEND = ABEND guten abend",
            "ABEND = GUTEN guten abend",
            "signs: X sentence: neu",
            ("dev", "signs: GUTEN ABEND sentence: guten abend"),
        )
        source = corpus(*texts)
        source.settings["templates"] = templates
        assert reasons(source, contamination="exclude") == ["contamination", "contamination", "", "", ""]
        source.settings = {}
        assert reasons(source, contamination="exclude") == [""] * 5

    def test_overlap_by_its_definition(self) -> None:
        rng = random.Random(0)
        vocabulary = [f"w{n}" for n in range(30)]
        held_out = [" ".join(rng.choices(vocabulary, k=rng.randint(3, 12))) for _ in range(40)]
        train = [" ".join(rng.choices(vocabulary, k=5) + held_out[rng.randrange(40)].split()[1:]) for _ in range(200)]
        words, least = 3, 0.6

        def grams(text: str) -> set[tuple[str, ...]]:
            parts = text.split()
            return {tuple(parts[at : at + words]) for at in range(len(parts) - words + 1)}

        expected = [
            text in held_out or any(len(grams(e) & grams(text)) >= least * len(grams(e)) > 0 for e in held_out)
            for text in train
        ]
        for block in (1, 7, 200):
            texts = EvaluationTexts(words, least)
            texts.add("test", held_out[:15], [""] * 15)
            texts.add("dev", held_out[15:], [""] * 25)
            found = [
                hit
                for start in range(0, 200, block)
                for part in [train[start : start + block]]
                for hit in texts.check(part, part, part).tolist()
            ]
            assert found == expected and 20 < sum(expected) < 200
            assert texts.report().splits[0].texts == 15

    def test_against_files_and_shard_sets(self, tmp_path: Path) -> None:
        (tmp_path / "held.txt").write_text(f"{LONG}\n\nGuten Abend\n")
        source = corpus("guten abend", LONG, "etwas anderes")
        assert reasons(source, against=[str(tmp_path / "held.txt")]) == ["contamination", "contamination", ""]
        options = BuildOptions(tokenizer=save_tokenizer(tmp_path / "tokenizer"))
        build(corpus(LONG, ("dev", "guten abend")), tmp_path / "with_dev", options)
        build(corpus(LONG), tmp_path / "train_only", options)
        assert reasons(source, against=[str(tmp_path / "with_dev")]) == ["contamination", "", ""]
        assert reasons(source, against=[str(tmp_path / "train_only")]) == ["", "contamination", ""]
        with pytest.raises(DataError, match="neither a shard set nor a text file"):
            reasons(source, against=[str(tmp_path / "nowhere")])
        (tmp_path / "bad").mkdir()
        for text, message in (("{", "unreadable manifest"), ("[]", "the manifest names no splits")):
            (tmp_path / "bad" / "manifest.json").write_text(text)
            with pytest.raises(DataError, match=message):
                list(evaluation_texts(str(tmp_path / "bad")))
        with pytest.raises(DataError, match=r"gone\.txt: cannot be read"):
            identity(str(tmp_path / "gone.txt"))

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("e.tsv", "id\ttranslation\n1\tguten abend\n"),
            ("e.csv", 'id,"translation"\n1,guten abend\n'),
            ("e.jsonl", '{"translation": "guten abend"}\n'),
        ],
    )
    def test_the_column_of_a_file(self, tmp_path: Path, name: str, content: str) -> None:
        path = tmp_path / name
        path.write_text(content)
        source = corpus("Guten Abend!", "anderes")
        assert reasons(source, against=[str(path)], against_text="translation") == ["contamination", ""]
        with pytest.raises(
            OptionError, match=r"no column 'text'; .*'translation'\n  fix: add --filter against_text=COLUMN"
        ):
            reasons(source, against=[str(path)])

    def test_files_that_cannot_be_compared_with(self, tmp_path: Path) -> None:
        path = tmp_path / "e.csv"
        path.write_text("name|translation\n1|x\n")
        with pytest.raises(OptionError, match=r"header is one field, 'name\|translation'\n  fix: link it .* in \.psv"):
            reasons(corpus("a"), against=[str(path)], against_text="translation")
        path.write_text("name,text\n1\n")
        with pytest.raises(DataError, match=r"1 fields, the header has 2\n  fix: repair the file, or write its texts"):
            reasons(corpus("a"), against=[str(path)])
        with pytest.raises(OptionError, match="against_text has no effect without against"):
            FilterOptions(against_text="translation")


class TestWrapper:
    def test_attributes_and_settings(self, tmp_path: Path) -> None:
        source = corpus("a")
        source.published = {"train": 1}  # type: ignore[attr-defined]
        path = tmp_path / "held.txt"
        path.write_text("x\n")
        found = filtered(source, FilterOptions(languages=["en", "de"], against=[str(path)]))
        assert found.name == "c" and found.published == {"train": 1} and not hasattr(found, "max_skipped_fraction")  # type: ignore[attr-defined]
        assert found.settings["made"] == "by hand" and found.settings["filter"]["languages"] == ["de", "en"]
        assert found.settings["filter"]["language_library"].startswith("py3langid ")
        changed = filtered(source, FilterOptions(languages=["en", "de"], against=[str(path)]))
        assert changed.settings == found.settings
        path.write_text("y\n")
        assert filtered(source, FilterOptions(against=[str(path)])).settings != found.settings
        assert filtered(source, FilterOptions()).settings["filter"] == {}
        json.dumps(found.settings)

    def test_the_same_every_time_and_bounded_blocks(self) -> None:
        rng = random.Random(3)
        texts = [" ".join(rng.choices("abcdefgh", k=rng.randint(1, 5))) for _ in range(1500)] + ["x " * 3_000_000] * 2
        found = filtered(corpus(*texts), FilterOptions(exact_duplicates=True, near_duplicates=0.8))
        first = [segment.excluded for segment in found.segments()]
        assert [segment.excluded for segment in found.segments()] == first
        assert first[-2:] == ["", "duplicate"] and len(
            {t for t, r in zip(texts, first, strict=True) if not r}
        ) == first.count("")
        assert found.report() == {"segments": 1502, "excluded": {"duplicate": first.count("duplicate")}}

    @pytest.mark.parametrize("change", ["more", "less", "other"])
    def test_a_corpus_that_changes_is_refused(self, change: str) -> None:
        source = corpus("a", "b", "c")
        found = Filtered(source, FilterOptions())
        found.report()
        items = {"more": [*source.items, dataclasses.replace(source.items[0], id="9")], "less": source.items[:2]}
        source.items = items.get(change, [*source.items[:2], dataclasses.replace(source.items[2], text="d")])
        with pytest.raises(DataError, match="corpus c: yields other segments than when its texts were judged"):
            list(found.segments())
        source.items = []
        with pytest.raises(DataError, match="yields other segments"):
            list(found.segments())


def test_filters_that_cannot_act(tmp_path: Path) -> None:
    for mode in ("exclude", "report"):
        with pytest.raises(
            OptionError, match=f"contamination={mode}, but there are no evaluation texts\n  fix: add --filter against"
        ):
            reasons(corpus("a", "b"), contamination=mode)
    (tmp_path / "e.txt").write_text("a\n")
    assert reasons(corpus("a", "b"), contamination="exclude", against=[str(tmp_path / "e.txt")]) == [
        "contamination",
        "",
    ]
    with pytest.raises(
        OptionError,
        match="the corpus has no split 'dev', 'x' to filter; it has train, test\n  fix: add --filter splits=train,test",
    ):
        reasons(corpus("a", ("test", "b")), splits=["dev", "train", "x"], min_words=2)
    assert reasons(corpus("a", ("dev", "b")), splits=["dev"], min_words=2) == ["", "too_short"]


def test_contamination_of_shard_sets(tmp_path: Path) -> None:
    options = BuildOptions(tokenizer=save_tokenizer(tmp_path / "tokenizer"))
    build(corpus("guten abend", LONG, "neu", ("dev", "Guten Abend"), ("test", "ganz neu")), tmp_path / "a", options)
    build(corpus("auch neu", ("test", LONG)), tmp_path / "b", options)
    a, b = open_folder(tmp_path / "a"), open_folder(tmp_path / "b")
    report = contamination([a], [])
    assert Counter({split.name.rpartition(" ")[2]: split.exact for split in report.splits}) == {"dev": 1, "test": 0}
    assert report.splits[0].examples[0].train_origin.endswith("a: c/0")
    assert [split.exact for split in contamination([a, b], [str(tmp_path / "b")]).splits] == [1]
    json.dumps(report.to_dict())
    build(corpus(("dev", "nur dev")), tmp_path / "dev_only", options)
    with pytest.raises(DataError, match="no training texts\n  fix: name shard sets with a train split"):
        contamination([open_folder(tmp_path / "dev_only")], [])
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(DataError, match="no evaluation texts"):
        contamination([a], [str(tmp_path / "none.txt")])
    (tmp_path / "a" / "index.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"index\.parquet: unreadable index"):
        contamination([a], [])


def test_finished_documents_are_compared_by_their_sentences(tmp_path: Path) -> None:
    options = BuildOptions(tokenizer=save_tokenizer(tmp_path / "tokenizer"))
    (tmp_path / "a.jsonl").write_text('{"text": "guten abend", "gloss": "ABEND"}\n{"text": "neu", "gloss": "NEU"}\n')
    pairs = Text(
        paths={"train": str(tmp_path / "a.jsonl")}, gloss="gloss", templates=["signs: {gloss} sentence: {text}"]
    )
    build(pairs, tmp_path / "pairs", options)
    (tmp_path / "e.tsv").write_text("translation\nGuten Abend.\n")
    found = contamination([open_folder(tmp_path / "pairs")], [str(tmp_path / "e.tsv")], column="translation")
    assert (found.train_texts, found.train_exact, found.splits[0].exact) == (2, 1, 1)
    (held,) = evaluation_texts(str(tmp_path / "pairs"))
    assert held.texts == ["guten abend", "neu"]


def test_the_verb(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    import shards.cli.app
    from shards.cli.texts import app

    assert app is shards.cli.app.app

    options = BuildOptions(tokenizer=save_tokenizer(tmp_path / "tokenizer"))
    build(corpus("guten abend", LONG, ("dev", "Guten Abend")), tmp_path / "a", options)
    folder, out = str(tmp_path / "a"), tmp_path / "report.json"
    shown = CliRunner().invoke(app, ["contamination", folder, "--out", str(out)])
    assert shown.exit_code == 0 and "1 of 2 training texts equal an evaluation text" in shown.output.replace("\n", " ")
    printed = CliRunner().invoke(app, ["contamination", folder, "--json", "--words", "3", "--overlap", "0.5"])
    assert json.loads(printed.stdout)["splits"][0]["exact"] == 1 == json.loads(out.read_text())["train_exact"]
    (tmp_path / "e.tsv").write_text("translation\nGuten Abend.\n")
    against = ["contamination", folder, "--json", "--against", str(tmp_path / "e.tsv")]
    assert json.loads(CliRunner().invoke(app, [*against, "--against-text", "translation"]).stdout)["train_exact"] == 1
    refused = CliRunner().invoke(app, against)
    assert refused.exit_code == 2 and "fix: add --against-text COLUMN" in refused.stderr
    failed = CliRunner().invoke(app, ["contamination", str(tmp_path / "gone")])
    assert failed.exit_code == 4 and "neither a shard set nor a text file" in failed.output


def test_contamination_never_compares_a_set_with_itself(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from shards.cli.texts import app

    options = BuildOptions(tokenizer=save_tokenizer(tmp_path / "tokenizer"))
    build(corpus("guten abend"), tmp_path / "only", options)
    failed = CliRunner().invoke(app, ["contamination", str(tmp_path / "only")])
    assert failed.exit_code == 4 and "no evaluation texts: no split but train\n  fix: give --against" in failed.stderr
    for name in ("first", "second"):  # their folder's name is longer than the table is wide
        build(corpus("guten abend", ("dev", "Guten Abend")), tmp_path / ("long" * 20) / name, options)
    folders = [str(tmp_path / ("long" * 20) / name) for name in ("first", "second")]
    shown = CliRunner().invoke(app, ["contamination", *folders], env={"COLUMNS": "80", "TERM": "dumb"})
    cells = "".join(line.split("│")[1].strip() for line in shown.stdout.splitlines() if line.startswith("│"))
    assert all(folder in cells for folder in folders)
