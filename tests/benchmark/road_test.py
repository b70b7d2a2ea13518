"""The parts of the benchmark around the network: data, evaluation, search, starts, growth."""

from __future__ import annotations

import dataclasses
import math
import struct
import time

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from alignps_jax.evaluation.metrics import search_metrics
from alignps_jax.experiments.benchmark.measure import Timing
from alignps_jax.experiments.benchmark.simulate import made_up_split
from alignps_jax.training.monitor import FIRST_STEP
from alignps_jax.training.step import StepMetrics
from alignps_jax.types import UserError
from configs import cuhk, tiny
from data_pipeline.pipeline import BatchReader, make_train_pipeline
from tests.benchmark import compile as starts
from tests.benchmark import data, evaluate, growth, growth_cases, search
from tests.benchmark.measure import Context, FloatRate


@pytest.fixture
def context(tmp_path):
    config = cuhk.get_config()
    return Context(config, 2, True, tmp_path, None, FloatRate(runs=1, quick=True))


class TestData:
    def test_rows(self, context):
        rows = list(data.rows(context))
        whole = [row for row in rows if row.goal.startswith("≥ 85%")]
        assert len(whole) == 1
        resized = next(row for row in rows if row.name.startswith("decode and resize"))
        assert whole[0].floor == resized.time.median
        assert f"{resized.time.median / whole[0].time.median:.0%} of it" in whole[0].note
        assert [row.name for row in rows[-2:]] == ["a photo, 1 worker", "a photo, 2 workers"]

    def test_waiting_is_told_from_computing(self):
        """A step of 30 ms that is fed by something that takes 30 ms more for each batch."""
        config = tiny.get_config()
        config.data.workers = 0
        split = made_up_split(8, (96, 128))
        pipeline = make_train_pipeline(split, config.data, seed=0, batch_size=4)
        slow = dataclasses.replace(pipeline, reader=SlowReader(**shallow_fields(pipeline.reader)))
        number = jnp.ones(())
        metrics = StepMetrics({"cls": number}, number, number, number, number, number)

        def step_fn(state, batch):
            time.sleep(0.03)
            return state, metrics

        found = data.fed_steps(step_fn, None, slow, lambda step: 0.1, 4)
        assert 0.03 <= found.wait < found.step
        assert found.step - found.wait >= 0.03


class SlowReader(BatchReader):
    """Takes its time."""

    def read(self, plan):
        time.sleep(0.03)
        return super().read(plan)


def shallow_fields(thing):
    return {field.name: getattr(thing, field.name) for field in dataclasses.fields(thing)}


class TestEvaluate:
    def test_rows(self, context):
        rows = list(evaluate.rows(context))
        assert [row.goal for row in rows] == ["< 2 s", "< 5 s"]
        assert all(row.memory > 0 for row in rows)

    def test_a_simulation_is_as_large_as_it_says_and_not_trivial(self):
        size = evaluate.Simulation(images=50, people=170, queries=30, identities=20, appearances=4)
        people = evaluate.simulate_people(size)
        assert len(people.names) == 50
        assert min(map(len, people.boxes)) >= 1
        assert sum(map(len, people.boxes)) == 170
        assert sum(labeled.sum() for labeled in people.labeled) == 80
        protocol = evaluate.with_gallery_size(people, size, 12)
        for query, gallery in enumerate(protocol.gallery):
            assert len(set(gallery.tolist())) == 12
            assert protocol.query_image[query] not in gallery
            targets = protocol.target_images[query]
            np.testing.assert_array_equal(gallery[: len(targets)], targets)
        detections = evaluate.simulate_detections(people)
        assert np.count_nonzero(detections.scores >= evaluate.THRESHOLD) == 170
        assert len(detections.scores) == 340
        np.testing.assert_allclose(np.linalg.norm(detections.embeddings, axis=1), 1, atol=1e-5)
        found = search_metrics(protocol, detections, score_threshold=evaluate.THRESHOLD)
        assert 0.2 < found.mAP < 1

    def test_peak(self):
        assert 8e6 <= evaluate.peak_of(lambda: np.zeros(10**6).sum()) < 9e6


def test_search_rows(context):
    product, found = search.rows(context)
    assert found.floor == product.time.median
    assert found.flops == product.flops == 2 * 100 * 1000 * 256
    assert found.memory > 1000 * 256 * 4


class TestCompile:
    def launcher(self, tmp_path, text):
        script = tmp_path / "launch.py"
        script.write_text(text)
        return script

    def test_a_start_ends_with_the_first_step(self, context, tmp_path):
        """The launcher finds a usable configuration, fills the cache, and would go on for long."""
        launcher = self.launcher(
            tmp_path,
            "import pathlib, runpy, sys, time\n"
            "flags = dict(flag[2:].split('=') for flag in sys.argv[1:])\n"
            "config = runpy.run_path(flags['config'])['get_config']()\n"
            "assert config.train.duration == '1 steps'\n"
            "assert config.data.train_scales == (config.data.test_scale,) == ((128, 96),)\n"
            "cache = pathlib.Path(flags['workdir']) / 'xla_cache'\n"
            "warm = cache.exists()\n"
            "cache.mkdir(parents=True, exist_ok=True)\n"
            "(cache / 'program').write_bytes(bytes(3 * 10**6))\n"
            "time.sleep(0.0 if warm else 0.5)\n"
            f"print('train: 0%\\r{FIRST_STEP} after 1.0 s', flush=True)\n"
            "time.sleep(60)\n",
        )
        cold, warm = starts.rows(context, launcher)
        assert 0.5 < cold.time.median < 50
        assert warm.time.median < 50
        assert warm.note.endswith("3.0 MB")

    def test_a_start_that_fails_is_told(self, context, tmp_path):
        launcher = self.launcher(tmp_path, "print('error: no')")
        with pytest.raises(UserError, match="ended with 'error: no'"):
            list(starts.rows(context, launcher))


class TestGrowth:
    @pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
    def test_exponent_is_that_of_the_largest_sizes(self, power):
        sizes = (1, 10, 20, 40)
        values = [100.0] + [3 * size**power for size in sizes[1:]]
        assert math.isclose(growth.exponent(sizes, values), power, abs_tol=1e-3)

    def test_the_text_says_what_grows_faster_than_linearly(self):
        case = growth.Case("people", "work", lambda context, size: None, (2, 4, 8))
        linear, square = [Timing.of([size]) for size in case.sizes], (4.0, 16.0, 64.0)
        series = growth.Series(case, tuple(linear), square)
        assert series.verdict() == "time ~ n^1.00, memory ~ n^2.00: memory FASTER than linear"
        series = growth.Series(case, tuple(linear), (5.0, 5.0, 5.0))
        assert series.verdict().endswith("not above linear")

    def test_rows_and_plot(self, context):
        """Of one case with a program and one without; the picture has a column for each."""
        kept = [case for case in growth.CASES if case.quantity.startswith("gallery")]
        smaller = [
            dataclasses.replace(case, sizes=sizes)
            for case, sizes in zip(kept, ((300, 600), (250, 500)), strict=True)
        ]
        rows = list(growth.rows(context, smaller))
        assert len(rows) == 4
        assert [bool(row.note) for row in rows] == [False, True, False, True]
        assert rows[1].memory > rows[0].memory
        png = (context.workdir / "growth.png").read_bytes()
        width, height = struct.unpack(">II", png[16:24])
        assert (width, height) == (840, 800)

    @pytest.mark.parametrize("prepare", ["targets", "triplet", "oim"])
    def test_pieces_run(self, context, prepare):
        work = getattr(growth_cases, prepare)(context, 8)
        assert work.memory > 0
        work.run()

    def test_people_of_the_map_are_found(self, context):
        found = growth_cases.detections(context, 30).run()
        assert 15 <= int(found.valid.sum()) <= 100

    @pytest.mark.parametrize("case", growth.CASES, ids=lambda case: case.name)
    def test_sizes_ascend_and_areas_are_buckets(self, case):
        assert list(case.sizes) == sorted(set(case.sizes))
        if case.quantity == "pixels":
            for size in case.sizes:
                height, width = growth_cases.bucket_of(size)
                assert height * width == size
                assert height % 32 == width % 32 == 0
                assert height <= width <= 2 * height


def test_no_part_changes_the_configuration(context):
    before = ConfigDict(context.config.to_dict())
    list(data.rows(context))
    assert context.config == before
