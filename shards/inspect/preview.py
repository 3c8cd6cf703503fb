"""A local web page that shows a shard set: search, filters, videos directly from the tars, metadata, tokens.

Only GET, only this machine by default. Videos are byte ranges of a shard named by the index, so no path ever comes from
a request; the page inserts texts as text, and its Content-Security-Policy allows only its own three files.
"""

from __future__ import annotations

import json
import logging
import re
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any

from shards.errors import DataError
from shards.inspect.preview_catalog import FILTERS, Catalog, Query

logger = logging.getLogger(__name__)
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/preview.css": ("preview.css", "text/css; charset=utf-8"),
    "/preview.js": ("preview.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; media-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_PIECE = 1 << 18
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes ``start`` to ``end``, the last one included."""

    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start + 1


def parse_range(header: str | None, size: int) -> ByteRange | None:
    """The range of ``size`` bytes that a ``Range`` header requests; None for no, several or unknown ranges.

    Raises:
        ValueError: a well-formed range that lies outside.
    """
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", (header or "").strip())
    if not match or match[0] == "bytes=-":
        return None
    first, last = match[1], match[2]
    if not first:
        start, end = max(0, size - int(last)), size - 1
    else:
        start, end = int(first), min(int(last) if last else size - 1, size - 1)
    if start > end:
        raise ValueError(f"bytes {first}-{last} of {size}")
    return ByteRange(start, end)


class PreviewServer(ThreadingHTTPServer):
    """Serves one catalog at ``url``."""

    daemon_threads = True

    def __init__(self, catalog: Catalog, host: str = "127.0.0.1", port: int = 0) -> None:
        self.catalog, self.host = catalog, host
        super().__init__((host, port), _Handler)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.server_address[1]}/"

    def accepts(self, host_header: str) -> bool:
        """Whether a request is meant for this server: another site may point its own name at 127.0.0.1."""
        name = urllib.parse.urlsplit(f"//{host_header}").hostname or ""
        return self.host not in _LOOPBACK or name in _LOOPBACK

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("connection of %s ended", client_address, exc_info=True)


def serve(catalog: Catalog, host: str, port: int) -> PreviewServer:
    """A server bound to ``port``, or to a free port if that one is taken.

    Raises:
        DataError: the address cannot be bound.
    """
    try:
        return PreviewServer(catalog, host, port)
    except OSError as error:
        taken = error
    try:
        server = PreviewServer(catalog, host, 0)
    except OSError as error:
        raise DataError(f"cannot listen ({error})", where=host, fix="use --host 127.0.0.1") from error
    logger.warning("port %d cannot be used (%s); using %d", port, taken.strerror, server.server_address[1])
    return server


class _Handler(BaseHTTPRequestHandler):
    """Answers GET for the page's files, ``/api/...`` and ``/video/NUMBER``."""

    server: PreviewServer
    protocol_version = "HTTP/1.1"
    server_version = "shards"
    sys_version = ""
    timeout = 60

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        try:
            if not self.server.accepts(self.headers.get("Host", "")):
                self._json({"error": "this address is not the server's"}, HTTPStatus.MISDIRECTED_REQUEST)
            elif url.path in _FILES:
                self._file(*_FILES[url.path])
            elif match := re.fullmatch(r"/video/(\d{1,12})", url.path):
                self._video(int(match[1]))
            else:
                self._api(url.path, dict(urllib.parse.parse_qsl(url.query)))
        except DataError as error:
            self._json({"error": str(error)}, HTTPStatus.NOT_FOUND)

    def _refuse(self) -> None:
        self.close_connection = True  # the body of the request is not read
        self._json({"error": "only GET"}, HTTPStatus.METHOD_NOT_ALLOWED, {"Allow": "GET"})

    do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_HEAD = _refuse

    def _api(self, path: str, query: dict[str, str]) -> None:
        catalog = self.server.catalog
        if path == "/api/summary":
            self._json(catalog.summary())
        elif path == "/api/samples":
            filters = {name: query.get(name, "") for name in FILTERS}
            catalog_query = Query(search=query.get("q", ""), sort=query.get("sort") or "index", **filters)
            self._json(catalog.page(catalog_query, _number(query, "page", 1), _number(query, "per_page", 50)))
        elif match := re.fullmatch(r"/api/samples/(\d{1,12})", path):
            self._json(catalog.sample(int(match[1])))
        else:
            self._json({"error": "no such page"}, HTTPStatus.NOT_FOUND)

    def _file(self, name: str, kind: str) -> None:
        payload = resources.files("shards.inspect").joinpath("preview_page", name).read_bytes()
        self._start(
            HTTPStatus.OK, {"Content-Type": kind, "Content-Length": str(len(payload)), "Cache-Control": "no-cache"}
        )
        self.wfile.write(payload)

    def _json(self, values: Any, status: HTTPStatus = HTTPStatus.OK, headers: dict[str, str] | None = None) -> None:
        payload = json.dumps(values, ensure_ascii=False).encode("utf-8", "replace")
        kinds = {"Content-Type": "application/json; charset=utf-8", "Cache-Control": "no-store"}
        self._start(status, {**kinds, "Content-Length": str(len(payload)), **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(payload)

    def _video(self, number: int) -> None:
        row, kind = self.server.catalog.media(number)
        common = {"Content-Type": kind, "Accept-Ranges": "bytes", "Cache-Control": "max-age=3600"}
        try:
            requested = parse_range(self.headers.get("Range"), row["size"])
        except ValueError:
            outside = {**common, "Content-Range": f"bytes */{row['size']}", "Content-Length": "0"}
            self._start(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, outside)
            return
        part = requested or ByteRange(0, row["size"] - 1)
        if requested:
            common["Content-Range"] = f"bytes {part.start}-{part.end}/{row['size']}"
        self._start(
            HTTPStatus.PARTIAL_CONTENT if requested else HTTPStatus.OK, {**common, "Content-Length": str(part.size)}
        )
        for piece in self._pieces(row, part):
            self.wfile.write(piece)

    def _pieces(self, row: dict[str, Any], part: ByteRange) -> Iterator[bytes]:
        folder = self.server.catalog.folder
        for start in range(part.start, part.end + 1, _PIECE):
            size = min(_PIECE, part.end + 1 - start)
            yield folder.read_range(row["shard"], row["offset"] + start, size)

    def _start(self, status: HTTPStatus, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, **_HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


def _number(query: dict[str, str], name: str, default: int) -> int:
    """A whole number of the query. Raises DataError for anything else."""
    value = query.get(name, "")
    if not re.fullmatch(r"\d{0,9}", value):
        raise DataError(f"{value[:20]!r} is not a number", where=name, fix="write a whole number")
    return int(value) if value else default
