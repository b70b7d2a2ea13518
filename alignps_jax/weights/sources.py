"""`config.model.pretrained`: where weights come from, and the pixels that they were trained on."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import shutil
import tempfile
import urllib.request
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import platformdirs
from ml_collections import ConfigDict
from tqdm import tqdm

from alignps_jax.errors import blame
from alignps_jax.types import UserError
from alignps_jax.weights.released_names import is_detector
from alignps_jax.weights.tensor_files import load_torch, read_tensors, write_tensors

# The word for a network that starts from random numbers.
RANDOM = "random"
FIELD = "config.model.pretrained"
_TIMEOUT = 30.0  # seconds without an answer

Convention = Mapping[str, Any]  # of a pixel and the stride, as fields of `config.model`
CAFFE: Convention = {
    "channel_order": "BGR",
    "pixel_mean": (103.530, 116.280, 123.675),
    "pixel_std": (1.0, 1.0, 1.0),
    "stride_in_3x3": False,
}
TORCHVISION: Convention = {
    "channel_order": "RGB",
    "pixel_mean": (123.675, 116.280, 103.530),
    "pixel_std": (58.395, 57.120, 57.375),
    "stride_in_3x3": True,
}
# ImageNet ResNet-50s by word. The digits of a file's SHA-256 stand in its name, or behind its
# address.
PUBLISHED = {
    # The initial weights of the released code, from OpenMMLab's model zoo.
    "msra": (
        "https://download.openmmlab.com/pretrain/third_party/resnet50_msra-5891d200.pth",
        CAFFE,
    ),
    # torchvision's weights (IMAGENET1K_V1) as timm publishes them.
    "torchvision": (
        "https://huggingface.co/timm/resnet50.tv_in1k/resolve/main/model.safetensors"
        "#sha256=5d061a3c593d795bfe682d9b152bafbcf550579873492def3515b46db1189888",
        TORCHVISION,
    ),
}


def address_of(pretrained: str) -> str:
    """The address or path of a value of the field."""
    return PUBLISHED[pretrained][0] if pretrained in PUBLISHED else pretrained


def is_address(source: str) -> bool:
    """Whether weights are to be downloaded."""
    return source.lower().startswith(("https://", "http://"))


def expected_digits(source: str) -> str:
    """The digits of the SHA-256 behind an address or in its file's name; "" if it has none."""
    found = re.search(r"#sha256=([0-9a-fA-F]{8,64})$", source)
    found = found or re.search(r"-([0-9a-f]{8,64})\.\w+$", _file_name(source))
    return found[1].lower() if found else ""


def check_start(config: ConfigDict) -> None:
    """Raises UserError, before the slow imports, for weights that training cannot start from.

    Those are random ones that it would never change, and a `.pth` without PyTorch.
    """
    model, source = config.model, address_of(config.model.pretrained)
    if _file_name(source).endswith(".pth") and not (is_address(source) and _kept(source).is_file()):
        with blame(f"{FIELD}: {source}"):
            load_torch()
    small = model.backbone == "resnet_small" and model.frozen_stages < 0
    if model.pretrained == RANDOM and not small:
        raise UserError(
            f"{FIELD}: found 'random', expected weights ({' or '.join(PUBLISHED)}, a file, an "
            "address or a run): only backbone=resnet_small with frozen_stages=-1 trains from it"
        )


def fetch(address: str) -> Path:
    """The file of the weights at an address, which is downloaded unless it is in the cache.

    It is kept as `.safetensors`. The digits of its SHA-256 are checked: those in its name
    (`-5891d200.pth`, as in the model zoos of PyTorch and OpenMMLab), or `#sha256=...` behind the
    address.

    Raises UserError if there is no network, no such file, another one than the digits say, or no
    PyTorch to read it.
    """
    target = _kept(address)
    if not target.is_file():
        with tempfile.TemporaryDirectory() as folder, blame(f"{FIELD}: {address}"):
            file = Path(folder) / _file_name(address)
            try:
                _download(address.partition("#")[0], file)
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise ValueError(
                    f"cannot be downloaded ({error}); without a network, give the path of the file"
                ) from error
            tensors = read_tensors(file)
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            if not digest.startswith(expected := expected_digits(address)):
                raise ValueError(f"found SHA-256 {digest[:16]}..., expected {expected}...")
            write_tensors(target, tensors, {"source": address})
            print(f"{FIELD}: {address} is now {target} (SHA-256 {digest})", flush=True)
    return target


def _kept(address: str) -> Path:
    """Where the weights of an address are kept."""
    digits = hashlib.sha256(address.encode()).hexdigest()[:8]
    return cache_folder() / f"{digits}-{Path(_file_name(address)).stem}.safetensors"


@cache
def cache_folder() -> Path:
    """The user's cache of weights; a temporary folder where it cannot be written."""
    folder = platformdirs.user_cache_path("alignps_jax") / "weights"
    with contextlib.suppress(OSError):  # no home
        folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK):
        return folder
    temporary = Path(tempfile.mkdtemp(prefix="alignps_jax-"))
    print(f"note: {folder} cannot be written: downloaded weights go to {temporary}")
    return temporary


def convention_of(
    names: Collection[str], source: str, config: ConfigDict, typed: Collection[str]
) -> Convention:
    """The pixels that the tensors of these names expect; ValueError if nothing tells.

    The digits in the name of the file or address `source` tell; then a detector; then the channel
    order, if the user `typed` it. Then torchvision and timm deliver their classifier with a ResNet,
    and only Caffe's has a bias in its first convolution; DINO, MoCo and SwAV have neither.
    """
    for address, expected in PUBLISHED.values():
        if expected_digits(address) == expected_digits(source):
            return expected
    if is_detector(names):
        return CAFFE
    if "model.channel_order" in typed:
        return TORCHVISION if config.model.channel_order == "RGB" else CAFFE
    if "conv1.bias" in names:
        return CAFFE
    if {"fc.weight", "conv1.weight"} <= set(names):
        return TORCHVISION
    raise ValueError(
        "the names do not tell what pixels this ResNet-50 was trained on: add "
        "--config.model.channel_order=RGB (torchvision, timm, DINO, MoCo, SwAV) or BGR "
        "(Caffe: MSRA, most of detectron2)"
    )


def with_convention(
    config: ConfigDict, expected: Convention, typed: Collection[str], source: str
) -> ConfigDict:
    """A copy of `config` whose pixels and stride are those that the weights of `source` expect.

    Raises UserError if a field that the user `typed` (dotted names) contradicts the weights.
    """
    config = config.copy_and_resolve_references()
    wrong = [
        f"config.model.{name}: found {config.model[name]!r}, expected {expected[name]!r}"
        for name in CAFFE
        if f"model.{name}" in typed and config.model[name] != expected[name]
    ]
    if wrong:
        raise UserError(f"{'; '.join(wrong)} for {source}; without these flags, it follows")
    with config.unlocked():
        config.model.update({name: expected[name] for name in CAFFE})
    return config


def _file_name(source: str) -> str:
    return PurePosixPath(re.split("[?#]", source)[0] if is_address(source) else source).name


def _download(address: str, file: Path) -> None:
    request = urllib.request.Request(address, headers={"User-Agent": "alignps-jax"})
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer, file.open("wb") as writable:
        total = int(answer.headers.get("Content-Length") or 0)
        with tqdm.wrapattr(answer, "read", total=total, desc=file.name, mininterval=1) as readable:
            shutil.copyfileobj(readable, writable)
        if writable.tell() < total:
            raise ValueError(f"cut off after {writable.tell():,} of {total:,} bytes")
