"""Pictures of what saved evaluations of a data set's test images say."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from alignps_jax.drawing.rankings import Panel, RankingRow, ranking_picture, result_caption
from alignps_jax.evaluation.detections_io import load_detections
from alignps_jax.evaluation.metrics import Ranking, SearchMetrics, search_metrics
from alignps_jax.evaluation.precision_recall import detection_curve, search_curve
from alignps_jax.evaluation.scoring import Scorer, align_with_split, make_scorer
from alignps_jax.figures.plots import Reference, gallery_size_plot, precision_recall_plot
from alignps_jax.files import Image
from alignps_jax.gallery.photos import PICTURE_RESULTS
from alignps_jax.types import GalleryDetections, SearchProtocol, UserError
from configs.variants import rows_of
from data_pipeline.datasets import PreparedSplit, prepare
from data_pipeline.pipeline import photo_of

MAX_COMPARED_ROWS = 9
# Protocols whose galleries differ in size only.
_GALLERY = re.compile(r"TestG(\d+)|all")
# The gallery size of the paper's Table 6; its Fig. 8 gives no numbers.
_PAPER_GALLERY = "100"


@dataclasses.dataclass(frozen=True)
class SavedEvaluation:
    """Search mAP, as fractions, by gallery ("50", "100", ..., "all") on a data set."""

    dataset: str
    maps: dict[str, float]


def labels(paths: Sequence[Path]) -> tuple[str, ...]:
    """Short names of several checkpoints or files; those that two would share are whole paths."""
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


def gallery_sizes(paths: Sequence[Path]) -> Image:
    """mAP against gallery size (Fig. 8), a curve per `metrics.json` (or folder with one).

    On CUHK-SYSU with what the paper says: figures for gallery size 100 only.

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
        if datasets == {"cuhk_sysu"} and _PAPER_GALLERY in galleries
    ]
    maps = {label: one.maps for label, one in zip(labels(paths), saved, strict=True)}
    return gallery_size_plot(maps, galleries, known)


def _file_of(path: Path, name: str) -> Path:
    """The path if it is a file, else the file of that name in the folder."""
    found = path if path.is_file() else path / name
    if not found.is_file():
        raise UserError(f"{found}: no such file; --mode=evaluate --checkpoint={path} writes it")
    return found


def _size(gallery: str) -> float:
    return math.inf if gallery == "all" else int(gallery)


def _read_metrics(path: Path) -> SavedEvaluation:
    try:
        content = json.loads(path.read_bytes())
        maps = {
            match[1] or match[0]: float(search["mAP"])
            for name, search in content["search"].items()
            if (match := _GALLERY.fullmatch(name))
        }
        saved = SavedEvaluation(str(content["dataset"]), maps)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        kind = type(error).__name__
        raise UserError(f"{path}: not a metrics.json of --mode=evaluate ({kind})") from error
    if len(maps) < 2:
        raise UserError(
            f"{path}: found gallery sizes {', '.join(maps) or 'none'}, expected at least two; "
            "evaluate with --config.eval.protocols=\"('TestG50','TestG100',...)\""
        )
    return saved


def precision_recall(config: ConfigDict, paths: Sequence[Path]) -> Image:
    """Precision-recall curves of detection and of search under each of `eval.protocols`.

    A curve per `detections.npz` (or folder with one); only annotations are needed besides, no
    photo.

    Raises:
      UserError: a file is missing, not valid, or of other images.
    """
    scorer = make_scorer(config)
    detections = _saved_detections(scorer, config, paths)
    panels = {
        "detection (area: AP)": {
            label: detection_curve(
                scorer.annotations, found, score_threshold=scorer.score_threshold
            )
            for label, found in detections.items()
        }
    }
    for protocol in scorer.protocols:
        panels[f"search, {protocol.name} (area: mAP)"] = {
            label: search_curve(
                protocol, found, score_threshold=scorer.score_threshold, context=scorer.context
            )
            for label, found in detections.items()
        }
    return precision_recall_plot(panels)


def _saved_detections(
    scorer: Scorer, config: ConfigDict, paths: Sequence[Path]
) -> dict[str, GalleryDetections]:
    """Label -> detections in the test images."""
    names = scorer.annotations.names
    files = [_file_of(path, "detections.npz") for path in paths]
    return {
        label: align_with_split(load_detections(file), names, file, config)
        for label, file in zip(labels(paths), files, strict=True)
    }


def compared_queries(config: ConfigDict, paths: Sequence[Path]) -> tuple[str, Image]:
    """Queries of the first protocol under each `detections.npz`, a row for each (Fig. 7).

    First come the queries for which some are right at rank one and others are not, those with the
    largest difference of AP first. Right results are green, wrong ones red.

    Returns:
      A name for the picture, and the picture.

    Raises:
      UserError: a file is missing, not valid, or of other images; or the data set is wrong.
    """
    scorer = make_scorer(config)
    protocol = scorer.protocols[0]
    detections = _saved_detections(scorer, config, paths)
    metrics = {
        label: search_metrics(
            protocol, found, score_threshold=scorer.score_threshold, context=scorer.context
        )
        for label, found in detections.items()
    }
    split = prepare(config.data).test
    count = max(1, MAX_COMPARED_ROWS // len(detections))
    rows = (
        _row(
            split,
            protocol,
            scorer.rank(found, int(query)),
            int(query),
            f"{label}: AP {100 * metrics[label].per_query_ap[query]:.0f}",
        )
        for query in most_different(tuple(metrics.values()))[:count]
        for label, found in detections.items()
    )
    return f"comparison-{protocol.name}", ranking_picture(rows)


def most_different(metrics: Sequence[SearchMetrics]) -> Int[np.ndarray, "Q"]:
    """The queries, those that only some systems get right at rank one first, then by AP's range."""
    right = np.stack([one.hits(1) for one in metrics])
    ranges = np.ptp(np.stack([one.per_query_ap for one in metrics]), axis=0)
    return np.lexsort((-ranges, right.all(axis=0) == right.any(axis=0)))


def _row(
    split: PreparedSplit, protocol: SearchProtocol, ranking: Ranking, query: int, title: str
) -> RankingRow:
    """A query of a protocol, below a title, and its best results."""
    names = split.annotations.names

    def panel(image: int, box: Float[np.ndarray, "4"], caption: str, match: bool | None) -> Panel:
        return Panel(photo_of(split, image), box, caption, match)

    results = [
        panel(
            int(ranking.image[place]),
            ranking.boxes[place],
            result_caption(place + 1, ranking.similarity[place], names[int(ranking.image[place])]),
            bool(ranking.is_match[place]),
        )
        for place in range(min(PICTURE_RESULTS, len(ranking.row)))
    ]
    image = int(protocol.query_image[query])
    caption = f"{title}\n{names[image]}"
    return RankingRow(panel(image, protocol.query_box[query], caption, None), tuple(results))
