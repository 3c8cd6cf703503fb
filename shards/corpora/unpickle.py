"""Reads pickled label files without running anything in them.

Several corpora are distributed as (gzipped) pickles. A pickle is a program, and ``pickle.load`` runs it. Here its
opcodes are read as data: containers, numbers and texts are rebuilt; classes and functions that the file names are
never imported, called or looked up. A file that needs one is refused with its name. A caller may allow names whose
results it does not need (tensors beside the texts); each becomes :data:`UNREAD`.
"""

from __future__ import annotations

import pickletools
import struct
import zlib
from collections.abc import Collection, Iterable, Iterator
from gzip import GzipFile
from pathlib import Path
from types import NoneType
from typing import IO, Any, Final

from shards.errors import DataError

MAX_BYTES = 16 << 30
"""Limit on unpacked bytes; the largest published file with features has about 4 GB."""
MAX_OPERATIONS = 50_000_000
"""Limit on opcodes; PHOENIX-2014T's largest label file has 1.8 million."""
_MAX_VALUE_BYTES = 1 << 28
_KEPT_BYTES = 1 << 12  # a longer byte string is a tensor's storage, never an annotation
_GZIP_MAGIC = b"\x1f\x8b"

TENSOR_PARTS = frozenset(
    {
        "collections.OrderedDict",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch.storage._load_from_bytes",
    }
)
"""The names in a pickled torch tensor."""

_VALUES = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    )
)
_OLD_STRINGS = frozenset(("STRING", "BINSTRING", "SHORT_BINSTRING"))
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, type] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUT = frozenset(("PUT", "BINPUT", "LONG_BINPUT"))
_GET = frozenset(("GET", "BINGET", "LONG_BINGET"))
_CALLS = {"REDUCE": 2, "NEWOBJ": 2, "NEWOBJ_EX": 3, "BUILD": 2}
"""Opcodes that would call or fill an object, and how many stack entries the object replaces."""
_KEYS = (str, int, float, bytes, NoneType)


class Unread:
    """Stands for a value that was not rebuilt."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "UNREAD"


UNREAD: Final = Unread()


class _Malformed(Exception):
    """The opcodes do not describe a value."""


class _Bounded:
    """A stream with a limit on its bytes; only the methods that ``pickletools.genops`` calls."""

    def __init__(self, handle: IO[bytes] | GzipFile, limit: int) -> None:
        self.handle, self.limit, self.position = handle, limit, 0

    def read(self, size: int) -> bytes:
        if size > _MAX_VALUE_BYTES:
            raise _Malformed(f"one value claims {size} bytes")
        return self._count(self.handle.read(size))

    def readline(self) -> bytes:
        return self._count(self.handle.readline(_MAX_VALUE_BYTES))

    def _count(self, data: bytes) -> bytes:
        self.position += len(data)
        if self.position > self.limit:
            raise _Malformed(f"it unpacks to more than {self.limit} bytes")
        return data


def safe_unpickle(path: Path, allowed: Collection[str] = (), max_bytes: int = MAX_BYTES) -> Any:
    """The value in a plain or gzipped pickle of lists, tuples, dicts, texts, bytes, numbers, bools and None.

    Args:
        path: the file; gzip is recognised by its first bytes.
        allowed: full names (``torch._utils._rebuild_tensor_v2``) that may occur. They are not executed either: their
            results are :data:`UNREAD`.
        max_bytes: refuse a file that unpacks to more.

    Raises:
        DataError: missing, damaged or oversized file, or one that needs a class that is not allowed.
    """
    try:
        with path.open("rb") as file:
            packed = file.read(2) == _GZIP_MAGIC
            file.seek(0)
            stream = _Bounded(GzipFile(fileobj=file) if packed else file, max_bytes)
            return _Machine(path, frozenset(allowed)).run(stream)
    except _Malformed as error:
        problem = str(error)
    except (ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error) as error:
        problem = f"{type(error).__name__}: {error}"
    except (MemoryError, OverflowError) as error:
        problem = f"a value is too large ({type(error).__name__})"
    except OSError as error:
        problem = f"cannot be read ({error.strerror or error})"
    raise DataError(f"not a usable pickle: {problem}", where=str(path), fix="fetch the file again, or check the path")


class _Machine:
    """Follows the opcodes of one pickle with a stack, marks and a memo, as the ``pickletools`` documentation says."""

    def __init__(self, path: Path, allowed: frozenset[str]) -> None:
        self.path, self.allowed = path, allowed
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: _Bounded) -> Any:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):  # type: ignore[arg-type]
            if count > MAX_OPERATIONS:
                raise _Malformed(f"more than {MAX_OPERATIONS} operations")
            if opcode.name == "STOP":
                return self._pop()
            self._step(opcode.name, argument)
        raise AssertionError("genops itself refuses a pickle without STOP")

    def _step(self, name: str, argument: Any) -> None:
        """One opcode, the frequent ones first."""
        if name in _VALUES:
            long = isinstance(argument, bytes) and len(argument) > _KEPT_BYTES
            self.stack.append(UNREAD if long else argument)
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in _PUT:
            self.memo[argument] = self.stack[-1]
        elif name in _GET:
            self.stack.append(self.memo[argument])
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name == "MARK":
            self.marks.append(len(self.stack))
        elif name in _OLD_STRINGS:
            self.stack.append(_text_of_python_2(argument))
        elif name not in ("PROTO", "FRAME"):
            self._container(name, argument)

    def _container(self, name: str, argument: Any) -> None:
        if name == "APPEND":
            self._extend([self._pop()])
        elif name == "APPENDS":
            self._extend(self._since_mark())
        elif name == "SETITEM":
            value, key = self._pop(), self._pop()
            self._update([key, value])
        elif name == "SETITEMS":
            self._update(self._since_mark())
        elif name in _TUPLES:
            items = [self._pop() for _ in range(_TUPLES[name])]
            self.stack.append(tuple(reversed(items)))
        elif name == "TUPLE":
            self.stack.append(tuple(self._since_mark()))
        elif name == "LIST":
            self.stack.append(self._since_mark())
        elif name == "DICT":
            items = self._since_mark()
            self.stack.append({})
            self._update(items)
        elif name == "DUP":
            self.stack.append(self.stack[-1])
        elif name == "POP":
            self._pop()
        elif name == "POP_MARK":
            self._since_mark()
        else:
            self._named(name, argument)

    def _named(self, name: str, argument: Any) -> None:
        """Opcodes that would import or call something."""
        if name == "GLOBAL":
            self._refuse_or_stand_in(argument.replace(" ", ".", 1))
        elif name == "STACK_GLOBAL":
            attribute, module = self._pop(), self._pop()
            self._refuse_or_stand_in(f"{module}.{attribute}")
        elif name in ("INST", "OBJ"):
            items = self._since_mark()
            if name == "OBJ" and (not items or items[0] is not UNREAD):
                raise _Malformed("it calls something that is no class")
            self._refuse_or_stand_in(argument.replace(" ", ".", 1)) if name == "INST" else self.stack.append(UNREAD)
        elif name in _CALLS:
            replaced = [self._pop() for _ in range(_CALLS[name])]
            if replaced[-1] is not UNREAD:
                raise _Malformed(f"{name} on a {type(replaced[-1]).__name__}")
            self.stack.append(UNREAD)
        else:
            raise DataError(
                f"the pickle uses {name}, which annotations do not need",
                where=str(self.path),
                fix="ask where the file comes from; export the annotations as a table or JSON",
            )

    def _refuse_or_stand_in(self, full_name: str) -> None:
        if full_name not in self.allowed:
            raise DataError(
                f"the pickle wants to load {full_name!r}: refused, because loading it can run any code",
                where=str(self.path),
                fix="use the corpus's official text annotations, or export this file as a table where you trust it",
            )
        self.stack.append(UNREAD)

    def _pop(self) -> Any:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise _Malformed("a value is missing")
        return self.stack.pop()

    def _since_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _extend(self, items: Iterable[Any]) -> None:
        target = self.stack[-1]
        if target is UNREAD:
            return
        if not isinstance(target, list):
            raise _Malformed(f"items for a {type(target).__name__}")
        target.extend(items)

    def _update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if target is UNREAD:
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise _Malformed(f"keys and values for a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, _KEYS):
                raise _Malformed(f"a {type(key).__name__} as a key")
            target[key] = value


def _text_of_python_2(argument: str) -> str:
    """A byte string of Python 2, which ``pickletools`` decodes as Latin-1, as UTF-8 if it is valid."""
    try:
        return argument.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return argument


def read_labels(
    path: Path, needed: Iterable[str], allowed: Collection[str] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(``file:key``, entry) of a pickled label file: a list of dicts, or a dict of them by name.

    Args:
        needed: fields that every entry must have.

    Raises:
        DataError: as :func:`safe_unpickle`, or the file holds something else, or an entry lacks a field.
    """
    value = safe_unpickle(path, allowed)
    if not isinstance(value, list | dict):
        raise DataError(
            f"holds a {type(value).__name__}, not a list or dict of entries", where=str(path), fix="use the label file"
        )
    columns = list(needed)
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
        where = f"{path}:{key}"
        missing = [name for name in columns if name not in entry] if isinstance(entry, dict) else columns
        if missing:
            fields = sorted(map(str, entry)) if isinstance(entry, dict) else type(entry).__name__
            raise DataError(
                f"the entry lacks {', '.join(missing)}; found {fields}", where=where, fix="use the label file"
            )
        yield where, entry
