"""PRW (Zheng et al., "Person Re-identification in the Wild", CVPR 2017)."""

from __future__ import annotations

import functools

import numpy as np

from alignps_jax.types import Annotations
from data_pipeline.sources.matlab import cells, numbers, read_variable, text
from data_pipeline.sources.source import (
    Person,
    Query,
    Source,
    annotate,
    corners,
    image_index,
    reading,
)


class PrwSource(Source):
    """Reads PRW's own layout.

    Identities are numbered 0, 1, ... within each split, in the order of the data set's own
    numbers; -2 (any negative number) is a person without identity. Boxes `x, y, w, h` with
    negative entries set to 0 become `x, y, x + w, y + h` as int32 (as published). The camera is
    the digit after the `c` of the image name.

    Protocols: `all` (every test image but the query's own) and `cross_camera` (test images of
    other cameras). Queries whose person is in none of them are left out. Galleries are in the
    order of `frame_test.mat`.
    """

    # The paper counts 482 identities, its annotation files label 483.
    published = (5_704, 483, 6_112, 2_057)
    required = ("frame_train.mat", "frame_test.mat", "query_info.txt")
    photo_folders = ("frames",)
    annotation_patterns = ("frame_*.mat", "query_info.txt", "annotations/*.mat")
    protocols = ("all", "cross_camera")

    @property
    def default_protocols(self) -> tuple[str, ...]:
        """Both, or `all` alone where no query's person was seen by another camera."""
        return self.protocols if self._search("cross_camera").gallery else self.protocols[:1]

    @functools.cached_property
    def train(self) -> Annotations:
        return self._split("train")[0]

    @property
    def test(self) -> Annotations:
        return self._test[0]

    @functools.cached_property
    def _test(self) -> tuple[Annotations, dict[int, int]]:
        shared = set(self._frames("train")) & set(self._frames("test"))
        self._note(len(shared), "photos are in both splits, train and test")
        return self._split("test")

    def _frames(self, split: str) -> dict[str, int]:
        """The camera of each image of a split, in the order of the split."""
        path = self.root / f"frame_{split}.mat"
        with reading(path):
            frames = cells(read_variable(path, f"img_index_{split}"))
            names = image_index([f"{text(frame)}.jpg" for frame in frames])
            return {name: int(name[1:2]) for name in names}

    def _split(self, split: str) -> tuple[Annotations, dict[int, int]]:
        """A split, and the new number of each of the data set's identities in it."""
        cameras = self._frames(split)
        people = [person for name in cameras for person in self._read_frame(name)]
        annotations, number = annotate(cameras, people)
        left = len(people) - sum(map(len, annotations.boxes))
        self._note(left, "boxes without area are left out")
        return annotations, number

    def _read_frame(self, name: str) -> list[Person]:
        path = self.root / "annotations" / f"{name}.mat"
        with reading(path):
            # The first of these names that a file has counts (as published).
            rows = numbers(read_variable(path, "box_new", "anno_file", "anno_previous"))
            if rows.size and rows.shape[1:] != (5,):
                raise ValueError(f"has an array of shape {rows.shape}, not rows of id, x, y, w, h")
            rows = rows.reshape(-1, 5)
            boxes = corners(rows[:, 1:].clip(min=0)).astype(np.int32)
        identities = [x if x >= 0 else None for x in rows[:, 0].astype(np.int64).tolist()]
        return [(name, box, who) for box, who in zip(boxes, identities, strict=True)]

    def _queries(self) -> list[Query]:
        path = self.root / "query_info.txt"
        test, number = self._test
        index = image_index(test.names)
        with reading(path):
            rows = np.loadtxt(path, str, comments=None, encoding="utf-8-sig", ndmin=2)
            people, x, y, w, h, frames = rows.T
            boxes = corners(np.array([x, y, w, h], np.float64).T).astype(np.int32).clip(min=0)
            return [
                (index[f"{frame}.jpg"], box, number[int(person)])
                for person, box, frame in zip(people, boxes, frames, strict=True)
            ]
