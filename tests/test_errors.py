"""A name is understood in any case, and an unknown one is answered with the nearest."""

from __future__ import annotations

from typing import Any

import pytest

from specmd_jax.errors import SpecmdError, find

NAMES = ("OLMoE", "gpt-oss-20b", "Qwen3")


@pytest.mark.parametrize(("given", "found"), [("OLMoE", "OLMoE"), ("olmoe", "OLMoE"), (" GPT-OSS-20B ", "gpt-oss-20b")])
def test_any_case_is_understood_and_the_tables_spelling_comes_back(given: str, found: str) -> None:
    assert find("model", given, NAMES) == found


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("OLMOE-2", "unknown model 'OLMOE-2'; did you mean 'OLMoE'? (known: OLMoE, Qwen3, gpt-oss-20b)"),
        ("zzz", "unknown model 'zzz' (known: OLMoE, Qwen3, gpt-oss-20b)"),
        (None, "unknown model None (known: OLMoE, Qwen3, gpt-oss-20b)"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(given: Any, message: str) -> None:
    with pytest.raises(SpecmdError) as caught:
        find("model", given, NAMES)
    assert str(caught.value) == message
