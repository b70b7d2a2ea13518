"""Inference over a gallery, its figures, and the files that they go into."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import UInt8
from ml_collections import ConfigDict
from tqdm import tqdm

from alignps_jax.checkpoint import load_weights
from alignps_jax.detections_io import save_detections
from alignps_jax.metrics import detection_metrics, rank_gallery, search_metrics
from alignps_jax.model import AlignPS, build_model, weights_template
from alignps_jax.report import (
    EvaluationResult,
    MetricLog,
    ResultRow,
    print_results,
    write_metrics_json,
)
from alignps_jax.train_step import (
    PredictStep,
    parallel_predict_step,
    replicate,
    split_over_devices,
)
from alignps_jax.types import (
    Annotations,
    Batch,
    Detections,
    GalleryDetections,
    SearchProtocol,
    UserError,
)
from alignps_jax.visualize import (
    Panel,
    RankingRow,
    draw_detections,
    ranking_picture,
    result_caption,
    write_image,
)
from data_pipeline.datasets import PreparedSplit, load_annotations, load_protocols, prepare
from data_pipeline.pipeline import EvalBatches, make_eval_batches
from data_pipeline.transforms import decode_jpeg

EXAMPLE_IMAGES = 4
EXAMPLE_QUERIES = 6
EXAMPLE_RESULTS = 5


@dataclasses.dataclass(frozen=True)
class Measured:
    """An evaluation and the detections that it was computed from."""

    result: EvaluationResult
    detections: GalleryDetections


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Evaluates networks on one data set."""

    predict: Callable[[Any, Any, Batch], Detections]
    batches: EvalBatches
    split: PreparedSplit
    annotations: Annotations
    protocols: tuple[SearchProtocol, ...]
    dataset: str
    score_threshold: float

    def measure(self, params: Any, frozen: Any, step: int) -> Measured:
        """Runs a network over the test images and computes all figures; in every process."""
        detections = self.detect(params, frozen)
        searches = {
            protocol.name: search_metrics(
                protocol, detections, score_threshold=self.score_threshold
            )
            for protocol in self.protocols
        }
        result = EvaluationResult(
            dataset=self.dataset,
            step=step,
            score_threshold=self.score_threshold,
            detection=detection_metrics(
                self.annotations, detections, score_threshold=self.score_threshold
            ),
            searches=searches,
        )
        return Measured(result, detections)

    def detect(self, params: Any, frozen: Any) -> GalleryDetections:
        """All detections of all test images, whatever their score."""
        params, frozen = replicate((params, frozen))
        found: dict[int, Detections] = {}
        batches = tqdm(
            self.batches,
            desc="evaluate",
            unit="batch",
            leave=False,
            dynamic_ncols=True,
            disable=jax.process_index() != 0,
        )
        for batch in batches:
            detections = self.predict(params, frozen, split_over_devices(batch))
            for index, row in _rows(batch, detections):
                found[index] = row
        return collect(self.split.annotations.names, found)

    def log(self, measured: Measured, log: MetricLog) -> None:
        """Writes figures and a few pictures of detections to the log (first process only)."""
        if jax.process_index() != 0:
            return
        result = measured.result
        values = {
            "eval/detection/recall": result.detection.recall,
            "eval/detection/AP": result.detection.AP,
        }
        for name, search in result.searches.items():
            for key in ("mAP", "top1", "top5", "top10"):
                values[f"eval/{name}/{key}"] = getattr(search, key)
        log.scalars(result.step, values)
        count = len(self.annotations.names)
        for image in np.unique(np.linspace(0, count - 1, min(EXAMPLE_IMAGES, count)).astype(int)):
            rows = measured.detections.of(image)
            kept = measured.detections.scores[rows] >= self.score_threshold
            picture = draw_detections(
                self.photo(image),
                measured.detections.boxes[rows][kept],
                measured.detections.scores[rows][kept],
            )
            log.images(result.step, f"detections/{self.annotations.names[image]}", picture)

    def photo(self, image: int) -> UInt8[np.ndarray, "H W 3"]:
        """A test image, RGB."""
        return decode_jpeg(self.split.jpegs[image], self.annotations.names[image])

    def write(self, trained: Measured, untrained: Measured | None, workdir: Path) -> None:
        """Prints the table and writes metrics, detections and the picture of rankings."""
        if jax.process_index() != 0:
            return
        rows = [ResultRow("trained", trained.result)]
        if untrained is not None:
            rows.append(ResultRow("untrained network", untrained.result))
        print_results(rows)
        metrics, saved = workdir / "metrics.json", workdir / "detections.npz"
        pictures = workdir / "rankings.png"
        write_metrics_json(metrics, trained.result, untrained.result if untrained else None)
        save_detections(saved, trained.detections)
        write_image(pictures, ranking_picture(self.ranking_rows(trained.detections)))
        print(f"metrics     {metrics}\ndetections  {saved}\nrankings    {pictures}")

    def ranking_rows(self, detections: GalleryDetections) -> Iterator[RankingRow]:
        """Some queries, evenly spread over the first protocol, with their best results."""
        protocol = self.protocols[0]
        count = len(protocol.query_image)
        queries = np.linspace(0, count - 1, min(EXAMPLE_QUERIES, count)).astype(int)
        for query in np.unique(queries):
            ranking = rank_gallery(
                protocol, detections, int(query), score_threshold=self.score_threshold
            )
            image = int(protocol.query_image[query])
            name = self.annotations.names[image]
            results = [
                Panel(
                    self.photo(int(ranking.image[rank])),
                    ranking.boxes[rank],
                    result_caption(
                        rank + 1,
                        ranking.similarity[rank],
                        self.annotations.names[int(ranking.image[rank])],
                    ),
                    bool(ranking.is_match[rank]),
                )
                for rank in range(min(EXAMPLE_RESULTS, len(ranking.row)))
            ]
            photo = Panel(self.photo(image), protocol.query_box[query], f"query\n{name}")
            yield RankingRow(photo, tuple(results))


def make_evaluator(config: ConfigDict, model: AlignPS, split: PreparedSplit) -> Evaluator:
    """An evaluator of `model` on the prepared test split of `config.data`."""
    return Evaluator(
        predict=parallel_predict_step(PredictStep(model, config.eval)),
        batches=make_eval_batches(
            split,
            config.data,
            batch_size=config.eval.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        ),
        split=split,
        annotations=load_annotations(config.data, "test"),
        protocols=load_protocols(config.data, config.eval.protocols),
        dataset=config.data.name,
        score_threshold=config.eval.score_threshold,
    )


def score_of(result: EvaluationResult) -> float:
    """What picks the best checkpoint: mAP of the first protocol."""
    return next(iter(result.searches.values())).mAP


def evaluate_checkpoint(config: ConfigDict, checkpoint: Path, workdir: Path) -> None:
    """Evaluates the best checkpoint of a run, or one step's folder, on `config.data`.

    Raises:
      UserError: there is no such checkpoint, it does not fit `config`, or the data is wrong.
    """
    check_batch_size(config, "eval")
    model = build_model(config)
    weights = load_weights(checkpoint, weights_template(model))
    evaluator = make_evaluator(config, model, prepare(config.data).test)
    measured = evaluator.measure(weights.params, weights.frozen, int(weights.step))
    workdir.mkdir(parents=True, exist_ok=True)
    evaluator.write(measured, None, workdir)


def check_batch_size(config: ConfigDict, section: str) -> None:
    """Raises UserError unless every device takes the same number of images."""
    batch_size, devices = config[section].batch_size, jax.device_count()
    if batch_size < 1 or batch_size % devices:
        raise UserError(
            f"config.{section}.batch_size: found {batch_size}, expected a multiple of the number "
            f"of devices, {devices}"
        )


def collect(names: Sequence[str], found: dict[int, Detections]) -> GalleryDetections:
    """Lays the detections of all images end to end."""
    rows = [found[index] for index in range(len(names))]
    counts = [int(row.valid.sum()) for row in rows]
    return GalleryDetections(
        names=tuple(names),
        offsets=np.cumsum([0, *counts], dtype=np.int64),
        boxes=np.concatenate([row.boxes[row.valid] for row in rows]),
        scores=np.concatenate([row.scores[row.valid] for row in rows]),
        embeddings=np.concatenate([row.embeddings[row.valid] for row in rows]),
    )


def _rows(batch: Batch, detections: Detections) -> Iterator[tuple[int, Detections]]:
    """(image index, its detections) of all images of a batch, those of other processes included."""
    flat = jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), detections)
    gathered = (batch.index, batch.present, flat)
    if jax.process_count() > 1:
        gathered = multihost_utils.process_allgather(gathered, tiled=True)
    index, present, flat = gathered
    for row in np.flatnonzero(present):
        yield int(index[row]), jax.tree.map(lambda x, row=row: x[row], flat)
