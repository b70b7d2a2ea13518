"""People of the synthetic data set: what belongs to an identity, and what changes.

`Appearance` is all that belongs to an identity (clothes, hair, bag, build). `Pose` is what
changes from photo to photo (side seen, limb angles). Colors are BGR, as OpenCV stores them.
"""

from __future__ import annotations

import colorsys
import dataclasses

import cv2
import numpy as np
from jaxtyping import Float

Color = tuple[int, int, int]
Point = tuple[float, float]

PATTERNS = ("plain", "bands", "stripes", "checks", "dots", "halves", "diagonal", "chest")
VIEWS = ("front", "back", "left", "right")
_SKINS: tuple[Color, ...] = ((188, 208, 240), (150, 185, 228), (105, 145, 198), (62, 92, 145))
_HAIRS: tuple[Color, ...] = (
    (24, 22, 22),
    (32, 48, 76),
    (52, 86, 128),
    (110, 175, 222),
    (42, 74, 168),
    (170, 172, 176),
)
_LEATHERS: tuple[Color, ...] = ((30, 30, 32), (38, 62, 100), (225, 228, 230), (60, 70, 170))


@dataclasses.dataclass(frozen=True)
class Garment:
    """Cloth: a pattern of two colors; `period` is its repeat in canvas pixels."""

    pattern: str
    color: Color
    second: Color
    period: int


@dataclasses.dataclass(frozen=True)
class Appearance:
    """What makes a person recognisable, the same in every photo."""

    skin: Color
    hair: Color
    hair_style: str  # bald, short, bob, long, bun or tail
    hat: str  # none, cap or beanie
    hat_color: Color
    top: Garment
    top_length: str  # waist, hip or coat
    sleeves: str  # none, short or long
    inner: Color | None  # shirt under an open jacket, seen from the front
    bottoms: Garment
    bottoms_kind: str  # trousers, shorts, skirt or dress
    shoes: Color
    bag: str  # none, backpack, shoulder or hand
    bag_color: Color
    bag_on_left: bool  # the person's own left
    width: float
    legs: float


@dataclasses.dataclass(frozen=True)
class Pose:
    """How the person stands: angles in radians from straight down, one per side.

    `arms` and `thighs` are swings (outward seen from the front or back, towards the face seen
    from the side); `elbows` and `knees` bend the lower part further.
    """

    view: str
    arms: Point
    elbows: Point
    thighs: Point
    knees: Point


def sample_color(rng: np.random.Generator) -> Color:
    """A cloth color: a quarter grays from black to white, the rest spread over all hues."""
    if rng.random() < 0.25:
        saturation, value = rng.uniform(0, 0.1), rng.choice((0.1, 0.35, 0.6, 0.92))
    else:
        saturation, value = rng.uniform(0.65, 1.0), rng.uniform(0.4, 0.95)
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), saturation, value)
    return int(255 * blue), int(255 * green), int(255 * red)


def sample_appearance(rng: np.random.Generator) -> Appearance:
    """One random person."""
    top = _sample_garment(rng, plain=0.3)
    kind = pick(rng, ("trousers", "shorts", "skirt", "dress"), (0.5, 0.18, 0.2, 0.12))
    plain_bottoms = Garment("plain", sample_color(rng), sample_color(rng), 30)
    bottoms = top if kind == "dress" else plain_bottoms
    if kind == "skirt" and rng.random() < 0.4:
        bottoms = _sample_garment(rng, plain=0.0)
    jacket = kind != "dress" and rng.random() < 0.25
    length = pick(rng, ("waist", "hip", "coat"), (0.45, 0.35, 0.2))
    return Appearance(
        skin=pick(rng, _SKINS),
        hair=pick(rng, _HAIRS),
        hair_style=pick(rng, ("bald", "short", "bob", "long", "bun", "tail")),
        hat=pick(rng, ("none", "cap", "beanie"), (0.7, 0.15, 0.15)),
        hat_color=sample_color(rng),
        top=top,
        top_length="waist" if kind == "dress" else length,
        sleeves="long" if jacket else pick(rng, ("none", "short", "long"), (0.15, 0.4, 0.45)),
        inner=sample_color(rng) if jacket else None,
        bottoms=bottoms,
        bottoms_kind=kind,
        shoes=sample_color(rng),
        bag=pick(rng, ("none", "backpack", "shoulder", "hand"), (0.4, 0.25, 0.2, 0.15)),
        bag_color=sample_color(rng) if rng.random() < 0.6 else pick(rng, _LEATHERS),
        bag_on_left=bool(rng.random() < 0.5),
        width=float(rng.uniform(0.84, 1.25)),
        legs=float(rng.uniform(0.92, 1.08)),
    )


def sample_appearances(rng: np.random.Generator, count: int) -> tuple[Appearance, ...]:
    """People who are all unlike each other: each the least similar of 40 random candidates."""
    chosen: list[Appearance] = []
    descriptors = np.empty((0, _describe(sample_appearance(rng)).size))
    for _ in range(count):
        person = sample_stranger(rng, descriptors, candidates=40)
        chosen.append(person)
        descriptors = np.vstack((descriptors, _describe(person)))
    return tuple(chosen)


def describe_all(people: tuple[Appearance, ...]) -> Float[np.ndarray, "P D"]:
    """Descriptors whose Euclidean distance says how unlike two people look."""
    return np.stack([_describe(person) for person in people])


def sample_stranger(
    rng: np.random.Generator, known: Float[np.ndarray, "P D"], candidates: int = 4
) -> Appearance:
    """The one of some random people who is least like anyone of `known` (descriptors)."""
    people = [sample_appearance(rng) for _ in range(candidates)]
    if not len(known):
        return people[0]
    nearest = [np.linalg.norm(known - _describe(person), axis=1).min() for person in people]
    return people[int(np.argmax(nearest))]


def sample_pose(rng: np.random.Generator) -> Pose:
    """A random way of standing, walking or holding the arms, seen from a random side."""
    view = pick(rng, VIEWS)
    if view in ("front", "back"):
        arms = rng.uniform(0.08, 0.4, 2)
        elbows = rng.uniform(-0.5, 0.3, 2)
        thighs = rng.uniform(0.0, 0.14, 2)
        knees = rng.uniform(-0.08, 0.03, 2)
    else:
        stride = rng.uniform(-0.5, 0.5)
        arms = np.array((-stride, stride)) * rng.uniform(0.4, 1.2) + rng.uniform(-0.1, 0.15, 2)
        elbows = rng.uniform(0.05, 0.6, 2)
        thighs = np.array((stride, -stride)) + rng.uniform(-0.05, 0.05, 2)
        knees = np.where(thighs < 0, rng.uniform(-0.6, -0.1, 2), rng.uniform(-0.2, 0, 2))
    if rng.random() < 0.2:  # one hand raised: a phone, a wave
        side = rng.integers(2)
        arms[side], elbows[side] = rng.uniform(0.3, 0.8), rng.uniform(1.6, 2.3)
    return Pose(view, *(_pair(limbs) for limbs in (arms, elbows, thighs, knees)))


def _pair(values: Float[np.ndarray, "2"]) -> tuple[float, float]:
    first, second = map(float, values)
    return first, second


def _describe(person: Appearance) -> Float[np.ndarray, "D"]:
    """Numbers whose distances follow how much people differ to the eye, big areas first."""
    jacket = person.inner is not None
    areas = (
        (person.top.color, 1.0),
        (person.top.color if person.top.pattern == "plain" else person.top.second, 0.7),
        (person.bottoms.color, 0.9),
        (person.inner if jacket else person.top.color, 0.3),
        (person.hat_color if person.hat != "none" else person.hair, 0.4),
        (person.shoes, 0.15),
        (person.bag_color if person.bag != "none" else person.top.color, 0.25),
    )
    pixels = np.array([[color for color, _ in areas]], np.uint8)
    lab = cv2.cvtColor(pixels, cv2.COLOR_BGR2Lab)[0].astype(np.float64) / 255
    colors = lab * np.array([weight for _, weight in areas])[:, None]
    kinds = [0.15 * (person.top.pattern == name) for name in PATTERNS]
    kinds += [0.1 * (person.bottoms_kind == name) for name in ("trousers", "shorts", "skirt")]
    return np.concatenate((colors.ravel(), kinds))


def _sample_garment(rng: np.random.Generator, plain: float) -> Garment:
    """A garment of two colors that can be told apart."""
    pattern = "plain" if rng.random() < plain else pick(rng, PATTERNS[1:])
    color, second = sample_color(rng), sample_color(rng)
    while np.abs(np.subtract(color, second)).max() < 90:
        second = sample_color(rng)
    return Garment(pattern, color, second, int(rng.choice((20, 30, 40))))


def pick(rng: np.random.Generator, options: tuple, weights: tuple[float, ...] | None = None):
    """One of `options`, all as likely as the others unless `weights` (summing to 1) say so."""
    return options[int(rng.choice(len(options), p=weights))]
