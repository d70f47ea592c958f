"""The rules of the page's server: who may ask, how much may be sent, what is told of bad files."""

import http.client
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import latentgnn
from benchmarks.explore_page import served
from latentgnn.inspection import capture
from latentgnn.tasks.detection.exploring import DetectorExplorer
from latentgnn.tasks.explore import server
from latentgnn.tasks.segmentation.exploring import SegmenterExplorer
from tests.tasks.explore.pages import detector_explorer
from tests.tasks.made_runs import SEGMENTER, write_labelled, write_segmenter


@pytest.fixture(scope="module")
def explorer(tmp_path_factory: pytest.TempPathFactory) -> DetectorExplorer:
    return detector_explorer(tmp_path_factory.mktemp("explore"))


@pytest.fixture(scope="module")
def port(explorer: DetectorExplorer) -> Iterator[int]:
    with served(explorer) as found:
        yield found


def ask(
    port: int, path: str, method: str = "GET", body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, bytes, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, body, headers or {})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, content, response.headers


def fault(answer: tuple[int, bytes, Any]) -> tuple[int, str]:
    return answer[0], json.loads(answer[1])["error"]


def unpack(content: bytes) -> tuple[dict[str, Any], Any]:
    (length,) = struct.unpack_from("<I", content)
    assert (4 + length) % 8 == 0
    header = json.loads(content[4 : 4 + length])
    return header, lambda part: np.frombuffer(content, part["type"], part["count"], 4 + length + part["at"])


def test_a_view_holds_the_factors_of_every_block(explorer: DetectorExplorer, port: int) -> None:
    status, content, headers = ask(port, "/api/input/1/view")
    assert status == 200
    assert headers["content-security-policy"].startswith("default-src 'none'")
    header, array = unpack(content)
    image = explorer.input(1)
    with capture(explorer._trained.model) as seen:
        explorer._trained.predict(image)
    assert [block["name"] for block in header["blocks"]] == list(seen)
    assert array(header["picture"])[:2].tobytes() == b"\xff\xd8"
    for block in header["blocks"]:
        # The node in row 2, column 1 of the map, whose affinity is Q^T A P, as the mean over kernels.
        node = 2 * block["shape"][1] + 1 if block["shape"][0] > 2 else 1
        total = 0.0
        for graph in block["graphs"]:
            gather, scatter = (array(graph[part]).reshape(graph["latents"], -1) for part in ("gather", "scatter"))
            affinity = array(graph["affinity"]).reshape(graph["latents"], -1)
            total = total + (scatter.T @ affinity @ gather)[node] / len(block["graphs"])
        np.testing.assert_allclose(total, seen.row(block["name"], node).flatten(), rtol=1e-4, atol=1e-6)


def test_without_a_block_other_things_are_found(explorer: DetectorExplorer, port: int) -> None:
    header, _ = unpack(ask(port, "/api/input/0/view")[1])
    block = header["blocks"][0]["name"]
    without, _ = unpack(ask(port, f"/api/input/0/without?block={block}")[1])
    again, _ = unpack(ask(port, "/api/input/0/view")[1])
    assert without["found"] != header["found"]
    assert again["found"] == header["found"]


def test_the_classes_of_an_image_with_and_without_a_block(tmp_path: Path) -> None:
    # By windows, whose side is an evaluation's, an image would have no single map.
    run = write_segmenter(tmp_path / "run", {**SEGMENTER, "evaluation": {"tiles": 32}})
    trained = latentgnn.load_run(run)
    image = write_labelled(tmp_path / "data", 1) / "images" / "val" / "0.png"
    explorer = SegmenterExplorer(trained, "run", [image])
    with served(explorer) as port:
        about = json.loads(ask(port, "/api/about")[1])
        header, array = unpack(ask(port, "/api/input/0/view")[1])
        without, without_array = unpack(ask(port, "/api/input/0/without")[1])
    assert about["categories"] == ["road", "sky", "car"]
    assert about["colors"] == [[250, 0, 0], [0, 250, 0], [0, 0, 250]]
    with torch.no_grad():
        scores = trained.model(trained.transform(image))["out"]
    expected = torch.nn.functional.interpolate(scores, size=(96, 128), mode="bilinear").argmax(dim=1)[0]
    assert header["size"] == without["size"] == [96, 128]
    np.testing.assert_array_equal(array(header["classes"]).reshape(96, 128), expected)
    assert (without_array(without["classes"]) != array(header["classes"])).any()
    # 48 x 64 pixels at the stride 16 of the third stage.
    (block,) = header["blocks"]
    assert (block["shape"], block["inside"], block["covered"]) == ([3, 4], [3, 4], [3.0, 4.0])


def test_a_large_image_has_few_classes_to_send(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 1700, 3), np.uint8)).save(tmp_path / "wide.png")
    explorer = SegmenterExplorer(latentgnn.load_run(write_segmenter(tmp_path / "run")), "run", [tmp_path / "wide.png"])
    header, array = unpack(explorer.view(explorer.input(0)))
    assert header["size"] == [38, 1600]
    assert set(array(header["classes"]).tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "[", ""])
def test_other_names_are_refused(port: int, host: str) -> None:
    status, told = fault(ask(port, "/api/about", headers={"Host": host}))
    assert status == 403
    assert "127.0.0.1" in told


def test_pages_of_other_sites_are_refused(port: int) -> None:
    assert fault(ask(port, "/api/about", headers={"Origin": "http://evil.example"}))[0] == 403
    assert fault(ask(port, "/api/about", headers={"Origin": "null"}))[0] == 403
    own = {"Origin": f"http://127.0.0.1:{port}"}
    assert ask(port, "/api/about", headers=own)[0] == 200


def test_a_token_is_needed_where_it_is_given(explorer: DetectorExplorer) -> None:
    with served(explorer, token="s3cret") as port:
        for given in ({}, {"Authorization": "Bearer s3cre"}, {"Authorization": "s3cret"}, {"Authorization": "\xe9"}):
            assert fault(ask(port, "/api/about", headers=given))[0] == 401
            assert fault(ask(port, "/api/input/0/view", headers=given))[0] == 401
            assert fault(ask(port, "/api/upload/view?suffix=.png", "POST", b"", given))[0] == 401
        headers = {"Authorization": "Bearer s3cret", "Host": "name.example"}
        assert json.loads(ask(port, "/api/about", headers=headers)[1])["categories"] == ["red", "a|blue"]


@pytest.mark.parametrize(
    "path", ["/page/../server.py", "/page/%2e%2e%2fserver.py", "/page/server.py", "/page//etc/passwd", "/api/input/0"]
)
def test_paths_of_the_page_reach_no_file(port: int, path: str) -> None:
    assert ask(port, path)[0] == 404


def test_inputs_that_are_not_there(port: int) -> None:
    assert fault(ask(port, "/api/input/2/view")) == (404, "there is no input 2; there are 2")
    assert ask(port, "/api/input/-1/view")[0] == 404
    assert ask(port, "/api/input/0/remove")[0] == 404


def test_an_upload_is_seen_like_the_file(explorer: DetectorExplorer, port: int) -> None:
    content = Path(explorer.paths[0]).read_bytes()
    assert ask(port, "/api/upload/view?suffix=.PNG", "POST", content)[1] == ask(port, "/api/input/0/view")[1]


def test_bad_uploads_are_told(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    status, told = fault(ask(port, "/api/upload/view?suffix=.png", "POST", b"no image"))
    assert status == 422
    assert told.startswith("your file.png: not an image")
    status, told = fault(ask(port, "/api/upload/view?suffix=.exe", "POST", b""))
    assert status == 415
    assert ".png" in told
    # A header that says 60,000 x 60,000 pixels.
    large = b"P6 60000 60000 255\n"
    status, told = fault(ask(port, "/api/upload/view?suffix=.ppm", "POST", large))
    assert status == 422
    assert "60,000 x 60,000 pixels; expected at most 33,554,432" in told
    monkeypatch.setattr(server, "MOST_BYTES", 1000)
    assert fault(ask(port, "/api/upload/view?suffix=.png", "POST", b"x" * 1001))[0] == 413


def test_a_port_that_is_taken(explorer: DetectorExplorer, port: int) -> None:
    with pytest.raises(latentgnn.errors.UserError, match=f"--port {port}: cannot listen there"):
        server.serve(explorer, host="127.0.0.1", port=port)
