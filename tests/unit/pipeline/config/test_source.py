from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.source import as_value, dump_yaml, parse_value, read_document


def read(text: str):  # type: ignore[no-untyped-def]
    return read_document(Path("r.yaml"), text)


def test_lines_of_every_setting() -> None:
    document = read("a: 1\nb:\n  c: [1,\n    2]\n")
    assert document.data == {"a": 1, "b": {"c": [1, 2]}}
    assert document.lines == {"a": 1, "b": 2, "b.c": 3, "b.c.0": 3, "b.c.1": 4}
    assert document.where("b.c.1") == "r.yaml:4" and document.where("z") == "r.yaml"


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("010", "010"), ("no", "no"), ("true", True), ("~", None), ("", None), ("1_000", 1000),
     (".5", 0.5), ("12:30", "12:30"), ("2024-01-01", "2024-01-01"), ("[1, a]", [1, "a"]), ("{a: 1}", {"a": 1}),
     (".inf", ".inf"), ("'7'", "7")],
)  # fmt: skip
def test_values_follow_yaml_1_2(text: str, value: object) -> None:
    assert parse_value(text) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "r.yaml:2: a is given twice (first in line 1); keep one"),
        ("a: &x\n  b: *x\n", "contains itself through a YAML alias"),
        ("a: !!binary abc\n", "has the YAML tag"),
        ("? [a]\n: 1\n", "has a key that is not a plain word"),
        ("- 1\n", "must be a mapping of settings"),
        ("", "is empty; a recipe needs at least name"),
        ("a: [1\n", "is not valid YAML"),
        ("a: !!int x\n", "'x' is not a int"),
    ],
)
def test_what_a_recipe_cannot_hold(text: str, message: str) -> None:
    problems = [f"{problem.where}: {problem.text}" for problem in read(text).problems]
    assert len(problems) == 1 and message in problems[0]


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe")
    assert "not UTF-8 text" in read_document(tmp_path / "bytes.yaml").problems[0].text
    assert "cannot be read: No such file" in read_document(tmp_path / "none.yaml").problems[0].text


def test_bad_values() -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_value("[1")
    with pytest.raises(ValueError, match="is given twice"):
        parse_value("{a: 1, a: 2}")


def test_control_characters_are_no_text() -> None:
    with pytest.raises(ValueError, match="special characters are not allowed"):
        parse_value("a\x07b")
    assert "is not valid YAML: " in read("name: a\x07b\n").problems[0].text


@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    | st.sampled_from(["a: b", "#", "1e3", "x #y", "~", ""])
)
def test_any_text_can_be_written_as_a_value(text: str) -> None:
    try:
        assert parse_value(as_value(text)) == text
    except ValueError:  # what YAML does not allow in any form is refused, not changed
        assert not text.isprintable()


_plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=12)
@given(st.dictionaries(st.text(min_size=1, max_size=8), _plain, min_size=1, max_size=3))
def test_dump_and_read_give_the_same_data(data: dict[str, object]) -> None:
    document = read(dump_yaml(data))
    assert not document.problems and document.data == data
