"""Check a shard set completely: structure, checksums, index against members, annotations, and that every video decodes.

``shards.format.verify`` proves that no byte changed since the build; ``lint`` also proves that the bytes are good.
An *error* breaks the set or makes a sample unusable; a *warning* is a sample that looks wrong but can be used.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import functools
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from shards.build.prepare import ordered_map
from shards.format.index import MANIFEST_NAME, ShardSet
from shards.format.opening import open_set
from shards.format.verify import Problem
from shards.inspect.lint_set import set_problems
from shards.inspect.lint_shard import LintOptions, ShardWork, lint_shard
from shards.schema import UNLABELLED
from shards.storage.store import open_folder
from shards.text import load_tokenizer, tokenizer_fingerprint

Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class Rule:
    """What a rule means and how bad breaking it is."""

    severity: Severity
    meaning: str


RULES: dict[str, Rule] = {
    "fingerprint": Rule("error", "index and manifest do not belong together"),
    "splits": Rule("error", "manifest and index count different splits"),
    "unlisted_shard": Rule("error", "a shard that index, manifest and folder do not agree on"),
    "missing_shard": Rule("error", "a shard of the manifest is missing"),
    "samples": Rule("error", "manifest and index count different samples in a shard"),
    "sha256": Rule("error", "a shard's bytes changed since the build"),
    "truncated": Rule("error", "a shard ends too early"),
    "bad_header": Rule("error", "a damaged tar header: other readers lose every later sample"),
    "zero_hole": Rule("error", "zeros where a tar header should be"),
    "size": Rule("error", "sizes that differ from the index or manifest"),
    "crc32": Rule("error", "a sample's bytes changed since the build"),
    "split_sample": Rule("error", "a sample's members do not lie side by side"),
    "duplicate_member": Rule("error", "two members with the same name"),
    "duplicate_id": Rule("error", "two samples with the same id"),
    "meta": Rule("error", "a json member that is damaged or contradicts the index"),
    "decode": Rule("error", "a video that cannot be decoded, or has other frames than the index says"),
    "features": Rule("error", "features of the wrong shape, or with NaN or infinite values"),
    "npy": Rule("error", "token ids that are not an array"),
    "documents": Rule("error", "documents that do not cover their array"),
    "token_range": Rule("error", "token ids that the tokenizer does not know"),
    "tokens": Rule("error", "token ids that are not those of the text"),
    "tokenizer": Rule("error", "the set was made with another tokenizer"),
    "text_hash": Rule("error", "a hash that is not that of the text"),
    "empty_text": Rule("error", "no text"),
    "empty_sample": Rule("error", "neither frames nor tokens"),
    "control_character": Rule("warning", "control characters in a text"),
    "invisible_character": Rule("warning", "zero-width or direction characters in a text"),
    "line_break": Rule("warning", "line breaks or tabs in a text"),
    "replacement_character": Rule("warning", "U+FFFD in a text: characters were lost"),
    "mojibake": Rule("warning", "a text that was encoded twice"),
    "markup": Rule("warning", "HTML or subtitle markup in a text"),
    "control_token": Rule("warning", "a text that spells a control token of a tokenizer"),
    "not_nfc": Rule("warning", "decomposed characters: other tokens than the same text in NFC"),
    "only_punctuation": Rule("warning", "a text without letters and digits"),
    "wrong_script": Rule("warning", "a text in another script than its language's"),
    "few_frames": Rule("warning", "a video of very few frames"),
    "text_too_long": Rule("warning", "more text than anyone signs in that time"),
    "text_too_short": Rule("warning", "hardly any text for a long video"),
    "still_video": Rule("warning", "a video in which nothing moves"),
    "duplicate_video": Rule("warning", "the same video bytes under two keys"),
    "video_in_two_splits": Rule("warning", "the same video bytes in two splits"),
    "text_in_train": Rule("warning", "a text of another split that also occurs in train: scores measure memory"),
}


_UNREADABLE = Rule("error", "a shard that cannot be read")


def rule_of(name: str) -> Rule:
    """The rule of a problem; file system errors have no rule of their own and are always errors."""
    return RULES.get(name, _UNREADABLE)


@dataclass(slots=True)
class LintReport:
    """What was checked, and all problems."""

    dir: str
    shards: int = 0
    samples: int = 0
    frames: int = 0
    """Frames decoded."""
    tokens: int = 0
    seconds: float = 0.0
    problems: list[Problem] = field(default_factory=list)

    @property
    def errors(self) -> int:
        return sum(rule_of(problem.rule).severity == "error" for problem in self.problems)

    @property
    def warnings(self) -> int:
        return len(self.problems) - self.errors

    @property
    def ok(self) -> bool:
        """No errors; there may be warnings."""
        return self.errors == 0

    def by_rule(self) -> dict[str, list[Problem]]:
        """Problems of each broken rule, errors first, in the order of :data:`RULES`."""
        problems: dict[str, list[Problem]] = collections.defaultdict(list)
        for problem in self.problems:
            problems[problem.rule].append(problem)
        others = [rule for rule in problems if rule not in RULES]
        return {rule: problems[rule] for rule in [*others, *RULES] if rule in problems}

    def to_dict(self) -> dict[str, object]:
        problems = [{**dataclasses.asdict(p), "severity": rule_of(p.rule).severity} for p in self.problems]
        rules = {rule: len(problems) for rule, problems in self.by_rule().items()}
        counts = {"errors": self.errors, "warnings": self.warnings, "rules": rules}
        return {**dataclasses.asdict(self), "problems": problems, **counts, "ok": self.ok}

    def to_csv(self) -> str:
        """One line per problem under the header ``severity,rule,shard,key,detail``."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["severity", "rule", "shard", "key", "detail"])
        for problem in self.problems:
            writer.writerow([rule_of(problem.rule).severity, problem.rule, problem.shard, problem.key, problem.detail])
        return buffer.getvalue()


def lint(
    location: Path | str,
    options: LintOptions | None = None,
    workers: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> LintReport:
    """Check every shard of a set.

    Args:
        location: folder or object-store URL that holds manifest.json, index.parquet and the tars.
        options: what to check; default everything but the token ids.
        workers: processes, one shard at a time each; the report is the same for any number.
        on_progress: called with (samples done, samples in all).

    Raises:
        DataError: the set cannot be opened at all (no or unreadable manifest or index), or the tokenizer cannot.
    """
    began, options = time.monotonic(), options or LintOptions()
    folder = open_folder(location)
    shard_set = open_set(folder)
    report = LintReport(str(location), problems=set_problems(shard_set, folder.list(".tar")))
    if others := _tokenizer_problems(shard_set, options.tokenizer):
        report.problems += others
        options = dataclasses.replace(options, tokenizer="")  # every document would differ
    check = functools.partial(lint_shard, options=options)
    for work, result in ordered_map(check, _work(shard_set, str(location)), workers):
        report.shards += 1
        report.samples += len(work.rows)
        report.frames += result.frames
        report.tokens += sum(row["tokens"] for row in work.rows)
        report.problems += result.problems
        if on_progress is not None:
            on_progress(report.samples, len(shard_set))
    report.seconds = time.monotonic() - began
    return report


def _work(shard_set: ShardSet, location: str) -> Iterator[tuple[ShardWork, ShardWork]]:
    """Every shard of the manifest with its rows, from one pass over the index."""
    codes = shard_set.table.column("shard").combine_chunks().dictionary_encode()
    numbers = codes.indices.to_numpy()
    order = np.argsort(numbers, kind="stable")
    starts = np.searchsorted(numbers[order], np.arange(len(codes.dictionary) + 1))
    names = codes.dictionary.to_pylist()
    rows_of = {name: order[starts[n] : starts[n + 1]] for n, name in enumerate(names)}
    manifest = shard_set.manifest
    adopted, unlabelled = bool(manifest.options.get("adopted")), UNLABELLED in manifest.options
    for entry in manifest.shards:
        rows = shard_set.table.take(pa.array(rows_of.get(entry["name"], order[:0]))).to_pylist()
        work = ShardWork(location, manifest.kind, entry, rows, manifest.margin_seconds, unlabelled, adopted)
        yield work, work


def _tokenizer_problems(shard_set: ShardSet, tokenizer: str) -> list[Problem]:
    """A text set names the fingerprint of its tokenizer."""
    made_with = shard_set.manifest.options.get("tokenizer", "")
    if not tokenizer or not made_with:
        return []
    fingerprint = tokenizer_fingerprint(load_tokenizer(tokenizer))
    if fingerprint == made_with:
        return []
    return [Problem(MANIFEST_NAME, "", "tokenizer", f"made with {made_with[:12]}, {tokenizer} is {fingerprint[:12]}")]
