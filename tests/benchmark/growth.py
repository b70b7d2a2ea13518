"""How time and memory grow with image area, people, identities and gallery: table and plot."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from alignps_jax.experiments.benchmark.measure import Timing, time_in_turns
from alignps_jax.files import write_atomically
from tests.benchmark import growth_cases
from tests.benchmark.growth_cases import Work
from tests.benchmark.measure import Context, Row

# Of the fitted exponent; more is called faster than linear. What is linear measures up to this.
LINEAR = 1.1
# Sizes, the largest ones, that the exponent is fitted to: what is constant hides behind the others.
FITTED = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured at several sizes of `quantity`, by ascending size.

    Those with a network take long to compile: a quick run leaves them out.
    """

    quantity: str
    name: str
    prepare: Callable[[Context, int], Work]
    sizes: tuple[int, ...]
    network: bool = False


CASES = (
    Case("pixels", "inference", growth_cases.inference, (86016, 172032, 344064, 688128), True),
    Case(
        "people per image", "training step (demo)", growth_cases.training_step, (8, 32, 128), True
    ),
    Case("people per image", "target assignment", growth_cases.targets, (8, 16, 32, 64, 128)),
    Case("people per image", "triplet loss, gradient", growth_cases.triplet, (8, 16, 32, 64)),
    Case("people per image", "decoding, NMS", growth_cases.detections, (8, 16, 32, 64, 128)),
    Case(
        "identities",
        "OIM loss, gradient, update",
        growth_cases.oim,
        (2000, 4000, 8000, 16000, 32000),
    ),
    Case("gallery embeddings", "search", growth_cases.search, (62500, 125000, 250000, 500000)),
    Case("gallery images", "search figures", growth_cases.figures, (1000, 2000, 4000, 8000)),
)


@dataclasses.dataclass(frozen=True)
class Series:
    """What a case came to."""

    case: Case
    times: tuple[Timing, ...]
    memory: tuple[float, ...]

    @property
    def time_exponent(self) -> float:
        """Of the size, in the power law that fits the fastest runs best."""
        return exponent(self.case.sizes, [time.low for time in self.times])

    @property
    def memory_exponent(self) -> float:
        """Of the size, in the power law that fits the memory best."""
        return exponent(self.case.sizes, self.memory)

    def verdict(self) -> str:
        """In words: both exponents, and whether one is above linear."""
        exponents = {"time": self.time_exponent, "memory": self.memory_exponent}
        found = ", ".join(f"{name} ~ n^{value:.2f}" for name, value in exponents.items())
        faster = [name for name, value in exponents.items() if value > LINEAR]
        judged = f"{' and '.join(faster)} FASTER than linear" if faster else "not above linear"
        return f"{found}: {judged}"


def rows(context: Context, cases: Sequence[Case] = CASES) -> Iterator[Row]:
    """One row per case and size; the last one of a case says how it grows. Writes `growth.png`."""
    measured = []
    for case in cases:
        if context.quick and case.network:
            continue
        series = measure(context, case)
        measured.append(series)
        figures = zip(series.case.sizes, series.times, series.memory, strict=True)
        for size, time, memory in figures:
            is_last = size == series.case.sizes[-1]
            yield Row(
                "growth",
                f"{case.name}: {size:,} {case.quantity}",
                time,
                memory=memory,
                goal="no faster than linear" if is_last else "",
                note=series.verdict() if is_last else "",
            )
    write_atomically(context.workdir / "growth.png", plot(measured))


def measure(context: Context, case: Case) -> Series:
    """Prepares all sizes, then times them in turns."""
    if context.quick:
        case = dataclasses.replace(case, sizes=case.sizes[:2])
    work = {str(size): case.prepare(context, size) for size in case.sizes}
    times = time_in_turns({size: one.run for size, one in work.items()}, runs=context.runs)
    series = Series(
        case, tuple(times[size] for size in work), tuple(one.memory for one in work.values())
    )
    jax.clear_caches()  # programs hold memory, and no other case needs these
    return series


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope, in logarithms, of the largest sizes; at least two."""
    size, value = (np.log(np.asarray(numbers[-FITTED:], float)) for numbers in (sizes, values))
    return round(float(np.polyfit(size, value, 1)[0]), 3) + 0.0  # no -0


def plot(measured: Sequence[Series]) -> bytes:
    """A PNG: time above, memory below, one column per quantity."""
    quantities = list(dict.fromkeys(series.case.quantity for series in measured))
    figure = Figure(figsize=(4.2 * len(quantities), 8), dpi=100, layout="constrained")
    figure.suptitle("dashed: growth that is linear from the smallest size on")
    axes = figure.subplots(2, len(quantities), squeeze=False)
    for column, quantity in enumerate(quantities):
        of_it = [series for series in measured if series.case.quantity == quantity]
        for number, series in enumerate(of_it):
            seconds = [time.low for time in series.times]
            megabytes = [size / 1e6 for size in series.memory]
            _curve(axes[0, column], series, seconds, series.time_exponent, f"C{number}")
            _curve(axes[1, column], series, megabytes, series.memory_exponent, f"C{number}")
        sizes = sorted({size for series in of_it for size in series.case.sizes})
        for panel, title in zip(axes[:, column], ("seconds", "MB"), strict=True):
            _finish(panel, title, quantity, sizes)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()


def _curve(panel: Axes, series: Series, values: Sequence[float], power: float, color: str) -> None:
    """One curve, and the straight line that it should stay below."""
    sizes = np.array(series.case.sizes)
    panel.loglog(sizes, values, "o-", color=color, label=f"{series.case.name}: n^{power:.2f}")
    panel.loglog(sizes, values[0] * sizes / sizes[0], "--", color=color, alpha=0.4)


def _finish(panel: Axes, title: str, quantity: str, sizes: Sequence[int]) -> None:
    """Titles, legend, and plain numbers at few places of both logarithmic axes."""
    panel.set_title(f"{title} by {quantity}")
    panel.set_xlabel(quantity)
    panel.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30, fontsize=8)
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_minor_locator(NullLocator())
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
