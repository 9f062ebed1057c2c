"""The table of `experiments.quality`: what a rule makes of held-out text, and how fast it would be."""

from __future__ import annotations

from specmd_jax.report.columns import Column, Table
from specmd_jax.report.pages.train_moe import DOMAINS

EVIDENCE = "quality measured, time simulated"
"""Of every row: the model read the text under the rule; the routing of that very run was replayed with seconds."""

COLUMNS = {
    "model": Column("str", "model that read the text"),
    "rule": Column("str", "the miss rule or routing with its number, or fetch; what is compared"),
    "miss": Column("str", "miss rule"),
    "routing": Column("str", "routing policy"),
    "number": Column("float", "the rule's own number (keep, tolerance or strength); empty: it has none"),
    "precisions": Column("str", "what the host holds of each expert, by rising bits"),
    "capacity_pct": Column("float", "cache size in % of the bytes of all experts at 16 bits"),
    "capacity_slots": Column("int", "cache size in experts at the highest precision that is held"),
    "experts_pct": Column("float", "the same in % of all experts"),
    "cycles": Column("float", "C/T: cache size over what one token needs in all layers"),
    "hit_rate": Column("float", "hits / demand, 0 to 1 (simulated, events as in the run)"),
    "copies_per_token": Column("float", "experts copied per token"),
    "copied_share": Column("float", "bytes copied per token / bytes of a token's experts at 16 bits"),
    "mean_bits": Column("float", "of the experts that ran"),
    "dropped_share": Column("float", "gate mass of dropped experts / all, in decode passes, 0 to 1"),
    "moved_share": Column("float", "gate mass of experts that others stood in for / all, in decode passes, 0 to 1"),
    "places": Column("int", "tokens that were scored"),
    "bits_per_byte": Column("float", "of the held-out text, plain mean of the domains (measured)"),
    "resident_bits_per_byte": Column("float", "the same under the model with all experts on the device as shipped"),
    "change_pct": Column("float", "bits_per_byte / resident_bits_per_byte - 1, in %"),
    "change_se_pct": Column("float", "its standard error over the tokens, which both read"),
    "perplexity": Column("float", "of a token, over all domains"),
    "resident_perplexity": Column("float", "the same with all experts on the device as shipped"),
    "kl_nats": Column("float", "mean KL divergence of the next token from the resident model's"),
    "kl_se_nats": Column("float", "its standard error over the tokens"),
    "changed_tokens": Column("float", "share of next tokens that are not the resident model's"),
    **{f"bits_{name}": Column("float", f"bits per byte of held-out {name}") for name in DOMAINS},
    "tpot_s": Column("float", "time of a decoded token, seconds (simulated)"),
    "events_equal": Column("bool", "the replay hits, copies, drops and moves as often as the run did; empty: no run"),
    "evidence": Column("str", EVIDENCE),
}
KEY = ("model", "rule", "precisions", "capacity_pct")
TABLE = Table("quality", COLUMNS, KEY)
