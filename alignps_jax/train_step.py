"""One step on one device, for training and for prediction. Only this module knows axis names."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from alignps_jax.losses import Term, centerness_loss, focal_loss, giou_loss, triplet_loss
from alignps_jax.model import AlignPS
from alignps_jax.oim import oim_loss, update_memory
from alignps_jax.postprocess import detect, embed_boxes
from alignps_jax.targets import assign_targets, first_true, locations
from alignps_jax.types import Batch, Detections, Outputs, Positives, Targets, TrainState, UserError

AXIS = "device"
# The range of a level that learns background only: no box is within it.
NO_RANGE = (np.inf, 0.0)
LARGE_PHOTO = 2**17  # pixels
TRIPLETS = {"none": (False, False), "batch": (True, False), "batch_and_lut": (True, True)}


@struct.dataclass
class StepMetrics:
    """What a training step measured, over all devices; the loss is the sum of `terms`."""

    terms: dict[str, Float[Array, ""]]
    positives: Int[Array, ""]
    dropped_positives: Int[Array, ""]
    grad_norm: Float[Array, ""]
    update_norm: Float[Array, ""]
    param_norm: Float[Array, ""]


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, as pmap asks
class TrainStep:
    """The training step's collaborators; call it inside an axis named `AXIS`.

    Attributes:
      model: the network.
      optimizer: updates of the parameters.
      loss: `config.loss`.
      max_positives: static number of positive locations per device.
    """

    model: AlignPS
    optimizer: optax.GradientTransformation
    loss: ConfigDict
    max_positives: int

    def __post_init__(self) -> None:
        if self.loss.triplet not in TRIPLETS:
            raise UserError(
                f"config.loss.triplet: found {self.loss.triplet!r}, "
                f"expected one of {', '.join(TRIPLETS)}"
            )
        level_ranges(self.model, self.loss.level_borders)  # raises if they do not fit

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        """Updates the state with one device's share of a batch; equal on all devices."""
        gather = partial(jax.tree.map, partial(lax.all_gather, axis_name=AXIS, tiled=True))

        def loss_fn(params: Any) -> tuple[Float[Array, ""], tuple[Any, ...]]:
            outputs = self.model.apply(
                {"params": params, "frozen": state.frozen},
                batch.image,
                batch.size,
                train=True,
                rngs={"dropout": jax.random.fold_in(state.rng, state.step)},
            )
            flat = flatten_levels(outputs)
            targets = self.assign(outputs, flat, batch)
            positives, dropped = select_positives(flat, targets, self.max_positives)
            everyone = gather(positives)
            terms = self.terms(flat, targets, positives, everyone, state)
            return sum(terms.values()), (terms, everyone, dropped)

        gradient, (terms, everyone, dropped) = jax.grad(loss_fn, has_aux=True)(state.params)
        terms, gradient, dropped = lax.psum((terms, gradient, dropped), AXIS)
        updates, opt_state = self.optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        memory = update_memory(
            state.memory,
            everyone.embeddings,
            everyone.identity,
            everyone.labelled,
            everyone.mask,
            momentum=self.loss.lut_momentum,
            normalize=self.loss.normalize_lut,
            queue_channels=self.loss.queue_channels,
        )
        metrics = StepMetrics(
            terms=terms,
            positives=everyone.mask.sum(),
            dropped_positives=dropped,
            grad_norm=optax.tree.norm(gradient),
            update_norm=optax.tree.norm(updates),
            param_norm=optax.tree.norm(params),
        )
        state = state.replace(
            step=state.step + 1, params=params, opt_state=opt_state, memory=memory
        )
        return state, metrics

    def assign(self, outputs: tuple[Outputs, ...], flat: Outputs, batch: Batch) -> Targets:
        """Targets of all locations, `[B, N]`."""
        shapes = [level.cls_logits.shape[1:] for level in outputs]
        sizes = [height * width for height, width in shapes]
        strides = self.model.strides(train=True)
        ranges = level_ranges(self.model, self.loss.level_borders)
        points = [locations(*shape, s) for shape, s in zip(shapes, strides, strict=True)]
        assign = partial(
            assign_targets,
            jnp.concatenate(points),
            jnp.asarray(np.repeat(strides, sizes), jnp.float32),
            jnp.asarray(np.repeat(ranges, sizes, axis=0), jnp.float32),
            center_radius=self.loss.center_radius,
        )
        return jax.vmap(assign)(
            flat.valid, batch.boxes, batch.identity, batch.labelled, batch.valid
        )

    def terms(
        self,
        flat: Outputs,
        targets: Targets,
        positives: Positives,
        everyone: Positives,
        state: TrainState,
    ) -> dict[str, Float[Array, ""]]:
        """This device's share of every loss term: the shares of all devices add up to it.

        Counts are summed over the devices before the division, so that the gradients are those
        of one device that holds the whole batch.
        """
        loss = self.loss
        devices = lax.axis_size(AXIS)

        def share(term: Term) -> Float[Array, ""]:
            count = lax.psum(lax.stop_gradient(term.count), AXIS)
            return term.sum / jnp.where(count > 0, count, 1.0)

        cls_sum = focal_loss(
            flat.cls_logits,
            targets.positive,
            flat.valid,
            alpha=loss.focal_alpha,
            gamma=loss.focal_gamma,
        )
        images = flat.cls_logits.shape[0]
        predicted, mask = positives.distances, positives.mask
        box = giou_loss(predicted, positives.target_distances, positives.target_centerness, mask)
        centerness = centerness_loss(positives.centerness_logits, positives.target_centerness, mask)
        oim = oim_loss(
            positives.embeddings,
            positives.identity,
            positives.labelled,
            mask,
            state.memory,
            lut_temperature=loss.lut_temperature,
            queue_temperature=loss.queue_temperature,
            focal_gamma=loss.oim_focal_gamma,
        )
        terms = {
            "cls": share(Term(sum=cls_sum, count=targets.positive.sum() + images)),
            "box": share(box),
            "centerness": share(centerness),
            "oim": share(oim),
        }
        use_triplet, use_lut = TRIPLETS[loss.triplet]
        if use_triplet:
            # The hardest pairs may span devices: everybody computes the whole term, and owns
            # an equal part of it.
            triplet = triplet_loss(
                everyone.embeddings,
                everyone.identity,
                everyone.mask & everyone.labelled,
                state.memory.lut if use_lut else None,
                margin=loss.triplet_margin,
                first_lut_identity=loss.triplet_first_lut_identity,
            )
            terms["triplet"] = triplet.sum / jnp.maximum(triplet.count, 1.0) / devices
        return terms


def level_ranges(model: AlignPS, borders: Sequence[float]) -> list[tuple[float, float]]:
    """Smallest and largest extent of what each level predicts in training (FCOS), in pixels.

    A location's extent is its largest distance to a side of its box.

    Args:
      model: whose levels they are.
      borders: `config.loss.level_borders`, between each level that is searched on and the next.

    Raises:
      UserError: there are too few or too many borders, or they do not ascend.
    """
    levels = model.predicted_levels(train=False)
    edges = (0.0, *borders, np.inf)
    numbers = all(isinstance(border, int | float) for border in borders)
    ascending = numbers and all(low < high for low, high in pairwise(edges))
    if not ascending or len(borders) != len(levels) - 1:
        raise UserError(
            f"config.loss.level_borders: found {tuple(borders)}, expected {len(levels) - 1} "
            f"ascending numbers of pixels for config.model.levels = {levels}"
        )
    background = len(model.predicted_levels(train=True)) - len(levels)
    return [*pairwise(edges), *[NO_RANGE] * background]


def flatten_levels(outputs: tuple[Outputs, ...]) -> Outputs:
    """All levels as one row of locations per image: `[B, N, ...]`."""
    flat = [
        jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), level) for level in outputs
    ]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *flat)


def select_positives(
    flat: Outputs, targets: Targets, limit: int
) -> tuple[Positives, Int[Array, ""]]:
    """The first `limit` positive locations, image by image, and how many there were beyond."""
    chosen = first_true(targets.positive.ravel(), limit)

    def take(x: Array) -> Array:
        return x.reshape(-1, *x.shape[2:])[chosen.index]

    positives = Positives(
        mask=chosen.mask,
        distances=take(flat.box_distances),
        centerness_logits=take(flat.centerness_logits),
        embeddings=take(flat.embeddings),
        target_distances=take(targets.distances),
        target_centerness=take(targets.centerness),
        identity=take(targets.identity),
        labelled=take(targets.labelled),
    )
    return positives, chosen.dropped


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, as pmap asks
class PredictStep:
    """Detections of a batch; `evaluation` is `config.eval`."""

    model: AlignPS
    evaluation: ConfigDict

    def __call__(self, params: Any, frozen: Any, batch: Batch) -> Detections:
        """Boxes in the photos' own pixels, best first.

        On CPUs large photos one after another: the maps of several would not stay in the cache.
        """
        if math.prod(batch.image.shape[1:3]) < LARGE_PHOTO:
            return self._together(params, frozen, batch)
        return lax.platform_dependent(
            params, frozen, batch, cpu=self._one_by_one, default=self._together
        )

    def _one_by_one(self, params: Any, frozen: Any, batch: Batch) -> Detections:
        singles = jax.tree.map(lambda x: x[:, None], batch)
        found = lax.map(partial(self._together, params, frozen), singles)
        return jax.tree.map(lambda x: x[:, 0], found)

    def _together(self, params: Any, frozen: Any, batch: Batch) -> Detections:
        outputs = self.model.apply({"params": params, "frozen": frozen}, batch.image, batch.size)
        return self.decode(outputs, batch)

    def decode(self, outputs: tuple[Outputs, ...], batch: Batch) -> Detections:
        """What comes after the network."""
        return detect(
            outputs,
            batch.size,
            batch.scale,
            strides=self.model.strides(train=False),
            pre_nms=self.evaluation.pre_nms,
            min_cls_score=self.evaluation.min_cls_score,
            nms_iou=self.evaluation.nms_iou,
            max_detections=self.evaluation.max_detections,
        )


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, as pmap asks
class GroundTruthStep:
    """The people of the ground truth, as a perfect detector would find them.

    An upper bound of the search by `model`; `level_borders` is that of `config.loss`.
    """

    model: AlignPS
    level_borders: tuple[float, ...]

    def __post_init__(self) -> None:
        level_ranges(self.model, self.level_borders)  # raises if they do not fit

    def __call__(self, params: Any, frozen: Any, batch: Batch) -> Detections:
        """The batch's own boxes in the photos' pixels, with score 1 and their embeddings."""
        return embed_boxes(
            self.model.apply({"params": params, "frozen": frozen}, batch.image, batch.size),
            batch.boxes,
            batch.valid,
            batch.scale,
            strides=self.model.strides(train=False),
            borders=self.level_borders,
        )


PREDICT_STEPS = {
    "detected": lambda model, config: PredictStep(model, config.eval),
    "ground_truth": lambda model, config: GroundTruthStep(model, tuple(config.loss.level_borders)),
}


def make_predict_step(
    model: AlignPS, config: ConfigDict
) -> Callable[[Any, Any, Batch], Detections]:
    """The step that finds the people to be searched, as `config.eval.boxes` says.

    Raises:
      UserError: there is no such way.
    """
    name = config.eval.boxes
    if name not in PREDICT_STEPS:
        known = ", ".join(PREDICT_STEPS)
        raise UserError(f"config.eval.boxes: found {name!r}, expected one of {known}")
    return PREDICT_STEPS[name](model, config)


def parallel_train_step(
    step: TrainStep,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """`step` over all devices of all processes; the batch has a leading axis of local devices.

    The state goes in and out as ordinary replicated arrays (`replicate` makes them so first) and
    its buffers are reused.
    """
    return jax.pmap(
        step, axis_name=AXIS, in_axes=(None, 0), out_axes=(None, None), donate_argnums=0
    )


def parallel_predict_step(
    step: Callable[[Any, Any, Batch], Detections],
) -> Callable[[Any, Any, Batch], Detections]:
    """`step` over this process's devices; batch and detections have a leading device axis."""
    return jax.pmap(step, axis_name=AXIS, in_axes=(None, None, 0), devices=jax.local_devices())


def replicate(tree: Any) -> Any:
    """Puts a copy on every local device, which is what buffer donation under pmap asks for."""
    mesh = Mesh(np.array(jax.local_devices()), (AXIS,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split_over_devices(batch: Batch) -> Batch:
    """Adds the leading axis of local devices."""
    devices = jax.local_device_count()
    return jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)
