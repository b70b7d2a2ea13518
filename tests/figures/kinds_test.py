"""The kinds of pictures: composition, files and errors; networks find what they are told."""

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from alignps_jax.drawing import canvas as visualize
from alignps_jax.drawing.canvas import BLUE, CLOUD_COLORS, GREEN, RED, YELLOW, draw_point_clouds
from alignps_jax.evaluation.detections_io import save_detections
from alignps_jax.figures import datasets as dataset_figures
from alignps_jax.figures import kinds as figures
from alignps_jax.figures import photos as photo_figures
from alignps_jax.files import write_image
from alignps_jax.gallery.photos import GalleryReader
from alignps_jax.gallery.query import Query
from alignps_jax.inference.detector import Detector
from alignps_jax.inference.location_maps import LocationMaps
from alignps_jax.media.photos import read_photo
from alignps_jax.types import Detections, GalleryDetections, IncompleteError, UserError
from configs import tiny
from data_pipeline.datasets import load_test
from tests.drawing.canvas_test import extent, gray, has

MAX_PIXELS = 2 * 10**7

CONFIG = tiny.get_config().lock()
HEAD = 2 * visualize.LINE_HEIGHT + visualize.GAP  # what stands above the first photo


class FakeDetector(Detector):
    """Finds people at given places of every photo: {shape: (boxes, scores, embeddings)}.

    The maps are those of a photo that is not resized, with regular sampling points; the embedding
    is (1, 0) at one location and (0, 1) elsewhere.
    """

    config = CONFIG

    def __init__(self, found=None, offsets=("output3", "lateral3", "lateral4"), spot=(2, 3)):
        self.found = found or {}
        self.offsets = offsets
        self.spot = spot

    def detect(self, image):
        none = ([], [], [])
        boxes, scores, embeddings = self.found.get(image.shape[:2], none)
        return Detections(
            np.array(boxes, np.float32).reshape(-1, 4),
            np.array(scores, np.float32),
            np.array(embeddings, np.float32).reshape(-1, 2),
            np.ones(len(scores), bool),
        )

    def maps(self, image):
        height, width = (-(-side // 32) * 4 for side in image.shape[:2])
        embeddings = np.zeros((height, width, 2), np.float32)
        embeddings[..., 1] = 1
        embeddings[self.spot] = (1, 0)
        shapes = {name: (height, width) for name in self.offsets}
        if "lateral4" in shapes:
            shapes["lateral4"] = (height // 2, width // 2)
        return LocationMaps(
            embeddings=(embeddings,),
            strides=(8,),
            offsets={name: np.zeros((*shape, 9, 2)) for name, shape in shapes.items()},
            size=np.array(image.shape[:2]),
            scale=np.ones(2),
        )


PEOPLE = {(160, 240): ([[80, 40, 120, 100], [160, 60, 200, 140]], [0.9, 0.5], [(1, 0), (0, 1)])}


@pytest.fixture
def photos(tmp_path):
    """A folder of photos: the query, another landscape, a portrait and a tiny one."""
    folder = tmp_path / "photos"
    sizes = {"query": (160, 240), "other": (160, 240), "portrait": (240, 96), "tiny": (4, 6)}
    for name, size in sizes.items():
        write_image(folder / f"{name}.png", gray(*size))
    return folder


# What each checkpoint's folder name stands for.
NETWORKS: dict[str, Detector] = {}


@pytest.fixture
def networks():
    """`NETWORKS`, to be filled by a test."""
    NETWORKS.clear()
    return NETWORKS


def request(tmp_path, checkpoints="a", query=None, box=None, gallery=None, config=None):
    text = ",".join(str(tmp_path / name) for name in checkpoints.split(","))
    paths = (str(path) if path else None for path in (query, box, gallery))
    wanted = figures.figure_request(text, lambda path: config, *paths, str(tmp_path / "out"))
    return dataclasses.replace(wanted, load=lambda path, config: NETWORKS[path.name])


def draw(kind, *args, **options):
    """Draws and reads the pictures, by file name."""
    wanted = request(*args, **options)
    figures.draw_figures(kind, wanted)
    assert not list(wanted.workdir.rglob("*.tmp"))
    return {path.name: read_photo(path, MAX_PIXELS) for path in wanted.workdir.iterdir()}


# Sampling points.


def test_sampling_points_are_drawn_where_they_are(tmp_path, photos, networks, capsys):
    networks["a"] = FakeDetector(PEOPLE)
    pictures = draw("sampling_points", tmp_path, query=photos / "query.png")
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "sampling_points-query.png")
    picture = pictures["sampling_points-query.png"]
    factor = 900 / 160
    panel = HEAD - visualize.GAP + 900
    assert picture.shape == (2 * panel + 3 * visualize.GAP + 1 + visualize.GAP, 1350 + 24, 3)
    first = picture[HEAD : HEAD + 900, 12:-12]
    second = picture[-visualize.GAP - 900 : -visualize.GAP, 12:-12]
    # The centers of both boxes: green, in both panels.
    for x, y in ((100, 70), (180, 100)):
        for part in (first, second):
            assert tuple(part[round(y * factor), round(x * factor)]) == GREEN
    # C3: five by five points, 8 pixels apart, around the nearest location (12, 8) -> (100, 68).
    for number, (x, y) in enumerate([(100, 68), (180, 100)]):
        corners = [(x + 8 * i, y + 8 * j) for i in (-2, -1, 1, 2) for j in (-2, -1, 1, 2)]
        for column, row in corners:
            seen = first[round(row * factor), round(column * factor)]
            assert tuple(seen) == CLOUD_COLORS[number], (column, row)
    x1, y1, x2, y2 = extent(has(first, CLOUD_COLORS[0])) / np.float64(factor)
    np.testing.assert_allclose([x1, y1, x2, y2], [84, 52, 116, 84], atol=1)
    # C4: four by four points, 16 pixels apart.
    x1, y1, x2, y2 = extent(has(second, CLOUD_COLORS[0])) / np.float64(factor)
    assert (x2 - x1, y2 - y1) == (pytest.approx(48, abs=2), pytest.approx(48, abs=2))


@pytest.mark.parametrize("kind", ["sampling_points", "detections", "similarity", "comparison"])
def test_photos_with_too_many_pixels_are_not_read(tmp_path, photos, networks, kind):
    networks["a"] = networks["b"] = FakeDetector(PEOPLE)
    config = copy.deepcopy(CONFIG)
    config.data.max_pixels = 99
    networks["a"].config = config
    options = {"checkpoints": "a,b", "gallery": photos} if kind == "comparison" else {}
    with pytest.raises(UserError, match=r"query.png: found .* pixels, expected 99 at most"):
        draw(kind, tmp_path, query=photos / "query.png", **options)


def test_sampling_points_of_a_box_and_of_portraits(tmp_path, photos, networks):
    networks["a"] = FakeDetector()
    with pytest.raises(UserError, match="found nobody"):
        draw("sampling_points", tmp_path, query=photos / "portrait.png")
    # What is visible of the box is x 40 to 56: its center is (48, 100).
    options = {"query": photos / "portrait.png", "box": "40,80,56,120"}
    picture = draw("sampling_points", tmp_path, **options)["sampling_points-portrait.png"]
    assert picture.shape == (HEAD + 900 + visualize.GAP, 2 * 360 + 3 * visualize.GAP, 3)
    left = picture[HEAD : HEAD + 900, 12:372]
    x1, y1, x2, y2 = extent(has(left, CLOUD_COLORS[0])) / np.float64(900 / 240)
    np.testing.assert_allclose([x1, y1, x2, y2], [36, 84, 68, 116], atol=1.1)
    with pytest.raises(UserError, match="--box"):
        draw("sampling_points", tmp_path, query=photos / "query.png", box="900,0,950,50")


def test_sampling_points_beyond_the_photo_and_of_plain_networks(tmp_path, photos, networks):
    networks["a"] = FakeDetector()
    draw("sampling_points", tmp_path, query=photos / "tiny.png", box="-9,-9,2,2")
    networks["a"] = FakeDetector(offsets=("output3", "lateral3"))
    with pytest.raises(UserError, match=r"lateral4.*not a deformable"):
        draw("sampling_points", tmp_path, query=photos / "query.png", box="0,0,9,9")


def test_points_far_outside_and_more_clouds_than_colors():
    far = np.array([[1e30, 5.0], [-1e9, 1e12], [np.inf, 0]])
    none = np.zeros((0, 2))
    image = gray(50, 60)
    np.testing.assert_array_equal(draw_point_clouds(image, [far], [far[0]], none), image)
    clouds = [np.array([[6.0 * number, 25.0]]) for number in range(1, 9)]
    drawn = draw_point_clouds(image, clouds, [far[0]] * 8, none)
    assert tuple(drawn[25, 5]) == tuple(drawn[25, 41]) == CLOUD_COLORS[0]


# Detections and heat maps.


def test_detections_of_all_photos(tmp_path, photos, networks):
    networks["a"] = FakeDetector(PEOPLE)
    pictures = draw("detections", tmp_path, query=photos / "query.png", gallery=photos)
    names = ("other", "portrait", "query", "tiny")
    assert sorted(pictures) == [f"detections-{name}.png.png" for name in names]
    assert pictures["detections-query.png.png"].shape == (HEAD + 900 + 12, 1350 + 24, 3)
    photo = pictures["detections-query.png.png"][HEAD:-12, 12:-12]
    x1, _, x2, y2 = extent(has(photo, GREEN)) / np.float64(900 / 160)
    np.testing.assert_allclose([x1, x2, y2], [80, 200, 140], atol=1)
    assert not has(pictures["detections-portrait.png.png"], GREEN).any()


@pytest.mark.parametrize(
    ("kind", "checkpoints"), [("detections", "a"), ("similarity", "a"), ("comparison", "a,b")]
)
def test_a_damaged_photo_costs_only_itself(kind, checkpoints, tmp_path, photos, networks, capsys):
    networks |= {name: FakeDetector(PEOPLE) for name in "ab"}
    options = {"query": photos / "query.png", "gallery": photos}
    good = draw(kind, tmp_path, checkpoints, **options)
    (photos / "damaged.jpg").write_bytes(b"\xff\xd8 no photo")
    with pytest.raises(IncompleteError, match=r"^--gallery: skipped 1 of 4 photos"):
        draw(kind, tmp_path, checkpoints, **options)
    assert f"  {photos / 'damaged.jpg'}: cannot be decoded" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(good)
    for path in (photos / name for name in ("other.png", "portrait.png", "tiny.png")):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"found no photo that can be read among 4") as error:
        draw(kind, tmp_path, checkpoints, **options)
    assert error.value.exit_code == 2


def test_heat_is_where_the_embedding_is(tmp_path, photos, networks):
    networks["a"] = FakeDetector(PEOPLE, spot=(8, 12))
    picture = draw("similarity", tmp_path, query=photos / "query.png")["similarity-query.png"]
    photo = picture[HEAD : HEAD + 900, 12:-12].astype(int)
    # The query is the better detection, whose embedding is (1, 0): at location (8, 12) only.
    red = (photo[..., 0] - photo[..., 2] > 60) & ~has(photo, YELLOW)
    x1, y1, x2, y2 = extent(red) / np.float64(900 / 160)
    assert 92 < x1 < 100 < x2 < 108
    assert 60 < y1 < 68 < y2 < 76
    x1, y1, x2, y2 = extent(has(photo, YELLOW)) / np.float64(900 / 160)
    np.testing.assert_allclose([x1, y1, x2, y2], [80, 40, 120, 100], atol=1)
    # Somebody else is less similar: nothing is red.
    networks["a"] = FakeDetector(PEOPLE, spot=(0, 0))
    other = draw("similarity", tmp_path, query=photos / "query.png", box="160,60,200,140")
    photo = other["similarity-query.png"][HEAD : HEAD + 900, 12:-12].astype(int)
    assert (photo[300:, 300:, 0] - photo[300:, 300:, 2] > 60)[~has(photo, YELLOW)[300:, 300:]].all()


def test_heat_maps_of_a_gallery_best_first(tmp_path, photos, networks):
    similar = {(240, 96): ([[10, 10, 50, 90]], [0.9], [(0.6, 0.8)])}
    networks["a"] = FakeDetector(PEOPLE | similar)
    query = Query(np.zeros(4), np.array([1, 0], np.float32))
    scenes = [photos / f"{name}.png" for name in ("tiny", "portrait", "other")]
    found = photo_figures.most_similar_scenes(networks["a"], query, scenes, GalleryReader())
    assert [scene.caption for scene in found] == [
        "other.png\nbest match 1.00",
        "portrait.png\nbest match 0.60",
        "tiny.png\nnobody found",
    ]
    assert [has(scene.picture, BLUE).any() for scene in found] == [True, True, False]
    for limit in (0, 1, 2, 9):
        some = photo_figures.most_similar_scenes(
            networks["a"], query, scenes, GalleryReader(), limit
        )
        assert [scene.best for scene in some] == [scene.best for scene in found[:limit]]
    drawn = draw("similarity", tmp_path, query=photos / "query.png", gallery=photos)
    picture = drawn["similarity-query.png"]
    assert has(picture, BLUE).any()
    # The query, the other landscape, and the portrait beside them; the tiny one in a second row.
    assert picture.shape[1] == 2 * 560 + 168 + 48


# Comparisons.


def test_comparison_on_photos_has_a_row_per_checkpoint(tmp_path, photos, networks):
    networks |= {name: FakeDetector(PEOPLE) for name in "abc"}
    options = {"query": photos / "query.png", "gallery": photos}
    heights = [
        draw("comparison", tmp_path, names, **options)["comparison-query.png"].shape[0]
        for names in ("a,b", "a,b,c")
    ]
    assert heights[1] - heights[0] > 400
    networks["b"] = FakeDetector()  # finds nobody, so it cannot search
    with pytest.raises(UserError, match="nobody was detected"):
        draw("comparison", tmp_path, "a,b", **options)
    with pytest.raises(UserError, match="expected A,B"):
        draw("comparison", tmp_path, "a", **options)
    with pytest.raises(UserError, match="--gallery"):
        draw("comparison", tmp_path, "a,b", query=photos / "query.png")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The tiny synthetic data with saved detections: `good` ones, and `bad` ones (noise)."""
    folder = tmp_path_factory.mktemp("evaluated")
    config = tiny.get_config()
    config.data.root = str(folder / "data")
    config.eval.protocols = ("TestG50", "all")
    config.lock()
    people = load_test(config.data, ())[0]
    counts = [len(boxes) for boxes in people.boxes]
    faces = np.random.default_rng(0).normal(size=(100, 16))
    identity = np.where(np.concatenate(people.labeled), np.concatenate(people.identity), 99)
    for name, noise in (("good", 0.02), ("bad", 3.0)):
        rng = np.random.default_rng(1)
        embeddings = faces[identity] + noise * rng.normal(size=(len(identity), 16))
        embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
        found = GalleryDetections(
            names=people.names,
            offsets=np.cumsum([0, *counts]),
            boxes=np.concatenate(people.boxes).astype(np.float32),
            scores=np.full(len(identity), 0.9, np.float32),
            embeddings=embeddings.astype(np.float32),
        )
        (folder / name).mkdir()
        save_detections(folder / name / "detections.npz", found)
    return folder, config


def test_comparison_on_a_protocol(evaluated, tmp_path):
    folder, config = evaluated
    queries = dataset_figures.compared_queries(config, [folder / "good", folder / "bad"])
    rows = list(queries.rows)
    assert queries.protocol == "TestG50"
    wanted = figures.figure_request(
        f"{folder}/good,{folder}/bad", lambda path: config, None, None, None, str(tmp_path)
    )
    figures.draw_figures("comparison", wanted)
    picture = read_photo(tmp_path / "comparison-TestG50.png", MAX_PIXELS)
    assert has(picture, YELLOW).any()
    assert has(picture, GREEN).any()
    assert has(picture, RED).any()
    assert not has(picture, BLUE).any()
    # The good one and the bad one in turn, on the same query, and the first one differs.
    assert len(rows) == 8
    for good, bad in zip(rows[::2], rows[1::2], strict=True):
        np.testing.assert_array_equal(good.query.box, bad.query.box)
        assert good.query.caption.startswith("good: AP 100")
        assert bad.query.caption.startswith("bad: AP")
    assert rows[0].results[0].match
    assert not rows[1].results[0].match


def test_precision_recall_of_saved_detections(evaluated, tmp_path):
    folder, config = evaluated
    paths = [folder / "good" / "detections.npz", folder / "bad"]
    panels = dataset_figures.precision_recall(config, paths)
    files = f"{folder}/good/detections.npz,{folder}/bad"
    wanted = figures.figure_request(files, lambda path: config, None, None, None, str(tmp_path))
    figures.draw_figures("precision_recall", wanted)
    assert read_photo(tmp_path / "precision_recall.png", MAX_PIXELS).shape == (600, 1950, 3)
    detection, first, whole = panels.values()
    assert [set(panel) for panel in (detection, first, whole)] == [{"good", "bad"}] * 3
    assert detection["good"].area == pytest.approx(1)
    assert first["good"].area == pytest.approx(1)
    assert whole["bad"].area < 0.9
    assert [name.split(" (")[0] for name in panels] == [
        "detection",
        "search, TestG50",
        "search, all",
    ]


def test_saved_detections_that_are_missing(evaluated, tmp_path):
    folder, config = evaluated
    wanted = figures.figure_request(
        f"{folder}/good,{tmp_path}", lambda path: config, *[None] * 3, str(tmp_path)
    )
    with pytest.raises(UserError, match=r"detections\.npz: no such file; --mode=evaluate"):
        figures.draw_figures("precision_recall", wanted)


@pytest.mark.usefixtures("unchecked")
def test_queries_that_differ_come_first():
    class Metrics:
        def __init__(self, right, ap):
            self.right, self.per_query_ap = np.array(right, bool), np.array(ap)

        def hits(self, k):
            assert k == 1
            return self.right

    a = Metrics([1, 1, 0, 1, 0], [0.9, 0.5, 0.1, 0.8, 0.4])
    b = Metrics([1, 0, 0, 0, 0], [0.1, 0.4, 0.2, 0.3, 0.4])
    assert dataset_figures.most_different([a, b]).tolist() == [3, 1, 0, 2, 4]


# Gallery sizes.


def write_metrics(folder, dataset="cuhk_sysu", **maps):
    folder.mkdir(parents=True, exist_ok=True)
    search = {name: {"mAP": value} for name, value in maps.items()}
    (folder / "metrics.json").write_text(json.dumps({"dataset": dataset, "search": search}))


def test_gallery_sizes_are_sorted_and_the_paper_is_known(tmp_path):
    write_metrics(tmp_path / "a", TestG4000=0.7, all=0.65, TestG100=0.9, occlusion=0.2)
    write_metrics(tmp_path / "b", TestG50=0.8, TestG100=0.75)
    picture = draw("gallery_size", tmp_path, "a,b/metrics.json")["gallery_size.png"]
    assert picture.shape == (720, 1080, 3)
    sizes = dataset_figures.gallery_sizes([tmp_path / "a", tmp_path / "b" / "metrics.json"])
    assert sizes.maps == {
        "a": {"4000": 0.7, "all": 0.65, "100": 0.9},
        "b": {"50": 0.8, "100": 0.75},
    }
    assert sizes.galleries == ("50", "100", "4000", "all")
    assert [(one.gallery, one.mAP) for one in sizes.references] == [("100", 93.1), ("100", 94.0)]
    write_metrics(tmp_path / "c", "synthetic", TestG50=0.8, TestG100=0.75)
    assert dataset_figures.gallery_sizes([tmp_path / "c"]).references == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "found no JSON, expected a metrics.json"),
        ("[" * 9999, "found no JSON, expected a metrics.json"),
        ("[]", "not a metrics.json"),
        ('{"search": {"TestG50": 3}, "dataset": "prw"}', "not a metrics.json"),
        ('{"search": {"all": {"mAP": 0.5}}, "dataset": "prw"}', "found gallery sizes all"),
        ('{"search": {}, "dataset": "prw"}', "found gallery sizes none"),
    ],
)
def test_gallery_sizes_of_other_files(tmp_path, content, message):
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        draw("gallery_size", tmp_path, "metrics.json")
    assert "\n" not in str(error.value)


def test_gallery_sizes_on_two_data_sets(tmp_path):
    write_metrics(tmp_path / "a", TestG50=0.8, TestG100=0.75)
    write_metrics(tmp_path / "b", "synthetic", TestG50=0.8, TestG100=0.75)
    with pytest.raises(UserError, match="cuhk_sysu, synthetic"):
        draw("gallery_size", tmp_path, "a,b")
    with pytest.raises(UserError, match="no such file"):
        draw("gallery_size", tmp_path, "nowhere")


# The request.


def test_labels():
    def label(*names):
        return dataset_figures.labels([Path(name) for name in names])

    assert label("runs/a", "runs/b/") == ("a", "b")
    assert label("x/a", "y/a", "b") == ("x/a", "y/a", "b")
    assert label("runs/a/detections.npz", "runs/b/metrics.json", "c.npz") == ("a", "b", "c")
    assert label("runs/a/checkpoints/20") == ("a, step 20",)


def own_config(path):
    return CONFIG


def test_what_is_missing_is_named(tmp_path, photos, networks):
    networks["a"] = networks["b"] = FakeDetector(PEOPLE)
    for kind in ("sampling_points", "detections", "similarity"):
        with pytest.raises(UserError, match="--query"):
            draw(kind, tmp_path)
        with pytest.raises(UserError, match="found 2 of them"):
            draw(kind, tmp_path, "a,b", query=photos / "query.png")
    for text in ("", "a,", ",a", "a,,b"):
        with pytest.raises(UserError, match="--checkpoint"):
            figures.figure_request(text, own_config, *[None] * 4)
    with pytest.raises(UserError, match="--box"):
        request(tmp_path, box="1,2,3")


def test_pictures_go_beside_the_checkpoint(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"")
    for name, folder in (("run", tmp_path / "run" / "figures"), ("x.npz", tmp_path / "figures")):
        wanted = figures.figure_request(str(tmp_path / name), own_config, *[None] * 4)
        assert wanted.workdir == folder


@pytest.mark.parametrize(
    ("kind", "option"),
    [("gallery_size", "query"), ("precision_recall", "gallery"), ("sampling_points", "gallery")],
)
def test_what_a_kind_does_not_read_is_refused(kind, option, tmp_path, photos):
    with pytest.raises(UserError, match=f"--{option}: --what={kind} does not read it"):
        draw(kind, tmp_path, **{option: photos})


def test_a_box_needs_its_photo(tmp_path, photos):
    with pytest.raises(UserError, match="--query: missing"):
        draw("similarity", tmp_path, box="1,2,3,4", gallery=photos)
