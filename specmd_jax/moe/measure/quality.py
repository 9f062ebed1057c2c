"""How far a run is off the all-resident model, after both have read the same text."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from specmd_jax.errors import SpecmdError
from specmd_jax.moe.runtime.run import Run
from specmd_jax.replay.totals import DROPPED, SUBSTITUTED


class Quality(NamedTuple):
    """Means over the generated places of a text; prompts are read by both, but not scored."""

    changed: float  # share of places whose most likely token is another
    kl_nats: float  # KL divergence of the run's next-token distribution from the resident model's
    nll_nats: float  # mean negative log likelihood that the run gives a token of the text
    resident_nll_nats: float  # ... and the resident model

    @property
    def perplexity(self) -> float:
        """Of the text under the run."""
        return math.exp(self.nll_nats)

    @property
    def resident_perplexity(self) -> float:
        """Of the text under the resident model."""
        return math.exp(self.resident_nll_nats)


class Places(NamedTuple):
    """The same, place by place: [R, S]."""

    changed: npt.NDArray[np.bool_]
    kl_nats: npt.NDArray[np.float64]
    nll_nats: npt.NDArray[np.float64]
    resident_nll_nats: npt.NDArray[np.float64]


def compare(run: Run, resident: Run, text: npt.ArrayLike) -> Quality:
    """Compares a run that was fed every token of ``text`` [R, S] with the resident model's own such run.

    Both with ``keep_logits``. A run whose tokens are the text has read it, too. Raises SpecmdError if a run has no
    logits, or those of other tokens.
    """
    means = [float(column.mean()) for column in places(run, resident, text)]
    return Quality(*means)._replace(kl_nats=max(means[1], 0.0))


def places(run: Run, resident: Run, text: npt.ArrayLike) -> Places:
    """Compares as `compare` does, without taking means. Raises SpecmdError as it does."""
    rows = np.asarray(text)
    for name, one in (("the run", run), ("the resident run", resident)):
        if one.logits is None or one.logits.shape[:2] != rows.shape:
            raise SpecmdError(f"quality: expected {name} with the logits of {list(rows.shape)} tokens (keep_logits)")
    ours, theirs = _log_probabilities(run.logits), _log_probabilities(resident.logits)
    at = rows[..., None].astype(np.int64)
    return Places(
        changed=ours.argmax(axis=-1) != theirs.argmax(axis=-1),
        kl_nats=(np.exp(theirs) * (theirs - ours)).sum(axis=-1),
        nll_nats=-np.take_along_axis(ours, at, axis=-1)[..., 0],
        resident_nll_nats=-np.take_along_axis(theirs, at, axis=-1)[..., 0],
    )


def _log_probabilities(logits: Any) -> npt.NDArray[np.float64]:
    shifted = np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def lost_share(run: Run, mass: npt.NDArray[np.float32], rows: npt.NDArray[np.intp]) -> tuple[float, float]:
    """Shares of the gate mass [V, E] demanded at some visits (``rows``) that was dropped, and moved to a stand-in."""
    outcome = np.stack([run.decisions[int(v)].outcome for v in rows])
    whole = max(float(mass[rows].sum()), 1e-30)
    lost, moved = (float(mass[rows][outcome == code].sum()) / whole for code in (DROPPED, SUBSTITUTED))
    return lost, moved
