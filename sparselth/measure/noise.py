"""Whether noise decides between two times that were raced. Imports no torch.

The standard error of a median is 0.93 of the distance of its quartiles over the root of the samples, where
times scatter like a normal law. A distance of quartiles above SPREAD of the median is no such law: then a
machine did something else beside, and whom it met is luck. Where it met most samples of a rival they may well
agree, and all be wrong: these are known by the time that threads waited for a processor.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparselth.clock import Timing

SPREAD = 0.5  # of quartiles, as a share of the median, above which no winner is named
EVEN = 0.97, 1.03  # speed-ups between them are no win and no loss
DISTURBED = 0.5  # share of samples that waited for a processor from which on the median is one of them
UNSURE = 0.1  # a doubt above which an even speed-up may be anything
AGAIN = 2  # times that a race is gone on with while noise decides it


def doubt(one: Timing, bar: Timing) -> float:
    """Twice the standard error of the speed-up `bar` / `one`, from medians and quartiles."""
    parts = [(timing.spread / timing.median) ** 2 / timing.samples for timing in (one, bar)]
    return 2 * 0.93 * bar.median / one.median * math.sqrt(sum(parts))


def decides(one: Timing, bar: Timing) -> bool:
    """Whether the speed-up of `one` over `bar` says nothing; of a time over itself: whether that does."""
    if any(t.spread > SPREAD * t.median or t.disturbed >= DISTURBED for t in (one, bar)):
        return True
    if one is bar:
        return False
    gain, off = bar.median / one.median, doubt(one, bar)
    return off > UNSURE if EVEN[0] <= gain <= EVEN[1] else gain - off < 1 < gain + off
