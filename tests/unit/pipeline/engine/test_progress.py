"""Progress: a bar for people at a terminal, lines for logs."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from pipeline.engine.progress import Progress

METRICS = {"train/loss": 0.5, "train/lr": 1e-3, "data/bad_samples": 3.0, "perf/samples_per_second": 12.5}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run() -> None:
    progress = Progress("tiny", total=10, done=2)
    progress.update(3, METRICS)
    progress.close()
    progress.close()


def test_plain_lines_name_run_step_and_the_few_metrics_people_watch(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run()
    assert [record.getMessage() for record in caplog.records] == [
        "tiny step 3/10  loss 0.5  lr 0.001  samples_per_second 12.5"
    ]


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    with caplog.at_level(logging.INFO):
        run()
    assert "tiny" in terminal.getvalue() and "3/10" in terminal.getvalue() and "loss 0.5" in terminal.getvalue()
    assert not caplog.records, "the bar replaces the lines"
