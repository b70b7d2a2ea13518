"""The table of variants: what each changes, which row of the paper it is, and that it trains."""

from __future__ import annotations

import itertools
from math import inf

import jax
import numpy as np
import optax
import pytest

from alignps_jax.config import flat_fields
from alignps_jax.experiments.catalogue import TABLES, print_catalogue
from alignps_jax.nn.model import build_model
from alignps_jax.training.step import TrainStep
from alignps_jax.types import UserError
from configs import cuhk, prw, synthetic, tiny
from configs.variants import VARIANTS, rows_of, variants_for
from tests.fakes import randomize

CONFIGS = {"cuhk": cuhk, "prw": prw, "synthetic": synthetic, "tiny": tiny}
# Sizes of the people who go to each level, by variant; `released` has levels of background only.
RANGES = {"": [(0, inf)], "p3_p4": [(0, 128), (128, inf)], "released": [(0, inf)] + 4 * [(inf, 0)]}
RANGES["baseline"] = [(0, 64), (64, 128), (128, 256), (256, 512), (512, inf)]
NECK = ("lateral_deform", "output_deform", "concatenate")


def test_every_row_of_the_paper_is_there_once():
    for dataset, counts in (("cuhk_sysu", "8 5 8 4 3 4 2 2"), ("prw", "0 0 0 0 0 0 2 2")):
        rows = [rows_of(table, dataset) for table in TABLES]
        assert [str(len({row for _, row in found})) for found in rows] == counts.split()
    assert rows_of("2", "synthetic") == rows_of("2", "cuhk_sysu")
    inferred = [row.inferred for _, row in rows_of("2", "cuhk_sysu")]
    assert inferred == [False] * 4 + [True] * 3 + [False]


def test_table_2_and_figure_4_are_every_combination():
    found = []
    for name, row in rows_of("2", "cuhk_sysu"):
        found.append(tuple(cuhk.get_config(name).model[field] for field in NECK))
        names = zip(("lateral", "output", "concat"), found[-1], strict=True)
        assert row.label == (" + ".join(part for part, on in names if on) or "none")
    assert set(found) == set(itertools.product((False, True), repeat=3))
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
        assert flat_fields(config) == flat_fields(default) | dict(variant.changes), name
        model = build_model(config)
        step = TrainStep(model, optax.identity(), config.loss, max_positives=1)
        assert len(step.ranges()) == len(model.strides(train=True))
        assert module is not cuhk or step.ranges() == RANGES.get(name, step.ranges())
    with pytest.raises(UserError, match=r"found 't4', expected one of .*t3"):
        module.get_config("t4")


@pytest.mark.parametrize("dataset", ["cuhk_sysu", "prw", "synthetic"])
def test_the_list_names_every_variant_and_row_and_fits(dataset, capsys, monkeypatch):
    listed = [name for table in TABLES for name, _ in rows_of(table, dataset)]
    monkeypatch.setenv("COLUMNS", "70")
    print_catalogue("configs/some.py", dataset)
    text = capsys.readouterr().out.split("To run one")[0]
    lines = text.splitlines()
    assert max(map(len, lines)) <= 70
    names = [line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "]
    assert set(names) == {name or "(none)" for name in VARIANTS}
    assert len(names) == len(listed) + len(VARIANTS) - len(set(listed))
    assert ("mAP 91.8†" in text) == (dataset != "prw")
    assert ("mAP 45.9" in text) == (dataset == "prw")


def test_embeddings_come_from_where_the_variant_says():
    x = np.random.default_rng(4).normal(size=(1, 5, 6, 8)).astype(np.float32)
    x[:, 4:] = 0
    extents = np.array([[4, 6]], np.int32)
    sources = {
        "": set(),
        "t1": {"box_tower", "embed_predictor"},
        "t2": {"cls_tower", "embed_predictor"},
    }
    for name, expected in (sources | {"t3": {"embed_predictor", "embed_tower"}}).items():
        config = tiny.get_config(name)
        config.model.channels, config.model.head_convs = 8, 1
        head = build_model(config).head
        params = randomize(jax.jit(head.init)(jax.random.key(0), x, extents)["params"])
        run = jax.jit(lambda params, head=head: head.apply({"params": params}, x, extents))
        whole = run(params).embeddings
        assert np.array_equal(whole, x) == (name == "")
        np.testing.assert_allclose(whole.sum((1, 2)), 0 if name else x.sum((1, 2)), atol=1e-4)
        changed = {p: params | {p: jax.tree.map(lambda z: 2 * z + 1, params[p])} for p in params}
        found = {p for p, own in changed.items() if not np.allclose(run(own).embeddings, whole)}
        assert found == expected, name
