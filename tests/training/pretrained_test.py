"""Starting from a complete detector: what fits is taken, and said."""

import jax
import numpy as np
import pytest
from flax import traverse_util

from alignps_jax.checkpoint.store import Checkpoints
from alignps_jax.nn.model import build_model
from alignps_jax.training.optimizer import learning_rate_schedule, make_optimizer
from alignps_jax.training.state import create_state
from alignps_jax.types import UserError
from configs import tiny
from tests.fakes import randomize


def small(variant: str = ""):
    config = tiny.get_config(variant)
    config.model.backbone_width, config.model.channels, config.model.norm_groups = 4, 8, 4
    return config


def state_of(config, identities: int):
    schedule = learning_rate_schedule(config.optimizer, steps_per_epoch=1)
    optimizer = make_optimizer(config.optimizer, schedule, lambda path: False)
    return create_state(config, build_model(config), optimizer, identities)


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
    return {
        name: np.asarray(leaf)
        for name, leaf in traverse_util.flatten_dict(jax.device_get(state.params), sep="/").items()
    }


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
    assert f"fine-tuning step 7 of {workdir}" in out
    assert "not taken" not in out


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
    assert "starts anew: params/" in out


def test_another_backbone_or_other_pixels_are_refused(trained):
    workdir, _ = trained
    config = small()
    config.model.pretrained = str(workdir)
    config.model.pixel_std = (1.0, 1.0, 1.0)
    with pytest.raises(UserError, match=r"config\.model\.pixel_std: found \(1\.0, 1\.0, 1\.0\)"):
        state_of(config, identities=3)
    config = small()
    config.model.pretrained, config.model.backbone_width = str(workdir), 8
    with pytest.raises(UserError, match="another backbone"):
        state_of(config, identities=3)
