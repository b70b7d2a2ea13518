"""The tables of `--mode=reproduce`: which rows run, which settings fit, the order of the paper."""

import json

import pytest

from alignps_jax.experiments.catalogue import PAPER_METRICS
from alignps_jax.experiments.reproduce import Result, order_text, reproduce_table
from alignps_jax.types import UserError
from configs import tiny
from configs.variants import rows_of


@pytest.fixture
def run(tmp_path):
    """Reproduces a table, with a stand-in for training that leaves behind what a run does."""
    runs = []

    def train(config, folder):
        runs.append((folder.parent.name, config.seed))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(config.to_json())
        share = (len(runs) + 10 * config.seed) / 100
        found = {"TestG50": {"mAP": share, "top1": share}, "all": {"mAP": 1, "top1": 1}}
        metrics = {"detection": {"recall": share, "AP": share}, "search": found}
        (folder / "metrics.json").write_text(json.dumps(metrics))

    def reproduce(table, seeds=1, config=None):
        config = config or tiny.get_config()
        reproduce_table(config, "tiny", table, seeds, tmp_path, train)
        return runs

    return reproduce


def test_every_row_runs_once_per_seed_and_an_unfinished_one_again(run, tmp_path):
    found = list(run("2", seeds=2))
    assert len(found) == len(set(found)) == 2 * len(rows_of("2", "synthetic")) == 16
    assert [seed for _, seed in found] == [0] * 8 + [1] * 8
    assert len(run("2", seeds=2)) == 16
    assert len(run("4")) == 18  # tables share rows
    (tmp_path / found[1][0] / "seed0" / "metrics.json").unlink()
    assert run("2", seeds=2)[18:] == [found[1]]
    config = tiny.get_config()
    config.seed = 5
    assert {seed for _, seed in run("4", 2, config)[19:]} == {5, 6}


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
    for part in ("7.5 ± 9.2", "92.4", "search with TestG50", "deviation of 2 runs"):
        assert part in text


def test_settings_that_decide_results_must_be_the_same(run, tmp_path):
    names = [name for name, _ in run("4")]
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


@pytest.mark.parametrize("name", ["metrics.json", "config.json"])
def test_a_damaged_file_of_a_run_is_named(name, run, tmp_path):
    file = tmp_path / run("4")[1][0] / "seed0" / name
    file.write_text('{"detection"')
    with pytest.raises(UserError, match=name):
        run("4")


def test_a_table_that_the_data_set_has_not(run):
    with pytest.raises(UserError, match="--table: found '8'"):
        run("8")


def test_order_counts_pairs_and_names_clear_reversals():
    papers = {row.label: row for _, row in rows_of("4", "synthetic")}
    oim, without, toim = papers.values()  # 92.4, 92.8, 93.1

    def row(paper, *values):
        return Result("", paper, "all", {metric: [*values] for metric in PAPER_METRICS})

    same = order_text("mAP", [row(oim, 10, 12), row(without, 30, 30), row(toim, 31, 37)])
    assert "3 of 3 pairs of rows, 2 of them by more" in same
    assert "other way" not in same
    other = order_text("mAP", [row(oim, 40, 40), row(without, 30, 30), row(toim, 50, 50)])
    assert "2 of 3" in other
    assert f"as clearly the other way: {without.label} over {oim.label}" in other
    assert "1 of 1 pairs of rows (single runs" in order_text("mAP", [row(oim, 1), row(toim, 2)])
    assert order_text("recall", [row(oim, 1), row(toim, 2)]) == ""  # the paper gives none
    assert row(oim, 12.34).text("mAP") == "12.3"
