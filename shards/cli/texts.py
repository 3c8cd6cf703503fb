"""``slt shards`` verbs on texts of finished shard sets: text columns of several kinds, contamination."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shards.cli.common import Json, app, data_errors, pairs, with_settings
from shards.errors import OptionError

if TYPE_CHECKING:
    from shards.exchange.pseudo_gloss import GlossOptions
    from shards.filter.overlap import ContaminationReport
    from shards.format.text_columns import TextColumn


@app.command(epilog="Example: slt shards texts data/ph14t paraphrase --table paraphrases.tsv --columns text=sentence")
@data_errors
def texts(
    location: Annotated[Path, typer.Argument(help="shard set on a disk")],
    name: Annotated[str, typer.Argument(help="of the text column; without it the columns are listed")] = "",
    table: Annotated[
        Path | None, typer.Option(help=".tsv, .csv, .psv, .jsonl, .json or .parquet, one row per text")
    ] = None,
    from_set: Annotated[Path | None, typer.Option(help="take the column of that name over from another set")] = None,
    columns: Annotated[
        str, typer.Option(help="which column of the table says what: id=name,text=translation,score=probability")
    ] = "",
    replace: Annotated[bool, typer.Option("--replace", help="an existing column of that name goes")] = False,
) -> None:
    """Keep further texts of every sample beside a shard set: references, paraphrases, glosses.

    Shards and index stay as they are. Several rows of one sample are its
    texts in the order of the table.
    """
    from shards.exchange.text_table import TableColumns, column_from_set, column_from_table
    from shards.format.index import read_index
    from shards.format.text_columns import column_names, open_column

    if name and (table is None) == (from_set is None):
        raise OptionError("give one of --table and --from-set", where="slt shards texts", fix="add it")
    if table is not None:
        column_from_table(location, name, table, TableColumns(**_named_columns(columns, TableColumns)), replace)
    elif from_set is not None:
        column_from_set(location, name, from_set, replace)
    shard_set = read_index(location)
    for each in [name] if name else column_names(location):
        typer.echo(f"{location}: {column_line(open_column(shard_set, each))}")


def column_line(column: TextColumn) -> str:
    """What a text column holds, in a line."""
    numbers = [len(column.texts(row)) for row in range(len(column))]
    return (
        f"{column.name}: {sum(numbers)} texts of {sum(map(bool, numbers))} of {len(numbers)} samples, "
        f"at most {max(numbers, default=0)} of one; fingerprint {column.fingerprint[:12]}"
    )


@app.command(epilog="Example: slt shards contamination data/ph14t --against data/how2sign --against extra.txt")
@data_errors
def contamination(
    train: Annotated[list[str], typer.Argument(help="shard sets whose train split is searched")],
    against: Annotated[
        list[str] | None, typer.Option(help="shard set or text file; default: the sets' own other splits")
    ] = None,
    against_text: Annotated[str, typer.Option(help="column of the text in the files of --against")] = "text",
    words: Annotated[int, typer.Option(min=1, help="words per n-gram")] = 8,
    overlap: Annotated[
        float, typer.Option(min=0, max=1, help="part of an evaluation text's n-grams in one training text")
    ] = 0.8,
    out: Annotated[Path | None, typer.Option(help="also write the report as JSON to this file")] = None,
    as_json: Json = False,
) -> None:
    """Count the evaluation texts that occur in training texts: equal, or most of their n-grams inside one of them."""
    from shards.filter.corpus import contamination as run
    from shards.storage.store import open_folder

    report = run([open_folder(location) for location in train], against or [], words, overlap, against_text)
    if out is not None:
        from shards.atomic import write_atomic

        write_atomic(out, json.dumps(report.to_dict(), ensure_ascii=False, indent=1).encode() + b"\n")
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
        return
    _show(report)


def _show(report: ContaminationReport) -> None:
    from rich.table import Table

    from shards.terminal import table_console

    console = table_console()
    table = Table("evaluation texts", "number", "equal in train", "overlapping", "part", "too short to overlap")
    table.columns[0].overflow, table.columns[0].min_width = "fold", 32  # long paths differ at their ends
    for split in report.splits:
        part = (split.exact + split.near) / max(1, split.texts)
        figures = (split.texts, split.exact, split.near, f"{part:.1%}", split.short)
        table.add_row(split.name, *map(str, figures))
    console.print(table)
    console.print(
        f"{report.train_exact} of {report.train_texts} training texts equal an evaluation text, {report.train_near} "
        f"more hold {report.overlap:.0%} of the {report.words}-word n-grams of one"
    )
    for split in report.splits:
        for example in split.examples[:3]:
            how = "equal" if example.exact else f"{example.overlap:.0%}"
            console.print(f"{example.origin}: {example.text!r} ({how}) {example.train_origin}", markup=False)


@dataclasses.dataclass(frozen=True)
class GlossSettings:
    """The options of ``pseudo-gloss``."""

    name: Annotated[str, typer.Option(help="of the text column")] = "pseudo_gloss"
    splitter: Annotated[str, typer.Option(help="words | tokenizer | jieba | spacy | stanza: how words are found")] = (
        "words"
    )
    model: Annotated[
        list[str],
        typer.Option(help="tokenizer folder, spaCy model or Stanza language; several languages: de=MODEL, repeat"),
    ] = dataclasses.field(default_factory=list)
    tags: Annotated[str, typer.Option(help="parts of speech that are kept, where the splitter knows them")] = ""
    min_texts: Annotated[int, typer.Option(min=1, help="words in fewer training texts go")] = 1
    max_share: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="words in a larger share go; default 0.2 without parts of speech, else 1"),
    ] = None
    drop: Annotated[Path | None, typer.Option(help="file with further words that go, one a line")] = None
    replace: Annotated[bool, typer.Option("--replace", help="an existing column of that name goes")] = False

    def options(self) -> GlossOptions:
        """The options as the builder of the column takes them."""
        from shards.corpora.rows import read_lines
        from shards.exchange.pseudo_gloss import GlossOptions

        named = [entry.partition("=") for entry in self.model]
        options = GlossOptions(
            splitter=self.splitter,
            models={first if equals else "": path if equals else first for first, equals, path in named},
            min_texts=self.min_texts,
            max_share=self.max_share,
            dropped=tuple(line.strip() for _, line in read_lines(self.drop)) if self.drop is not None else (),
        )
        tags = tuple(tag.strip().upper() for tag in self.tags.split(",") if tag.strip())
        return dataclasses.replace(options, tags=tags) if tags else options


@app.command(
    name="pseudo-gloss",
    epilog="Example: slt shards pseudo-gloss data/ph14t --splitter spacy --model de=de_core_news_sm --min-texts 2",
)
@data_errors
@with_settings(GlossSettings)
def pseudo_gloss(
    location: Annotated[Path, typer.Argument(help="shard set on a disk")],
    settings: GlossSettings,
    as_json: Json = False,
) -> None:
    """Keep the content words of every text as a text column.

    The choice is made on the training split: by part of speech where the
    splitter tags (spaCy, Stanza, jieba), and by the share of texts a word is
    in. Scripts without spaces: jieba, a tokenizer's pieces, or characters.
    """
    from shards.exchange.pseudo_gloss import pseudo_glosses

    figures = pseudo_glosses(location, settings.options(), settings.name, settings.replace)
    if as_json:
        typer.echo(json.dumps({language: dataclasses.asdict(of) for language, of in figures.items()}))
        return
    for language, of in figures.items():
        typer.echo(
            f"{language or 'no language'}: {of.kept} of {of.words} words of {of.texts} texts kept, "
            f"{of.vocabulary} distinct in training; {of.empty} texts without any, {of.unknown} words only in other "
            f"splits\n  most frequent: {' '.join(of.frequent)}\n  left out: {' '.join(of.left_out)}"
        )


@app.command(
    epilog=r"Example: slt shards previous data/youtube-asl --pattern '(?P<video>.+)-(?P<start>\d+)-\d+' --count 3"
)
@data_errors
def previous(
    location: Annotated[Path, typer.Argument(help="shard set on a disk")],
    pattern: Annotated[
        str, typer.Option(help="expression that finds video and start in a sample's id, as named groups")
    ] = "",
    table: Annotated[Path | None, typer.Option(help="or a table with the video and start of every sample")] = None,
    columns: Annotated[str, typer.Option(help="which column of the table says what: id=name,video=file,start=t0")] = "",
    count: Annotated[int, typer.Option(min=1, help="most sentences before each sample")] = 1,
    name: Annotated[str, typer.Option(help="of the text column; NAME_ids holds the ids of their samples")] = "previous",
    replace: Annotated[bool, typer.Option("--replace", help="existing columns of these names go")] = False,
) -> None:
    """Keep the sentences before each sample in the same video as a text column.

    Samples of one corpus, split, language and video stand in the order of
    their starts.
    """
    from shards.exchange.previous import TimeColumns, places_by_pattern, places_by_table, previous_sentences
    from shards.format.index import read_index

    if bool(pattern) == (table is not None):
        raise OptionError("give one of --pattern and --table", where="slt shards previous", fix="add it")
    shard_set = read_index(location)
    if table is not None:
        places = places_by_table(shard_set, table, TimeColumns(**_named_columns(columns, TimeColumns)))
    else:
        places = places_by_pattern(shard_set, pattern)
    typer.echo(f"{location}: {column_line(previous_sentences(location, places, count, name, replace))}")


def _named_columns(text: str, of: type) -> dict[str, str]:
    """``id=name,text=sentence`` as fields of a dataclass. Raises OptionError for another name."""
    known = {field.name for field in dataclasses.fields(of)}
    named = pairs(text.split(","), "--columns") if text else {}
    if unknown := sorted(set(named) - known):
        raise OptionError(f"unknown {unknown[0]!r}", where="--columns", fix=f"known: {', '.join(sorted(known))}")
    return named
