"""Ways to find the people that are searched, and what an evaluation keeps of them."""

import numpy as np

from alignps_jax.evaluation.detections_io import load_detections, save_detections
from alignps_jax.evaluation.evaluate import collect, example_queries
from alignps_jax.inference.predict import make_predict_step
from alignps_jax.types import Detections
from configs import tiny


def test_boxes_are_chosen_by_name():
    config = tiny.get_config()
    assert make_predict_step(config).level_borders is None
    config.eval.boxes = "ground_truth"
    assert make_predict_step(config).level_borders == config.loss.level_borders


def test_what_is_collected_survives_a_file_bit_for_bit(tmp_path):
    """Also embeddings that a device normalized less exactly than the file format asks for."""
    rng = np.random.default_rng(0)
    found = {}
    for image in (2, 0, 1):
        vectors = rng.normal(size=(5, 8))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True) * rng.uniform(1 - 5e-4, 1, (5, 1))
        found[image] = Detections(
            boxes=np.sort(rng.uniform(0, 99, (5, 2, 2)), axis=1).reshape(5, 4).astype(np.float32),
            scores=np.sort(rng.uniform(0, 1, 5).astype(np.float32))[::-1],
            embeddings=vectors.astype(np.float32),
            valid=np.arange(5) < 2 * image,
        )
    detections = collect(["a", "b", "c"], found)
    assert detections.offsets.tolist() == [0, 0, 2, 6]
    save_detections(tmp_path / "d.npz", detections)
    again = load_detections(tmp_path / "d.npz")
    for field in ("offsets", "boxes", "scores", "embeddings"):
        np.testing.assert_array_equal(getattr(detections, field), getattr(again, field))


def test_examples_are_the_worst_queries_and_a_spread_of_the_others():
    assert example_queries(np.array([7, 2, 9, 8, 1, 0, 6, 3, 5, 4])) == [7, 2, 9, 0, 4, 8]
    assert example_queries(np.array([1, 0])) == [1, 0]
    assert example_queries(np.array([3, 0, 1, 2])) == [3, 0, 1, 2]
