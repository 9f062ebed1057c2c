"""The scan writes its tables in place: a table that is copied at every visit makes large models many times slower."""

from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np
from parity import LINK

from specmd_jax.engines.prepared import prepare
from specmd_jax.engines.scan import replay_many
from specmd_jax.policies.choice import Mix
from specmd_jax.trace import synthesize

CELLS, LAYERS, EXPERTS = 5, 7, 20  # a shape that nothing but a table of every cell has


def test_no_table_is_copied_at_a_visit() -> None:
    replays = prepare(synthesize(layers=LAYERS, experts=EXPERTS, top_k=2, tokens=20))
    mix = Mix.of("lru", prefetch="previous")
    setup = replays.setup(mix, LINK)
    size = int(replays.sizes.level_bytes[-1, 0])
    units = np.stack([replays.sizes.budget(size * slots) for slots in range(20, 20 + CELLS)])
    numbers = replays.numbers(size, LINK)._replace(budget=jnp.asarray(units))
    program = replay_many.lower(setup, ("budget",), numbers, mix.traced(), replays.visits(setup, mix)).compile()
    loops, _, entry = str(program.as_text()).partition("\nENTRY ")
    table = rf"(\w+\[{CELLS},{LAYERS},{EXPERTS}\])\S*"
    assert "s8" in {kind[:2] for kind in re.findall(rf"= {table} fusion\(", loops)}, "the residency is not there at all"
    assert entry
    assert re.findall(rf"= {table} copy\(", loops) == []
