"""The list of variants: which experiment of the paper each is, and how to run it."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table

from alignps_jax.evaluation.metrics import DETECTION_METRICS, SEARCH_METRICS
from configs.variants import PaperRow, Variant, figures_on, rows_of, variants_for

TABLES = {
    "fig4": "Figure 4: alignment strategies (scale SA, region RA, task TA)",
    "1": "Table 1: levels of the pyramid",
    "2": "Table 2: region alignment",
    "3": "Table 3: where embeddings come from",
    "4": "Table 4: loss",
    "5": "Table 5: deformable convolutions in the backbone",
    "6": "Table 6: AlignPS and AlignPS+",
}
# The metrics that the paper's tables have, by name, and as people write them.
PAPER_METRICS = DETECTION_METRICS | {name: SEARCH_METRICS[name] for name in ("mAP", "top1")}
# Commands are there to be copied: none is broken, whatever stdout is.
_WIDTH = 200


def print_catalogue(path: str, dataset: str) -> None:
    """Prints every variant of the configuration file `path`, table by table of the paper.

    Args:
      path: as it is typed, e.g. configs/cuhk.py.
      dataset: its `config.data.name`.
    """
    console = Console(width=_WIDTH, highlight=False)
    for table in catalogue(path, dataset):
        console.print(table)
    console.print(
        f"To run one: python launch.py --config={path}:NAME (see README for data and --workdir).\n"
        f"Metrics are the paper's on {figures_on(dataset)}, in percent; † inferred from its prose. "
        "Those of Figure 4 are in a picture only."
    )


def catalogue(path: str, dataset: str) -> Iterator[Table]:
    """What `print_catalogue` prints: the paper's tables, then the variants without metrics."""
    variants = variants_for(dataset)
    # As wide as the longest, so that the columns of all tables stand below each other.
    width = max(len(command(path, name)) for name in variants)
    listed = set()
    for number, title in TABLES.items():
        table = _table(title, width)
        for name, row in rows_of(number, dataset):
            listed.add(name)
            table.add_row(
                row.label,
                command(path, name),
                "\n".join(_lines(variants[name], row)),
                *(_percent(row, metric) for metric in PAPER_METRICS),
            )
        if table.rows:
            yield table
    rest = _table("Without metrics in the paper", width)
    for name, variant in variants.items():
        if name not in listed:
            rest.add_row("", command(path, name), "\n".join(_lines(variant, None)))
    yield rest


def _table(title: str, command_width: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
    table.add_column("row", width=25)
    table.add_column("to type", width=command_width)
    table.add_column("what it is, and what it changes", width=85)
    for name in PAPER_METRICS.values():
        table.add_column(name, justify="right", width=6)
    return table


def command(path: str, name: str) -> str:
    """The flag that chooses a variant."""
    return f"--config={path}" + (f":{name}" if name else "")


def _lines(variant: Variant, row: PaperRow | None) -> Iterator[str]:
    note = f" ({row.note})" if row and row.note else ""
    yield variant.description + note
    fields = [f"{field}={_value(value)}" for field, value in variant.changes.items()]
    if fields:
        yield f"[dim]{', '.join(fields)}[/dim]"


def _value(value: object) -> str:
    return repr(value) if isinstance(value, str) else str(value).replace(" ", "")


def _percent(row: PaperRow, metric: str) -> str:
    value = getattr(row, metric)
    return "" if value is None else f"{value:.1f}{'†' if row.inferred else ''}"
