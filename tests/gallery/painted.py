"""Stand-ins for a trained network, from random weights to none, with their photos and galleries."""

import datetime
import os
import time

import cv2
import jax
import numpy as np

from alignps_jax.checkpoint.store import Checkpoints
from alignps_jax.files import write_image
from alignps_jax.gallery.entries import Scene, content_hash, scene_id
from alignps_jax.gallery.gallery import Gallery
from alignps_jax.gallery.people import FileState, FoundScene
from alignps_jax.inference.detector import Detector
from alignps_jax.inference.many import above
from alignps_jax.inference.predict import inference_model
from alignps_jax.media import read_photo
from alignps_jax.nn.model import weights_template
from alignps_jax.types import Detections, OIMMemory, TrainState
from configs import tiny

RED, GREEN, BLUE, PINK = (230, 40, 40), (40, 200, 60), (50, 70, 230), (240, 60, 200)
SIZE = (240, 320)  # height, width of a photo


def network_config(threshold=0.285, variant=""):
    """A network that finds at most five people of that score."""
    config = tiny.get_config(variant)
    config.data.max_pixels = 1_000_000
    config.eval.score_threshold = threshold
    config.eval.max_detections = 5
    return config.lock()


def write_checkpoint(folder, config, seed=0):
    """A checkpoint of random weights, as training would leave one."""
    template = weights_template(inference_model(config))
    rng = np.random.default_rng(seed)
    leaves = template.params, template.frozen
    params, frozen = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(x.dtype), leaves)
    frozen = jax.tree.map(np.abs, frozen)  # there are variances
    params["head"]["scale0"] = np.ones((), np.float32)
    params["head"]["box_predictor"]["bias"] = np.array([1.5, 2, 1.5, 2], np.float32)
    memory = OIMMemory(np.ones((2, 2), np.float32), np.zeros((0, 2), np.float32), np.int32(0))
    with Checkpoints(folder, keep=1, config=config) as checkpoints:
        checkpoints.save(TrainState(np.int32(7), params, frozen, (), memory), {})
    return folder


def photo(seed, height=96, width=128):
    """Colored blots, others for every seed."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def write_photos(folder, names, first=0):
    """A photo of its own for each name."""
    for seed, name in enumerate(names, first):
        write_image(folder / name, photo(seed))


def painted(*people, size=SIZE):
    """A gray photo; each person is a color and the place of a corner, 30 wide and 80 high."""
    photo = np.full((*size, 3), 120, np.uint8)
    for color, (x, y) in people:
        photo[y : y + 80, x : x + 30] = color
    return photo


def encoded(photo, suffix=".png"):
    """The content of a file."""
    return cv2.imencode(suffix, cv2.cvtColor(photo, cv2.COLOR_RGB2BGR))[1].tobytes()


def detections(boxes, scores, embeddings):
    """What a network gives: all valid, embeddings of length one."""
    parts = boxes, scores, embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    return Detections(*(np.asarray(x, np.float32) for x in parts), np.ones(len(scores), bool))


class ColorDetector(Detector):
    """Finds what is colorful; unsure of what is smaller than 30x80 pixels; `delay` in seconds."""

    config, name, folder, fingerprint = tiny.get_config().lock(), "colors", None, "c0105" * 8

    def __init__(self, delay=0.0):
        self.delay = delay

    def detect(self, image):
        time.sleep(self.delay)
        spread = image.max(axis=2).astype(int) - image.min(axis=2)
        about = cv2.connectedComponentsWithStats((spread > 80).astype(np.uint8))[2][1:]
        about = about[about[:, cv2.CC_STAT_AREA] >= 100]
        about = about[np.argsort(-about[:, cv2.CC_STAT_AREA], kind="stable")]
        x, y, width, height, area = about.T
        embeddings = np.zeros((len(area), self.config.model.channels))
        embeddings[:, :3] = image[y + height // 2, x + width // 2] - 120.0
        boxes = np.stack([x, y, x + width, y + height], axis=1)
        return detections(boxes, np.where(area > 2000, 0.9, 0.05), embeddings)


class Finder(Detector):
    """Finds up to four people, always the same in the same pixels; `looked` counts the photos."""

    name, folder, rows = "a finder, step 1", None, 2

    def __init__(self, seconds=0.0, fingerprint="f" * 64, config=None):
        self.seconds, self.fingerprint, self.looked = seconds, fingerprint, 0
        self.config = config or network_config()

    def detect_batch(self, batch):
        time.sleep(self.seconds)
        self.looked += int(np.sum(batch.valid_image))
        found = [self.find(np.asarray(image)) for image in batch.image]
        return jax.tree.map(lambda *parts: np.stack(parts)[None], *found)

    def find(self, image):
        rng = np.random.default_rng(seed := int(image.astype(np.int64).sum()))
        corner = rng.uniform(0, 50, (5, 2))
        boxes = np.hstack([corner, corner + rng.uniform(5, 40, (5, 2))])
        found = detections(boxes, -np.sort(-rng.uniform(0.2, 1, 5)), rng.normal(size=(5, 16)))
        found.valid[seed % 5 :] = False
        return found


def paint_photos(folder):
    """Eight photos: red is in four of them, green in three, blue and pink in one each."""
    for name, photo in {
        "yard/a.png": painted((RED, (20, 60)), (GREEN, (200, 90))),
        "yard/b.png": painted((RED, (120, 80))),
        "yard/c d.png": painted((GREEN, (60, 20)), (BLUE, (250, 100))),
        "gate/ä.png": painted((RED, (200, 40))),
        "gate/e.png": painted((GREEN, (40, 40))),
        "gate/f.png": painted((PINK, (150, 100)), (RED, (30, 100))),
        "gate/nobody.png": painted(),
        "gate/<b>&.png": painted(),
    }.items():
        write_image(folder / name, photo)


def gallery_of(folder, address, detector):
    """A gallery of the photos below a folder; the folder's name is the camera."""
    gallery = Gallery.open(address, detector, create=True)
    hours = enumerate(sorted(folder.rglob("*.png")))
    times = ((path, datetime.datetime(2026, 5, 1, hour)) for hour, path in hours)
    commit(gallery, [indexed(path, read_photo(path, 10**6), detector, at) for path, at in times])
    return gallery


def commit(gallery, scenes):
    """Stores scenes, and the files that they are of, which need not be there."""
    files = []
    for path, one in {one.scene.path: one for one in scenes}.items():
        about = os.stat(path if os.path.exists(path) else __file__)
        files.append(FileState(path, about.st_size, about.st_mtime_ns, one.scene.hash))
    gallery.people.commit(scenes, files)


def indexed(path, image, detector, taken=None, second=None):
    """What is to be stored of a photo, or a frame."""
    content = content_hash(path.read_bytes())
    about = *image.shape[:2], taken, path.parent.name, second, content
    scene = Scene(scene_id(content, second), str(path), *about)
    return FoundScene(scene, above(detector.detect(image), 0.2))


def made_up(path, people, taken=None, camera="", second=None):
    """The same for people of whom there is no picture."""
    scene = Scene(scene_id(path, second), path, 90, 120, taken, camera, second, path)
    return FoundScene(scene, people)


def scenes_of(site):
    """All photos and frames of a gallery."""
    memory = site.gallery.memory()
    return [scene for card in memory.cards(99) for scene in memory.scenes_of(card.scene.hash)]
