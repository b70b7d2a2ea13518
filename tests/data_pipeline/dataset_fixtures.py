"""Writes miniature data sets in the layouts of CUHK-SYSU, PRW and COCO-style JSON."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import scipy.io
from ml_collections import ConfigDict

from configs.cuhk import get_config

Box = Sequence[float]  # x, y, w, h
Located = tuple[str, Box | None]  # image and the person's box in it


def data_config(name: str, root: Path, prepared_dir: Path | None = None) -> ConfigDict:
    """`config.data` for a data set."""
    data = get_config().data
    data.name = name
    data.root = str(root)
    if prepared_dir is not None:
        data.prepared_dir = str(prepared_dir)
    return data


def write_photo(path: Path, height: int, width: int, seed: int = 0) -> bytes:
    """A smooth random picture; returns the encoded bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    encoded = cv2.imencode(path.suffix, image)[1].tobytes()
    path.write_bytes(encoded)
    return encoded


def write_cuhk(
    root: Path,
    images: Mapping[str, Sequence[Box]],
    pool: Sequence[str],
    train: Mapping[str, Sequence[Located]],
    protocols: Mapping[str, Sequence[tuple[Located, str, Sequence[Located]]]],
) -> None:
    """CUHK-SYSU's annotation files, nested as MATLAB saved the real ones.

    Identities of `train` by name, and queries (where, name, gallery) of `protocols` by file.
    """
    folder = root / "annotation" / "test" / "train_test"
    rows = [
        {
            "imname": name,
            "nAppear": len(boxes),
            "box": structs([{"idlocate": matrix(box), "ishard": 0} for box in boxes]),
        }
        for name, boxes in images.items()
    ]
    save(root / "annotation" / "Images.mat", "Img", structs(rows))
    save(root / "annotation" / "pool.mat", "pool", cells(list(pool)))
    people = [
        structs([{"idname": name, "nAppear": len(where), "scene": structs(map(located, where))}])
        for name, where in train.items()
    ]
    save(folder / "Train.mat", "Train", cells(people))
    subsets = {"Occlusion": "Occlusion1", "Resolution": "Test_Size"}
    for file, queries in protocols.items():
        rows = [
            {
                "Query": structs([{**located(where), "idname": name}]),
                "Gallery": structs(map(located, gallery)),
            }
            for where, name, gallery in queries
        ]
        beside = root / "annotation" / "test" / "subset" if file in subsets else folder
        save(beside / f"{file}.mat", subsets.get(file, file), structs(rows))


def write_small_cuhk(root: Path) -> None:
    """Six images, each with the same two boxes; three protocols and photos of 80 x 70 pixels."""
    box, other = (2, 3, 40, 50), (30, 10, 20, 50)
    images = {f"s{number}.jpg": [box, other] for number in range(1, 7)}
    query = (("s1.jpg", box), "p30", [("s2.jpg", other), ("s3.jpg", None), ("s4.jpg", box)])
    again = (("s2.jpg", other), "p31", [("s4.jpg", other), ("s1.jpg", None)])
    galleries = {"TestG50": [query, again], "TestG100": [again, query], "Occlusion": [again]}
    train = {"p7": [("s5.jpg", box), ("s6.jpg", other)], "p1": [("s6.jpg", box)]}
    write_cuhk(root, images, ["s1.jpg", "s4.jpg", "s3.jpg", "s2.jpg"], train, galleries)
    for seed, name in enumerate(images):
        write_photo(root / "Image" / "SSM" / name, 80, 70, seed)


def write_prw(
    root: Path,
    train: Mapping[str, Sequence[Sequence[float]]],
    test: Mapping[str, Sequence[Sequence[float]]],
    queries: Sequence[tuple[object, ...]],
    variables: Sequence[str] = ("box_new",),
) -> None:
    """PRW's files from rows `id, x, y, w, h` per frame; `variables` are used in turn."""
    for number, (name, rows) in enumerate({**train, **test}.items()):
        array = np.array(rows, float).reshape(-1, 5)
        save(root / "annotations" / f"{name}.jpg.mat", variables[number % len(variables)], array)
    for split, frames in (("train", train), ("test", test)):
        names = cells(list(frames))
        save(root / f"frame_{split}.mat", f"img_index_{split}", names)
    lines = "".join(" ".join(map(str, query)) + "\r\n" for query in queries)
    (root / "query_info.txt").write_bytes(lines.encode())


def coco(
    images: Mapping[str, tuple[int, int]], people: Sequence[tuple[str, Box, int]]
) -> dict[str, list[dict[str, object]]]:
    """The content of one JSON file: sizes (height, width) by name, and (image, box, person)."""
    ids = {name: 100 + 7 * number for number, name in enumerate(images)}
    return {
        "images": [
            {"id": ids[name], "file_name": name, "height": height, "width": width}
            for name, (height, width) in images.items()
        ],
        "annotations": [
            {"id": number, "image_id": ids[name], "bbox": list(box), "person_id": person}
            for number, (name, box, person) in enumerate(people)
        ],
    }


def write_json(path: Path, content: object) -> None:
    """With a byte-order mark, as editors on Windows leave it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), "utf-8-sig")


def structs(rows: object) -> np.ndarray:
    """A 1xN struct array (0x0 without rows, as MATLAB has it)."""
    rows = list(rows)
    if not rows:
        return np.zeros((0, 0))
    table = np.empty((1, len(rows)), [(field, object) for field in rows[0]])
    for number, row in enumerate(rows):
        table[0, number] = tuple(row.values())
    return table


def cells(values: Sequence[object]) -> np.ndarray:
    """An Nx1 cell array."""
    table = np.empty((len(values), 1), object)
    for number, value in enumerate(values):
        table[number, 0] = value
    return table


def located(where: Located) -> dict[str, object]:
    name, box = where
    empty = np.zeros((1, 0))
    return {
        "imname": name,
        "idlocate": empty if box is None else matrix(box),
        "ishard": empty if box is None else 0,
    }


def matrix(box: Box) -> np.ndarray:
    """One row in the smallest type that holds it, as MATLAB saves whole numbers."""
    values = np.array([box])
    kind = np.int16 if values.min() < 0 else np.uint8 if values.max() < 256 else np.uint16
    return values.astype(kind)


def save(path: Path, name: str, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, {name: value}, do_compression=True)
