"""The table, `metrics.json` and `queries.csv`, as their readers see them."""

import json

import numpy as np
import pytest

from alignps_jax.evaluation.metrics import (
    DetectionMetrics,
    PrecisionRecall,
    QueryOutcome,
    SearchMetrics,
)
from alignps_jax.evaluation.results import Measured, print_results, write_queries_csv
from alignps_jax.evaluation.scoring import Scorer
from alignps_jax.types import GalleryDetections, SearchProtocol
from configs import cuhk
from tests.evaluation.metrics_test import annotations_of, lay_out

NO_CURVE = PrecisionRecall(np.array([0.0, 1.0]), np.zeros(1))


def measured(protocols=("TestG50", "TestG100"), factor=1.0, step=41000, chosen_by=None):
    return Measured(
        step=step,
        detections=lay_out({"a.jpg": (np.ones((1, 4)), np.array([0.5]), np.ones((1, 1)))}),
        detection=DetectionMetrics(0.903 * factor, np.float64(0.812) * factor, NO_CURVE),
        labeled_detection=DetectionMetrics(0.95 * factor, 0.6 * factor, NO_CURVE),
        searches={
            name: SearchMetrics(*(factor * np.array([0.931, 0.9345, 0.98, 1.0]) - 0.01 * i), ())
            for i, name in enumerate(protocols)
        },
        chosen_by=chosen_by,
    )


def scorer(protocols=(), **settings):
    config = cuhk.get_config()
    config.eval.update(settings)
    return Scorer(config, annotations_of({"a.jpg": (1, {})}), protocols)


def test_table_shows_every_system_and_protocol_in_percent(capsys, monkeypatch):
    """In a pipe, plain and in 80 columns whatever a terminal exports; also to an ASCII stdout."""
    monkeypatch.setenv("COLUMNS", "40")
    results = {"trained": measured(), "untrained": measured(("TestG4000", "cross_camera"), 0.1)}
    print_results("somewhere", results)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80
    lines = [line.split() for line in out.splitlines()]
    detection = ["90.3", "81.2", "95.0", "60.0"]
    assert ["trained", *detection, "TestG50", "93.1", "93.5", "98.0", "100.0"] in lines
    assert ["TestG100", "92.1", "92.5", "97.0", "99.0"] in lines
    untrained = ["9.0", "8.1", "9.5", "6.0", "TestG4000", "9.3", "9.3", "9.8", "10.0"]
    assert ["untrained", *untrained] in lines
    assert ["cross_camera", "8.3", "8.3", "8.8", "9.0"] in lines
    assert any("somewhere;" in line for line in lines)


def test_metrics_json_and_title(tmp_path, capsys):
    chosen = measured(chosen_by="being the last")
    scorer(context_matching=(10, 3)).write(tmp_path / "new", chosen, measured(factor=0.5))
    title = "cuhk_sysu, checkpoint step 41000 (chosen by being the last), context matching 10, 3, "
    assert title + "scores >= 0.2; metrics in percent\n" in capsys.readouterr().out
    saved = scorer(boxes="ground_truth").conditions(measured(step=None))
    assert saved == "cuhk_sysu, ground truth boxes, scores >= 0.2"
    content = json.loads((tmp_path / "new" / "metrics.json").read_text())
    search = {"mAP": 0.931, "top1": 0.9345, "top5": 0.98, "top10": 1.0}
    assert content["search"]["TestG100"] == pytest.approx({n: x - 0.01 for n, x in search.items()})
    untrained = content.pop("untrained")
    assert untrained["detection"] == {"recall": 0.4515, "AP": 0.406}
    assert content == {
        "dataset": "cuhk_sysu",
        "checkpoint_step": 41000,
        "checkpoint_chosen_by": "being the last",
        "score_threshold": 0.2,
        "boxes": "detected",
        "context_matching": [10, 3],
        "detection": {"recall": 0.903, "AP": 0.812},
        "detection_labeled": {"recall": 0.95, "AP": 0.6},
        "search": {"TestG50": search, "TestG100": content["search"]["TestG100"]},
    }


@pytest.mark.usefixtures("unchecked")
def test_queries_csv(tmp_path):
    """A query that failed, and one that found the person first; the failure comes first."""
    box, precision = np.array([[1.5, 2, 30, 40.125]] * 2, np.float32), np.array([0.5, 1.0])
    found = GalleryDetections(
        ("a.jpg", "b.jpg"), np.array([0, 1, 2]), box + 1, np.ones(2), np.ones((2, 1))
    )
    one = (np.array([1]),) * 2
    protocol = SearchProtocol("all", np.array([0, 1]), box, one, one, (box[:1],) * 2)
    outcomes = QueryOutcome(4, True, precision, 0, 1, 0.25), QueryOutcome(1)
    search = {"all": SearchMetrics(0, 0, 0, 0, outcomes)}
    write_queries_csv(tmp_path / "q.csv", [protocol], Measured(1, found, None, None, search))
    header, *lines = (tmp_path / "q.csv").read_text().splitlines()
    assert header.startswith("protocol,query,image,x1,y1,x2,y2,detected,AP,first_hit,targets,match")
    assert lines == [
        "all,1,b.jpg,1.5,2.0,30.0,40.12,no,0.0,,1,0,,,,,,",
        "all,0,a.jpg,1.5,2.0,30.0,40.12,yes,0.375,1,4,2,b.jpg,2.5,3.0,31.0,41.12,0.25",
    ]
