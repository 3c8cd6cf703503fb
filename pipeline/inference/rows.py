"""Files of keypoints or features as an exported model reads them: in the form its training shards were built with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import CheckpointError
from shards.errors import DataError
from shards.media.poses import POSE, PoseFiles
from shards.media.rows import FeatureFiles, RowsForm

ROWS_FORM = "rows_form.json"
"""In an export: what `options.features` of its training shards says, under ``frames`` and ``pose``."""


@dataclass(frozen=True, slots=True)
class RowForms:
    """How files are read that are no videos."""

    frames: FeatureFiles | None = None
    """Features in place of a backbone's."""
    pose: PoseFiles | None = None
    """Keypoints."""

    @property
    def alone(self) -> RowsForm | None:
        """The form of a model without a backbone; None for one that reads videos."""
        return self.pose if self.frames is None else self.frames

    @classmethod
    def of_records(cls, records: dict[str, dict[str, Any]]) -> RowForms:
        """Forms from manifests. Raises KeyError or DataError for records that say too little."""
        forms = {name: form_of(record) for name, record in records.items()}
        return cls(**forms)


def form_of(record: dict[str, Any]) -> Any:
    """The form of a set of rows, from `options.features` of its manifest. Raises as `RowForms.of_records`."""
    if record.get("kind") == POSE:
        return PoseFiles.from_record(record)
    return FeatureFiles(*(record[name] for name in ("kind", "fingerprint", "width", "rate")))


def read_row_forms(export_dir: Path) -> RowForms:
    """The forms that an export names; none for a model of videos.

    Raises:
        CheckpointError: the file exists but is no usable form.
    """
    path = export_dir / ROWS_FORM
    if not path.is_file():
        return RowForms()
    try:
        return RowForms.of_records(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError, DataError) as error:
        raise CheckpointError(f"{path} does not say how rows are read ({error!r}); export the run again.") from error
