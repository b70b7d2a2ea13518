"""Functions timed in turns, as rows: ours, and what it is compared with."""

from __future__ import annotations

import dataclasses
import importlib.util
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

from alignps_jax.experiments.benchmark import Row, time_in_turns


@dataclasses.dataclass(frozen=True)
class Context:
    """What a part may use.

    Attributes:
      runs: timed runs of every function.
      torch: PyTorch, if it is installed and runs on our kind of device.
      against: another checkout to compare starts with.
      people: sizes of the gallery, ascending.
    """

    runs: int = 5
    torch: ModuleType | None = None
    against: Path | None = None
    people: tuple[int, ...] = ()

    def row(self, what: str, functions: Mapping[str, Callable[[], object]], **more: Any) -> Row:
        """The medians of the functions, one of which is "ours", and how many times it they take."""
        times = time_in_turns(functions, self.runs)
        medians = {name: statistics.median(seconds) for name, seconds in times.items()}
        ours = medians.pop("ours")
        row = {"what": what, "seconds": ours, "from": times["ours"][0], "to": times["ours"][-1]}
        for name, other in medians.items():
            row |= {f"{name}, s": other, f"{name} / ours": other / ours}
        return row | more

    @property
    def torch_device(self) -> str:
        """Where PyTorch's tensors belong, so that both run on the same hardware."""
        return "cpu" if jax.default_backend() == "cpu" else "cuda"

    def with_torch(self, make: Callable[[], Callable[[], object]]) -> dict[str, Callable[[], Any]]:
        """The function that `make` makes, which waits for the device; nothing without PyTorch."""
        if self.torch is None:
            return {}
        function = make()

        def run() -> object:
            result = function()
            if self.torch_device == "cuda":
                self.torch.cuda.synchronize()
            return result

        return {"PyTorch": run}


def find_torch() -> ModuleType | None:
    """PyTorch, if it and torchvision are installed and it runs on our kind of device."""
    if not importlib.util.find_spec("torchvision"):
        return None
    torch, here = importlib.import_module("torch"), jax.default_backend()
    return torch if here == "cpu" or (here == "gpu" and torch.cuda.is_available()) else None
