"""The member that holds a sample's annotation: a JSON object, or in tars made elsewhere the text alone."""

from __future__ import annotations

import json
from typing import Any


def parse_annotation(payload: bytes, text: str) -> dict[str, Any]:
    """What the member says: the object of a ``.json``, ``{"text": ...}`` for a ``.txt``.

    The index does not tell the two apart: a ``.txt`` is known by holding nothing but the text of its index row.

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
