"""--mode=convert and --mode=export on small fake files (.pth only where PyTorch is installed)."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from functools import cache, partial
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from alignps_jax.checkpoint.store import Checkpoints, load_arrays, load_config
from alignps_jax.cli import main
from alignps_jax.nn.model import build_model, weights_template
from alignps_jax.training.pretrained import starting_config
from alignps_jax.training.setup import check_changes, create_state, make_step
from alignps_jax.types import UserError
from alignps_jax.weights.convert import convert_released, export_released
from alignps_jax.weights.released_names import LOOKUP_TABLE, QUEUE, TAIL, to_torch, unread_memories
from alignps_jax.weights.sources import CAFFE, TORCHVISION
from alignps_jax.weights.tensor_files import Tensors, read_tensors, write_tensors
from configs import cuhk, prw
from tests.oracle.random_weights import random_state_dict
from tests.parity.ours import released_shapes
from tests.places import SHARED

NAMES, ROI_NAMES = SHARED / "released_state_dict.json", SHARED / "roi_state_dict.json"
LUT, SLOTS = 12, 9
SMALL = {
    "model.backbone_width": 4,
    "model.channels": 8,
    "model.norm_groups": 4,
    "loss.queue_size": SLOTS,
}
ONLY_TRAINING = re.compile(r"neck\.fpn_convs\.[1-4]|bbox_head\.scales\.[1-4]")


def small_config(variant: str = "released") -> ConfigDict:
    config = cuhk.get_config(variant)
    config.update_from_flattened_dict(SMALL)
    return config


def model_shapes(config: ConfigDict) -> dict[str, tuple[int, ...]]:
    """Released names and shapes of a model's parameters and statistics."""
    weights = weights_template(build_model(config))
    return released_shapes({"params": weights.params, "frozen": weights.frozen})


def file_shapes(config: ConfigDict, rows: int) -> dict[str, tuple[int, ...]]:
    """Those of a file of the released code, which has memory and counters, too."""
    slots, channels = config.loss.queue_size, config.model.channels
    shapes = model_shapes(config) | {LOOKUP_TABLE: (rows, channels), QUEUE: (slots, channels)}
    shapes[TAIL] = ()
    for name in [name for name in shapes if name.endswith("running_var")]:
        shapes[name.replace("running_var", "num_batches_tracked")] = ()
    if config.model.roi:
        of_branch = "roi_head.bbox_head.loss_oim"
        shapes |= {f"{of_branch}.lut": (rows, channels), f"{of_branch}.cq": (slots, channels)}
        shapes |= {name: x.shape for name, x in unread_memories(channels).items()}
    return shapes


def drawn(shapes: dict[str, tuple[int, ...]], seed: int) -> Tensors:
    """Random tensors, but those that nothing reads are zero."""
    tensors = random_state_dict(shapes, seed)
    return tensors | {
        name: x for name, x in unread_memories(shapes[QUEUE][1]).items() if name in tensors
    }


@cache
def detector_shapes(variant: str) -> dict[str, tuple[int, ...]]:
    """Those of a released file, which always has the levels that only training has."""
    config = small_config(variant)
    config.model.background_levels = True
    return file_shapes(config, LUT)


def fake_detector(variant: str = "released") -> Tensors:
    """A released file's tensors."""
    return drawn(detector_shapes(variant), seed=1)


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
@pytest.mark.parametrize("variant", ["released", "released_plus", "roi"])
def test_names_and_shapes_are_the_released_ones(module, variant):
    plain, plus, *_ = json.loads(NAMES.read_text()).values()
    expected = plain | (plus if variant == "released_plus" else {})
    if variant == "roi":
        _, expected, of_prw, *_ = json.loads(ROI_NAMES.read_text()).values()
        expected |= of_prw if module is prw else {}
    found = {k: list(shape) for k, shape in model_shapes(module.get_config(variant)).items()}
    left = set(expected) - set(found)
    assert found == {name: expected[name] for name in found}
    assert all(re.search("matching_layer|loss_oim|num_batches_tracked$", name) for name in left)


@pytest.mark.parametrize("variant", ["", "released", "released_plus", "plus", "roi"])
def test_the_commands_there_and_back_are_bit_exact(variant, tmp_path):
    source, out, target = fake_detector(variant), tmp_path / "out", tmp_path / "back.safetensors"
    convert = f"--mode=convert --config=configs/cuhk.py:{variant} --workdir={out}".split()
    fields = (f"--config.{name}={value}" for name, value in SMALL.items())
    assert main(["launch.py", *convert, f"--source={saved(tmp_path, source)}", *fields]) == 0
    assert load_config(out).to_dict() == small_config(variant).to_dict()
    (kernel,) = load_arrays(out, lambda name: name == "params/neck/lateral4/kernel").values()
    assert kernel[2, 0, 3, 5] == source["neck.lateral_convs.1.weight"][5, 3, 2, 0]
    if variant in ("", "plus"):  # without the levels that only training has
        source = {name: x for name, x in source.items() if not ONLY_TRAINING.match(name)}
    for path in (out, out / "checkpoints" / "0"):
        words = ["--mode=export", f"--checkpoint={path}", f"--target={target}"]
        assert main(["launch.py", *words]) == 0
        found = read_tensors(target)
        assert set(found) == set(source)
        assert_equal(uncounted(found), uncounted(source))


@pytest.mark.parametrize("variant", ["released", "released_plus", "roi"])
@pytest.mark.parametrize(("module", "rows"), [(cuhk, 5532), (prw, 483)])
def test_at_the_real_width_it_is_exported_and_resumed(module, rows, variant, tmp_path):
    config, workdir = module.get_config(variant), tmp_path / "out"
    tensors = drawn(file_shapes(config, rows), seed=3)
    assert len(tensors) == {"released": 390, "released_plus": 416, "roi": 495}[variant]
    convert_released(config, saved(tmp_path, tensors), workdir)
    export_released(workdir, tmp_path / "back.safetensors")
    found = read_tensors(tmp_path / "back.safetensors")
    assert len(found) == len(tensors)
    assert_equal(uncounted(found), uncounted(tensors))

    model = build_model(config)
    _, step = make_step(config, model, steps_per_epoch=100, positives=1)
    check_changes(starting_config(config, workdir), workdir, accepted=False)
    with Checkpoints(workdir, keep=1, config=config) as checkpoints:
        create = partial(create_state, config, model, step.optimizer, rows)
        state, position = checkpoints.restore(jax.eval_shape(create))
    assert position is None  # no data seen
    np.testing.assert_array_equal(state.memory.lut, tensors[LOOKUP_TABLE])
    np.testing.assert_array_equal(state.memory.queue, tensors[QUEUE])
    assert state.memory.tail == tensors[TAIL]


MISFITS = {
    "missing": (
        lambda x: {name: value for name, value in x.items() if "neck.lateral_convs.0" not in name},
        r"neck.lateral_convs.0.weight: found nothing, expected .*"
        r"\(taken for a detector because of (neck|bbox_head)\.",
    ),
    "unexpected": (
        lambda x: x | {"neck.extra.weight": np.ones(3)},
        r"neck.extra.weight: found \[3\], expected nothing",
    ),
    "shape": (
        lambda x: x | {"bbox_head.conv_cls.weight": np.ones((1, 7, 3, 3))},
        r"bbox_head.conv_cls.weight: found \[1, 7, 3, 3\], expected \[1, 8, 3, 3\]",
    ),
    "lookup table": (
        lambda x: x | {LOOKUP_TABLE: np.ones((483, 8))},
        rf"lookup_table: found \[483, 8\], expected \[{LUT}, 8\]",
    ),
    "AlignPS+": (
        lambda x: fake_detector("released_plus"),
        "conv_offset.*: .*cuhk or prw, :released, :released_plus or :roi",
    ),
    "not finite": (
        lambda x: x | {"bbox_head.conv_cls.bias": np.full(1, np.nan)},
        "not finite: bbox_head.conv_cls.bias",
    ),
    "two backbones": (
        lambda x: {
            f"{p}.{k}": v for p in ("backbone", "encoder") for k, v in fake_backbone().items()
        },
        "found two backbones, expected one",
    ),
    "a backbone's head": (
        lambda x: {"weight": np.ones(3)},
        "found nothing.* and .* more .*taken for a ResNet-50 because no name has neck. or bbox",
    ),
    "a detector in an unknown wrapper": (
        lambda x: {f"students.{name}": value for name, value in x.items()},
        r"found nothing.* and .* more .*taken for a detector because of students\.\w+",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_named_and_nothing_is_written(case, tmp_path):
    change, message = MISFITS[case]
    source, config = saved(tmp_path, change(fake_detector())), small_config()
    config.loss.lut_size = LUT
    with pytest.raises(UserError, match=message) as error:
        convert_released(config, source, tmp_path / "out")
    assert str(error.value).startswith(f"{source}: ")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_what_contradicts_the_file_or_is_there_already_is_an_error(tmp_path):
    source, config, out = saved(tmp_path, fake_detector()), small_config(), tmp_path / "out"
    convert_released(config, source, out)
    with pytest.raises(UserError, match="--workdir: found checkpoints"):
        convert_released(config, source, out)
    config.model.channel_order = "RGB"
    with pytest.raises(UserError, match=r"config.model.channel_order: found 'RGB', expected 'BGR'"):
        convert_released(config, source, tmp_path / "other", {"model.channel_order"})


@pytest.mark.parametrize(
    ("typed", "expected", "prefix", "others"),
    [
        (None, TORCHVISION, "", "fc.weight"),
        ("BGR", CAFFE, "", "fc.weight"),  # some Caffe weights come under torchvision's names
        (None, TORCHVISION, "module.", "module.fc.weight"),
        (None, CAFFE, "", "conv1.bias"),
        # DINO, SwAV, MoCo
        ("RGB", TORCHVISION, "student.module.backbone.", "student.module.head.mlp.0.bias"),
        ("RGB", TORCHVISION, "module.", "module.projection_head.0.bias module.prototypes.w"),
        (
            *("RGB", TORCHVISION, "module.encoder_q."),
            "module.encoder_q.fc.0.weight module.encoder_k.conv1.weight module.queue",
        ),
    ],
)
def test_imagenet_backbones_become_checkpoints(typed, expected, prefix, others, tmp_path):
    tensors, config, out = fake_backbone(), small_config("plus"), tmp_path / "out"
    content = {f"{prefix}{name}": value for name, value in tensors.items()}
    source = saved(tmp_path, content | dict.fromkeys(others.split(), np.full(4, 0.25, np.float32)))
    if typed:
        config.model.channel_order = typed
    convert_released(config, source, out, {"model.channel_order"} if typed else ())
    model = load_config(out).model
    assert {name: model[name] for name in expected} == expected
    arrays = load_arrays(out, lambda name: "/backbone/" in name)
    kernel = arrays["params/backbone/layer3_2/conv2/kernel"]
    np.testing.assert_array_equal(to_torch(kernel), tensors["layer3.2.conv2.weight"])
    mean = tensors["bn1.running_mean"] - (0.25 if others == "conv1.bias" else 0)
    np.testing.assert_array_equal(arrays["frozen/backbone/bn1/mean"], mean)
    assert not arrays["params/backbone/layer3_2/conv2/offset/kernel"].any()
    with pytest.raises(UserError, match="holds a backbone only"):
        export_released(out, tmp_path / "back.safetensors")


def training_checkpoint(kind: str, tensors: dict) -> dict:
    """As others write them; the running average is one more everywhere."""
    more = {name: value + 1 for name, value in tensors.items()}
    others = {
        "optimizer": {"state": {0: {"momentum_buffer": next(iter(more.values()))}}},
        "meta": {"epoch": np.float64(3.0), "CLASSES": ("person",), "hooks": [None, 1.5]},
        "args": Namespace(lr=0.1, seed=np.int64(3)),
    }
    if kind == "mmcv":
        flat = {f"ema_{name.replace('.', '_')}": value for name, value in more.items()}
        return {"state_dict": tensors | flat, **others}
    if kind == "mean teacher":
        both = (("student", tensors), ("teacher", more))
        return {"state_dict": {f"{who}.{k}": v for who, part in both for k, v in part.items()}}
    if kind == "timm":
        wrapped = {f"module.{name}": value for name, value in more.items()}
        return {"state_dict": tensors, "state_dict_ema": wrapped, **others}
    return {"model": tensors, "model_ema": {"state_dict": more}, "best": np.float32(0.5)}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", ["mmcv", "mean teacher", "timm", "another"])
def test_pth_files_hold_weights_and_their_running_average(kind, zipped, tmp_path):
    torch = pytest.importorskip("torch")
    tensors, source = fake_detector(), tmp_path / "a.pth"
    content = {name: torch.from_numpy(np.array(x)) for name, x in tensors.items()}
    content = training_checkpoint(kind, content)
    torch.save(content, source, _use_new_zipfile_serialization=zipped)
    for averaged in (False, True):
        out, back = tmp_path / str(averaged), tmp_path / "back.pth"
        convert_released(small_config(), source, out, (), averaged)
        export_released(out, back)
        stored = torch.load(back, weights_only=True)
        assert set(stored) == {"meta", "state_dict"}
        found = {name: value.numpy() for name, value in stored["state_dict"].items()}
        assert_equal(uncounted(found), {k: x + averaged for k, x in uncounted(tensors).items()})
