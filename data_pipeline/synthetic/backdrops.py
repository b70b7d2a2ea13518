"""Places and things of the synthetic data set: everything in a photo that is not a person."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Float

from data_pipeline.synthetic.canvas import Canvas, Paint, Sprite
from data_pipeline.synthetic.people import Color, pick, sample_color

# Things people stand among: name -> height relative to a person at the same distance.
THINGS = {
    "pole": 1.7,
    "sign": 1.3,
    "tree": 1.9,
    "bush": 0.45,
    "bin": 0.45,
    "bench": 0.4,
    "car": 0.62,
    "kiosk": 1.25,
    "parasol": 1.2,
    "cone": 0.3,
}
_THING_HEIGHT = 160


def draw_backdrop(
    rng: np.random.Generator, height: int, width: int
) -> tuple[Float[np.ndarray, "H W 3"], int]:
    """An empty place (BGR, 0 to 255 and a little above) and the row where its ground begins."""
    ground = int(height * rng.uniform(0.22, 0.5))
    image = np.empty((height, width, 3), np.uint8)
    place = pick(rng, (_street, _brick_wall, _park, _room, _plaza, _haze))
    place(rng, image, ground)
    patches = _cloud(rng, height, width, 6, 0.85, 1.15)
    grain = _cloud(rng, height, width, height // 3, 0.85, 1.15)
    factor = cv2.merge([cv2.multiply(patches, grain)] * 3)
    return cv2.multiply(image.astype(np.float32), factor), ground


def draw_thing(rng: np.random.Generator) -> tuple[Sprite, float]:
    """A random thing and its height relative to a person's."""
    name = pick(rng, tuple(THINGS))
    main, other = Paint(_dull(rng) if rng.random() < 0.5 else sample_color(rng)), Paint(_dull(rng))
    leaves, dark = Paint(_green(rng)), Paint((35, 35, 38))
    size = _THING_HEIGHT
    canvas = Canvas(size, int(size * 2.4))
    middle = canvas.alpha.shape[1] / 2

    def box(left: float, top: float, right: float, bottom: float, paint: Paint) -> None:
        x, y = np.array((left, right)) * size + middle, np.array((top, bottom)) * (size - 1)
        canvas.polygon([(x[0], y[0]), (x[1], y[0]), (x[1], y[1]), (x[0], y[1])], paint)

    def disc(x: float, y: float, radius_x: float, radius_y: float, paint: Paint) -> None:
        canvas.ellipse((middle + x * size, y * size), (radius_x * size, radius_y * size), paint)

    match name:
        case "pole":
            box(-0.03, 0, 0.03, 1, other)
            disc(0, 0.05, 0.07, 0.045, main)
        case "sign":
            box(-0.02, 0.1, 0.02, 1, other)
            box(-0.17, 0.02, 0.17, 0.32, main)
            box(-0.12, 0.1, 0.12, 0.15, dark)
        case "tree":
            box(-0.05, 0.4, 0.05, 1, Paint((45, 65, 90)))
            for x, y in rng.uniform((-0.17, 0.15), (0.17, 0.42), (7, 2)):
                disc(x, y, 0.15, 0.14, leaves)
        case "bush":
            for x, y in rng.uniform((-0.7, 0.4), (0.7, 0.65), (9, 2)):
                disc(x, y, 0.32, 0.33, leaves)
        case "bin":
            box(-0.3, 0.12, 0.3, 1, main)
            box(-0.36, 0, 0.36, 0.14, other)
        case "bench":
            for x in (-0.85, 0.78):
                box(x, 0.5, x + 0.08, 1, dark)
            box(-1, 0.45, 1, 0.58, main)
            box(-0.95, 0.02, 0.95, 0.25, main)
        case "car":
            box(-0.65, 0.02, 0.6, 0.5, main)
            box(-0.52, 0.1, 0.48, 0.45, Paint((150, 130, 110)))
            box(-1.15, 0.42, 1.15, 0.85, main)
            for x in (-0.75, 0.75):
                disc(x, 0.83, 0.17, 0.165, dark)
        case "kiosk":
            box(-0.4, 0, 0.4, 1, main)
            box(-0.3, 0.12, 0.3, 0.55, other)
        case "parasol":
            box(-0.015, 0.1, 0.015, 1, dark)
            canvas.polygon(
                [(middle, 2), (middle + 0.5 * size, 0.28 * size), (middle - 0.5 * size, 45)], main
            )
        case "cone":
            canvas.polygon(
                [(middle - 14, 0), (middle + 14, 0), (middle + 55, 150), (middle - 55, 150)],
                Paint((30, 100, 235)),
            )
            box(-0.24, 0.4, 0.24, 0.6, Paint((235, 235, 235)))
    return canvas.cropped(), THINGS[name]


def _street(rng: np.random.Generator, image: np.ndarray, ground: int) -> None:
    """Houses with windows, a pavement and a road."""
    height, width = image.shape[:2]
    _gradient(image[:ground], _light(rng), _light(rng))
    left = 0
    while left < width:
        right = left + int(width * rng.uniform(0.12, 0.35))
        top = int(ground * rng.uniform(0, 0.5))
        image[top:ground, left:right] = sample_color(rng) if rng.random() < 0.3 else _dull(rng)
        pane, step = _dull(rng), max(6, int(height * rng.uniform(0.05, 0.11)))
        for y in range(top + step // 2, ground - step, int(step * 1.5)):
            for x in range(left + step // 2, right - step // 2, step * 2):
                image[y : y + step, x : x + step] = pane
        left = right
    _gradient(image[ground:], _dull(rng), _dull(rng))
    kerb = int(ground + (height - ground) * rng.uniform(0.25, 0.6))
    cv2.line(image, (0, kerb), (width, kerb), _light(rng), max(1, height // 80))
    dash = max(8, width // 10)
    y = int(kerb + (height - kerb) * 0.5)
    for x in range(-int(rng.integers(dash)), width, 2 * dash):
        cv2.line(image, (x, y), (x + dash, y), (215, 220, 220), max(1, height // 90))


def _brick_wall(rng: np.random.Generator, image: np.ndarray, ground: int) -> None:
    """A wall of bricks or tiles above a floor."""
    width = image.shape[1]
    image[:ground] = sample_color(rng) if rng.random() < 0.4 else _dull(rng)
    joint, row = _dull(rng), int(rng.integers(6, 16))
    brick = int(row * rng.uniform(1, 3))
    for index, y in enumerate(range(0, ground, row)):
        cv2.line(image, (0, y), (width, y), joint, 1)
        for x in range((index % 2) * brick // 2, width, brick):
            cv2.line(image, (x, y), (x, min(y + row, ground)), joint, 1)
    _gradient(image[ground:], _dull(rng), _dull(rng))


def _park(rng: np.random.Generator, image: np.ndarray, ground: int) -> None:
    """Sky, trees, grass and a path."""
    height, width = image.shape[:2]
    _gradient(image[:ground], (235, 200, 150), (240, 235, 225))
    for _ in range(rng.integers(8, 20)):
        center = (int(rng.integers(width)), int(ground * rng.uniform(0.4, 1)))
        radius = int(height * rng.uniform(0.05, 0.14))
        cv2.circle(image, center, radius, _green(rng), -1, cv2.LINE_AA)
    _gradient(image[ground:], _green(rng), _green(rng))
    start, end = rng.uniform(0.2, 0.8) * width, rng.uniform(-0.2, 0.9) * width
    path = [(start, ground), (start + 8, ground), (end + width * 0.5, height), (end, height)]
    cv2.fillPoly(image, [np.array(path).astype(np.int32)], _light(rng), cv2.LINE_AA)


def _room(rng: np.random.Generator, image: np.ndarray, ground: int) -> None:
    """A wall with shelves, doors and posters, and a tiled floor."""
    width = image.shape[1]
    _gradient(image[:ground], _light(rng), _dull(rng))
    for _ in range(rng.integers(2, 6)):
        x, y = int(rng.integers(width)), int(ground * rng.uniform(0, 0.6))
        size = (int(width * rng.uniform(0.05, 0.2)), int(ground * rng.uniform(0.2, 0.7)))
        cv2.rectangle(image, (x, y), (x + size[0], min(y + size[1], ground)), sample_color(rng), -1)
    shelf = int(rng.integers(width))
    for _ in range(rng.integers(0, 40)):  # goods on the shelf, no bigger than a torso
        x, y = shelf + int(rng.integers(width // 3)), int(ground * rng.uniform(0, 0.9))
        cv2.rectangle(image, (x, y), (x + 5, min(y + 9, ground)), sample_color(rng), -1)
    _perspective_floor(rng, image, ground)


def _plaza(rng: np.random.Generator, image: np.ndarray, ground: int) -> None:
    """A wide floor of slabs before a far row of things."""
    width = image.shape[1]
    _gradient(image[:ground], _light(rng), _light(rng))
    for x in range(0, width, max(6, width // 24)):
        top = int(ground * rng.uniform(0.45, 0.95))
        color = sample_color(rng) if rng.random() < 0.3 else _dull(rng)
        image[top:ground, x : x + int(rng.integers(4, max(5, width // 16)))] = color
    _perspective_floor(rng, image, ground)


def _haze(rng: np.random.Generator, image: np.ndarray, ground: int) -> None:
    """Nothing but blurred blobs of color."""
    height, width = image.shape[:2]
    blobs = np.array([[sample_color(rng) for _ in range(6)] for _ in range(5)], np.float32)
    calm = 0.5 * blobs + 0.5 * np.array(_dull(rng), np.float32)
    image[:] = np.clip(cv2.resize(calm, (width, height), interpolation=cv2.INTER_CUBIC), 0, 255)
    image[ground:] = image[ground:] // 2 + np.array(_light(rng), np.uint8) // 2


def _perspective_floor(rng: np.random.Generator, image: np.ndarray, ground: int) -> None:
    height, width = image.shape[:2]
    _gradient(image[ground:], _dull(rng), _dull(rng))
    joint, vanishing = _dull(rng), (width * rng.uniform(0.2, 0.8), ground - height * 0.15)
    for x in np.linspace(-2 * width, 3 * width, int(rng.integers(14, 34))):
        share = (ground - vanishing[1]) / (height - vanishing[1])
        top = (int(vanishing[0] + (x - vanishing[0]) * share), ground)
        cv2.line(image, top, (int(x), height), joint, 1, cv2.LINE_AA)
    for share in np.linspace(0.1, 1, int(rng.integers(4, 9))) ** 2:
        y = int(ground + (height - ground) * share)
        cv2.line(image, (0, y), (width, y), joint, 1)


def _cloud(
    rng: np.random.Generator, height: int, width: int, cells: int, low: float, high: float
) -> Float[np.ndarray, "H W"]:
    """Smooth random factors, about `cells` blobs from top to bottom."""
    shape = (cells + 2, cells * width // height + 2)
    coarse = rng.random(shape, np.float32) * (high - low) + low
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)


def _gradient(region: np.ndarray, top: Color, bottom: Color) -> None:
    """Fills a region (in place) with a vertical gradient."""
    share = np.linspace(0, 1, len(region))[:, None, None]
    region[:] = np.array(top) * (1 - share) + np.array(bottom) * share


def _dull(rng: np.random.Generator) -> Color:
    """A color of walls, floors and metal: nearly gray, neither black nor white."""
    gray, tint = rng.integers(70, 190), rng.integers(-22, 23, 3)
    red, green, blue = map(int, gray + tint)
    return red, green, blue


def _light(rng: np.random.Generator) -> Color:
    """A pale color, as of the sky."""
    red, green, blue = map(int, rng.integers(160, 225) + rng.integers(-18, 19, 3))
    return red, green, blue


def _green(rng: np.random.Generator) -> Color:
    """A color of leaves and grass."""
    return int(rng.integers(30, 80)), int(rng.integers(80, 160)), int(rng.integers(40, 115))
