"""Indexing from the page: the folders that the server was given, progress, what was left out."""

from __future__ import annotations

import dataclasses
import threading
import traceback
from collections.abc import Callable, Sequence

from alignps_jax.errors import UserError
from alignps_jax.gallery.gallery import Gallery
from alignps_jax.gallery.index import Indexed, index


class Library:
    """Keeps a gallery up to date with some folders, in a thread.

    Attributes:
      sources: the folders; an address never becomes one.
      done: what the latest run did so far.
      error: why it ended, if it did not come to its end.
    """

    def __init__(self, gallery: Gallery, sources: Sequence[str]):
        self._gallery, self.sources = gallery, [*sources]
        self.done: Indexed | None = None
        self.error = ""
        self._thread = threading.Thread()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        """Indexes what is new."""
        if self.sources:
            self.run(lambda: index(self._gallery, self.sources, report=self._report))

    def run(self, work: Callable[[], object]) -> None:
        """Does some work on the gallery in a thread, unless other work goes on."""
        if not self.is_running:
            self.error = ""
            self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
            self._thread.start()

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except (UserError, OSError) as error:
            self.error = str(error)
        except Exception as error:
            self.error = "Indexing failed; the server's terminal says why."
            traceback.print_exception(error)

    def _report(self, done: Indexed) -> None:
        self.done = dataclasses.replace(done)
