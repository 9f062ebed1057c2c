"""Capacities: every way to write one, in both scopes, and back; nothing is lost to rounding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specmd_jax.errors import SpecmdError
from specmd_jax.specs.capacity import describe_capacity, format_capacity, parse_capacity
from specmd_jax.units import MIB

EQUAL = {"expert_bytes": np.full(24, 13_236_480, np.int64), "experts": 32, "top_k": 4}  # 768 experts
UNEQUAL = {"expert_bytes": np.array([100, 300, 200]), "experts": 8, "top_k": 2}  # 4800 bytes in all, cycle 1200


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (4096, 4096),
        (4096.0, 4096),
        (np.int64(4096), 4096),
        ("4096", 4096),
        ("4096 B", 4096),
        ("4096 bytes", 4096),
        ("4e3", 4000),
        ("2.5KB", 2500),
        ("2.5 kib", 2560),
        ("1MB", 10**6),
        ("4000MiB", 4000 * MIB),
        ("2.5GB", 2_500_000_000),
        ("6GiB", 6 * 1024 * MIB),
        ("1TB", 10**12),
        ("1TiB", 1024 * 1024 * MIB),
        ("25%", 1200),
        (" 12.5 % ", 600),
        ("100%", 4800),
        ("9600", 9600),
        ("6MiB", 6 * MIB),
        ("24 slots", 7200),
        ("8 slots/layer", 4800),
        ("4 cycles", 4800),
        ("5 slots", 1500),
        ("1 slot", 300),
        ("2 slots/layer", 1200),
        ("2 slots a layer", 1200),
        ("2 slots per layer", 1200),
        ("1 slot / layer", 600),
        ("1.5 cycles", 1800),
        ("1 cycle", 1200),
        ("0.5 token cycles", 600),
    ],
)
def test_one_pool(value: str | float, expected: int) -> None:
    budget = parse_capacity(value, **UNEQUAL, scope="global")
    assert budget == expected and type(budget) is int


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1000", [333, 333, 333]),
        ("25%", [400, 400, 400]),
        ("5 slots", [500, 500, 500]),
        ("1.5 cycles", [600, 600, 600]),
        ("2 slots/layer", [200, 600, 400]),
        ([150, 300, 250.9], [150, 300, 250]),
        (np.array([150, 300, 250]), [150, 300, 250]),
        ((100, 300, 200), [100, 300, 200]),
    ],
)
def test_a_pool_a_layer(value: str | list[float], expected: list[int]) -> None:
    quotas = parse_capacity(value, **UNEQUAL, scope="layer")
    assert quotas.dtype == np.int64
    assert quotas.tolist() == expected


def test_a_quarter_of_768_equal_experts_is_exactly_192() -> None:
    for sizes in (EQUAL["expert_bytes"], np.full(24, 3), np.full(24, 12_345_679)):
        budget = parse_capacity("25%", expert_bytes=sizes, experts=32, top_k=4)
        assert budget == 192 * int(sizes[0])
        assert describe_capacity(budget, expert_bytes=sizes, experts=32, top_k=4)["slots"] == 192


@given(slots=st.integers(1, 768), size=st.integers(1, 2**40))
def test_slots_and_their_percentage_agree(slots: int, size: int) -> None:
    model = {"expert_bytes": np.full(24, size), "experts": 32, "top_k": 4}
    budget = parse_capacity(f"{slots} slots", **model)
    shown = describe_capacity(budget, **model)
    assert budget == slots * size
    assert shown["slots"] == slots
    assert shown["percent"] == pytest.approx(100 * slots / 768, rel=1e-15)
    assert shown["cycles"] == pytest.approx(slots / 96, rel=1e-15)


@given(hundredths=st.integers(1, 10_000))
def test_percentages_are_never_rounded_up(hundredths: int) -> None:
    budget = parse_capacity(f"{hundredths / 100:.2f}%", expert_bytes=[7, 7, 7], experts=10_000, top_k=1)
    assert budget == hundredths * 7 * 30_000 // 10_000


def test_describe_one_pool() -> None:
    assert describe_capacity(1800, **UNEQUAL) == {
        "bytes": 1800,
        "mib": 1800 / MIB,
        "percent": 37.5,
        "slots": 6,
        "slots_per_layer": 2.0,
        "cycles": 1.5,
    }


def test_describe_a_pool_a_layer() -> None:
    shown = describe_capacity(np.array([250, 299, 600]), **UNEQUAL)
    assert shown["bytes"] == 1149
    assert shown["slots"] == 2 + 0 + 3
    assert shown["slots_per_layer"] == pytest.approx(5 / 3)
    with pytest.raises(SpecmdError, match="expected the bytes of 3 layers, got 2"):
        describe_capacity(np.array([250, 299]), **UNEQUAL)


def test_format_shows_every_unit_and_warns_below_a_cycle() -> None:
    whole = format_capacity(parse_capacity("25%", **EQUAL), **EQUAL)
    assert whole == "2423.7 MiB = 25.00 % of all experts = 192 slots (8.00 a layer) = 2.000 token cycles"
    assert "below one token cycle" in format_capacity(parse_capacity("95 slots", **EQUAL), **EQUAL)
    assert "below" not in format_capacity(parse_capacity("96 slots", **EQUAL), **EQUAL)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "capacity '' cannot be read: expected '4000MiB'"),
        ("lots", "capacity 'lots' cannot be read"),
        ("1 2 slots", "cannot be read"),
        ("5 parsecs", "unknown unit 'parsecs'"),
        ("6G", "unknown unit 'G'"),
        ("-5MiB", "capacity '-5MiB' is negative"),
        ("nan", "capacity 'nan' is not a finite number"),
        ("inf GB", "is not a finite number"),
        ("0", "capacity '0' is 0 bytes: expected at least one expert of the largest layer (300 bytes)"),
        ("299", "capacity '299' is 299 bytes: expected at least one expert of the largest layer (300 bytes)"),
        ("1%", "capacity '1%' is 48 bytes"),
        ("300%", "capacity '300%' is above everything: expected at most 100 %"),
        ("100.01%", "capacity '100.01%' is above everything"),
        ("25 slots", "capacity '25 slots' is above everything: expected at most 24 slots"),
        ("9 slots/layer", "capacity '9 slots/layer' is above everything: expected at most 8 slots/layer"),
        ("4.1 cycles", "capacity '4.1 cycles' is above everything: expected at most 4 cycles"),
        ("0.25", "capacity '0.25' is less than one byte: did you mean '25%'?"),
        (".125", "did you mean '12.5%'?"),
        (0.25, "capacity 0.25 is less than one byte: did you mean '25%'?"),
        ("1.5 slots", "capacity '1.5 slots': expected a whole number of slots"),
        ("1e99", "expected at most 9223372036854775807 bytes"),
        (-5, "capacity -5 is negative"),
        (float("nan"), "capacity is nan: expected a finite number"),
        (float("inf"), "capacity is inf: expected a finite number"),
        (True, "capacity is True: expected"),
        (None, "capacity is None: expected"),
        ([100, 300, 200], "bytes of each layer need cache scope 'layer'"),
    ],
)
def test_bad_capacities(value: str | float, message: str) -> None:
    with pytest.raises(SpecmdError) as caught:
        parse_capacity(value, **UNEQUAL)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("899", "capacity '899' gives layer 1 299 bytes: expected at least one expert of that layer (300 bytes)"),
        ([99, 300, 200], "gives layer 0 99 bytes"),
        ([100, 300], "expected the bytes of 3 layers, got shape (2,)"),
        ([[100, 300, 200]], "expected the bytes of 3 layers, got shape (1, 3)"),
        ([100, -1, 200], "capacity of layer 1 -1 is negative"),
        ([100, 300, "2 slots"], "capacity of layer 2 is '2 slots': expected"),
        ([100, float("nan"), 200], "capacity of layer 1 is nan"),
    ],
)
def test_bad_capacities_a_layer(value: str | list[float], message: str) -> None:
    with pytest.raises(SpecmdError) as caught:
        parse_capacity(value, **UNEQUAL, scope="layer")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_bad_surroundings() -> None:
    with pytest.raises(SpecmdError, match="unknown cache scope 'layers'; did you mean 'layer'"):
        parse_capacity("25%", **UNEQUAL, scope="layers")
    with pytest.raises(SpecmdError, match="expert_bytes of layer 1 is 0"):
        parse_capacity("25%", expert_bytes=[5, 0], experts=8, top_k=2)
