"""The tables of `--mode=reproduce`: which rows run, which settings fit, and in two processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import pytest

from alignps_jax.experiments.reproduce import reproduce_table
from alignps_jax.types import UserError
from configs import tiny
from configs.variants import rows_of
from tests.runs import finish, run_one, start_pair


def train(config, folder):
    """Leaves behind what a run does: process 0 writes, after the others are through."""
    log = folder.parents[1] / f"process_{jax.process_index()}"
    with log.open("a") as file:
        file.write(f"{folder.parent.name} {config.seed}\n")
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(config.to_json())
        share = (len(runs_in(log)) + 10 * config.seed) / 100
        found = {"TestG50": {"mAP": share, "top1": share}, "all": {"mAP": 1, "top1": 1}}
        metrics = {"detection": {"recall": share, "AP": share}, "search": found}
        (folder / "metrics.json").write_text(json.dumps(metrics))


def runs_in(log: Path) -> list[list[str]]:
    """The variant and seed of each run."""
    return [line.split() for line in log.read_text().splitlines()]


@pytest.fixture
def run(tmp_path):
    """Reproduces a table, and returns all runs until now."""

    def reproduce(table, seeds=1, config=None):
        reproduce_table(config or tiny.get_config(), "tiny", table, seeds, tmp_path, train)
        return runs_in(tmp_path / "process_0")

    return reproduce


def test_every_row_runs_once_per_seed_and_an_unfinished_one_again(run, tmp_path):
    found = run("2", seeds=2)
    assert len(set(map(tuple, found))) == 2 * len(rows_of("2", "synthetic")) == 16
    assert [seed for _, seed in found] == ["0"] * 8 + ["1"] * 8
    assert len(run("2", seeds=2)) == 16
    assert len(run("4")) == 18  # tables share rows
    (tmp_path / found[1][0] / "seed0" / "metrics.json").unlink()
    assert run("2", seeds=2)[18:] == [found[1]]
    config = tiny.get_config()
    config.seed = 5
    assert {seed for _, seed in run("4", 2, config)[19:]} == {"5", "6"}
    with pytest.raises(UserError, match="--table: found '8'"):
        run("8")


def test_figures_are_those_of_the_runs(run, tmp_path):
    run("4", seeds=2)
    table = json.loads((tmp_path / "table4.json").read_text())
    # Runs 1 to 3 with seed 0 got 1, 2, 3 percent, runs 4 to 6 with seed 1 got 14, 15, 16.
    found = [row["measured"]["mAP"] for row in table["rows"]]
    assert found == [pytest.approx([1 + k, 14 + k]) for k in range(3)]
    assert table["seeds"] == [0, 1]
    assert table["config"]["train"]["duration"] == tiny.get_config().train.duration
    text = (tmp_path / "table4.md").read_text()
    # The mean and the sample standard deviation of 1 and 14.
    cells = "| `oim` |" + 4 * " 7.5 ± 9.2 |" + "  |  | 92.4 | 92.9 |"
    for part in (cells, "search with TestG50", "deviation of 2 run"):
        assert part in text


def test_settings_that_decide_results_must_be_the_same(run, tmp_path):
    names = {name for name, _ in run("4")}
    other = tiny.get_config()
    other.train.batch_size = 8
    with pytest.raises(UserError, match=r"config.train.batch_size = 4, expected 8"):
        run("4", config=other)
    moved = tiny.get_config()
    moved.data.root, moved.data.workers, moved.train.log_every_steps = "elsewhere", 3, 7
    assert len(run("4", config=moved)) == 3
    # Runs that ended before they saved anything have no results to mix.
    for name in names:
        (tmp_path / name / "seed0" / "metrics.json").unlink()
    assert len(run("4", config=other)) == 6
    for file in ("metrics.json", "config.json"):
        (tmp_path / names.pop() / "seed0" / file).write_text('{"detection"')
        with pytest.raises(UserError, match=file):
            run("4", config=other)


def child(index: int, workdir: str) -> int:
    reproduce_table(tiny.get_config(), "tiny", "4", 1, Path(workdir), train)
    return 0


def test_two_processes_train_and_one_writes_and_a_lost_row_runs_again(tmp_path):
    first, second = finish(start_pair(__name__, str(tmp_path)))
    variants = [variant or "alignps" for variant, _ in rows_of("4", "synthetic")]
    assert second == ""
    assert (tmp_path / "table4.md").read_text() in first
    shutil.rmtree(tmp_path / variants[1])
    finish(start_pair(__name__, str(tmp_path)))
    for index in range(2):
        trained = [name for name, _ in runs_in(tmp_path / f"process_{index}")]
        assert trained == [*variants, variants[1]]


if __name__ == "__main__":
    run_one(child)
