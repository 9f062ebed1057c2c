"""What a policy of each axis is: pure functions closed over their numbers, and what generic code must know of them.

A policy only scores or plans; the engine alone touches residency. What an engine, a study or a running model has to
know of a policy is a field that the policy declares. Nothing outside the tables asks for a policy's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Bool, Float32, Int32, Shaped

from specmd_jax.trace.profile import Profile

Keys = tuple[jax.Array, ...]

# ------------------------------------------------------------------------------------------------------------ eviction


class Start(NamedTuple):
    """What tables are made from."""

    first_use: Int32[Array, "L E"]  # the first visit that demands each expert (NEVER: none)
    rank: Int32[Array, "L E"] | None = None  # of a warm start: by falling count from 0; None: the cache begins empty


class Now(NamedTuple):
    """Where the replay stands (scalars)."""

    visit: Int32[Array, ""]
    layer: Int32[Array, ""]
    pass_id: Int32[Array, ""]
    layers: int


class Use(NamedTuple):
    """What one visit tells a policy about the row of the visited layer. What an engine does not know is None there."""

    now: Now
    demand: Bool[Array, " E"]  # the pass's tokens route to it
    touch: Int32[Array, " E"]  # access clock of this use
    mass: Float32[Array, " E"]  # gate mass
    hit: Bool[Array, " E"]  # demanded and resident
    loaded: Bool[Array, " E"]  # demanded and copied in, absent or at a lower precision before
    top: Bool[Array, " E"]  # demanded and runs at the highest stored precision
    next_use: Int32[Array, " E"]  # the next visit that demands it
    end_touch: Int32[Array, ""]  # clock after this visit's uses
    pool: Bool[Array, " L"]  # layers that share the visited layer's budget
    budget: Int32[Array, ""]  # that budget in units
    units: Int32[Array, "L E"]  # what each resident expert takes of it (0: absent), demand included
    score: Int32[Array, " E"] | None = None  # what the policy's `Scorer` gives, where it was worked out beforehand


def routed(now: Now, demand: Bool[Array, " E"], mass: Float32[Array, " E"]) -> Use:
    """Gives what the routing alone tells of a visit: all that a `Scorer` reads."""
    unknown: Any = None
    return Use(
        now=now,
        demand=demand,
        touch=unknown,
        mass=mass,
        hit=unknown,
        loaded=unknown,
        top=unknown,
        next_use=unknown,
        end_touch=unknown,
        pool=unknown,
        budget=unknown,
        units=unknown,
    )


class Arrival(NamedTuple):
    """Prefetching of one visit for the rows of its target layers."""

    rows: Int32[Array, " H"]  # target layers
    selected: Bool[Array, "H E"]  # the prefetcher wants it there, resident or not
    arrived: Bool[Array, "H E"]  # its copy started
    touch: Int32[Array, ""]
    visit: Int32[Array, ""]  # the visit that prefetched
    pass_id: Int32[Array, " H"]  # the pass each target layer will be visited in


class Column(NamedTuple):
    """One table a policy keeps, and how a visit changes it."""

    fill: Callable[[Start], Shaped[Array, "L E"]]
    used: Callable[[Shaped[Array, " E"], Use], Shaped[Array, " E"]]  # (row, use) -> row
    arrived: Callable[[Shaped[Array, "H E"], Arrival], Shaped[Array, "H E"]] = lambda rows, arrival: rows


def renewed(old: Any, fresh: Any) -> Any:
    """Gives the state after a reset of a policy that forgets."""
    del old
    return fresh


class Pairs(NamedTuple):
    """The numbers of a predictor by `policies.adaptive` that begins with nothing, in 1/1024."""

    rate: int | jax.Array
    fade: int | jax.Array = 0  # of an evictor's label


class Scorer(NamedTuple):
    """Scores of the visited layer's experts that the routing alone decides, whoever is resident."""

    init: Callable[[Start], Any]
    observe: Callable[[Any, Use], tuple[Any, Int32[Array, " E"]]]
    """(memory, use) -> (memory, score of each expert of the layer); of the use it reads `now`, `demand` and `mass`.
    Every leaf of the memory begins with the axis L."""
    carried: Callable[[Any, Any], Any] = renewed
    """as `Eviction.carried`, of the memory"""
    pairs: Pairs | None = None  # the same in the words of a kernel; None: it cannot be said so


class Rows(NamedTuple):
    """A policy whose tables change by rows, which the GPU program can replay. Its functions are elementwise."""

    columns: Mapping[str, Column]
    keep: Callable[..., Keys]  # (now, layers, entries of each column) -> keep-score keys
    scorer: Scorer | None = None  # works `Use.score` out; None: no column reads it


class Curve(NamedTuple):
    """The keep-score in the words of the compiled loops that give all capacities in one pass (`engines.curves`).

    Its numbers must be those of the policy.
    """

    own: str  # the expert's own part of the score: a key of `engines.curves_kernels.PARTS`
    marks: bool = False  # experts that were used in this pass stay before all others
    layers: str = "none"  # how layers are ordered: "none", "cyclic", "absolute" or "left_first"
    decay: float | int | jax.Array = 1.0
    seed: int | jax.Array = 0
    protected: float | int | jax.Array = 1.0


class Pins(NamedTuple):
    """What never leaves: a profile's experts with the largest counts, as far as they fit in a share of each pool."""

    share: float | int | jax.Array
    profile: Profile


class Eviction(NamedTuple):
    """Which expert leaves first. State leaves are `[L, E]` tables; `keep` is elementwise over rows or their entries.

    `rows` and `curve` say the same as the functions, for faster engines. Whoever replaces a function replaces them
    too, or sets them to None.
    """

    init: Callable[[Start], Any]
    observe: Callable[[Any, Use], Any]
    arrive: Callable[[Any, Arrival], Any]
    keep: Callable[[Any, Now, jax.Array], Keys]
    """(state entries, now, their layers) -> keep-score keys, compared in order; the lowest leaves first"""
    bypass: bool = False  # the demand competes for its place instead of being pinned (forced admission otherwise)
    static_rows: bool = True
    """The order inside a layer changes only at pass starts and when that layer is visited or prefetched into."""
    oracle: bool = False  # reads the future: an upper bound, not something to deploy
    rows: Rows | None = None  # the same by rows, which the GPU program needs; None: it cannot be written so
    curve: Curve | None = None  # the same for the loops of the curves; None: they cannot score it
    pins: Pins | None = None  # experts that are resident from the start and that it has no say over
    carried: Callable[[Any, Any], Any] = renewed
    """(state before a reset, a fresh one) -> state after it: what was learned may outlast the cache"""


# ------------------------------------------------------------------------------------------------------------ prefetch


class Size(NamedTuple):
    """What a predictor may size its tables by."""

    layers: int
    experts: int
    horizon: int


class Gate(NamedTuple):
    """What a predictor sees when a layer's routing is complete."""

    now: Now
    demand: Bool[Array, " E"]  # routed to by the pass at this layer
    mass: Float32[Array, " E"]  # gate mass
    ahead: Float32[Array, " E"] | None  # the next layer's gate on this layer's activations
    future: Float32[Array, "H E"] | None  # gate mass the next H layers will see (oracles and controls)


class Prefetch(NamedTuple):
    """A predictor of the next H layers' demand."""

    init: Callable[[Size], Any]
    observe: Callable[[Any, Gate], Any]
    want: Callable[[Any, Gate, Size], Float32[Array, "H E"]]
    """(state, gate, size) -> scores for layers l+1..l+H (wrapping into the next pass), -inf where it wants nothing"""
    needs: str | None = None  # the column of `Gate` it reads: "ahead" (recorded scores), or a key of `FUTURES`
    oracle: bool = False  # reads the future
    most_horizon: int | None = None  # how many layers ahead it can look; None: any number
    pairs: Pairs | None = None  # the same in the words of a kernel; None: it cannot be said so
    carried: Callable[[Any, Any], Any] = renewed
    """as `Eviction.carried`"""


FUTURES = {"future": "what will be used", "shuffled": "what another token will use"}
"""Columns of `Gate.future`: what the schedule can tell an oracle or a control."""


def renew(policy: Eviction | Prefetch, old: Any, fresh: Any) -> Any:
    """Gives a policy's state after a reset; what an oracle knows of the future is no memory."""
    return old if policy.oracle else policy.carried(old, fresh)


class Selection(NamedTuple):
    """Which of the wanted experts of each target layer are asked for."""

    init: Callable[[Size], Any]
    select: Callable[[Any, Float32[Array, "H E"], Int32[Array, " H"], Bool[Array, ""]], tuple[Any, Bool[Array, "H E"]]]
    """(state, want, rows, active) -> (state, which)"""


# ---------------------------------------------------------------------------------------------------------------- miss


class Row(NamedTuple):
    """The visited layer as a rule sees it."""

    demand: Bool[Array, " E"]
    level: Int32[Array, " E"]  # 0 absent, 1..Q precision (ascending bits)
    arrived: Bool[Array, " E"]  # resident and not in flight
    mass: Float32[Array, " E"]  # gate mass
    order: Int32[Array, " E"]  # rank by falling gate mass among the demand (ties: lower id)
    # the router's softmax (NaN in passes of several tokens); None without logits
    probability: Float32[Array, " E"] | None
    levels: int  # Q
    room: Int32[Array, ""]  # experts of the layer at Q that its pool has room for as it is


class Plan(NamedTuple):
    """What to do. A demanded expert with `level >= need` is a hit and the rest of the plan does not touch it."""

    need: Int32[Array, " E"]  # lowest level that counts as a hit
    fetch: Int32[Array, " E"]  # level at which a miss is copied (0: not copied)
    host: Bool[Array, " E"]  # a miss runs on the host; one that may also be fetched goes where `Miss.divides` has it
    instead: Int32[Array, " E"]  # a miss is replaced by this resident expert of the layer (-1: not)


class Miss(NamedTuple):
    """What happens to a demanded expert that is not resident at the precision it needs."""

    plan: Callable[[Row], Plan]
    fetches_all: bool = False
    """Every miss is copied at the highest precision: the plan depends on nothing that it is shown."""
    needs_logits: bool = False  # reads `Row.probability`
    least_levels: int = 1  # stored precisions without which the rule makes no sense
    hosts: bool = False  # runs experts on the host
    divides: bool = False
    """Of a miss that the plan both fetches and hosts, time decides: it goes where the visit ends first. Else it is
    fetched."""


# ----------------------------------------------------------------------------------------------------------- admission


class Offer(NamedTuple):
    """The demand copies of a visit."""

    starts_pass: Bool[Array, ""]  # the first visit of its pass
    copied: Bool[Array, " E"]
    order: Int32[Array, " E"]  # rank by falling gate mass among the demand (ties: lower id)


class Admission(NamedTuple):
    """Which demand copies stay in the cache. One that is turned away runs from a buffer and leaves residency alone."""

    competes: bool = False  # making room does not spare the demand
    gain: float | int | jax.Array | None = None
    """The first keep-score of an arrival counts as so much less when room is made; only where the demand competes."""
    init: Callable[[], Any] | None = None  # what `admit` remembers at the start
    admit: Callable[[Any, Offer], tuple[Any, Bool[Array, " E"]]] | None = None
    """(state, offer) -> (state, which copies are let in); None: all of them"""


# ------------------------------------------------------------------------------------------------------------- routing


class Routing(NamedTuple):
    """Changes the logits that *select* experts; the original logits weigh them. It always needs the router's logits."""

    init: Callable[[int], Any]  # L -> state
    adjust: Callable[
        [Any, Int32[Array, ""], Float32[Array, "t E"], Bool[Array, " E"]], tuple[Any, Float32[Array, "t E"]]
    ]
    """(state, layer, logits of the tokens, resident) -> (state, adjusted logits)

    All programs must round it alike: a product that is added to something is exact (a factor of 0 or 1) or rounded by
    `jax.lax.reduce_precision`, as compilers join the two; sums over tokens are those of `loops.in_order`.
    """


class Policies(NamedTuple):
    """One policy for each axis, built. None: nothing happens on that axis."""

    eviction: Eviction
    miss: Miss
    prefetch: Prefetch | None = None
    selection: Selection | None = None
    routing: Routing | None = None
    admission: Admission | None = None
    host_eviction: Eviction | None = None  # of host memory, where it does not hold everything

    @property
    def competes(self) -> bool:
        """Whether making room does not spare the demand."""
        return self.eviction.bypass or (self.admission is not None and self.admission.competes)

    @property
    def selective(self) -> bool:
        """Whether demand copies may be kept out by an admission rule or by pins, so that those let in are counted."""
        return self.admission is not None or self.eviction.pins is not None

    @property
    def needs_logits(self) -> bool:
        """Whether one of them reads the router's full logits."""
        return self.routing is not None or self.miss.needs_logits

    @property
    def keeps_text(self) -> bool:
        """Whether a model computes what it would with everything resident: its own demand, all of it at the best."""
        return self.miss.fetches_all and self.routing is None

    @property
    def demand_only(self) -> bool:
        """Whether the recorded demand is all that is copied, and all of it is."""
        return self.prefetch is None and self.keeps_text
