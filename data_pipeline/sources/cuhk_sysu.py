"""CUHK-SYSU (Xiao et al., "Joint Detection and Identification Feature Learning", CVPR 2017)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int

from alignps_jax.types import Annotations, SearchProtocol
from data_pipeline.sources.matlab import cells, numbers, read_variable, structs, text
from data_pipeline.sources.source import Source, corners, image_index, reading

_GALLERIES = tuple(f"TestG{size}" for size in (50, 100, 500, 1000, 2000, 4000))
# Subsets of the queries with protocols of their own: file and variable.
_SUBSETS = {
    "occlusion": ("annotation/test/subset/Occlusion.mat", "Occlusion1"),
    "resolution": ("annotation/test/subset/Resolution.mat", "Test_Size"),
}
_FOLDER = "annotation/test/train_test"


class CuhkSysuSource(Source):
    """Reads CUHK-SYSU's own layout.

    Training images are those that `pool.mat` does not list, sorted by name (as published); their
    identities are the entries of `Train.mat`, in its order. Test images are those of `pool.mat`,
    in its order; their identities are the people of the queries, in the order in which the
    smallest `TestG` file asks for them (all of these files ask for the same people, and list
    every image that holds them). A labeled box is found among the boxes of its image by its
    coordinates; a person who is not found so has no label. Boxes are `x, y, w, h` as int32.

    Protocols: `TestG50` to `TestG4000`, `occlusion`, `resolution` (those in the folder), and `all`
    (the smallest gallery, then the remaining test images). Galleries are in file order, images that
    a file lists twice included.
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
        index = image_index(sorted(self._boxes.keys() - self._pool.keys()))
        path = self.root / self.required[2]
        labels = []
        with reading(path):
            for identity, entry in enumerate(cells(read_variable(path, "Train"))):
                (person,) = structs(entry)
                _, _, scenes, *_ = person.values()
                for name, box, *_ in map(dict.values, structs(scenes)):
                    labels.append((index[text(name)], _box(box), identity))
            return self._annotations(index, labels)

    @functools.cached_property
    def test(self) -> Annotations:
        small, people = self._smallest
        labels = []
        for query, person in enumerate(people):
            images = [small.query_image[query], *small.target_images[query]]
            boxes = [small.query_box[query], *small.target_boxes[query]]
            labels += [(*shown, person) for shown in zip(images, boxes, strict=True)]
        return self._annotations(self._pool, labels)

    @property
    def default_protocols(self) -> tuple[str, ...]:
        """All but the subsets: TestG100, the one of the papers' tables, then by size."""
        names = [name for name in self.protocols if name not in _SUBSETS]
        return tuple(sorted(names, key=lambda name: name != "TestG100"))

    def _search(self, name: str) -> SearchProtocol:
        small = self._smallest[0]
        if name != "all":
            return small if name == small.name else self._read_protocol(name)[0]
        images = np.arange(len(self._pool), dtype=np.int32)
        galleries = tuple(
            np.concatenate([gallery, np.delete(images, np.append(gallery, image))])
            for image, gallery in zip(small.query_image, small.gallery, strict=True)
        )
        return dataclasses.replace(small, name="all", gallery=galleries)

    def _file(self, protocol: str) -> tuple[Path, str]:
        """File and variable of a protocol that has one."""
        file, variable = _SUBSETS.get(protocol, (f"{_FOLDER}/{protocol}.mat", protocol))
        return self.root / file, variable

    @functools.cached_property
    def _pool(self) -> dict[str, int]:
        """The positions of the test images."""
        path = self.root / self.required[1]
        with reading(path):
            pool = image_index([text(name) for name in cells(read_variable(path, "pool"))])
            if strange := pool.keys() - self._boxes.keys():
                raise ValueError(f"names the image {min(strange)!r}, which Images.mat lacks")
            return pool

    @functools.cached_property
    def _boxes(self) -> dict[str, Float[np.ndarray, "_G 4"]]:
        """The people of every image of the data set."""
        path = self.root / self.required[0]
        with reading(path):
            names, boxes, without_area = [], [], 0
            for name, _, people, *_ in map(dict.values, structs(read_variable(path, "Img"))):
                rows = [_box(box) for box, *_ in map(dict.values, structs(people))]
                corners = np.array(rows, np.float32).reshape(-1, 4)
                names.append(text(name))
                boxes.append(corners[(corners[:, 2:] > corners[:, :2]).all(axis=1)])
                without_area += len(corners) - len(boxes[-1])
            self._note(without_area, "boxes without area are left out")
            return dict(zip(image_index(names), boxes, strict=True))

    def _annotations(
        self, names: Collection[str], labels: Iterable[tuple[int, Float[np.ndarray, "4"], int]]
    ) -> Annotations:
        """The boxes of the images; `labels` are image, box and identity."""
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
        # Gallery entries repeat a thousand times.
        image_of = functools.cache(lambda name: self._pool[text(name)])
        box_of = functools.cache(_box)
        person: dict[str, int] = {}
        rows = []
        with reading(path):
            for row in structs(read_variable(path, variable)):
                (asked,) = structs(row["Query"])
                entries = [
                    (image_of(name), box_of(box))
                    for name, box, *_ in map(dict.values, structs(row["Gallery"]))
                ]
                targets = [entry for entry in entries if entry[1].size]
                query = (
                    image_of(asked["imname"]),
                    box_of(asked["idlocate"]),
                    person.setdefault(text(asked["idname"]), len(person)),
                    np.array([image for image, _ in entries], np.int32),
                    np.array([image for image, _ in targets], np.int32),
                    np.array([box for _, box in targets]),
                )
                if not (query[1].size and targets):
                    raise ValueError("asks for a person without a box, or whom no image shows")
                rows.append(query)
            images, boxes, people, *searched = zip(*rows, strict=True)
        protocol = SearchProtocol(name, np.array(images, np.int32), np.array(boxes), *searched)
        return protocol, np.array(people, np.int32)


def _box(idlocate: bytes) -> Float[np.ndarray, "*_n 4"]:
    """One box from `x, y, w, h`, none (0 4) from an empty array."""
    values = numbers(idlocate).ravel()
    if values.size not in (0, 4):
        raise ValueError(f"has {values.size} numbers for a box, not x, y, w, h")
    return corners(np.trunc(values)).astype(np.float32)
