"""CUHK-SYSU (Xiao et al., "Joint Detection and Identification Feature Learning", CVPR 2017)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from absl import logging
from jaxtyping import Float, Int, Shaped

from alignps_jax.errors import known_name
from alignps_jax.types import Annotations, SearchProtocol, UserError
from data_pipeline.prepared import PersonSearchBuilder
from data_pipeline.sources.mat_structs import Structs, cells, class_of, numbers, read_structs, text
from data_pipeline.sources.source import (
    Counts,
    Source,
    check_pixels,
    image_index,
    mat_variable,
    quoted,
    reading,
)

GALLERY_SIZES = (50, 100, 500, 1000, 2000, 4000)
_PROTOCOL_FOLDER = "annotation/test/train_test"
# Subsets of the queries with protocols of their own: file and variable.
_SUBSETS = {
    "occlusion": ("annotation/test/subset/Occlusion.mat", "Occlusion1"),
    "resolution": ("annotation/test/subset/Resolution.mat", "Test_Size"),
}


class CuhkSysuSource(Source):
    """Reads CUHK-SYSU's own layout.

    Training images are those that `pool.mat` does not list, sorted by name (as published); their
    identities are the entries of `Train.mat`, in its order. Test images are those of `pool.mat`,
    in its order; their identities are the people of the queries, in the order in which the
    smallest `TestG` file asks for them (all of these files ask for the same people, and list
    every image that holds them). A labeled box is found among the boxes of its image by its
    coordinates; whoever is not found so has no label. Boxes are `x, y, w, h` as int32.

    Protocols: `TestG50` to `TestG4000` (those in the folder), `all` (the smallest gallery, then
    the remaining test images), and `occlusion`, `resolution` (if in the folder). Galleries are in
    file order, images that a file lists twice included. All of them are reported unless the
    configuration names some; `TestG100`, the one of the papers' tables, comes first.
    """

    title = "CUHK-SYSU"
    published: ClassVar[Counts | None] = Counts(11_206, 5_532, 6_978, 2_900)
    required = (
        "annotation/Images.mat",
        "annotation/pool.mat",
        f"{_PROTOCOL_FOLDER}/Train.mat",
    )
    layout = """
  Image/SSM/s1.jpg ...
  annotation/Images.mat
  annotation/pool.mat
  annotation/test/train_test/Train.mat
  annotation/test/train_test/TestG50.mat, TestG100.mat ... (at least one)
  annotation/test/subset/Occlusion.mat, Resolution.mat (optional)
"""

    photo_folders = ("Image/SSM",)

    @functools.cached_property
    def train(self) -> Annotations:
        tested = set(self._pool)
        names = tuple(sorted(name for name in self._boxes if name not in tested))
        path = self.root / self.required[2]
        index = image_index(names, path)
        people = mat_variable(path, ["Train"])
        labels = []
        with reading(path, "the identities with name, number of appearances and scenes"):
            for identity, (_, _, scenes, *_) in enumerate(_identities(people)):
                for name, idlocate, *_ in Structs.of(scenes):
                    image = _known_image(text(name), index, path, "training images")
                    labels.append((image, _box(numbers(idlocate)), identity))
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
        return self._annotations(self._pool, labels, self._protocol_files[protocol.name][0])

    @functools.cached_property
    def protocols(self) -> tuple[str, ...]:
        names = [f"TestG{size}" for size in GALLERY_SIZES]
        present = [name for name in names if self._protocol_files[name][0].is_file()]
        if not present:
            raise UserError(
                f"{self.root / _PROTOCOL_FOLDER}: no test protocol; expected {', '.join(names)} "
                "(.mat), at least one of them"
            )
        subsets = [name for name in _SUBSETS if self._protocol_files[name][0].is_file()]
        return (*present, "all", *subsets)

    @property
    def default_protocols(self) -> tuple[str, ...]:
        """All that the folder has: TestG100 (without it the smallest) first, by size after it."""
        main = "TestG100" if "TestG100" in self.protocols else self.protocols[0]
        return (main, *(name for name in self.protocols if name != main))

    def protocol(self, name: str) -> SearchProtocol:
        known_name("config.eval.protocols", name, self.protocols)
        if name == "all":
            return self._whole_test_set()
        if name == self.protocols[0]:
            return self._smallest[0]
        return self._read_protocol(name)[0]

    @property
    def _protocol_files(self) -> dict[str, tuple[Path, str]]:
        """File and variable of each protocol that has one."""
        galleries = {
            f"TestG{size}": (f"{_PROTOCOL_FOLDER}/TestG{size}.mat", f"TestG{size}")
            for size in GALLERY_SIZES
        }
        files = galleries | _SUBSETS
        return {name: (self.root / file, variable) for name, (file, variable) in files.items()}

    @functools.cached_property
    def _pool(self) -> tuple[str, ...]:
        path = self.root / self.required[1]
        pool = mat_variable(path, ["pool"])
        with reading(path, "a list of image names"):
            names = tuple(text(name) for name in cells(pool))
        image_index(names, path)
        for name in names:
            if name not in self._boxes:
                raise UserError(f"{path}: lists {name}; expected an image of Images.mat")
        return names

    @functools.cached_property
    def _boxes(self) -> dict[str, Float[np.ndarray, "_G 4"]]:
        """The people of every image of the data set."""
        path = self.root / self.required[0]
        with reading(path, "the variable Img: images with name, number of boxes and boxes"):
            names, boxes = [], []
            for name, _, people, *_ in map(dict.values, read_structs(path, "Img")):
                names.append(text(name))
                boxes.append(_people([numbers(idlocate) for idlocate, *_ in Structs.of(people)]))
            image_index(names, path)
            return dict(zip(names, boxes, strict=True))

    def _annotations(
        self,
        names: Sequence[str],
        labels: Sequence[tuple[int, Float[np.ndarray, "4"], int]],
        path: Path,
    ) -> Annotations:
        """The boxes of the images, labeled with (image, box, identity) where they are found."""
        boxes = tuple(self._boxes[name] for name in names)
        identity = tuple(np.full(len(rows), -1, np.int32) for rows in boxes)
        strays = [
            names[image]
            for image, box, person in labels
            if not _label(boxes[image], identity[image], box, person)
        ]
        if strays:
            logging.warning(
                "%s: %d labeled boxes, the first in %s, are not among the boxes of Images.mat; "
                "these people stay without identity",
                path,
                len(strays),
                strays[0],
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
        path, variable = self._protocol_files[name]
        gallery_of = _GalleryReader(path, image_index(self._pool, path))
        person: dict[str, int] = {}
        images, boxes, people, galleries, targets = [], [], [], [], []
        with reading(path, f"an array {variable} with the fields Query and Gallery"):
            for number, row in enumerate(read_structs(path, variable), start=1):
                query = Structs.of(row["Query"])
                asked = dict(zip(query.fields, query.only(), strict=True))
                images.append(gallery_of.image(asked["imname"]))
                boxes.append(_box(numbers(asked["idlocate"])))
                people.append(person.setdefault(text(asked["idname"]), len(person)))
                gallery_images, held = gallery_of.read(Structs.of(row["Gallery"]))
                if not held:
                    raise UserError(
                        f"{path}: query {number} has no gallery image with its person; expected "
                        "at least one idlocate that is not empty"
                    )
                galleries.append(gallery_images)
                targets.append(held)
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
            rest[gallery] = False
            rest[image] = False
            galleries.append(np.concatenate([gallery, np.flatnonzero(rest).astype(np.int32)]))
        return SearchProtocol(
            name="all",
            query_image=small.query_image,
            query_box=small.query_box,
            gallery=tuple(galleries),
            target_images=small.target_images,
            target_boxes=small.target_boxes,
        )


class CuhkSysu(PersonSearchBuilder):
    """CUHK-SYSU: street photos and film frames, 5,532 training identities and 2,900 queries."""

    source_class = CuhkSysuSource


@dataclasses.dataclass(frozen=True)
class _GalleryReader:
    """Reads the galleries of one file; entries repeat a thousand times, so each is read once."""

    path: Path
    index: dict[str, int]
    images: dict[bytes, int] = dataclasses.field(default_factory=dict)
    boxes: dict[bytes, Float[np.ndarray, "4"] | None] = dataclasses.field(default_factory=dict)

    def read(
        self, gallery: Structs
    ) -> tuple[Int[np.ndarray, "N"], list[tuple[int, Float[np.ndarray, "4"]]]]:
        """The images of a gallery, and those that hold the person with the person's box."""
        images, held = [], []
        for name, idlocate, *_ in gallery:
            image = self.images.get(name)
            if image is None:
                image = self.images[name] = self.image(name)
            images.append(image)
            if idlocate not in self.boxes:
                values = numbers(idlocate)
                self.boxes[idlocate] = _box(values) if values.size else None
            box = self.boxes[idlocate]
            if box is not None:
                held.append((image, box))
        return np.array(images, np.int32), held

    def image(self, name: bytes) -> int:
        """The position of the image of that name."""
        return _known_image(text(name), self.index, self.path, "images of pool.mat")


def _identities(people: bytes) -> Iterator[list[bytes]]:
    """The values of the fields of each entry, be they structs in cells or a struct array."""
    if class_of(people) == "struct":
        yield from Structs.of(people)
    else:
        yield from (Structs.of(cell).only() for cell in cells(people))


def _xywh(idlocate: Shaped[np.ndarray, "n"]) -> Int[np.ndarray, "4"]:
    if len(idlocate) != 4:
        raise ValueError(f"found {len(idlocate)} numbers for a box, not x, y, w, h")
    check_pixels(idlocate)
    return idlocate.astype(np.int32)


def _box(idlocate: Shaped[np.ndarray, "n"]) -> Float[np.ndarray, "4"]:
    """One box from `x, y, w, h`."""
    x, y, w, h = _xywh(idlocate)
    return np.array([x, y, x + w, y + h], np.float32)


def _people(idlocates: Sequence[Shaped[np.ndarray, "_n"]]) -> Float[np.ndarray, "G 4"]:
    """The boxes of positive size from rows of `x, y, w, h`."""
    rows = np.array([_xywh(idlocate) for idlocate in idlocates], np.int32).reshape(-1, 4)
    rows = rows[(rows[:, 2:] > 0).all(axis=1)]
    return np.concatenate([rows[:, :2], rows[:, :2] + rows[:, 2:]], axis=1).astype(np.float32)


def _label(
    boxes: Float[np.ndarray, "G 4"],
    identity: Int[np.ndarray, "G"],
    box: Float[np.ndarray, "4"],
    person: int,
) -> bool:
    """Gives the first box with these coordinates the identity; says whether there is one."""
    same = np.flatnonzero((boxes == box).all(axis=1))
    identity[same[:1]] = person
    return same.size > 0


def _known_image(name: str, index: dict[str, int], path: Path, where: str) -> int:
    if name not in index:
        raise UserError(f"{path}: names the image {quoted(name)}; expected one of the {where}")
    return index[name]
