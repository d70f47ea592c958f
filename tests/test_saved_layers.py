"""Layers saved as data, from folders and from a hub that a server of this process plays."""

import json
import threading
from collections.abc import Iterator
from functools import partial
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants as hub_constants
import pytest
import safetensors.torch
import torch
from torch import nn

from latentgnn import LatentGNN, PackedLatentGNN
from latentgnn.errors import UserError

COMMIT = "0123456789" * 4


def make(layer_class: type[LatentGNN] = LatentGNN, **options: Any) -> LatentGNN:
    torch.manual_seed(0)
    layer = layer_class(16, **{"num_latents": 4, "gamma_init": 0.3, **options})
    for buffer in layer.buffers():
        buffer.add_(1)
    return layer


@pytest.mark.parametrize(
    ("layer_class", "options"),
    [
        (LatentGNN, {"graph_conv": True, "num_latents": (3, 5)}),
        (PackedLatentGNN, {"norm": "frozen_batch_norm", "dtype": torch.float64, "node_scale": "mean"}),
        (LatentGNN, {"norm": "group_norm", "residual": False, "symmetric": True}),
        (LatentGNN, {"norm": "none", "dtype": torch.bfloat16}),
    ],
)
def test_a_layer_comes_back_as_it_was(layer_class: type[LatentGNN], options: dict[str, Any], tmp_path: Path) -> None:
    layer = make(layer_class, **options)
    layer.save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["config.json", "model.safetensors"]
    for source in (tmp_path / "saved", tmp_path / "saved" / "model.safetensors"):
        again = layer_class.from_pretrained(source)
        assert again.config == layer.config
        assert not again.training
        assert type(again) is layer_class
        learns = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
        assert [name for name, parameter in again.named_parameters() if parameter.requires_grad] == learns
        for (name, kept), (again_name, value) in zip(
            layer.state_dict().items(), again.state_dict().items(), strict=True
        ):
            assert (name, kept.dtype) == (again_name, value.dtype)
            assert torch.equal(kept, value)


def test_other_libraries_read_the_files(tmp_path: Path) -> None:
    layer = make()
    layer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["config"]["channels"] == 16
    there = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert there.keys() == layer.state_dict().keys()


def test_a_config_that_was_edited_counts(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"node_scale": "published"', '"node_scale": "mean"'))
    assert LatentGNN.from_pretrained(tmp_path).config.node_scale == "mean"


def test_files_are_replaced_only_if_asked(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    make().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has model\.safetensors and config\.json already"):
        make(gamma_init=0.5).save_pretrained(tmp_path)
    assert LatentGNN.from_pretrained(tmp_path).config.gamma_init == 0.3
    make(gamma_init=0.5).save_pretrained(tmp_path, overwrite=True)
    assert LatentGNN.from_pretrained(tmp_path).config.gamma_init == 0.5
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_norm_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="norm can be saved if"):
        make(norm=partial(nn.GroupNorm, 1)).save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_saved_layer_is_told(tmp_path: Path) -> None:
    folder, weights = tmp_path / "saved", tmp_path / "saved" / "model.safetensors"
    with pytest.raises(UserError, match=r"no folder or file .*saved; a model of the Hugging Face hub"):
        LatentGNN.from_pretrained(folder)
    make().save_pretrained(folder)
    with pytest.raises(UserError, match=r"no PackedLatentGNN: load it with LatentGNN\.from_pretrained"):
        PackedLatentGNN.from_pretrained(folder)
    with pytest.raises(UserError, match=r"revision 'main' only applies with from_hub=True"):
        LatentGNN.from_pretrained(folder, revision="main")
    config = (folder / "config.json").read_text()
    for text, message in (
        (config.replace('"channels": 16', '"channels": 32'), "do not make a LatentGNN: .*size mismatch"),
        (config.replace('"channels": 16', '"chanels": 16'), "do not make a LatentGNN: .*chanels"),
        ("[]", "expected an object with 'kind' and 'config'"),
        ("{", "malformed JSON"),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            LatentGNN.from_pretrained(folder)
    weights.write_bytes(weights.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read as a safetensors file"):
        LatentGNN.from_pretrained(weights)
    safetensors.torch.save_file({"a": torch.zeros(1)}, weights)
    with pytest.raises(UserError, match="no configuration of latentgnn inside"):
        LatentGNN.from_pretrained(weights)
    weights.unlink()
    with pytest.raises(UserError, match=r"it has no model\.safetensors"):
        LatentGNN.from_pretrained(folder)


class Hub(BaseHTTPRequestHandler):
    """A hub with one model, ``someone/layer``, of one commit."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(with_content=False)

    def do_GET(self) -> None:
        self._answer(with_content=True)

    def _answer(self, *, with_content: bool) -> None:
        self.asked.append(f"{self.command} {self.path}")
        model, _, rest = self.path.removeprefix("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        code = {"someone/layer": "RevisionNotFound", "someone/empty": "EntryNotFound"}.get(model, "RepoNotFound")
        if model != "someone/layer" or revision not in ("main", COMMIT):
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = (self.folder / name).read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_content:
            self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    handler = type("OneHub", (Hub,), {"folder": tmp_path / "on_hub", "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_constants, "ENDPOINT", address)
    monkeypatch.setattr(
        hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub_constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub_constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    huggingface_hub.close_session()
    yield handler
    server.shutdown()
    server.server_close()
    huggingface_hub.close_session()


def test_the_hub_is_asked_only_when_told_to(hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make()
    layer.save_pretrained(hub.folder)
    with pytest.raises(UserError, match="no folder or file someone/layer"):
        LatentGNN.from_pretrained("someone/layer")
    LatentGNN.from_pretrained(hub.folder)
    assert hub.asked == []
    for _ in range(2):
        again = LatentGNN.from_pretrained("someone/layer", from_hub=True)
        assert torch.equal(again.expand.weight, layer.expand.weight)
    fetched = [line.rpartition("/")[2] for line in hub.asked if line.startswith("GET /someone")]
    assert sorted(fetched) == ["config.json", "model.safetensors"]
    # Offline, what was downloaded is there, and nobody is asked.
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    LatentGNN.from_pretrained("someone/layer", from_hub=True)
    with pytest.raises(UserError, match=r"cannot be reached \(HF_HUB_OFFLINE is set\), and no earlier download"):
        LatentGNN.from_pretrained("someone/other", from_hub=True)
    assert hub.asked == []


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("someone/layer", "v9", r"someone/layer \(revision v9\): the Hugging Face hub has no such revision"),
        ("someone/none", None, "has no such model, or you may not read it"),
        ("someone/empty", None, r"has no config\.json and model\.safetensors"),
        ("a/b/c", None, r"'a/b/c' is no model's name on the Hugging Face hub: expected owner/name"),
    ],
)
def test_what_the_hub_has_not_is_told(hub: type[Hub], name: str, revision: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LatentGNN.from_pretrained(name, from_hub=True, revision=revision)
    # Once, without the tries again of a download.
    assert len(hub.asked) == (name != "a/b/c")


def test_without_network_the_error_comes_at_once(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"it waits {seconds} seconds and tries again"))
    with pytest.raises(UserError, match=r"cannot be reached \(ConnectError: .*\), and no earlier download is there"):
        LatentGNN.from_pretrained("someone/layer", from_hub=True)
