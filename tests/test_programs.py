"""Compiled programs are let go before they hold more memory maps than the system allows, and results stay the same."""

from __future__ import annotations

import jax
import pytest

from specmd_jax import Metrics, bundled, programs, run


@pytest.fixture
def crowded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any program at all is one too many."""
    monkeypatch.setattr(programs, "most_maps", lambda: 0)


def test_programs_are_let_go_once_something_was_compiled(crowded: None) -> None:
    @jax.jit
    def more(x: int) -> jax.Array:
        return jax.numpy.int32(x) + 12_345

    assert more(1) == 12_346 and more._cache_size() == 1  # type: ignore[attr-defined]
    assert programs.room_for_programs() and more._cache_size() == 0  # type: ignore[attr-defined]
    assert not programs.room_for_programs(), "nothing was compiled since"
    assert more(1) == 12_346


def test_there_is_room_as_long_as_the_limit_is_far(monkeypatch: pytest.MonkeyPatch) -> None:
    jax.jit(lambda x: x + 54_321)(1)
    monkeypatch.setattr(programs, "most_maps", lambda: 1 << 30)
    assert not programs.room_for_programs()
    jax.jit(lambda x: x + 54_322)(1)
    monkeypatch.setattr(programs, "most_maps", lambda: None)
    assert not programs.room_for_programs(), "where the system has no such limit nothing is done"


def test_replays_make_room_and_give_the_same(crowded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = bundled("gpt-oss-20b", tokens=4)

    def once() -> Metrics:
        return run(trace, eviction="lru", capacity="25%", hardware=None, engine="scan")

    first = once()
    cleared: list[bool] = []
    clear = jax.clear_caches
    monkeypatch.setattr(jax, "clear_caches", lambda: cleared.append(True) or clear())
    assert once().row() == first.row() and cleared
