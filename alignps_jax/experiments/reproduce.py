"""Trains the rows of one of the paper's tables and lays our metrics beside the paper's."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from alignps_jax.checkpoint.places import holds_checkpoint
from alignps_jax.checkpoint.store import load_run_config, package_versions
from alignps_jax.config import FIELDS, FREE, flat_fields
from alignps_jax.distributed import broadcast_from_main
from alignps_jax.experiments.catalogue import PAPER_METRICS, TABLES
from alignps_jax.files import check_outputs, read_json, write_atomically, write_json
from alignps_jax.types import UserError
from alignps_jax.weights.sources import CAFFE, RANDOM
from configs.variants import PaperRow, apply_variant, rows_of

METRICS = "metrics.json"
Train = Callable[[ConfigDict, Path], None]


@dataclasses.dataclass(frozen=True)
class Result:
    """A row of the paper, and the metrics of its finished runs, in percent, one for each seed."""

    variant: str
    paper: PaperRow
    protocol: str  # of mAP and top-1
    measured: dict[str, list[float]]

    def text(self, metric: str) -> str:
        """The mean, with the sample standard deviation where there is one."""
        values = self.measured[metric]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.1f}{spread}"


def reproduce_table(
    config: ConfigDict, name: str, table: str, seeds: int, workdir: Path, train: Train
) -> None:
    """Trains every row of `table` of the paper with seeds `config.seed`, `config.seed + 1`, ...

    Runs lie in `<workdir>/<variant>/seed<number>`: tables share those that they have in common, a
    finished run is not run again, and an interrupted one is resumed. `table<table>.md` and `.json`
    are written after each, under the `name` of the configuration.

    Raises:
      UserError: there is no such table, a run in `workdir` had other settings, or nothing can be
        written there.
    """
    rows = rows_of(table, config.data.name)
    if not rows:
        raise UserError(f"--table: found {table!r}, which has no rows for {config.data.name}")
    numbers = range(config.seed, config.seed + seeds)
    # All rows once before any of them twice: a table that is cut short is complete sooner.
    runs = []
    for seed, (variant, row) in itertools.product(numbers, rows):
        own = apply_variant(config.copy_and_resolve_references(), variant)
        own.seed, folder = seed, run_folder(workdir, variant, seed)
        check_settings(own, folder)  # of all runs before the first one
        runs.append((own, folder, f"{row.label}, seed {seed}"))
    leads = jax.process_index() == 0  # the devices answer once all processes ask
    if leads:
        check_outputs(*(workdir / f"table{table}.{suffix}" for suffix in ("md", "json")))
    for done, (own, folder, title) in enumerate(runs, start=1):
        if leads:
            print(f"table {table}, run {done} of {len(runs)}: {title}")
        if not broadcast_from_main((folder / METRICS).exists()):
            train(own, folder)
            jax.clear_caches()  # the next row is another network
        if leads:
            text = write_table(config, name, table, numbers, workdir)
    if leads:
        print(f"{text}\ntable       {workdir / f'table{table}.md'}")


def run_folder(workdir: Path, variant: str, seed: int) -> Path:
    """The folder of one run; the default variant is AlignPS itself."""
    return workdir / (variant or "alignps") / f"seed{seed}"


def check_settings(config: ConfigDict, folder: Path) -> None:
    """Raises UserError if `folder` holds metrics or a checkpoint of settings that decide others."""
    if not ((folder / METRICS).exists() or holds_checkpoint(folder)):
        return
    asked, found = flat_fields(config), flat_fields(load_run_config(folder) or ConfigDict())
    follow = CAFFE if config.model.pretrained != RANDOM else ()  # from the weights
    changed = [
        f"config.{name} = {found.get(name)!r}, expected {asked[name]!r}"
        for name, (kind, _) in FIELDS.items()
        if kind != FREE and name.removeprefix("model.") not in follow
        if asked[name] != found.get(name)
    ]
    if changed:
        raise UserError(f"{folder}: was run with {'; '.join(changed)}; choose another --workdir")


def write_table(
    config: ConfigDict, name: str, table: str, seeds: Sequence[int], workdir: Path
) -> str:
    """Writes both files from the runs that are finished, and returns the text of the table."""
    results = []
    for variant, row in rows_of(table, config.data.name):
        files = [run_folder(workdir, variant, seed) / METRICS for seed in seeds]
        if done := [file for file in files if file.exists()]:
            results.append(read_result(done, variant, row))
    text = markdown(config, name, table, results)
    write_atomically(workdir / f"table{table}.md", text.encode())
    content = {
        "table": table,
        "config_name": name,
        "seeds": list(seeds),
        "versions": package_versions(),
        "rows": list(map(dataclasses.asdict, results)),
        "config": config.to_dict(),
    }
    write_json(workdir / f"table{table}.json", content)
    return text


def read_result(files: Sequence[Path], variant: str, row: PaperRow) -> Result:
    """The metrics of a row, by its runs; the first protocol of the first run counts in all."""
    runs = [read_json(file, "the metrics of a run") for file in files]
    protocol = next(iter(runs[0]["search"]))
    found = [run["detection"] | run["search"][protocol] for run in runs]
    measured = {name: [100 * metrics[name] for metrics in found] for name in PAPER_METRICS}
    return Result(variant, row, protocol, measured)


def markdown(config: ConfigDict, name: str, table: str, results: Sequence[Result]) -> str:
    """The table: our metrics beside the paper's."""
    names = PAPER_METRICS.values()
    titles = ["row", "variant", *names, *(f"paper: {name}" for name in names)]
    lines = [titles, ["---"] * len(titles)]
    for result in results:
        mark = " †" if result.paper.inferred else ""
        papers = (getattr(result.paper, metric) for metric in PAPER_METRICS)
        cells = [result.paper.label, f"`{result.variant or 'default'}`"]
        cells += map(result.text, PAPER_METRICS)
        lines.append([*cells, *("" if value is None else f"{value:g}{mark}" for value in papers)])
    counts = sorted({len(result.measured["mAP"]) for result in results})
    note = (
        f"In percent, mean ± sample standard deviation of {' or '.join(map(str, counts))} run(s); "
        f"{config.train.duration} of {config.train.batch_size} images on {config.data.name}, "
        f"search with {results[0].protocol}."
    )
    if any(result.paper.inferred for result in results):
        note += " † inferred from the paper's prose."
    grid = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"## {TABLES[table]} (`{name}`)\n\n{grid}\n\n{note}\n"
