"""What shares a device's memory: keys and values by hand, the parts, and memories that cannot be."""

from __future__ import annotations

from typing import Any

import pytest

from specmd_jax.errors import SpecmdError
from specmd_jax.specs.memory import WORKSPACE_BYTES, share_memory
from specmd_jax.specs.models import model
from specmd_jax.units import GIB

# Keys and values of one token in 16 bits, by hand: 48 layers x 2 x 4 heads x 128; 61 x (512 + 64); 27 x (512 + 64).
KV_BYTES = {"Qwen3-30B-A3B": 98_304, "DeepSeek-V3": 70_272, "DeepSeek-V2-Lite": 31_104}


@pytest.mark.parametrize("name", KV_BYTES)
def test_keys_and_values_of_a_token(name: str) -> None:
    spec = model(name)
    assert spec.kv_bytes_per_token == KV_BYTES[name]
    assert spec.kv_bytes(1000) == 1000 * KV_BYTES[name] == spec.layers * spec.context_bytes(1000)
    assert spec.stored(kv_bits=8).kv_bytes(1000) == 500 * KV_BYTES[name]


def test_layers_with_a_window_keep_at_most_their_window() -> None:
    oss, token = model("gpt-oss-20b"), 2 * 8 * 64 * 2  # bytes of a token in one layer; 12 of 24 see 128 positions
    assert oss.kv_bytes(100) == 24 * 100 * token
    assert oss.kv_bytes(1000) == 12 * (1000 + 128) * token
    assert oss.context_flops(1000) == 12 * (1000 + 128) * 4 * 64 * 64 / 24


def test_the_parts_are_named_and_say_what_is_assumed() -> None:
    spec = model("Qwen3-30B-A3B")
    share = share_memory(spec, 16 * GIB, bits=4.5, context=32_768, batch=2)
    sizes = {part.name: part.bytes for part in share.parts}
    assert sizes["keys and values"] == 2 * 32_768 * 98_304
    assert sizes["dense layers"] == round(spec.layers * spec.dense_params * 4.5 / 8)
    assert sizes["workspace"] == WORKSPACE_BYTES
    assert share.fixed_bytes + share.left_bytes == 16 * GIB
    assert share.experts == share.left_bytes // share.spec.expert_bytes
    assert [part.name for part in share.assumed] == [*sizes]
    given = share_memory(spec, 80 * GIB, context=8, kv_bits=16, workspace_bytes=0)
    assert not given.assumed and given.experts == 48 * 128 and given.spec == spec


def test_a_part_moves_with_the_experts_only_if_it_was_published_at_their_precision() -> None:
    oss = model("gpt-oss-20b").stored(3)
    assert (oss.weights_bits, oss.dense_bits, oss.head_bits, oss.embed_bits) == (3, 16, 16, 16)
    v3 = model("DeepSeek-V3")
    assert v3.embed_bytes == v3.head_bytes - 2 * 7168 == 129_280 * 7168 * 2
    low = v3.stored(4, head_bits=6)
    assert (low.dense_bits, low.head_bits, low.embed_bits) == (4, 6, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"context": 100_000},
            "of 100000 tokens take 9.16 GiB, the memory is 8.00 GiB: .*at most 87381 tokens",
        ),
        ({"context": 50_000, "batch": 2}, "of 2 sequences take 9.16 GiB"),
        ({"bits": 16}, r"memory of 8.00 GiB holds no expert of Qwen3-30B-A3B beside dense layers 1.7. \+ .* at least"),
        ({"bits": 0}, "bits is 0, expected above 0"),
        ({"kv_bits": float("nan")}, "kv_bits is nan"),
        ({"context": -1}, "context is -1, expected a whole number of at least 0"),
        ({"context": 1.5}, "context is 1.5"),
        ({"batch": 0}, "batch is 0"),
        ({"workspace_bytes": True}, "workspace_bytes is True"),
    ],
)
def test_memories_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"bits": 4, "context": 65_536, "workspace_bytes": 0} | changes
    with pytest.raises(SpecmdError, match=message) as caught:
        share_memory(model("Qwen3-30B-A3B"), 8 * GIB, **arguments)
    assert "\n" not in str(caught.value)
