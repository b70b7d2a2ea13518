"""The tables of `--mode=reproduce`: what runs, what is kept, and what is said about order."""

import json

import pytest

from alignps_jax.experiments.catalogue import PAPER_METRICS
from alignps_jax.experiments.reproduce import (
    Measurement,
    ReproducedRow,
    order_text,
    reproduce_table,
)
from alignps_jax.types import UserError
from configs import tiny
from configs.variants import rows_of


class Runs(list):
    """What was run, and training replaced by what a run leaves behind."""

    def train(self, config, folder):
        self.append((folder.parent.name, config.seed))
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(config.to_json())
        share = (len(self) + 10 * config.seed) / 100
        metrics = {
            "detection": {"recall": share, "AP": share},
            "search": {"TestG50": {"mAP": share, "top1": share}, "all": {"mAP": 1, "top1": 1}},
        }
        (folder / "metrics.json").write_text(json.dumps(metrics))


@pytest.fixture
def runs():
    return Runs()


def test_every_row_runs_once_per_seed_and_never_again(runs, tmp_path):
    rows = rows_of("2", "synthetic")
    reproduce_table(tiny.get_config(), "tiny", "2", 2, tmp_path, runs.train)
    assert len(runs) == 2 * len(rows) == 16
    assert len(set(runs)) == 16
    assert [seed for _, seed in runs] == [0] * 8 + [1] * 8
    reproduce_table(tiny.get_config(), "tiny", "2", 2, tmp_path, runs.train)
    assert len(runs) == 16
    reproduce_table(tiny.get_config(), "tiny", "4", 1, tmp_path, runs.train)
    assert len(runs) == 18


def test_an_interrupted_run_goes_on(runs, tmp_path):
    reproduce_table(tiny.get_config(), "tiny", "4", 1, tmp_path, runs.train)
    unfinished = tmp_path / runs[1][0] / "seed0" / "metrics.json"
    unfinished.unlink()
    with pytest.raises(FileExistsError):  # the stand-in refuses an existing folder
        reproduce_table(tiny.get_config(), "tiny", "4", 1, tmp_path, runs.train)
    assert runs[-1] == runs[1]


def test_figures_are_the_runs_figures(runs, tmp_path):
    reproduce_table(tiny.get_config(), "tiny", "4", 2, tmp_path, runs.train)
    table = json.loads((tmp_path / "table4.json").read_text())
    # Runs 1 to 3 with seed 0 got 1, 2, 3 percent, runs 4 to 6 with seed 1 got 14, 15, 16.
    found = [row["measured"]["mAP"] for row in table["rows"]]
    assert found == [pytest.approx([1 + k, 14 + k]) for k in range(3)]
    assert table["seeds"] == [0, 1]
    assert table["config"]["train"]["duration"] == tiny.get_config().train.duration
    text = (tmp_path / "table4.md").read_text()
    assert "7.5 ± 9.2" in text  # mean and sample standard deviation of 1 and 14
    assert "92.4" in text
    assert "search with TestG50" in text
    assert "deviation of 2 runs" in text


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[" * 9999,
        "7",
        "{}",
        '{"detection": {}, "search": {}}',
        '{"detection": 3, "search": {"a": {}}}',
    ],
)
def test_a_damaged_file_of_a_run_is_one_line(runs, tmp_path, content):
    reproduce_table(tiny.get_config(), "tiny", "4", 1, tmp_path, runs.train)
    file = tmp_path / runs[1][0] / "seed0" / "metrics.json"
    file.write_text(content)
    with pytest.raises(UserError, match=r"metrics\.json: "):
        reproduce_table(tiny.get_config(), "tiny", "4", 1, tmp_path, runs.train)
    file.with_name("config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json: |was run with config"):
        reproduce_table(tiny.get_config(), "tiny", "4", 1, tmp_path, runs.train)


def test_a_run_with_other_settings_is_not_taken_for_this_one(runs, tmp_path):
    reproduce_table(tiny.get_config(), "tiny", "4", 1, tmp_path, runs.train)
    other = tiny.get_config()
    other.train.batch_size = 8
    with pytest.raises(UserError, match=r"config.train.batch_size = 4, expected 8"):
        reproduce_table(other, "tiny", "4", 1, tmp_path, runs.train)
    moved = tiny.get_config()
    moved.data.root, moved.data.workers, moved.train.log_every_steps = "elsewhere", 3, 7
    reproduce_table(moved, "tiny", "4", 1, tmp_path, runs.train)
    assert len(runs) == 3


def test_seeds_are_those_of_the_configuration_onwards(runs, tmp_path):
    config = tiny.get_config()
    config.seed = 5
    reproduce_table(config, "tiny", "4", 2, tmp_path, runs.train)
    assert sorted({seed for _, seed in runs}) == [5, 6]


@pytest.mark.parametrize(
    ("table", "seeds", "message"), [("8", 2, "--table: found '8'"), ("4", 0, "--seeds: found 0")]
)
def test_wrong_input(table, seeds, message, runs, tmp_path):
    with pytest.raises(UserError, match=message):
        reproduce_table(tiny.get_config(), "tiny", table, seeds, tmp_path, runs.train)
    assert runs == []


def test_order_counts_pairs_and_names_clear_reversals():
    papers = {row.label: row for _, row in rows_of("4", "synthetic")}
    oim, without, toim = papers.values()  # 92.4, 92.8, 93.1

    def row(paper, *values):
        measured = dict.fromkeys(PAPER_METRICS, Measurement(values))
        return ReproducedRow("", paper, "all", measured)

    same = order_text("mAP", [row(oim, 10, 12), row(without, 30, 30), row(toim, 31, 37)])
    assert "3 of 3 pairs of rows, 2 of them by more" in same
    assert "other way" not in same
    other = order_text("mAP", [row(oim, 40, 40), row(without, 30, 30), row(toim, 50, 50)])
    assert "2 of 3" in other
    assert f"as clearly the other way: {without.label} over {oim.label}" in other
    assert "1 of 1 pairs of rows (single runs" in order_text("mAP", [row(oim, 1), row(toim, 2)])
    assert order_text("recall", [row(oim, 1), row(toim, 2)]) is None  # the paper gives none


def test_one_run_has_no_spread():
    assert str(Measurement((12.34,))) == "12.3"
    assert Measurement((12.34,)).spread == 0
