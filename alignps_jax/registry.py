"""Looking a name up in a table, with one clear line for a name that is not in it."""

import difflib
from collections.abc import Collection, Mapping
from typing import TypeVar

from alignps_jax.types import UserError

Entry = TypeVar("Entry")


def choose(field: str, found: object, table: Mapping[str, Entry]) -> Entry:
    """The entry of `table` that `found`, the value of a flag or `field`, names; else UserError."""
    return table[known_name(field, found, table)]


def known_name(field: str, found: object, known: Collection[str]) -> str:
    """`found` if it is one of the `known` names; else UserError, with the nearest name."""
    if isinstance(found, str) and found in known:
        return found
    lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(str(found).lower(), lower, n=1)
    hint = f"; did you mean {lower[near[0]]!r}?" if near else ""
    raise UserError(f"{field}: found {found!r}, expected one of {', '.join(known)}{hint}")
