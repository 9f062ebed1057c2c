"""`ModelSpec`: shapes and sizes of one mixture-of-experts model, and what they come to in bytes and operations."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from specmd_jax.errors import SpecmdError
from specmd_jax.specs import attention as kinds
from specmd_jax.specs.attention import KeyValues

BF16 = 16.0
MXFP4 = 4.25  # 4-bit values and one 8-bit scale for every 32
FP8_BLOCK = 8.0 + 32.0 / (128 * 128)  # 8-bit values and one float32 scale for every 128 x 128


@dataclass(frozen=True)
class ModelSpec:
    """One mixture-of-experts model. Layers are MoE layers only; leading dense layers are part of `dense_params`."""

    name: str
    layers: int  # L
    experts: int  # E, routed experts of a layer
    top_k: int  # K, routed experts of a token
    d_model: int
    d_ff: int  # hidden width of one expert (three matrices d_model x d_ff: gate, up, down)
    dense_params: float  # per MoE layer: attention, norms, router, shared experts, its share of leading dense layers
    head_params: int  # final norm and unembedding, read once per pass
    embed_params: int  # token embedding, 0 if it is the head: a token reads one row, so it costs memory but no time
    source: str  # where the config is published
    weights_bits: float = BF16  # native bits of an expert weight, scales included
    expert_bias_params: int = 0  # biases of one expert, always 16 bits
    dense_bits: float = BF16
    head_bits: float = BF16
    notes: str = ""
    embed_bits: float = BF16
    shared_params: int = 0  # of dense_params: shared experts of one MoE layer, with their gate
    leading_params: int = 0  # of layers * dense_params: all layers without routed experts together
    attention: tuple[KeyValues, ...] = ()  # of all layers by kind; empty: unknown
    kv_bits: float = BF16  # of a key or value
    hashed_layers: int = 0  # of `layers`: those that choose experts by a hash of the token, with no router to ask ahead

    @property
    def expert_weights(self) -> int:
        """Weights of one expert without biases."""
        return 3 * self.d_model * self.d_ff

    @property
    def expert_params(self) -> int:
        return self.expert_weights + self.expert_bias_params

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert as published."""
        return self.expert_bytes_at(self.weights_bits)

    def expert_bytes_at(self, bits: float) -> int:
        """Gives an expert's bytes if its weights take `bits` each, scales included, rounded up; biases take 16 bits."""
        return math.ceil(self.expert_weights * bits / 8) + 2 * self.expert_bias_params

    @property
    def expert_flops_per_token(self) -> int:
        """One multiplication and one addition per parameter."""
        return 2 * self.expert_params

    @property
    def dense_bytes(self) -> float:
        """Bytes that the dense part of one layer reads in a pass."""
        return self.dense_params * self.dense_bits / 8

    @property
    def dense_flops_per_token(self) -> float:
        """Per layer."""
        return 2 * self.dense_params

    @property
    def head_bytes(self) -> float:
        return self.head_params * self.head_bits / 8

    @property
    def head_flops_per_token(self) -> int:
        return 2 * self.head_params

    @property
    def embed_bytes(self) -> float:
        return self.embed_params * self.embed_bits / 8

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes that one more token of a short context adds, in all layers; behind their windows layers add none."""
        return sum(k.layers * k.values * self.kv_bits / 8 / k.every for k in self.attention)

    def kv_bytes(self, context: int) -> float:
        """Gives the bytes of keys and values (and of the states of linear attention) of one sequence, in all layers.

        Raises SpecmdError where nothing is known of the model's attention.
        """
        self._check_attention()
        return kinds.kept_bytes(self.attention, context, self.kv_bits)

    def context_bytes(self, context: int) -> float:
        """Gives the bytes that attention over the context reads for one token, per MoE layer: all layers' share.

        Raises SpecmdError where nothing is known of the model's attention.
        """
        self._check_attention()
        return kinds.read_bytes(self.attention, context, self.kv_bits) / self.layers

    def context_flops(self, context: int) -> float:
        """Gives the operations of attention over the context for one token, per MoE layer: all layers' share."""
        self._check_attention()
        return kinds.flops(self.attention, context) / self.layers

    def _check_attention(self) -> None:
        if not self.attention:
            raise SpecmdError(f"model {self.name}: nothing is known of its attention, expected no context")

    def stored(
        self,
        bits: float | None = None,
        *,
        dense_bits: float | None = None,
        head_bits: float | None = None,
        embed_bits: float | None = None,
        kv_bits: float | None = None,
    ) -> ModelSpec:
        """Gives the same model with weights of so many bits, scales included; None: see below.

        `bits` are an expert's, as published if None. A dense part, head or embedding whose bits are not given moves
        with the experts if it was published at their precision, and stays as published if not: a model all in bf16 is
        quantised as a whole, while gpt-oss, whose experts alone are in MXFP4, keeps the rest in bf16.

        Raises SpecmdError for bits that are not above 0 and at most 64.
        """
        given = {"bits": bits, "dense_bits": dense_bits, "head_bits": head_bits}
        given |= {"embed_bits": embed_bits, "kv_bits": kv_bits}
        for name, value in given.items():
            if value is not None and not 0 < value <= 64:
                raise SpecmdError(f"{name} is {value}, expected above 0 and at most 64")
        own = self.weights_bits if bits is None else float(bits)
        parts = {"dense_bits": dense_bits, "head_bits": head_bits, "embed_bits": embed_bits}
        moved = {
            name: float(value) if value is not None else own if before == self.weights_bits else before
            for name, value in parts.items()
            for before in (getattr(self, name),)
        }
        return replace(self, weights_bits=own, kv_bits=self.kv_bits if kv_bits is None else float(kv_bits), **moved)

    @property
    def token_cycle_bytes(self) -> int:
        """Bytes of the experts that one token uses: below this much cache, recency alone cannot hit."""
        return self.layers * self.top_k * self.expert_bytes

    @property
    def all_expert_bytes(self) -> int:
        return self.layers * self.experts * self.expert_bytes

    @property
    def total_params(self) -> int:
        """Parameters of the whole model."""
        per_layer = self.experts * self.expert_params + self.dense_params
        return round(self.layers * per_layer) + self.head_params + self.embed_params
