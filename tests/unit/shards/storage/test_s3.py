"""A real S3 server on this machine, with and without failures on the way: the same batches, or a named error."""

from __future__ import annotations

import http.client
import importlib.util
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from shards.exchange.adopt import adopt
from shards.format.index import read_index
from shards.format.tar import index_tar
from shards.format.verify import verify
from shards.load.loader import LoaderOptions, StepLoader
from shards.order.plan import Plan, PlanOptions, Source
from shards.storage import store
from shards.storage.access import Remote
from shards.storage.cache import mirror
from shards.storage.store import StoreError, open_folder
from tests.unit.shards.object_store import CREDENTIALS, Faults, faulty_proxy, s3_server
from tests.unit.shards.shard_sets import collate_lists, fetch_payload, write_videos

MISSING = [name for name in ("s3fs", "moto", "flask") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs s3fs, moto[s3], flask, flask-cors: {MISSING}")
PAYLOADS = [bytes([number + 1]) * (3000 + 31 * number) for number in range(24)]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_videos(tmp_path_factory.mktemp("s3") / "set", PAYLOADS, [4] * len(PAYLOADS), per_shard=6)


@pytest.fixture(scope="module")
def server(local: Path) -> Iterator[tuple[dict[str, Any], Faults]]:
    """Storage options that lead through the proxy, and what the proxy does."""
    faults = Faults()
    with s3_server() as port, faulty_proxy(port, faults) as proxy:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("PUT", "/bucket")
        assert connection.getresponse().status == 200
        options = {**CREDENTIALS, "endpoint_url": f"http://127.0.0.1:{proxy}"}
        folder = open_folder("s3://bucket/set", options)
        for path in sorted(local.iterdir()):
            folder.upload(path, path.name)
        yield options, faults


@pytest.fixture
def proxied(server: tuple[dict[str, Any], Faults], monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], Faults]:
    monkeypatch.setattr(store, "FIRST_PAUSE_SECONDS", 0.01)
    options, faults = server
    faults.planned, faults.always, faults.requests = [], "", []
    return options, faults


def batches(folder: Path, remote: Remote, steps: int = 5) -> list[Any]:
    plan = Plan([Source(read_index(folder))], PlanOptions("clip", seed=3))
    loader = StepLoader(plan, fetch_payload, collate_lists, LoaderOptions(0, 1, 6, 3, remote=remote))
    return [(step.micro_batches, step.skipped) for step in islice(loader, steps)]


@pytest.mark.parametrize("access", ["ranged", "cache"])
@pytest.mark.parametrize("fault", ["503", "reset", "cut"])
def test_passing_failures_change_nothing(
    proxied: tuple[dict[str, Any], Faults], local: Path, tmp_path: Path, access: Any, fault: str
) -> None:
    options, faults = proxied
    faults.planned = [fault, "", fault] * 3
    folder = mirror("s3://bucket/set", tmp_path, options)
    remote = Remote(access, 1.0, options)
    assert batches(folder, remote) == batches(local, Remote())
    assert sum(done == fault for _, done in faults.requests) >= 4


@pytest.mark.parametrize("access", ["ranged", "cache"])
def test_a_lasting_failure_is_named_and_no_sample_is_blamed(
    proxied: tuple[dict[str, Any], Faults], tmp_path: Path, access: Any
) -> None:
    options, faults = proxied
    folder = mirror("s3://bucket/set", tmp_path, options)
    faults.always = "503"
    with pytest.raises(
        StoreError, match=r"s3://bucket/set/train-00000\d\.tar: cannot read the object after 6 attempts"
    ):
        batches(folder, Remote(access, 1.0, options), 1)
    assert len(faults.requests) < 120, "bounded"


def test_tools_take_a_url(proxied: tuple[dict[str, Any], Faults], local: Path) -> None:
    options, _ = proxied
    folder = open_folder("s3://bucket/set", options)
    assert verify("s3://bucket/set", options) == []
    name = "train-000001.tar"
    assert index_tar(name, folder) == index_tar(local / name)
    tars = open_folder("s3://bucket/tars", options)
    payload = bytearray((local / name).read_bytes())
    tars.write(name, bytes(payload))
    payload[600] ^= 1
    folder.write("train-000003.tar", bytes(payload))
    rules = {problem.rule for problem in verify("s3://bucket/set", options)}
    folder.delete("train-000003.tar")
    assert {"sha256", "size"} & rules and {p.rule for p in verify("s3://bucket/set", options)} == {"missing_shard"}
    folder.upload(local / "train-000003.tar", "train-000003.tar")


def test_foreign_tars_in_a_bucket_are_indexed_where_they_are(
    proxied: tuple[dict[str, Any], Faults], tmp_path: Path
) -> None:
    from tests.unit.shards.making import mp4, pictures

    options, _ = proxied
    write_videos(tmp_path / "made", [mp4(pictures(8, seed=n)) for n in range(2)], [8, 8])
    folder = open_folder("s3://bucket/foreign", options)
    folder.upload(tmp_path / "made" / "train-000000.tar", "train-000000.tar")
    manifest = adopt("s3://bucket/foreign", "mine", storage_options=options)
    assert manifest.splits == {"train": 2} and folder.list() == ["index.parquet", "manifest.json", "train-000000.tar"]
    assert verify("s3://bucket/foreign", options) == []
    assert adopt("s3://bucket/foreign", "mine", storage_options=options).fingerprint == manifest.fingerprint


def test_verbs_on_a_bucket(
    proxied: tuple[dict[str, Any], Faults], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Credentials and endpoint come from the places that the store's own library reads."""
    from typer.testing import CliRunner

    from shards.cli.app import app
    from tests.unit.shards.making import mp4, pictures

    options, _ = proxied
    for name, value in (
        ("AWS_ACCESS_KEY_ID", options["key"]),
        ("AWS_SECRET_ACCESS_KEY", options["secret"]),
        ("AWS_ENDPOINT_URL", options["endpoint_url"]),
        ("AWS_DEFAULT_REGION", "eu-central-1"),
    ):
        monkeypatch.setenv(name, value)
    write_videos(tmp_path / "made", [mp4(pictures(8))], [8])
    open_folder("s3://bucket/verbs", options).upload(tmp_path / "made" / "train-000000.tar", "train-000000.tar")
    result = CliRunner().invoke(app, ["index", "s3://bucket/verbs"])
    assert result.exit_code == 0 and result.stdout == "s3://bucket/verbs: 1 shards; train 1\n", result.output
    out = tmp_path / "set"
    result = CliRunner().invoke(app, ["convert", "s3://bucket/verbs", "--out", str(out), "--workers", "1"])
    assert result.exit_code == 0 and read_index(out).manifest.splits == {"train": 1}, result.output
    result = CliRunner().invoke(app, ["index", "s3://bucket/verbs/train-000000.tar"])
    assert result.exit_code == 0 and "clip0000.mp4" in result.stdout
