"""A long replay shows that it works: to people, and now and then in a log."""

from __future__ import annotations

import io
import sys
import time

import pytest

from experiments.common import bars
from specmd_jax import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_takes_long_is_shown_and_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    monkeypatch.setattr(progress, "AFTER_S", 0.01)
    with progress.heartbeat("replaying 8,000 tokens"):
        time.sleep(0.3)
    assert "\rreplaying 8,000 tokens: 0 s" in shown.getvalue()
    assert shown.getvalue().endswith(" \r")


def test_what_is_quick_or_piped_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    with progress.heartbeat("replaying"):
        pass
    monkeypatch.setattr(sys, "stderr", piped := io.StringIO())
    monkeypatch.setattr(progress, "AFTER_S", 0.01)
    with progress.heartbeat("replaying"):
        time.sleep(0.1)
    assert (shown.getvalue(), piped.getvalue()) == ("", "")


def test_an_error_passes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(ValueError, match="as it is"), progress.heartbeat("replaying"):
        raise ValueError("as it is")


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    monkeypatch.setattr(progress, "IN_A_LOG_S", 0.05)
    with progress.heartbeat("replaying"):
        time.sleep(0.3)
    lines = log.getvalue().splitlines()
    assert len(lines) >= 2 and set(lines) == {"replaying: 0 s"}
    monkeypatch.setattr(bars, "EVERY_S", 0.05)
    with bars.bar(3, "cell", 1) as bar:
        for _ in range(2):
            time.sleep(0.1)
            bar.update()
    assert "2/3" in log.getvalue() and "3/3" in log.getvalue() and "\r" not in log.getvalue()


def test_what_is_quick_says_nothing_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    with bars.bar(2, "cell") as bar:
        bar.update(2)
    assert log.getvalue() == ""
