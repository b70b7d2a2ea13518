"""Errors in what users type and have, and the nearest of the names that they could have meant."""

import contextlib
import difflib
from collections.abc import Collection, Iterator


class UserError(Exception):
    """Bad input: one clear line, which the command line prints before it exits with `exit_code`."""

    exit_code = 2

    def __str__(self) -> str:
        # Names of files come from strangers: a terminal shows their control characters.
        text = super().__str__()
        return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


class IncompleteError(UserError):
    """The work is done and its results are written, except for a part of the input."""

    exit_code = 3


@contextlib.contextmanager
def blame(path: object) -> Iterator[None]:
    """Turns a ValueError, and nothing else, into a UserError that names `path`."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def known_name(field: str, found: object, known: Collection[str]) -> str:
    """`found`, the value of a flag or field, if it is one of the `known` names; else UserError."""
    if isinstance(found, str) and found in known:
        return found
    expected = ", ".join(known)
    raise UserError(f"{field}: found {found!r}, expected one of {expected}{nearest(found, known)}")


def nearest(found: object, known: Collection[str]) -> str:
    """The known name that is spelled most like `found`, or begins with it, as the end of a line."""
    text, lower = str(found).lower(), {name.lower(): name for name in known}
    near = difflib.get_close_matches(text, lower, n=1)
    near = near or [name for name in lower if text and name.startswith(text)]
    return f"; did you mean {lower[near[0]]!r}?" if near else ""
