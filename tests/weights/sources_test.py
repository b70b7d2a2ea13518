"""Weights from an address, against a local server: complete, checked, and downloaded once."""

from __future__ import annotations

import hashlib
import http.server
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from alignps_jax.types import UserError
from alignps_jax.weights import sources
from alignps_jax.weights.sources import PUBLISHED, convention_of, expected_digits
from alignps_jax.weights.tensor_files import read_tensors, write_tensors
from configs import cuhk


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` by path, and counts the requests."""

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.requests = files, 0
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    """Cuts off what is asked for under /cut/."""

    server: Server

    def do_GET(self):
        self.server.requests += 1
        content = self.server.files.get(self.path.removeprefix("/cut"))
        if content is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        cut = self.path.startswith("/cut/")
        self.wfile.write(content[: len(content) // 2] if cut else content)

    def log_message(self, *args):
        pass


@pytest.fixture
def content(tmp_path) -> bytes:
    write_tensors(tmp_path / "a.safetensors", {"x": np.arange(6, dtype=np.float32)}, {})
    return (tmp_path / "a.safetensors").read_bytes()


@pytest.fixture
def server(content) -> Iterator[Server]:
    digits = hashlib.sha256(content).hexdigest()
    names = (f"a-{digits[:8]}.safetensors", "a-00000000.safetensors", "model.safetensors")
    page = b"<!DOCTYPE html><html>Sign in</html>"
    server = Server({f"/{name}": content for name in names} | {"/page.safetensors": page})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sources.cache_folder.cache_clear()
    yield tmp_path / "cache"
    sources.cache_folder.cache_clear()


def kept(cache) -> list[str]:
    return sorted(path.name for path in cache.rglob("*") if path.is_file())


def test_a_file_is_downloaded_once_and_then_read_without_a_network(server, content, cache):
    digits, files = hashlib.sha256(content).hexdigest(), {}
    for tail in (f"/a-{digits[:8]}.safetensors", f"/model.safetensors#sha256={digits}"):
        address = server.address + tail
        files[address] = sources.fetch(address)
        np.testing.assert_array_equal(read_tensors(files[address])["x"], np.arange(6))
    server.shutdown()
    server.server_close()
    assert files == {address: sources.fetch(address) for address in files}
    assert len(kept(cache)) == 2


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        ("/cut/model.safetensors", r"cannot be downloaded \(cut off after \d+ of \d+ bytes\)"),
        ("/a-00000000.safetensors", r"found SHA-256 .* expected 00000000\.\.\."),
        ("/model.safetensors#sha256=1234567890", r"expected 1234567890\.\.\."),
        ("/gone.safetensors", r"cannot be downloaded \(HTTP Error 404: Not Found\)"),
        ("/page.safetensors#sha256=12345678", "found a web page"),
        ("http://127.0.0.1:9/a.safetensors", r"cannot be downloaded .*give the path of the file"),
        ("http://[/a.safetensors", r"cannot be downloaded .*give the path of the file"),
    ],
)
def test_anything_else_is_one_line_and_leaves_nothing(server, tail, message, cache):
    address = server.address + tail if tail.startswith("/") else tail
    with pytest.raises(UserError, match=message) as error:
        sources.fetch(address)
    assert str(error.value).startswith(f"config.model.pretrained: {address}: ")
    assert "\n" not in str(error.value)
    assert kept(cache) == []


def test_a_cache_that_cannot_be_written_is_a_note(server, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    address = f"{server.address}/model.safetensors"
    assert sources.fetch(address) == sources.fetch(address)
    assert server.requests == 1
    assert capsys.readouterr().out.count("note: ") == 1


def test_pytorch_is_needed_once(monkeypatch, server, cache):
    monkeypatch.setitem(sys.modules, "torch", None)
    address, config = f"{server.address}/a.pth", cuhk.get_config()
    for source in ("msra", address, "/somewhere/a.pth"):
        config.model.pretrained = source
        with pytest.raises(UserError, match=r"pth files need PyTorch, .*pretrained=torchvision"):
            sources.check_start(config)  # before the slow imports
    assert (server.requests, kept(cache)) == (0, [])
    digits = hashlib.sha256(address.encode()).hexdigest()[:8]
    file = sources.cache_folder() / f"{digits}-a.safetensors"
    write_tensors(file, {"x": np.zeros(2, np.float32)}, {})
    assert sources.fetch(address) == file
    config.model.pretrained = address
    sources.check_start(config)


def test_published_files_have_digits_which_tell_their_pixels():
    config = cuhk.get_config()
    for address, expected in PUBLISHED.values():
        assert len(expected_digits(address)) >= 8
        assert convention_of({"fc.weight", "conv1.weight"}, address, config, ()) == expected
