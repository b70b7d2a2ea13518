"""CUHK-SYSU (Xiao et al., "Joint Detection and Identification Feature Learning", CVPR 2017)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np
from jaxtyping import Float, Int

from alignps_jax.types import Annotations, SearchProtocol
from data_pipeline.sources.matlab import cells, numbers, read_structs, read_variable, structs, text
from data_pipeline.sources.source import Source, check_pixels, image_index, reading

_GALLERIES = tuple(f"TestG{size}" for size in (50, 100, 500, 1000, 2000, 4000))
# Subsets of the queries with protocols of their own: file and variable.
_SUBSETS = {
    "occlusion": ("annotation/test/subset/Occlusion.mat", "Occlusion1"),
    "resolution": ("annotation/test/subset/Resolution.mat", "Test_Size"),
}
_T = TypeVar("_T")
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

    published: ClassVar[tuple[int, ...]] = (11_206, 5_532, 6_978, 2_900)
    required = (
        "annotation/Images.mat",
        "annotation/pool.mat",
        f"{_FOLDER}/Train.mat",
        f"{_FOLDER}/TestG*.mat",
    )
    photo_folders = ("Image/SSM",)
    annotation_patterns = ("annotation/**/*.mat",)

    def __init__(self, root: str | Path):
        super().__init__(root)
        names = (*_GALLERIES, "all", *_SUBSETS)
        self.protocols = tuple(x for x in names if x == "all" or self._file(x)[0].is_file())

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
            return self._annotations(names, labels)

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
        return self._annotations(self._pool, labels)

    @property
    def default_protocols(self) -> tuple[str, ...]:
        """All but the subsets: TestG100 (without it the smallest) first, by size after it."""
        names = [name for name in self.protocols if name not in _SUBSETS]
        return tuple(sorted(names, key=lambda name: name != "TestG100"))

    def protocol(self, name: str) -> SearchProtocol:
        if name == "all":
            return self._whole_test_set()
        return (self._smallest if name == self.protocols[0] else self._read_protocol(name))[0]

    def _file(self, protocol: str) -> tuple[Path, str]:
        """File and variable of a protocol that has one."""
        file, variable = _SUBSETS.get(protocol, (f"{_FOLDER}/{protocol}.mat", protocol))
        return self.root / file, variable

    @functools.cached_property
    def _pool(self) -> tuple[str, ...]:
        path = self.root / self.required[1]
        with reading(path):
            names = tuple(text(name) for name in cells(read_variable(path, ["pool"])))
            for name in image_index(names):
                _position(name, self._boxes, "images of Images.mat")
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
            self._note(without_area, "boxes without area are left out")
            return dict(zip(names, boxes, strict=True))

    def _annotations(self, names: Sequence[str], labels: Iterable[_Label]) -> Annotations:
        """The boxes of the images, labeled where they are found."""
        boxes = tuple(self._boxes[name] for name in names)
        identity = tuple(np.full(len(rows), -1, np.int32) for rows in boxes)
        strays = 0
        for image, box, person in labels:
            same = np.flatnonzero((boxes[image] == box).all(axis=1))
            identity[image][same[:1]] = person
            strays += not same.size
        self._note(strays, "labeled boxes are not in Images.mat; these people have no identity")
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
        rows = []
        with reading(path):
            for number, row in enumerate(read_structs(path, variable), start=1):
                asked = _only(row["Query"])
                image, box = image_of(asked["imname"]), box_of(asked["idlocate"])
                identity = person.setdefault(text(asked["idname"]), len(person))
                entries = [
                    (image_of(n), box_of(b))
                    for n, b, *_ in map(dict.values, structs(row["Gallery"]))
                ]
                targets = [entry for entry in entries if entry[1].size]
                if not (box.size and targets):
                    raise ValueError(
                        f"query {number} has no box, or no gallery image of its person"
                    )
                rows.append(
                    (
                        image,
                        box,
                        identity,
                        np.array([shown for shown, _ in entries], np.int32),
                        np.array([shown for shown, _ in targets], np.int32),
                        np.array([where for _, where in targets]),
                    )
                )
            if not rows:
                raise ValueError("has no query")
        images, boxes, people, *searched = zip(*rows, strict=True)
        protocol = SearchProtocol(name, np.array(images, np.int32), np.array(boxes), *searched)
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


def _position(name: str, index: Mapping[str, _T], where: str) -> _T:
    if name not in index:
        raise ValueError(f"names the image {name[:120]!r}, which is none of the {where}")
    return index[name]
