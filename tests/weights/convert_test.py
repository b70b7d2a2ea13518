"""--mode=convert and --mode=export on small fake files (.pth only where PyTorch is installed)."""

from __future__ import annotations

import importlib.util
import json
import math
import pickle
import re
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from alignps_jax.checkpoint.store import Checkpoints, load_arrays, load_config, load_weights
from alignps_jax.nn.model import build_model, weights_template
from alignps_jax.training.optimizer import is_frozen, learning_rate_schedule, make_optimizer
from alignps_jax.training.pretrained import starting_arrays
from alignps_jax.training.setup import create_state
from alignps_jax.types import UserError
from alignps_jax.weights.conventions import CAFFE, TORCHVISION
from alignps_jax.weights.convert import EXTRAS, convert_released, export_released
from alignps_jax.weights.released_names import LOOKUP_TABLE, QUEUE, to_torch
from alignps_jax.weights.tensor_files import Tensors, read_tensors, write_tensors
from configs import cuhk, prw, tiny
from tests.oracle.random_weights import random_state_dict
from tests.parity.ours import released_shapes
from tests.places import ROOT
from tests.weights.malicious import Malicious

NAMES = ROOT.parent / "shared" / "data" / "released_state_dict.json"
LUT, SLOTS = 12, 9


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


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.skipif(not NAMES.is_file(), reason="needs ../shared")
def test_names_and_shapes_are_the_released_ones():
    published = list(json.loads(NAMES.read_text()).values())
    plain, plus = published[0], published[0] | published[1]
    for config, expected in (
        (cuhk.get_config("released"), plain),
        (cuhk.get_config("released_plus"), plus),
        (prw.get_config("released"), plain),
        (prw.get_config("released_plus"), plus),
    ):
        found = {name: list(shape) for name, shape in model_shapes(config).items()}
        left = set(expected) - set(found)
        assert found == {name: expected[name] for name in found}
        assert all("matching_layer" in n or n.endswith("num_batches_tracked") for n in left)


@pytest.mark.parametrize("variant", ["", "released", "released_plus", "plus"])
def test_round_trip_is_bit_exact(variant, tmp_path, capsys):
    source = fake_detector(variant)
    config = small_config(variant)
    convert_released(config, saved(tmp_path, source), tmp_path / "out")
    assert ("note: " in capsys.readouterr().out) == ("released" not in variant)
    export_released(tmp_path / "out", tmp_path / "back.safetensors")
    assert_equal(read_tensors(tmp_path / "back.safetensors"), source)
    export_released(tmp_path / "out" / "checkpoints" / "0", tmp_path / "again.safetensors")
    assert_equal(read_tensors(tmp_path / "again.safetensors"), source)


def test_kernels_land_in_our_layout_and_the_config_travels_along(tmp_path):
    tensors, config = fake_detector(), small_config()
    convert_released(config, saved(tmp_path, tensors), tmp_path / "out")
    stored = load_config(tmp_path / "out")
    assert stored.to_dict() == config.to_dict()
    weights = load_weights(tmp_path / "out", weights_template(build_model(stored)))
    assert weights.step == 0
    kernel = weights.params["neck"]["lateral4"]["kernel"]
    torch_kernel = tensors["neck.lateral_convs.1.weight"]
    assert kernel[2, 0, 3, 5] == torch_kernel[5, 3, 2, 0]
    norm = weights.frozen["backbone"]["layer2_0"]["downsample_bn"]
    np.testing.assert_array_equal(
        norm["var"], tensors["backbone.layer2.0.downsample.1.running_var"]
    )


def test_training_goes_on_from_a_converted_detector(tmp_path):
    tensors, config = fake_detector(), small_config()
    convert_released(config, saved(tmp_path, tensors), tmp_path / "out")
    model = build_model(config)
    optimizer = make_optimizer(
        config.optimizer,
        learning_rate_schedule(config.optimizer, steps_per_epoch=100),
        lambda path: is_frozen(model, path),
    )
    template = jax.eval_shape(lambda: create_state(config, model, optimizer, LUT))
    with Checkpoints(tmp_path / "out", keep=2, config=config) as checkpoints:
        state, iterator_state = checkpoints.restore(template)
    assert iterator_state is None
    np.testing.assert_array_equal(state.memory.lut, tensors[LOOKUP_TABLE])
    np.testing.assert_array_equal(state.memory.queue, tensors[QUEUE])
    assert state.memory.tail == tensors[QUEUE.replace("queue", "tail")]


def changed(**changes) -> Tensors:
    return {k: v for k, v in {**fake_detector(), **changes}.items() if v is not None}


BAD_SOURCES = {
    "missing": (
        partial(changed, **{"neck.lateral_convs.0.weight": None}),
        "missing: neck.lateral_convs.0",
    ),
    "unexpected": (
        partial(changed, **{"neck.extra.weight": np.ones(3, np.float32)}),
        "unexpected: neck.ex",
    ),
    "shape": (
        partial(changed, **{"bbox_head.conv_cls.weight": np.ones((1, 7, 3, 3), np.float32)}),
        re.escape("wrong shape: bbox_head.conv_cls.weight [1, 7, 3, 3] instead of [1, 8, 3, 3]"),
    ),
    "type": (
        partial(changed, **{"bbox_head.conv_cls.bias": np.ones(1)}),
        "wrong type: .*conv_cls.bias",
    ),
    "nan": (
        partial(changed, **{"bbox_head.conv_cls.bias": np.full(1, np.nan, np.float32)}),
        "not finite: bbox_head.conv_cls.bias",
    ),
    "tail": (
        partial(changed, **{QUEUE.replace("queue", "tail"): np.int64(SLOTS)}),
        f"tail: found {SLOTS}, expected",
    ),
    "plus": (
        partial(fake_detector, "released_plus"),
        r"deform_stages: found \(\), expected \(3, 4, 5\)",
    ),
    "variance": (
        partial(changed, **{"backbone.bn1.running_var": np.full(4, -1e-3, np.float32)}),
        "a negative variance: backbone.bn1.running_var",
    ),
    "shape of what only training has": (
        partial(changed, **{"neck.fpn_convs.3.conv.weight": np.ones((8, 8, 3, 5), np.float32)}),
        re.escape("wrong shape: neck.fpn_convs.3.conv.weight [8, 8, 3, 5] instead of [8, 8, 3, 3]"),
    ),
    "type of a count": (
        partial(changed, **{"backbone.bn1.num_batches_tracked": np.ones((), np.float32)}),
        "wrong type: backbone.bn1.num_batches_tracked float32",
    ),
    "a name of two lines": (
        partial(changed, **{"a\nb": np.ones(1, np.float32)}),
        r"unexpected: 'a\\nb'",
    ),
    "queue": (
        partial(changed, **{QUEUE: np.ones((500, 8), np.float32)}),
        f"queue_size: found {SLOTS}, expected 500",
    ),
    "nothing like it": (
        lambda: {"weight": np.ones(3, np.float32)},
        "missing: backbone.* and .* more",
    ),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_what_does_not_fit_is_named_and_nothing_is_written(case, tmp_path):
    make, message = BAD_SOURCES[case]
    tensors = {name: np.asarray(value) for name, value in make().items()}
    with pytest.raises(UserError, match=message) as error:
        convert_released(small_config(), saved(tmp_path, tensors), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_configs_that_do_not_fit_are_errors(tmp_path):
    source = saved(tmp_path, fake_detector())
    for config, message in (
        (small_config("plus"), r"deform_stages: found \(3, 4, 5\), expected \(\)"),
        (tiny.get_config(), "config.model.backbone: found 'resnet_small'"),
    ):
        with pytest.raises(UserError, match=message):
            convert_released(config, source, tmp_path / "out")
    config = small_config()
    config.model.channel_order = "RGB"
    with pytest.raises(UserError, match=r"config.model.channel_order: found 'RGB', expected 'BGR'"):
        convert_released(config, source, tmp_path / "out", None, {"model.channel_order"})
    config = small_config()
    config.loss.lut_size = 483
    with pytest.raises(UserError, match=f"config.loss.lut_size: found 483, expected {LUT}"):
        convert_released(config, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert_released(small_config(), source, tmp_path / "out")
    with pytest.raises(UserError, match="--workdir: found checkpoints"):
        convert_released(small_config(), source, tmp_path / "out")


def test_damaged_files_are_errors(tmp_path):
    whole = saved(tmp_path, fake_detector()).read_bytes()
    source = tmp_path / "bad.safetensors"
    header = int.from_bytes(whole[:8], "little")
    for content in (
        b"",
        b"PK",
        b"hello, this is no file of weights",
        b"\x80\x04junk",
        whole[:20],
        whole[: 8 + header],
        whole[:-1],
        whole[:8] + whole[8 : 8 + header].replace(b'"F32"', b'"F33"', 1) + whole[8 + header :],
    ):
        source.write_bytes(content)
        with pytest.raises(UserError, match=str(source)) as error:
            convert_released(small_config(), source, tmp_path / "out")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="cannot be read"):
        read_tensors(tmp_path / "nowhere.pth")


def test_export_refuses_other_models_and_suffixes(tmp_path):
    convert_released(small_config(), saved(tmp_path, fake_detector()), tmp_path / "out")
    with pytest.raises(UserError, match=r"suffix '.onnx', expected .pth or .safetensors"):
        export_released(tmp_path / "out", tmp_path / "model.onnx")
    with pytest.raises(UserError, match="found no checkpoint"):
        export_released(tmp_path / "nowhere", tmp_path / "model.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source.safetensors"]


def test_what_training_made_is_exported_even_beside_the_leftovers(tmp_path):
    """The leftovers of a conversion never replace a tensor that the model has."""
    convert_released(small_config(), saved(tmp_path, fake_detector()), tmp_path / "out")
    stale = {"bbox_head.conv_cls.bias": np.zeros(1, np.float32), "other": np.zeros(1, np.float32)}
    write_tensors(tmp_path / "out" / EXTRAS, stale, {})
    export_released(tmp_path / "out", tmp_path / "back.safetensors")
    found = read_tensors(tmp_path / "back.safetensors")
    assert "other" not in found
    np.testing.assert_array_equal(
        found["bbox_head.conv_cls.bias"], fake_detector()["bbox_head.conv_cls.bias"]
    )


def caffe2_names(tensors: Tensors) -> Tensors:
    """The tensors as Caffe2 names them; its norms have no statistics."""
    renamed = {}
    for name, value in tensors.items():
        if "running" in name:
            continue
        leaf = {"weight": "_s", "bias": "_b"}[name.rsplit(".", 1)[1]]
        if value.ndim == 4:
            leaf = "_w"
        if name.startswith("layer"):
            stage, block, module = re.fullmatch(r"layer(\d)\.(\d)\.(.*)\.\w+", name).groups()
            branch = {"1": "a", "2": "b", "3": "c"}
            part = (
                "branch1" + ("_bn" if module[-1] == "1" else "")
                if module.startswith("downsample")
                else f"branch2{branch[module[-1]]}" + ("_bn" if "bn" in module else "")
            )
            renamed[f"res{int(stage) + 1}_{block}_{part}{leaf}"] = value
        else:
            renamed[("conv1" if name.startswith("conv1") else "res_conv1_bn") + leaf] = value
    return renamed | {"fc1000_w": np.ones((5, 3), np.float32)}


def detectron2_names(tensors: Tensors) -> Tensors:
    def rename(name: str) -> str:
        name = re.sub(r"^layer(\d)", lambda found: f"res{int(found[1]) + 1}", name)
        name = re.sub(r"bn(\d)", r"conv\1.norm", name)
        name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        return name if name.startswith("res") else f"stem.{name}"

    return {rename(name): value for name, value in tensors.items()}


def written(folder: Path, kind: str, tensors: Tensors) -> Path:
    """A backbone's file as one of its publishers makes it."""
    if kind == "torchvision":
        return saved(folder, tensors | {"fc.weight": np.ones((5, 3), np.float32)})
    if kind == "caffe":
        return saved(folder, tensors | {"conv1.bias": np.full(4, 0.25, np.float32)})
    renamed = {"detectron2": detectron2_names, "caffe2": caffe2_names}[kind](tensors)
    path = folder / "source.pkl"
    path.write_bytes(pickle.dumps({"model": renamed, "__author__": "Caffe2"}, protocol=2))
    return path


def written_without_origin(folder: Path, kind: str) -> Path:
    """A backbone's file of which nothing tells what pixels it expects."""
    tensors = fake_backbone()
    if kind == "detectron2":
        return written(folder, kind, tensors)
    if kind == "DINO":
        return saved(folder, tensors)
    if kind == "SwAV":
        tensors |= {
            name: np.ones(3, np.float32) for name in ("projection_head.0.bias", "prototypes.weight")
        }
        return saved(folder, {f"module.{name}": value for name, value in tensors.items()})
    tensors |= {name: np.ones(3, np.float32) for name in ("fc.0.weight", "fc.weight")}
    both = {
        f"module.encoder_{side}.{name}": value for side in "qk" for name, value in tensors.items()
    }
    return saved(folder, both | {"module.queue": np.ones((3, 3), np.float32)})


@pytest.mark.parametrize("kind", ["detectron2", "DINO", "SwAV", "MoCo"])
def test_an_unknown_convention_is_asked_for(kind, tmp_path):
    source = written_without_origin(tmp_path, kind)
    with pytest.raises(
        UserError, match=r"names do not tell .*--convention=torchvision .*--convention=caffe "
    ):
        convert_released(small_config(), source, tmp_path / "out")
    with pytest.raises(UserError, match="'tensorflow', expected one of torchvision, caffe"):
        convert_released(small_config(), source, tmp_path / "out", "tensorflow")
    assert not (tmp_path / "out").exists()
    convert_released(small_config(), source, tmp_path / "out", "caffe")
    stored = load_arrays(tmp_path / "out", lambda name: name.endswith("backbone/conv1/kernel"))
    (kernel,) = stored.values()
    np.testing.assert_array_equal(to_torch(kernel), fake_backbone()["conv1.weight"])


def test_what_the_user_says_of_a_convention_counts(tmp_path):
    """Some Caffe weights come with a classifier under torchvision's names."""
    source = written(tmp_path, "torchvision", fake_backbone())
    convert_released(small_config(), source, tmp_path / "out", "caffe")
    detector = saved(tmp_path, fake_detector())
    with pytest.raises(UserError, match="--convention: found 'torchvision', expected 'caffe' or"):
        convert_released(small_config(), detector, tmp_path / "out2", "torchvision")
    convert_released(small_config(), detector, tmp_path / "out2", "caffe")


def test_backbones_that_are_ambiguous_or_odd_are_errors(tmp_path):
    tensors = fake_backbone()
    twice = saved(
        tmp_path, tensors | {"stem.conv1.weight": tensors["conv1.weight"]}, "a.safetensors"
    )
    with pytest.raises(UserError, match=r"a.safetensors: found two tensors for conv1.weight"):
        convert_released(small_config(), twice, tmp_path / "out", "caffe")
    for bias in (np.ones(5, np.float32), np.ones(4, np.int64)):
        source = saved(tmp_path, tensors | {"conv1.bias": bias})
        with pytest.raises(UserError, match=r"unexpected: backbone.conv1.bias"):
            convert_released(small_config(), source, tmp_path / "out")
    huge = {"conv1.bias": np.full(4, 3e38, np.float32), "bn1.running_mean": np.full(4, -3e38, "f4")}
    with pytest.raises(UserError, match=r"not finite: backbone.bn1.running_mean"):
        convert_released(small_config(), saved(tmp_path, tensors | huge), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["torchvision", "caffe", "detectron2", "caffe2"])
def test_training_starts_from_imagenet_backbones(kind, tmp_path):
    tensors = fake_backbone()
    source = written(tmp_path, kind, tensors)
    said = "caffe" if kind == "detectron2" else None
    convert_released(small_config(""), source, tmp_path / "out", said)
    expected = TORCHVISION if kind == "torchvision" else CAFFE
    model = load_config(tmp_path / "out").model
    assert {name: model[name] for name in expected} == expected
    # AlignPS+ starts from the same checkpoint.
    for variant in ("", "plus"):
        config = small_config(variant)
        config.model.pretrained = str(tmp_path / "out")
        found = starting_arrays(config, build_model(config))
        kernel = found["params/backbone/layer3_2/conv2/kernel"]
        np.testing.assert_array_equal(to_torch(kernel), tensors["layer3.2.conv2.weight"])
        np.testing.assert_array_equal(found["frozen/backbone/bn1/scale"], tensors["bn1.weight"])
        mean = {"caffe": tensors["bn1.running_mean"] - 0.25, "caffe2": 0.0}
        np.testing.assert_array_equal(
            found["frozen/backbone/bn1/mean"], mean.get(kind, tensors["bn1.running_mean"])
        )
    with pytest.raises(UserError, match="does not fit"):
        load_weights(tmp_path / "out", weights_template(build_model(small_config(""))))
    with pytest.raises(UserError, match="holds a backbone only"):
        export_released(tmp_path / "out", tmp_path / "back.safetensors")


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="PyTorch is installed")
def test_without_pytorch_the_error_says_so(tmp_path):
    source = tmp_path / "source.pth"
    source.write_bytes(b"PK\x03\x04 and so on, a zip file")
    with pytest.raises(UserError, match="need PyTorch, which is not installed"):
        read_tensors(source)
    convert_released(small_config(), saved(tmp_path, fake_detector()), tmp_path / "out")
    with pytest.raises(UserError, match="need PyTorch, which is not installed"):
        export_released(tmp_path / "out", tmp_path / "back.pth")
    assert not (tmp_path / "back.pth").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_pth_files(zipped, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = fake_detector()
    state = {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}
    meta = {"epoch": 24, "config": "model = dict()", "CLASSES": ("person",), "hooks": [None, 1.5]}
    source, marker = tmp_path / "source.pth", tmp_path / "marker"
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    content = {"meta": meta, "state_dict": state, "optimizer": optimizer}

    def save(content) -> None:
        torch.save(content, source, _use_new_zipfile_serialization=zipped)

    save(content)
    convert_released(small_config(), source, tmp_path / "out")
    export_released(tmp_path / "out", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert set(back) == {"meta", "state_dict"}
    assert_equal({name: value.numpy() for name, value in back["state_dict"].items()}, tensors)

    whole = source.read_bytes()
    source.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged or cut off"):
        convert_released(small_config(), source, tmp_path / "out2")
    for bad, message in (
        ({**content, "meta": Malicious(marker)}, "something else than tensors .*mkdir"),
        ({"state_dict": {"a": torch.ones(1).expand(10**9, 10**3)}}, "tensors of 4000000000000 b"),
        ({"state_dict": {"a": torch.ones(2).to_sparse()}}, "'a': found torch.float32"),
        ({"state_dict": {"a": torch.tensor([1.0, math.inf])}}, "not finite: a"),
        ({"state_dict": {"a": "text"}}, "'a': found str"),
        ({"state_dict": {"a": torch.ones(2, dtype=torch.bfloat16)}}, "found torch.bfloat16"),
        ([1, 2], "found list, expected a dictionary"),
    ):
        save(bad)
        with pytest.raises(UserError, match=message) as error:
            convert_released(small_config(), source, tmp_path / "out2")
        assert "\n" not in str(error.value)
    assert not marker.exists()
    assert not (tmp_path / "out2").exists()


def test_the_commands(tmp_path):
    source = saved(tmp_path, fake_detector())

    def launch(*flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "launch.py", *flags],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

    flags = (
        "--config=configs/cuhk.py",
        "--config.model.backbone_width=4",
        "--config.model.channels=8",
        "--config.model.norm_groups=4",
        f"--config.loss.queue_size={SLOTS}",
        f"--source={source}",
        f"--workdir={tmp_path / 'out'}",
    )
    done = launch("--mode=convert", *flags)
    assert done.returncode == 0, done.stderr
    assert "390 tensors of" in done.stdout
    target = tmp_path / "back.safetensors"
    done = launch("--mode=export", f"--checkpoint={tmp_path / 'out'}", f"--target={target}")
    assert done.returncode == 0, done.stderr
    assert_equal(read_tensors(target), fake_detector())
    done = launch("--mode=export", f"--checkpoint={tmp_path / 'out'}")
    assert done.returncode == 2
    assert "required: --target" in done.stderr
