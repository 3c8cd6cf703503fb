"""The member with a sample's annotation: a JSON object, or only the text in tars made elsewhere."""

from __future__ import annotations

import json
from typing import Any


def parse_annotation(payload: bytes, text: str) -> dict[str, Any]:
    """The annotation in a member: the object of a ``.json``, ``{"text": ...}`` for a ``.txt``.

    The index does not say which of the two it is: a ``.txt`` holds exactly the text of its index row.

    Args:
        payload: content of the member.
        text: of the sample's index row.

    Raises:
        ValueError: it is neither.
    """
    try:
        values = json.loads(payload)
        problem = f"holds {type(values).__name__}, not an object"
    except ValueError as error:
        values, problem = None, f"cannot be parsed ({error})"
    if isinstance(values, dict):
        return values
    if payload.decode("utf-8", "replace").strip() == text:
        return {"text": text}
    raise ValueError(problem)
