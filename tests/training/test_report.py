"""A run's report: what stands in it, that it needs nothing else, and that nothing in it becomes markup."""

import base64
import io
import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from latentgnn.configuration.settings import plain_data
from latentgnn.training.charts import draw, ticks
from latentgnn.training.comparison_report import write_comparison
from latentgnn.training.report import write_analysis, write_report
from latentgnn.training.runs import RunFolder
from latentgnn.training.sections import (
    Chart,
    Gallery,
    Line,
    Matrix,
    Picture,
    Section,
    Table,
    read_sections,
    thinned,
)

_VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Elements, with the attributes of each, and the text outside styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += f"{data} "

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def titles(names: Any) -> dict[str, str]:
    return {name: name.replace("bbox/", "box ") for name in names if name.endswith("/AP")}


def page_of(run: RunFolder) -> Page:
    written = write_report(run, titles)
    assert written == run.path / "report.html"
    return Page(written.read_text(encoding="utf-8"))


def images(*paths: str) -> Section:
    pictures = tuple(Picture(path=path, caption=f"of {path}") for path in paths)
    return Section(title="Images", galleries=(Gallery(title="All", pictures=pictures),))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run of four steps, with files written by hand."""
    run = RunFolder.create(tmp_path / "a run", task="toy")
    run.write_config({"model": {"width": 8}, "training": {"steps": 4}})
    (run.path / "metrics.csv").write_text(
        "step,loss,loss/mask,rate,gamma/layer3\n1,4.0,3.0,0.1,0.0\n2,3.0,2.0,0.1,0.5\n2,,,,\n4,1.0,0.5,0.01,0.25\n"
    )
    run.write_validations(
        [
            {"step": 2, "best": True, "metrics": {"bbox/AP": 0.75, "bbox/AP50": 0.5, "segm/AP": 0.25, "segm/AP50": -1}},
            {"step": 4, "best": False, "metrics": {"bbox/AP": 0.5, "bbox/AP50": 0.6, "segm/AP": 0.2, "segm/AP50": -1}},
        ]
    )
    run.write_metrics({"step": 4, "metrics": {"bbox/AP": 0.5}, "best": None})
    run.write_data({"training set": {"root": "/data", "samples": 12, "digest": "0123abcd", "totals": {}}})
    (run.path / "environment.json").write_text(
        json.dumps(
            {
                "command": ["/bin/latentgnn", "train", "--out", "a run"],
                "python": "3.11.7",
                "packages": {"torch": "2.14.1"},
                "earlier": [{"command": ["latentgnn", "train"]}],
            }
        )
    )
    return run


def picture(run: RunFolder, name: str, size: tuple[int, int] = (2000, 500)) -> None:
    path = run.pictures / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 10, 10)).save(path)


def test_a_report_shows_what_the_run_wrote(run: RunFolder) -> None:
    page = page_of(run)
    assert "a run finished after 4 steps" in " ".join(page.text.split()).replace("toy · ", "").replace(
        "detection · ", ""
    )
    for text in ("Loss in training", "Validation", "Learning rate", "Gamma of the blocks", "layer3"):
        assert text in page.text
    # The tiles are the best validation's, and the tables hold both, kinds side by side.
    tiles = re.search(r"The best checkpoint, of step 2.*?0\.750\s+box AP\s+0\.250\s+segm/AP", page.text, re.DOTALL)
    assert tiles
    words = page.text.split()
    assert " ".join(words).count("step 4 (last) box segm AP 0.500 0.200 AP50 0.600 n/a") == 1
    assert " ".join(words).count("step 2 (best) box segm AP 0.750 0.250 AP50 0.500 n/a") == 1
    assert "latentgnn train\nlatentgnn train --out 'a run'" in page.text
    assert "torch 2.14.1" in page.text
    assert "0123abcd" in page.text
    assert "width: 8" in page.text


def test_a_comparison_shows_both_runs_and_their_difference(tmp_path: Path) -> None:
    both = RunFolder.create(tmp_path / "both", task="toy")
    both.write_config({"training": {"steps": 4}})
    runs = {}
    for name, figures in {"with_blocks": (0.25, 0.75, -1), "without_blocks": (0.5, 0.5, 0.5)}.items():
        runs[name] = RunFolder.create(both.path / name, task="toy")
        runs[name].write_config({"training": {"steps": 4}})
        (runs[name].path / "metrics.csv").write_text(
            f"step,loss,bbox/AP\n2,3.0,\n2,,{figures[0]}\n4,1.0,\n4,,{figures[1]}\n"
        )
        runs[name].write_validations(
            [
                {"step": step, "best": True, "metrics": {"bbox/AP": figure, "segm/AP": figures[2]}}
                for step, figure in zip((2, 4), figures, strict=False)
            ]
        )
    written = write_comparison(both, runs, titles)
    assert written == both.path / "report.html"
    page = Page(written.read_text())
    words = " ".join(page.text.split())
    assert "with blocks without blocks difference box AP 0.750 0.500 +0.250 segm/AP n/a 0.500 n/a" in words
    assert "Loss in training" in words
    # A line a run in each of the charts, in the order of the runs.
    legends = re.findall(r"with blocks [\d.]+ without blocks [\d.]+", words)
    assert legends == ["with blocks 1 without blocks 1", "with blocks 0.75 without blocks 0.5"]


def test_a_report_needs_no_network_script_or_other_file(run: RunFolder) -> None:
    picture(run, "a.png")
    write_analysis(
        run, [Section(title="s", galleries=(Gallery(title="g", pictures=(Picture(path="a.png", caption="c"),)),))]
    )
    page = page_of(run)
    assert {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "embed", "base", "form"} == set()
    for tag, attributes in page.elements:
        assert not {"href", "srcset", "action", "data", "background"} & attributes.keys(), tag
        assert not any(name.startswith("on") for name in attributes)
        if "src" in attributes:
            assert str(attributes["src"]).startswith("data:image/jpeg;base64,")
    text = (run.path / "report.html").read_text()
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    assert "url(" not in text
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    assert str(policy).startswith("default-src 'none';")


def test_pictures_are_embedded_and_made_smaller(run: RunFolder) -> None:
    picture(run, "worst/a.png")
    write_analysis(run, [images("worst/a.png", "gone.png")])
    page = page_of(run)
    [source] = [str(attributes["src"]) for tag, attributes in page.elements if tag == "img"]
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as embedded:
        assert embedded.size == (1400, 350)
        assert sum(abs(a - b) for a, b in zip(embedded.getpixel((5, 5)), (200, 10, 10), strict=True)) < 12  # type: ignore[arg-type]
    assert "pictures/gone.png is gone or cannot be read" in page.text
    assert "of gone.png" in page.text


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_a_damaged_picture_is_told(run: RunFolder, content: bytes) -> None:
    run.pictures.mkdir()
    (run.pictures / "a.png").write_bytes(content)
    write_analysis(
        run, [Section(title="s", galleries=(Gallery(title="g", pictures=(Picture(path="a.png", caption="c"),)),))]
    )
    assert "pictures/a.png is gone or cannot be read" in page_of(run).text


def test_pictures_outside_the_run_are_not_taken(run: RunFolder, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    run.pictures.mkdir()
    (run.pictures / "link.png").symlink_to(tmp_path / "secret.png")
    write_analysis(run, [images("../../secret.png", str(tmp_path / "secret.png"), "link.png")])
    assert page_of(run).count("img") == 0


def test_names_do_not_become_markup(run: RunFolder) -> None:
    bad = "<script>alert(1)</script>\"'&"
    picture(run, "a.png")
    run.write_config({"model": {"name": bad}, "training": {"steps": 4}})
    section = Section(
        title=bad,
        text=bad,
        charts=(Chart(title=bad, x=bad, lines=(Line(name=bad, x=(0, 1), y=(0, 1)),)),),
        tables=(Table(title=bad, columns=(bad,), rows=((bad,),)),),
        matrices=(Matrix(title=bad, rows=(bad,), columns=(bad,), counts=((1,),)),),
        galleries=(Gallery(title=bad, pictures=(Picture(path="a.png", caption=bad),)),),
    )
    write_analysis(run, [section])
    page = page_of(run)
    assert page.count("script") == 0
    assert page.text.count("<script>alert(1)</script>") >= 8
    assert [attributes["alt"] for tag, attributes in page.elements if tag == "img"] == [bad]


def test_a_matrix_is_coloured_by_the_parts_of_its_rows(run: RunFolder) -> None:
    matrix = Matrix(title="m", rows=("a", "b"), columns=("a", "b", "none"), counts=((3, 1, 0), (0, 0, 0)))
    write_analysis(run, [Section(title="s", matrices=(matrix,))])
    page = page_of(run)
    parts = [str(a["style"]) for tag, a in page.elements if tag == "td" and "title" in a]
    assert parts == [f"--part: {part}" for part in ("0.75", "0.25", "0.0", "0", "0", "0")]


def test_a_run_that_is_not_finished_has_what_is_there(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "new", task="toy")
    run.write_config({"training": {"steps": 7}})
    assert "not finished: 0 of 7 steps" in page_of(run).text
    (run.path / "metrics.csv").write_text("step,loss\n3,1.5\n5,1.")
    assert "not finished: 5 of 7 steps" in page_of(run).text


@pytest.mark.parametrize(
    "name", ["metrics.csv", "validations.json", "metrics.json", "environment.json", "data.json", "analysis.json"]
)
@pytest.mark.parametrize("content", [b"\xff\xfe", b"[1, 2", b'{"step": "x"}', b"step\nx\n"])
def test_damaged_files_are_named_and_left_out(run: RunFolder, name: str, content: bytes) -> None:
    (run.path / name).write_bytes(content)
    before = {path.name for path in run.path.iterdir()}
    page = page_of(run)
    sound = name in ("environment.json", "data.json") and content.startswith(b"{")
    assert (f"{name} is damaged" in page.text) is not sound
    assert {path.name for path in run.path.iterdir()} == {*before, "report.html"}


@pytest.mark.parametrize(
    "value",
    [
        {},
        [{}],
        [1],
        ["Section"],
        [plain_data(Section(title="s")) | {"more": 1}],
        [plain_data(Section(title="s")) | {"text": 1}],
        [plain_data(Section(title="s")) | {"galleries": [{"title": "g", "pictures": [], "wide": 1}]}],
        [{"text": "no title"}],
        [plain_data(Section(title="s")) | {"tables": [{"title": "t", "columns": ["a"], "rows": [["1", "2"]]}]}],
        [plain_data(Section(title="s")) | {"charts": [{"title": "t", "x": "x", "lines": [], "limits": [1.0]}]}],
        [plain_data(Section(title="s")) | {"matrices": [{"title": "t", "rows": [], "columns": [], "counts": [[1]]}]}],
        [
            plain_data(Section(title="s"))
            | {"matrices": [{"title": "t", "rows": ["a"], "columns": ["a"], "counts": [[True]]}]}
        ],
    ],
)
def test_what_is_no_section_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="expected"):
        read_sections(value)


def test_sections_are_read_as_they_were_written(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", task="toy")
    section = Section(
        title="s",
        charts=(Chart(title="c", x="step", lines=(Line(name="l", x=(1, 2.5), y=(0.5, 2)),), limits=(0.0, 1.0)),),
        matrices=(Matrix(title="m", rows=("a",), columns=("a", "b"), counts=((1, 2),)),),
    )
    write_analysis(run, [section])
    assert read_sections(json.loads((run.path / "analysis.json").read_text())) == (section,)


def test_sections_of_earlier_versions_are_read() -> None:
    """They lack what has had a default since."""
    gallery = {"title": "Worst", "pictures": [{"path": "a.png", "caption": "a"}]}
    written = plain_data(Section(title="s")) | {"galleries": [gallery]}
    pictures = (Picture(path="a.png", caption="a"),)
    assert read_sections([written]) == (Section(title="s", galleries=(Gallery(title="Worst", pictures=pictures),)),)


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path)]


def test_a_chart_places_points_by_its_axes() -> None:
    chart = Chart(title="c", x="step", lines=(Line(name="l", x=(0, 50, 100), y=(0, 1, 0.5)),), limits=(0.0, 1.0))
    drawing = draw(chart)
    assert drawing is not None
    width, height = drawing.right - drawing.left, drawing.bottom - drawing.top
    expected = [
        (drawing.left, drawing.bottom),
        (drawing.left + width / 2, drawing.top),
        (drawing.right, drawing.bottom - height / 2),
    ]
    [shape] = drawing.shapes
    assert points(shape.path) == [pytest.approx(place, abs=0.06) for place in expected]
    assert [tick.text for tick in drawing.up] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert [tick.place for tick in drawing.across][::5] == [drawing.left, drawing.right]


def test_a_line_has_gaps_where_it_is_not_finite() -> None:
    values = (1.0, 2.0, math.nan, 4.0, math.inf, 1.0, 2.0)
    drawing = draw(Chart(title="c", x="x", lines=(Line(name="l", x=tuple(range(7)), y=values),)))
    assert drawing is not None
    [shape] = drawing.shapes
    assert [part.count("L") for part in shape.path.split("M")[1:]] == [1, 0, 1]


@pytest.mark.parametrize("y", [(), (math.nan, math.inf), (-1e308, 1e308)])
def test_a_chart_without_a_range_is_not_drawn(y: tuple[float, ...]) -> None:
    assert draw(Chart(title="c", x="x", lines=(Line(name="l", x=tuple(range(len(y))), y=y),))) is None


@pytest.mark.parametrize("value", [0.0, 5e-324, -3.0, 1e-12, 1e12, 1e300])
def test_a_level_line_is_drawn(value: float) -> None:
    drawing = draw(Chart(title="c", x="x", lines=(Line(name="l", x=(1.0, 2.0), y=(value, value)),)))
    assert drawing is not None
    middle = (drawing.top + drawing.bottom) / 2
    assert [y for _, y in points(drawing.shapes[0].path)] == [pytest.approx(middle, abs=0.1)] * 2


@pytest.mark.parametrize("low", [-3.7, 0.0, 0.013, 950.0])
@pytest.mark.parametrize("span", [1e-4, 0.3, 7.0, 1234.5, 9e6])
def test_ticks_are_round_and_few_and_inside(low: float, span: float) -> None:
    places = ticks(low, low + span, 5)
    assert 3 <= len(places) <= 8
    assert all(low - 1e-6 * span <= place <= low + span * (1 + 1e-6) for place in places)
    steps = {f"{b - a:.6g}" for a, b in pairwise(places)}
    assert len(steps) == 1
    assert f"{float(steps.pop()):e}"[0] in "125"


def test_a_long_line_is_thinned_by_means() -> None:
    line = Line(name="l", x=tuple(range(1000)), y=tuple(float(n % 2) for n in range(1000)))
    short = thinned(line, most=100)
    assert short.x == tuple(4.5 + 10 * n for n in range(100))
    assert set(short.y) == {0.5}


def test_the_drawing_is_sound_xml(run: RunFolder) -> None:
    text = write_report(run, titles)
    assert text is not None
    pictures = re.findall(r'<svg viewBox="0 0 360.*?</svg>', text.read_text(), re.DOTALL)
    assert len(pictures) == 4
    for svg in pictures:
        ET.fromstring(svg)
