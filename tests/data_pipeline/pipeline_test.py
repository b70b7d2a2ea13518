"""What the batches hold, in which order, and that any of them can be made again."""

import dataclasses
import json
from collections import Counter

import cv2
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from alignps_jax.types import Annotations, UserError
from data_pipeline import transforms
from data_pipeline.pipeline import make_eval_batches, make_train_pipeline, single_image_batch
from data_pipeline.prepared import PreparedSplit
from data_pipeline.transforms import buckets

SCALES = ((64, 40), (96, 60), (150, 90))
FIELDS = ("image", "size", "scale", "index", "valid_image", "boxes", "identity", "labeled", "valid")


def make_split(sizes, boxes=None, seed=0):
    """Photos of the given (height, width), each with one to three people unless told."""
    rng = np.random.default_rng(seed)
    people = [] if boxes is None else [np.array(b, np.float32).reshape(-1, 4) for b in boxes]
    images = []
    for height, width in sizes:
        small = rng.integers(0, 256, (4, 5, 3), np.uint8)
        images.append(cv2.imencode(".jpg", cv2.resize(small, (width, height)))[1].tobytes())
        if boxes is None:
            corner = rng.uniform(0, 10, (rng.integers(1, 4), 2))
            people.append(np.hstack([corner, corner + rng.uniform(3, 15, corner.shape)]))
    labeled = tuple(rng.random(len(b)) < 0.6 for b in people)
    annotations = Annotations(
        names=tuple(f"s{i}.jpg" for i in range(len(sizes))),
        boxes=tuple(np.asarray(b, np.float32) for b in people),
        identity=tuple(rng.integers(0, 9, len(b)).astype(np.int32) for b in people),
        labeled=labeled,
        camera=np.zeros(len(sizes), np.int32),
    )
    return PreparedSplit(annotations, np.array(sizes, np.int32), images.__getitem__)


def settings(**changes):
    data = {"train_scales": SCALES, "test_scale": (96, 60), "flip_probability": 0.5}
    data |= {"max_programs": None, "min_side": 20, "workers": 2, "prefetch": 3}
    return ConfigDict(data | changes)


def train(split, *, seed=3, batch_size=4, process=(0, 1), **changes):
    sizes = {"seed": seed, "batch_size": batch_size, "process": process}
    return make_train_pipeline(split, settings(**changes), **sizes)


def evaluation(split, *, batch_size=4, process=(0, 1), **changes):
    return make_eval_batches(split, settings(**changes), batch_size=batch_size, process=process)


def bgr_of(split, index):
    return cv2.imdecode(np.frombuffer(split.encoded(index), np.uint8), cv2.IMREAD_COLOR)


def read(pipeline, step):
    return pipeline.reader.read(pipeline.plan(step))


def mixed_sizes(landscape, portrait, seed=1):
    rng = np.random.default_rng(seed)
    sizes = [(int(rng.integers(30, 50)), int(rng.integers(51, 90))) for _ in range(landscape)]
    sizes += [(int(rng.integers(51, 90)), int(rng.integers(30, 50))) for _ in range(portrait)]
    return [sizes[i] for i in rng.permutation(len(sizes))]


def epoch_indices(pipeline, epoch):
    steps = range(epoch * pipeline.steps_per_epoch, (epoch + 1) * pipeline.steps_per_epoch)
    return np.stack([pipeline.plan(step).indices for step in steps])


def assert_same(first, second):
    for field in FIELDS:
        found, expected = getattr(first, field), getattr(second, field)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected, err_msg=field)


@pytest.fixture(scope="module")
def mixed():
    """11 landscape and 6 portrait photos: neither is a multiple of the batch."""
    return make_split(mixed_sizes(11, 6))


class TestTrainContents:
    def test_rows_are_their_photos_and_people_at_a_drawn_scale_and_flip(self, mixed):
        """Every row of many batches: which scale and flip it is, is found out, not assumed."""
        pipeline = train(mixed)
        flips, used = [], set()
        for step in range(12):
            batch = read(pipeline, step)
            assert batch.valid_image.all()
            for row, index in enumerate(batch.index):
                bgr = bgr_of(mixed, index)
                size = np.array(bgr.shape[:2])
                height, width = (int(side) for side in batch.size[row])
                scales = [min(long / size.max(), short / size.min()) for long, short in SCALES]
                possible = [tuple((size * s + 0.5).astype(int).tolist()) for s in scales]
                used.add(possible.index((height, width)))
                resized = cv2.resize(bgr, (width, height))[..., ::-1]
                pixels = batch.image[row, :height, :width]
                flips.append(not np.array_equal(pixels, resized))
                np.testing.assert_array_equal(pixels, resized[:, ::-1] if flips[-1] else resized)
                boxes = mixed.annotations.boxes[index] * np.tile((width, height) / size[::-1], 2)
                boxes = np.clip(boxes, 0, [width, height] * 2)
                if flips[-1]:
                    boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
                people = batch.valid[row]
                np.testing.assert_allclose(batch.boxes[row, people], boxes, atol=1e-4)
                for field in ("identity", "labeled"):
                    expected = getattr(mixed.annotations, field)[index]
                    np.testing.assert_array_equal(getattr(batch, field)[row, people], expected)
        assert 0 < sum(flips) < len(flips)
        assert used == {0, 1, 2}

    def test_scales_and_flips_are_drawn_evenly(self):
        pipeline = train(make_split([(40, 60)] * 4))
        plans = [pipeline.plan(step) for step in range(750)]
        assert abs(np.concatenate([plan.flips for plan in plans]).mean() - 0.5) < 0.04
        sizes = np.concatenate([plan.sizes for plan in plans])
        drawn = Counter(map(tuple, sizes.tolist()))
        assert set(drawn) == {(40, 60), (60, 90), (90, 135)}
        assert all(abs(count / len(sizes) - 1 / 3) < 0.04 for count in drawn.values())

    def test_no_person_lacks_room_and_those_below_a_pixel_are_left_out(self):
        good, thin, flat = [5, 5, 20, 30], [5, 5, 5.5, 30], [5, 5, 20, 5.9]
        boxes = [[thin, good, flat], [[i, 2, i + 9, 30] for i in range(9)], [good]]
        split = make_split([(40, 60)] * 3, boxes)
        pipeline = train(split, batch_size=3, flip_probability=0.0)
        assert pipeline.reader.people == 16
        batch = read(pipeline, 0)
        people = dict(zip(batch.index.tolist(), batch.valid.sum(axis=1), strict=True))
        assert people == {0: 1, 1: 9, 2: 1}
        (row,) = np.flatnonzero(batch.index == 0)
        expected = good * np.tile(batch.scale[row], 2)
        np.testing.assert_allclose(batch.boxes[row, 0], expected, rtol=1e-6)
        assert batch.identity[row, 0] == split.annotations.identity[0][1]
        assert batch.labeled[row, 0] == split.annotations.labeled[0][1]


class TestEpochs:
    @pytest.mark.parametrize("counts", [(11, 6), (8, 0), (0, 5), (1, 0), (0, 1), (2, 1), (9, 9)])
    @pytest.mark.parametrize("batch_size", [1, 4])
    def test_every_image_in_every_epoch(self, counts, batch_size):
        pipeline = train(make_split(mixed_sizes(*counts)), batch_size=batch_size)
        assert pipeline.steps_per_epoch == sum(-(-count // batch_size) for count in counts)
        for epoch in range(5):
            seen = Counter(epoch_indices(pipeline, epoch).ravel().tolist())
            assert set(seen) == set(range(sum(counts)))
            # Repeats only fill up, and no image comes much oftener than its peers.
            assert sum(seen.values()) == pipeline.steps_per_epoch * batch_size
            assert max(seen.values()) <= max(2, batch_size)

    def test_batches_hold_one_orientation_in_the_smallest_bucket_and_epochs_differ(self, mixed):
        pipeline = train(mixed)
        assert pipeline.buckets == buckets(SCALES)
        wide = mixed.sizes[:, 1] > mixed.sizes[:, 0]
        orientations, chosen = [], set()
        for step in range(60):
            plan = pipeline.plan(step)
            assert len(set(wide[plan.indices])) == 1
            orientations.append(bool(wide[plan.indices[0]]))
            areas = [h * w for h, w in pipeline.buckets if (plan.sizes <= (h, w)).all()]
            assert plan.bucket[0] * plan.bucket[1] == min(areas)
            assert (plan.sizes <= plan.bucket).all()
            chosen.add(plan.bucket)
        assert len(chosen) > 1
        in_epoch = {tuple(orientations[i : i + 5]) for i in range(0, 60, 5)}
        assert {sum(epoch) for epoch in in_epoch} == {3}
        assert len(in_epoch) > 1  # portrait batches are not always last
        epochs = [epoch_indices(pipeline, epoch) for epoch in range(4)]
        epochs.append(epoch_indices(train(mixed, seed=4), 0))
        assert len({epoch.tobytes() for epoch in epochs}) == 5

    def test_batches_of_few_programs_share_scale_and_shape(self, mixed):
        pipeline = train(mixed, max_programs=6, batch_size=2)
        shapes = len(pipeline.buckets)
        assert len(SCALES) <= shapes <= 6
        usable = set(np.concatenate(train(mixed).groups).tolist())
        chosen = set()
        for epoch in range(4):
            assert set(epoch_indices(pipeline, epoch).ravel().tolist()) == usable
        for step in range(4 * pipeline.steps_per_epoch):
            plan = pipeline.plan(step)
            assert any(set(plan.indices) <= set(group) for group in pipeline.groups)
            scales = [
                [s for s in range(len(SCALES)) if tuple(pipeline.sizes[i, s]) == tuple(size)]
                for i, size in zip(plan.indices, plan.sizes, strict=True)
            ]
            assert set.intersection(*map(set, scales))
            assert (plan.sizes <= plan.bucket).all()
            chosen.add(plan.bucket)
        assert 1 < len(chosen & set(pipeline.buckets)) == len(chosen)

    def test_the_same_as_ever_without_reading_an_image(self):
        pipeline = train(dataclasses.replace(make_split(mixed_sizes(5, 4)), encoded=None))
        assert epoch_indices(pipeline, 2).ravel().tolist() == [8, 0, 1, 3, 4, 7, 6, 2, 5, 8, 0, 1]
        plan = pipeline.plan(7)
        assert plan.sizes.tolist() == [[64, 40], [64, 34], [96, 43], [119, 90]]
        assert plan.flips.tolist() == [False, True, True, False]


@pytest.mark.parametrize("count", [2, 4])
def test_parts_of_the_processes_make_the_whole(mixed, count):
    whole = train(mixed)
    parts = [train(mixed, process=(index, count)) for index in range(count)]
    batches = [[read(part, step) for part in parts] for step in range(4)]
    expected = [read(whole, step) for step in range(4)]
    shards = [evaluation(mixed, process=(index, count)) for index in range(count)]
    expected += list(evaluation(mixed))
    batches += zip(*shards, strict=True)
    for joined, one in zip(batches, expected, strict=True):
        assert_same(jax.tree.map(lambda *rows: np.concatenate(rows), *joined), one)


class TestIterator:
    @pytest.mark.parametrize(("workers", "prefetch"), [(0, 3), (1, 1), (3, 2), (2, 0)])
    def test_gives_all_steps_in_order(self, mixed, workers, prefetch):
        pipeline = train(mixed, workers=workers, prefetch=prefetch)
        batches = list(pipeline.iterator(7))
        assert len(batches) == 7
        for step, batch in enumerate(batches):
            assert_same(batch, read(pipeline, step))

    @pytest.mark.parametrize(("before", "after"), [(2, 2), (0, 2), (2, 0), (0, 0)])
    def test_resumes_exactly(self, mixed, before, after):
        """Past the end of an epoch, with another number of workers, through JSON."""
        iterator = train(mixed, workers=before).iterator(20)
        start, first = iterator.get_state(), next(iterator)
        for _ in range(6):
            next(iterator)
        state = json.loads(json.dumps(iterator.get_state()))
        expected = [next(iterator) for _ in range(4)]

        resumed = train(mixed, workers=after).iterator(20)
        resumed.set_state(state)
        for batch in expected:
            assert_same(next(resumed), batch)

        next(resumed)  # and back again, with other batches already under way
        resumed.set_state(state)
        assert_same(next(resumed), expected[0])
        assert sum(1 for _ in resumed) == 20 - 8
        end = resumed.get_state()
        resumed.set_state(start)
        assert_same(next(resumed), first)
        resumed.set_state(end)
        assert not list(resumed)


def test_images_without_people_and_small_ones_are_left_out(capsys):
    sizes = [(40, 60), (19, 60), (40, 60), (40, 60), (60, 20)]
    good, thin = [5, 5, 15, 18], [5, 5, 5.5, 30]
    pipeline = train(make_split(sizes, [[good], [good], [], [thin], [good]]), batch_size=2)
    assert set(epoch_indices(pipeline, 0).ravel()) == {0, 4}
    printed = capsys.readouterr().out
    assert printed.startswith("3 of 5 images left out of training (2 without a usable box, 1 with")
    with pytest.raises(UserError, match="2 of 2 images left out"):
        train(make_split([(40, 60), (40, 60)], [[], []]))


class TestEvaluation:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_every_image_once_in_order_one_shape_per_orientation(self, mixed, workers):
        batches = list(evaluation(mixed, workers=workers))
        assert [int(batch.valid_image.sum()) for batch in batches] == [4, 4, 3, 4, 2]
        assert [batch.image.shape[1:3] for batch in batches] == [(64, 96)] * 3 + [(96, 64)] * 2
        seen = np.concatenate([batch.index[batch.valid_image] for batch in batches])
        wide = mixed.sizes[:, 1] > mixed.sizes[:, 0]
        np.testing.assert_array_equal(seen, [*np.flatnonzero(wide), *np.flatnonzero(~wide)])
        for batch in batches:
            sizes = mixed.sizes[batch.index[batch.valid_image]]
            factor = np.minimum(96 / sizes.max(axis=1), 60 / sizes.min(axis=1))
            expected = (sizes * factor[:, None] + 0.5).astype(int)
            np.testing.assert_array_equal(batch.size[batch.valid_image], expected)
        last = batches[-1]
        assert last.valid_image.tolist() == [True, True, False, False]
        assert not last.image[2:].any()
        assert not last.valid[2:].any()
        np.testing.assert_array_equal(last.size[2:], [(96, 64)] * 2)
        np.testing.assert_array_equal(last.scale[2:], 1)

    def test_again_in_memory_that_held_something_else(self, mixed, monkeypatch):
        batches, fresh = evaluation(mixed), transforms.empty_batch
        expected = list(batches)

        def used(*args):
            batch = fresh(*args)
            batch.image[:] = 7
            return batch

        monkeypatch.setattr(transforms, "empty_batch", used)
        for batch, other in zip(batches, expected, strict=True):
            assert_same(batch, other)

    def test_single_image_is_as_in_evaluation(self, mixed):
        for batch in evaluation(mixed, batch_size=1):
            index = int(batch.index[0])
            bgr = bgr_of(mixed, index)
            single = single_image_batch(bgr[..., ::-1], settings())
            for field in ("image", "size", "scale", "valid_image"):
                np.testing.assert_array_equal(getattr(single, field), getattr(batch, field))
            assert not single.valid.any()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_one_clean_error(mixed, workers):
    jpegs = [mixed.encoded(image)[: 200 if image == 5 else None] for image in range(17)]
    broken = dataclasses.replace(mixed, encoded=jpegs.__getitem__)
    with pytest.raises(UserError, match=r"s5\.jpg.*cannot be decoded"):
        list(train(broken, workers=workers).iterator(20))
    with pytest.raises(UserError, match=r"s5\.jpg"):
        list(evaluation(broken, workers=workers))
