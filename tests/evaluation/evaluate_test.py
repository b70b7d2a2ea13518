"""What an evaluation keeps of the detections of a network, and which examples it shows."""

import tracemalloc
import types

import numpy as np
import pytest

from alignps_jax.evaluation.detections_io import load_detections, save_detections
from alignps_jax.evaluation.evaluate import Evaluator
from alignps_jax.inference.predict import make_predict_step
from alignps_jax.types import Batch, Detections, UserError
from configs import tiny
from tests.evaluation.detections_io_test import assert_same, make

ROWS, PADDED = 8, 100
# A stand-in for the batches and photos of a data set.
pytestmark = pytest.mark.usefixtures("unchecked")


def batches(images):
    """All images once, backwards; the last batch is filled up."""
    order, none = np.arange(images)[::-1], np.zeros((ROWS, 1))
    for start in range(0, images, ROWS):
        index = order[start : start + ROWS]
        valid, index = np.arange(ROWS) < len(index), np.resize(index, ROWS)
        yield Batch(none, none, none, index, valid, none, none, none, none)


def evaluator(expected):
    """One whose network finds what is expected."""

    def predict(params, frozen, batch):
        shape = (*batch.index.shape, PADDED)
        empty = np.zeros((*shape, 4)), np.zeros(shape), np.full((*shape, 6), np.nan)
        boxes, scores, embeddings = (part.astype(np.float32) for part in empty)
        found = Detections(boxes, scores, embeddings, np.zeros(shape, bool))
        for place in np.ndindex(batch.index.shape):
            rows = expected.of(batch.index[place])
            count = rows.stop - rows.start
            for name in ("boxes", "scores", "embeddings"):
                getattr(found, name)[place][:count] = getattr(expected, name)[rows]
            found.valid[place][:count] = True
        return found

    split = types.SimpleNamespace(annotations=types.SimpleNamespace(names=expected.names))
    return Evaluator(predict, list(batches(len(expected.names))), split, scorer=None)


def test_detections_of_all_images_in_their_order_survive_a_file(tmp_path):
    """Also embeddings that a device normalized less exactly than the file format asks for."""
    expected = make(counts=(3, 0, 5, 1, 2, 0, 0, 1, 4, 7, 1))
    lengths = np.random.default_rng(0).uniform(1 - 5e-4, 1, (24, 1)).astype(np.float32)
    expected.embeddings[:] *= lengths
    found = evaluator(expected).detect({}, {})
    np.testing.assert_allclose(found.embeddings, expected.embeddings / lengths, atol=1e-6)
    expected.embeddings[:] = found.embeddings
    assert_same(found, expected)
    save_detections(tmp_path / "d.npz", found)
    assert_same(load_detections(tmp_path / "d.npz"), found)


def test_memory_does_not_hold_the_padding_of_static_shapes():
    expected = make(counts=(3,) * 400)
    run = evaluator(expected)
    run.detect({}, {})  # what is compiled and imported
    tracemalloc.start()
    try:
        run.detect({}, {})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    padded = 400 * PADDED * (4 + 1 + 6) * 4
    assert peak < padded / 2


def test_a_network_without_numbers_is_an_error():
    expected = make()
    expected.embeddings[4] = np.nan
    with pytest.raises(UserError, match=r"^detections of the network: .*finite.* image 's2"):
        evaluator(expected).detect({}, {})


def test_boxes_are_chosen_by_name():
    config = tiny.get_config()
    assert make_predict_step(config).level_borders is None
    config.eval.boxes = "ground_truth"
    assert make_predict_step(config).level_borders == config.loss.level_borders
