"""A corpus whose segments are files of frame features or keypoints instead of videos."""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from shards.errors import OptionError
from shards.schema import Corpus, RowsFile, Segment, VideoFile

_FIELDS = ("id", "split", "signer", "media")


class Placed:
    """Any corpus, its media replaced by files named by a template. Has the wrapped one's optional attributes.

    Args:
        corpus: yields the segments and their texts.
        template: path of a segment's file: ``feats/{split}/{id}.npy``, or ``poses/{media}.pose`` with the name of its
            video without the suffix. A file named by ``{media}`` alone covers the whole video: the segment's times
            cut it. Empty: the corpus's own media are the files.

    Raises:
        OptionError: a template with other fields, or without id and media.
    """

    def __init__(self, corpus: Corpus, template: str) -> None:
        self.corpus, self.template = corpus, template
        self.name = corpus.name
        try:
            self.fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
        except ValueError:
            self.fields = {template}
        if template and (self.fields - set(_FIELDS) or not self.fields & {"id", "media"}):
            raise OptionError(
                f"{template!r} does not name a file per segment",
                where="--rows",
                fix="use {id} or {media}, and {split} or {signer} where folders are named so: feats/{split}/{id}.npy",
            )
        self.settings: dict[str, object] = dict(getattr(corpus, "settings", {}))
        for name in ("published", "max_skipped_fraction", "notes"):
            if hasattr(corpus, name):
                setattr(self, name, getattr(corpus, name))

    def segments(self) -> Iterator[Segment]:
        """The corpus's segments in its order. Raises DataError as the corpus, OptionError for texts without media."""
        for segment in self.corpus.segments():
            if segment.media is None:
                raise OptionError(
                    "the segments are texts without media", where=self.name, fix="leave --rows out for a text corpus"
                )
            yield replace(segment, media=self._file(segment))

    def _file(self, segment: Segment) -> RowsFile:
        media = segment.media
        assert media is not None
        timed = isinstance(media, VideoFile) and "id" not in self.fields
        times = (media.start_seconds, media.end_seconds) if timed and isinstance(media, VideoFile) else (None, None)
        if not self.template:
            return RowsFile(media.path, *times)
        values = {"id": segment.id, "split": segment.split, "signer": segment.signer, "media": media.path.stem}
        return RowsFile(Path(self.template.format(**values)), *times)
