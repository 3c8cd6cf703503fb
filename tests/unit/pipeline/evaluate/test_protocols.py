from __future__ import annotations

import pytest

from pipeline.errors import RecipeError
from pipeline.evaluate.protocols import PROTOCOLS, get_protocol


def test_every_protocol_names_its_source() -> None:
    for name, protocol in PROTOCOLS.items():
        assert protocol.name == name and protocol.source
        assert protocol.to_dict()["name"] == name


@pytest.mark.parametrize(
    ("name", "text", "prepared"),
    [
        ("default", "  Ein   Satz .", "Ein Satz ."),
        ("phoenix14t", "am  tag", "am tag"),
        ("phoenix14t_dot", "am tag", "am tag ."),
        ("phoenix14t_dot", "", " ."),
        ("csl_daily", "你 去，哪里 ？", "你去,哪里?"),
        ("how2sign", "Hi, I'm  Joe.", "Hi, I'm Joe."),
    ],
)
def test_prepare(name: str, text: str, prepared: str) -> None:
    assert get_protocol(name).prepare(text) == prepared


def test_unknown_name_lists_what_exists() -> None:
    with pytest.raises(
        RecipeError, match=r"`phoenix` is not a scoring protocol; did you mean `phoenix14t`\?.*csl_daily"
    ):
        get_protocol("phoenix")
    with pytest.raises(RecipeError, match="Known: default"):
        get_protocol("zzz")
