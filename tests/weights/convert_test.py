"""--mode=convert and --mode=export on small fake files (.pth only where PyTorch is installed)."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from alignps_jax.checkpoint.store import load_arrays, load_config, load_weights
from alignps_jax.cli import main
from alignps_jax.nn.model import build_model, weights_template
from alignps_jax.training.pretrained import starting_arrays
from alignps_jax.types import UserError
from alignps_jax.weights.convert import convert_released, export_released
from alignps_jax.weights.released_names import LOOKUP_TABLE, QUEUE, to_torch
from alignps_jax.weights.sources import CAFFE, TORCHVISION
from alignps_jax.weights.tensor_files import Tensors, read_tensors, write_tensors
from configs import cuhk, prw, tiny
from tests.oracle.random_weights import random_state_dict
from tests.parity.ours import released_shapes
from tests.places import ROOT

NAMES = ROOT.parent / "shared" / "data" / "released_state_dict.json"
LUT, SLOTS = 12, 9
CLASSIFIER = {"fc.weight": np.ones((5, 3), np.float32)}
ONLY_TRAINING = re.compile(r"neck\.fpn_convs\.[1-4]|bbox_head\.scales\.[1-4]")


def small_config(variant: str = "released", module=cuhk) -> ConfigDict:
    config = module.get_config(variant)
    config.model.backbone_width = 4
    config.model.channels = 8
    config.model.norm_groups = 4
    config.loss.lut_size = None
    config.loss.queue_size = SLOTS
    return config


def model_shapes(config: ConfigDict) -> dict[str, tuple[int, ...]]:
    """Released names and shapes of a model's parameters and statistics."""
    weights = weights_template(build_model(config))
    return released_shapes({"params": weights.params, "frozen": weights.frozen})


@cache
def detector_shapes(variant: str) -> dict[str, tuple[int, ...]]:
    """Those of a released file, which always has the levels that only training has."""
    config = small_config(variant)
    config.model.background_levels = True
    shapes = model_shapes(config) | {LOOKUP_TABLE: (LUT, 8), QUEUE: (SLOTS, 8)}
    shapes[QUEUE.replace("queue", "tail")] = ()
    for name in [name for name in shapes if name.endswith("running_var")]:
        shapes[name.replace("running_var", "num_batches_tracked")] = ()
    return shapes


def fake_detector(variant: str = "released") -> Tensors:
    """A released file's tensors."""
    return random_state_dict(detector_shapes(variant), seed=1)


def fake_backbone() -> Tensors:
    """An ImageNet ResNet's tensors under torchvision's names, without its classifier."""
    tensors = random_state_dict(model_shapes(small_config()), seed=2)
    prefix = "backbone."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def saved(folder: Path, tensors: Tensors, name: str = "source.safetensors") -> Path:
    write_tensors(folder / name, tensors, {})
    return folder / name


def uncounted(tensors: Tensors) -> Tensors:
    """All but the numbers of batches, which nothing reads."""
    return {name: x for name, x in tensors.items() if not name.endswith("num_batches_tracked")}


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.skipif(not NAMES.is_file(), reason="needs ../shared")
@pytest.mark.parametrize("module", [cuhk, prw])
@pytest.mark.parametrize("variant", ["released", "released_plus"])
def test_names_and_shapes_are_the_released_ones(module, variant):
    plain, plus, *_ = json.loads(NAMES.read_text()).values()
    expected = plain | (plus if variant == "released_plus" else {})
    found = {k: list(shape) for k, shape in model_shapes(module.get_config(variant)).items()}
    left = set(expected) - set(found)
    assert found == {name: expected[name] for name in found}
    assert all("matching_layer" in n or n.endswith("num_batches_tracked") for n in left)


@pytest.mark.parametrize("variant", ["", "released", "released_plus", "plus"])
def test_round_trip_is_bit_exact(variant, tmp_path, capsys):
    source = fake_detector(variant)
    config = small_config(variant)
    convert_released(config, saved(tmp_path, source), tmp_path / "out")
    if "released" not in variant:  # without the levels that only training has
        source = {name: x for name, x in source.items() if not ONLY_TRAINING.match(name)}
    for path in (tmp_path / "out", tmp_path / "out" / "checkpoints" / "0"):
        export_released(path, tmp_path / "back.safetensors")
        assert_equal(uncounted(read_tensors(tmp_path / "back.safetensors")), uncounted(source))
    assert ("note: " in capsys.readouterr().out) == ("released" not in variant)


def test_kernels_land_in_our_layout_and_the_config_travels_along(tmp_path):
    tensors, config = fake_detector(), small_config()
    convert_released(config, saved(tmp_path, tensors), tmp_path / "out")
    stored = load_config(tmp_path / "out")
    assert stored.to_dict() == config.to_dict()
    weights = load_weights(tmp_path / "out", weights_template(build_model(stored)))
    kernel = weights.params["neck"]["lateral4"]["kernel"]
    assert kernel[2, 0, 3, 5] == tensors["neck.lateral_convs.1.weight"][5, 3, 2, 0]
    variance = weights.frozen["backbone"]["layer2_0"]["downsample_bn"]["var"]
    expected = tensors["backbone.layer2.0.downsample.1.running_var"]
    np.testing.assert_array_equal(variance, expected)


def changed(**changes) -> Tensors:
    return {k: v for k, v in {**fake_detector(), **changes}.items() if v is not None}


BAD_SOURCES = {
    "missing": (
        partial(changed, **{"neck.lateral_convs.0.weight": None}),
        r"missing: neck.lateral_convs.0.*\(taken for a detector because of (neck|bbox_head)\.",
    ),
    "unexpected": (
        partial(changed, **{"neck.extra.weight": np.ones(3, np.float32)}),
        "unexpected: neck.ex",
    ),
    "shape": (
        partial(changed, **{"bbox_head.conv_cls.weight": np.ones((1, 7, 3, 3), np.float32)}),
        re.escape("wrong shape: bbox_head.conv_cls.weight [1, 7, 3, 3] instead of [1, 8, 3, 3]"),
    ),
    "AlignPS+": (
        partial(fake_detector, "released_plus"),
        "unexpected: .*conv_offset.*cuhk or prw, :released or :released_plus",
    ),
    "queue": (
        partial(changed, **{QUEUE: np.ones((500, 8), np.float32)}),
        re.escape(f"queue [500, 8] instead of [{SLOTS}, 8]"),
    ),
    "a backbone's head": (
        lambda: {"weight": np.ones(3, np.float32)},
        "missing: backbone.* and .* more.*taken for a ResNet-50 because no name has neck. or bbox",
    ),
    "two of one name": (
        lambda: {f"{p}conv1.weight": np.ones((4, 3, 7, 7), np.float32) for p in ("", "encoder.")},
        r"found two tensors for conv1\.weight",
    ),
    "a detector in an unknown wrapper": (
        lambda: {f"students.{name}": value for name, value in fake_detector().items()},
        r"missing: backbone.* unexpected: .*taken for a detector because of students\.\w+",
    ),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_what_does_not_fit_is_named_and_nothing_is_written(case, tmp_path):
    make, message = BAD_SOURCES[case]
    with pytest.raises(UserError, match=message) as error:
        convert_released(small_config(), saved(tmp_path, make()), tmp_path / "out")
    assert str(error.value).startswith(f"{tmp_path / 'source.safetensors'}: ")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_configs_that_do_not_fit_are_errors(tmp_path):
    source, config = saved(tmp_path, fake_detector()), small_config()
    config.model.channel_order, config.loss.lut_size = "RGB", LUT
    with pytest.raises(UserError, match=r"config.model.channel_order: found 'RGB', expected 'BGR'"):
        convert_released(config, source, tmp_path / "out", {"model.channel_order"})
    config.loss.lut_size = 483
    with pytest.raises(UserError, match=rf"lookup_table \[{LUT}, 8\] instead of \[483, 8\]"):
        convert_released(config, source, tmp_path / "out")
    with pytest.raises(UserError, match=r"missing: .*; unexpected: backbone\."):
        convert_released(tiny.get_config(), source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert_released(small_config(), source, tmp_path / "out")
    with pytest.raises(UserError, match="--workdir: found checkpoints"):
        convert_released(small_config(), source, tmp_path / "out")


# As a publisher wraps the backbone, beside what else the file has.
WRAPPED = {
    "torchvision": lambda tensors: tensors | CLASSIFIER,
    "data parallel": lambda tensors: {f"module.{k}": v for k, v in (tensors | CLASSIFIER).items()},
    "caffe": lambda tensors: tensors | {"conv1.bias": np.full(4, 0.25, np.float32)},
    "DINO": lambda tensors: (
        {f"student.module.backbone.{k}": v for k, v in tensors.items()}
        | {"student.module.head.mlp.0.bias": np.ones(3, np.float32)}
    ),
    "SwAV": lambda tensors: (
        {f"module.{k}": v for k, v in tensors.items()}
        | {
            f"module.{k}": np.ones(3, np.float32)
            for k in ("projection_head.0.bias", "prototypes.w")
        }
    ),
    "MoCo": lambda tensors: (
        {
            f"module.encoder_{side}.{k}": v + (side == "k")
            for side in "qk"
            for k, v in (tensors | {"fc.0.weight": np.ones(3, np.float32)}).items()
        }
        | {"module.queue": np.ones((3, 3), np.float32)}
    ),
}
TELLING = {"torchvision": TORCHVISION, "data parallel": TORCHVISION, "caffe": CAFFE}


@pytest.mark.parametrize("kind", WRAPPED)
def test_training_starts_from_imagenet_backbones(kind, tmp_path):
    tensors, config = fake_backbone(), small_config("")
    source, typed = saved(tmp_path, WRAPPED[kind](tensors)), set()
    if kind not in TELLING:
        with pytest.raises(UserError, match=r"names do not tell .*channel_order=RGB .* or BGR "):
            convert_released(config, source, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        typed = {"model.channel_order"}
        config.model.channel_order = "RGB"
    convert_released(config, source, tmp_path / "out", typed)
    expected = TELLING.get(kind, TORCHVISION)
    model = load_config(tmp_path / "out").model
    assert {name: model[name] for name in expected} == expected
    # AlignPS+ starts from the same checkpoint, or from the file.
    for variant, path in (("", tmp_path / "out"), ("plus", tmp_path / "out"), ("plus", source)):
        config = small_config(variant)
        config.model.pretrained = str(path)
        found = starting_arrays(config, build_model(config))
        kernel = found["params/backbone/layer3_2/conv2/kernel"]
        np.testing.assert_array_equal(to_torch(kernel), tensors["layer3.2.conv2.weight"])
        mean = tensors["bn1.running_mean"] - (0.25 if kind == "caffe" else 0)
        np.testing.assert_array_equal(found["frozen/backbone/bn1/mean"], mean)


def test_the_channel_order_that_the_user_types_tells_more_than_names(tmp_path):
    """Some Caffe weights come with a classifier under torchvision's names."""
    source, config = saved(tmp_path, fake_backbone() | CLASSIFIER), small_config()
    convert_released(config, source, tmp_path / "out", {"model.channel_order"})
    assert load_config(tmp_path / "out").model.pixel_std == CAFFE["pixel_std"]
    with pytest.raises(UserError, match="holds a backbone only"):
        export_released(tmp_path / "out", tmp_path / "back.safetensors")
    with pytest.raises(UserError, match="found no checkpoint"):
        export_released(tmp_path / "nowhere", tmp_path / "back.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source.safetensors"]


def with_average(torch, kind: str, tensors: dict) -> dict:
    """A training checkpoint whose running average is one more everywhere."""
    more = {name: value + 1 for name, value in tensors.items()}
    if kind == "mmcv":
        flat = {f"ema_{name.replace('.', '_')}": value for name, value in more.items()}
        return {"state_dict": tensors | flat, "meta": {"epoch": np.float64(3.0)}}
    if kind == "mean teacher":
        both = (("student", tensors), ("teacher", more))
        return {"state_dict": {f"{who}.{k}": v for who, part in both for k, v in part.items()}}
    if kind == "timm":
        wrapped = {f"module.{name}": value for name, value in more.items()}
        return {"state_dict": tensors, "state_dict_ema": wrapped, "args": Namespace(lr=0.1)}
    return {"model": tensors, "model_ema": {"state_dict": more}, "best": np.float32(0.5)}


@pytest.mark.parametrize("kind", ["mmcv", "mean teacher", "timm", "another"])
def test_ema_takes_the_running_average(kind, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(np.array(x)) for name, x in fake_detector().items()}
    torch.save(with_average(torch, kind, tensors), tmp_path / "a.pth")
    for averaged in (False, True):
        found = read_tensors(tmp_path / "a.pth", averaged)
        assert_equal(found, {name: x.numpy() + averaged for name, x in tensors.items()})
    convert_released(small_config(), tmp_path / "a.pth", tmp_path / "out", (), averaged=True)
    found = load_arrays(tmp_path / "out", lambda name: name == "params/head/cls_predictor/bias")
    expected = fake_detector()["bbox_head.conv_cls.bias"] + 1
    np.testing.assert_array_equal(*found.values(), expected)


@pytest.mark.parametrize("zipped", [True, False])
def test_pth_files(zipped, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = fake_detector()
    content = {
        "state_dict": {f"module.{k}": torch.from_numpy(np.array(x)) for k, x in tensors.items()},
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{}]},
        "meta": {"epoch": 24, "CLASSES": ("person",), "hooks": [None, 1.5], "seed": np.int64(3)},
        "args": Namespace(lr=0.1, best=np.float64(0.9)),
    }
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    convert_released(small_config(), tmp_path / "a.pth", tmp_path / "out")
    export_released(tmp_path / "out", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert set(back) == {"meta", "state_dict"}
    found = {name: value.numpy() for name, value in back["state_dict"].items()}
    assert_equal(uncounted(found), uncounted(tensors))


def test_the_commands(tmp_path, capsys):
    source, target = saved(tmp_path, fake_detector()), tmp_path / "back.safetensors"
    flags = (
        "--config=configs/cuhk.py",
        "--config.model.backbone_width=4",
        "--config.model.channels=8",
        "--config.model.norm_groups=4",
        f"--config.loss.queue_size={SLOTS}",
        f"--source={source}",
        f"--workdir={tmp_path / 'out'}",
    )
    assert main(["launch.py", "--mode=convert", *flags]) == 0
    assert "390 tensors of" in capsys.readouterr().out
    words = ["--mode=export", f"--checkpoint={tmp_path / 'out'}", f"--target={target}"]
    assert main(["launch.py", *words]) == 0
    expected = {k: x for k, x in fake_detector().items() if not ONLY_TRAINING.match(k)}
    assert_equal(uncounted(read_tensors(target)), uncounted(expected))
