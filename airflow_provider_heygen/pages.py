"""How far to read HeyGen's list in one turn, without I/O: from the top, while its pages pay."""

from __future__ import annotations

EXPLORE_SECONDS, LONGEST_EXPLORE_SECONDS = 30.0, 3600.0
"""How long after a search beyond the pages that pay the next one comes; doubles while it finds nothing."""

PAGE_COST = 2
"""A page of the list in GETs: it is one request, but takes twice the CPU of a GET (measured)."""


class Pages:
    """
    Decide after each page of the list whether the next one is worth its request.

    A page pays if it tells of more overdubs than :data:`PAGE_COST`. Reading goes as far as it paid last time,
    then on while each page pays. Now and then it goes further, because no order of the list is relied on, and
    loses at most what a GET for each overdub would cost.
    """

    def __init__(self) -> None:
        self.depth = 0
        self._explore_at, self._explore_pause = 0.0, EXPLORE_SECONDS

    def begin(self, now: float, wanted: int, unsought: int) -> bool:
        """Begin a turn for so many overdubs, of which some were not sought yet; return whether to read."""
        self._now, self._page, self._best, self._gain, self._most = now, 0, 0, 0, 0
        self._allowance = wanted if now >= self._explore_at else unsought if unsought > PAGE_COST else 0
        return wanted > PAGE_COST and (self.depth > 0 or self._allowance > 0)

    def more(self, found: int, wanted: int) -> bool:
        """Take what one page told of and what is still wanted; return whether to read another."""
        self._page += 1
        self._gain += found - PAGE_COST
        if self._gain > self._most:
            self._best, self._most = self._page, self._gain
        loss = self._most - self._gain
        return wanted > PAGE_COST and (self._page < self.depth or loss == 0 or loss < self._allowance)

    def end(self) -> None:
        """End the turn, and remember how far it paid."""
        if not self._page:
            return
        if self._allowance:
            longer = EXPLORE_SECONDS if self._best > self.depth else self._explore_pause * 2
            self._explore_pause = min(longer, LONGEST_EXPLORE_SECONDS)
            self._explore_at = self._now + self._explore_pause
        self.depth = self._best
