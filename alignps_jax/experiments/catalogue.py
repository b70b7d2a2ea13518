"""The list of variants: which experiment of the paper each is, and how to run it."""

from __future__ import annotations

import shutil
import textwrap

from alignps_jax.evaluation.metrics import DETECTION_METRICS, SEARCH_METRICS
from configs.variants import Variant, figures_on, rows_of, variants_for

TABLES = {
    "fig4": "Figure 4: alignment strategies (scale SA, region RA, task TA)",
    "1": "Table 1: levels of the pyramid",
    "2": "Table 2: region alignment",
    "3": "Table 3: where embeddings come from",
    "4": "Table 4: loss",
    "5": "Table 5: deformable convolutions in the backbone",
    "6": "Table 6: AlignPS and AlignPS+",
    "roi": "ROI-AlignPS (the authors' successor; its released weights)",
}
# The metrics that the paper's tables have, by name, and as people write them.
PAPER_METRICS = DETECTION_METRICS | {name: SEARCH_METRICS[name] for name in ("mAP", "top1")}


def print_catalogue(path: str, dataset: str) -> None:
    """Prints every variant of the configuration file `path`, table by table of the paper.

    Args:
      path: as it is typed, e.g. configs/cuhk.py.
      dataset: its `config.data.name`.
    """
    rest = dict(variants_for(dataset))
    for number, title in TABLES.items():
        if rows := rows_of(number, dataset):
            print(f"\n{title}")
        for name, row in rows:
            mark = "†" if row.inferred else ""
            values = {title: getattr(row, metric) for metric, title in PAPER_METRICS.items()}
            found = [f"{title} {x:.1f}{mark}" for title, x in values.items() if x is not None]
            print(f"  {name or '(none)':<18}{', '.join(found)}".rstrip())
            _print_variant(variants_for(dataset)[name], f"{row.label}: ", row.note)
            rest.pop(name, None)
    print("\nWithout metrics in the paper")
    for name, variant in rest.items():
        print(f"  {name}")
        _print_variant(variant)
    print(f"\nTo run one: python launch.py --config={path}:VARIANT")
    print(
        f"Metrics are the paper's on {figures_on(dataset)}, in percent; † inferred from its prose"
    )


def _print_variant(variant: Variant, label: str = "", note: str = "") -> None:
    """The description of a variant, and the fields that it changes, as wide as the terminal."""
    fields = ", ".join(f"{field}={value!r}" for field, value in variant.changes.items())
    width, indent = shutil.get_terminal_size().columns, " " * 6
    for text in filter(None, (label + variant.description + (note and f" ({note})"), fields)):
        print(textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent))
