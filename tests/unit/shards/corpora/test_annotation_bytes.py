"""Annotation files of every published corpus: other encodings, damaged and random bytes."""

from __future__ import annotations

import codecs
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.corpora.csl_daily import CslDaily
from shards.corpora.how2sign import How2Sign
from shards.corpora.msasl import MsAsl
from shards.corpora.openasl import OpenAsl
from shards.corpora.phoenix14t import Phoenix14T
from shards.corpora.wlasl import Wlasl
from shards.errors import DataError
from shards.schema import Corpus
from tests.unit.shards.corpora import layouts
from tests.unit.shards.corpora.layouts import segments_of


def _gfslt(root: Path) -> Corpus:
    return Phoenix14T(root, labels=root / "labels")


def _phoenix(root: Path) -> Path:
    header = "name|video|start|end|speaker|orth|translation"
    layouts.text(root / "PHOENIX-2014-T.train.corpus.csv", [header, "a-1|a-1/1/*.png|-1|-1|Signer01|REGEN|regen"])
    return root


MAKERS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Corpus], str]] = {
    "csl_daily": (lambda root: layouts.csl(root, pickle_too=False), CslDaily, "sentence_label/split_1.txt"),
    "how2sign": (layouts.how2sign, How2Sign, "how2sign_realigned_train.csv"),
    "openasl": (layouts.openasl, OpenAsl, "data/openasl-v1.0.tsv"),
    "wlasl": (layouts.wlasl, Wlasl, "WLASL_v0.3.json"),
    "msasl": (layouts.msasl, MsAsl, "MSASL_val.json"),
    "csl_pickle": (layouts.csl, CslDaily, "sentence_label/csl2020ct_v2.pkl"),
    "openasl_boxes": (layouts.openasl, OpenAsl, "data/bbox-v1.0.json"),
    "gfslt": (layouts.gfslt, _gfslt, "labels/labels.train"),
    "phoenix14t": (_phoenix, Phoenix14T, "PHOENIX-2014-T.train.corpus.csv"),
}
TEXT_FILES = [name for name, (_, _, file) in MAKERS.items() if file.endswith(("txt", "csv", "tsv", "json"))]


@pytest.mark.parametrize("name", TEXT_FILES)
def test_encodings(name: str, tmp_path: Path) -> None:
    """A byte order mark and CRLF change nothing; Latin-1 and an absent file are refused by name."""
    maker, corpus, file = MAKERS[name]
    path = maker(tmp_path) / file
    plain, payload = segments_of(corpus(tmp_path)), path.read_bytes()
    path.write_bytes(codecs.BOM_UTF8 + payload.replace(b"\n", b"\r\n"))
    assert segments_of(corpus(tmp_path)) == plain
    path.write_bytes(payload[:-3] + b"\xe4" + payload[-3:])
    with pytest.raises(DataError, match=rf"{path.name}.*: not UTF-8"):
        segments_of(corpus(tmp_path))
    for other in path.parent.glob(f"*{path.suffix}"):
        other.unlink()
    with pytest.raises(DataError, match=r"cannot be read|below it|in it|beside the tsv"):
        segments_of(corpus(tmp_path))


def test_pickled_labels_need_no_execution(tmp_path: Path) -> None:
    root = layouts.csl(tmp_path)
    (root / "sentence_label/csl2020ct_v2.pkl").write_bytes(pickle.dumps({"info": [print]}))
    with pytest.raises(DataError, match=r"csl2020ct_v2\.pkl: the pickle wants to load 'builtins\.print': refused"):
        segments_of(CslDaily(root))


@pytest.fixture(scope="module", params=MAKERS)
def layout(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, bytes]:
    """An annotation file, the corpus that reads it, and its right content."""
    maker, corpus, file = MAKERS[request.param]
    root = tmp_path_factory.mktemp(request.param)
    maker(root)
    return root / file, lambda: segments_of(corpus(root)), (root / file).read_bytes()


@given(data=st.data())
def test_damaged_annotations_are_read_or_refused(layout: tuple[Path, Any, bytes], data: st.DataObject) -> None:
    """Whatever the bytes: segments or a DataError."""
    path, read, right = layout
    payload = bytearray(right)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(payload)))
        piece = data.draw(
            st.binary(max_size=3) | st.sampled_from([b"|", b"\t", b"\n", b'"', b"\0", b"null", b"-", b"{", b"9"])
        )
        payload[at : at + data.draw(st.integers(0, 4))] = piece
    path.write_bytes(bytes(payload))
    try:
        read()
    except DataError as error:
        assert error.fix


@given(payload=st.binary(max_size=200))
def test_random_annotations_are_refused(layout: tuple[Path, Any, bytes], payload: bytes) -> None:
    path, read, right = layout
    path.write_bytes(payload)
    try:
        read()
    except DataError as error:
        assert error.fix
    path.write_bytes(right)
    assert read()
