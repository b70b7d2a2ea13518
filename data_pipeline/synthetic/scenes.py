"""Photos of the synthetic data set: people and things placed in a backdrop, under some light."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from data_pipeline.synthetic.backdrops import draw_backdrop, draw_thing
from data_pipeline.synthetic.canvas import Sprite
from data_pipeline.synthetic.figures import draw_person
from data_pipeline.synthetic.people import Appearance, sample_pose

# Heights of people, as shares of the photo's height (36 to 150 pixels of 192).
SMALLEST, LARGEST = 0.19, 0.78
# At least this share of everybody's pixels is in the photo and not covered by anything.
MIN_VISIBLE = 0.65
# Places that are tried for a person; the best one is taken when none leaves enough visible.
_PLACING_TRIES = 40


@dataclasses.dataclass(frozen=True)
class Scene:
    """A photo (BGR) and its people in the order in which they were asked for.

    `boxes` are x, y, width, height in whole pixels around what is visible of each person, and
    `visible` the share of the person's pixels that is.
    """

    image: UInt8[np.ndarray, "H W 3"]
    boxes: Int[np.ndarray, "G 4"]
    visible: Float[np.ndarray, "G"]


@dataclasses.dataclass(frozen=True)
class _Item:
    """A cut-out in its final size with its top left corner; larger `depth` is nearer to us."""

    sprite: Sprite
    x: int
    y: int
    depth: float
    person: bool

    def window(self, height: int, width: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """The part of the photo that the item covers, and the part of the item that is in it."""
        rows, columns = self.sprite.alpha.shape
        top, left = max(0, self.y), max(0, self.x)
        bottom, right = (
            max(top, min(height, self.y + rows)),
            max(left, min(width, self.x + columns)),
        )
        inside = (slice(top - self.y, bottom - self.y), slice(left - self.x, right - self.x))
        return (slice(top, bottom), slice(left, right)), inside


def draw_scene(
    people: Sequence[Appearance], height: int, width: int, rng: np.random.Generator
) -> Scene:
    """Draws a photo of `height` × `width` pixels in which all `people` can be seen."""
    image, ground = draw_backdrop(rng, height, width)
    # Row of the feet of a person: the smallest stands where the ground begins.
    slope = (rng.uniform(0.9, 1.2) * height - ground) / ((LARGEST - SMALLEST) * height)

    items: list[_Item] = []
    for _ in range(rng.integers(0, 4)):
        sprite, relative = draw_thing(rng)
        items.append(_place(sprite, relative, False, ground, slope, (height, width), rng))
    for person in people:
        sprite = draw_person(person, sample_pose(rng), rng)
        tried: list[tuple[float, _Item]] = []
        for _ in range(_PLACING_TRIES):
            item = _place(sprite, 1.0, True, ground, slope, (height, width), rng)
            visible = _visible_shares([*items, item], _owners([*items, item], height, width)).min()
            tried.append((float(visible), item))
            if visible >= MIN_VISIBLE:
                break
        items.append(max(tried, key=lambda one: one[0])[1])  # of equal ones the first

    owners = _owners(items, height, width)
    masks = [owners == index for index, item in enumerate(items) if item.person]
    _compose(image, items)
    boxes = np.array([cv2.boundingRect(mask.view(np.uint8)) for mask in masks], np.int32)
    return Scene(_light(image, rng), boxes.reshape(-1, 4), _visible_shares(items, owners))


def _place(
    sprite: Sprite,
    relative: float,
    person: bool,
    ground: int,
    slope: float,
    size: tuple[int, int],
    rng: np.random.Generator,
) -> _Item:
    """Scales a cut-out (`relative`: its height in people) and stands it somewhere."""
    tall = size[0] * rng.uniform(SMALLEST, LARGEST)
    feet = ground + (tall - SMALLEST * size[0]) * slope + size[0] * rng.uniform(0.01, 0.06)
    sprite = sprite.resized(max(4, round(tall * relative)))
    rows, columns = sprite.alpha.shape
    x = round(rng.uniform(0, size[1]) - columns / 2)
    return _Item(sprite, x, round(feet) - rows, feet, person)


def _owners(items: Sequence[_Item], height: int, width: int) -> Int[np.ndarray, "H W"]:
    """For every pixel the index of the item that is seen there, -1 for the backdrop."""
    owners = np.full((height, width), -1, np.int16)
    for index in _far_to_near(items):
        outside, inside = items[index].window(height, width)
        owners[outside][_solid(items[index].sprite)[inside]] = index
    return owners


def _visible_shares(
    items: Sequence[_Item], owners: Int[np.ndarray, "H W"]
) -> Float[np.ndarray, "G"]:
    """The share of each person's pixels that is seen, people in the order of `items`."""
    seen = np.bincount(owners.ravel() + 1, minlength=len(items) + 1)[1:]
    return np.array(
        [
            seen[index] / np.count_nonzero(_solid(item.sprite))
            for index, item in enumerate(items)
            if item.person
        ]
    )


def _compose(image: Float[np.ndarray, "H W 3"], items: Sequence[_Item]) -> None:
    """Paints the items over the backdrop (in place), each on a soft shadow on the ground."""
    height, width = image.shape[:2]
    for index in _far_to_near(items):
        item = items[index]
        for layer in (_shadow(item), item):
            outside, inside = layer.window(height, width)
            cover = layer.sprite.alpha[inside].astype(np.float32)[..., None] * (1 / 255)
            image[outside] = image[outside] * (1 - cover) + layer.sprite.color[inside]


def _shadow(item: _Item) -> _Item:
    """A dark blurred ellipse under the item's feet."""
    rows, columns = item.sprite.alpha.shape
    half = max(2, rows // 22)
    alpha = np.zeros((2 * half + 1, columns), np.uint8)
    cv2.ellipse(alpha, (columns // 2, half), (columns // 2, half), 0, 0, 360, 110, -1)
    alpha = cv2.blur(alpha, (3, 3))
    shade = Sprite(np.zeros((*alpha.shape, 3), np.uint8), alpha)
    return _Item(shade, item.x, item.y + rows - half - 1, item.depth, False)


def _light(
    image: Float[np.ndarray, "H W 3"], rng: np.random.Generator
) -> UInt8[np.ndarray, "H W 3"]:
    """What the light and the camera do: brightness, cast, gamma, uneven light, blur, noise."""
    height, width = image.shape[:2]
    lamp: Any = rng.uniform(0.92, 1.06, (3, 4)).astype(np.float32)
    cast = rng.uniform(0.95, 1.05, 3)
    brightness, gamma = np.exp(rng.uniform(np.log(0.8), np.log(1.12))), rng.uniform(0.9, 1.12)
    lamp = cv2.resize(lamp, (width, height), interpolation=cv2.INTER_LINEAR)
    lit = cv2.convertScaleAbs(cv2.multiply(image, cv2.merge([lamp] * 3)))
    levels = np.linspace(0, 1, 256)[:, None] ** gamma * 255 * brightness * cast
    lit = cv2.LUT(lit, np.clip(levels, 0, 255).astype(np.uint8)[:, None])
    if rng.random() < 0.3:
        lit = cv2.GaussianBlur(lit, (3, 3), rng.uniform(0.4, 0.9))
    # Evenly distributed noise around 0, up to 2 to 7 gray levels: much cheaper than normal.
    noise, strength = rng.integers(0, 256, image.shape, np.uint8), rng.uniform(2, 7) / 128
    return cv2.addWeighted(lit, 1, noise, strength, -128 * strength)


def _far_to_near(items: Sequence[_Item]) -> list[int]:
    return sorted(range(len(items)), key=lambda index: items[index].depth)


def _solid(sprite: Sprite) -> Bool[np.ndarray, "h w"]:
    """Pixels that mostly show the cut-out."""
    return sprite.alpha > 127
