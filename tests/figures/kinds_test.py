"""The kinds of pictures: composition, files and errors; networks find what they are told."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from alignps_jax.drawing.pictures import BLUE, GAP, GREEN, LINE_HEIGHT, RED, YELLOW
from alignps_jax.evaluation.detections_io import save_detections
from alignps_jax.figures import datasets
from alignps_jax.figures.kinds import FIGURES, draw_figures
from alignps_jax.figures.photos import comparison, sampling_points, similarity, tinted
from alignps_jax.figures.plots import rendered
from alignps_jax.figures.request import FigureRequest
from alignps_jax.files import write_image, write_json
from alignps_jax.inference.detector import Detector
from alignps_jax.inference.location_maps import LocationMaps
from alignps_jax.media import read_photo
from alignps_jax.types import Detections, GalleryDetections, IncompleteError, UserError
from configs import tiny
from data_pipeline.datasets import load_test
from tests.drawing.pictures_test import extent, gray, has

MAX_PIXELS = 2 * 10**7
HEAD = 2 * LINE_HEIGHT + GAP  # what stands above the first photo


class FakeDetector(Detector):
    """Finds people at given places of every photo: {shape: (boxes, scores, embeddings)}.

    The maps are those of a photo that is not resized, with regular sampling points; the embedding
    is (1, 0) at one location and (0, 1) elsewhere.
    """

    config = tiny.get_config().lock()

    def __init__(self, found=None, offsets=("output3", "lateral3", "lateral4"), spot=(2, 3)):
        self.found, self.offsets, self.spot = found or {}, offsets, spot

    def detect(self, image):
        found = self.found.get(image.shape[:2], ([], [], []))
        boxes, scores, embeddings = (np.array(values, np.float32) for values in found)
        valid = np.ones(len(scores), bool)
        return Detections(boxes.reshape(-1, 4), scores, embeddings.reshape(-1, 2), valid)

    def maps(self, image):
        height, width = (-(-side // 32) * 4 for side in image.shape[:2])
        embeddings = np.zeros((height, width, 2), np.float32)
        embeddings[..., 1] = 1
        embeddings[self.spot] = (1, 0)
        finer = {name: 1 + name.endswith("4") for name in self.offsets}
        offsets = {n: np.zeros((height // by, width // by, 9, 2)) for n, by in finer.items()}
        return LocationMaps((embeddings,), (8,), offsets, np.array(image.shape[:2]), np.ones(2))


PEOPLE = {(160, 240): ([[80, 40, 120, 100], [160, 60, 200, 140]], [0.9, 0.5], [(1, 0), (0, 1)])}


@pytest.fixture
def photos(tmp_path):
    """A folder of photos: the query, another landscape, a portrait and a tiny one."""
    folder = tmp_path / "photos"
    sizes = {"query": (160, 240), "other": (160, 240), "portrait": (240, 96), "tiny": (4, 6)}
    for name, size in sizes.items():
        write_image(folder / f"{name}.png", gray(*size))
    return folder


def ask(folder, networks, config=None, **options):
    """A request about checkpoints in a folder, by name; their networks, where they are needed."""

    class Request(FigureRequest):
        def detectors(self):
            yield from networks.items()

    return Request(tuple(folder / name for name in networks), lambda path: config, **options)


def draw(kind, folder, *args, **options):
    """Draws and reads the pictures, by file name."""
    draw_figures(kind, ask(folder, *args, **options), folder / "out")
    return {path.name: read_photo(path, MAX_PIXELS) for path in (folder / "out").iterdir()}


def test_sampling_points_are_where_the_convolutions_look(photos):
    networks = {"a": FakeDetector({(160, 240): [[[20, 10, 40, 30]], [0.9], [(1, 0)]]})}
    options = {"query": photos / "query.png", "box": (60.0, 40.0, 140.0, 100.0)}
    [(name, figure)] = sampling_points(ask(photos, networks, **options))
    assert name == "sampling_points-query"
    for axes, step, count in zip(figure.axes, (8, 16), (5, 4), strict=True):
        points, ring, green = (dots.get_offsets() for dots in axes.collections)
        # C3: five by five points, 8 pixels apart; C4: four by four, 16 pixels apart.
        np.testing.assert_allclose(np.ptp(points, axis=0), step * (count - 1))
        np.testing.assert_allclose(np.mean(points, axis=0), (100, 68), atol=step)
        np.testing.assert_allclose(ring, [(100, 68)])  # the middle of the nearest location
        np.testing.assert_allclose(green, [(30, 20)])
        assert (axes.get_xlim(), axes.get_ylim()) == ((0, 240), (160, 0))


def test_sampling_points_of_many_nobody_and_plain_networks(tmp_path, photos, capsys):
    crowd = {(160, 240): [[[9, 9, 20, 40]] * 9, [0.9] * 9, [(1, 0)] * 9]}
    name, options = "sampling_points-query.png", {"query": photos / "query.png"}
    picture = draw("sampling_points", tmp_path, {"a": FakeDetector(crowd)}, **options)[name]
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / name)
    assert picture.shape[0] > 1800  # both panels below each other; beside each other of a portrait
    options = {"query": photos / "portrait.png"}
    with pytest.raises(UserError, match="nobody"):
        draw("sampling_points", tmp_path, {"a": FakeDetector(crowd)}, **options)
    options["box"] = (-90.0, 80.0, 16.0, 120.0)
    drawn = draw("sampling_points", tmp_path, {"a": FakeDetector(crowd)}, **options)
    assert drawn["sampling_points-portrait.png"].shape[0] < 1000
    plain = {"a": FakeDetector(offsets=("output3", "lateral3"))}
    with pytest.raises(UserError, match=r"lateral4.*not a deformable"):
        draw("sampling_points", tmp_path, plain, **options)


def test_detections_of_all_photos(tmp_path, photos):
    detector, query = FakeDetector(PEOPLE), {"query": photos / "query.png"}
    pictures = draw("detections", tmp_path, {"a": detector}, **query, gallery=photos)
    names = ("other", "portrait", "query", "tiny")
    assert sorted(pictures) == [f"detections-{name}.png.png" for name in names]
    photo = pictures["detections-query.png.png"][HEAD:-GAP, GAP:-GAP]
    x1, _, x2, y2 = extent(has(photo, GREEN)) / np.float64(900 / 160)
    np.testing.assert_allclose([x1, x2, y2], [80, 200, 140], atol=1)
    assert not has(pictures["detections-portrait.png.png"], GREEN).any()
    detector.config = tiny.get_config()
    detector.config.data.max_pixels = 99
    with pytest.raises(UserError, match="99"):
        draw("detections", tmp_path, {"a": detector}, **query)


@pytest.mark.parametrize(
    ("kind", "names"), [("detections", "a"), ("similarity", "a"), ("comparison", "ab")]
)
def test_a_damaged_photo_costs_only_itself(kind, names, tmp_path, photos, capsys):
    networks = {name: FakeDetector(PEOPLE) for name in names}
    options = {"query": photos / "query.png", "gallery": photos}
    good = draw(kind, tmp_path, networks, **options)
    (photos / "damaged.jpg").write_bytes(b"\xff\xd8 no photo")
    with pytest.raises(IncompleteError):
        draw(kind, tmp_path, networks, **options)
    assert capsys.readouterr().out.count("damaged.jpg") == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(good)


def test_heat_is_where_the_embedding_is(photos):
    networks, query = {"a": FakeDetector(PEOPLE, spot=(8, 12))}, {"query": photos / "query.png"}
    [(_, picture)] = similarity(ask(photos, networks, **query))
    photo, factor = picture[HEAD : HEAD + 900, GAP:-GAP].astype(int), np.float64(900 / 160)
    # The query is the better detection, whose embedding is (1, 0): at location (8, 12) only.
    red = (photo[..., 0] - photo[..., 2] > 60) & ~has(photo, YELLOW)
    np.testing.assert_allclose(extent(red) / factor, [96, 64, 104, 72], atol=4)
    np.testing.assert_allclose(extent(has(photo, YELLOW)) / factor, [80, 40, 120, 100], atol=1)
    tints = [tinted(gray(2, 2), np.full((1, 1), value)) for value in (-3.0, 0.0, 1.0, 3.0)]
    assert (tints[0] == tints[1]).all()
    assert (tints[2] == tints[3]).all()
    # One scene is similar by 1, one by 0.6, in one is nobody; blue boxes say who was meant.
    networks["a"] = FakeDetector(PEOPLE | {(240, 96): ([[10, 10, 50, 90]], [0.9], [(0.6, 0.8)])})
    [(_, picture)] = similarity(ask(photos, networks, **query, gallery=photos))
    step = 560 + GAP
    assert picture.shape[1] == 3 * step + GAP
    query, best, second = (picture[HEAD:, GAP + i * step :][:420, :560] for i in range(3))
    assert has(query, YELLOW).any()
    whole, half = np.multiply([80, 40, 120, 100], 560 / 240), np.multiply([10, 10, 50, 90], 1.75)
    np.testing.assert_allclose(extent(has(best, BLUE)), whole, atol=2)
    np.testing.assert_allclose(extent(has(second, BLUE)), half, atol=2)
    assert not has(picture[HEAD + 420 :], BLUE).any()


def test_comparison_in_photos_has_a_row_per_checkpoint(photos):
    options = {"query": photos / "query.png", "gallery": photos}
    pictures = []
    for names in ("ab", "abc"):
        networks = {name: FakeDetector(PEOPLE) for name in names}
        pictures += comparison(ask(photos, networks, **options))
    (_, two), (_, three) = pictures
    assert three.shape[0] - two.shape[0] > 400
    assert three.shape[1] == two.shape[1] < 4 * 352  # the query and both people
    networks["b"] = FakeDetector()  # finds nobody, so it cannot search
    with pytest.raises(UserError, match="nobody"):
        list(comparison(ask(photos, networks, **options)))


def test_what_is_missing_is_named(photos):
    two, query = {"a": FakeDetector(PEOPLE), "b": FakeDetector()}, {"query": photos / "query.png"}
    for kind in ("sampling_points", "detections", "similarity"):
        with pytest.raises(UserError, match="--query: missing"):
            list(FIGURES[kind](ask(photos, {"a": two["a"]})))
        with pytest.raises(UserError, match="found 2, expected one"):
            list(FIGURES[kind](ask(photos, two, **query)))
    with pytest.raises(UserError, match="--query, --gallery: found one"):
        list(FIGURES["comparison"](ask(photos, two, **query)))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The tiny synthetic data with saved detections: `good` ones, and `bad` ones (noise)."""
    folder = tmp_path_factory.mktemp("evaluated")
    config = tiny.get_config()
    config.data.root = str(folder / "data")
    config.eval.protocols = ("TestG50", "all")
    people = load_test(config.lock().data, ())[0]
    faces = np.random.default_rng(0).normal(size=(100, 16))
    identity = np.where(np.concatenate(people.labeled), np.concatenate(people.identity), 99)
    for name, noise in (("good", 0.02), ("bad", 3.0)):
        rng = np.random.default_rng(1)
        embeddings = faces[identity] + noise * rng.normal(size=(len(identity), 16))
        embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
        boxes, scores = np.concatenate(people.boxes), np.full(len(identity), 0.9)
        offsets, arrays = np.cumsum([0, *map(len, people.boxes)]), (boxes, scores, embeddings)
        found = GalleryDetections(people.names, offsets, *(x.astype(np.float32) for x in arrays))
        (folder / name).mkdir()
        save_detections(folder / name / "detections.npz", found)
    return folder, config


def test_comparison_on_a_protocol(evaluated):
    folder, config = evaluated
    picture = draw("comparison", folder, ["good", "bad"], config)["comparison-TestG50.png"]
    rows = np.split(picture[: len(picture) // 8 * 8], 8)  # of the good and the bad one in turn
    assert all(has(row, YELLOW).any() for row in rows)
    assert all(has(row, GREEN).any() for row in rows[::2])
    assert all(has(row, RED).any() for row in rows[1::2])
    assert not has(picture, BLUE).any()
    with pytest.raises(FileNotFoundError, match=r"detections\.npz"):
        draw("comparison", folder, ["good", "nowhere"], config)


def test_precision_recall_of_saved_detections(evaluated):
    folder, config = evaluated
    request = ask(folder, ["good/detections.npz", "bad"], config)
    [(_, figure)] = datasets.precision_recall(request)
    assert rendered(figure).shape == (600, 1950, 3)
    panels = {axes.get_title().split(" (")[0]: axes for axes in figure.axes}
    assert [*panels] == ["detection", "search, TestG50", "search, all"]
    areas = []
    for axes in panels.values():
        curves = [patch.get_data() for patch in axes.patches]
        areas.append([np.sum(curve.values * np.diff(curve.edges)) for curve in curves])
        legend = [text.get_text() for text in axes.get_legend().get_texts()]
        assert legend == [f"good: {100 * areas[-1][0]:.1f}", f"bad: {100 * areas[-1][1]:.1f}"]
    assert areas[0][0] == areas[1][0] == pytest.approx(1)
    assert areas[2][1] < 0.9


def test_calibration_of_saved_detections(evaluated):
    folder, config = evaluated
    [(_, figure)] = datasets.calibration(ask(folder, ["good", "bad"], config))
    for line in figure.axes[0].lines[::3]:
        assert (np.diff(line.get_ydata()) >= 0).all()
        assert 0 < line.get_ydata()[0] <= line.get_ydata()[-1] < 1


@pytest.mark.usefixtures("unchecked")
def test_queries_that_differ_come_first():
    def metrics(right, ap):
        return SimpleNamespace(hits=lambda k: np.array(right) < k, per_query_ap=np.array(ap))

    a = metrics([0, 0, 1, 0, 5], [0.9, 0.5, 0.1, 0.8, 0.4])
    b = metrics([0, 1, 2, 3, 9], [0.1, 0.4, 0.2, 0.3, 0.4])
    assert datasets.most_different([a, b]).tolist() == [3, 1, 0, 2, 4]


def write_metrics(folder, dataset="cuhk_sysu", **maps):
    search = {name: {"mAP": value} for name, value in maps.items()}
    write_json(folder / "metrics.json", {"dataset": dataset, "search": search})


def test_gallery_sizes_beside_the_papers(tmp_path):
    write_metrics(tmp_path / "a", TestG4000=0.75, all=0.5, TestG100=0.875, occlusion=0.2)
    write_metrics(tmp_path / "b", TestG50=0.25)
    write_metrics(tmp_path / "c", "synthetic", TestG50=0.75, TestG100=0.5)
    [(_, figure)] = datasets.gallery_size(ask(tmp_path, ["a", "b/metrics.json"]))
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["50", "100", "4000", "all"]
    ours, other, *papers = [line for line in axes.lines if line.get_linestyle() != ":"]
    assert (ours.get_label(), other.get_label()) == ("a", "b")
    np.testing.assert_array_equal(ours.get_ydata(), [np.nan, 87.5, 75, 50])
    np.testing.assert_array_equal(other.get_ydata(), [25, *[np.nan] * 3])
    assert [line.get_xydata().tolist() for line in papers] == [[[1, 93.1]], [[1, 94.0]]]
    for name in ("b", "c/metrics.json"):  # pictures go beside the checkpoint
        draw_figures("gallery_size", ask(tmp_path, [name]), None)
        assert (tmp_path / name[0] / "figures" / "gallery_size.png").is_file()
        [(_, figure)] = datasets.gallery_size(ask(tmp_path, [name]))
        assert len(figure.axes[0].lines) == 1  # the paper has another gallery or data set


@pytest.mark.parametrize("content", ["", "[]", '{"search": {"TestG50": 3}, "dataset": "prw"}'])
def test_gallery_sizes_of_other_files(tmp_path, content):
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(UserError, match=r"metrics\.json: .*expected a metrics\.json"):
        draw("gallery_size", tmp_path, ["metrics.json"])


def test_labels_are_short():
    for checkpoints, labels in (
        (["runs/a", "runs/b/"], ["a", "b"]),
        (["x/a", "y/a", "b"], ["x/a", "y/a", "b"]),
        (["runs/a/detections.npz", "runs/b/metrics.json", "c.npz"], ["a", "b", "c"]),
        (["runs/a/checkpoints/20"], ["a, step 20"]),
    ):
        assert [*ask(Path(), checkpoints).labels] == labels
