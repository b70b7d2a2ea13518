"""The built-in synthetic data set, written in CUHK-SYSU's own layout.

Clothes, hair and bags of the people belong to their identity, while size, pose, side seen, light,
occlusion and place change from photo to photo. Some people have no identity.
"""

import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
import scipy.io

from alignps_jax.errors import UserError
from alignps_jax.log import progress
from data_pipeline.synthetic.figures import Appearance, sample_person
from data_pipeline.synthetic.scenes import draw_scene

# Part of `synthetic.json`: raise it when the same spec is to give other files.
_VERSION = 2
_SPEC_FILE = "synthetic.json"
# Photos of its split in which each identity appears, at least.
_FEWEST_PHOTOS = 4
_QUERIES_PER_IDENTITY = 2
_GALLERY_SIZES = (50, 100)
# People in a photo: those with identity, and all of them at most.
_FEWEST, _MOST, _ALL = 4, 6, 7
_QUALITY = (cv2.IMWRITE_JPEG_QUALITY, 92)
# Random streams; the seed and one of these start every generator.
_PEOPLE, _TRAIN, _TEST, _PHOTO, _SEARCH = range(5)
# File name -> identity -> x, y, width, height; people without identity have negative numbers.
_Photos = dict[str, dict[int, list[int]]]


@dataclasses.dataclass(frozen=True)
class SyntheticSpec:
    """What to draw, as in `config.data.synthetic`; sizes are in pixels."""

    seed: int
    train_images: int
    test_images: int
    train_identities: int
    test_identities: int
    height: int
    width: int

    def generator(self, *stream: int) -> np.random.Generator:
        """A random stream of its own, so that it does not matter what is drawn in which order."""
        return np.random.default_rng((self.seed, *stream))


def write_synthetic(root: pathlib.Path, spec: SyntheticSpec) -> None:
    """Draws the data set into `root`, unless it is there already.

    There is a `TestG100.mat` where there are more than 100 test photos; with fewer than 51, the
    galleries of `TestG50.mat` are all other test photos. The set is complete or absent.

    Raises:
      UserError: there are too few photos for every identity to appear often enough; or `root`
        holds something else.
    """
    description = json.dumps({"version": _VERSION, **dataclasses.asdict(spec)})
    file = root / _SPEC_FILE
    if file.is_file() and file.read_text(errors="replace") == description:
        return
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(
            f"{root}: found other files, expected the synthetic data set {description}; choose "
            "another --config.data.root or delete them"
        )
    train = _deal("train", spec, spec.generator(_TRAIN))
    test = _deal("test", spec, spec.generator(_TEST))
    test = [[spec.train_identities + identity for identity in photo] for photo in test]
    root.parent.mkdir(parents=True, exist_ok=True)
    count = len(train) + len(test)
    print(f"synthetic: found no scenes in {root}, drawing {count:,} photos there", flush=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as temporary:
        folder = pathlib.Path(temporary) / root.name
        _write(folder, spec, train, test)
        (folder / _SPEC_FILE).write_text(description)
        folder.rename(root)


def _deal(split: str, spec: SyntheticSpec, rng: np.random.Generator) -> list[list[int]]:
    """The identities in every photo of a split; all appear equally often, give or take one."""
    photos, identities = getattr(spec, f"{split}_images"), getattr(spec, f"{split}_identities")
    counts = np.zeros(identities, int)
    dealt = []
    for size in rng.integers(_FEWEST, _MOST + 1, photos):
        chosen = np.lexsort((rng.random(identities), counts))[:size]
        counts[chosen] += 1
        dealt.append(chosen.tolist())
    if counts.min() < _FEWEST_PHOTOS:
        raise UserError(
            f"config.data.synthetic.{split}_images: found {photos}, expected more, so that each of "
            f"the {identities} identities appears in {_FEWEST_PHOTOS} photos"
        )
    return dealt


def _write(
    folder: pathlib.Path, spec: SyntheticSpec, train: list[list[int]], test: list[list[int]]
) -> None:
    """Draws all photos and writes all annotations."""
    protocols = folder / "annotation/test/train_test"
    protocols.mkdir(parents=True)
    photos = [*_draw(folder / "Image/SSM", spec, [*train, *test]).items()]
    trained, tested = dict(photos[: len(train)]), dict(photos[len(train) :])
    images = []
    for name, people in photos:
        boxes = _structs([{"idlocate": _row(box), "ishard": _row([0])} for box in people.values()])
        images.append({"imname": name, "nAppear": _row([len(people)]), "box": boxes})
    _save(folder / "annotation/Images.mat", "Img", _structs(images))
    _save(folder / "annotation/pool.mat", "pool", _cells([*tested]))
    entries = []
    for identity in range(spec.train_identities):
        scenes = [
            _located(name, trained, identity) for name in trained if identity in trained[name]
        ]
        count, name = _row([len(scenes)]), f"p{identity + 1}"
        entry = {"idname": name, "nAppear": count, "scene": _structs(scenes)}
        entries.append(_structs([entry]))
    _save(protocols / "Train.mat", "Train", _cells(entries))
    identities = range(spec.train_identities, spec.train_identities + spec.test_identities)
    for size in _GALLERY_SIZES:
        if size < len(tested) or size == _GALLERY_SIZES[0]:
            rows = [row for one in identities for row in _searches(one, tested, size, spec)]
            _save(protocols / f"TestG{size}.mat", f"TestG{size}", _structs(rows))


def _draw(folder: pathlib.Path, spec: SyntheticSpec, dealt: list[list[int]]) -> _Photos:
    """Draws photos of these identities, each with some people without identity."""
    folder.mkdir(parents=True)
    rng = spec.generator(_PEOPLE)
    people: list[Appearance] = []
    looks = np.empty((0, 0))
    for _ in range(spec.train_identities + spec.test_identities):
        people.append(sample_person(rng, looks, candidates=20))
        looks = np.stack([*looks, people[-1].describe()])
    photos: _Photos = {}
    for index, identities in enumerate(progress(dealt, desc="drawing", unit="photo")):
        rng = spec.generator(_PHOTO, index)
        strangers = rng.integers(0, _ALL + 1 - len(identities))
        shown = [people[identity] for identity in identities]
        shown += [sample_person(rng, looks, candidates=4) for _ in range(strangers)]
        image, boxes = draw_scene(shown, spec.height, spec.width, rng)
        name = f"s{index + 1:05d}.jpg"
        (folder / name).write_bytes(cv2.imencode(".jpg", image, _QUALITY)[1].tobytes())
        numbers = [*identities, *range(-strangers, 0)]
        photos[name] = dict(zip(numbers, boxes.tolist(), strict=True))
    return photos


def _searches(
    identity: int, photos: _Photos, size: int, spec: SyntheticSpec
) -> list[dict[str, np.ndarray]]:
    """Queries of one identity; galleries start with its photos, as the real ones."""
    rng = spec.generator(_SEARCH, identity)
    holding = [name for name in photos if identity in photos[name]]
    others = [name for name in photos if identity not in photos[name]]
    rows = []
    for query in rng.permutation(holding)[:_QUERIES_PER_IDENTITY].tolist():
        gallery = [name for name in holding if name != query] + rng.permutation(others).tolist()
        asked = _located(query, photos, identity) | {"idname": f"p{identity + 1}"}
        found = _structs([_located(name, photos, identity) for name in gallery[:size]])
        rows.append({"Query": _structs([asked]), "Gallery": found})
    return rows


def _located(name: str, photos: _Photos, identity: int) -> dict[str, object]:
    """Name, box and hardness; the last two are empty where the photo does not hold the identity."""
    box = photos[name].get(identity, [])
    return {"imname": name, "idlocate": _row(box), "ishard": _row([0] if box else [])}


def _row(values: Sequence[int]) -> np.ndarray:
    """Whole numbers in the smallest unsigned type, as MATLAB stores them; nothing is of floats."""
    return np.array([values], np.min_scalar_type(max(values)) if values else float)


def _structs(rows: Sequence[Mapping[str, object]]) -> np.ndarray:
    """A 1×N MATLAB struct array."""
    table = np.empty((1, len(rows)), [(field, object) for field in rows[0]])
    table[0] = [tuple(row.values()) for row in rows]
    return table


def _cells(values: Sequence[object]) -> np.ndarray:
    """An N×1 MATLAB cell array."""
    cells = np.empty((len(values), 1), object)
    for index, value in enumerate(values):
        cells[index, 0] = value
    return cells


def _save(file: pathlib.Path, name: str, value: np.ndarray) -> None:
    scipy.io.savemat(file, {name: value}, do_compression=True)
