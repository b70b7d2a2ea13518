"""The course of a run, judged by the lines of its picture."""

import numpy as np
import pytest

from alignps_jax.media import read_photo
from alignps_jax.training.curves import curves_figure, training_curves


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"step": 0, "loss": 1.0}\n',
        '{"step": 7, "eval/TestG50/mAP": 0.5, "eval/all/top1": 0.1}\n',
        '{"step": 1, "loss": null, "loss/oim": 0.0}\n{"step": 2, "loss": null}\n{"st',
    ],
)
def test_curves_of_one_point_none_or_some(tmp_path, text):
    log, out = tmp_path / "log.jsonl", tmp_path / "plots" / "curves.png"
    log.write_text(text)
    training_curves(log, out)
    assert read_photo(out, 2 * 10**7).shape == (900, 1600, 3)


def test_every_measurement_is_in_its_panel_and_later_lines_of_a_step_win():
    evaluation = {"eval/all/mAP": 0.5, "eval/all/top5": 0.7, "eval/detection/AP": 0.25}
    lines = [(10, {"loss": 1.0, "loss/oim": 0.25}), (20, {"loss": 9.0}), (20, evaluation)]
    lines += [(15, {"loss": 4.0}), (20, {"loss": np.nan})]
    found = {
        (axes.get_title(), line.get_label()): np.transpose(line.get_data()).tolist()
        for axes in curves_figure(lines).axes
        for line in axes.lines
    }
    np.testing.assert_equal(
        found,
        {
            ("losses", "loss"): [[10, 1.0], [15, 4.0], [20, np.nan]],
            ("losses", "loss/oim"): [[10, 0.25]],
            ("search", "eval/all/mAP"): [[20, 0.5]],
            ("detection", "eval/detection/AP"): [[20, 0.25]],
        },
    )
