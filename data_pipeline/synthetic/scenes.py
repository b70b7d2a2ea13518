"""Photos of the synthetic data set: people and things in a place, under some light."""

from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from data_pipeline.synthetic import figures
from data_pipeline.synthetic.figures import Appearance, Color, Sprite, pick, sample_color

# Heights of people, as shares of the photo's height (36 to 150 pixels of 192).
SMALLEST, LARGEST = 0.19, 0.78
# Places are tried for a person until this share of the person can be seen, else the best is taken.
_MIN_VISIBLE, _TRIES = 0.65, 30

# Things people stand among: height in heights of a person; then shapes, later ones in front, as
# left, top, right, bottom in hundredths of the thing's height (x from its middle) and material.
_THINGS: tuple[tuple[float, tuple[tuple[int, int, int, int, str], ...]], ...] = (
    # Sign, tree, bush, bin, kiosk, car.
    (1.3, ((-2, 10, 2, 100, "metal"), (-17, 0, 17, 32, "paint"))),
    (1.9, ((-5, 40, 5, 100, "wood"), (-34, 10, 8, 48, "leaves"), (-10, 0, 30, 46, "leaves"))),
    (0.5, ((-90, 20, 10, 99, "leaves"), (-20, 0, 80, 99, "leaves"))),
    (0.45, ((-30, 10, 30, 100, "paint"), (-36, 0, 36, 14, "metal"))),
    (1.25, ((-40, 0, 40, 100, "paint"), (-30, 12, 30, 55, "glass"))),
    (
        0.62,
        (
            (-65, 0, 60, 50, "paint"),
            (-52, 10, 48, 42, "glass"),
            (-115, 42, 115, 85, "paint"),
            (-92, 66, -58, 100, "rubber"),
            (58, 66, 92, 100, "rubber"),
        ),
    ),
)
_ROUND, _SQUARE = ("leaves", "rubber"), np.array(((-1, -1), (1, -1), (1, 1), (-1, 1)))


def draw_scene(
    people: Sequence[Appearance], height: int, width: int, rng: np.random.Generator
) -> tuple[UInt8[np.ndarray, "H W 3"], Int[np.ndarray, "G 4"]]:
    """Draws a photo of `height` × `width` pixels in which all `people` can be seen.

    Returns the photo (BGR) and boxes around what is seen of the people, in their order: x, y,
    width, height in whole pixels.
    """
    image, ground = _draw_backdrop(rng, height, width)
    sprites = [(1.0, figures.draw_person(person, rng)) for person in people]
    sprites += [_draw_thing(rng) for _ in range(rng.integers(0, 4))]
    # The row of the feet grows with the height: the smallest stand where the ground begins.
    slope = (rng.uniform(0.9, 1.2) * height - ground) / ((LARGEST - SMALLEST) * height)
    # From near to far: what comes later covers nothing that is there.
    heights = np.sort(rng.uniform(SMALLEST, LARGEST, len(sprites)))[::-1] * height
    free, boxes, placed = np.ones((height, width), bool), np.zeros((len(people), 4), np.int32), []
    for index, tall in zip(rng.permutation(len(sprites)), heights, strict=True):
        relative, sprite = sprites[index]
        feet = ground + (tall - SMALLEST * height) * slope + height * rng.uniform(0.01, 0.06)
        tries = _TRIES if index < len(people) else 1
        window, inside = _place(_resized(sprite, tall * relative), round(feet), free, tries, rng)
        seen = np.zeros((height, width), np.uint8)
        seen[window] = _solid(inside) & free[window]
        if index < len(people):
            boxes[index] = cv2.boundingRect(seen)
        free &= seen == 0
        placed.append((window, inside))
    for window, inside in reversed(placed):
        _paste(image[window], inside, rng)
    return _light(image, rng), boxes


def _place(
    sprite: Sprite, bottom: int, free: Bool[np.ndarray, "H W"], tries: int, rng: np.random.Generator
) -> tuple[tuple[slice, slice], Sprite]:
    """A part of the photo and what of a cut-out is in it, where enough is seen."""
    (rows, columns), (height, width) = sprite.shape[:2], free.shape
    enough = _MIN_VISIBLE * np.count_nonzero(_solid(sprite))
    found: list[tuple[int, tuple[slice, slice], Sprite]] = []
    while len(found) < tries and (not found or found[-1][0] < enough):
        top, left = bottom - rows, round(rng.uniform(0, width) - columns / 2)
        window = slice(max(0, top), min(height, bottom)), slice(max(0, left), left + columns)
        inside = sprite[max(0, -top) : height - top, max(0, -left) : width - left]
        found.append((int(np.count_nonzero(_solid(inside) & free[window])), window, inside))
    return max(found, key=lambda one: one[0])[1:]


def _resized(sprite: Sprite, height: float) -> Sprite:
    size = max(2, round(sprite.shape[1] * height / sprite.shape[0])), max(4, round(height))
    shrinks = height < sprite.shape[0]
    return cv2.resize(sprite, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def _solid(sprite: Sprite) -> Bool[np.ndarray, "h w"]:
    """Pixels that mostly show the cut-out; its shadow is none of them."""
    return sprite[..., 3] > 127


def _paste(region: Float[np.ndarray, "h w 3"], sprite: Sprite, rng: np.random.Generator) -> None:
    """Paints a cut-out over a region (in place), with folds, in more or less light."""
    if sprite.size:
        light = rng.uniform(0.85, 1.1) * _cloud(rng, sprite.shape, 7, 0.86, 1.14)
        cover = sprite[..., 3:] * np.float32(1 / 255)
        region[:] = region * (1 - cover) + sprite[..., :3] * light


def _draw_thing(rng: np.random.Generator) -> tuple[float, Sprite]:
    """A random thing and its height in heights of a person."""
    relative, shapes = pick(rng, _THINGS)
    colors = {
        "paint": sample_color(rng) if rng.random() < 0.5 else _gray(rng),
        "leaves": _green(rng),
        "metal": _gray(rng),
        "glass": (150, 130, 110),
        "wood": (45, 65, 90),
        "rubber": (35, 35, 38),
    }
    canvas = figures.Canvas(224, 500, (250, 200), 1.6 * max(shape[2] for shape in shapes))
    for left, top, right, bottom, material in shapes:
        low, high = 2 * np.array((left + 125, top)), 2 * np.array((right + 125, bottom))
        outline = figures.CIRCLE if material in _ROUND else _SQUARE
        color = colors[material]
        canvas.polygon((low + high + outline * (high - low)) / 2, color, color)
    return relative, canvas.sprite()


def _draw_backdrop(
    rng: np.random.Generator, height: int, width: int
) -> tuple[Float[np.ndarray, "H W 3"], int]:
    """An empty place (BGR, 0 to 255 and a little above) and the row where its ground begins."""
    ground = int(height * rng.uniform(0.22, 0.5))
    image = np.empty((height, width, 3), np.uint8)
    pick(rng, (_street, _park, _room))(rng, image, ground)
    patches, grain = (_cloud(rng, image.shape, cells, 0.85, 1.15) for cells in (6, height // 3))
    return image * (patches * grain), ground


def _street(rng: np.random.Generator, image: np.ndarray, ground: int) -> None:
    """Houses with windows, and a road."""
    height, width = image.shape[:2]
    _gradient(image[:ground], _gray(rng, 160, 225), _gray(rng, 160, 225))
    left = 0
    while left < width:
        right = left + int(width * rng.uniform(0.12, 0.35)) + 1
        top, step = int(ground * rng.uniform(0, 0.5)), int(height * rng.uniform(0.05, 0.11)) + 2
        image[top:ground, left:right] = sample_color(rng) if rng.random() < 0.3 else _gray(rng)
        pane = _gray(rng)
        for y in range(top + step // 2, ground - step, step * 3 // 2):
            for x in range(left + step // 2, right - step // 2, step * 2):
                image[y : y + step, x : x + step] = pane
        left = right
    _gradient(image[ground:], _gray(rng), _gray(rng))
    kerb, dash = int(ground + (height - ground) * rng.uniform(0.2, 0.7)), width // 10 + 1
    image[kerb : kerb + height // 80 + 1] = _gray(rng, 160, 225)
    middle = (kerb + height) // 2
    for x in range(rng.integers(dash), width, 2 * dash):
        image[middle : middle + height // 90 + 1, x : x + dash] = (215, 220, 220)


def _park(rng: np.random.Generator, image: np.ndarray, ground: int) -> None:
    """Sky, trees, grass and a path."""
    height, width = image.shape[:2]
    _gradient(image[:ground], (235, 200, 150), (240, 235, 225))
    for _ in range(rng.integers(8, 20)):
        center = int(rng.integers(width)), int(ground * rng.uniform(0.4, 1))
        radius = int(height * rng.uniform(0.05, 0.14))
        cv2.circle(image, center, radius, _green(rng), -1, cv2.LINE_AA)
    _gradient(image[ground:], _green(rng), _green(rng))
    start, end = rng.uniform(0.2, 0.8) * width, rng.uniform(-0.2, 0.9) * width
    path = [(start, ground), (start + 8, ground), (end + width * 0.5, height), (end, height)]
    cv2.fillPoly(image, [np.array(path).astype(np.int32)], _gray(rng, 160, 225), cv2.LINE_AA)


def _room(rng: np.random.Generator, image: np.ndarray, ground: int) -> None:
    """A wall with doors, posters and goods, and a tiled floor."""
    height, width = image.shape[:2]
    _gradient(image[:ground], _gray(rng, 160, 225), _gray(rng))
    _gradient(image[ground:], _gray(rng), _gray(rng))
    # Goods are no bigger than a torso.
    for count, share in ((rng.integers(2, 6), 0.15), (rng.integers(0, 30), 0.025)):
        for x, y in rng.uniform(0, (width, 0.8 * ground), (count, 2)).astype(int):
            right, bottom = x + int(width * share), min(ground, y + int(2 * width * share))
            image[y:bottom, x:right] = sample_color(rng)
    joint = _gray(rng)
    for x in np.linspace(-2 * width, 3 * width, int(rng.integers(14, 34))):
        cv2.line(image, (int(width / 2 + (x - width / 2) / 3), ground), (int(x), height), joint, 1)
    for share in np.linspace(0.1, 1, int(rng.integers(4, 9))) ** 2:
        image[int(ground + (height - 1 - ground) * share)] = joint


def _light(
    image: Float[np.ndarray, "H W 3"], rng: np.random.Generator
) -> UInt8[np.ndarray, "H W 3"]:
    """What lamps and camera do: uneven light, color cast, gamma, blur, noise."""
    lit = cv2.convertScaleAbs(image * _cloud(rng, image.shape, 2, 0.92, 1.06))
    cast = rng.uniform(0.95, 1.05, 3) * rng.uniform(0.8, 1.12)
    levels = np.linspace(0, 1, 256)[:, None] ** rng.uniform(0.9, 1.12) * 255 * cast
    lit = cv2.LUT(lit, np.clip(levels, 0, 255).astype(np.uint8)[:, None])
    if rng.random() < 0.3:
        lit = cv2.GaussianBlur(lit, (3, 3), rng.uniform(0.4, 0.9))
    # Evenly distributed noise around 0: much cheaper than normal.
    noise, strength = rng.integers(0, 256, image.shape, np.uint8), rng.uniform(2, 7) / 128
    return cv2.addWeighted(lit, 1, noise, strength, -128 * strength)


def _cloud(
    rng: np.random.Generator, shape: tuple[int, ...], cells: int, low: float, high: float
) -> Float[np.ndarray, "H W 1"]:
    """Smooth random factors, about `cells` blobs from top to bottom."""
    height, width = shape[:2]
    coarse = rng.random((cells + 2, cells * width // height + 2), np.float32) * (high - low) + low
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)[..., None]


def _gradient(region: np.ndarray, top: Color, bottom: Color) -> None:
    """Fills a region (in place) with a vertical gradient."""
    share = np.linspace(0, 1, len(region))[:, None, None]
    region[:] = np.array(top) * (1 - share) + np.array(bottom) * share


def _gray(rng: np.random.Generator, darkest: int = 70, lightest: int = 190) -> Color:
    """A color of walls, floors and metal, or of a pale sky."""
    blue, green, red = map(int, rng.integers(darkest, lightest) + rng.integers(-20, 21, 3))
    return blue, green, red


def _green(rng: np.random.Generator) -> Color:
    """A color of leaves and grass."""
    return int(rng.integers(30, 80)), int(rng.integers(80, 160)), int(rng.integers(40, 115))
