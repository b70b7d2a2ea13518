"""Person search data sets in COCO-style JSON, as annotation tools write it."""

from __future__ import annotations

import functools
from pathlib import Path, PurePosixPath

import numpy as np

from alignps_jax.types import Annotations, SearchProtocol, UserError
from data_pipeline.sources.coco_file import CocoFile
from data_pipeline.sources.source import Source, find_alike, search_everywhere

# The file of a split: by hand or CVAT; CVAT, Roboflow, Label Studio, FiftyOne.
_FILES = (
    "{}.json",
    "annotations/instances_{}.json",
    "{}/annotations/instances_default.json",
    "{}/_annotations.coco.json",
    "{}/result.json",
    "{}/labels.json",
)


class CocoPersonSearchSource(Source):
    """Reads a folder with `train.json` and `test.json`, or `_FILES`, as tools write them.

    docs/data.md describes them. Photos are in `photo_folders`; where there is a folder
    `images/train`, or the file is in `train`, names are relative to that. Identities are numbered
    0, 1, ... within each split. `query.json`, optional, has the same form: each annotation asks for
    one person, who is in at least one other image of `test.json`. Without it every identity that is
    in at least two test images is asked for once, by its first box.

    Records that cannot be used are left out; `notes` lists them, and says what else looks wrong.

    Protocol: `all` (every test image but the query's own, in the order of `test.json`).
    """

    photo_folders = ("images", "", "data", "images/default")
    protocols = ("all",)

    @classmethod
    def missing(cls, root: Path) -> list[str]:
        return [f"{split}.json" for split in ("train", "test") if not _locate(root, split)[0]]

    @functools.cached_property
    def train(self) -> Annotations:
        self.notes += self._files["train"].notes()
        return self._files["train"].annotations[0]

    @functools.cached_property
    def test(self) -> Annotations:
        self.notes += self._files["test"].notes()
        shared = self._files["train"].sizes.keys() & self._files["test"].sizes.keys()
        self._note(len(shared), "photos are in both splits, train and test")
        return self._files["test"].annotations[0]

    def protocol(self, name: str) -> SearchProtocol:
        test, path = self._files["test"], self.root / "query.json"
        number = test.annotations[1]
        index = {image: position for position, image in enumerate(test.sizes)}
        asked = CocoFile(path, test.folder) if path.is_file() else None
        people = [
            person
            for person in (asked.people if asked else test.first())
            if person.image in index and person.identity in number
        ]
        queries = [(index[p.image], p.box, number[p.identity]) for p in people]
        protocol, answered = search_everywhere(name, self.test, queries)
        if asked:
            found = {people[query].number for query in np.flatnonzero(answered)}
            asked.bad += [
                f"annotations[{person.number}]: {person.identity!r} is in no other test image, or "
                f"{person.image!r} is none"
                for person in asked.people
                if person.number not in found
            ]
            self.notes += asked.notes()
        if not answered.any():
            raise UserError(
                f"{test.path}: no identity that is asked for is in two images; there is nobody to "
                "search for"
            )
        return protocol

    def annotation_files(self) -> list[str]:
        located = [_locate(self.root, split)[0] for split in ("train", "test")]
        files = [path for path in (*located, self.root / "query.json") if path and path.is_file()]
        return [str(path.relative_to(self.root)) for path in files]

    def photo_size(self, name: str) -> tuple[int, int] | None:
        return self._files["train"].sizes.get(name) or self._files["test"].sizes.get(name)

    @functools.cached_property
    def _files(self) -> dict[str, CocoFile]:
        places = {split: _locate(self.root, split) for split in ("train", "test")}
        return {split: CocoFile(path, folder) for split, (path, folder) in places.items() if path}

    def _places(self, name: str) -> list[str]:
        """As the tools put photos; the first folder of a name may be there by mistake."""
        first, _, rest = name.partition("/")
        places = [PurePosixPath(folder, name) for folder in self.photo_folders]
        places += [PurePosixPath(first, folder, rest) for folder in self.photo_folders if rest]
        if first.lower() in ("images", "train", "test"):
            places += [PurePosixPath(folder, rest) for folder in self.photo_folders]
        return [str(place) for place in places]


def _locate(root: Path, split: str) -> tuple[Path | None, str]:
    """The file of a split, and its folder, as in `images/train/a.jpg` or `train/a.jpg`."""
    paths = (find_alike(root, pattern.format(split)) for pattern in _FILES)
    path = next((path for path in paths if path), None)
    if path and path.parent != root and path.relative_to(root).parts[0].lower() == split:
        return path, path.relative_to(root).parts[0]
    own = find_alike(root, f"images/{split}")
    return path, own.name if own else ""
