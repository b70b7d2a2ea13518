"""Two training steps at full width, the oracle's beside ours; prints what they differ by as JSON.

python -m tests.parity.first_steps trained MODEL          # everything in float32
python -m tests.parity.in_float64 tests.parity.first_steps rough MODEL

`trained` weights have the smaller activations of a trained network. `rough` ones are drawn without
regard to that: some samples of the deformable convolutions then lie so close to a kink of the
interpolation that float32 rounding decides on the side, and with it the gradient.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from alignps_jax.training.step import TrainStep
from tests.oracle.training_torch import losses, update_memory
from tests.parity.common import DTYPE, Pair, make_batch, make_pair, memory_errors
from tests.parity.ours import by_released_name, first_state, one_device, relative_error

SIZE = (250, 310)  # fed as 256 x 320
WEIGHTS = {"trained": True, "rough": False}


def record_gradients() -> optax.GradientTransformation:
    """Updates nothing; its state is the last gradient."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda gradient, state, params: (jax.tree.map(jnp.zeros_like, gradient), gradient),
    )


def gradient_errors(pair: Pair, gradient: dict[str, np.ndarray]) -> dict:
    """Largest relative errors of a gradient's norm and of the whole gradient, over parameters."""
    norms, errors = {}, {}
    for key, parameter in pair.oracle.named_parameters():
        if parameter.grad is not None and parameter.grad.any():
            expected = parameter.grad.numpy()
            norms[key] = relative_error(np.linalg.norm(gradient[key]), np.linalg.norm(expected))
            errors[key] = relative_error(gradient[key], expected)
        elif key in gradient:  # frozen, or of a level without positives
            np.testing.assert_array_equal(gradient[key], 0)
    return {
        "gradients": len(norms),
        "norm": max(norms.values()),
        "worst_norm": max(norms, key=norms.get),
        "tensor": max(errors.values()),
        "worst_tensor": max(errors, key=errors.get),
    }


def run(weights: str, name: str, folder: Path) -> list[dict]:
    pair = make_pair(name, folder, gentle=WEIGHTS[weights], dtype=getattr(torch, DTYPE))
    optimizer = record_gradients()
    step = one_device(TrainStep(pair.model, optimizer, pair.config.loss, 100))
    state = first_state(pair.weights, pair.memory, optimizer)
    batch, pixels, people = make_batch(3, SIZE, DTYPE)
    found = []
    for _ in range(2):
        terms, embeddings, identity = losses(pair.oracle, pixels, people)
        pair.oracle.zero_grad()
        sum(terms.values()).backward()
        update_memory(pair.oracle, embeddings, identity)
        state, metrics = step(state, jax.tree.map(lambda x: x[None], batch))
        assert metrics.positives == len(identity)
        assert (identity >= 0).any()
        assert (identity < 0).sum() > 2
        assert set(metrics.terms) == set(terms)
        gradient = by_released_name({"params": state.opt_state})
        found.append(
            {
                "losses": max(
                    relative_error(metrics.terms[key], terms[key].item()) for key in terms
                ),
                "memory": max(memory_errors(pair.oracle, state.memory).values()),
                **gradient_errors(pair, gradient),
            }
        )
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(sys.argv[1], sys.argv[2], Path(folder))))
