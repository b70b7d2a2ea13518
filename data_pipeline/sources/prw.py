"""PRW (Zheng et al., "Person Re-identification in the Wild", CVPR 2017)."""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from alignps_jax.errors import known_name
from alignps_jax.types import Annotations, SearchProtocol, UserError
from data_pipeline.prepared import PersonSearchBuilder
from data_pipeline.sources.mat_structs import cells, matrix, text
from data_pipeline.sources.source import (
    Counts,
    Queries,
    Source,
    all_but,
    check_pixels,
    contiguous,
    image_index,
    mat_variable,
    quoted,
    reading,
    search_everywhere,
)

# Names that the array of a frame's people goes by, the first one present counts.
_BOX_VARIABLES = ("box_new", "anno_file", "anno_previous")
_QUERY_FIELDS = "lines of `id x y w h image`"


@dataclasses.dataclass(frozen=True)
class _Split:
    """A split with the new number of each of the data set's identities."""

    annotations: Annotations
    number: dict[int, int]


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

    title = "PRW"
    published = Counts(5_704, 482, 6_112, 2_057)
    remark = "PRW's annotation files label 483 people in training frames, its paper counts 482"
    required = ("frame_train.mat", "frame_test.mat", "query_info.txt")
    layout = """
  frames/c1s1_000151.jpg ...
  annotations/c1s1_000151.jpg.mat ...
  frame_train.mat
  frame_test.mat
  query_info.txt
"""
    photo_folders = ("frames",)
    protocols = ("all", "cross_camera")

    @property
    def default_protocols(self) -> tuple[str, ...]:
        """Both, or `all` alone where no query's person was seen by another camera."""
        return self.protocols if self._search("cross_camera")[1].any() else self.protocols[:1]

    @property
    def train(self) -> Annotations:
        return self._train.annotations

    @property
    def test(self) -> Annotations:
        return self._test.annotations

    def protocol(self, name: str) -> SearchProtocol:
        known_name("config.eval.protocols", name, self.protocols)
        protocol, answered = self._search(name)
        path = self.root / "query_info.txt"
        if not answered.any():
            raise UserError(
                f"{path}: found no query whose person is in another photo of protocol {name}, "
                "expected at least one"
            )
        if name == "all" and not answered.all():
            query = int(np.argmin(answered))
            raise UserError(
                f"{path}: the person of query {query + 1} is in no test frame but its own; "
                "expected at least one"
            )
        return protocol

    def _search(self, name: str) -> tuple[SearchProtocol, Bool[np.ndarray, "Q"]]:
        """A protocol of the queries that have a target, and which these are."""
        queries = self._queries
        if name == "all":
            galleries = all_but(len(self.test.names), queries.image)
        else:
            galleries = _other_cameras(self.test.camera, queries.image)
        return search_everywhere(name, self.test, queries, galleries)

    @functools.cached_property
    def _train(self) -> _Split:
        return self._split("frame_train.mat", "img_index_train")

    @functools.cached_property
    def _test(self) -> _Split:
        return self._split("frame_test.mat", "img_index_test")

    def _split(self, file: str, variable: str) -> _Split:
        path = self.root / file
        frames = mat_variable(path, [variable])
        with reading(path, "a list of frame names"):
            names = tuple(f"{text(frame)}.jpg" for frame in cells(frames))
        image_index(names, path)
        people = [self._read_frame(name) for name in names]
        labeled = tuple(rows[:, 0] >= 0 for rows in people)
        identity, number = contiguous([rows[:, 0].astype(np.int64) for rows in people], labeled)
        boxes = tuple(_published_boxes(rows[:, 1:]) for rows in people)
        sound = tuple((rows[:, 2:] > rows[:, :2]).all(axis=1) for rows in boxes)
        annotations = Annotations(
            names=names,
            boxes=tuple(rows[keep] for rows, keep in zip(boxes, sound, strict=True)),
            identity=tuple(ids[keep] for ids, keep in zip(identity, sound, strict=True)),
            labeled=tuple(mask[keep] for mask, keep in zip(labeled, sound, strict=True)),
            camera=np.array([_camera(name, path) for name in names], np.int32),
        )
        return _Split(annotations, number)

    def _read_frame(self, name: str) -> Float[np.ndarray, "G 5"]:
        """Rows `id, x, y, w, h` of one frame."""
        path = self.root / "annotations" / f"{name}.mat"
        people = mat_variable(path, _BOX_VARIABLES)
        with reading(path, "rows of `id x y w h` with whole ids"):
            rows = matrix(people)
            if rows.size == 0:
                return np.zeros((0, 5))
            if rows.shape[1] != 5:
                raise ValueError(f"found an array of {rows.shape[0]}x{rows.shape[1]}")
            check_pixels(rows)
            rows = rows.astype(np.float64)
            if (rows[:, 0] % 1).any():
                raise ValueError(f"found the id {rows[(rows[:, 0] % 1) != 0][0, 0]}")
            return rows

    @functools.cached_property
    def _queries(self) -> Queries:
        path = self.root / "query_info.txt"
        index = image_index(self.test.names, self.root / "frame_test.mat")
        images, boxes, people = [], [], []
        with reading(path, _QUERY_FIELDS):
            lines = path.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                person, *xywh, frame = line.split()
                x, y, w, h = (float(field) for field in xywh)
                check_pixels(np.array([x, y, w, h]))
                people.append(self._test.number[int(person)])
                images.append(index[f"{frame}.jpg"])
            except ValueError as error:
                raise UserError(
                    f"{path}: line {number} is {quoted(line)!r}; expected {_QUERY_FIELDS}"
                ) from error
            except KeyError as error:
                missing = quoted(str(error.args[0]))
                raise UserError(
                    f"{path}: line {number} is {quoted(line)!r}, but {missing} is not in the test "
                    "frames; expected an image of frame_test.mat and an id that occurs there"
                ) from error
            boxes.append(np.array([x, y, x + w, y + h]).astype(np.int32).clip(min=0))
        return Queries(
            image=np.array(images, np.int32),
            box=np.array(boxes, np.float32).reshape(-1, 4),
            identity=np.array(people, np.int32),
        )


class Prw(PersonSearchBuilder):
    """PRW: 11,816 frames of six cameras, 932 identities, 2,057 queries."""

    source_class = PrwSource


def _published_boxes(xywh: Float[np.ndarray, "G 4"]) -> Float[np.ndarray, "G 4"]:
    xywh = xywh.clip(min=0)
    corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    return corners.astype(np.int32).astype(np.float32)


def _camera(name: str, path: Path) -> int:
    match = re.match(r"c(\d)", name)
    if match is None:
        raise UserError(f"{path}: names the frame {name}; expected c, the camera's digit, s ...")
    return int(match.group(1))


def _other_cameras(
    camera: Int[np.ndarray, "N"], images: Int[np.ndarray, "Q"]
) -> dict[int, Int[np.ndarray, "_M"]]:
    """For each of `images` those of other cameras, one array per camera."""
    galleries = {
        int(own): np.flatnonzero(camera != own).astype(np.int32) for own in np.unique(camera)
    }
    return {int(image): galleries[int(camera[image])] for image in np.unique(images)}
