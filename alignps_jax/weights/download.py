"""Weights from an address: downloaded once, checked, and kept as `.safetensors`."""

from __future__ import annotations

import hashlib
import http.client
import shutil
import tempfile
import urllib.request
from pathlib import Path

from tqdm import tqdm

from alignps_jax.errors import blame
from alignps_jax.weights.sources import FIELD, cached_file, expected_digits, file_name
from alignps_jax.weights.tensor_files import file_format, parse_tensors, write_tensors

_TIMEOUT = 30.0  # seconds without an answer


def fetch(address: str) -> Path:
    """The file of the weights at an address, which is downloaded unless it is in the cache.

    The digits of its SHA-256 are checked: those in its name (`-5891d200.pth`, as in the model zoos
    of PyTorch and OpenMMLab), or `#sha256=...` behind the address.

    Raises:
      UserError: there is no network, no such file, or another file than the digits say.
    """
    target = cached_file(address)
    if not target.is_file():
        with tempfile.TemporaryDirectory() as folder, blame(f"{FIELD}: {address}"):
            file = Path(folder) / file_name(address)
            try:
                _download(address.partition("#")[0], file)
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise ValueError(
                    f"cannot be downloaded ({error}); without a network, give the path of the file"
                ) from error
            file_format(file)
            with file.open("rb") as readable:
                digest = hashlib.file_digest(readable, "sha256").hexdigest()
            if not digest.startswith(expected := expected_digits(address)):
                raise ValueError(f"found SHA-256 {digest[:16]}..., expected {expected}...")
            write_tensors(target, parse_tensors(file), {"source": address})
            print(f"{FIELD}: {address} is now {target} (SHA-256 {digest})", flush=True)
    return target


def _download(address: str, file: Path) -> None:
    request = urllib.request.Request(address, headers={"User-Agent": "alignps-jax"})
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer, file.open("wb") as writable:
        total = int(answer.headers.get("Content-Length") or 0)
        with tqdm.wrapattr(answer, "read", total=total, desc=file.name, mininterval=1) as readable:
            shutil.copyfileobj(readable, writable)
        if writable.tell() < total:
            raise ValueError(f"cut off after {writable.tell():,} of {total:,} bytes")
