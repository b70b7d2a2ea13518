"""LanceDB: opening, creating, and committing until nobody is in the way."""

from __future__ import annotations

import contextlib
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import lancedb
import pyarrow as pa

from alignps_jax.gallery.table import PEOPLE, About, schema
from alignps_jax.inference.detector import Detector
from alignps_jax.types import UserError

# What another writer causes, in Lance's words; a commit is then tried again.
_CONFLICTS = ("conflict", "concurrent", "contention", "too many attempts")
_MOST_SECONDS = 120.0
# The version that was there already. Each attempt looks for the newest one, so that among sound
# versions none is met again.
_MET = re.compile(r"conflict for version (\d+)", re.IGNORECASE)
_MOST_MEETINGS = 3
# What S3 says, and what the system says of a connection, in the words around them.
_ANSWER = re.compile(r'RetryError.*?(?:<Message>(.*?)</Message>|message: "([^"]+)")')

Result = TypeVar("Result")


def connect(address: str) -> Any:
    """The database at an address.

    Raises:
      UserError: it cannot be opened.
    """
    if "://" not in address and Path(address).is_file():
        raise UserError(f"--gallery: found the file {address}, expected a gallery or nothing there")
    with reading(address):
        return lancedb.connect(address)


@contextlib.contextmanager
def reading(address: str) -> Iterator[None]:
    """Makes an error of LanceDB in the block one line that names the gallery.

    Raises:
      UserError: the gallery cannot be read.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of many kinds; Lance panics over some damage
        raise UserError(f"--gallery: {address} cannot be read ({reason(error)})") from error


def committing(address: str, commit: Callable[[], Result]) -> Result:
    """Runs a commit until no other writer is in its way.

    Raises:
      UserError: the gallery cannot be written.
    """
    start, wait = time.monotonic(), 0.01
    met: Counter[str] = Counter()
    while True:
        try:
            return commit()
        except UserError:
            raise
        except Exception as error:  # see `reading`
            text = str(error).lower()
            met.update(_MET.findall(text))
            hopeless = max(met.values(), default=0) >= _MOST_MEETINGS
            met_another = any(word in text for word in _CONFLICTS) and not hopeless
            if not met_another or time.monotonic() - start > _MOST_SECONDS:
                raise UserError(
                    f"--gallery: {address} cannot be written ({reason(error)}); what is in it "
                    "stays, and the same command continues"
                ) from error
            time.sleep(random.uniform(0, wait))
            wait = min(2 * wait, 2.0)


def reason(error: Exception) -> str:
    """What an error of LanceDB says, in one line and without its places in Rust's sources.

    Where a store of objects answered, or nobody did, that is deep inside, and it says enough.
    """
    text = " ".join(str(error).split()).split(", rust/")[0].split(", /")[0]
    if answer := _ANSWER.search(text):
        text = answer[1] or answer[2]
    return text[:300] or type(error).__name__


def table_names(database: Any) -> list[str]:
    """The names of all tables."""
    return list(database.list_tables(limit=1000).tables)


def open_or_create(address: str, database: Any, name: str, columns: pa.Schema) -> Any:
    """A table, made if it is missing, by whoever comes first.

    While another process makes it, it is neither there nor missing; both are tried in turns.
    """
    start = time.monotonic()
    while True:
        try:
            return database.open_table(name)
        except Exception as error:  # see `reading`
            if "not found" not in str(error):
                raise UserError(f"--gallery: {address} cannot be read ({reason(error)})") from error
        _check_place(address)
        try:
            return database.create_table(name, schema=columns)
        except Exception as error:  # see `reading`
            met_another = "exists" in str(error) or "conflict" in str(error).lower()
            if not met_another or time.monotonic() - start > _MOST_SECONDS:
                raise UserError(
                    f"--gallery: {address} cannot be written ({reason(error)})"
                ) from error
        time.sleep(random.uniform(0, 0.1))


def create_people(address: str, database: Any, about: About) -> Any:
    """The table of an empty gallery, or the one that somebody else has just made.

    Raises:
      UserError: something else lies there, or it cannot be written.
    """
    return open_or_create(address, database, PEOPLE, schema(about))


def _check_place(address: str) -> None:
    """Raises UserError if a folder holds other things than a gallery."""
    if "://" in address:
        return
    place = Path(address)
    others = [name for name in os.listdir(place) if not name.endswith(".lance")]
    if others:
        raise UserError(
            f"--gallery: found {sorted(others)[0]!r} in {place}, expected a gallery or an empty "
            "folder"
        )


def about_of(address: str, table: Any) -> About:
    """What made a gallery; UserError if the table is none."""
    with reading(address):
        schema = table.schema
    try:
        return About.of(schema)
    except ValueError as error:
        raise UserError(
            f"--gallery: {address} is no gallery ({error}), expected one that --mode=index made"
        ) from error


def about_detector(detector: Detector) -> About:
    """What a gallery of this detector's says of it."""
    config = detector.config
    long, short = config.data.test_scale
    branches = 1 + (config.model.roi and config.eval.branch == "both")
    return About(
        checkpoint=detector.fingerprint,
        name=detector.name,
        test_scale=(int(long), int(short)),
        score_threshold=float(config.eval.score_threshold),
        dim=branches * int(config.model.channels),
        max_pixels=int(config.data.max_pixels),
    )
