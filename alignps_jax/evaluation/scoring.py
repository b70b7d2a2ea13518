"""Metrics from detections: all that the published evaluations need besides a network's output.

Only annotations are read, no image and no prepared record.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from ml_collections import ConfigDict

from alignps_jax.evaluation.cbgm import ContextMatching
from alignps_jax.evaluation.detections_io import align_detections, load_detections
from alignps_jax.evaluation.metrics import (
    DetectionMetrics,
    Ranking,
    SearchMetrics,
    detection_metrics,
    rank_gallery,
    search_metrics,
)
from alignps_jax.evaluation.results import (
    EvaluationResult,
    ResultRow,
    print_results,
    write_metrics_json,
    write_queries_csv,
)
from alignps_jax.files import check_outputs
from alignps_jax.types import Annotations, GalleryDetections, SearchProtocol, UserError
from data_pipeline.datasets import load_test

# The files that `Scorer.write` writes.
METRICS, QUERIES = "metrics.json", "queries.csv"


@dataclasses.dataclass(frozen=True)
class Scorer:
    """What is searched, and how it counts.

    `context` is None without context matching, `boxes` an entry of `config.eval.boxes`.
    """

    dataset: str
    annotations: Annotations
    protocols: tuple[SearchProtocol, ...]
    score_threshold: float
    context: ContextMatching | None
    boxes: str

    def score(self, detections: GalleryDetections, step: int | None) -> EvaluationResult:
        """All metrics of the test images' detections; `step` is that of the checkpoint, if any."""
        return EvaluationResult(
            dataset=self.dataset,
            step=step,
            score_threshold=self.score_threshold,
            boxes=self.boxes,
            context=self.context,
            detection=self.detection(detections),
            labeled_detection=self.detection(detections, labeled_only=True),
            searches={
                protocol.name: self.search(protocol, detections) for protocol in self.protocols
            },
        )

    def detection(
        self, detections: GalleryDetections, labeled_only: bool = False
    ) -> DetectionMetrics:
        """How well people were found, all of them or those with an identity only."""
        return detection_metrics(
            self.annotations,
            detections,
            score_threshold=self.score_threshold,
            labeled_only=labeled_only,
        )

    def search(self, protocol: SearchProtocol, detections: GalleryDetections) -> SearchMetrics:
        """How well the queries of one protocol were found."""
        return search_metrics(
            protocol, detections, score_threshold=self.score_threshold, context=self.context
        )

    def rank(self, detections: GalleryDetections, query: int) -> Ranking:
        """The ranked gallery of one query of the first protocol."""
        return rank_gallery(
            self.protocols[0],
            detections,
            query,
            score_threshold=self.score_threshold,
            context=self.context,
        )

    def write(
        self,
        workdir: Path,
        detections: GalleryDetections,
        result: EvaluationResult,
        untrained: EvaluationResult | None = None,
    ) -> None:
        """Prints the table; writes `metrics.json` and, query by query, `queries.csv`."""
        rows = [ResultRow("trained" if result.step is not None else "saved", result)]
        if untrained is not None:
            rows.append(ResultRow("untrained", untrained))
        print_results(rows)
        if not (detections.scores >= self.score_threshold).any():
            best = f"{detections.scores.max():.2f}" if detections.scores.size else "none"
            print(
                f"note: nothing reached the score threshold {self.score_threshold:g} "
                f"(config.eval.score_threshold); the best score is {best}"
            )
        metrics, queries = workdir / METRICS, workdir / QUERIES
        write_metrics_json(metrics, result, untrained)
        write_queries_csv(queries, self.protocols, result.searches, detections)
        print(f"metrics     {metrics}\nqueries     {queries}")


def make_scorer(config: ConfigDict) -> Scorer:
    """Reads the annotations of the test images and the protocols of `config.eval`.

    Raises:
      UserError: the data set lacks files, or a field of `config.eval` is wrong.
    """
    protocols = config.eval.protocols
    if isinstance(protocols, str) or not all(isinstance(name, str) for name in protocols):
        raise UserError(
            f"config.eval.protocols: found {protocols!r}, expected a tuple of names, such as "
            "('TestG100','all')"
        )
    return scorer_of(config, *load_test(config.data, protocols))


def scorer_of(
    config: ConfigDict, annotations: Annotations, protocols: tuple[SearchProtocol, ...]
) -> Scorer:
    """The scorer of these images and protocols, as `config.eval` has it.

    Raises:
      UserError: a field of `config.eval` is wrong.
    """
    context, threshold = (
        context_matching(config.eval.context_matching),
        config.eval.score_threshold,
    )
    if not math.isfinite(threshold):
        raise UserError(f"config.eval.score_threshold: found {threshold}, expected a finite number")
    return Scorer(
        dataset=config.data.name,
        annotations=annotations,
        protocols=protocols,
        score_threshold=threshold,
        context=context,
        boxes=config.eval.boxes,
    )


def context_matching(value: object) -> ContextMatching | None:
    """`config.eval.context_matching`: (k1, k2), or () for none; UserError for anything else."""
    if value == ():
        return None
    numbers = value if isinstance(value, tuple) else ()
    if len(numbers) == 2 and all(type(k) is int and k > 0 for k in numbers):
        return ContextMatching(images=numbers[0], people=numbers[1])
    raise UserError(
        f"config.eval.context_matching: found {value!r}, expected () or (k1, k2), the numbers of "
        "gallery images and of people, 1 or more"
    )


def evaluate_detections(config: ConfigDict, file: Path, workdir: Path | None = None) -> None:
    """Scores a file of detections of the test images of `config.data`.

    Args:
      config: the configuration.
      file: what `load_detections` reads; it is never written to.
      workdir: where results go; None: `<name of the file>_rescored` beside it.

    Raises:
      UserError: the file is not one of detections, or not of these images; the data or a field of
        `config.eval` is wrong; the results cannot be written, which is found out first.
    """
    workdir = workdir or file.with_name(f"{file.stem}_rescored")
    check_outputs(workdir / METRICS, workdir / QUERIES)
    if config.eval.boxes != "detected":
        raise UserError(
            f"config.eval.boxes: found {config.eval.boxes!r}, expected 'detected' with "
            "--detections: only a network can tell the embeddings of other boxes"
        )
    detections = load_detections(file)
    scorer = make_scorer(config)
    aligned = align_with_split(detections, scorer.annotations.names, file, config)
    result = scorer.score(aligned, None)
    scorer.write(workdir, aligned, result)


def align_with_split(
    detections: GalleryDetections, names: tuple[str, ...], file: Path, config: ConfigDict
) -> GalleryDetections:
    """The detections in the order of the split; says so if the file has other images as well.

    Raises:
      UserError: images of the split are missing.
    """
    known = set(detections.names)
    missing = [name for name in names if name not in known]
    split = f"the {len(names)} test images of {config.data.name} in {config.data.root}"
    if missing:
        raise UserError(
            f"{file}: lacks {len(missing)} of {split}, the first is {missing[0]!r}; its own "
            f"{len(known)} begin with {next(iter(detections.names), None)!r}"
        )
    if len(known) > len(names):
        print(f"note: {file} has {len(known) - len(names)} images that are none of {split}")
    return align_detections(detections, names, str(file))
