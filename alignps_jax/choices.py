"""Choosing by name from a table, and one clear line for a name that is not in it."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import TypeVar

from alignps_jax.types import UserError

Entry = TypeVar("Entry")


def choose(field: str, found: object, table: Mapping[str, Entry]) -> Entry:
    """The entry of `table` that `found` names.

    Args:
      field: what the user wrote the name in, such as `config.model.dtype` or `--mode`.
      found: what stands there, of any type.
      table: the entries by name, in the order in which an error lists them.

    Raises:
      UserError: there is no such entry; the nearest name is suggested.
    """
    return table[known_name(field, found, table)]


def known_name(field: str, found: object, known: Collection[str]) -> str:
    """`found` if it is one of the `known` names; UserError, with the nearest name, if it is not."""
    if isinstance(found, str) and found in known:
        return found
    near = _nearest(str(found), known)
    hint = f"; did you mean {near!r}?" if near else ""
    raise UserError(f"{field}: found {found!r}, expected one of {', '.join(known)}{hint}")


def _nearest(found: str, known: Collection[str]) -> str | None:
    """The known name that is spelled most like `found`, or begins with it; in any case."""
    lower = {name.lower(): name for name in known}
    beginning = [name for name in lower if found and name.startswith(found.lower())]
    near = difflib.get_close_matches(found.lower(), lower, n=1) or beginning
    return lower[near[0]] if near else None
