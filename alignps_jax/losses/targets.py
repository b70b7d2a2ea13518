"""Which locations are positive, and what they should predict (FCOS, Tian et al., 2019)."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from alignps_jax.boxes import area, distances_to_boxes
from alignps_jax.types import AnyArray, Targets


def assign_targets(
    locations: Float[Array, "N 2"],
    strides: Float[Array, "N"],
    ranges: Float[Array, "N 2"],
    location_valid: Bool[Array, "N"],
    boxes: Float[AnyArray, "G 4"],
    identity: Int[AnyArray, "G"],
    labeled: Bool[AnyArray, "G"],
    box_valid: Bool[AnyArray, "G"],
    *,
    center_radius: float,
) -> Targets:
    """Assigns to each location of one image the box that it should predict, if any.

    A location is a candidate for a box if it lies strictly inside both the box and the square of
    half side `center_radius * stride` around the box's center (center sampling), and if its
    largest distance to a side of the box, in pixels, is within its level's range (ends included).
    The smallest box wins, the first of equal ones. Targets are zero where not positive.

    Args:
      locations: x, y in pixels of the image, of all levels together.
      strides: stride of each location's level.
      ranges: smallest and largest such distance of its level; (0, inf) takes any box, a range
        whose lower end is above its upper one takes none (a level of pure background).
      location_valid: False for locations that are padding; they are never positive.
      boxes, identity, labeled: of the image's people, boxes in pixels; G is at least 1.
      box_valid: False for entries that only fill up G.
    """
    distances = distances_to_boxes(locations[:, None], boxes[None])  # [N, G, 4]
    farthest = distances.max(axis=-1)
    from_center = jnp.abs(locations[:, None] - (boxes[:, :2] + boxes[:, 2:]) / 2).max(axis=-1)
    candidate = (
        (distances.min(axis=-1) > 0)
        & (from_center < (center_radius * strides)[:, None])
        & (farthest >= ranges[:, :1])
        & (farthest <= ranges[:, 1:])
        & location_valid[:, None]
        & box_valid[None]
    )
    positive = candidate.any(axis=-1)
    best = jnp.argmin(jnp.where(candidate, area(boxes)[None], jnp.inf), axis=-1)
    own = jnp.take_along_axis(distances, best[:, None, None], axis=1)[:, 0]
    own = jnp.where(positive[:, None], own / strides[:, None], 0.0)
    opposite = own.reshape(-1, 2, 2)  # [[left, top], [right, bottom]]
    largest = opposite.max(axis=1)
    ratio = opposite.min(axis=1) / jnp.where(largest > 0, largest, 1.0)
    return Targets(
        positive=positive,
        distances=own,
        centerness=jnp.sqrt(ratio[:, 0] * ratio[:, 1]),
        identity=jnp.where(positive, identity[best], 0),
        labeled=positive & labeled[best],
    )
