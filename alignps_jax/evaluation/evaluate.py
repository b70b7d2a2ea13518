"""Inference over a gallery, its metrics, and the files that they go into."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils
from jaxtyping import Int
from ml_collections import ConfigDict

from alignps_jax.checkpoint.choice import agreed_step
from alignps_jax.checkpoint.places import results_folder
from alignps_jax.checkpoint.store import load_weights
from alignps_jax.devices import (
    parallel_predict_step,
    replicate,
    split_over_devices,
    use_compilation_cache,
)
from alignps_jax.distributed import main_process_first
from alignps_jax.drawing.canvas import draw_detections
from alignps_jax.drawing.rankings import PictureRow, ranking_picture
from alignps_jax.evaluation.detections_io import check_detections, save_detections, unit_embeddings
from alignps_jax.evaluation.pictures import protocol_row
from alignps_jax.evaluation.results import EvaluationResult, detection_values, search_values
from alignps_jax.evaluation.scoring import METRICS, QUERIES, Scorer, make_scorer
from alignps_jax.files import check_outputs, write_image, write_json
from alignps_jax.inference.predict import inference_model, make_predict_step
from alignps_jax.log import MetricLog, progress
from alignps_jax.nn.model import weights_template
from alignps_jax.types import Batch, Detections, GalleryDetections, UserError
from data_pipeline.datasets import PreparedSplit, prepare
from data_pipeline.pipeline import EvalBatches, make_eval_batches, photo_of

# The files that `Evaluator.write` writes.
DETECTIONS, RANKINGS = "detections.npz", "rankings.png"
OUTPUTS = (METRICS, QUERIES, DETECTIONS, RANKINGS)

EXAMPLE_IMAGES = 4
EXAMPLE_FAILURES = 3
EXAMPLE_OTHERS = 3


@dataclasses.dataclass(frozen=True)
class Measured:
    """An evaluation and the detections that it was computed from."""

    result: EvaluationResult
    detections: GalleryDetections

    def chosen(self, by: str) -> Measured:
        """The same, with a word on what chose the step (`chosen_by`)."""
        return dataclasses.replace(self, result=dataclasses.replace(self.result, chosen_by=by))


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Evaluates networks on one data set."""

    predict: Callable[[Any, Any, Batch], Detections]
    batches: EvalBatches
    split: PreparedSplit
    scorer: Scorer

    def measure(self, params: Any, frozen: Any, step: int) -> Measured:
        """Runs a network over the test images and computes all metrics; in every process."""
        detections = self.detect(params, frozen)
        return Measured(self.scorer.score(detections, step), detections)

    def detect(self, params: Any, frozen: Any) -> GalleryDetections:
        """All detections of all test images, those with low scores too.

        Raises:
          UserError: the network gives something that is not a number.
        """
        params, frozen = replicate((params, frozen))
        found: dict[int, Detections] = {}
        leads = jax.process_index() == 0
        batches = progress(
            self.batches, desc="evaluate", unit="batch", leave=False, disable=not leads
        )
        dispatched = (
            (batch, self.predict(params, frozen, split_over_devices(batch))) for batch in batches
        )
        # A batch is read back once the next one is under way: the device never waits for us.
        ahead: Iterator[tuple[Any, Any]] = pairwise(chain(dispatched, [None]))
        for (batch, detections), _ in ahead:
            for index, row in _rows(batch, detections):
                found[index] = row
        detections = collect(self.split.annotations.names, found)
        # Here and where a file is read or written; what computes with them need not look again.
        check_detections(detections, "detections of the network")
        return detections

    def log(self, measured: Measured, log: MetricLog) -> None:
        """Writes metrics and a few pictures of detections to the log (first process only)."""
        if jax.process_index() != 0:
            return
        result = measured.result
        metrics = {"detection": detection_values(result.detection)}
        metrics |= {name: search_values(search) for name, search in result.searches.items()}
        values = traverse_util.flatten_dict({"eval": metrics}, sep="/")
        step = int(result.step or 0)
        log.scalars(step, values)
        names, detections = measured.detections.names, measured.detections
        count = len(names)
        for image in np.unique(np.linspace(0, count - 1, min(EXAMPLE_IMAGES, count)).astype(int)):
            rows = detections.of(image)
            boxes, scores = detections.boxes[rows], detections.scores[rows]
            kept = scores >= result.score_threshold
            picture = draw_detections(photo_of(self.split, image), boxes[kept], scores[kept])
            log.images(step, f"detections/{names[image]}", picture)

    def write(self, trained: Measured, untrained: Measured | None, workdir: Path) -> None:
        """Prints the table; writes metrics, queries, detections and the picture of rankings."""
        if jax.process_index() != 0:
            return
        saved, pictures = workdir / DETECTIONS, workdir / RANKINGS
        save_detections(saved, trained.detections)
        baseline = untrained.result if untrained is not None else None
        self.scorer.write(workdir, trained.detections, trained.result, baseline)
        write_image(pictures, ranking_picture(self.ranking_rows(trained)))
        print(f"detections  {saved}\nrankings    {pictures}")

    def ranking_rows(self, measured: Measured) -> Iterator[PictureRow]:
        """Some queries of the first protocol with their first results."""
        protocol, detections = self.scorer.protocols[0], measured.detections
        search = measured.result.searches[protocol.name]
        for query in example_queries(search.worst_first()):
            ranking = self.scorer.rank(detections, query)
            title = f"query, AP {search.per_query_ap[query]:.2f}"
            yield protocol_row(self.split, protocol, ranking, query, title)


def make_evaluator(
    config: ConfigDict,
    split: PreparedSplit,
    scorer: Scorer,
    predict: Callable[[Any, Any, Batch], Detections] | None = None,
) -> Evaluator:
    """An evaluator of the configured network on a prepared split of `config.data`.

    Args:
      config: the configuration.
      split: the photos.
      scorer: for their annotations.
      predict: that of another evaluator of the network, whose compiled programs are used again.
    """
    return Evaluator(
        predict=predict or parallel_predict_step(make_predict_step(config)),
        batches=make_eval_batches(
            split,
            config.data,
            batch_size=config.eval.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        ),
        split=split,
        scorer=scorer,
    )


def example_queries(worst_first: Int[np.ndarray, "Q"]) -> list[int]:
    """The three worst queries, then three that are evenly spread over the others' order."""
    worst, others = np.split(worst_first, [EXAMPLE_FAILURES])
    others = np.sort(others)
    spread = np.linspace(0, len(others) - 1, min(EXAMPLE_OTHERS, len(others))).astype(int)
    return [*worst.tolist(), *others[spread].tolist()]


def score_of(result: EvaluationResult) -> float:
    """The score of a checkpoint: mAP of the first protocol."""
    return next(iter(result.searches.values())).mAP


def evaluate_checkpoint(config: ConfigDict, checkpoint: Path, workdir: Path) -> None:
    """Evaluates the chosen step of a run, or one step's folder, on `config.data`.

    In the run's own metrics, the entry of the untrained network stays.

    Raises:
      UserError: there is no such checkpoint, it does not fit `config`, the data is wrong, or
        `workdir` cannot be written; all that is found before the evaluation.
    """
    if jax.process_index() == 0:
        check_outputs(*(workdir / name for name in OUTPUTS))
    use_compilation_cache()
    check_batch_size(config, "eval")
    step, by = agreed_step(checkpoint, config)
    weights = load_weights(step, weights_template(inference_model(config)))
    with main_process_first():
        scorer, photos = make_scorer(config), prepare(config.data).test
    evaluator = make_evaluator(config, photos, scorer)
    measured = evaluator.measure(weights.params, weights.frozen, int(weights.step))
    workdir.mkdir(parents=True, exist_ok=True)
    metrics = workdir / METRICS
    is_own = workdir == results_folder(checkpoint) and metrics.is_file()
    before = json.loads(metrics.read_bytes()) if is_own else {}
    evaluator.write(measured.chosen(by), None, workdir)
    if "untrained" in before and jax.process_index() == 0:
        own = json.loads(metrics.read_bytes())
        write_json(metrics, own | {"untrained": before["untrained"]})


def check_batch_size(config: ConfigDict, section: str, parts: int = 1) -> None:
    """Raises UserError unless every device takes the same number of images in each of `parts`."""
    batch_size, devices = config[section].batch_size, jax.device_count()
    if batch_size % (devices * parts):
        accumulated = f" times config.train.accumulate, {parts}" if parts > 1 else ""
        raise UserError(
            f"config.{section}.batch_size: found {batch_size}, expected a multiple of the number "
            f"of devices, {devices}{accumulated}"
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
        # As a reader of the saved file sees them.
        embeddings=unit_embeddings(np.concatenate([row.embeddings[row.valid] for row in rows])),
    )


def _rows(batch: Batch, detections: Detections) -> Iterator[tuple[int, Detections]]:
    """(image index, its detections) of all images of a batch, those of other processes included."""
    flat = jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), detections)
    gathered = (batch.index, batch.valid_image, flat)
    if jax.process_count() > 1:
        gathered = multihost_utils.process_allgather(gathered, tiled=True)
    index, valid, flat = gathered
    for row in np.flatnonzero(valid):
        yield int(index[row]), jax.tree.map(lambda x, row=row: x[row], flat)
