"""The programs of a run, one for each shape of its batches, compiled ahead of their first use.

The plan of the batches tells which shapes come, and in which order. So a thread compiles one after
another, while the first ones train already.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from alignps_jax.peers import Expendable
from data_pipeline.transforms import Size


class Programs:
    """Compiles programs in a thread of its own, each once; a context manager.

    When it is left, a program under way is still compiled, but no other one is begun.

    Args:
      build: compiles the program for a (height, width).
      order: sizes as they will be needed; they may repeat.
      begins: is told each size before its program is compiled, and how many there are with it.
    """

    def __init__(
        self,
        build: Callable[[Size], None],
        order: Iterable[Size],
        begins: Callable[[Size, int], None],
    ):
        self._build, self._order, self._begins = build, iter(order), begins
        self._programs: dict[Size, Future[None]] = {}
        self._begun: set[Size] = set()
        self._changed = threading.Condition()
        self._closed = False
        self._failure: BaseException | None = None

    def __enter__(self) -> Programs:
        Expendable(target=self._work, name="programs").start()
        return self

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def program(self, size: Size) -> Future[None]:
        """Is done once there is a program for this size; one that `order` lacks is compiled next.

        Raises what kept any program from being compiled: a run that cannot have it should end
        before it has come there.
        """
        with self._changed:
            if self._failure is not None:
                raise self._failure
            self._changed.notify()
            return self._programs.setdefault(size, Future())

    def _work(self) -> None:
        try:
            while (size := self._next()) is not None:
                program = self.program(size)
                self._begins(size, len(self._begun))
                self._build(size)
                program.set_result(None)
        except BaseException as failure:
            with self._changed:
                self._failure = failure
                for program in self._programs.values():
                    if not program.done():
                        program.set_exception(failure)

    def _next(self) -> Size | None:
        """What to compile next; waits while there is nothing, None when this is left."""
        while True:
            with self._changed:
                if self._closed:
                    return None
                asked = [size for size in self._programs if size not in self._begun]
            size = asked[0] if asked else next(self._order, None)
            if size is None:
                with self._changed:
                    self._changed.wait_for(
                        lambda: self._closed or len(self._programs) > len(self._begun)
                    )
            elif size not in self._begun:
                self._begun.add(size)
                return size
