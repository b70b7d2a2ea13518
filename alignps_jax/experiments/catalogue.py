"""The list of variants: which experiment of the paper each is, and how to run it."""

from __future__ import annotations

import shutil
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


def print_catalogue(path: str, dataset: str) -> None:
    """Prints every variant of the configuration file `path`, table by table of the paper.

    The tables are as wide as the terminal, and 80 columns in a pipe.

    Args:
      path: as it is typed, e.g. configs/cuhk.py.
      dataset: its `config.data.name`.
    """
    console = Console(width=shutil.get_terminal_size().columns, highlight=False)
    for table in catalogue(dataset):
        console.print(table)
    console.print(
        f"To run one: python launch.py --config={path}:VARIANT "
        "(README.md has data and --workdir).\n"
        f"Metrics are the paper's on {figures_on(dataset)}, in percent; † inferred from its prose. "
        "Those of Figure 4 are in a picture only."
    )


def catalogue(dataset: str) -> Iterator[Table]:
    """What `print_catalogue` prints: the paper's tables, then the variants without metrics."""
    variants = variants_for(dataset)
    # As wide as the longest, so that the columns of all tables stand below each other.
    width = max(map(len, variants))
    listed = set()
    for number, title in TABLES.items():
        table = _table(title, width)
        for name, row in rows_of(number, dataset):
            listed.add(name)
            metrics = [_percent(row, metric) for metric in PAPER_METRICS]
            table.add_row(name or "(none)", _text(variants[name], row), *metrics)
        if table.rows:
            yield table
    rest = _table("Without metrics in the paper", width)
    for name, variant in variants.items():
        if name not in listed:
            rest.add_row(name, _text(variant, None))
    yield rest


def _table(title: str, width: int) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        title=title,
        title_justify="left",
        title_style="bold",
        padding=(0, 1, 0, 0),
        pad_edge=False,
        expand=True,
    )
    table.add_column("variant", width=width, no_wrap=True)
    table.add_column("row of the paper: what it is, and what it changes", ratio=1, overflow="fold")
    for name in PAPER_METRICS.values():
        table.add_column(name, justify="right", width=max(5, len(name)))
    return table


def _text(variant: Variant, row: PaperRow | None) -> str:
    label = f"{row.label}: " if row else ""
    note = f" ({row.note})" if row and row.note else ""
    fields = ", ".join(f"{field}={_value(value)}" for field, value in variant.changes.items())
    return f"{label}{variant.description}{note}" + (f"\n[dim]{fields}[/dim]" if fields else "")


def _value(value: object) -> str:
    return repr(value) if isinstance(value, str) else str(value).replace(" ", "")


def _percent(row: PaperRow, metric: str) -> str:
    value = getattr(row, metric)
    return "" if value is None else f"{value:.1f}{'†' if row.inferred else ''}"
