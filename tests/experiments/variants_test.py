"""The table of variants: what each changes, which row of the paper it is, and that it trains."""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from alignps_jax.devices import AXIS
from alignps_jax.experiments.catalogue import TABLES, catalogue, print_catalogue
from alignps_jax.losses.total import assign
from alignps_jax.nn.model import build_model, init_variables
from alignps_jax.training.step import TrainStep
from alignps_jax.types import Outputs, UserError
from configs import cuhk, prw, synthetic, tiny
from configs.variants import VARIANTS, rows_of, variants_for
from tests.fakes import random_batch, randomize, train_setup

CONFIGS = {"cuhk": cuhk, "prw": prw, "synthetic": synthetic, "tiny": tiny}
# The paper's tables by hand: recall, AP, mAP, top-1 and the changes that its text describes.
NECK = ("lateral_deform", "output_deform", "concatenate")
ALIGNPS = (90.3, 81.2, 93.1, 93.4)
PAPER = {
    "1": [
        ALIGNPS,
        (87.5, 78.7, 92.7, 93.1),
        (79.0, 71.7, 89.3, 89.5),
        (90.4, 80.5, 91.1, 91.6),
        (90.9, 80.4, 90.0, 90.5),
    ],
    "2": [
        (83.4, 83.7),
        (90.6, 90.8),
        (91.4, 91.9),
        (84.0, 84.1),
        (91.8, 92.2),
        (90.7, 91.0),
        (92.0, 92.5),
        (93.1, 93.4),
    ],
    "3": [
        (87.5, 79.0, 80.3, 79.2),
        (89.1, 78.6, 77.1, 75.9),
        (90.1, 81.4, 80.7, 80.2),
        ALIGNPS,
    ],
    "4": [(92.4, 92.9), (92.8, 93.2), (93.1, 93.4)],
    "5": [(93.1, 93.4), (93.5, 93.9), (93.5, 94.0), (94.0, 94.5)],
    "6": [(93.1, 93.4), (94.0, 94.5)],
}


def flat(config) -> dict[str, object]:
    return traverse_util.flatten_dict(config.to_dict(), sep=".")


def figures(row) -> tuple[float, ...]:
    return tuple(x for x in (row.recall, row.AP, row.mAP, row.top1) if x is not None)


@pytest.mark.parametrize("dataset", ["cuhk_sysu", "synthetic"])
def test_every_row_of_the_paper_is_there_once_with_its_figures(dataset):
    for table, expected in PAPER.items():
        assert [figures(row) for _, row in rows_of(table, dataset)] == expected, table
    assert [row.label for _, row in rows_of("fig4", dataset)] == [
        "baseline", "SA", "RA", "TA", "SA + RA", "SA + TA", "RA + TA", "SA + RA + TA",
    ]  # fmt: skip
    assert all(figures(row) == () for _, row in rows_of("fig4", dataset))
    assert [row.inferred for _, row in rows_of("2", dataset)] == [False] * 4 + [True] * 3 + [False]
    everything = [row for table in TABLES for _, row in rows_of(table, dataset)]
    assert len(everything) == len(set(everything)) == 8 + sum(map(len, PAPER.values()))
    assert rows_of("7", dataset) == ()


def test_prw_has_figures_of_its_own():
    assert [figures(row) for _, row in rows_of("6", "prw")] == [(45.9, 81.9), (46.1, 82.1)]
    assert all(rows_of(table, "prw") == () for table in TABLES if table != "6")


def test_no_two_names_are_one_run():
    for table in (VARIANTS, variants_for("prw"), variants_for("synthetic")):
        # A card with 24 GB takes the defaults.
        others = (variant for name, variant in table.items() if name != "card24")
        changes = [tuple(sorted(variant.changes.items())) for variant in others]
        assert len(set(changes)) == len(changes)


def test_table_2_is_every_combination():
    found = []
    for name, row in rows_of("2", "cuhk_sysu"):
        model = cuhk.get_config(name).model
        found.append(tuple(model[field] for field in NECK))
        names = zip(("lateral", "output", "concat"), found[-1], strict=True)
        assert row.label == (" + ".join(part for part, on in names if on) or "none")
    assert set(found) == set(itertools.product((False, True), repeat=3))


def test_figure_4_is_every_combination():
    for name, row in rows_of("fig4", "cuhk_sysu"):
        model = cuhk.get_config(name).model
        assert (len(model.levels) == 1) == ("SA" in row.label)
        assert {model[field] for field in NECK} == {"RA" in row.label}
        assert model.reid == ("input" if "TA" in row.label else "independent")


@pytest.mark.parametrize("module", CONFIGS.values(), ids=CONFIGS)
def test_every_variant_builds_and_changes_only_what_it_says(module):
    default = module.get_config()
    for name, variant in variants_for(default.data.name).items():
        config = module.get_config(name)
        assert flat(config) == flat(default) | dict(variant.changes), name
        model = build_model(config)
        step = TrainStep(model, optax.identity(), config.loss, max_positives=1)
        assert len(step.ranges()) == len(model.strides(train=True))


def test_an_unknown_variant_names_the_known_ones():
    with pytest.raises(UserError, match=r"found 't4', expected one of .*t3"):
        cuhk.get_config("t4")


@pytest.mark.parametrize("name", ["baseline", "p3_p4", "p4"])
def test_only_the_levels_that_are_searched_on_are_made(name):
    config = tiny.get_config(name)
    model = build_model(config)
    levels = config.model.levels

    def run(image, size):
        params, frozen = init_variables(model, jax.random.key(0))
        return params, model.apply({"params": params, "frozen": frozen}, image, size)

    image = jax.ShapeDtypeStruct((2, 192, 256, 3), np.uint8)
    params, outputs = jax.eval_shape(run, image, jax.ShapeDtypeStruct((2, 2), np.int32))
    assert [level.embeddings.shape for level in outputs] == [
        (2, -(-192 // 2**level), -(-256 // 2**level), 16) for level in levels
    ]
    names = set(params["neck"])
    outputs_made = set(levels) | ({5} if max(levels) > 5 else set())
    assert names == {f"lateral{level}" for level in range(min(levels), 6)} | {
        f"output{level}" for level in outputs_made
    }
    scales = {f"scale{level - 3}" for level in levels}
    assert {name for name in params["head"] if name.startswith("scale")} == scales


def narrow(name: str):
    """A variant at the scale of a few channels."""
    config = tiny.get_config(name)
    config.model.backbone_width, config.model.channels = 4, 8
    return config


def check_padding_and_gradients(apply, params, maps, extents):
    """`apply(params, maps, extent)` neither sees padding nor has parameters without effect.

    Image 0 fills its maps, image 1 half of them in both directions; the rest is zero. Returns
    the outputs.
    """
    rng = np.random.default_rng(1)

    def weighted(params):
        outputs = apply(params, maps, extents)
        floats = [x for x in jax.tree.leaves(outputs) if jnp.issubdtype(x.dtype, jnp.floating)]
        weights = [rng.normal(size=x.shape).astype(np.float32) for x in floats]
        return sum(jnp.vdot(x, w) for x, w in zip(floats, weights, strict=True)), outputs

    found, outputs = jax.jit(jax.grad(weighted, has_aux=True))(params)
    for path, gradient in traverse_util.flatten_dict(found, sep="/").items():
        assert np.isfinite(gradient).all(), path
        assert np.any(gradient), path
    halves = jax.tree.map(lambda x: x[1:, : x.shape[1] // 2, : x.shape[2] // 2], maps)
    alone = jax.jit(apply)(params, halves, extents[1:])
    for loose, tight in zip(jax.tree.leaves(outputs), jax.tree.leaves(alone), strict=True):
        rows, columns = tight.shape[1:3]
        np.testing.assert_allclose(loose[1:, :rows, :columns], tight, rtol=1e-4, atol=1e-5)
        assert loose.shape[1] > rows
        if loose.ndim == 4:  # boxes and embeddings are zero in the padding
            assert not np.any(loose[1:, rows:])
            assert not np.any(loose[1:, :, columns:])
    return outputs


def initial(module, *args, **kwargs):
    variables = jax.jit(partial(module.init, **kwargs))(jax.random.key(0), *args)
    return randomize(variables["params"])


def half_filled(rng, *shapes: tuple[int, int, int]) -> list[np.ndarray]:
    """Two random maps of each shape; the second one is zero but for its upper left quarter."""
    maps = [rng.normal(size=(2, *shape)).astype(np.float32) for shape in shapes]
    for x in maps:
        x[1, x.shape[1] // 2 :] = x[1, :, x.shape[2] // 2 :] = 0
    return maps


@pytest.mark.parametrize("name", ["baseline", "p4"])
def test_necks(name):
    neck = build_model(narrow(name)).neck
    maps = half_filled(np.random.default_rng(2), (64, 64, 5), (32, 32, 6), (16, 16, 7))
    extents = np.array([[512, 512], [256, 256]], np.int32)
    params = initial(neck, maps, extents, train=True)

    def apply(params, maps, extents):
        return neck.apply({"params": params}, maps, extents, train=False)

    for level in check_padding_and_gradients(apply, params, maps, extents):
        np.testing.assert_allclose(level.sum((1, 2)), 0, atol=1e-3)


@pytest.mark.parametrize("name", ["t1", "t3"])
def test_heads(name):
    head = build_model(narrow(name)).head
    (x,) = half_filled(np.random.default_rng(3), (12, 16, 8))
    extents = np.array([[12, 16], [6, 8]], np.int32)
    params = initial(head, x, extents)
    assert ("tower" in params["embed"]) == (name == "t3")

    def apply(params, x, extents):
        return head.apply({"params": params}, x, extents)

    check_padding_and_gradients(apply, params, x, extents)


def test_embeddings_come_from_where_the_variant_says():
    x = np.random.default_rng(4).normal(size=(1, 5, 6, 8)).astype(np.float32)
    x[:, 4:] = 0
    extents = np.array([[4, 6]], np.int32)
    for name, sources in (
        ("", set()),
        ("t1", {"box_tower", "embed"}),
        ("t2", {"cls_tower", "embed"}),
        ("t3", {"embed"}),
    ):
        head = build_model(narrow(name)).head
        params = initial(head, x, extents)
        run = jax.jit(lambda params, head=head: head.apply({"params": params}, x, extents))
        whole = run(params).embeddings
        assert whole.dtype == np.float32
        if name == "":
            np.testing.assert_array_equal(whole, x)
        else:
            np.testing.assert_allclose(whole.sum((1, 2)), 0, atol=1e-4)
        for part in params:
            changed = run(params | {part: jax.tree.map(lambda z: 2 * z + 1, params[part])})
            same = np.allclose(changed.embeddings, whole)
            assert same == (part not in sources), (name, part)


def test_one_step_on_two_levels_reaches_every_parameter():
    config = narrow("baseline")
    config.model.levels, config.loss.level_borders = (5, 6), (50,)
    config.model.head_convs = 0  # towers take long to compile; test_heads has them
    config.optimizer.name, config.optimizer.weight_decay = "sgd", 0.0
    config.optimizer.warmup = "0 steps"
    _, step, state = train_setup(config, devices=1)
    run = jax.pmap(
        step, axis_name=AXIS, in_axes=(None, 0), out_axes=None, devices=jax.local_devices()[:1]
    )
    batch = random_batch(np.random.default_rng(1), images=2, bucket=(192, 256))
    after, metrics = run(state, jax.tree.map(lambda x: x[None], batch))
    assert metrics.positives > 5
    assert all(np.isfinite(term) and term > 0 for term in metrics.terms.values())
    before = traverse_util.flatten_dict(state.params, sep="/")
    for path, leaf in traverse_util.flatten_dict(after.params, sep="/").items():
        assert np.isfinite(leaf).all(), path
        # The bias of P6 goes with the mean that is subtracted: rounding alone moves it.
        assert path == "neck/output6/bias" or not np.array_equal(leaf, before[path]), path


def slow_levels(boxes, levels, borders, height, width, radius):
    """Which box each location of each level is positive for, or -1; literally."""
    edges = [0.0, *borders, np.inf]
    chosen = []
    for k, level in enumerate(levels):
        stride = 2**level
        for row, column in np.ndindex(-(-height // stride), -(-width // stride)):
            x, y = (column + 0.5) * stride, (row + 0.5) * stride
            best, owner = np.inf, -1
            for g, (x1, y1, x2, y2) in enumerate(boxes):
                sides = (x - x1, y - y1, x2 - x, y2 - y)
                off_center = max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2))
                inside = min(sides) > 0 and off_center < radius * stride
                area = (x2 - x1) * (y2 - y1)
                if inside and edges[k] <= max(sides) <= edges[k + 1] and area < best:
                    best, owner = area, g
            chosen.append(owner)
    return np.array(chosen)


def blank_outputs(height: int, width: int) -> Outputs:
    blank = np.zeros((2, height, width, 4), np.float32)
    return Outputs(blank[..., 0], blank, blank[..., 0], blank, np.ones((2, height, width), bool))


@pytest.mark.parametrize("levels", [(3, 4, 5, 6, 7), (3, 5), (4,)])
def test_people_go_to_the_level_of_their_size(levels):
    config = tiny.get_config()
    config.model.levels = levels
    config.loss.level_borders = (20, 32, 45, 70)[: len(levels) - 1]
    step = TrainStep(build_model(config), optax.identity(), config.loss, max_positives=1)
    batch = random_batch(np.random.default_rng(8), images=2, people=6, bucket=(192, 256))
    size = np.full_like(batch.size, (192, 256))
    batch = batch.replace(size=size, valid=np.ones_like(batch.valid))
    outputs = tuple(blank_outputs(-(-192 // 2**level), -(-256 // 2**level)) for level in levels)
    fixed = partial(
        assign,
        strides=step.model.strides(train=True),
        ranges=step.ranges(),
        center_radius=config.loss.center_radius,
    )
    found = jax.device_get(jax.jit(fixed)(outputs, batch))
    for image in range(2):
        chosen = slow_levels(batch.boxes[image], levels, config.loss.level_borders, 192, 256, 1.5)
        np.testing.assert_array_equal(found.positive[image], chosen >= 0)
        own = chosen[chosen >= 0]
        np.testing.assert_array_equal(
            found.identity[image][chosen >= 0], batch.identity[image][own]
        )
        # Never more than the room that training makes for them.
        assert np.bincount(own, minlength=1).max() <= 9 * len(levels)


@pytest.mark.parametrize("dataset", ["cuhk_sysu", "prw", "synthetic"])
def test_the_list_names_every_variant_and_row_and_fits(dataset, capsys, monkeypatch):
    tables = list(catalogue(dataset))
    listed = {cell for table in tables for cell in table.columns[0].cells}
    assert listed == {name or "(none)" for name in VARIANTS}
    assert sum(table.row_count for table in tables[:-1]) == sum(
        len(rows_of(table, dataset)) for table in TABLES
    )
    for columns in (80, 100, 160):
        monkeypatch.setenv("COLUMNS", str(columns))
        print_catalogue("configs/some.py", dataset)
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) == columns
        assert ("91.8†" in text) == (dataset != "prw")
        assert ("45.9" in text) == (dataset == "prw")
        assert "toim_without_lut " in text
        assert "…" not in text
        assert "--config=configs/some.py:VARIANT" in text
