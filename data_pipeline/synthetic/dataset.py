"""The built-in synthetic data set, written in CUHK-SYSU's own on-disk layout.

Photos of drawn people whose clothes, hair and bags belong to their identity, while size, pose,
side seen, light, occlusion and place change from photo to photo; every photo may also show
people without identity. Training and test people are different. All of it follows from
`SyntheticSpec`; each photo has its own random stream, so that it does not matter in which order
or by which process photos are drawn.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
import tempfile
from collections.abc import Sequence

import cv2
import numpy as np
import scipy.io
from jaxtyping import Float, Int

from alignps_jax.log import progress
from alignps_jax.types import UserError
from data_pipeline.synthetic.people import (
    Appearance,
    describe_all,
    sample_appearances,
    sample_stranger,
)
from data_pipeline.synthetic.scenes import draw_scene

# Part of `synthetic.json`: raise it when the same spec is to give other files.
_VERSION = 1
_SPEC_FILE = "synthetic.json"
# Every identity appears in at least this many photos of its split.
_MIN_TRAIN_APPEARANCES, _MIN_TEST_APPEARANCES = 5, 4
# More would not leave room for distractors in the smallest gallery.
_MAX_TEST_APPEARANCES = 40
_QUERIES_PER_IDENTITY = 2
_GALLERY_SIZES = (50, 100)
# How many people with identity are in a photo: taken in turn, so that the sum is known.
_LABELLED_PER_PHOTO = (5, 6, 5, 4, 6, 5)
_MAX_PEOPLE, _MIN_PEOPLE = 7, 4
_MIN_SIDE = 64
_JPEG_QUALITY = 92
# People that are hard to find: short (in shares of the photo's height) or well covered.
_HARD_HEIGHT, _HARD_VISIBLE = 0.25, 0.7
# Random streams; the seed and one of these start every generator.
_PEOPLE, _TRAIN_PLAN, _TEST_PLAN, _PHOTO, _SEARCH = range(5)


@dataclasses.dataclass(frozen=True)
class SyntheticSpec:
    """What to draw; the fields of `config.data.synthetic`. Sizes are in pixels."""

    seed: int
    train_images: int
    test_images: int
    train_identities: int
    test_identities: int
    height: int
    width: int


@dataclasses.dataclass(frozen=True)
class _Person:
    """One person in one photo, as annotated; `identity` is -1 for passers-by."""

    identity: int
    box: tuple[int, int, int, int]
    hard: bool


@dataclasses.dataclass(frozen=True)
class _Photo:
    """File name and people of one photo."""

    name: str
    people: tuple[_Person, ...]

    def find(self, identity: int) -> _Person | None:
        """The person of this identity, if the photo holds it."""
        return next((person for person in self.people if person.identity == identity), None)


def write_synthetic(root: pathlib.Path, spec: SyntheticSpec) -> None:
    """Draws the data set into `root`, unless it is there already.

    Files: `Image/SSM/*.jpg`, `annotation/Images.mat`, `pool.mat` and, in
    `annotation/test/train_test`, `Train.mat` and the search protocols: `TestG50.mat` and
    `TestG100.mat` where there are enough test photos for such galleries, with fewer than 51 only
    `TestG50.mat`, whose galleries then are all other test photos. Everything is drawn in a
    temporary folder beside `root` that is renamed at the end, so `root` is either whole or absent
    (a killed process leaves the temporary folder, `.<name>-<random>`, which may be deleted).

    Raises:
      UserError: a field of `spec` is out of range or there are too few photos for every identity
        to appear often enough; or `root` exists and is not this very data set.
    """
    _check_ranges(spec)
    train_plan, test_plan = _plans(spec)
    description = json.dumps({"version": _VERSION, **dataclasses.asdict(spec)})
    if _holds(root, description):
        return
    photos = spec.train_images + spec.test_images
    print(f"synthetic: found no scenes in {root}, drawing {photos:,} photos there", flush=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as temporary:
        folder = pathlib.Path(temporary) / root.name
        _write(folder, spec, train_plan, test_plan)
        (folder / _SPEC_FILE).write_text(description)
        try:
            os.rename(folder, root)
        except OSError:
            # Another process may have drawn the same in the meantime.
            if not _holds(root, description):
                raise


def _holds(root: pathlib.Path, description: str) -> bool:
    """Whether `root` is the described data set (False: absent or empty)."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    file = root / _SPEC_FILE
    if not file.is_file():
        raise UserError(
            f"{root}: found something without {_SPEC_FILE}, expected an absent or empty folder or "
            "this synthetic data set; choose another --config.data.root"
        )
    found = file.read_text(errors="replace")
    if found != description:
        raise UserError(
            f"{file}: found {found[:300]!r}, expected {description!r}; choose another "
            f"--config.data.root or delete {root}"
        )
    return True


def _check_ranges(spec: SyntheticSpec) -> None:
    smallest = {"seed": 0, "height": _MIN_SIDE, "width": _MIN_SIDE}
    for field, value in dataclasses.asdict(spec).items():
        if value < smallest.get(field, 1):
            raise UserError(
                f"config.data.synthetic.{field}: found {value}, expected at least "
                f"{smallest.get(field, 1)}"
            )


def _plans(spec: SyntheticSpec) -> tuple[list[list[int]], list[list[int]]]:
    """The identities in every training and in every test photo; test ones are counted on."""
    train = _plan(
        "train_images",
        spec.train_images,
        spec.train_identities,
        (_MIN_TRAIN_APPEARANCES, spec.train_images),
        _generator(spec, _TRAIN_PLAN),
    )
    test = _plan(
        "test_images",
        spec.test_images,
        spec.test_identities,
        (_MIN_TEST_APPEARANCES, _MAX_TEST_APPEARANCES),
        _generator(spec, _TEST_PLAN),
    )
    return train, [[spec.train_identities + identity for identity in photo] for photo in test]


def _plan(
    field: str, photos: int, identities: int, appearances: tuple[int, int], rng: np.random.Generator
) -> list[list[int]]:
    """Deals identities to photos so that all appear equally often (give or take one).

    Raises:
      UserError: naming `field`, when there are too few photos for the fewest `appearances`.
    """
    per_photo = [min(count, identities) for count in _LABELLED_PER_PHOTO]
    totals = itertools.accumulate(itertools.cycle(per_photo))
    needed = 1 + next(i for i, total in enumerate(totals) if total >= appearances[0] * identities)
    if photos < needed:
        raise UserError(
            f"config.data.synthetic.{field}: found {photos}, expected at least {needed} so that "
            f"each of the {identities} identities appears in {appearances[0]} photos"
        )
    counts = np.zeros(identities, np.int64)
    plan = []
    for size in rng.permutation(np.resize(per_photo, photos)):
        order = np.lexsort((rng.random(identities), counts))
        chosen = [int(identity) for identity in order[:size] if counts[identity] < appearances[1]]
        counts[chosen] += 1
        plan.append(chosen)
    return plan


def _write(
    folder: pathlib.Path,
    spec: SyntheticSpec,
    train_plan: Sequence[list[int]],
    test_plan: Sequence[list[int]],
) -> None:
    """Draws all photos and writes all annotations."""
    images, tests = folder / "Image/SSM", folder / "annotation/test/train_test"
    images.mkdir(parents=True)
    tests.mkdir(parents=True)
    count = spec.train_identities + spec.test_identities
    people = sample_appearances(_generator(spec, _PEOPLE), count)
    known = describe_all(people)
    plan = [*train_plan, *test_plan]
    photos = [
        _draw_photo(images, index, identities, people, known, spec)
        for index, identities in enumerate(progress(plan, desc="drawing", unit="photo"))
    ]
    train, test = photos[: len(train_plan)], photos[len(train_plan) :]
    _save(folder / "annotation/Images.mat", "Img", _rows([_image_row(photo) for photo in photos]))
    _save(folder / "annotation/pool.mat", "pool", _cells([photo.name for photo in test]))
    rows = [_identity_row(identity, train) for identity in range(spec.train_identities)]
    _save(tests / "Train.mat", "Train", _cells([_rows([row]) for row in rows]))
    fitting = [size for size in _GALLERY_SIZES if size < len(test)] or _GALLERY_SIZES[:1]
    for size in fitting:
        rows = [
            row
            for identity in range(spec.train_identities, count)
            for row in _search_rows(identity, test, size, _generator(spec, _SEARCH, identity))
        ]
        _save(tests / f"TestG{size}.mat", f"TestG{size}", _rows(rows))


def _draw_photo(
    folder: pathlib.Path,
    index: int,
    identities: Sequence[int],
    people: Sequence[Appearance],
    known: Float[np.ndarray, "P D"],
    spec: SyntheticSpec,
) -> _Photo:
    """Draws one photo of these identities and perhaps some passers-by, and writes it."""
    rng = _generator(spec, _PHOTO, index)
    strangers = max(_MIN_PEOPLE - len(identities), int(rng.choice(3, p=(0.5, 0.3, 0.2))))
    strangers = min(strangers, _MAX_PEOPLE - len(identities))
    shown = [people[identity] for identity in identities]
    shown += [sample_stranger(rng, known) for _ in range(strangers)]
    labels = [*identities, *[-1] * strangers]
    # People are placed one after another: mixing spreads the crowded places over all.
    order = rng.permutation(len(shown))
    scene = draw_scene([shown[i] for i in order], spec.height, spec.width, rng)
    name = f"s{index + 1:05d}.jpg"
    quality = (cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY)
    (folder / name).write_bytes(cv2.imencode(".jpg", scene.image, quality)[1].tobytes())
    return _Photo(
        name,
        tuple(
            _Person(
                identity=labels[i],
                box=_whole(box),
                hard=bool(box[3] < _HARD_HEIGHT * spec.height or visible < _HARD_VISIBLE),
            )
            for i, box, visible in zip(order, scene.boxes, scene.visible, strict=True)
        ),
    )


def _whole(box: Int[np.ndarray, "4"]) -> tuple[int, int, int, int]:
    x, y, width, height = map(int, box)
    return x, y, width, height


def _image_row(photo: _Photo) -> dict[str, object]:
    boxes: list[dict[str, object]] = [
        {"idlocate": _box(person), "ishard": _scalar(person.hard)} for person in photo.people
    ]
    return {"imname": photo.name, "nAppear": _scalar(len(boxes)), "box": _rows(boxes)}


def _identity_row(identity: int, photos: Sequence[_Photo]) -> dict[str, object]:
    found = [(photo, photo.find(identity)) for photo in photos]
    scenes = [_located(photo, person) for photo, person in found if person is not None]
    return {"idname": _idname(identity), "nAppear": _scalar(len(scenes)), "scene": _rows(scenes)}


def _search_rows(
    identity: int, photos: Sequence[_Photo], size: int, rng: np.random.Generator
) -> list[dict[str, object]]:
    """Queries of one identity; galleries start with the photos that hold it, as the real ones.

    The same `rng` gives the same queries for every `size`, and galleries that contain the smaller.
    """
    holding = [photo for photo in photos if photo.find(identity) is not None]
    others = [photo for photo in photos if photo.find(identity) is None]
    rows: list[dict[str, object]] = []
    for query in rng.permutation(len(holding))[:_QUERIES_PER_IDENTITY]:
        matches = [photo for photo in holding if photo is not holding[query]]
        distractors = [others[i] for i in rng.permutation(len(others))]
        gallery = [*matches, *distractors][:size]
        located = _located(holding[query], holding[query].find(identity))
        rows.append(
            {
                "Query": _rows([{**located, "idname": _idname(identity)}]),
                "Gallery": _rows([_located(photo, photo.find(identity)) for photo in gallery]),
            }
        )
    return rows


def _located(photo: _Photo, person: _Person | None) -> dict[str, object]:
    """Name, box and hardness; the last two are empty where the person is not in the photo."""
    if person is None:
        return {"imname": photo.name, "idlocate": np.zeros((1, 0)), "ishard": np.zeros((1, 0))}
    return {"imname": photo.name, "idlocate": _box(person), "ishard": _scalar(person.hard)}


def _idname(identity: int) -> str:
    return f"p{identity + 1}"


def _box(person: _Person) -> np.ndarray:
    """x, y, width, height in the smallest unsigned type, as MATLAB stores whole numbers."""
    return np.array([person.box], np.min_scalar_type(max(person.box)))


def _scalar(value: int) -> np.ndarray:
    return np.array([[value]], np.min_scalar_type(int(value)))


def _rows(rows: Sequence[dict[str, object]]) -> np.ndarray:
    """A 1×N MATLAB struct array."""
    table = np.empty((1, len(rows)), [(field, object) for field in rows[0]])
    for index, row in enumerate(rows):
        table[0, index] = tuple(row.values())
    return table


def _cells(values: Sequence[object]) -> np.ndarray:
    """An N×1 MATLAB cell array."""
    cells = np.empty((len(values), 1), object)
    for index, value in enumerate(values):
        cells[index, 0] = value
    return cells


def _save(file: pathlib.Path, name: str, value: np.ndarray) -> None:
    scipy.io.savemat(file, {name: value}, do_compression=True)


def _generator(spec: SyntheticSpec, *stream: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence((spec.seed, *stream)))
