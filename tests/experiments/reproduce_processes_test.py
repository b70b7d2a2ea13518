"""`--mode=reproduce` in two processes of one run: all train every row, one writes and says it."""

from __future__ import annotations

import json
from pathlib import Path

import jax

from alignps_jax.experiments.reproduce import reproduce_table
from configs import tiny
from configs.variants import rows_of
from tests.pairs import outputs_of, run_one, start_pair


def train(config, folder):
    """Leaves behind what a run does: process 0 writes, after the others are through."""
    with (folder.parents[1] / f"process_{jax.process_index()}").open("a") as log:
        log.write(f"{folder.parent.name} {config.seed}\n")
    if jax.process_index() == 0:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(config.to_json())
        values = {"recall": 0.5, "AP": 0.25, "mAP": 0.125, "top1": 1.0}
        metrics = {"detection": values, "search": {"TestG50": values}}
        (folder / "metrics.json").write_text(json.dumps(metrics))


def child(index: int, workdir: str) -> int:
    reproduce_table(tiny.get_config(), "tiny", "4", 1, Path(workdir), train)
    return 0


def test_all_train_and_one_writes_and_a_finished_row_runs_in_none(tmp_path):
    first, second = outputs_of(start_pair(__name__, str(tmp_path)))
    variants = [variant or "alignps" for variant, _ in rows_of("4", "synthetic")]
    for index in range(2):
        trained = (tmp_path / f"process_{index}").read_text().splitlines()
        assert trained == [f"{variant} 0" for variant in variants]
    assert second == ""
    assert first.count("table 4, run") == len(variants)
    table = json.loads((tmp_path / "table4.json").read_text())
    assert [row["measured"]["mAP"] for row in table["rows"]] == [[12.5]] * len(variants)
    assert (tmp_path / "table4.md").read_text() in first

    # One row is lost: both see so, and run it again.
    (tmp_path / variants[1] / "seed0" / "metrics.json").unlink()
    (tmp_path / variants[1] / "seed0" / "config.json").unlink()
    (tmp_path / variants[1] / "seed0").rmdir()
    outputs_of(start_pair(__name__, str(tmp_path)))
    for index in range(2):
        trained = (tmp_path / f"process_{index}").read_text().splitlines()
        assert trained[len(variants) :] == [f"{variants[1]} 0"]


if __name__ == "__main__":
    run_one(child)
