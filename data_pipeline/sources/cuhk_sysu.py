"""CUHK-SYSU (Xiao et al., "Joint Detection and Identification Feature Learning", CVPR 2017)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int

from alignps_jax.errors import known_name
from alignps_jax.types import Annotations, SearchProtocol, UserError
from data_pipeline.sources.matlab import (
    cells,
    numbers,
    read_structs,
    read_variable,
    structs,
    text,
)
from data_pipeline.sources.source import Counts, Source, check_pixels, image_index, reading

_GALLERIES = tuple(f"TestG{size}" for size in (50, 100, 500, 1000, 2000, 4000))
# Subsets of the queries with protocols of their own: file and variable.
_SUBSETS = {
    "occlusion": ("annotation/test/subset/Occlusion.mat", "Occlusion1"),
    "resolution": ("annotation/test/subset/Resolution.mat", "Test_Size"),
}
_FOLDER = "annotation/test/train_test"
_Label = tuple[int, Float[np.ndarray, "4"], int]  # image, box, identity


class CuhkSysuSource(Source):
    """Reads CUHK-SYSU's own layout.

    Training images are those that `pool.mat` does not list, sorted by name (as published); their
    identities are the entries of `Train.mat`, in its order. Test images are those of `pool.mat`,
    in its order; their identities are the people of the queries, in the order in which the
    smallest `TestG` file asks for them (all of these files ask for the same people, and list
    every image that holds them). A labeled box is found among the boxes of its image by its
    coordinates; a person who is not found so has no label. Boxes are `x, y, w, h` as int32.

    Protocols: `TestG50` to `TestG4000` (those in the folder), `all` (the smallest gallery, then
    the remaining test images), and `occlusion`, `resolution` (if in the folder). Galleries are in
    file order, images that a file lists twice included. All but the last two are reported unless
    the configuration names some; `TestG100`, the one of the papers' tables, comes first.
    """

    title = "CUHK-SYSU"
    published: ClassVar[Counts | None] = Counts(11_206, 5_532, 6_978, 2_900)
    required = ("annotation/Images.mat", "annotation/pool.mat", f"{_FOLDER}/Train.mat")
    layout = """
  Image/SSM/s1.jpg ...
  annotation/Images.mat
  annotation/pool.mat
  annotation/test/train_test/Train.mat
  annotation/test/train_test/TestG50.mat, TestG100.mat ... (at least one)
  annotation/test/subset/Occlusion.mat, Resolution.mat (optional)
"""
    photo_folders = ("Image/SSM",)
    annotation_patterns = ("annotation/**/*.mat",)

    @functools.cached_property
    def train(self) -> Annotations:
        tested = set(self._pool)
        names = tuple(sorted(name for name in self._boxes if name not in tested))
        path = self.root / self.required[2]
        with reading(path):
            index = image_index(names)
            labels = []
            for identity, person in enumerate(cells(read_variable(path, ["Train"]))):
                _, _, scenes, *_ = _only(person).values()
                for name, box, *_ in map(dict.values, structs(scenes)):
                    image = _position(text(name), index, "training images")
                    labels.append((image, _box(box), identity))
            return self._annotations(names, labels, path)

    @functools.cached_property
    def test(self) -> Annotations:
        protocol, people = self._smallest
        labels = [
            (int(image), box, person)
            for query, person in enumerate(people)
            for image, box in (
                (protocol.query_image[query], protocol.query_box[query]),
                *zip(protocol.target_images[query], protocol.target_boxes[query], strict=True),
            )
        ]
        return self._annotations(self._pool, labels, self._file(protocol.name)[0])

    @functools.cached_property
    def protocols(self) -> tuple[str, ...]:
        present = [name for name in _GALLERIES if self._file(name)[0].is_file()]
        if not present:
            raise UserError(
                f"{self.root / _FOLDER}: no test protocol; expected {', '.join(_GALLERIES)} "
                "(.mat), at least one of them"
            )
        subsets = [name for name in _SUBSETS if self._file(name)[0].is_file()]
        return (*present, "all", *subsets)

    @property
    def default_protocols(self) -> tuple[str, ...]:
        """All but the subsets: TestG100 (without it the smallest) first, by size after it."""
        names = [name for name in self.protocols if name not in _SUBSETS]
        main = "TestG100" if "TestG100" in names else names[0]
        return (main, *(name for name in names if name != main))

    def protocol(self, name: str) -> SearchProtocol:
        known_name("config.eval.protocols", name, self.protocols)
        if name == "all":
            return self._whole_test_set()
        if name == self.protocols[0]:
            return self._smallest[0]
        return self._read_protocol(name)[0]

    def _file(self, protocol: str) -> tuple[Path, str]:
        """File and variable of a protocol that has one."""
        file, variable = _SUBSETS.get(protocol, (f"{_FOLDER}/{protocol}.mat", protocol))
        return self.root / file, variable

    @functools.cached_property
    def _pool(self) -> tuple[str, ...]:
        path = self.root / self.required[1]
        with reading(path):
            names = tuple(text(name) for name in cells(read_variable(path, ["pool"])))
            unknown = [name for name in image_index(names) if name not in self._boxes]
            if unknown:
                raise ValueError(f"lists {unknown[0]!r}, which is no image of Images.mat")
            return names

    @functools.cached_property
    def _boxes(self) -> dict[str, Float[np.ndarray, "_G 4"]]:
        """The people of every image of the data set."""
        path = self.root / self.required[0]
        with reading(path):
            names, boxes, without_area = [], [], 0
            for name, _, people, *_ in map(dict.values, read_structs(path, "Img")):
                names.append(text(name))
                rows = [_box(box) for box, *_ in map(dict.values, structs(people))]
                corners = np.array(rows, np.float32).reshape(-1, 4)
                boxes.append(corners[(corners[:, 2:] > corners[:, :2]).all(axis=1)])
                without_area += len(corners) - len(boxes[-1])
            image_index(names)
            self._note_without_area(without_area)
            return dict(zip(names, boxes, strict=True))

    def _annotations(
        self, names: Sequence[str], labels: Iterable[_Label], path: Path
    ) -> Annotations:
        """The boxes of the images, labeled where they are found."""
        boxes = tuple(self._boxes[name] for name in names)
        identity = tuple(np.full(len(rows), -1, np.int32) for rows in boxes)
        strays = []
        for image, box, person in labels:
            same = np.flatnonzero((boxes[image] == box).all(axis=1))
            identity[image][same[:1]] = person
            strays += [] if same.size else [names[image]]
        if strays:
            self.notes.append(
                f"{path}: {len(strays)} labeled boxes, the first in {strays[0]}, are not among the "
                "boxes of Images.mat; these people stay without identity"
            )
        return Annotations(
            names=tuple(names),
            boxes=boxes,
            identity=identity,
            labeled=tuple(ids >= 0 for ids in identity),
            camera=np.zeros(len(names), np.int32),
        )

    @functools.cached_property
    def _smallest(self) -> tuple[SearchProtocol, Int[np.ndarray, "Q"]]:
        return self._read_protocol(self.protocols[0])

    def _read_protocol(self, name: str) -> tuple[SearchProtocol, Int[np.ndarray, "Q"]]:
        """A protocol file, and whom each query is about (numbered by first appearance)."""
        path, variable = self._file(name)
        index = image_index(self._pool)
        # Gallery entries repeat a thousand times.
        image_of = functools.cache(lambda name: _position(text(name), index, "images of pool.mat"))
        box_of = functools.cache(_box)
        person: dict[str, int] = {}
        images, boxes, people, galleries, targets = [], [], [], [], []
        with reading(path):
            for number, row in enumerate(read_structs(path, variable), start=1):
                asked = _only(row["Query"])
                images.append(image_of(asked["imname"]))
                boxes.append(box_of(asked["idlocate"]))
                people.append(person.setdefault(text(asked["idname"]), len(person)))
                gallery = structs(row["Gallery"])
                found = [(image_of(n), box_of(box)) for n, box, *_ in map(dict.values, gallery)]
                galleries.append(np.array([image for image, _ in found], np.int32))
                targets.append([(image, box) for image, box in found if box.size])
                if not (boxes[-1].size and targets[-1]):
                    raise ValueError(
                        f"query {number} has no box, or no gallery image of its person"
                    )
            protocol = SearchProtocol(
                name=name,
                query_image=np.array(images, np.int32),
                query_box=np.array(boxes, np.float32).reshape(-1, 4),
                gallery=tuple(galleries),
                target_images=tuple(np.array([image for image, _ in t], np.int32) for t in targets),
                target_boxes=tuple(np.array([box for _, box in t], np.float32) for t in targets),
            )
        return protocol, np.array(people, np.int32)

    def _whole_test_set(self) -> SearchProtocol:
        small = self._smallest[0]
        galleries = []
        for image, gallery in zip(small.query_image, small.gallery, strict=True):
            rest = np.ones(len(self._pool), bool)
            rest[gallery] = rest[image] = False
            galleries.append(np.concatenate([gallery, np.flatnonzero(rest).astype(np.int32)]))
        return dataclasses.replace(small, name="all", gallery=tuple(galleries))


def _only(body: bytes) -> dict[str, bytes]:
    entries = list(structs(body))
    if len(entries) != 1:
        raise ValueError(f"holds {len(entries)} structs in place of one")
    return entries[0]


def _box(idlocate: bytes) -> Float[np.ndarray, "_n"]:
    """One box from `x, y, w, h`, nothing from an empty array."""
    values = numbers(idlocate).ravel()
    if values.size not in (0, 4):
        raise ValueError(f"has {values.size} numbers for a box, not x, y, w, h")
    check_pixels(values)
    xywh = values.astype(np.int32)
    return np.concatenate([xywh[:2], xywh[:2] + xywh[2:]]).astype(np.float32)


def _position(name: str, index: Mapping[str, int], where: str) -> int:
    if name not in index:
        raise ValueError(f"names the image {name[:120]!r}, which is none of the {where}")
    return index[name]
