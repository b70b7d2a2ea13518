"""One step on one device, for training and for prediction. Only this module knows axis names."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from alignps_jax.boxes import locations
from alignps_jax.choices import choose
from alignps_jax.devices import AXIS
from alignps_jax.losses.oim import oim_loss, update_memory
from alignps_jax.losses.targets import assign_targets
from alignps_jax.losses.terms import Term, centerness_loss, focal_loss, giou_loss, triplet_loss
from alignps_jax.losses.total import TRIPLETS, flatten_levels, level_ranges, select_positives
from alignps_jax.nn.model import AlignPS
from alignps_jax.types import Batch, Outputs, Positives, Targets, TrainState


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
        choose("config.loss.triplet", self.loss.triplet, TRIPLETS)
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
