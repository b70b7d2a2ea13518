"""The paper's loss as a pure function: no device axis, shares that add up, and nobody at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignps_jax.losses.total import TRIPLETS, assign, flatten_levels, select_positives, total
from alignps_jax.types import OIMMemory, Outputs
from configs import cuhk
from tests.fakes import NUM_IDENTITIES, random_batch

IMAGES, SIDES, D, STRIDE = 4, (12, 16), 8, 8


def outputs_of(rng: np.random.Generator) -> Outputs:
    shape = (IMAGES, *SIDES)

    def normal(*last: int) -> np.ndarray:
        return rng.normal(size=(*shape, *last)).astype(np.float32)

    return Outputs(
        cls_logits=normal(),
        box_distances=np.abs(normal(4)),
        centerness_logits=normal(),
        embeddings=normal(D),
        valid=np.ones(shape, bool),
    )


def memory_of(rng: np.random.Generator) -> OIMMemory:
    return OIMMemory(
        lut=jnp.asarray(rng.normal(size=(NUM_IDENTITIES, D)), jnp.float32),
        queue=jnp.asarray(rng.normal(size=(5, D)), jnp.float32),
        tail=jnp.asarray(2, jnp.int32),
    )


def parts_of(outputs, batch, limit, devices=1):
    """(outputs, targets, positives) of every device's share of the images."""
    shares = []
    for start in range(0, IMAGES, IMAGES // devices):
        rows = slice(start, start + IMAGES // devices)
        own, people = jax.tree.map(lambda x, rows=rows: x[rows], (outputs, batch))
        targets = assign([own], people, strides=[STRIDE], ranges=[(0.0, np.inf)], center_radius=1.5)
        flat = flatten_levels([own])
        local, dropped = select_positives(flat, targets, limit)
        assert dropped == 0
        shares.append((flat, targets, local))
    return shares


def sums(outputs, batch, memory, rules, devices):
    """Every term's sum and count over the devices, by name."""
    limit = 200
    shares = parts_of(outputs, batch, limit, devices)
    gathered = jax.tree.map(lambda *x: jnp.concatenate(x), *(local for *_, local in shares))
    terms = [
        total(*share, gathered, memory, rules, offset=number * limit)
        for number, share in enumerate(shares)
    ]
    return {
        name: (sum(term[name].sum for term in terms), sum(term[name].count for term in terms))
        for name in terms[0]
    }


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("triplet", TRIPLETS)
def test_shares_of_several_devices_add_up_to_those_of_one(devices, triplet):
    rng = np.random.default_rng(1)
    outputs, memory = outputs_of(rng), memory_of(rng)
    batch = random_batch(rng, images=IMAGES)
    rules = cuhk.get_config().loss
    rules.triplet = triplet
    one = sums(outputs, batch, memory, rules, 1)
    many = sums(outputs, batch, memory, rules, devices)
    assert (
        one.keys()
        == many.keys()
        == {"cls", "box", "centerness", "oim"} | ({"triplet"} if TRIPLETS[triplet][0] else set())
    )
    for name, (value, count) in one.items():
        assert value > 0
        np.testing.assert_allclose(many[name][0], value, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(many[name][1], count, rtol=1e-6, err_msg=name)


def test_without_people_only_classification_counts_and_gradients_are_finite():
    rng = np.random.default_rng(2)
    outputs, memory = outputs_of(rng), memory_of(rng)
    batch = random_batch(rng, images=IMAGES)
    batch = batch.replace(valid=np.zeros_like(batch.valid))
    rules = cuhk.get_config().loss

    def loss(embeddings, distances):
        changed = outputs.replace(embeddings=embeddings, box_distances=distances)
        flat, targets, local = parts_of(changed, batch, 200)[0]
        terms = total(flat, targets, local, local, memory, rules)
        return sum(term.sum for term in terms.values()), terms

    gradients, terms = jax.grad(loss, argnums=(0, 1), has_aux=True)(
        jnp.asarray(outputs.embeddings), jnp.asarray(outputs.box_distances)
    )
    assert terms["cls"].sum > 0
    assert terms["cls"].count == IMAGES
    for name in ("box", "centerness", "oim", "triplet"):
        assert terms[name].sum == terms[name].count == 0
    assert not any(np.any(g) for g in gradients)
