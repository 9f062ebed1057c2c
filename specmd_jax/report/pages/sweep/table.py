"""The table of a sweep."""

from __future__ import annotations

from specmd_jax.report.columns import DRAWN, Column, Table

COUNTS = "routing_counts.csv"
REUSE = "reuse_distances.csv"
COLUMNS: dict[str, Column] = {
    "model": Column("str", "model that the trace was captured from"),
    "eviction": Column("str", "eviction policy"),
    "scope": Column("str", "global: one pool of experts; layer: one pool per layer"),
    "contract": Column("str", "event, sequential or sequential-id"),
    "phase": Column("str", "passes that are counted: all, prefill or decode"),
    "batch": Column("int", "requests decoded together"),
    "miss": Column("str", "what happens to a demanded expert that is not resident"),
    "drafts": Column("int", "tokens drafted for each decode pass"),
    "acceptance": Column("float", "probability that a draft is accepted if those before it were"),
    "hardware": Column("str", "hardware whose times are given; empty: none asked for"),
    "capacity_bytes": Column("int", "cache size in bytes"),
    "capacity_pct": Column("float", "cache size as a share of all experts, in %"),
    "capacity_slots": Column("int", "cache size in experts: how many always fit"),
    "capacity_slots_per_layer": Column("float", "cache size in experts per layer"),
    "cycles": Column("float", "C/T: cache size over the bytes that one token needs in all layers"),
    "demand": Column("int", "demanded experts, summed over visits"),
    "hits": Column("int", "demanded experts that were resident"),
    "hits_reuse": Column("int", "hits on experts that came in by demand, or were used since they came in"),
    "hits_prefetch": Column("int", "first hits on experts that came in by prefetch"),
    "hits_late": Column("int", "hits whose copy was still in flight"),
    "misses": Column("int", "demanded experts that were not resident"),
    "hit_rate": Column("float", "hits / demand, 0 to 1"),
    "collisions": Column("int", "misses on experts evicted earlier in the same pass"),
    "collision_rate": Column("float", "collisions / misses, 0 to 1"),
    "loads": Column("int", "experts copied to the device"),
    "evictions": Column("int", "experts removed from the device"),
    "bytes_demand": Column("int", "bytes copied on demand"),
    "bytes_prefetch_used": Column("int", "bytes copied ahead that were used"),
    "bytes_prefetch_wasted": Column("int", "bytes copied ahead that left unused"),
    "dropped": Column("int", "demanded experts that were skipped"),
    "substituted": Column("int", "demanded experts in whose place a resident one ran"),
    "on_host": Column("int", "demanded experts that ran on the host"),
    "rerouted": Column("int", "experts demanded only because of the routing policy"),
    "lost_mass": Column("float", "share of the gate mass dropped or moved: a proxy of the loss of quality"),
    "mean_bits": Column("float", "bits per weight of the experts that ran on the device"),
    "prefetch_precision": Column("float", "share of the predicted experts that were demanded"),
    "prefetch_recall": Column("float", "share of the demanded experts that had been predicted"),
    "ttft_s": Column("float", "mean time to the first token, seconds"),
    "tpot_s": Column("float", "mean time of a decode pass for each token of a request that it keeps, seconds"),
    "tokens_per_s": Column("float", "tokens per second"),
    "stall_s": Column("float", "time that the device waits for experts, seconds in all"),
    "stall_late_s": Column("float", "stall on copies already in flight, seconds"),
    "stall_miss_s": Column("float", "stall on copies of missing experts, seconds"),
    "stall_link_busy_s": Column("float", "stall because the link was still busy, seconds"),
    "link_utilisation": Column("float", "share of the time that the link copies"),
    "host_s": Column("float", "time that the host computes experts, seconds in all"),
    "host_utilisation": Column("float", "share of the time that the host computes experts"),
    "verified": Column("int", "rows of the decode passes: their tokens, and drafts that were rejected"),
    "acceptance_length": Column("float", "tokens that a decode pass keeps of a request, on average"),
    "loads_per_token": Column("float", "experts copied per token that is kept"),
    "gap_closed": Column("float", "share of the hits between lru and belady that this policy gains, 1 is belady"),
    "tokens": Column("int", "tokens replayed, without those whose draft was rejected"),
    "pin_share": Column("float", "share of the cache that a profile's most used experts keep for good"),
    "admission": Column("str", "which demand copies may stay in the cache"),
    "admitted": Column("int", "demand copies that stayed; empty: not counted, as nothing is turned away"),
    "profile": Column("str", "what a warm start or pins know, and whether it saw the replayed requests"),
    "evidence": Column("str", "simulated or measured, and what of it is estimated"),
}
HOST_COLUMNS: dict[str, Column] = {
    "host_bytes": Column("int", "size of host memory in bytes"),
    "host_hits": Column("int", "misses, copied or run on the host, that were in host memory"),
    "host_misses": Column("int", "misses that were read from storage, to be copied or run on the host"),
    "storage_reads": Column("int", "experts read from storage, for prefetch copies too"),
    "host_evictions": Column("int", "experts removed from host memory"),
    "bytes_storage": Column("int", "bytes read from storage"),
    "stall_storage_s": Column("float", "stall on reads from storage, seconds"),
    "storage_utilisation": Column("float", "share of the time that storage is read"),
    "reads_ahead": Column("int", "experts that were read from storage because they were foreseen"),
    "reads_ahead_used": Column("int", "of these, asked for before they left host memory; empty: they go to the device"),
    "reads_ahead_wasted": Column("int", "and not asked for"),
    "reads_ahead_skipped": Column("int", "foreseen experts that were not read for want of room in host memory"),
    "host_hits_late": Column("int", "misses whose expert was still being read ahead"),
}
"""Of a sweep whose host memory does not hold everything."""
FIRST_KEY = ("model", "eviction", "scope", "contract", "phase", "batch", "hardware", "capacity_bytes")
"""Of tables from before miss rules were varied and tokens drafted."""
KEY = (*FIRST_KEY, "miss", "drafts", "acceptance")
TABLE = Table("sweep", COLUMNS, KEY, beside=(*DRAWN, COUNTS, REUSE))
WITH_STORAGE = TABLE._replace(columns=COLUMNS | HOST_COLUMNS)
