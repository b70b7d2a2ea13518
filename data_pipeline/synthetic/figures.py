"""Draws the people of the synthetic data set.

`draw_person` turns an `Appearance` and a `Pose` into a `Sprite` at a fixed resolution, which the
scene scales, places and lights.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from jaxtyping import UInt8

from data_pipeline.synthetic.canvas import Canvas, Paint, Sprite
from data_pipeline.synthetic.people import Appearance, Garment, Point, Pose

# The canvas of one figure, in pixels; a person of average build is about 240 of them tall.
CANVAS_HEIGHT, CANVAS_WIDTH = 300, 236
_CENTRE, _GROUND = CANVAS_WIDTH / 2, 290.0
_ROWS, _COLUMNS = np.ogrid[:CANVAS_HEIGHT, :CANVAS_WIDTH]


def draw_person(person: Appearance, pose: Pose, rng: np.random.Generator) -> Sprite:
    """Draws one person, cropped to what is drawn. `rng` moves cloth, folds and shading."""
    canvas = Canvas(CANVAS_HEIGHT, CANVAS_WIDTH)
    figure = _Figure(canvas, person, pose, rng)
    if pose.view in ("front", "back"):
        figure.draw_facing()
    else:
        figure.draw_profile()
    sprite = canvas.cropped()
    color, alpha = _shade(sprite.color, rng), sprite.alpha
    if pose.view == "right":
        color, alpha = cv2.flip(color, 1), cv2.flip(alpha, 1)
    return Sprite(color, alpha)


class _Figure:
    """One person in one pose on one canvas; the view decides what covers what."""

    def __init__(
        self, canvas: Canvas, person: Appearance, pose: Pose, rng: np.random.Generator
    ) -> None:
        self.canvas, self.person, self.pose = canvas, person, pose
        self.hip = _GROUND - 8 - 106 * person.legs
        self.shoulder = self.hip - 74
        self.skin, self.hair = Paint(person.skin), Paint(person.hair)
        shift = (int(rng.integers(CANVAS_HEIGHT)), int(rng.integers(CANVAS_WIDTH)))
        self.top = _cloth(person.top, self.shoulder, shift)
        self.bottoms = _cloth(person.bottoms, self.hip, shift)
        self.bag = Paint(person.bag_color)

    def draw_facing(self) -> None:
        """Seen from the front or the back."""
        person, width, back = self.person, self.person.width, self.pose.view == "back"
        chest, hips = 27 * width, 20 * width
        # On which side of the picture the person's left is.
        left = -1 if back else 1
        if not back:
            self._draw_back_hair()
            if person.bag == "backpack":
                self._box(_CENTRE, self.shoulder + 26, chest + 4, 26, self.bag)
        for index, side in enumerate((-1, 1)):
            hip = (_CENTRE + side * hips * 0.52, self.hip)
            angles = (side * self.pose.thighs[index], side * self.pose.knees[index])
            self._leg(hip, angles, 1.0, side * 3)
        self._draw_skirt(hips, hips)
        self._draw_torso(chest, hips)
        if person.inner is not None and not back:
            opening = 9 * width
            self._strip(_CENTRE, opening, self.shoulder + 1, self.hip + 4, Paint(person.inner))
        for index, side in enumerate((-1, 1)):
            shoulder = (_CENTRE + side * (chest - 4), self.shoulder + 7)
            angles = (side * self.pose.arms[index], -side * self.pose.elbows[index])
            hand = self._arm(shoulder, angles, 1.0)
            if person.bag == "hand" and (side == left) == person.bag_on_left:
                self._handbag(hand)
        if person.bag == "backpack":
            if back:
                self._box(_CENTRE, self.shoulder + 36, 22, 31, self.bag)
                self._box(_CENTRE, self.shoulder + 50, 15, 11, self.bag.shaded(0.8))
            else:
                for side in (-1, 1):
                    x = _CENTRE + side * chest * 0.6
                    self._strip(x, 4, self.shoulder - 1, self.shoulder + 42, self.bag)
        self._draw_head(back)
        if person.bag == "shoulder":
            side = left if person.bag_on_left else -left
            self._shoulder_bag(_CENTRE - side * chest * 0.6, _CENTRE + side * (hips + 6))

    def draw_profile(self) -> None:
        """Seen from the side, facing the left edge; the right view is flipped afterwards."""
        person, width = self.person, self.person.width
        depth, hips = 16 * width, 16 * width
        near_is_left = self.pose.view == "left"
        bag_is_near = person.bag_on_left == near_is_left
        # Towards the face is towards smaller x, hence the minus signs on all angles.
        far, near = ((-self.pose.arms[i], -self.pose.elbows[i]) for i in (0, 1))
        hand = self._arm((_CENTRE, self.shoulder + 8), far, 0.75)
        if person.bag == "hand" and not bag_is_near:
            self._handbag(hand)
        for index, light in ((0, 0.75), (1, 1.0)):
            angles = (-self.pose.thighs[index], -self.pose.knees[index])
            self._leg((_CENTRE, self.hip), angles, light, -9)
        self._draw_skirt(hips, hips * 1.1)
        if person.bag == "backpack":
            self._box(_CENTRE + depth + 9, self.shoulder + 33, 13, 29, self.bag)
        self._draw_torso(depth, hips)
        if person.inner is not None:
            self._strip(_CENTRE - depth + 3, 4, self.shoulder + 4, self.hip, Paint(person.inner))
        self._draw_profile_head()
        if person.bag == "shoulder" and bag_is_near:
            self._shoulder_bag(_CENTRE, _CENTRE + 2)
        elif person.bag == "shoulder":
            self._strip(_CENTRE, 3, self.shoulder - 2, self.shoulder + 20, self.bag)
        hand = self._arm((_CENTRE, self.shoulder + 8), near, 1.0)
        if person.bag == "hand" and bag_is_near:
            self._handbag(hand)
        if person.bag == "backpack":
            self._strip(_CENTRE - 3, 4, self.shoulder - 1, self.shoulder + 24, self.bag)

    def _leg(self, hip: Point, angles: Point, light: float, toe: float) -> None:
        person, canvas, thick = self.person, self.canvas, self.person.width
        knee = _reach(hip, 54 * person.legs, angles[0])
        ankle = _reach(knee, 50 * person.legs, angles[0] + angles[1])
        bare = self.skin.shaded(light)
        cloth = self.bottoms.shaded(light)
        dressed = person.bottoms_kind in ("trousers", "shorts")
        shin = cloth if person.bottoms_kind == "trousers" else bare
        canvas.limb(
            (ankle[0], ankle[1] + 4),
            (ankle[0] + toe, ankle[1] + 6),
            (5, 4),
            Paint(person.shoes).shaded(light),
        )
        canvas.limb(knee, ankle, (8.5 * thick, 6 * thick), shin)
        canvas.limb(hip, knee, (11.5 * thick, 9 * thick), cloth if dressed else bare)

    def _arm(self, shoulder: Point, angles: Point, light: float) -> Point:
        """Draws an arm and returns where its hand is."""
        canvas, sleeves, thick = self.canvas, self.person.sleeves, self.person.width
        elbow = _reach(shoulder, 37, angles[0])
        hand = _reach(elbow, 35, angles[0] + angles[1])
        cloth, bare = self.top.shaded(0.92 * light), self.skin.shaded(light)
        canvas.ellipse(hand, (5, 6), bare)
        lower = cloth if sleeves == "long" else bare
        canvas.limb(elbow, hand, (6.5 * thick, 5 * thick), lower)
        canvas.limb(shoulder, elbow, (8 * thick, 6.8 * thick), bare)
        if sleeves != "none":
            share = 1.0 if sleeves == "long" else 0.62
            end = _reach(shoulder, 37 * share, angles[0])
            canvas.limb(shoulder, end, (8.6 * thick, 7.6 * thick), cloth)
        return hand

    def _draw_torso(self, chest: float, hips: float) -> None:
        bottom = self.hip + {"waist": 2, "hip": 16, "coat": 48}[self.person.top_length]
        flare = hips * (1.2 if self.person.top_length == "coat" else 1.05)
        half = [
            (0.4 * chest, self.shoulder - 4),
            (chest - 3, self.shoulder + 1),
            (chest, self.shoulder + 10),
            (0.86 * hips + 0.1 * chest, self.hip - 26),
            (hips, self.hip - 4),
            (flare, bottom),
        ]
        self._symmetric(half, self.top)

    def _draw_skirt(self, hips: float, flare: float) -> None:
        if self.person.bottoms_kind in ("skirt", "dress"):
            end = self.hip + 58
            half = [(hips * 0.9, self.hip - 12), (hips, self.hip), (flare * 1.45, end)]
            self._symmetric(half, self.bottoms)

    def _draw_head(self, back: bool) -> None:
        person, canvas = self.person, self.canvas
        center = (_CENTRE, self.shoulder - 25)
        canvas.limb((_CENTRE, self.shoulder + 1), (_CENTRE, self.shoulder - 14), (7, 7), self.skin)
        canvas.ellipse(center, (14, 18), self.skin)
        if not back:
            self._draw_face(center)
        if person.hair_style != "bald":
            if back:
                drop = {"short": 4, "bun": 6, "tail": 8, "bob": 16, "long": 42}[person.hair_style]
                self._hair_cap(center, 15.5, center[1] + drop)
            else:
                self._hair_cap(center, 15, center[1] - 8)
            if person.hair_style == "bun":
                canvas.ellipse((_CENTRE, center[1] - 20), (7, 6), self.hair)
            if person.hair_style == "tail" and back:
                tail = (_CENTRE, center[1] + 40)
                canvas.limb((_CENTRE, center[1]), tail, (5, 3), self.hair)
        self._draw_hat(center, 0 if back else 1)

    def _draw_profile_head(self) -> None:
        person, canvas = self.person, self.canvas
        center = (_CENTRE - 3, self.shoulder - 25)
        canvas.limb((_CENTRE, self.shoulder + 1), (_CENTRE, self.shoulder - 14), (7, 6), self.skin)
        canvas.ellipse(center, (15, 18), self.skin)
        nose = [(center[0] - 14, center[1] - 3), (center[0] - 19, center[1] + 4)]
        canvas.polygon([*nose, (center[0] - 13, center[1] + 6)], self.skin)
        canvas.ellipse((center[0] - 9, center[1] - 3), (1.5, 2), Paint((40, 40, 45)))
        if person.hair_style != "bald":
            drop = {"short": 2, "bun": 2, "tail": 2, "bob": 16, "long": 42}[person.hair_style]
            x, y = center
            outline = [(x - 12, y - 12), (x - 7, y - 18), (x + 3, y - 20), (x + 12, y - 16)]
            outline += [(x + 17, y - 4), (x + 17, y + drop), (x + 5, y + drop), (x + 3, y - 6)]
            canvas.polygon([*outline, (x - 6, y - 8)], self.hair)
            if person.hair_style == "bun":
                canvas.ellipse((x + 17, y - 12), (7, 7), self.hair)
            if person.hair_style == "tail":
                canvas.limb((x + 16, y - 4), (x + 24, y + 36), (5, 3), self.hair)
        self._draw_hat(center, 2)

    def _draw_face(self, center: Point) -> None:
        x, y = center
        for side in (-1, 1):
            self.canvas.ellipse((x + side * 6, y - 1), (1.8, 1.8), Paint((40, 40, 45)))
        self.canvas.polygon(
            [(x - 5, y + 9), (x + 5, y + 9), (x + 3, y + 11), (x - 3, y + 11)],
            Paint((80, 80, 170)),
        )

    def _draw_back_hair(self) -> None:
        """The part of long hair that hangs behind the neck."""
        drop = {"bob": 18, "long": 44}.get(self.person.hair_style)
        if drop is not None:
            y = self.shoulder - 25
            half: list[Point] = [(10, y - 16), (17, y - 4), (18, y + drop)]
            self._symmetric(half, self.hair.shaded(0.85))

    def _hair_cap(self, center: Point, radius: float, end: float) -> None:
        """Hair from the crown down to the line y = end."""
        y = center[1]
        half = [(radius * 0.5, y - 20), (radius * 0.9, y - 15), (radius + 1, y - 6)]
        half += [(radius + 1, end), (radius * 0.6, end + 2)]
        self._symmetric(half, self.hair)

    def _draw_hat(self, center: Point, peak: int) -> None:
        """`peak`: 0 hidden behind the head, 1 towards the viewer, 2 towards the left edge."""
        if self.person.hat == "none":
            return
        paint, (x, y) = Paint(self.person.hat_color), center
        crown = 27 if self.person.hat == "beanie" else 22
        half: list[Point] = [(6, y - crown), (13, y - crown + 5), (17, y - 8), (17, y - 5)]
        self._symmetric(half, paint, x)
        if self.person.hat == "cap" and peak == 1:
            self.canvas.ellipse((x, y - 7), (16, 4), paint.shaded(0.75))
        elif self.person.hat == "cap" and peak == 2:
            self.canvas.limb((x - 10, y - 7), (x - 27, y - 5), (3.5, 2), paint.shaded(0.75))

    def _shoulder_bag(self, strap: float, bag: float) -> None:
        """A strap from (strap, shoulder) to a bag at (bag, hip)."""
        straps = [(strap - 3, self.shoulder - 2), (strap + 3, self.shoulder - 2)]
        straps += [(bag + 3, self.hip), (bag - 3, self.hip)]
        self.canvas.polygon(straps, self.bag.shaded(0.75))
        self._box(bag, self.hip + 10, 17, 13, self.bag)

    def _handbag(self, hand: Point) -> None:
        self._strip(hand[0], 3, hand[1], hand[1] + 10, self.bag.shaded(0.7))
        self._box(hand[0], hand[1] + 21, 13, 13, self.bag)

    def _box(self, x: float, y: float, half_width: float, half_height: float, paint: Paint) -> None:
        cut = 5
        half = [(half_width - cut, y - half_height), (half_width, y - half_height + cut)]
        half += [(half_width, y + half_height - cut), (half_width - cut, y + half_height)]
        self._symmetric(half, paint, x)

    def _strip(self, x: float, half_width: float, top: float, bottom: float, paint: Paint) -> None:
        self._symmetric([(half_width, top), (half_width, bottom)], paint, x)

    def _symmetric(self, half: list[Point], paint: Paint, x: float = _CENTRE) -> None:
        """Fills the outline that mirrors `half` (distance from x, y; top to bottom)."""
        right = [(x + dx, y) for dx, y in half]
        self.canvas.polygon(right + [(x - dx, y) for dx, y in reversed(half)], paint)


def _cloth(garment: Garment, origin: float, shift: tuple[int, int]) -> Paint:
    """Paint of a garment whose pattern starts at row `origin` and hangs a little differently."""
    if garment.pattern == "plain":
        return Paint(garment.color)
    period = garment.period
    # Bands keep their place on the body; what repeats sideways may shift with the cloth.
    y, x = _ROWS - int(origin) + shift[0] % 7, _COLUMNS + shift[1] % period
    row, column = y % period - period // 2, x % period - period // 2
    match garment.pattern:
        case "bands":
            second = row < 0
        case "stripes":
            second = column < 0
        case "checks":
            second = (row < 0) ^ (column < 0)
        case "dots":
            second = row**2 + column**2 < (0.33 * period) ** 2
        case "halves":
            second = y >= 40
        case "diagonal":
            second = (row + column) % period < period // 2
        case "chest":
            second = (y >= 20) & (y <= 42)
        case _:
            raise ValueError(f"unknown pattern {garment.pattern!r}")
    which = np.broadcast_to(second, (CANVAS_HEIGHT, CANVAS_WIDTH)).astype(np.uint8)
    palette = np.zeros((256, 1, 3), np.uint8)
    palette[:2, 0] = garment.color, garment.second
    return Paint(garment.color, cv2.LUT(cv2.merge([which] * 3), palette))


def _shade(
    color: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator
) -> UInt8[np.ndarray, "h w 3"]:
    """More or less light than others in the scene have, most of it from one side, and folds."""
    slope = np.linspace(-1, 1, 7) * rng.uniform(-0.12, 0.12)
    coarse = rng.uniform(0.82, 1.1) * (rng.uniform(0.88, 1.1, (9, 7)) + slope)
    size = color.shape[1::-1]
    factor = cv2.resize(coarse.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
    return cv2.multiply(color, cv2.merge([factor] * 3), dtype=cv2.CV_8U)


def _reach(start: Point, length: float, angle: float) -> Point:
    """The point `length` away; angle 0 is down, positive towards the right edge."""
    return start[0] + length * math.sin(angle), start[1] + length * math.cos(angle)
