from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.hostfile import Host, filter_hosts, parse_hostfile, read_hostfile
from pipeline.errors import RecipeError

HOSTS = (Host("a", (0, 1, 2)), Host("b", (0, 1)), Host("c", (0,)))


def test_hosts_in_file_order(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# cluster\n\nb slots=2\n  a.example.org\tslots=1   # spare\n")
    assert read_hostfile(path) == (Host("b", (0, 1)), Host("a.example.org", (0,)))


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=1\r\nb slots=2\r\n", encoding="utf-8-sig")
    assert read_hostfile(tmp_path / "hosts") == (Host("a", (0,)), Host("b", (0, 1)))


def test_every_bad_line_is_named() -> None:
    text = "a slots=2\nb\nc slots=two\na slots=1\nd slots=0\n-x slots=1\nu@h slots=1\ne slots=1 max_slots=2\n"
    with pytest.raises(RecipeError) as caught:
        parse_hostfile(text, "hosts")
    assert str(caught.value).splitlines() == [
        "hosts:2: 'b' is not of the form `name slots=N`",
        "hosts:3: 'c slots=two' is not of the form `name slots=N`",
        "hosts:4: host a is listed twice (first in line 1)",
        "hosts:5: host d has no slots; give at least 1 or remove the line",
        "hosts:6: '-x' is not a host name (letters, digits, dot, dash, underscore)",
        "hosts:7: 'u@h' is not a host name; give the user in ~/.ssh/config",
        "hosts:8: 'e slots=1 max_slots=2' is not of the form `name slots=N`",
    ]


def test_empty_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="hosts: names no host; write one line"):
        parse_hostfile("# nothing\n", "hosts")
    with pytest.raises(RecipeError, match=r"hostfile .* cannot be read: .*No such file"):
        read_hostfile(tmp_path / "missing")


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        ("", "", HOSTS),
        ("c@a", "", (Host("a", (0, 1, 2)), Host("c", (0,)))),
        ("a:2,0@b:1", "", (Host("a", (0, 2)), Host("b", (1,)))),
        ("a:0@a:2", "", (Host("a", (0, 2)),)),
        ("", "b", (HOSTS[0], HOSTS[2])),
        ("", "a:1@c:0", (Host("a", (0, 2)), HOSTS[1])),
    ],
)
def test_filters(include: str, exclude: str, left: tuple[Host, ...]) -> None:
    assert filter_hosts(HOSTS, include, exclude) == left


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        ("a", "b", "--include and --exclude cannot be combined"),
        ("aa", "", "--include aa: there is no host 'aa'; did you mean a?"),
        ("", "a:5", "--exclude a:5: host a has slots=3, no device 5"),
        ("a:x", "", "'x' is not a list of device numbers such as 0,2"),
        ("a:", "", "'' is not a list of device numbers"),
        ("", "a@b@c", "--exclude a@b@c leaves no device to run on"),
    ],
)
def test_bad_filters(include: str, exclude: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        filter_hosts(HOSTS, include, exclude)
    assert message in str(caught.value)


_hosts = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(
    lambda slots: tuple(Host(f"h{number}", tuple(range(count))) for number, count in enumerate(slots))
)


@given(_hosts, st.data())
def test_include_text_selects_exactly_what_is_left(hosts: tuple[Host, ...], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from([(h.name, d) for h in hosts for d in h.devices]), min_size=1))
    left = filter_hosts(hosts, include="@".join(f"{name}:{device}" for name, device in chosen))
    assert {(h.name, d) for h in left for d in h.devices} == set(chosen)


def test_filters_agree_with_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    runner = pytest.importorskip("deepspeed.launcher.runner")
    pool = {host.name: host.slots for host in HOSTS}
    for include, exclude in (("c@a", ""), ("a:2,0@b:1", ""), ("", "a:1@c"), ("", "b"), ("a:0@a:2", "")):
        theirs = runner.parse_inclusion_exclusion(pool, include, exclude)
        ours = filter_hosts(HOSTS, include, exclude)
        assert {name: tuple(devices) for name, devices in theirs.items()} == {h.name: h.devices for h in ours}
        assert list(theirs) == [host.name for host in ours]
