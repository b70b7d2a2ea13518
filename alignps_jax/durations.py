"""Durations such as "24 epochs" or "300 steps"."""

from __future__ import annotations

import re


def steps_of(duration: str, steps_per_epoch: int) -> int:
    """The number of steps of a duration; ValueError for text of another form."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(epoch|step)s?\s*", duration)
    if not found:
        raise ValueError(f'found {duration!r}, expected "<number> epochs" or "<number> steps"')
    return round(float(found[1]) * (steps_per_epoch if found[2] == "epoch" else 1))
