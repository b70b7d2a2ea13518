"""Metrics from detections: all that the published evaluations need besides a network's output."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from alignps_jax.checkpoint.places import CALIBRATION
from alignps_jax.evaluation import metrics
from alignps_jax.evaluation.calibration import Calibration, fit
from alignps_jax.evaluation.detections_io import load_detections, rows_of_images
from alignps_jax.evaluation.ranking import GallerySearch
from alignps_jax.evaluation.results import Measured, print_results, write_queries_csv
from alignps_jax.files import check_outputs, write_json
from alignps_jax.types import Annotations, GalleryDetections, SearchProtocol, UserError
from data_pipeline.datasets import load_test

# The files that `Scorer.write` writes.
METRICS, QUERIES = "metrics.json", "queries.csv"
OUTPUTS = (METRICS, QUERIES, CALIBRATION)


@dataclasses.dataclass(frozen=True)
class Scorer:
    """What is searched, in which images, and how it counts (`config.eval`).

    A protocol without queries is a UserError.
    """

    config: ConfigDict
    annotations: Annotations
    protocols: tuple[SearchProtocol, ...]

    def __post_init__(self) -> None:
        for protocol in self.protocols:
            if not len(protocol.query_image):
                raise UserError(f"protocol {protocol.name}: found no queries, expected some")

    def score(self, detections: GalleryDetections, step: int | None) -> Measured:
        """All metrics of the test images' detections; `step` is that of the checkpoint, if any."""
        found, threshold = (self.annotations, detections), self.config.eval.score_threshold
        detect = partial(metrics.detection_metrics, *found, score_threshold=threshold)
        galleries = {one.name: self.galleries(one, detections) for one in self.protocols}
        searches = {name: metrics.search_metrics(own) for name, own in galleries.items()}
        return Measured(step, detections, detect(), detect(labeled_only=True), searches)

    def galleries(self, protocol: SearchProtocol, detections: GalleryDetections) -> GallerySearch:
        """The galleries of a protocol's queries."""
        rules = self.config.eval
        return GallerySearch(protocol, detections, rules.score_threshold, rules.context_matching)

    def calibration(self, measured: Measured) -> Calibration | None:
        """What similarities mean by the first protocol; None where a search has others."""
        rules, name = self.config.eval, self.protocols[0].name
        if rules.context_matching or rules.boxes != "detected":
            return None
        return fit(f"{self.config.data.name}, {name}", measured.searches[name].counts)

    def conditions(self, measured: Measured) -> str:
        """One line on how this was measured."""
        parts, settings = [self.config.data.name], self.config.eval
        if measured.step is not None:
            by = f" (chosen by {measured.chosen_by})" if measured.chosen_by else ""
            parts.append(f"checkpoint step {measured.step}{by}")
        if settings.boxes != "detected":
            parts.append(f"{settings.boxes.replace('_', ' ')} boxes")
        if settings.context_matching:
            parts.append("context matching {}, {}".format(*settings.context_matching))
        return ", ".join([*parts, f"scores >= {settings.score_threshold:g}"])

    def write(
        self, workdir: Path, measured: Measured, untrained: Mapping[str, Any] | None = None
    ) -> None:
        """Prints the table; writes `OUTPUTS`, and the calibration to the checkpoint, too."""
        threshold, scores = self.config.eval.score_threshold, measured.detections.scores
        others = {"untrained": untrained} if untrained else {}
        system = "saved" if measured.step is None else "trained"
        print_results(self.conditions(measured), {system: measured.metrics, **others})
        if not (scores >= threshold).any():
            best = f"{scores.max():.2f}" if scores.size else "none"
            print(
                f"note: nothing reached the score threshold {threshold:g} "
                f"(config.eval.score_threshold); the best score is {best}"
            )
        content = {
            "dataset": self.config.data.name,
            "checkpoint_step": measured.step,
            "checkpoint_chosen_by": measured.chosen_by,
            "score_threshold": threshold,
            "boxes": self.config.eval.boxes,
            "context_matching": self.config.eval.context_matching,
            **measured.metrics,
            **others,
        }
        write_json(workdir / METRICS, content)
        write_queries_csv(workdir / QUERIES, self.protocols, measured)
        print(f"metrics     {workdir / METRICS}\nqueries     {workdir / QUERIES}")
        if calibration := self.calibration(measured):
            calibration.save(workdir)
            print(f"similarity  {workdir / CALIBRATION}")
            try:
                calibration.save(measured.folder or workdir)
            except (UserError, OSError) as error:  # such as a checkpoint that others own
                print(f"note: searches will show no probabilities: {error}")


def make_scorer(config: ConfigDict) -> Scorer:
    """The scorer of the test images; UserError if the data set lacks files or a protocol."""
    return Scorer(config, *load_test(config.data, config.eval.protocols))


def evaluate_detections(config: ConfigDict, file: Path, workdir: Path | None = None) -> None:
    """Scores a file of detections of the test images; UserError if they, or the data, are wrong.

    Results go to `workdir` or, without it, to `<name of the file>_rescored` beside the file.
    """
    workdir = workdir or file.with_name(f"{file.stem}_rescored")
    check_outputs(*(workdir / name for name in OUTPUTS))
    if config.eval.boxes != "detected":
        raise UserError(
            "config.eval.boxes: found 'ground_truth', expected 'detected' with --detections"
        )
    scorer = make_scorer(config)
    detections = detections_of(scorer.annotations.names, file)
    scorer.write(workdir, scorer.score(detections, None))


def detections_of(names: tuple[str, ...], file: Path) -> GalleryDetections:
    """The saved detections of the test images `names`, in their order; a note counts other images.

    UserError if the file is not one of detections, or lacks images.
    """
    saved = load_detections(file)
    position = {name: index for index, name in enumerate(saved.names)}
    missing = [name for name in names if name not in position]
    if missing:
        raise UserError(
            f"{file}: lacks {len(missing):,} of the {len(names):,} test images, the first is "
            f"{missing[0]!r}; its own {len(position):,} begin with {saved.names[:1]}"
        )
    if others := len(position) - len(names):
        print(f"note: {file} has {others:,} images that are not in the test split")
    rows, offsets = rows_of_images(saved.offsets, np.array([position[name] for name in names], int))
    parts = saved.boxes[rows], saved.scores[rows], saved.embeddings[rows]
    return GalleryDetections(names, offsets, *parts)
