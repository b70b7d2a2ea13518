"""The table of variants: what each changes, which row of the paper it is, and that it trains."""

from __future__ import annotations

import itertools
from math import inf

import jax
import numpy as np
import optax
import pytest
from flax import traverse_util

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
# The paper's tables by hand: (recall, AP,) mAP, top-1 of each row.
NECK = ("lateral_deform", "output_deform", "concatenate")
PAPER = """
1 | 90.3 81.2 93.1 93.4 | 87.5 78.7 92.7 93.1 | 79.0 71.7 89.3 89.5 | 90.4 80.5 91.1 91.6 | 90.9 80.4 90.0 90.5
2 | 83.4 83.7 | 90.6 90.8 | 91.4 91.9 | 84.0 84.1 | 91.8 92.2 | 90.7 91.0 | 92.0 92.5 | 93.1 93.4
3 | 87.5 79.0 80.3 79.2 | 89.1 78.6 77.1 75.9 | 90.1 81.4 80.7 80.2 | 90.3 81.2 93.1 93.4
4 | 92.4 92.9 | 92.8 93.2 | 93.1 93.4
5 | 93.1 93.4 | 93.5 93.9 | 93.5 94.0 | 94.0 94.5
6 | 93.1 93.4 | 94.0 94.5
"""  # noqa: E501


def flat(config) -> dict[str, object]:
    return traverse_util.flatten_dict(config.to_dict(), sep=".")


def figures(row) -> tuple[float, ...]:
    return tuple(x for x in (row.recall, row.AP, row.mAP, row.top1) if x is not None)


@pytest.mark.parametrize("dataset", ["cuhk_sysu", "synthetic"])
def test_every_row_of_the_paper_is_there_once_with_its_figures(dataset):
    for line in PAPER.strip().splitlines():
        table, *rows = line.split(" | ")
        expected = [tuple(map(float, row.split())) for row in rows]
        assert [figures(row) for _, row in rows_of(table, dataset)] == expected, table
    assert all(figures(row) == () for _, row in rows_of("fig4", dataset))
    assert [row.inferred for _, row in rows_of("2", dataset)] == [False] * 4 + [True] * 3 + [False]
    everything = [row for table in TABLES for _, row in rows_of(table, dataset)]
    assert len(everything) == len(set(everything)) == 8 + 26
    assert [figures(row) for _, row in rows_of("6", "prw")] == [(45.9, 81.9), (46.1, 82.1)]
    assert all(rows_of(table, "prw") == () for table in TABLES if table != "6")


def test_table_2_and_figure_4_are_every_combination():
    found = []
    for name, row in rows_of("2", "cuhk_sysu"):
        found.append(tuple(cuhk.get_config(name).model[field] for field in NECK))
        names = zip(("lateral", "output", "concat"), found[-1], strict=True)
        assert row.label == (" + ".join(part for part, on in names if on) or "none")
    assert set(found) == set(itertools.product((False, True), repeat=3))
    labels = set()
    for name, row in rows_of("fig4", "cuhk_sysu"):
        model = cuhk.get_config(name).model
        assert (len(model.levels) == 1) == ("SA" in row.label)
        assert {model[field] for field in NECK} == {"RA" in row.label}
        assert model.reid == ("input" if "TA" in row.label else "independent")
        labels.add(row.label)
    assert len(labels) == 8


@pytest.mark.parametrize("module", CONFIGS.values(), ids=CONFIGS)
def test_every_variant_builds_and_changes_only_what_it_says(module):
    default = module.get_config()
    for name, variant in variants_for(default.data.name).items():
        config = module.get_config(name)
        assert flat(config) == flat(default) | dict(variant.changes), name
        model = build_model(config)
        step = TrainStep(model, optax.identity(), config.loss, max_positives=1)
        assert len(step.ranges()) == len(model.strides(train=True))
        assert module is not cuhk or step.ranges() == RANGES.get(name, step.ranges())
    with pytest.raises(UserError, match=r"found 't4', expected one of .*t3"):
        module.get_config("t4")


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
