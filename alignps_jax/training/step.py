"""The training step of one device. Of the method, only this module knows the axis of devices."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int, UInt8
from ml_collections import ConfigDict

from alignps_jax.devices import AXIS
from alignps_jax.losses.oim import update_memory
from alignps_jax.losses.terms import Term
from alignps_jax.losses.total import (
    assign,
    check_triplet,
    flatten_levels,
    level_ranges,
    select_positives,
    total,
)
from alignps_jax.nn.model import AlignPS, matmul_precision
from alignps_jax.training.optimizer import global_norm
from alignps_jax.types import Batch, Outputs, TrainState


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
      precision: of the network's products, an entry of `PRECISIONS`.
      accumulate: number of parts that a device's images are fed to the network in.
      ema_decay: of the parameters' moving average; None keeps none.
    """

    model: AlignPS
    optimizer: optax.GradientTransformation
    loss: ConfigDict
    max_positives: int
    precision: str = "default"
    accumulate: int = 1
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        check_triplet(self.loss)
        self.ranges()  # raises if the borders do not fit the levels

    def ranges(self) -> list[tuple[float, float]]:
        """Smallest and largest extent of what each level predicts, in pixels."""
        searched, made = (self.model.predicted_levels(train=train) for train in (False, True))
        return level_ranges(searched, self.loss.level_borders, len(made) - len(searched))

    def _outputs(self, variables: Any, batch: Batch) -> tuple[Outputs, ...]:
        """What the network says of all images; `accumulate` parts of them one after another.

        What a part's layers computed is forgotten, and computed again when its share of the
        gradient is due. The losses see all images at once, and so do lookup table, queue and
        triplets: the step is exactly that of the complete batch.
        """

        def network(image: UInt8[Array, "b H W 3"], size: Int[Array, "b 2"]) -> Any:
            return self.model.apply(variables, image, size, train=True)

        images: Any = (batch.image, batch.size)
        if self.accumulate == 1:
            return network(*images)
        parts = jax.tree.map(lambda x: x.reshape(self.accumulate, -1, *x.shape[1:]), images)
        again = jax.checkpoint(network, prevent_cse=False)  # the loop already keeps them apart
        outputs = lax.map(lambda part: again(*part), parts)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        """Updates the state with one device's share of a batch; equal on all devices."""
        gather = partial(jax.tree.map, partial(lax.all_gather, axis_name=AXIS, tiled=True))

        def loss_fn(params: Any) -> tuple[Float[Array, ""], tuple[Any, ...]]:
            variables = {"params": params, "frozen": state.frozen}
            outputs = self._outputs(variables, batch)
            targets = assign(
                outputs,
                batch,
                strides=self.model.strides(train=True),
                ranges=self.ranges(),
                center_radius=self.loss.center_radius,
            )
            flat = flatten_levels(outputs)
            # Only positive locations have a box and an identity: a few hundred of ten thousands.
            mine, dropped = select_positives(flat, targets, self.max_positives)
            # The hardest pairs and the updates of the table may span devices.
            everyone = gather(mine)
            first = lax.axis_index(AXIS) * self.max_positives
            terms = total(flat, targets, mine, everyone, state.memory, self.loss, first=first)
            shares = {name: _share(term) for name, term in terms.items()}
            loss: Any = sum(shares.values())
            return loss, (shares, everyone, dropped)

        trained = state.params if state.raw is None else state.raw
        with matmul_precision(self.precision):
            gradient, (terms, everyone, dropped) = jax.grad(loss_fn, has_aux=True)(trained)
        terms, gradient, dropped = lax.psum((terms, gradient, dropped), AXIS)
        updates, opt_state = self.optimizer.update(gradient, state.opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        # After the gradients, and the same on every device (Released code).
        memory = update_memory(
            state.memory,
            everyone.embeddings,
            everyone.identity,
            everyone.labeled,
            everyone.valid,
            momentum=self.loss.lut_momentum,
            normalize=self.loss.normalize_lut,
            queue_channels=self.loss.queue_channels,
        )
        metrics = StepMetrics(
            terms=terms,
            positives=everyone.valid.sum(),
            dropped_positives=dropped,
            grad_norm=global_norm(gradient),
            update_norm=global_norm(updates),
            param_norm=global_norm(trained),
        )
        state = dataclasses.replace(
            _with_params(state, trained, self.ema_decay),
            step=state.step + 1,
            opt_state=opt_state,
            memory=memory,
        )
        return state, metrics


def _with_params(state: TrainState, trained: Any, decay: float | None) -> TrainState:
    """The state with new parameters, or with their moving average and them."""
    if decay is None:
        return dataclasses.replace(state, params=trained)
    # The first steps move fast: their average shall not remember the initial parameters for long.
    share = 1 - jnp.minimum(decay, (1.0 + state.step) / (10.0 + state.step))
    average = jax.tree.map(lambda old, new: old + share * (new - old), state.params, trained)
    return dataclasses.replace(state, params=average, raw=trained)


def _share(term: Term) -> Float[Array, ""]:
    """A device's share of a loss: the shares of all devices add up to it.

    The count is summed over the devices before the division, so that the gradients are those of
    one device that holds the complete batch.
    """
    count = lax.psum(lax.stop_gradient(term.count), AXIS)
    return term.sum / jnp.where(count > 0, count, 1.0)
