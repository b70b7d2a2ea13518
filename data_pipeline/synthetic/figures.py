"""People of the synthetic data set: how an identity looks, and its picture in a random pose.

A figure is a body in space that is turned about its upright axis and painted from back to front, so
that all sides follow from one description.
"""

import colorsys
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import cv2
import numpy as np
from jaxtyping import Float, UInt8

_T = TypeVar("_T")
Color = tuple[int, int, int]  # BGR, as OpenCV stores it
Sprite = UInt8[np.ndarray, "_h _w 4"]  # a cut-out: BGR multiplied by alpha, and alpha
# x to the person's left, y down, z to where the person looks, in pixels of the canvas.
Point = tuple[float, float, float]
Radii = tuple[float, float]

# Where cloth shows its second color: y from the shoulder down and x, both in half periods.
PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "plain": lambda y, x: y < -np.inf,
    "bands": lambda y, x: y % 2 < 1,
    "stripes": lambda y, x: x % 2 < 1,
    "checks": lambda y, x: (y % 2 < 1) ^ (x % 2 < 1),
    "diagonal": lambda y, x: (y + x) % 2 < 1,
    "dots": lambda y, x: (y % 2 - 1) ** 2 + (x % 2 - 1) ** 2 < 0.5,
    "halves": lambda y, x: y > 3,
    "chest": lambda y, x: (y > 1) & (y < 3),
}
# What has a color, and its weight where people are compared: large areas count most.
PARTS = {
    "top": 1,
    "second": 0.7,
    "bottoms": 0.9,
    "hair": 0.4,
    "bag": 0.3,
    "shoes": 0.2,
    "skin": 0.1,
}
_SKINS: tuple[Color, ...] = ((188, 208, 240), (150, 185, 228), (105, 145, 198), (62, 92, 145))
_HAIRS: tuple[Color, ...] = ((24, 22, 22), (32, 48, 76), (110, 175, 222), (42, 74, 168))
_EYES = (40, 40, 45)

# The canvas of a figure, and where on it the axis and some heights of the body are.
_HEIGHT, _WIDTH, _AXIS = 310, 236, 118
_HEAD, _SHOULDER, _HIP, _GROUND = 77, 102, 176, 290
_ANGLES = np.linspace(0, 2 * math.pi, 16, endpoint=False)
CIRCLE = np.stack((np.cos(_ANGLES), np.sin(_ANGLES)), axis=1)


@dataclasses.dataclass(frozen=True)
class Appearance:
    """What makes a person recognizable, the same in every photo; lengths in canvas pixels."""

    colors: dict[str, Color]  # of PARTS
    pattern: str
    period: float
    top_below_hip: float
    sleeves: float  # the part of the upper arm that is covered; 2 covers the whole arm
    bottoms: str  # trousers, shorts or skirt
    hair_length: float
    bag: str  # none, backpack or shoulder
    width: float

    def describe(self) -> Float[np.ndarray, "D"]:
        """Numbers whose Euclidean distance says how unlike two people look."""
        pixels = np.array([[self.colors[part] for part in PARTS]], np.uint8)
        colors = cv2.cvtColor(pixels, cv2.COLOR_BGR2Lab)[0] / 255
        kinds = [0.15 * (self.pattern == name) for name in PATTERNS]
        return np.append(colors * np.array([*PARTS.values()])[:, None], kinds)


def sample_color(rng: np.random.Generator) -> Color:
    """A color of cloth: a quarter are grays from black to white, the rest have all hues."""
    if rng.random() < 0.25:
        saturation, value = 0.05, pick(rng, (0.1, 0.35, 0.6, 0.92))
    else:
        saturation, value = rng.uniform(0.65, 1.0), rng.uniform(0.4, 0.95)
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), saturation, value)
    return int(255 * blue), int(255 * green), int(255 * red)


def sample_person(
    rng: np.random.Generator, known: Float[np.ndarray, "P D"], candidates: int
) -> Appearance:
    """Of so many random people, the one who looks least like those who are `known`."""
    people = [_sample(rng) for _ in range(candidates)]
    if not len(known):
        return people[0]
    nearest = [np.linalg.norm(known - person.describe(), axis=1).min() for person in people]
    return people[int(np.argmax(nearest))]


def _sample(rng: np.random.Generator) -> Appearance:
    colors = {part: sample_color(rng) for part in PARTS}
    colors |= {"hair": pick(rng, _HAIRS), "skin": pick(rng, _SKINS)}
    while np.abs(np.subtract(colors["top"], colors["second"])).max() < 90:
        colors["second"] = sample_color(rng)
    pattern, bag = pick(rng, (*PATTERNS,)), pick(rng, ("none", "backpack", "shoulder"))
    # What is not there looks like what is there instead.
    colors["second"] = colors["top" if pattern == "plain" else "second"]
    colors["bag"] = colors["top" if bag == "none" else "bag"]
    return Appearance(
        colors=colors,
        pattern=pattern,
        period=pick(rng, (20, 30, 40)),
        top_below_hip=pick(rng, (2, 2, 16, 16, 48)),
        sleeves=pick(rng, (0.0, 0.6, 2.0)),
        bottoms=pick(rng, ("trousers", "trousers", "shorts", "skirt")),
        hair_length=pick(rng, (0, 20, 45)),
        bag=bag,
        width=rng.uniform(0.84, 1.25),
    )


def pick(rng: np.random.Generator, options: Sequence[_T]) -> _T:
    """One of `options`, all as likely."""
    return options[int(rng.integers(len(options)))]


class Canvas:
    """Filled outlines, later ones over earlier ones, on a flat shadow."""

    def __init__(self, height: int, width: int, feet: tuple[int, int], shadow: float) -> None:
        self._index = np.zeros((height, width), np.uint8)
        axes = (round(shadow), round(shadow / 4))
        cv2.ellipse(self._index, feet, axes, 0, 0, 360, 1, -1)
        # BGR and alpha of every entry; the second half is for where cloth has its second color.
        self._palette = np.zeros((2, 128, 4))
        self._palette[:, 1, 3] = 110
        self._used = 2

    def polygon(self, points: np.ndarray, color: Color, second: Color, light: float = 1) -> None:
        """Fills an outline; its edge is darker, so that parts stand apart."""
        corners, entry = [np.rint(points).astype(np.int32)], self._used
        cv2.fillPoly(self._index, corners, entry)
        cv2.polylines(self._index, corners, True, entry + 1, 1)
        shades = np.array([[light], [0.72 * light]])
        self._palette[0, entry : entry + 2, :3] = shades * color
        self._palette[1, entry : entry + 2, :3] = shades * second
        self._palette[:, entry : entry + 2, 3] = 255
        self._used += 2

    def sprite(self, second: np.ndarray | bool = False) -> Sprite:
        """What has been painted, without the empty border; `second`: where cloth changes color."""
        x, y, width, height = cv2.boundingRect(self._index)
        index = (self._index + np.uint8(128) * second)[y : y + height, x : x + width]
        palette = np.clip(self._palette, 0, 255).astype(np.uint8).reshape(256, 1, 4)
        return cv2.LUT(cv2.merge([index] * 4), palette)


def draw_person(person: Appearance, rng: np.random.Generator) -> Sprite:
    """Draws a person, some 240 pixels tall; `rng` decides on the side seen, pose and cloth."""
    figure = _Figure(person, rng)
    figure.draw_limbs()
    figure.draw_trunk()
    figure.draw_head()
    figure.draw_bag()
    canvas = Canvas(_HEIGHT, _WIDTH, (_AXIS, _GROUND), 38)
    figure.paint(canvas)
    # Patterns keep their height on the body; sideways they hang a little differently.
    y, x = np.ogrid[-_SHOULDER : _HEIGHT - _SHOULDER, :_WIDTH]
    half = person.period / 2
    return canvas.sprite(PATTERNS[person.pattern](y / half, x / half + rng.uniform(0, 2)))


class _Figure:
    """The parts of a person who is turned by a random angle (0: looks at us)."""

    def __init__(self, person: Appearance, rng: np.random.Generator) -> None:
        self._person, self._rng, self._width = person, rng, person.width
        turn = rng.uniform(0, 2 * math.pi)
        self._cos, self._sin = math.cos(turn), math.sin(turn)
        self._parts: list[tuple[float, float, np.ndarray, str]] = []

    def paint(self, canvas: Canvas) -> None:
        """Paints all parts, far ones first and darker."""
        colors = {**self._person.colors, "eyes": _EYES}
        for _, depth, outline, part in sorted(self._parts, key=lambda part: part[0]):
            second = colors["second" if part == "top" else part]
            light = min(1.05, max(0.75, 1 + depth / 150))
            canvas.polygon(outline, colors[part], second, light)

    def draw_limbs(self) -> None:
        """Arms and legs, standing or walking."""
        rng, width, bottoms = self._rng, self._width, self._person.bottoms
        stride = rng.uniform(-0.45, 0.45)
        for side in (-1, 1):
            hip = (side * 10 * width, _HIP, 0)
            knee = _reach(hip, 56, side * stride, side * 0.04)
            ankle = _reach(knee, 52, side * stride - rng.uniform(0, 0.5) * (side * stride < 0.1))
            toe = (ankle[0], ankle[1] + 5, ankle[2] + 10)
            shin = "bottoms" if bottoms == "trousers" else "skin"
            thigh = "skin" if bottoms == "skirt" else "bottoms"
            self._limb(ankle, toe, (6, 4), "shoes", -100)
            self._limb(knee, ankle, (8.5 * width, 6 * width), shin, -100)
            self._limb(hip, knee, (11.5 * width, 9 * width), thigh, -100)
            self._arm(side, -side * stride)

    def _arm(self, side: int, forward: float) -> None:
        rng, width, sleeves = self._rng, self._width, self._person.sleeves
        outward, bend = rng.uniform(0.1, 0.4), rng.uniform(0, 0.6)
        bend += 1.5 * (rng.random() < 0.1)  # a hand raised
        shoulder = (side * 23 * width, _SHOULDER + 7, 0)
        elbow = _reach(shoulder, 37, forward, side * outward)
        hand = _reach(elbow, 35, forward + bend, side * outward / 2)
        self._limb(hand, hand, (6, 6), "skin", 2)
        self._limb(elbow, hand, (6.5 * width, 5 * width), "top" if sleeves > 1 else "skin", 2)
        self._limb(shoulder, elbow, (8 * width, 6.8 * width), "skin", 2)
        if sleeves:
            end = _reach(shoulder, 37 * min(1, sleeves), forward, side * outward)
            self._limb(shoulder, end, (8.6 * width, 7.6 * width), "top", 2)

    def draw_trunk(self) -> None:
        """Top and skirt."""
        low = _HIP - _SHOULDER + self._person.top_below_hip
        self._column([(10, 8, -4), (24, 13, 1), (27, 15, 10), (20, 15, 48), (21, 16, low)], "top")
        if self._person.bottoms == "skirt":
            self._column([(18, 14, 62), (21, 17, 80), (30, 26, 136)], "bottoms", layer=-40)

    def draw_head(self) -> None:
        """Neck, head, face and hair."""
        facing, length = self._cos, self._person.hair_length
        top, nose = _HEAD - 6 - 6 * facing, (0, _HEAD + 4, 14)
        self._limb((0, _HEAD + 12, 0), (0, _SHOULDER, 0), (7, 7), "skin", 0.1)
        self._limb((0, _HEAD - 3, 0), (0, _HEAD + 4, 1), (14, 13), "skin", 0.2)
        self._limb((0, top, -5), (0, top - 2, -4), (14 - facing, 11 - facing), "hair", 5.3)
        if length:
            self._limb((0, _HEAD, -7), (0, _HEAD + length, -12), (13, 11), "hair")
        if facing > -0.3:
            self._limb(nose, nose, (3, 3), "skin", 6)
        for eye in ((-6, _HEAD + 1, 12), (6, _HEAD + 1, 12)):
            if self._project(eye)[1] > 2:
                self._limb(eye, eye, (1.4, 1.4), "eyes", 9)

    def draw_bag(self) -> None:
        """Backpack or shoulder bag, with straps."""
        width = self._width
        if self._person.bag == "backpack":
            self._column([(18, 8, 6), (21, 10, 12), (21, 10, 64)], "bag", z=-22 * width)
            for x in (-15 * width, 15 * width):
                self._limb((x, _SHOULDER, 12), (x, _SHOULDER + 44, 16), (4, 4), "bag")
        elif self._person.bag == "shoulder":
            x = 25 * width
            for z in (-15, 15):
                self._limb((-17 * width, _SHOULDER, z), (x, _HIP, z), (3, 3), "bag")
            self._limb((x, _HIP + 12, -9), (x, _HIP + 12, 9), (13, 13), "bag", 4)

    def _project(self, point: Point) -> tuple[tuple[float, float], float]:
        """Where a point is on the canvas, and how much nearer to us than the axis."""
        x, y, z = point
        at = _AXIS + x * self._cos + z * self._sin, y
        return at, z * self._cos - x * self._sin

    def _limb(self, start: Point, end: Point, radii: Radii, part: str, layer: float = 0) -> None:
        """Adds the hull of two balls; `layer` is added to the depth by which parts are sorted."""
        (start_at, start_depth), (end_at, end_depth) = self._project(start), self._project(end)
        balls = np.concatenate((CIRCLE * radii[0] + start_at, CIRCLE * radii[1] + end_at))
        depth = (start_depth + end_depth) / 2
        outline = cv2.convexHull(balls.astype(np.float32))[:, 0]
        self._parts.append((depth + layer, depth, outline, part))

    def _column(self, sections: Sequence[Point], part: str, layer: float = 0, z: float = 0) -> None:
        """Adds ellipses on top of each other: half width, half depth, y below the shoulder."""
        (x, _), depth = self._project((0, 0, z))
        half = [
            (math.hypot(wide * self._cos, deep * self._sin) * self._width, _SHOULDER + y)
            for wide, deep, y in sections
        ]
        left = [(x - reach, y) for reach, y in reversed(half)]
        outline = np.array([(x + reach, y) for reach, y in half] + left)
        self._parts.append((depth + layer, depth, outline, part))


def _reach(start: Point, length: float, forward: float, outward: float = 0.0) -> Point:
    """The point `length` away at these angles (radians) from straight down."""
    x, y, z = start
    down = length * math.cos(outward)
    x += length * math.sin(outward)
    return x, y + down * math.cos(forward), z + down * math.sin(forward)
