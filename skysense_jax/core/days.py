"""Days as records store them, since 1970-01-01, and as models see them, of the year."""

from __future__ import annotations

import datetime

import numpy as np

EPOCH = np.datetime64("1970-01-01", "D")

LAST_DAY = 364
"""Last day of the year that models know, counted from 0; 31 December of a leap year is clamped to it."""


def day_number(date: datetime.date) -> int:
    """Days from 1970-01-01 to a date; negative before it."""
    return (date - EPOCH.item()).days


def iso_date(day: int) -> str:
    """ISO text of a stored day (days since 1970-01-01)."""
    return str(EPOCH + np.timedelta64(int(day), "D"))


def day_of_year(dates: np.ndarray) -> np.ndarray:
    """Dates (datetime64[D]) -> int64 day of the year, 1 January = 0, at most LAST_DAY."""
    days = (dates - dates.astype("datetime64[Y]").astype("datetime64[D]")).astype(np.int64)
    return np.minimum(days, LAST_DAY)
