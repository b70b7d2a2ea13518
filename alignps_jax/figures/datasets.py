"""Pictures of what saved evaluations of a data set's test images say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from alignps_jax.drawing.pictures import grid_picture
from alignps_jax.evaluation.evaluate import query_row
from alignps_jax.evaluation.metrics import SearchMetrics
from alignps_jax.evaluation.results import Measured
from alignps_jax.evaluation.scoring import Scorer, detections_of, make_scorer
from alignps_jax.figures.plots import calibration_plot, gallery_size_plot, precision_recall_plot
from alignps_jax.figures.request import FigureRequest, Pictures
from alignps_jax.files import read_json
from alignps_jax.types import UserError
from configs.variants import rows_of
from data_pipeline.datasets import prepare

MAX_COMPARED_ROWS = 9


def gallery_size(request: FigureRequest) -> Pictures:
    """mAP against gallery size (Paper, Fig. 8), a curve per `metrics.json`.

    On CUHK-SYSU with what the paper says.
    """
    saved = {label: _maps(path) for label, path in request.files("metrics.json").items()}
    on_cuhk = {dataset for dataset, _ in saved.values()} == {"cuhk_sysu"}
    rows = rows_of("6", "cuhk_sysu") if on_cuhk else ()
    paper = {f"{row.label}, paper": row.mAP for _, row in rows if row.mAP is not None}
    maps = {label: maps for label, (_, maps) in saved.items()}
    yield "gallery_size", gallery_size_plot(maps, paper)


def _maps(path: Path) -> tuple[str, dict[str, float]]:
    """The data set of a `metrics.json`, and search mAP by gallery ("50", "100", ..., "all")."""
    expected = "a metrics.json of --mode=evaluate"
    content = read_json(path, expected)
    try:
        maps = {
            size: float(search["mAP"])
            for name, search in content["search"].items()
            if (size := name.removeprefix("TestG")) == "all" or size.isdecimal()
        }
        return str(content["dataset"]), maps
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: found no mAPs of a data set, expected {expected}") from error


def precision_recall(request: FigureRequest) -> Pictures:
    """Precision-recall curves of detection and of search under each of `eval.protocols`.

    A curve per `detections.npz`; only annotations are needed besides, no photo.
    """
    scorer, measured = _measured(request)
    panels = {"detection (area: AP)": {key: x.detection.curve for key, x in measured.items()}}
    for name in (protocol.name for protocol in scorer.protocols):
        curves = {label: one.searches[name].curve for label, one in measured.items()}
        panels[f"search, {name} (area: mAP)"] = curves
    yield "precision_recall", precision_recall_plot(panels)


def calibration(request: FigureRequest) -> Pictures:
    """How likely a similarity means the same person, a curve per `detections.npz`."""
    scorer, measured = _measured(request)
    curves = {label: scorer.calibration(one) for label, one in measured.items()}
    found = {label: curve for label, curve in curves.items() if curve}
    yield "calibration", calibration_plot(found)


def _measured(request: FigureRequest) -> tuple[Scorer, dict[str, Measured]]:
    scorer, files = make_scorer(request.config), request.files("detections.npz").items()
    names = scorer.annotations.names
    return scorer, {label: scorer.score(detections_of(names, path), None) for label, path in files}


def comparison(request: FigureRequest) -> Pictures:
    """Queries of the first protocol under each `detections.npz`, a row for each (Paper, Fig. 7).

    First come the queries for which some are right at rank one and others are not, those with the
    largest difference of AP first. Right results are green, wrong ones red.
    """
    scorer, measured = _measured(request)
    protocol, split = scorer.protocols[0], prepare(request.config.data).split("test")
    metrics = {label: one.searches[protocol.name] for label, one in measured.items()}
    chosen = most_different([*metrics.values()])[: max(1, MAX_COMPARED_ROWS // len(metrics))]
    rows = []
    for query in chosen.tolist():
        for label, one in measured.items():
            title = f"{label}: AP {100 * metrics[label].per_query_ap[query]:.0f}"
            rows.append(query_row(scorer, split, one.detections, query, title))
    yield f"comparison-{protocol.name}", grid_picture(rows)


def most_different(metrics: Sequence[SearchMetrics]) -> Int[np.ndarray, "Q"]:
    """The queries, those that only some systems get right at rank one first, then by AP's range."""
    right = np.stack([one.hits(1) for one in metrics])
    ranges = np.ptp(np.stack([one.per_query_ap for one in metrics]), axis=0)
    return np.lexsort((-ranges, right.all(axis=0) == right.any(axis=0)))
