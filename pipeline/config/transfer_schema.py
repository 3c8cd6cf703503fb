"""Recipe sections that carry learned weights over from earlier runs."""

from __future__ import annotations

from pipeline.config.section import Section


class InitFromConfig(Section):
    """Export folders whose weights a new run starts with, by part; `model` where no other field names the part."""

    model: str | None = None
    """Every part that the export and this stage's model both have."""
    visual: str | None = None
    """The visual encoder (contrastive, connector)."""
    connector: str | None = None
    """The connector (connector)."""
    llm: str | None = None
    """The language model (continued_pretraining, connector)."""
    heads: str | None = None
    """Projections, logit scales and text statistics, from `heads.safetensors` (contrastive)."""


__all__ = ["InitFromConfig"]
