"""The training step of one device. Of the method, only this module knows the axis of devices."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from alignps_jax.devices import AXIS
from alignps_jax.losses.mutual_information import mutual_information
from alignps_jax.losses.oim import update_memory
from alignps_jax.losses.roi import draw, people_of, roi_terms, sample_rois
from alignps_jax.losses.rpn import PROPOSALS, propose, rpn_terms
from alignps_jax.losses.terms import Term
from alignps_jax.losses.total import assign, flatten_levels, select_positives, total
from alignps_jax.nn.model import AlignPS
from alignps_jax.types import Batch, Outputs, People, RoiDraws, TrainState

_gather = partial(lax.all_gather, axis_name=AXIS, tiled=True)  # from all devices, in their order


@struct.dataclass
class StepMetrics:
    """Measurements of a training step over all devices; the loss is the sum of `terms`."""

    terms: dict[str, Float[Array, ""]]
    positives: Int[Array, ""]
    dropped_positives: Int[Array, ""]
    grad_norm: Float[Array, ""]


@dataclasses.dataclass(frozen=True, eq=False)  # pmap needs a hash: that of the identity
class TrainStep:
    """The training step's collaborators; call it inside an axis named `AXIS`."""

    model: AlignPS
    optimizer: optax.GradientTransformation
    loss: ConfigDict  # that section of the configuration
    max_positives: int  # per device
    precision: str = "default"
    accumulate: int = 1  # parts in which a device feeds its images to the network
    ema_decay: float | None = None  # of the parameters' moving average, if any
    seed: int = 0  # of `RoiDraws` that are not given

    def __call__(
        self, state: TrainState, batch: Batch, draws: RoiDraws | None = None
    ) -> tuple[TrainState, StepMetrics]:
        """Updates the state with one device's share of a batch; equal on all devices."""

        def loss_fn(params: Any) -> tuple[Any, Any]:
            variables = {"params": params, "frozen": state.frozen}
            outputs, c4 = self._predict(variables, batch)
            targets = assign(
                outputs,
                batch,
                strides=self.model.strides(train=True),
                ranges=self.ranges(),
                center_radius=self.loss.center_radius,
            )
            flat = flatten_levels(outputs)
            # Only positive locations have a box and a person: a few hundred of ten thousands.
            local, dropped = select_positives(flat, targets, self.max_positives)
            # The hardest pairs and the updates of the table may span devices.
            gathered = _gather(local)
            offset = lax.axis_index(AXIS) * self.max_positives
            terms = total(flat, targets, local, gathered, state.memory, self.loss, offset=offset)
            frozen, regions = state.frozen, None
            if self.model.roi is not None:
                apply = partial(self.model.apply, variables)
                more, regions, frozen = self._regions(apply, state, c4, batch, draws, gathered)
                terms |= more
            losses = {name: _local_loss(term) for name, term in terms.items()}
            return sum(losses.values()), (losses, dropped, gathered, regions, frozen)

        trained = state.params if state.raw is None else state.raw
        with jax.default_matmul_precision(self.precision):
            gradient, found = jax.grad(loss_fn, has_aux=True)(trained)
        terms, dropped, gathered, regions, frozen = found  # the last three: of all devices
        terms, gradient, dropped = lax.psum((terms, gradient, dropped), AXIS)
        updates, opt_state = self.optimizer.update(gradient, state.opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        # After the gradients, and the same on every device (Released code).
        update = partial(update_memory, momentum=self.loss.lut_momentum)
        memory = update(
            state.memory,
            gathered,
            normalize=self.loss.normalize_lut,
            queue_channels=self.loss.queue_channels,
        )
        if regions is not None:
            roi_memory = update(state.roi_memory, regions, normalize=True, queue_channels=None)
            state = dataclasses.replace(state, roi_memory=roi_memory, frozen=frozen)
        metrics = StepMetrics(terms, gathered.valid.sum(), dropped, optax.tree.norm(gradient))
        state = dataclasses.replace(state, step=state.step + 1, opt_state=opt_state, memory=memory)
        return _with_params(state, trained, self.ema_decay), metrics

    def ranges(self) -> list[tuple[float, float]]:
        """Of each level: smallest and largest distance to a side of the boxes that it learns."""
        searched, made = (self.model.predicted_levels(train=train) for train in (False, True))
        edges = (0.0, *self.loss.level_borders, math.inf)
        return [*pairwise(edges), *[(math.inf, 0.0)] * (len(made) - len(searched))]

    def _regions(
        self, apply: Any, state: TrainState, c4: Any, batch: Batch, draws: Any, dense: People
    ) -> tuple[dict[str, Term], People, Any]:
        """The RoI branch's terms, people and statistics; `dense`: the positives of all devices."""
        size, shape = c4[1], c4[0].shape[1:3]
        if draws is None:
            key = jax.random.fold_in(jax.random.key(self.seed), state.step)
            images, people = batch.valid.shape
            numbers = lax.axis_index(AXIS) * images + jnp.arange(images)
            most = lax.axis_size(AXIS) * images * self.loss.rois_per_image
            draws = draw(key, numbers, shape, people + PROPOSALS, most)
        anchors = apply(*c4, method="rpn")
        proposals = propose(anchors, batch.size, size, shape[1])
        rois = sample_rois(*proposals, batch, draws.roi, self.loss.rois_per_image)
        given = *c4, rois.boxes, rois.valid, partial(lax.psum, axis_name=AXIS)
        outputs, changed = apply(*given, method="roi", mutable=["frozen"])
        regions = _gather(people_of(rois, outputs.embeddings))
        terms = rpn_terms(anchors, batch, shape[1], draws.rpn)
        terms |= roi_terms(outputs, rois, state.roi_memory, self.loss)
        estimate, rows = partial(apply, method="mutual_information"), len(state.memory.lut)
        terms["mutual_information"] = mutual_information(regions, dense, estimate, draws, rows)
        return terms, regions, changed["frozen"]

    def _predict(self, variables: Any, batch: Batch) -> tuple[tuple[Outputs, ...], Any]:
        """`AlignPS.with_c4` of all images, computed in `accumulate` parts.

        The activations of a part are recomputed for the gradient; all else sees the whole batch.
        """

        def network(images: Any) -> Any:
            return self.model.apply(variables, *images, train=True, method="with_c4")

        images = batch.image, batch.size
        if self.accumulate == 1:
            return network(images)
        parts = jax.tree.map(lambda x: x.reshape(self.accumulate, -1, *x.shape[1:]), images)
        # Without `prevent_cse`, because the loop keeps the two passes apart already.
        outputs = lax.map(jax.checkpoint(network, prevent_cse=False), parts)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)


def _with_params(state: TrainState, trained: Any, decay: float | None) -> TrainState:
    """The state with the `trained` parameters, or with their average and these as `raw`."""
    if decay is None:
        return dataclasses.replace(state, params=trained)
    # The first steps move fast: the average must not remember the initial parameters for long.
    share = 1 - jnp.minimum(decay, state.step / (9.0 + state.step))
    average = jax.tree.map(lambda old, new: old + share * (new - old), state.params, trained)
    return dataclasses.replace(state, params=average, raw=trained)


def _local_loss(term: Term) -> Float[Array, ""]:
    """A device's part of a loss, divided by the count of all devices, over which parts add up."""
    count = lax.psum(lax.stop_gradient(term.count), AXIS)
    return term.sum / jnp.where(count > 0, count, 1.0)
