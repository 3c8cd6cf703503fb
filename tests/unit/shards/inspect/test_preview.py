"""The preview over HTTP: what it answers, what it refuses, and that no byte outside the index can be asked for."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shards.errors import DataError
from shards.format.index import read_index
from shards.inspect.preview import PreviewServer, parse_range, serve
from shards.inspect.preview_catalog import Catalog
from tests.unit.shards.shard_sets import write_videos

PAYLOADS = [bytes([number]) * (300_000 + number) for number in range(3)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PreviewServer]:
    folder = write_videos(tmp_path_factory.mktemp("preview") / "set", PAYLOADS, [25, 50, 75])
    running = serve(Catalog(folder), "127.0.0.1", 0)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join(timeout=5)


def ask(
    server: PreviewServer, path: str, method: str = "GET", **headers: str
) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


def values(server: PreviewServer, path: str) -> Any:
    response, body = ask(server, path)
    assert response.status == 200 and response.headers["Content-Type"] == "application/json; charset=utf-8"
    return json.loads(body)


def test_the_page_and_its_files(server: PreviewServer) -> None:
    for path, kind in (("/", "text/html"), ("/preview.css", "text/css"), ("/preview.js", "text/javascript")):
        response, body = ask(server, path)
        assert response.status == 200 and response.headers["Content-Type"].startswith(kind) and body
        policy = response.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert b"https://" not in body and b"http://" not in body.replace(b"http://www.w3.org", b"")
        assert b"innerHTML" not in body


def test_api(server: PreviewServer) -> None:
    assert values(server, "/api/summary")["samples"] == 3
    found = values(server, "/api/samples?q=number%202&sort=-length")
    assert [row["number"] for row in found["rows"]] == [2] and found["matching"] == 1
    assert values(server, "/api/samples/1")["row"]["key"] == "clip0001"


def test_videos_are_ranges_of_the_shard(server: PreviewServer) -> None:
    response, body = ask(server, "/video/1")
    assert (response.status, body) == (200, PAYLOADS[1])
    assert response.headers["Accept-Ranges"] == "bytes" and response.headers["Content-Type"] == "video/mp4"
    response, body = ask(server, "/video/2", Range="bytes=299990-")
    assert (response.status, body) == (206, PAYLOADS[2][299990:])
    assert response.headers["Content-Range"] == f"bytes 299990-300001/{len(PAYLOADS[2])}"
    response, body = ask(server, "/video/0", Range="bytes=900000-")
    assert (response.status, body) == (416, b"") and response.headers["Content-Range"] == "bytes */300000"


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, None), ("bytes=0-0", (0, 0)), ("bytes=2-", (2, 9)), ("bytes=-3", (7, 9)), ("bytes=-30", (0, 9)),
        ("bytes=3-99", (3, 9)), ("bytes=-", None), ("bytes=1-2,4-5", None), ("items=1-2", None), ("bytes=x-", None),
    ],
)  # fmt: skip
def test_ranges(header: str | None, expected: tuple[int, int] | None) -> None:
    found = parse_range(header, 10)
    assert (None if found is None else (found.start, found.end)) == expected
    assert found is None or found.size == found.end - found.start + 1


@pytest.mark.parametrize("header", ["bytes=10-", "bytes=5-4", "bytes=-0"])
def test_ranges_outside(header: str) -> None:
    with pytest.raises(ValueError, match=r"bytes .* of 10"):
        parse_range(header, 10)


@pytest.mark.parametrize(
    "path",
    [
        "/../shards/errors.py", "/%2e%2e/errors.py", "/preview_page/../errors.py", "/video/../../etc/passwd",
        "/video/-1", "/video/9", "/video/0x1", "/video/1/", "/api/samples/3", "/api/samples/../summary", "/index.html",
        "/etc/passwd", "//etc/passwd", "/api/", "/video/99999999999999999999",
    ],
)  # fmt: skip
def test_nothing_else_is_served(server: PreviewServer, path: str) -> None:
    response, body = ask(server, path)
    assert response.status == 404 and "error" in json.loads(body)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"])
def test_only_get(server: PreviewServer, method: str) -> None:
    response, _ = ask(server, "/api/summary", method)
    assert response.status == 405 and response.headers["Allow"] == "GET"


def test_requests_for_other_names_are_refused(server: PreviewServer) -> None:
    """A page elsewhere can let its own name point to 127.0.0.1; its scripts must not read the set."""
    for host in ("evil.example", "evil.example:80", ""):
        assert ask(server, "/api/summary", Host=host)[0].status == 421
    for host in ("localhost:1234", "127.0.0.1", "[::1]:80"):
        assert ask(server, "/api/summary", Host=host)[0].status == 200


def test_bad_queries(server: PreviewServer) -> None:
    for path, message in (("?sort=evil", "unknown order 'evil'"), ("?page=x", "page: 'x' is not a number")):
        response, body = ask(server, f"/api/samples{path}")
        assert response.status == 404 and message in json.loads(body)["error"]


def test_damaged_and_missing_shards_are_told(server: PreviewServer, tmp_path: Path) -> None:
    folder = write_videos(tmp_path / "set", PAYLOADS[:2], [25, 50])
    row = read_index(folder).row(0)
    with (folder / row.shard).open("r+b") as handle:
        handle.seek(row.offset)
        handle.write(b"\xff")
    assert Catalog(folder).sample(0)["checksum_ok"] is False and Catalog(folder).sample(1)["checksum_ok"] is True
    (folder / row.shard).unlink()
    with pytest.raises(DataError, match=r"train-000000\.tar: No such file"):
        Catalog(folder).sample(0)


def test_a_taken_port_gives_another(server: PreviewServer, caplog: pytest.LogCaptureFixture) -> None:
    taken = server.server_address[1]
    second = serve(server.catalog, "127.0.0.1", taken)
    try:
        assert second.server_address[1] != taken and second.url.startswith("http://127.0.0.1:")
        assert f"port {taken} cannot be used" in caplog.text
    finally:
        second.server_close()
    with pytest.raises(DataError, match=r"192\.0\.2\.1: cannot listen"):
        serve(server.catalog, "192.0.2.1", 0)
