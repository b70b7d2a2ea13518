"""Pictures of what saved evaluations of a data set's test images say."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from alignps_jax.checkpoint.places import results_folder
from alignps_jax.drawing.rankings import PictureRow
from alignps_jax.evaluation.evaluate import query_row
from alignps_jax.evaluation.metrics import PrecisionRecall, SearchMetrics
from alignps_jax.evaluation.scoring import Scorer, detections_of, make_scorer
from alignps_jax.figures.plots import GallerySizes, Reference
from alignps_jax.files import read_json
from alignps_jax.types import GalleryDetections, UserError
from configs.variants import rows_of
from data_pipeline.datasets import prepare

MAX_COMPARED_ROWS = 9
# Protocols whose galleries differ in size only.
_GALLERY = re.compile(r"TestG(\d+)|all")
# The gallery size of Paper, Table 6; Paper, Fig. 8 gives no numbers.
_PAPER_GALLERY = "100"


@dataclasses.dataclass(frozen=True)
class SavedEvaluation:
    """Search mAP, as fractions, by gallery ("50", "100", ..., "all") on a data set."""

    dataset: str
    maps: dict[str, float]


def labels(paths: Sequence[Path]) -> tuple[str, ...]:
    """Short names of several checkpoints or files; the path where two would share one."""
    names = [_label(path.resolve()) for path in paths]
    return tuple(
        name if names.count(name) == 1 else str(path)
        for name, path in zip(names, paths, strict=True)
    )


def _label(path: Path) -> str:
    if path.name in ("detections.npz", "metrics.json"):
        path = path.parent
    if path.parent.name == "checkpoints":
        return f"{path.parent.parent.name}, step {path.name}"
    return path.stem if path.suffix in (".npz", ".json") else path.name


def gallery_sizes(paths: Sequence[Path]) -> GallerySizes:
    """mAP against gallery size (Paper, Fig. 8), a curve per `metrics.json` (or folder with one).

    On CUHK-SYSU with what the paper says, which is mAP for gallery size 100 only.

    Raises:
      UserError: a file is missing or not a result, or has fewer than two gallery sizes; or the
        files are of different data sets.
    """
    saved = [_read_metrics(_file_of(path, "metrics.json")) for path in paths]
    datasets = {one.dataset for one in saved}
    if len(datasets) > 1:
        raise UserError(
            f"--checkpoint: found results on {', '.join(sorted(datasets))}, expected one data set"
        )
    galleries = sorted({gallery for one in saved for gallery in one.maps}, key=_size)
    known = [
        Reference(f"{row.label}, paper", _PAPER_GALLERY, row.mAP)
        for _, row in rows_of("6", "cuhk_sysu")
        if datasets == {"cuhk_sysu"} and _PAPER_GALLERY in galleries and row.mAP is not None
    ]
    maps = {label: one.maps for label, one in zip(labels(paths), saved, strict=True)}
    return GallerySizes(maps, tuple(galleries), tuple(known))


def _file_of(path: Path, name: str) -> Path:
    """The path if it is a file, else the one of that name among the checkpoint's results."""
    found = path if path.is_file() else results_folder(path) / name
    if not found.is_file():
        raise UserError(f"{found}: no such file; --mode=evaluate --checkpoint={path} writes it")
    return found


def _size(gallery: str) -> float:
    return math.inf if gallery == "all" else int(gallery)


def _read_metrics(path: Path) -> SavedEvaluation:
    content = read_json(path, "a metrics.json of --mode=evaluate")
    try:
        maps = {
            match[1] or match[0]: float(search["mAP"])
            for name, search in content["search"].items()
            if (match := _GALLERY.fullmatch(name))
        }
        saved = SavedEvaluation(str(content["dataset"]), maps)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        kind = type(error).__name__
        raise UserError(f"{path}: not a metrics.json of --mode=evaluate ({kind})") from error
    if len(maps) < 2:
        raise UserError(
            f"{path}: found gallery sizes {', '.join(maps) or 'none'}, expected at least two; "
            "evaluate with --config.eval.protocols=\"('TestG50','TestG100',...)\""
        )
    return saved


def precision_recall(
    config: ConfigDict, paths: Sequence[Path]
) -> dict[str, dict[str, PrecisionRecall]]:
    """Precision-recall curves of detection and of search under each of `eval.protocols`.

    A curve per `detections.npz` (or folder with one); only annotations are needed besides, no
    photo.

    Returns:
      Title of the panel -> label of the file -> curve.

    Raises:
      UserError: a file is missing, not valid, or of other images.
    """
    scorer = make_scorer(config)
    found = _saved_detections(scorer, paths)
    measured = {label: scorer.score(detections, None) for label, detections in found.items()}
    curves = {label: one.detection.curve for label, one in measured.items()}
    panels = {"detection (area: AP)": curves}
    for name in (protocol.name for protocol in scorer.protocols):
        curves = {label: one.searches[name].curve for label, one in measured.items()}
        panels[f"search, {name} (area: mAP)"] = curves
    return panels


def _saved_detections(scorer: Scorer, paths: Sequence[Path]) -> dict[str, GalleryDetections]:
    """Label -> detections in the test images."""
    names = scorer.annotations.names
    files = [_file_of(path, "detections.npz") for path in paths]
    return {
        label: detections_of(names, file) for label, file in zip(labels(paths), files, strict=True)
    }


@dataclasses.dataclass(frozen=True)
class ComparedQueries:
    """Rows of a picture, query by query and for each of them system by system.

    `protocol` is the name of the search protocol.
    """

    protocol: str
    rows: Iterator[PictureRow]


def compared_queries(config: ConfigDict, paths: Sequence[Path]) -> ComparedQueries:
    """Queries of the first protocol under each `detections.npz`, a row for each (Paper, Fig. 7).

    First come the queries for which some are right at rank one and others are not, those with the
    largest difference of AP first. Right results are green, wrong ones red.

    Raises:
      UserError: a file is missing, not valid, or of other images; or the data set is wrong.
    """
    scorer = make_scorer(config)
    protocol = scorer.protocols[0]
    detections = _saved_detections(scorer, paths)
    metrics = {label: scorer.search(protocol, found) for label, found in detections.items()}
    split = prepare(config.data).split("test")
    count = max(1, MAX_COMPARED_ROWS // len(detections))
    rows = (
        query_row(
            scorer,
            split,
            found,
            query,
            f"{label}: AP {100 * metrics[label].per_query_ap[query]:.0f}",
        )
        for query in most_different(tuple(metrics.values()))[:count].tolist()
        for label, found in detections.items()
    )
    return ComparedQueries(protocol.name, rows)


def most_different(metrics: Sequence[SearchMetrics]) -> Int[np.ndarray, "Q"]:
    """The queries, those that only some systems get right at rank one first, then by AP's range."""
    right = np.stack([one.hits(1) for one in metrics])
    ranges = np.ptp(np.stack([one.per_query_ap for one in metrics]), axis=0)
    return np.lexsort((-ranges, right.all(axis=0) == right.any(axis=0)))
