"""Settings of what else a clip is told beside its text: its glosses, at word level and at frame level."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.section import Section


class CtcConfig(Section):
    """Glosses at word level: a linear head on word tokens, told the glosses of the clip."""

    weight: float = Field(default=0.0, ge=0)
    """Of the CTC loss (Graves et al. 2006) beside the objective: glosses in their order; 0 = none."""
    set_weight: float = Field(default=0.0, ge=0)
    """Of the loss that says which glosses occur, in no order (arXiv 2505.15438); 0 = none."""
    order: Literal["given", "video"] = "given"
    """CTC's order of them: as written, or that in which the head finds them in the clip (arXiv 2505.15438), for glosses
    that were made from a sentence; `video` needs `set_weight`."""
    start_step: int = Field(default=0, ge=0)
    """CTC has no weight in the steps before: with `order: video` the head first learns which glosses occur."""
    unusable: Literal["error", "leave_out"] = "error"
    """A clip without glosses, or with more than its word tokens can hold: an error, or left out of both losses and
    counted (`train/gloss_left_out`)."""

    @property
    def used(self) -> bool:
        """Whether there is a head for glosses."""
        return self.weight > 0 or self.set_weight > 0


class AlignmentConfig(Section):
    """Glosses as a second text of the clip, for the levels below the sentence (arXiv 2507.06732); the text encoder
    reads them as it reads the sentence."""

    frame_weight: float = Field(default=0.0, ge=0)
    """Of the token-level loss between frames and glosses beside the objective; 0 = none."""
    segment_weight: float = Field(default=0.0, ge=0)
    """The same between word tokens and glosses."""

    @property
    def used(self) -> bool:
        """Whether glosses are encoded."""
        return self.frame_weight > 0 or self.segment_weight > 0
