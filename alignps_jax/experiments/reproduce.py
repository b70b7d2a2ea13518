"""Trains the rows of one of the paper's tables and lays our metrics beside the paper's."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import traverse_util
from ml_collections import ConfigDict

from alignps_jax.checkpoint.store import package_versions
from alignps_jax.config import FIELD_KINDS, FREE
from alignps_jax.distributed import broadcast_from_main
from alignps_jax.evaluation.results import fraction
from alignps_jax.experiments.catalogue import PAPER_METRICS
from alignps_jax.files import check_outputs, read_json, write_atomically, write_json
from alignps_jax.training.train import train_and_evaluate
from alignps_jax.types import UserError
from alignps_jax.weights.conventions import CAFFE
from alignps_jax.weights.sources import RANDOM
from configs.variants import PaperRow, apply_variant, rows_of, variants_for


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One metric over several seeds, in percent; `spread` is the sample standard deviation."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float:
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def __str__(self) -> str:
        return (
            f"{self.mean:.1f} ± {self.spread:.1f}" if len(self.values) > 1 else f"{self.mean:.1f}"
        )


@dataclasses.dataclass(frozen=True)
class ReproducedRow:
    """A row of the paper, the variant that it is, and what was measured, by metric.

    `protocol` is the search protocol of mAP and top-1.
    """

    variant: str
    paper: PaperRow
    protocol: str
    measured: dict[str, Measurement]


Train = Callable[[ConfigDict, Path], None]


def reproduce_table(
    config: ConfigDict,
    name: str,
    table: str,
    seeds: int,
    workdir: Path,
    train: Train = train_and_evaluate,
) -> None:
    """Runs every row of `table` with seeds `config.seed`, `config.seed + 1`, ...

    Runs lie in `<workdir>/<variant>/seed<number>`: tables share those that they have in common, a
    finished run is not run again, and an interrupted one is resumed. `table<table>.md` and `.json`
    are written after each.

    Args:
      config: the settings that all rows share.
      name: of the configuration, for the titles.
      table: number of the paper's table, or fig4.
      seeds: how many runs each row takes.
      workdir: where all of it goes.
      train: what runs a row.

    Raises:
      UserError: there is no such table, a run in `workdir` had other settings, or nothing can be
        written there.
    """
    rows = rows_of(table, config.data.name)
    if not rows:
        raise UserError(f"--table: found {table!r}, which has no rows for {config.data.name}")
    if seeds < 1:
        raise UserError(f"--seeds: found {seeds}, expected at least 1")
    numbers = range(config.seed, config.seed + seeds)
    # All rows once before any of them twice: a table that is cut short is complete sooner.
    runs = list(itertools.product(numbers, rows))
    for seed, (variant, _) in runs:  # what the last run would end with ends the first one
        folder = run_folder(workdir, variant, seed)
        refuse_other_settings(variant_config(config, variant, seed), folder)
    if jax.process_index() == 0:
        check_outputs(*(workdir / f"table{table}.{suffix}" for suffix in ("md", "json")))
    text, leads = "", jax.process_index() == 0  # it writes and says everything
    for done, (seed, (variant, row)) in enumerate(runs):
        if leads:
            print(f"table {table}, run {done + 1} of {len(runs)}: {row.label}, seed {seed}")
        run_row(variant_config(config, variant, seed), run_folder(workdir, variant, seed), train)
        if leads:
            text = write_table(config, name, table, numbers, workdir)
    if leads:
        print(text)
        print(f"table       {workdir / f'table{table}.md'}")


def variant_config(config: ConfigDict, variant: str, seed: int) -> ConfigDict:
    """The settings of one run."""
    own = apply_variant(
        config.copy_and_resolve_references(), variant, variants_for(config.data.name)
    )
    own.seed = seed
    return own


def run_folder(workdir: Path, variant: str, seed: int) -> Path:
    """Where one run lies; the default variant is AlignPS itself."""
    return workdir / (variant or "alignps") / f"seed{seed}"


def run_row(config: ConfigDict, folder: Path, train: Train) -> None:
    """Trains and evaluates, unless that is done; resumes an interrupted run."""
    if not broadcast_from_main((folder / "metrics.json").exists()):
        train(config, folder)
        jax.clear_caches()  # the next row is another network: nothing of this one is used again


def refuse_other_settings(config: ConfigDict, folder: Path) -> None:
    """Raises UserError if there is a run in `folder`, and it is not one of `config`."""
    if not (folder / "config.json").exists():
        return
    asked = flatten(json.loads(config.to_json()))
    found = flatten(_read(folder / "config.json"))
    free = {name for name, kind in FIELD_KINDS.items() if kind == FREE}
    if config.model.pretrained != RANDOM:
        free |= {f"model.{name}" for name in CAFFE}  # they follow from the weights
    for field in sorted((asked.keys() | found.keys()) - free):
        if asked.get(field) != found.get(field):
            raise UserError(
                f"{folder}: was run with config.{field} = {found.get(field)!r}, expected "
                f"{asked.get(field)!r}; choose another --workdir, or remove that folder"
            )


def flatten(fields: dict[str, Any]) -> dict[str, object]:
    """Nested fields by their dotted names."""
    return traverse_util.flatten_dict(fields, sep=".")


def _read(file: Path) -> dict[str, Any]:
    """What a run left in a JSON file of its folder."""
    content = read_json(file, "what a run wrote")
    if not isinstance(content, dict):
        raise UserError(f"{file}: found {type(content).__name__}, expected what a run wrote")
    return content


def write_table(
    config: ConfigDict, name: str, table: str, seeds: Sequence[int], workdir: Path
) -> str:
    """Writes both files from the runs that are finished, and returns the text of the table."""
    found = (
        reproduced(workdir, variant, row, seeds)
        for variant, row in rows_of(table, config.data.name)
    )
    rows = [row for row in found if row is not None]
    text = markdown(config, name, table, rows)
    write_atomically(workdir / f"table{table}.md", text.encode())
    write_json(workdir / f"table{table}.json", contents(config, name, table, seeds, rows))
    return text


def reproduced(
    workdir: Path, variant: str, row: PaperRow, seeds: Sequence[int]
) -> ReproducedRow | None:
    """What the finished runs of a row reached, in percent; None if none is finished.

    Raises:
      UserError: a run's `metrics.json` holds something else.
    """
    files = [run_folder(workdir, variant, seed) / "metrics.json" for seed in seeds]
    runs = {file: _read(file) for file in files if file.exists()}
    if not runs:
        return None
    protocol, metrics = None, []
    for file, run in runs.items():
        try:
            # The first one counts.
            protocol = protocol or next(iter(run["search"]))
            found = run["detection"] | run["search"][protocol]
            metrics.append({name: 100 * fraction(found[name]) for name in PAPER_METRICS})
        except (LookupError, TypeError, ValueError, AttributeError, StopIteration) as error:
            kind = type(error).__name__
            raise UserError(f"{file}: not a metrics.json of a run ({kind})") from error
    measured = {
        name: Measurement(tuple(values[name] for values in metrics)) for name in PAPER_METRICS
    }
    return ReproducedRow(variant, row, str(protocol), measured)


def markdown(config: ConfigDict, name: str, table: str, rows: Sequence[ReproducedRow]) -> str:
    """The table, and where the paper's order shows in it."""
    lines = [
        f"## {title(table)}, `{name}`",
        "",
        "| row | variant | recall | AP | mAP | top-1 | paper: recall | AP | mAP | top-1 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours = [str(row.measured[metric]) for metric in PAPER_METRICS]
        cells = [row.paper.label, f"`{row.variant or 'default'}`", *ours, *paper_cells(row.paper)]
        lines.append(f"| {' | '.join(cells)} |")
    counts = {len(row.measured["mAP"].values) for row in rows}
    runs = " or ".join(map(str, sorted(counts)))
    spread = "mean ± sample standard deviation of" if max(counts) > 1 else "of"
    notes: list[str | None] = [
        "",
        f"In percent, {spread} {runs} run{'' if runs == '1' else 's'}; "
        f"{config.train.duration} of {config.train.batch_size} images on {config.data.name}, "
        f"search with {rows[0].protocol}."
        + (" † inferred from the paper's prose." if any(r.paper.inferred for r in rows) else ""),
        *(order_text(metric, rows) for metric in PAPER_METRICS),
    ]
    return "\n".join([*lines, *(note for note in notes if note is not None)]) + "\n"


def title(table: str) -> str:
    """Table 2, or Figure 4."""
    return f"Figure {table[3:]}" if table.startswith("fig") else f"Table {table}"


def paper_cells(row: PaperRow) -> list[str]:
    mark = " †" if row.inferred else ""
    values = (getattr(row, metric) for metric in PAPER_METRICS)
    return ["" if value is None else f"{value:g}{mark}" for value in values]


def order_text(metric: str, rows: Sequence[ReproducedRow]) -> str | None:
    """How many pairs of rows come in the paper's order; None if the paper has no two values."""
    known = [row for row in rows if getattr(row.paper, metric) is not None]
    pairs = [
        (better, worse)
        for better, worse in itertools.permutations(known, 2)
        if getattr(better.paper, metric) > getattr(worse.paper, metric)
    ]
    if not pairs:
        return None
    gaps = [
        (
            better.measured[metric].mean - worse.measured[metric].mean,
            better.measured[metric].spread + worse.measured[metric].spread,
            f"{better.paper.label} over {worse.paper.label}",
        )
        for better, worse in pairs
    ]
    agree = sum(gap > 0 for gap, _, _ in gaps)
    text = f"\nPaper's order by {metric}: {agree} of {len(pairs)} pairs of rows"
    if any(len(row.measured[metric].values) < 2 for row in known):
        return text + " (single runs: chance may decide)."
    clear = sum(gap > spread for gap, spread, _ in gaps)
    against = [what for gap, spread, what in gaps if gap < -spread]
    text += f", {clear} of them by more than the sum of their deviations"
    return text + (f"; as clearly the other way: {', '.join(against)}." if against else ".")


def contents(
    config: ConfigDict,
    name: str,
    table: str,
    seeds: Sequence[int],
    rows: Sequence[ReproducedRow],
) -> dict[str, object]:
    """The table with everything that it was made with, as JSON."""
    return {
        "table": table,
        "config_name": name,
        "seeds": list(seeds),
        "protocol": rows[0].protocol,
        "device": jax.devices()[0].device_kind,
        "versions": package_versions(),
        "rows": [
            {
                "label": row.paper.label,
                "variant": row.variant,
                "measured": {metric: list(m.values) for metric, m in row.measured.items()},
                "paper": {metric: getattr(row.paper, metric) for metric in PAPER_METRICS},
                "inferred": row.paper.inferred,
            }
            for row in rows
        ],
        "config": config.to_dict(),
    }
