"""Pickles are read as data: nothing in them runs, whatever their bytes say."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import pickletools
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shards.corpora import unpickle
from shards.corpora.unpickle import TENSOR_PARTS, UNREAD, read_labels, safe_unpickle
from shards.errors import DataError

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)


class Harmful:
    """Unpickled by ``pickle.load`` it would make a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def saved(folder: Path, payload: bytes) -> Path:
    path = folder / "labels.train"
    path.write_bytes(payload)
    return path


@given(value=PLAIN, protocol=st.integers(0, 5), packed=st.booleans())
def test_plain_containers_survive(
    value: Any, protocol: int, packed: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    payload = pickle.dumps(value, protocol)
    path = saved(tmp_path_factory.mktemp("p"), gzip.compress(payload) if packed else payload)
    assert safe_unpickle(path) == value


def test_bytes(tmp_path: Path) -> None:
    """Kept when short; a tensor's storage is not. Protocols before 3 spell them as a call, which is refused."""
    assert safe_unpickle(saved(tmp_path, pickle.dumps([b"ab", b"x" * 5000]))) == [b"ab", UNREAD]
    with pytest.raises(DataError, match=r"wants to load '_codecs\.encode'"):
        safe_unpickle(saved(tmp_path, pickle.dumps(b"ab", 2)))


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_is_executed(tmp_path: Path, protocol: int) -> None:
    target = tmp_path / "made by the pickle"
    path = saved(tmp_path, pickle.dumps([{"name": "a", "text": Harmful(target)}], protocol))
    with pytest.raises(DataError, match=r"labels\.train: the pickle wants to load 'posix\.mkdir': refused, because"):
        safe_unpickle(path)
    # Even an allowed name is only a name.
    assert safe_unpickle(path, {"posix.mkdir"}) == [{"name": "a", "text": UNREAD}]
    assert not target.exists()
    pickle.loads(path.read_bytes())
    assert target.exists(), "the file was harmless: the test shows nothing"


def test_tensors_are_left_unread(tmp_path: Path) -> None:
    """neccam/slt's files: a list of dicts with a float tensor beside the text."""
    entry = {"name": "train/a", "signer": "Signer04", "gloss": "A", "text": "a .", "sign": torch.ones(40, 64)}
    path = saved(tmp_path, gzip.compress(pickle.dumps([entry, entry | {"name": "train/b"}])))
    first, second = safe_unpickle(path, TENSOR_PARTS)
    assert first["sign"] is UNREAD and repr(first["sign"]) == "UNREAD" and second["name"] == "train/b"
    with pytest.raises(DataError, match=r"wants to load 'torch\._utils\._rebuild_tensor_v2'"):
        safe_unpickle(path)
    with pytest.raises(DataError, match="wants to load 'numpy"):
        safe_unpickle(saved(tmp_path, pickle.dumps({"a": torch.ones(1).numpy()})), TENSOR_PARTS)
    assert safe_unpickle(saved(tmp_path, pickle.dumps(OrderedDict(a=1))), TENSOR_PARTS) is UNREAD


def test_python_2_texts(tmp_path: Path) -> None:
    assert safe_unpickle(saved(tmp_path, b"U\x03\xe4\xbd\xa0.")) == "你"
    assert safe_unpickle(saved(tmp_path, b"U\x01\xe4.")) == "ä"


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "not a usable pickle: ValueError: pickle exhausted before seeing STOP"),
        (b"]", "not a usable pickle: ValueError: pickle exhausted"),
        (b".", "IndexError"),
        (b"0.", "IndexError: pop from empty list"),
        (b"](a.", "a value is missing"),
        (b"K\x01K\x02a.", "items for a int"),
        (b"](K\x01u.", "keys and values for a list"),
        (b"}]K\x01s.", "a list as a key"),
        (b"}(K\x01u.", "keys and values for a dict"),
        (b"}" + b")" + b"\x85" * 50_000 + b"K\x01s.", "a tuple as a key"),
        (b"K\x01)R.", "REDUCE on a int"),
        (b"(K\x01o.", "it calls something that is no class"),
        (b"(K\x01icodecs\nencode\n.", "wants to load 'codecs.encode'"),
        (b"ccodecs\nencode\n.", "wants to load 'codecs.encode'"),
        (b"\x8c\x05posix\x8c\x06system\x93.", "wants to load 'posix.system'"),
        (b"Pid\n.", "the pickle uses PERSID, which annotations do not need"),
        (b"\x82\x01.", "the pickle uses EXT1"),
        (b"\x8f.", "the pickle uses EMPTY_SET"),
        (b"h\x07.", "KeyError: 7"),
        (b"\x8e" + struct.pack("<Q", 1 << 62) + b"abc", "one value claims 4611686018427387904 bytes"),
        (b"\x1f\x8bnonsense", "not a usable pickle: cannot be read|BadGzipFile|EOFError"),
        (gzip.compress(pickle.dumps(["a" * 5000]), mtime=0)[:-30], "EOFError|not a usable pickle"),
        (b"r\xff\xff\xff\x7f.", "IndexError"),
    ],
)
def test_broken_and_hostile_files(tmp_path: Path, payload: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        safe_unpickle(saved(tmp_path, payload))


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = saved(tmp_path, gzip.compress(b"]" + b"N0" * 1_000_000 + b"."))
    with pytest.raises(DataError, match="it unpacks to more than 1000 bytes"):
        safe_unpickle(bomb, max_bytes=1000)
    monkeypatch.setattr(unpickle, "MAX_OPERATIONS", 1000)
    with pytest.raises(DataError, match="more than 1000 operations"):
        safe_unpickle(bomb)
    with pytest.raises(DataError, match=r"not a usable pickle: cannot be read \(No such file"):
        safe_unpickle(tmp_path / "absent")


def test_all_container_opcodes(tmp_path: Path) -> None:
    """Ones that Python's pickler no longer writes."""
    cases = {
        b"(K\x01K\x02l.": [1, 2],
        b"(K\x01K\x02d.": {1: 2},
        b"(K\x01K\x02t.": (1, 2),
        b"K\x01K\x02K\x03\x87.": (1, 2, 3),
        b"K\x012\x86.": (1, 1),
        b"K\x01K\x020.": 1,
        b"K\x01(K\x02K\x031.": 1,
        b"]q\x05h\x05a.": None,
        b"I01\n.": True,
        b"ccollections\nOrderedDict\n)\x81}b.": UNREAD,
        b"ccollections\nOrderedDict\n)}\x92.": UNREAD,
        b"(ccollections\nOrderedDict\nK\x01o.": UNREAD,
        b"(K\x01icollections\nOrderedDict\n.": UNREAD,
        b"ccollections\nOrderedDict\n)RK\x01K\x02s(K\x01e.": UNREAD,
    }
    for payload, expected in cases.items():
        value = safe_unpickle(saved(tmp_path, payload), TENSOR_PARTS)
        assert (value[0] is value) if expected is None else value == expected, payload


@given(payload=st.binary(max_size=400))
def test_random_bytes(payload: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert_refused_or_plain(saved(tmp_path_factory.mktemp("p"), payload))


@given(data=st.data(), entries=st.lists(st.dictionaries(st.sampled_from(["name", "text", "gloss"]), PLAIN), max_size=4))
def test_mutated_pickles(data: st.DataObject, entries: list[Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("p")
    payload = bytearray(pickle.dumps([*entries, Harmful(folder / "made")]))
    for _ in range(data.draw(st.integers(1, 8))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    assert_refused_or_plain(saved(folder, bytes(payload)))
    assert_refused_or_plain(saved(folder, gzip.compress(bytes(payload))[: data.draw(st.integers(10, 400))]))
    assert not (folder / "made").exists()


def assert_refused_or_plain(path: Path) -> None:
    for allowed in (frozenset[str](), TENSOR_PARTS):
        try:
            safe_unpickle(path, allowed)
        except DataError as error:
            assert str(path) in str(error)


class TestLabels:
    def test_lists_and_dicts(self, tmp_path: Path) -> None:
        entry = {"name": "a", "text": "b"}
        as_dict = saved(tmp_path, pickle.dumps({"train/a": entry}))
        assert list(read_labels(as_dict, ("name",))) == [(f"{as_dict}:train/a", entry)]
        assert list(read_labels(saved(tmp_path, pickle.dumps([entry])), ("name",))) == [(f"{as_dict}:0", entry)]

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (3, "holds a int, not a list or dict of entries"),
            ([{"name": "a"}], r"train:0: the entry lacks text; found \['name'\]"),
            (["a"], "train:0: the entry lacks name, text; found str"),
        ],
    )
    def test_other_content(self, tmp_path: Path, value: Any, message: str) -> None:
        with pytest.raises(DataError, match=message):
            list(read_labels(saved(tmp_path, pickle.dumps(value)), ("name", "text")))


def test_the_machine_agrees_with_the_disassembler(tmp_path: Path) -> None:
    """The oddest plain pickle that CPython writes: shared and nested references."""
    shared = {"words": ["a", "b"], "empty": [(), {}, []]}
    value = [shared, shared, (shared, [shared])]
    payload = pickletools.optimize(pickle.dumps(value))
    pickletools.dis(payload, out=io.StringIO())
    assert safe_unpickle(saved(tmp_path, payload)) == value
