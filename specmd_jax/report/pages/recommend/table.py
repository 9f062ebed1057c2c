"""The table of a recommendation."""

from __future__ import annotations

from specmd_jax.report.columns import Column, Table

COLUMNS: dict[str, Column] = {
    "study": Column(
        "str",
        "grid: the candidates; cold: the first request from an empty cache; bound: what knows the future reaches; "
        "link, host, contract, reading, precision: how the best moves; lossy: rules that change the output",
    ),
    "variant": Column("str", "what the study changed; as asked: nothing"),
    "model": Column("str", "model"),
    "hardware": Column("str", "link, device and host"),
    "batch": Column("int", "requests decoded together"),
    "eviction": Column("str", "eviction policy"),
    "prefetch": Column("str", "prefetch policy"),
    "miss": Column("str", "miss rule"),
    "memory_bytes": Column("int", "accelerator memory in all"),
    "fixed_bytes": Column(
        "int", "of it not for cached experts: dense part, head, embedding, keys and values, one visit's experts"
    ),
    "capacity_bytes": Column("int", "cache of experts"),
    "capacity_pct": Column("float", "cache of experts as a share of all of them, in %"),
    "cycles": Column("float", "C/T: cache size over the bytes that one token needs in all layers"),
    "slot_bits": Column("float", "bits of a weight in a full-precision slot"),
    "ttft_s": Column("float", "mean time of a request's prompt, seconds"),
    "tpot_s": Column("float", "mean time of a decode pass, with drafts for each token of a request it keeps, seconds"),
    "tokens_per_s": Column("float", "decoded tokens per second"),
    "bytes_per_token": Column("float", "bytes over the link, over all tokens, prompts included"),
    "stall_share": Column("float", "share of the time that the device waits for experts, 0 to 1"),
    "link_utilisation": Column("float", "share of the time that the link copies, 0 to 1"),
    "hit_rate": Column("float", "hits / demand, 0 to 1"),
    "hits_late": Column("int", "hits whose copy was still in flight"),
    "misses": Column("int", "demanded experts that were not resident"),
    "collisions": Column("int", "misses on experts evicted earlier in the same pass"),
    "bytes_demand": Column("int", "bytes copied on demand"),
    "bytes_prefetch_used": Column("int", "bytes copied ahead that were used"),
    "bytes_prefetch_wasted": Column("int", "bytes copied ahead that left unused"),
    "host_bytes": Column("int", "host memory for experts; empty: it holds all"),
    "host_misses": Column("int", "copied misses that were read from storage first"),
    "storage_utilisation": Column("float", "share of the time that storage is read, 0 to 1"),
    "lost_mass": Column("float", "proxy of quality: share of gate mass dropped or moved, 0 to 1"),
    "mean_bits": Column("float", "proxy of quality: mean bits of the experts that ran"),
    "tokens": Column("int", "tokens that are counted, with a warm cache"),
    "request_decode_s": Column("str", "seconds of all decode passes, for each counted request"),
    "request_decodes": Column("str", "decode passes, or with drafts tokens they kept, for each counted request"),
    "request_prefill_s": Column("str", "seconds of the prompt, for each counted request"),
    "evidence": Column("str", "what the numbers of this row rest on"),
}
KEY = ("study", "variant", "eviction", "prefetch", "miss", "capacity_bytes")
TABLE = Table("recommend", COLUMNS, KEY)
