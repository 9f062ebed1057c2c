"""Which sequences a step sees: a pure function of seed and step, so that a run that goes on sees what it would have.

Of every hundred sequences, one behind the other over all steps, each domain has its share, spread evenly. A domain's
own sequences go through its text in a drawn order, all of it before any of it again; each time the text is cut at
other places.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from specmd_jax.errors import SpecmdError
from specmd_jax.moe.training.corpus import DOMAINS, Data

Ints = npt.NDArray[np.int64]


class Batches:
    """The sequences of a run: ``starts(step)`` gives [batch] places in ``data.train`` of ``sequence + 1`` tokens each.

    Raises SpecmdError for a domain that is shorter than one sequence.
    """

    def __init__(self, data: Data, sequence: int, batch: int, seed: int):
        self._data, self._sequence, self._batch, self._seed = data, sequence, batch, seed
        self._names = list(data.domains)
        self._period, self._counts, self._before = _turns(tuple(DOMAINS[name].share for name in self._names))
        self._windows = []
        for name in self._names:
            part = data.domains[name].train
            # one window less than fits: the others begin up to a sequence later
            count = (part.end - part.begin - 1) // sequence - 1
            if count < 1:
                raise SpecmdError(
                    f"{data.folder}: {name} has {part.end - part.begin} tokens, expected more than {2 * sequence}"
                )
            self._windows.append(count)
        self._order = functools.lru_cache(maxsize=4 * len(self._names))(self._drawn)

    def starts(self, step: int) -> Ints:
        """Gives the first token of each sequence of a step (from 0)."""
        return np.array([self._start(step * self._batch + row) for row in range(self._batch)], np.int64)

    def domains(self, step: int) -> Ints:
        """Gives the domain of each sequence of a step, by its number in ``data.domains``."""
        turn = np.arange(step * self._batch, (step + 1) * self._batch) % len(self._period)
        return self._period[turn]

    def _start(self, slot: int) -> int:
        cycle, turn = divmod(slot, len(self._period))
        domain = int(self._period[turn])
        number = cycle * int(self._counts[domain]) + int(self._before[turn])
        epoch, at = divmod(number, self._windows[domain])
        offset, order = self._order(domain, epoch)
        return self._data.domains[self._names[domain]].train.begin + offset + self._sequence * int(order[at])

    def _drawn(self, domain: int, epoch: int) -> tuple[int, Ints]:
        rng = np.random.default_rng([self._seed, domain, epoch])
        return int(rng.integers(self._sequence)), rng.permutation(self._windows[domain])


def _turns(shares: tuple[int, ...]) -> tuple[Ints, Ints, Ints]:
    """Spreads shares evenly: whose turn it is [period], how often each has one, and how often before this turn."""
    counts = np.array(shares, np.int64)
    period = int(counts.sum())
    given, turns, before = np.zeros(len(shares)), np.zeros(period, np.int64), np.zeros(period, np.int64)
    for turn in range(period):
        chosen = int(np.argmax(counts * (turn + 1) / period - given))  # who is most behind; ties: the first
        turns[turn], before[turn] = chosen, given[chosen]
        given[chosen] += 1
    assert (given == counts).all()
    return turns, counts, before
