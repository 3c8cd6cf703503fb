"""Precomputed features: what a file must hold, cutting by time, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.errors import DataError, OptionError
from shards.media.rows import FeatureFiles, load_array
from shards.schema import RowsFile

FORM = FeatureFiles("i3d", "bsl5k", 4, 2.0)


def saved(folder: Path, values: Any, name: str = "a.npy") -> Path:
    np.save(folder / name, values)
    return folder / name


def test_rows_are_read_as_float16_and_cut_by_time(tmp_path: Path) -> None:
    values = np.arange(40, dtype=np.float32).reshape(10, 4) / 3
    path = saved(tmp_path, values)
    whole = FORM.read(RowsFile(path))
    assert whole.dtype == np.float16 and (whole == values.astype(np.float16)).all()
    np.testing.assert_array_equal(FORM.read(RowsFile(path, 1.0, 3.0)), whole[2:6])
    np.testing.assert_array_equal(FORM.read(RowsFile(path, 4.0)), whole[8:])
    assert FORM.record() == {"kind": "i3d", "fingerprint": "bsl5k", "width": 4, "rate": 2.0, "dtype": "<f2"}


def test_unusable_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds float64 \[10, 5\], declared are rows of 4 numbers"):
        FORM.read(RowsFile(saved(tmp_path, np.zeros((10, 5)))))
    with pytest.raises(DataError, match="row 3 holds values beyond the range of float16, or not finite"):
        FORM.read(RowsFile(saved(tmp_path, np.where(np.arange(10)[:, None] == 3, 1e6, np.zeros((10, 4))))))
    with pytest.raises(DataError, match="no row between 9 s and 11 s: it has 10 at 2 per second"):
        FORM.read(RowsFile(saved(tmp_path, np.zeros((10, 4))), 9, 11))
    with pytest.raises(DataError, match="holds <U1, not one array of numbers"):
        load_array(saved(tmp_path, np.asarray(["a"])))
    (tmp_path / "b.npy").write_bytes(b"no array")
    with pytest.raises(DataError, match=r"not a readable \.npy file"):
        load_array(tmp_path / "b.npy")


def test_objects_in_a_file_are_not_unpickled(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not a readable \.npy file"):
        load_array(saved(tmp_path, np.asarray([{"a": 1}], dtype=object)))


def test_unusable_options() -> None:
    with pytest.raises(
        OptionError,
        match="fingerprint is empty; kind pose is for keypoints; width 0 and rate 0 must be positive",
    ):
        FeatureFiles("pose", " ", 0, 0.0)
