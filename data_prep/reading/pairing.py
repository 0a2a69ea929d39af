"""Pairs images by date."""

import datetime
from collections.abc import Sequence

import numpy as np
from scipy import optimize

# Costs more than all pairs of near dates together.
_TOO_FAR = 1e9


def nearest(
    wanted: Sequence[datetime.datetime], offered: Sequence[datetime.datetime], max_days: float
) -> list[int | None]:
    """Pairs each wanted date with another offered date, so that the days between them are few.

    As many pairs as possible are within `max_days`; of such pairings the one with the fewest days
    in all is taken. Where dates could be paired in both ways, the earlier one goes with the earlier
    one.

    Returns:
      For each wanted date, the index of the offered one; None if there is none within `max_days`.
    """
    if not wanted or not offered:
        return [None] * len(wanted)
    days = np.array([[days_between(a, b) for b in offered] for a in wanted])
    # The square makes ties impossible that would swap two dates.
    cost = np.where(days <= max_days, days + 1e-6 * days**2, _TOO_FAR)
    pairs = dict(zip(*optimize.linear_sum_assignment(cost), strict=True))
    return [
        int(pairs[i]) if i in pairs and days[i, pairs[i]] <= max_days else None
        for i in range(len(wanted))
    ]


def days_between(a: datetime.datetime, b: datetime.datetime) -> float:
    """Days between two dates, without sign."""
    return abs((a - b).total_seconds()) / 86400
