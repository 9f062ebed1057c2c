"""What attention keeps of a context and reads of it: the keys and values of each kind of layer.

Grouped-query attention keeps a key and a value for each key-value head, latent attention (MLA) one low-rank vector and
one rotary key for all heads, linear attention a state of constant size. A layer with a sliding window keeps at most its
window. Sparse attention keeps everything and reads the positions that its indexer chooses, whose own keys it reads all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class KeyValues(NamedTuple):
    """Layers of one kind of attention. All numbers are of one layer and one sequence."""

    layers: int  # of the whole model, dense layers in front included
    values: int  # numbers kept for a position
    flops: int  # operations of one query token on one position that it reads
    window: int = 0  # positions kept and read at most; 0: all
    read: int = 0  # positions read at most, of all that are kept; 0: all
    every: int = 1  # positions that share one entry (compressed attention)
    state: int = 0  # numbers kept and read whatever the context: the state of linear attention, in `state_bits`
    state_flops: int = 0  # operations of one token on that state
    state_bits: float = 32.0

    def kept(self, context: int) -> int:
        """Entries of a context that a layer keeps."""
        entries = context // self.every
        return min(entries, self.window) if self.window else entries

    def seen(self, context: int) -> int:
        """Entries of a context that one query token reads."""
        return min(self.kept(context), self.read) if self.read else self.kept(context)


def kept_bytes(kinds: Sequence[KeyValues], context: int, bits: float) -> float:
    """Gives the bytes that one sequence of `context` tokens keeps in all layers, at `bits` a key or value."""
    return sum(k.layers * (k.kept(context) * k.values * bits + k.state * k.state_bits) / 8 for k in kinds)


def read_bytes(kinds: Sequence[KeyValues], context: int, bits: float) -> float:
    """Gives the bytes that one query token reads in all layers; a linear layer reads its state and writes it back."""
    return sum(k.layers * (k.seen(context) * k.values * bits + 2 * k.state * k.state_bits) / 8 for k in kinds)


def flops(kinds: Sequence[KeyValues], context: int) -> int:
    """Gives the operations of one query token on the context in all layers."""
    return sum(k.layers * (k.seen(context) * k.flops + k.state_flops) for k in kinds)
