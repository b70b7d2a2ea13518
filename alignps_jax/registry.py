"""Looking a name up in a table, with one clear line for a name that is not in it."""

import difflib
from collections.abc import Collection, Mapping
from typing import TypeVar

Entry = TypeVar("Entry")


def choose(field: str, found: object, table: Mapping[str, Entry]) -> Entry:
    """The entry of `table` that `found`, the value of a flag or `field`, names; else UserError."""
    return table[known_name(field, found, table)]


def known_name(field: str, found: object, known: Collection[str]) -> str:
    """`found` if it is one of the `known` names; else UserError, with the nearest name."""
    if isinstance(found, str) and found in known:
        return found
    from alignps_jax.types import UserError  # slow to import, and `nearest` does without

    expected = ", ".join(known)
    raise UserError(f"{field}: found {found!r}, expected one of {expected}{nearest(found, known)}")


def nearest(found: object, known: Collection[str]) -> str:
    """The known name that is spelled most like `found`, or begins with it, as the end of a line."""
    text, lower = str(found).lower(), {name.lower(): name for name in known}
    near = difflib.get_close_matches(text, lower, n=1)
    near = near or [name for name in lower if text and name.startswith(text)]
    return f"; did you mean {lower[near[0]]!r}?" if near else ""
