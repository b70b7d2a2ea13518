"""PRW (Zheng et al., "Person Re-identification in the Wild", CVPR 2017)."""

from __future__ import annotations

import functools
import re

import numpy as np
from jaxtyping import Bool, Float

from alignps_jax.types import Annotations, SearchProtocol, UserError
from data_pipeline.sources.matlab import cells, numbers, read_variable, text
from data_pipeline.sources.source import (
    Query,
    Source,
    annotate,
    check_pixels,
    image_index,
    reading,
    search_everywhere,
)

# Names that the array of a frame's people goes by; the first one present counts.
_BOX_VARIABLES = ("box_new", "anno_file", "anno_previous")


class PrwSource(Source):
    """Reads PRW's own layout.

    Identities are numbered 0, 1, ... within each split, in the order of the data set's own
    numbers; -2 (any negative number) is a person without identity. Boxes `x, y, w, h` with
    negative entries set to 0 become `x, y, x + w, y + h` as int32 (as published). The camera is
    the number after the `c` of the image name.

    Protocols: `all` (every test image but the query's own) and `cross_camera` (test images of
    other cameras; queries whose person no other camera saw are left out). Galleries are in the
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
        return self.protocols if self._search("cross_camera")[1].any() else self.protocols[:1]

    @functools.cached_property
    def train(self) -> Annotations:
        return self._split("train")[0]

    @property
    def test(self) -> Annotations:
        return self._test[0]

    def protocol(self, name: str) -> SearchProtocol:
        protocol, answered = self._search(name)
        if not answered.any() or (name == "all" and not answered.all()):
            raise UserError(
                f"{self.root / 'query_info.txt'}: the person of query {np.argmin(answered) + 1} is "
                f"in no other photo of protocol {name}"
            )
        return protocol

    def _search(self, name: str) -> tuple[SearchProtocol, Bool[np.ndarray, "Q"]]:
        """A protocol of the queries that have a target, and which these are."""
        return search_everywhere(name, self.test, self._queries, other_cameras=name != "all")

    @functools.cached_property
    def _test(self) -> tuple[Annotations, dict[int, int]]:
        shared = self._frames("train").keys() & self._frames("test").keys()
        self._note(len(shared), "photos are in both splits, train and test")
        return self._split("test")

    def _frames(self, split: str) -> dict[str, int]:
        """The camera of each image of a split, in the order of the split."""
        path = self.root / f"frame_{split}.mat"
        with reading(path):
            frames = cells(read_variable(path, [f"img_index_{split}"]))
            return {name: _camera(name) for name in image_index([f"{text(f)}.jpg" for f in frames])}

    def _split(self, split: str) -> tuple[Annotations, dict[int, int]]:
        """A split, and the new number of each of the data set's identities in it."""
        cameras = self._frames(split)
        people = [self._read_frame(name) for name in cameras]
        boxes = [_published_boxes(rows[:, 1:]) for rows in people]
        ids = [[int(number) if number >= 0 else None for number in rows[:, 0]] for rows in people]
        people_of, number = annotate(list(cameras), boxes, ids, list(cameras.values()))
        left = sum(map(len, boxes)) - sum(map(len, people_of.boxes))
        self._note(left, "boxes without area are left out")
        return people_of, number

    def _read_frame(self, name: str) -> Float[np.ndarray, "G 5"]:
        """Rows `id, x, y, w, h` of one frame."""
        path = self.root / "annotations" / f"{name}.mat"
        with reading(path):
            rows = numbers(read_variable(path, _BOX_VARIABLES)).astype(np.float64)
            if rows.size == 0:
                return np.zeros((0, 5))
            if rows.ndim != 2 or rows.shape[1] != 5:
                raise ValueError(f"has an array of shape {rows.shape}, not rows of id, x, y, w, h")
            check_pixels(rows)
            if (rows[:, 0] % 1).any():
                raise ValueError("has an id that is not whole")
            return rows

    @functools.cached_property
    def _queries(self) -> list[Query]:
        path = self.root / "query_info.txt"
        index = {name: position for position, name in enumerate(self.test.names)}
        rows = []
        with reading(path):
            for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), start=1):
                try:
                    rows += [self._query(line.split(), index)] if line.strip() else []
                except (ValueError, LookupError) as error:
                    raise ValueError(
                        f"line {number} is {line[:120]!r}; expected `id x y w h image`, with an id "
                        "and an image of the test frames"
                    ) from error
            if not rows:
                raise ValueError("has no query")
        return rows

    def _query(self, words: list[str], index: dict[str, int]) -> Query:
        person, x, y, w, h, frame = words
        xywh = np.array([x, y, w, h], np.float64)
        check_pixels(xywh)
        corners = np.concatenate([xywh[:2], xywh[:2] + xywh[2:]]).astype(np.int32)
        return index[f"{frame}.jpg"], corners.clip(min=0), self._test[1][int(person)]


def _published_boxes(xywh: Float[np.ndarray, "G 4"]) -> Float[np.ndarray, "G 4"]:
    xywh = xywh.clip(min=0)
    corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    return corners.astype(np.int32).astype(np.float32)


def _camera(name: str) -> int:
    match = re.match(r"c(\d)", name)
    if match is None:
        raise ValueError(f"names the frame {name!r}; expected c, the digit of the camera, s ...")
    return int(match[1])
