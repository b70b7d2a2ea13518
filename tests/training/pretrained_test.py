"""What training starts from: words, files, runs; what fits is taken, and pixels follow."""

from __future__ import annotations

import sys

import jax
import numpy as np
import pytest

from alignps_jax.arrays import leaves_by_path
from alignps_jax.checkpoint.store import Checkpoints
from alignps_jax.nn.model import build_model
from alignps_jax.training.optimizer import learning_rate_schedule, make_optimizer
from alignps_jax.training.pretrained import starting_arrays, starting_config
from alignps_jax.training.setup import create_state
from alignps_jax.types import UserError
from alignps_jax.weights import sources
from alignps_jax.weights.released_names import to_torch
from alignps_jax.weights.sources import CAFFE, TORCHVISION
from configs import ablation, cuhk, prw, synthetic, tiny
from tests.fakes import randomize
from tests.weights.convert_test import fake_backbone, fake_detector, saved, small_config

CLASSIFIER = {"fc.weight": np.ones((5, 3), np.float32)}


def small(variant: str = ""):
    config = tiny.get_config(variant)
    config.model.backbone_width, config.model.channels, config.model.norm_groups = 4, 8, 4
    return config


def state_of(config, identities: int):
    """The state before the first step, as a run makes it."""
    schedule = learning_rate_schedule(config.optimizer, steps_per_epoch=1)
    optimizer = make_optimizer(config.optimizer, schedule, lambda path: False)
    model = build_model(config)
    weights = starting_arrays(config, model)
    return create_state(config, model, optimizer, identities, weights)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir with a detector off its initial weights, and its parameters."""
    workdir, config = tmp_path_factory.mktemp("trained"), small()
    state = state_of(config, identities=5)
    state = state.replace(step=np.array(7, np.int32), params=randomize(state.params))
    with Checkpoints(workdir, keep=1, config=config) as checkpoints:
        checkpoints.save(state, None)
    return workdir, flat(state)


def flat(state):
    return leaves_by_path(jax.device_get(state.params))


def fields(config) -> dict:
    return {name: config.model[name] for name in CAFFE}


def test_the_same_network_takes_everything_but_memory_and_optimizer(trained, capsys):
    workdir, expected = trained
    config = small()
    config.model.pretrained = str(workdir)
    state = state_of(config, identities=11)
    found = flat(state)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)
    assert state.memory.lut.shape == (11, 8)
    assert not np.any(state.memory.lut)
    assert int(state.step) == 0
    out = capsys.readouterr().out
    assert f"are taken from {workdir}; not taken: none; starts anew: lookup table" in out
    assert out.endswith("optimizer\n")


def test_another_head_takes_what_fits_and_says_what_does_not(trained, capsys):
    workdir, expected = trained
    config = small("t3")  # a third tower, which the checkpoint does not have
    config.model.head_convs, config.model.lateral_deform = 2, False
    config.model.pretrained = str(workdir)
    found = flat(state_of(config, identities=3))
    taken = {name for name, value in found.items() if np.array_equal(value, expected.get(name))}
    assert "head/cls_predictor/kernel" in taken
    assert all(name in taken for name in found if name.startswith("backbone/"))
    assert not any(name.startswith("head/embed") for name in taken)
    out = capsys.readouterr().out
    assert "not taken: params/" in out
    assert "starts anew: lookup table, queue, optimizer, params/" in out


def test_pixels_follow_a_run_and_another_backbone_is_refused(trained, tmp_path):
    workdir, _ = trained
    config = small()
    config.model.pretrained, config.model.pixel_std = str(workdir), (1.0, 1.0, 1.0)
    assert starting_config(config, tmp_path).model.pixel_std == (58.0, 58.0, 58.0)
    with pytest.raises(UserError, match=r"^config\.model\.pixel_std: found \(1\.0, 1\.0, 1\.0\), "):
        starting_config(config, tmp_path, {"model.pixel_std"})
    config.model.backbone_width = 8
    with pytest.raises(UserError, match="another backbone"):
        state_of(config, identities=3)
    config.model.pretrained = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"/nowhere: found no checkpoint"):
        starting_config(config, tmp_path)


@pytest.mark.parametrize("module", [cuhk, prw])
@pytest.mark.parametrize("variant", ["", "plus", "released", "h100x8"])
def test_the_paper_starts_from_imagenet_or_not_at_all(module, variant, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "cache_folder", lambda: tmp_path)
    config = module.get_config(variant)
    assert config.model.pretrained == "msra"
    monkeypatch.setitem(sys.modules, "torch", None)
    expected = r"pip install '\.\[torch\]', or .* --config\.model\.pretrained=torchvision$"
    with pytest.raises(UserError, match=expected):
        starting_config(config, tmp_path)
    config.model.pretrained = "random"
    with pytest.raises(UserError, match="found 'random', expected weights"):
        starting_config(config, tmp_path)


@pytest.mark.parametrize("module", [synthetic, tiny, ablation])
def test_small_networks_start_from_random_weights_and_say_so(module, tmp_path, capsys):
    config = module.get_config()
    assert starting_config(config, tmp_path) == config
    assert "starts from random weights" in capsys.readouterr().out
    config.model.frozen_stages = 0
    with pytest.raises(UserError, match="found 'random', expected weights"):
        starting_config(config, tmp_path)


@pytest.mark.parametrize("variant", ["", "plus"])
def test_a_file_of_a_backbone_is_converted_on_the_way(variant, tmp_path):
    config, tensors = small_config(variant), fake_backbone()
    config.model.pretrained = str(saved(tmp_path, tensors | CLASSIFIER))
    config = starting_config(config, tmp_path)
    assert fields(config) == TORCHVISION
    state = state_of(config, identities=3)
    conv = state.params["backbone"]["layer3_2"]["conv2"]
    np.testing.assert_array_equal(to_torch(conv["kernel"]), tensors["layer3.2.conv2.weight"])
    assert ("offset" in conv) == (variant == "plus")
    norm = state.frozen["backbone"]["bn1"]
    np.testing.assert_array_equal(norm["scale"], tensors["bn1.weight"])
    np.testing.assert_array_equal(norm["mean"], tensors["bn1.running_mean"])


def test_names_that_do_not_tell_their_pixels_are_asked_for(tmp_path):
    config = small_config()
    config.model.pretrained = str(saved(tmp_path, fake_backbone()))
    with pytest.raises(UserError, match=r"do not tell .*--config\.model\.channel_order=RGB"):
        starting_config(config, tmp_path)
    assert fields(starting_config(config, tmp_path, {"model.channel_order"})) == CAFFE
    config.model.channel_order = "RGB"
    assert fields(starting_config(config, tmp_path, {"model.channel_order"})) == TORCHVISION
    named = "resnet50_msra-5891d200.safetensors"  # its digits tell
    config.model.pretrained = str(saved(tmp_path, fake_backbone(), named))
    assert fields(starting_config(config, tmp_path)) == CAFFE
    with pytest.raises(UserError, match=r"channel_order: found 'RGB', expected 'BGR' for config\."):
        starting_config(config, tmp_path, {"model.channel_order"})


def test_a_released_detector_is_fine_tuned_from_its_file(tmp_path, capsys):
    config, tensors = small_config(""), fake_detector()
    config.model.pretrained = str(saved(tmp_path, tensors))
    config.model.channel_order = "RGB"
    config = starting_config(config, tmp_path)
    assert fields(config) == CAFFE
    state = state_of(config, identities=3)
    kernel = state.params["head"]["cls_predictor"]["kernel"]
    np.testing.assert_array_equal(to_torch(kernel), tensors["bbox_head.conv_cls.weight"])
    assert not np.any(state.memory.lut)
    assert "starts anew: lookup table, queue, optimizer" in capsys.readouterr().out
    plus = small_config("plus")
    plus.model.pretrained = str(saved(tmp_path, fake_detector("released_plus"), "p.safetensors"))
    state_of(plus, identities=3)
    plain = small_config("")
    plain.model.pretrained = plus.model.pretrained
    with pytest.raises(UserError, match=r"another backbone .*conv_offset"):
        state_of(plain, identities=3)


def test_a_resumed_run_keeps_its_pixels_and_needs_no_weights(trained):
    config, workdir = small(), trained[0]
    config.model.pretrained, config.model.pixel_std = "torchvision", (1.0, 1.0, 1.0)
    assert fields(starting_config(config, workdir)) == fields(small())
    typed = fields(starting_config(config, workdir, {"model.pixel_std"}))
    assert typed == fields(small()) | {"pixel_std": (1.0, 1.0, 1.0)}
