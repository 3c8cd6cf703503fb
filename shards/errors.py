"""The data layer's own errors. A reader of the message must learn what, where and how to fix it."""

from __future__ import annotations


class DataError(Exception):
    """Input data that cannot be used: names the corpus or file, the shard, the sample and the rule.

    Args:
        what: what is wrong, with the value that was found.
        where: file, shard, key or field, as precise as is known (``corpus.csv:12``, ``train-000003.tar:key``).
        fix: what the user can do about it.
    """

    exit_code = 4

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(": ".join(part for part in (where, what) if part) + (f"\n  fix: {fix}" if fix else ""))

    def __reduce__(self) -> tuple[object, ...]:  # keeps the three parts when a worker process raises it
        return _rebuild, (type(self), self.what, self.where, self.fix)


class OptionError(DataError):
    """An option or argument that cannot be used, whatever the data hold."""

    exit_code = 2


def _rebuild(kind: type[DataError], what: str, where: str, fix: str) -> DataError:
    return kind(what, where=where, fix=fix)
