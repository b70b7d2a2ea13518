"""`--mode=reproduce` in two processes of one run: all train every row, one writes and says it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax

from alignps_jax.experiments.reproduce import reproduce_table
from configs import tiny
from configs.variants import rows_of
from tests.runs import finish, run_one, start_pair


def train(config, folder):
    """Leaves behind what a run does: process 0 writes, after the others are through."""
    with (folder.parents[1] / f"process_{jax.process_index()}").open("a") as log:
        log.write(f"{folder.parent.name}\n")
    if jax.process_index() == 0:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(config.to_json())
        values = {"recall": 0.5, "AP": 0.25, "mAP": 0.125, "top1": 1.0}
        metrics = {"detection": values, "search": {"TestG50": values}}
        (folder / "metrics.json").write_text(json.dumps(metrics))


def child(index: int, workdir: str) -> int:
    reproduce_table(tiny.get_config(), "tiny", "4", 1, Path(workdir), train)
    return 0


def test_all_train_and_one_writes_and_a_lost_row_runs_again(tmp_path):
    first, second = finish(start_pair(__name__, str(tmp_path)))
    variants = [variant or "alignps" for variant, _ in rows_of("4", "synthetic")]
    assert second == ""
    assert (tmp_path / "table4.md").read_text() in first
    table = json.loads((tmp_path / "table4.json").read_text())
    assert [row["measured"]["mAP"] for row in table["rows"]] == [[12.5]] * len(variants)
    shutil.rmtree(tmp_path / variants[1])
    finish(start_pair(__name__, str(tmp_path)))
    for index in range(2):
        trained = (tmp_path / f"process_{index}").read_text().split()
        assert trained == [*variants, variants[1]]


if __name__ == "__main__":
    run_one(child)
