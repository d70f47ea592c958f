"""The page in a browser: it shows the numbers of `latentgnn.inspection`, and all that a user does works."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import latentgnn
from benchmarks.explore_page import served
from latentgnn.inspection import Seen, capture
from latentgnn.tasks.detection.exploring import DetectorExplorer
from latentgnn.tasks.pointcloud.exploring import ScanExplorer
from latentgnn.tasks.segmentation.exploring import SegmenterExplorer
from tests.tasks.explore.pages import browser, detector_explorer
from tests.tasks.made_runs import (
    NETWORK,
    SEGMENTER,
    write_labelled,
    write_network,
    write_scans,
    write_segmenter,
)

MADE = "() => document.querySelector('main').hidden === false && explore.weights !== null"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as found:
        yield found


@pytest.fixture
def page(chromium: Any) -> Iterator[Any]:
    """A page that may ask this machine alone, and must not complain."""
    context = chromium.new_context(viewport={"width": 1200, "height": 900})
    found = context.new_page()
    complaints: list[str] = []
    asked: list[str] = []
    found.on("console", lambda message: complaints.append(message.text))
    found.on("pageerror", lambda error: complaints.append(str(error)))
    found.on("request", lambda request: asked.append(request.url))
    yield found
    context.close()
    assert not complaints
    assert asked
    assert all(re.match(r"(blob:)?http://127\.0\.0\.1:", url) for url in asked), asked


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> DetectorExplorer:
    return detector_explorer(tmp_path_factory.mktemp("explore"))


@pytest.fixture(scope="module")
def port(images: DetectorExplorer) -> Iterator[int]:
    with served(images) as found:
        yield found


def look(explorer: DetectorExplorer, number: int) -> Seen:
    with capture(explorer._trained.model) as seen:
        explorer._trained.predict(explorer.input(number))
    return seen


def shown(page: Any) -> tuple[Any, int]:
    """The numbers behind the picture, once it is drawn, and their node."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return np.array(page.evaluate("() => Array.from(explore.weights)")), page.evaluate("() => explore.state.node")


def close(weights: Any, expected: Any) -> None:
    np.testing.assert_allclose(weights, expected.flatten(), rtol=1e-3, atol=1e-3 * float(expected.max()))


def pixel(page: Any, x: float, y: float) -> list[int]:
    """The colour of the stage at a part of its width and height."""
    # A copy, for Chromium complains of a canvas that is read again and again.
    found: list[int] = page.evaluate(
        "([x, y]) => { const from = document.getElementById('stage'), to = document.createElement('canvas'); "
        "[to.width, to.height] = [1, 1]; const context = to.getContext('2d'); "
        "context.drawImage(from, Math.floor(x * from.width), Math.floor(y * from.height), 1, 1, 0, 0, 1, 1); "
        "return Array.from(context.getImageData(0, 0, 1, 1).data) }",
        [x, y],
    )
    return found


def test_pointer_and_keys_show_the_rows_of_inspection(page: Any, port: int, images: DetectorExplorer) -> None:
    page.goto(f"http://127.0.0.1:{port}/#found=0&smooth=0")
    page.wait_for_function(MADE)
    seen = look(images, 0)
    first = next(iter(seen))
    rows, columns = seen.sample(first).shape
    box = page.locator("#stage").bounding_box()
    # Images of 64 x 48 become 85 x 64, on a batch of 96 x 64: at C3, stride 8, they cover 85 / 8 columns and 8 rows.
    assert (rows, columns) == (8, 12)
    across, down = box["width"] / (85 / 8), box["height"] / 8
    page.mouse.move(box["x"] + 4.5 * across, box["y"] + 2.5 * down)
    weights, node = shown(page)
    assert node == 2 * columns + 4
    expected = seen.row(first, (2, 4))
    close(weights, expected)
    # The node's own square is brighter where its weight is larger: the darkest and the brightest in view.
    own = expected[:, :10]
    places = [np.unravel_index(int(index), own.shape) for index in (own.argmin(), own.argmax())]
    dark, bright = (sum(pixel(page, (c + 0.5) * 8 / 85, (r + 0.5) / 8)[:3]) for r, c in places)
    assert bright > dark

    page.mouse.click(box["x"] + 1.5 * across, box["y"] + 1.5 * down)
    page.mouse.move(box["x"] + 6.5 * across, box["y"] + 5.5 * down)
    weights, node = shown(page)
    assert node == columns + 1, "a click pins the node"
    page.locator("#stage").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    weights, node = shown(page)
    assert node == 2 * columns + 2
    close(weights, seen.row(first, (2, 2)))
    page.get_by_label("who listens to the node").check()
    close(shown(page)[0], seen.column(first, (2, 2)))
    page.get_by_text("Node in row 2, column 2 (pinned)").wait_for()

    last = list(seen)[-1]
    page.locator("#block").select_option(last)
    page.locator("#kernel").select_option("1")
    weights, node = shown(page)
    close(weights, seen.column(last, node, kernel=1))


def test_latents_that_are_off_add_nothing_and_links_restore_it(page: Any, port: int, images: DetectorExplorer) -> None:
    page.goto(f"http://127.0.0.1:{port}/#input=1&node=17&pinned=1")
    page.wait_for_function(MADE)
    seen = look(images, 1)
    first = next(iter(seen))
    kernel = seen.sample(first).kernels[0]
    latents = page.locator("#gallery button")
    assert latents.count() == 4
    latents.first.click()
    off = page.evaluate("() => [...explore.state.off]")[0]
    assert latents.first.get_attribute("aria-pressed") == "false"
    kept = kernel.gather[0].clone()
    kept[int(off.split(".")[2])] = 0
    expected = kernel.scatter[0, :, 17] @ kernel.affinity[0] @ kept
    close(shown(page)[0], expected)
    page.wait_for_function("() => location.hash.includes('off=')")
    link = page.url
    page.goto("about:blank")
    page.goto(link)
    page.wait_for_function(MADE)
    weights, node = shown(page)
    assert node == 17
    close(weights, expected)
    assert page.locator("#gallery button[aria-pressed=false]").count() == 1


def test_a_file_is_dropped_and_a_bad_one_is_told(
    page: Any, port: int, images: DetectorExplorer, tmp_path: Path
) -> None:
    page.goto(f"http://127.0.0.1:{port}/#compare=1")
    page.wait_for_function(MADE)
    page.get_by_text("the result without").last.wait_for()
    page.locator("#file").set_input_files(images.paths[1])
    page.get_by_text(f"{images.paths[1].name}, with").wait_for()
    seen = look(images, 1)
    page.wait_for_function("() => document.getElementById('status').textContent === ''")
    weights, node = shown(page)
    close(weights, seen.row(0, node))
    (tmp_path / "notes.txt").write_text("no image")
    page.locator("#file").set_input_files(tmp_path / "notes.txt")
    assert "expected a file that ends in" in page.get_by_role("alert").inner_text()


def test_everything_is_reached_by_keys_and_named(page: Any, port: int) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    page.goto(f"http://127.0.0.1:{port}/")
    page.wait_for_function(MADE)
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("() => document.activeElement.id || document.activeElement.dataset.latent"))
    wanted = {"previous", "input", "next", "choose", "copy", "stage", "block", "heat", "compare", "score", "all"}
    assert wanted <= reached
    assert {"0.0.0", "0.0.1", "0.0.2", "0.0.3"} <= reached
    # What a screen reader says of each.
    for role in ("button", "combobox", "checkbox", "radio", "slider", "application"):
        assert page.get_by_role(role).count() == page.get_by_role(role, name=re.compile(r"\S")).count() > 0


def test_points_turn_and_show_the_rows_of_inspection(page: Any, tmp_path: Path) -> None:
    scans = write_scans(tmp_path / "data", "a")
    values = {**NETWORK, "data": {**NETWORK["data"], "root": str(scans), "crop": "column", "crop_size": 5.0}}
    trained = latentgnn.load_run(write_network(tmp_path / "run", values))
    explorer = ScanExplorer(trained, "run", ["a"], lambda _: trained.transform.scan(scans / "val" / "a.laz"))
    with capture(trained.model) as seen:
        explorer.view(explorer.input(0))
    with served(explorer, token="s3cret") as port:
        page.goto(f"http://127.0.0.1:{port}/#token=s3cret")
        page.wait_for_function(MADE)
        weights, first = shown(page)
        close(weights, seen.row(0, first))
        box = page.locator("#stage").bounding_box()
        middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(middle[0] - 60, middle[1])
        weights, node = shown(page)
        assert node != first
        close(weights, seen.row(0, node))
        page.mouse.down()
        page.mouse.move(middle[0] + 60, middle[1] + 20, steps=3)
        page.mouse.up()
        assert shown(page)[1] == node, "turning keeps the node"
        assert page.evaluate("() => explore.state.yaw") < -1
        page.locator("#stage").focus()
        page.keyboard.press("ArrowUp")
        weights, moved = shown(page)
        assert moved != node
        close(weights, seen.row(0, moved))
        page.get_by_label("the result without the block beside it").check()
        page.get_by_text("the result without encoder").wait_for()


def test_classes_lie_over_the_image_and_their_borders_over_the_affinity(page: Any, tmp_path: Path) -> None:
    trained = latentgnn.load_run(write_segmenter(tmp_path / "run"))
    image = write_labelled(tmp_path / "data", 1) / "images" / "val" / "0.png"
    explorer = SegmenterExplorer(trained, "run", [image])
    with capture(trained.model) as seen:
        found = trained.predict(image).numpy()
    names, colours = trained.class_names, np.array(list(SEGMENTER["data"]["colors"].values()))
    with served(explorer) as port:
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_function(MADE)
        assert page.locator("#legend li").all_inner_texts() == list(names)
        box = page.locator("#stage").bounding_box()
        # The map has 3 x 4 nodes.
        page.mouse.move(box["x"] + 0.625 * box["width"], box["y"] + box["height"] / 6)
        weights, node = shown(page)
        assert node == 2
        close(weights, seen.row(0, (0, 2)))
        page.get_by_text(f"Node in row 0, column 2, {names[found[16, 80]]}:").wait_for()
        page.locator("#heat").uncheck()
        shown(page)
        # In the middle of an area, where the node's frame is not: mostly the class's colour.
        inner = _inner(found)
        at = ((inner[1] + 0.5) / 128, (inner[0] + 0.5) / 96)
        over = np.array(pixel(page, *at)[:3])
        assert over.argmax() == colours[found[inner]].argmax()
        assert over.max() >= 0.55 * 250 - 3
        page.locator("#found").uncheck()
        shown(page)
        assert not np.array_equal(pixel(page, *at)[:3], over)
        page.get_by_label("the result without the block beside it").check()
        page.get_by_text("the result without backbone.network.layer3").wait_for()


def _inner(found: Any) -> tuple[int, int]:
    """Row and column of a pixel, in the lower half, in the middle of 5 x 5 of one class."""
    for row in range(50, 92):
        for column in range(4, 124):
            if len(np.unique(found[row - 2 : row + 3, column - 2 : column + 3])) == 1:
                return row, column
    raise AssertionError("no area of one class")
