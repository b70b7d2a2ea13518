"""Weights from an address: downloaded once, checked, and kept as `.safetensors`."""

from __future__ import annotations

import hashlib
import http.client
import tempfile
import urllib.request
from pathlib import Path
from typing import IO

from tqdm import tqdm

from alignps_jax.types import UserError
from alignps_jax.weights.sources import FIELD, cached_file, expected_digits, file_name
from alignps_jax.weights.tensor_files import read_tensors, write_tensors

_TIMEOUT = 30.0  # seconds without an answer
_CHUNK = 1 << 18  # bytes


def fetch(address: str) -> Path:
    """The file of the weights at an address, which is downloaded unless it is in the cache.

    The digits of its SHA-256 are checked: those in its name (`-5891d200.pth`, as in the model zoos
    of PyTorch and OpenMMLab), or `#sha256=...` behind the address.

    Raises:
      UserError: there is no network, no such file, or another file than the digits say.
    """
    target = cached_file(address)
    if not target.is_file():
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / file_name(address)
            try:
                with file.open("wb") as writable:
                    digest = _download(address, writable)
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise UserError(
                    f"{FIELD}: {address}: cannot be downloaded ({_reason(error)}); without a "
                    "network, give the path of the file"
                ) from error
            _keep(address, file, digest, target)
    return target


def _keep(address: str, file: Path, digest: str, target: Path) -> None:
    """Checks a downloaded file and makes it `target`."""
    expected = expected_digits(address)
    if not digest.startswith(expected):
        raise UserError(
            f"{FIELD}: {address}: found a file with SHA-256 {digest[:16]}..., expected "
            f"{expected}...{_page(file)}"
        )
    if _page(file):
        raise UserError(f"{FIELD}: {address}: expected a file of weights{_page(file)}")
    try:
        tensors = read_tensors(file)
    except UserError as error:
        raise UserError(f"{FIELD}: {address}: {str(error).removeprefix(f'{file}: ')}") from error
    write_tensors(target, tensors, {"source": address})
    print(f"{FIELD}: {address} is now {target} (SHA-256 {digest})", flush=True)


def _download(address: str, writable: IO[bytes]) -> str:
    """Writes what is at the address; returns its SHA-256. ValueError for a file that is cut off."""
    digest, options = hashlib.sha256(), {"unit": "B", "unit_scale": True, "mininterval": 1.0}
    request = urllib.request.Request(
        address.partition("#")[0], headers={"User-Agent": "alignps-jax"}
    )
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
        total = int(answer.headers.get("Content-Length") or 0)
        with tqdm(total=total or None, desc=file_name(address), **options) as bar:
            while chunk := answer.read(_CHUNK):
                writable.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
            if total and bar.n < total:
                raise ValueError(f"cut off after {bar.n:,} of {total:,} bytes")
    return digest.hexdigest()


def _page(file: Path) -> str:
    """A remark where the file is a web page."""
    with file.open("rb") as readable:
        start = readable.read(512).lstrip().lower()
    return ": found a web page" if start.startswith((b"<!doctype", b"<html", b"<?xml")) else ""


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
    code = getattr(error, "code", None)
    return " ".join(f"{code} {reason}".split()) if code else str(reason) or type(error).__name__
