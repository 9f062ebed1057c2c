# %% [markdown]
# # A policy of your own
#
# This page is a notebook: it was run when the site was built, and its source is
# [own_policy.py](own_policy.py), which Jupyter opens with
# [jupytext](https://jupytext.readthedocs.io). It replays a recorded trace of gpt-oss-20b, compares policies with the
# bound, adds a policy in a few lines, and takes a gradient through the cache. Hits are counted exactly; nothing is
# measured on a machine.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

from specmd_jax import bundled, prepare, sweep, totals
from specmd_jax.policies.base import Eviction
from specmd_jax.policies.columns import TOUCH, scored
from specmd_jax.soft.replay import Knobs, given, replay

trace = bundled("gpt-oss-20b", tokens=1000)
print(f"{trace.tokens} tokens, {trace.layers} layers of {trace.experts} experts")
print(f"{trace.top_k} experts of each layer per token")

# %% [markdown]
# ## A policy in one line
#
# A policy gives every resident expert a score, and the lowest leaves first. `scored` keeps the columns that the score
# reads: here `touch`, the time of the last use. `lru` is the score `touch`. With the opposite sign the *most* recently
# used expert leaves first. That sounds absurd, and it is what a cache wants that is smaller than one round over the
# layers: the expert that was just used is the one whose layer comes again last.


# %%
def mru() -> Eviction:
    """Most recently used leaves first."""
    return scored(lambda now, layer, touch: (-touch,), touch=TOUCH)


# %% [markdown]
# ## Hits against cache size
#
# A policy of your own goes wherever a name goes. `belady` knows the future and is the bound: the share of the way from
# `lru` to `belady` that a policy gains is the *gap closed*.

# %%
sizes = [5, 7.5, 10, 12, 12.5, 15, 20, 25, 30, 40, 50, 60, 75, 90]
policies = ["lru", "lfu_decay", mru, "belady"]
rows = list(sweep(trace, eviction=policies, capacity=[f"{size}%" for size in sizes]))

figure, axes = plt.subplots(figsize=(7, 4))
for policy in dict.fromkeys(row["eviction"] for row in rows):
    mine = [row for row in rows if row["eviction"] == policy]
    at, hits = [row["capacity_pct"] for row in mine], [100 * row["hit_rate"] for row in mine]
    axes.plot(at, hits, label=policy)
axes.axvline(100 * trace.top_k / trace.experts, color="grey", linewidth=0.8)
axes.set(xlabel="cache size, % of all experts", ylabel="hits, %")
axes.legend()
plt.show()

# %% [markdown]
# Left of the grey line the cache holds less than one token uses in all layers together. There `lru` hits nothing, and
# `mru` hits something. Right of it the order turns around at once.

# %% [markdown]
# ## A study over a number
#
# The numbers of a policy are arguments of a compiled program, so `jax.vmap` goes over them: one compilation, and all
# decays side by side.

# %%
prepared = prepare(trace)
decays = jnp.linspace(0.5, 0.99, 8)


@jax.jit
@jax.vmap
def evicted(decay):
    found = totals(prepared, eviction="lfu_decay", decay=decay, capacity="25%", hardware=None)
    return found.evictions.sum()


for decay, count in zip(decays, evicted(decays), strict=True):
    print(f"decay {decay:.2f}: {count:,} evictions")

# %% [markdown]
# ## A gradient
#
# Whether an expert stays is yes or no, and has no slope. The *soft* cache says instead how much of it stays, at a
# temperature, and near 0 it is the cache itself. Through it the misses have a gradient in the weights of the policy
# `weighted` (recency, three frequencies, gate mass, distance to the layer) and in the budget.

# %%
requests = given([prepare(bundled("gpt-oss-20b", tokens=200))])
budget = jnp.float32(0.25 * trace.experts * trace.expert_bytes.sum())


def misses(weights, budget):
    return replay(requests, Knobs(weights, budget), temperature=0.1).misses.sum()


weights = jnp.array([0.5, 0.0, 1.0, 1.0, 0.0, 0.0])
slope, per_byte = jax.grad(misses, argnums=(0, 1))(weights, budget)
print("change of misses per unit of each weight:", slope.round(1))
per_expert = per_byte * trace.expert_bytes[0]
print(f"one more expert in the cache changes them by {per_expert:.1f}")

# %% [markdown]
# `experiments.learn_policy` follows this gradient to better weights and says what they are worth against search.
