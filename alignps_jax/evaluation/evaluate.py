"""Inference over a gallery, its metrics, and the files that they go into."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils
from jaxtyping import Int
from ml_collections import ConfigDict

from alignps_jax import devices
from alignps_jax.checkpoint.places import agreed_step, results_folder
from alignps_jax.checkpoint.store import load_weights
from alignps_jax.distributed import is_main_process, main_process_first
from alignps_jax.drawing.pictures import Result, draw_detections, grid_picture, picture_row
from alignps_jax.errors import blame
from alignps_jax.evaluation import detections_io, scoring
from alignps_jax.evaluation.results import Measured
from alignps_jax.evaluation.scoring import METRICS, Scorer, make_scorer
from alignps_jax.files import check_outputs, read_json, write_image
from alignps_jax.inference.many import people_of
from alignps_jax.inference.predict import inference_model, make_predict_step
from alignps_jax.log import MetricLog, progress
from alignps_jax.media import Image
from alignps_jax.nn.model import weights_template
from alignps_jax.types import Batch, Detections, GalleryDetections, UserError
from data_pipeline.datasets import prepare
from data_pipeline.pipeline import EvalBatches, make_eval_batches, photo_of
from data_pipeline.prepared import PreparedSplit

# The files that `Evaluator.write` writes.
DETECTIONS, RANKINGS = "detections.npz", "rankings.png"
OUTPUTS = (*scoring.OUTPUTS, DETECTIONS, RANKINGS)

EXAMPLE_IMAGES, EXAMPLE_QUERIES = 4, 6


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Evaluates networks on one data set."""

    predict: Callable[[Any, Any, Batch], Detections]
    batches: EvalBatches
    split: PreparedSplit
    scorer: Scorer

    def measure(self, params: Any, frozen: Any, step: int) -> Measured:
        """Runs a network over the test images and computes all metrics; in every process."""
        return self.scorer.score(self.detect(params, frozen), step)

    def detect(self, params: Any, frozen: Any) -> GalleryDetections:
        """All detections of all test images, those with low scores too; UserError for a NaN."""
        params, frozen = devices.replicate((params, frozen))
        found: dict[int, Detections] = {}
        bar = {"desc": "evaluate", "unit": "batch", "leave": False}
        batches = progress(self.batches, disable=not is_main_process(), **bar)
        dispatched = (
            (batch, self.predict(params, frozen, devices.split_over_devices(batch)))
            for batch in batches
        )
        # A batch is read back once the next one is under way: the device never waits for us.
        ahead: Iterator[tuple[Any, Any]] = pairwise(chain(dispatched, [None]))
        for (batch, detections), _ in ahead:
            found.update(people_of_images(batch, detections))
        names = self.split.annotations.names
        everybody = detections_io.lay_out(names, [found[index] for index in range(len(names))])
        with blame("detections of the network"):
            detections_io.check_values(everybody)
        return everybody

    def log(self, measured: Measured, log: MetricLog) -> None:
        """Writes metrics and a few pictures of detections to the log (first process only)."""
        if not is_main_process():
            return
        step, detections = measured.step or 0, measured.detections
        metrics = {"detection": measured.metrics["detection"], **measured.metrics["search"]}
        log.scalars(step, traverse_util.flatten_dict({"eval": metrics}, sep="/"))
        for image in spread(len(detections.names), EXAMPLE_IMAGES):
            rows = detections.of(image)
            boxes, scores = detections.boxes[rows], detections.scores[rows]
            kept = scores >= self.scorer.config.eval.score_threshold
            picture = draw_detections(photo_of(self.split, image), boxes[kept], scores[kept])
            log.images(step, f"detections/{detections.names[image]}", picture)

    def write(self, trained: Measured, untrained: Mapping[str, Any] | None, workdir: Path) -> None:
        """Prints the table; writes metrics, queries, detections and the picture of rankings."""
        if not is_main_process():
            return
        detections_io.save_detections(workdir / DETECTIONS, trained.detections)
        self.scorer.write(workdir, trained, untrained)
        write_image(workdir / RANKINGS, grid_picture(self._example_rows(trained)))
        print(f"detections  {workdir / DETECTIONS}\nrankings    {workdir / RANKINGS}")

    def _example_rows(self, measured: Measured) -> Iterator[list[Image]]:
        search = measured.searches[self.scorer.protocols[0].name]
        worst_first = search.worst_first()
        for query in worst_first[spread(len(worst_first), EXAMPLE_QUERIES)].tolist():
            title = f"query, AP {search.outcomes[query].ap:.2f}"
            yield query_row(self.scorer, self.split, measured.detections, query, title)


def make_evaluator(
    config: ConfigDict,
    split: PreparedSplit,
    scorer: Scorer,
    predict: Callable[[Any, Any, Batch], Detections] | None = None,
) -> Evaluator:
    """An evaluator of the configured network on the photos of a split and their annotations.

    `predict` is that of another evaluator of the network, whose compiled programs are used again.
    """
    process, rows = (jax.process_index(), jax.process_count()), config.eval.batch_size
    batches = make_eval_batches(split, config.data, batch_size=rows, process=process)
    predict = predict or devices.parallel_predict_step(make_predict_step(config))
    return Evaluator(predict, batches, split, scorer)


def spread(count: int, shown: int) -> Int[np.ndarray, "S"]:
    """At most `shown` of the numbers below `count`, evenly spread from the first to the last."""
    return np.unique(np.linspace(0, count - 1, shown).astype(int))


def evaluate_checkpoint(config: ConfigDict, checkpoint: Path, workdir: Path) -> None:
    """Evaluates the chosen step of a run, or one step's folder, on `config.data`.

    The metrics of the untrained network that the run has stay in its own results. What is wrong
    with the checkpoint, the data or `workdir` is a UserError before the work.
    """
    if is_main_process():
        check_outputs(*(workdir / name for name in OUTPUTS))
    devices.use_compilation_cache()
    check_batch_size(config, "eval")
    metrics, untrained = workdir / METRICS, None
    if workdir == results_folder(checkpoint) and metrics.is_file():
        untrained = read_json(metrics, "the results of this run").get("untrained")
    step, by = agreed_step(checkpoint, config)
    weights = load_weights(step, weights_template(inference_model(config)))
    with main_process_first():
        scorer, photos = make_scorer(config), prepare(config.data).split("test")
    evaluator = make_evaluator(config, photos, scorer)
    measured = evaluator.measure(weights.params, weights.frozen, int(weights.step))
    measured = dataclasses.replace(measured, chosen_by=by, folder=step)
    evaluator.write(measured, untrained, workdir)


def check_batch_size(config: ConfigDict, section: str, parts: int = 1) -> None:
    """Raises UserError unless every device takes the same number of images in each of `parts`."""
    found, count = config[section].batch_size, jax.device_count()
    if found % (count * parts):
        accumulated = f" times config.train.accumulate, {parts}" if parts > 1 else ""
        expected = f"a multiple of the number of devices, {count}{accumulated}"
        raise UserError(f"config.{section}.batch_size: found {found}, expected {expected}")


def people_of_images(batch: Batch, detections: Detections) -> Iterator[tuple[int, Detections]]:
    """(image index, its people) of all images of a batch, those of other processes included.

    The people are the valid ones of detections [devices, B / devices, K], as in a saved file.
    """
    gathered = (batch.index, batch.valid_image, jax.device_get(detections))
    if jax.process_count() > 1:
        gathered = multihost_utils.process_allgather(gathered, tiled=True)
    index, valid, found = gathered
    for image, is_valid, people in zip(index.tolist(), valid, people_of(found), strict=True):
        if is_valid:
            unit = detections_io.unit_embeddings(np.asarray(people.embeddings))
            yield image, dataclasses.replace(people, embeddings=unit)


def query_row(
    scorer: Scorer, split: PreparedSplit, detections: GalleryDetections, query: int, title: str
) -> list[Image]:
    """Query number `query` of the first protocol, below a title, and its first results."""
    names, protocol = split.annotations.names, scorer.protocols[0]

    def result(row: int, cosine: float, is_match: bool) -> Result:
        image = detections.image_of(row)
        photo, box = photo_of(split, image), detections.boxes[row]
        return Result(photo, names[image], box, float(cosine), bool(is_match))

    results = (
        result(*found)
        for _, one in scorer.galleries(protocol, detections).rankings([query])
        for found in zip(one.row, one.similarity, one.is_match, strict=True)
    )
    image, box = int(protocol.query_image[query]), protocol.query_box[query]
    return picture_row(title, photo_of(split, image), names[image], box, results)
