"""Shares the work of several indexing processes on one gallery, on any machines.

Files fall into buckets by a hash of their path. A process claims buckets in a small table of the
gallery, whose primary key lets only one of two claims through, and gives them back when it ends.
Claims save double work and decide on nothing else: two processes that index one file all the same
leave its people once. So nothing has to be renewed, and what a dead process has claimed is done by
whoever comes next.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import psutil
import pyarrow as pa

from alignps_jax.gallery.database import committing, open_or_create, reading
from alignps_jax.gallery.store import Gallery
from alignps_jax.gallery.table import one_of
from alignps_jax.media.walk import MediaFile
from alignps_jax.types import UserError

CLAIMS = "claims"
BUCKETS = 4096
# Files of a share: few enough to be left to others fairly, enough that claims cost nothing.
_SHARES, _MOST_FILES = 32, 256
_POLL_SECONDS = 1.0

_SCHEMA = pa.schema(
    [
        pa.field(
            "bucket",
            pa.string(),
            nullable=False,
            metadata={"lance-schema:unenforced-primary-key": "true"},
        ),
        pa.field("owner", pa.string(), nullable=False),
    ]
)


@dataclasses.dataclass(frozen=True)
class Owner:
    """A process that claims buckets; `started` tells it from another with its number."""

    host: str
    pid: int
    started: float
    turn: float  # of one process, a random number

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def is_running(self) -> bool | None:
        """Whether it is there; None: it is of another machine."""
        if self.host != socket.gethostname():
            return None
        with contextlib.suppress(psutil.Error, ValueError, TypeError, OverflowError):
            return abs(psutil.Process(self.pid).create_time() - self.started) < 2
        return False


class Claims:
    """What this process has claimed, to be given back: a context manager."""

    def __init__(self, gallery: Gallery):
        self._address = gallery.address
        self._table = open_or_create(gallery.address, gallery.database, CLAIMS, _SCHEMA)
        started = psutil.Process().create_time()
        own = Owner(socket.gethostname(), os.getpid(), started, turn=random.random())
        self._own = json.dumps(dataclasses.asdict(own))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        try:
            self._release([self._own])
        except UserError:
            if error is None:  # a disk that is full says so again
                raise

    def shares(
        self,
        files: Sequence[MediaFile],
        missing: Callable[[Sequence[MediaFile]], Sequence[MediaFile]],
    ) -> Iterator[Sequence[MediaFile]]:
        """The files, some at a time, without those that others have meanwhile indexed.

        What others have claimed comes last. It is waited for as long as its owner is running on
        this machine, and done here if it is not. Before such a wait it yields an empty
        share: the caller then commits what it has, or two processes would wait for each other.

        Args:
          files: all that are to be indexed.
          missing: says which of some files are not in the gallery (yet).
        """
        waiting: dict[str, list[MediaFile]] = {}
        for file in files:
            waiting.setdefault(bucket_of(file.path), []).append(file)
        wanted = max(1, min(_MOST_FILES, len(files) // _SHARES))
        order = random.sample(sorted(waiting), len(waiting))  # processes begin in different places
        while order:
            claimed = self._claim(order, lambda bucket: len(waiting[bucket]), wanted)
            order = [bucket for bucket in order if bucket not in claimed]
            share = missing([file for bucket in claimed for file in waiting[bucket]])
            if share:
                yield share
            if not claimed:
                yield []
                time.sleep(_POLL_SECONDS)
                rest = {file.path for file in missing([f for b in order for f in waiting[b]])}
                order = [b for b in order if any(file.path in rest for file in waiting[b])]

    def others(self) -> list[Owner]:
        """Other processes that index this gallery and are running here, or may be elsewhere."""
        found = [_parsed(owner) for owner in set(self._owners().values()) - {self._own}]
        return [owner for owner in found if owner and owner.is_running() is not False]

    def _claim(self, order: Sequence[str], files: Callable[[str], int], wanted: int) -> set[str]:
        """Claims buckets of so many files: free ones, else those of processes that may be gone."""
        owners = self._owners()
        free = [bucket for bucket in order if owners.get(bucket, self._own) == self._own]
        if not free:
            others = set(owners.values()) - {self._own}
            gone = {owner for owner in others if not _is_running_here(owner)}
            if gone:
                self._release(gone)
            free = [bucket for bucket in order if owners[bucket] in gone]
        chosen, count = [], 0
        for bucket in free:
            if count >= wanted:
                break
            chosen.append(bucket)
            count += files(bucket)
        if not chosen:
            return set()
        rows = pa.table({"bucket": chosen, "owner": [self._own] * len(chosen)}, schema=_SCHEMA)

        def commit() -> None:
            self._table.checkout_latest()
            self._table.merge_insert("bucket").when_not_matched_insert_all().execute(rows)

        committing(self._address, commit)
        owners = self._owners()
        return {bucket for bucket in chosen if owners.get(bucket) == self._own}

    def _owners(self) -> dict[str, str]:
        with reading(self._address):
            self._table.checkout_latest()
            rows: list[dict[str, Any]] = self._table.search().to_arrow().to_pylist()
        return {row["bucket"]: row["owner"] for row in rows}

    def _release(self, owners: Iterable[str]) -> None:
        def commit() -> None:
            self._table.checkout_latest()
            self._table.delete(one_of("owner", owners))

        committing(self._address, commit)


def bucket_of(path: str) -> str:
    """The bucket of a file."""
    return str(int(hashlib.sha256(path.encode()).hexdigest()[:8], 16) % BUCKETS)


def _parsed(owner: str) -> Owner | None:
    with contextlib.suppress(ValueError, TypeError):
        return Owner(**json.loads(owner))
    return None


def _is_running_here(owner: str) -> bool:
    """Whether it is worth waiting for: not for what this process itself has left behind."""
    found = _parsed(owner)
    return found is not None and found.pid != os.getpid() and found.is_running() is True
