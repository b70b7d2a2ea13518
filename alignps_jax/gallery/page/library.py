"""Indexing while a gallery is served, of the folders that the server was given."""

from __future__ import annotations

import copy
import functools
import threading
import traceback
from collections.abc import Callable, Sequence

from alignps_jax.errors import UserError
from alignps_jax.gallery.gallery import Gallery
from alignps_jax.gallery.index import Indexed, index
from alignps_jax.gallery.watch import watch


class Library:
    """Changes a gallery in a thread, one piece of work at a time.

    Attributes:
      sources: the folders; no address ever becomes one.
      done: what the latest indexing did so far.
      error: why the latest work did not come to its end.
      is_running: whether work goes on.
    """

    def __init__(self, gallery: Gallery, sources: Sequence[str]):
        self._gallery, self.sources = gallery, [*sources]
        self.done: Indexed | None = None
        self.error, self.is_running = "", False

    def index(self) -> None:
        """Indexes what is new."""
        index(self._gallery, self.sources, report=self._report)

    def _report(self, done: Indexed) -> None:
        self.done = copy.copy(done)

    def watch(self) -> None:
        """Indexes what is new now, and whatever is added from then on."""
        if self.sources:
            turn = functools.partial(self.run, self.index)
            threading.Thread(target=watch, args=(turn, self.sources), daemon=True).start()

    def start(self, work: Callable[[], object]) -> None:
        """Begins some work on the gallery, unless other work goes on."""
        if not self.is_running:
            threading.Thread(target=self.run, args=(work,), daemon=True).start()

    def run(self, work: Callable[[], object]) -> None:
        """Does some work on the gallery."""
        self.error, self.is_running = "", True
        try:
            work()
        except (UserError, OSError) as error:
            self.error = str(error)
        except Exception as error:
            self.error = "This failed; the server's terminal says why."
            traceback.print_exception(error)
        finally:
            self.is_running = False
