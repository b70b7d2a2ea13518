"""Files of named tensors: PyTorch's .pth, which needs the extra `torch`, and .safetensors.

Reading never executes code from a file.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import safetensors.numpy
from numpy._core import multiarray

from alignps_jax.errors import blame
from alignps_jax.files import write_atomically

Tensors = dict[str, np.ndarray]

_STARTS = {
    b"PK": "pth",
    b"\x80\x02\x8a\nl\xfc\x9c": "pth",  # before PyTorch 1.6
    b"{": "index",
    b"<": "a web page",
    b"version https:": "a Git LFS pointer",
    b"\x80": "a pickle, as of detectron2 and Caffe2 (their ResNet-50 is 'msra')",
}
# The entries of training checkpoints that hold the weights, and those of their running average.
_ENTRIES = ("state_dict", "model_state_dict", "model", "net", "network", "student")
_AVERAGES = ("ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "ema", "teacher")
_WRAPPERS = re.compile(r"^((module|model|net|network|student|detector|_orig_mod)\.)+")
_AVERAGED = re.compile(r"^((module|model)\.)*(model_ema|ema_model|ema|teacher)\.")


def read_tensors(path: Path, averaged: bool = False) -> Tensors:
    """The tensors of a file by name, floating-point numbers as float32.

    The format is told from the content; a `.safetensors.index.json` stands for all its shards. Of a
    training checkpoint only the weights count, or with `averaged` their running average (EMA);
    prefixes of a wrapper (`module.`, `model.`, ...) are left out.

    Raises ValueError if the file is damaged, holds no tensors or NaN, or PyTorch for it is missing.
    """
    tensors = _chosen(_content(path), averaged)
    if bad := [name for name, array in tensors.items() if not np.isfinite(array).all()]:
        raise ValueError(f"not finite: {listed(bad)}")
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], meta: Mapping[str, str]) -> None:
    """Writes .pth (a dictionary of `meta` and `state_dict`, as mmcv's) or .safetensors, complete.

    Raises UserError if .pth needs a PyTorch that is not installed.
    """
    if path.suffix == ".pth":
        with blame(path):
            torch, file = load_torch(), io.BytesIO()
        state = {name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}
        torch.save({"meta": dict(meta), "state_dict": state}, file)
        data = file.getvalue()
    else:
        arrays = {name: np.array(array, order="C") for name, array in tensors.items()}
        data = safetensors.numpy.save(arrays, {"format": "pt", **meta})
    write_atomically(path, data)


def listed(names: Iterable[str], count: int = 3) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _content(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(16)
    starts = [kind for start, kind in _STARTS.items() if head.lstrip().startswith(start)]
    kind = "safetensors" if head[8:9] == b"{" else (starts or ["an unknown format"])[0]
    if kind not in ("pth", "safetensors", "index"):
        raise ValueError(f"found {kind}, expected .pth or .safetensors weights")
    try:
        if kind == "safetensors":
            return safetensors.numpy.load_file(path)
        return _read_pth(path) if kind == "pth" else _read_shards(path)
    except (OSError, MemoryError, ValueError):
        raise
    except Exception as error:  # PyTorch documents none of what it raises for a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        if culprit := reason.partition("GLOBAL ")[2].partition(" ")[0]:
            reason = f"found an object that is not a tensor ({culprit}); none of its code was run"
        raise ValueError(reason[:250]) from error


def _read_pth(path: Path) -> Any:
    torch = load_torch()
    safe: list[Any] = [np.ndarray, np.dtype, argparse.Namespace]
    safe += [type(np.dtype(code)) for code in f"{np.typecodes['AllInteger']}efd?"]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # of NumPy 1 and 2
        for name in ("_reconstruct", "scalar"):
            safe.append((getattr(multiarray, name), f"{module}.{name}"))
    mapped = zipfile.is_zipfile(path)  # the optimizer takes no memory
    with torch.serialization.safe_globals(safe), warnings.catch_warnings(action="ignore"):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def load_torch() -> ModuleType:
    """PyTorch; ValueError if it is not installed, or old."""
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            ".pth files need PyTorch, which is not installed: pip install '.[torch]', or use "
            ".safetensors files, such as those of --config.model.pretrained=torchvision"
        ) from error
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 10):
        raise ValueError(  # there are published ways around `weights_only` in older ones
            f"found PyTorch {torch.__version__}, expected 2.10 or newer: pip install '.[torch]'"
        )
    return torch


def _read_shards(path: Path) -> dict[str, Any]:
    index = json.loads(path.read_bytes())
    tensors: dict[str, Any] = {}
    for name in sorted(set(index["weight_map"].values())):
        tensors |= _content(path.parent / Path(name).name)
    return tensors


def _chosen(content: Any, averaged: bool) -> Tensors:
    """The weights of a training checkpoint, or their running average, without their wrappers."""
    entries, at_average = (*_AVERAGES, *_ENTRIES) if averaged else _ENTRIES, False
    while isinstance(content, Mapping) and (
        inner := [name for name in entries if isinstance(content.get(name), Mapping)]
    ):
        content, at_average = content[inner[0]], at_average or inner[0] in _AVERAGES
    arrays = dict(content) if isinstance(content, Mapping) else {}
    found = {str(name): _array(value) for name, value in arrays.items()}
    tensors = {name: array for name, array in found.items() if array is not None}
    if not tensors:
        names = listed(map(str, arrays)) or type(content).__name__
        raise ValueError(f"found {names}, expected named tensors or a state_dict of them")
    dotted = {f"ema_{name.replace('.', '_')}": name for name in tensors}  # mmcv's averages
    plain, average = {}, {}
    for name, value in tensors.items():
        if name in dotted or _AVERAGED.match(name):
            average[_WRAPPERS.sub("", dotted.get(name) or _AVERAGED.sub("", name))] = value
        else:
            plain[_WRAPPERS.sub("", name)] = value
    if averaged and not (average or at_average):
        raise ValueError("found no running average (EMA) of the weights; leave out --ema")
    if not plain and not averaged:
        raise ValueError(f"found a running average of weights only ({listed(tensors)}); add --ema")
    return plain | average if averaged else plain


def _array(value: Any) -> np.ndarray | None:
    """An array, with floating-point numbers as float32; None of what is no tensor."""
    if hasattr(value, "detach"):  # bfloat16 is not NumPy's
        value = value.detach()
        value = (value.float() if value.is_floating_point() else value).numpy()
    if not isinstance(value, np.ndarray):
        return None
    return value if value.dtype.kind in "iu" else value.astype(np.float32, copy=False)
