"""`config.model.pretrained`: the words it knows, the cache, and the check that takes no time."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import tempfile
from functools import cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import platformdirs
from ml_collections import ConfigDict

from alignps_jax.types import UserError

# The word for a network that starts from random numbers.
RANDOM = "random"
FIELD = "config.model.pretrained"


class Published(NamedTuple):
    """A published ImageNet ResNet-50, and a key of `CONVENTIONS`: the pixels it was trained on."""

    address: str
    convention: str


# By word. The digits of a file's SHA-256 stand in its name, or behind its address.
PUBLISHED = {
    # The initial weights of the released code, from OpenMMLab's model zoo.
    "msra": Published(
        "https://download.openmmlab.com/pretrain/third_party/resnet50_msra-5891d200.pth", "caffe"
    ),
    # torchvision's weights (IMAGENET1K_V1) as timm publishes them.
    "torchvision": Published(
        "https://huggingface.co/timm/resnet50.tv_in1k/resolve/main/model.safetensors"
        "#sha256=5d061a3c593d795bfe682d9b152bafbcf550579873492def3515b46db1189888",
        "torchvision",
    ),
}


def address_of(pretrained: str) -> str:
    """The address or path of a value of the field."""
    return PUBLISHED[pretrained].address if pretrained in PUBLISHED else pretrained


def is_address(source: str) -> bool:
    """Whether weights are to be downloaded."""
    return source.lower().startswith(("https://", "http://"))


def file_name(source: str) -> str:
    """The name of the file at an address or a path."""
    return PurePosixPath(re.split("[?#]", source)[0] if is_address(source) else source).name


def expected_digits(source: str) -> str:
    """The digits of the SHA-256 behind an address or in its file's name; "" if it has none."""
    found = re.search(r"#sha256=([0-9a-fA-F]{8,64})$", source)
    found = found or re.search(r"-([0-9a-f]{8,64})\.\w+$", file_name(source))
    return found[1].lower() if found else ""


def known_convention(source: str) -> str | None:
    """The convention of a published file by the digits in its name or address; else None."""
    found = {expected_digits(entry.address): entry.convention for entry in PUBLISHED.values()}
    return found.get(expected_digits(source))


def check_start(config: ConfigDict) -> None:
    """Finds out, before any work, whether training can start from `config.model.pretrained`.

    Raises:
      UserError: the field needs PyTorch, which is not installed, or is random for a network that
        keeps some of its initial values.
    """
    model = config.model
    if model.pretrained == RANDOM:
        if model.backbone != "resnet_small" or model.frozen_stages >= 0:
            raise UserError(
                f"{FIELD}: found 'random', expected weights ({' or '.join(PUBLISHED)}, a file, an "
                f"address or a run): {model.backbone} with frozen_stages={model.frozen_stages} "
                "keeps its initial stages or normalization. From scratch trains "
                "--config.model.backbone=resnet_small --config.model.frozen_stages=-1"
            )
        return
    source = address_of(model.pretrained)
    kept = is_address(source) and cached_file(source).is_file()
    if source.endswith(".pth") and not kept and not has_torch():
        raise UserError(
            f"{FIELD}: {file_name(source)} needs PyTorch to be read: "
            "pip install '.[torch]', or start from weights that need none: "
            "--config.model.pretrained=torchvision"
        )


def has_torch() -> bool:
    """Whether PyTorch is installed, without importing it."""
    return importlib.util.find_spec("torch") is not None


def cached_file(address: str) -> Path:
    """Where the weights of an address are kept, as `.safetensors`."""
    digits = hashlib.sha256(address.encode()).hexdigest()[:8]
    return cache_folder() / f"{digits}-{PurePosixPath(file_name(address)).stem}.safetensors"


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
