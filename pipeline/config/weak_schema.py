"""The recipe's section for weakly aligned data: `data.jitter`."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.section import Section


class JitterConfig(Section):
    """Moves the cut of a clip in time, anew whenever training shows it: subtitles follow the sound, and lie a little
    before or after the signing. The length stays, so that the order of the data does (docs/long-video.md)."""

    before_seconds: float = Field(default=0.0, ge=0)
    """At most so much earlier than annotated; the shard set keeps a margin at least as long."""
    after_seconds: float = Field(default=0.0, ge=0)
    """At most so much later."""
    probability: float = Field(default=1.0, gt=0, le=1)
    """Of a moved cut; the others are as annotated."""
    corpora: list[str] = []
    """Only clips of these corpora; empty = of all."""

    @property
    def most_seconds(self) -> float:
        """The margin that it needs; 0 = no cut is moved."""
        return max(self.before_seconds, self.after_seconds)
