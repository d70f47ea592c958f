"""The arithmetic of docs/scaling.md, against values worked out by hand; and the page, against the result files."""

import doctest
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import projection, scaling
from benchmarks.options import run
from benchmarks.projection import Assumed, Line, Measured, all_reduce_seconds, checked
from benchmarks.scaling import latest, page_with_tables
from latentgnn.errors import UserError


def sharding(step: Line, link: Line, *, two: float = 1.0) -> dict[str, Any]:
    """Results of a machine on which the model holds; steps of two processes take ``two`` times as long."""
    nodes, sums = (1_000, 10_000, 100_000), [1_000, 3_000]
    passed = 2 * link.fixed + 4_000 * link.each
    rows = [{"processes": 1, "threads": 1, "nodes": n, "step_seconds": step.fixed + step.each * n} for n in nodes]
    # Both cores in one process: no part of the model.
    rows += [{"processes": 1, "threads": 2, "nodes": n, "step_seconds": 7.0} for n in nodes]
    rows += [
        {"processes": 2, "threads": 1, "nodes": n, "step_seconds": two * (step.fixed + step.each * n / 2 + passed)}
        for n in nodes
    ]
    return {
        "layer": {"channels": 250, "latents": 10, "step_operations_per_node": 3e5},
        "throughput": rows,
        "all_reduce": [{"bytes": size, "seconds": link.fixed + size * link.each} for size in (256, 1 << 20, 1 << 24)],
        "bytes": [{"nodes": n, "step": sums} for n in nodes],
        "command": "python -m x",
        "processor": "p",
        "threads": 1,
        "torch": "2",
        "date": "2026-01-01",
        "file": "f",
    }


def test_examples() -> None:
    assert doctest.testmod(projection).failed == 0


def test_a_line_is_found_again_and_never_negative() -> None:
    sizes = np.array([1e3, 1e5, 1e7])
    line = Line.through(sizes, 2e-3 + 5e-9 * sizes)
    assert (line.fixed, line.each) == pytest.approx((2e-3, 5e-9))
    # Through (1, 1) and (2, 4) the line would begin at -2: through the origin, the least relative squares of a x are
    # those of 1 - a and 1 - a / 2, which have their minimum at a = 1.5 / 1.25.
    line = Line.through([1, 2], [1, 4])
    assert (line.fixed, line.each) == pytest.approx((0, 1.2))


def test_an_all_reduce_has_the_rounds_of_a_tree_and_the_bytes_of_a_ring() -> None:
    link = Line(1e-3, 1e-8)
    assert all_reduce_seconds(link, 1e6, 1) == 0
    assert all_reduce_seconds(link, 1e6, 2) == pytest.approx(1e-3 + 1e-2)
    assert all_reduce_seconds(link, 1e6, 5) == pytest.approx(3e-3 + 1.6e-2)
    assert all_reduce_seconds(link, 0, 64) == pytest.approx(6e-3)


def test_the_model_predicts_a_machine_that_it_describes() -> None:
    step, link = Line(1e-3, 2e-6), Line(1e-4, 1e-9)
    rows = checked(sharding(step, link))
    assert [(row["processes"], row["nodes"]) for row in rows] == [(p, n) for p in (1, 2) for n in (1e3, 1e4, 1e5)]
    assert [row["error"] for row in rows] == pytest.approx([0] * 6, abs=1e-9)
    # 1 ms, 50,000 nodes of 2 us, two all-reduces of 0.1 ms, 4,000 bytes of 1 ns.
    assert rows[-1]["predicted"] == pytest.approx(0.1 + 1e-3 + 2e-4 + 4e-6)
    # The measurements of two processes are compared with, and not learnt from.
    rows = checked(sharding(step, link, two=1.25))
    assert [row["error"] for row in rows] == pytest.approx([0] * 3 + [-0.2] * 3, abs=1e-9)


def test_projections_follow_the_numbers() -> None:
    model = Measured.of(sharding(Line(0, 1e-6), Line(1e-3, 0)))
    # 64 processes: six rounds of 1 ms for each of two sums, beside 1e9 / 64 nodes of 1 us.
    assert model.seconds(1e9, 64) == pytest.approx(15.625 + 0.012)
    assert model.efficiency(1e9, 64) == pytest.approx(15.625 / 15.637)
    # Nine tenths: 12 ms are a ninth of the 108 ms that the nodes of each take.
    assert model.nodes_for(0.9, 64) == pytest.approx(64 * 0.108 / 1e-6, rel=0.02)
    gpu = Assumed("g", 64, operations=1e14, bandwidth=1e12, share=0.5, fixed=0, latency=1e-5, link=1e10)
    there = model.on(gpu)
    # 3e5 operations take 3 ns, 8 passes over 1,000 bytes 8 ns; the larger counts, at half the speed.
    assert there.step == Line(0, pytest.approx(16e-9))
    assert there.link == Line(1e-5, pytest.approx(1e-10))
    # Steps of two that take a quarter longer: 25.25 ms and 51 us more at 100,000 nodes, for two all-reduces.
    late = sharding(Line(1e-3, 2e-6), Line(1e-4, 1e-9), two=1.25)
    assert Measured.of(late).waiting(late).link.fixed == pytest.approx(1e-4 + (0.101 + 2.04e-4) / 4 / 2)
    on_time = sharding(Line(1e-3, 2e-6), Line(1e-4, 1e-9), two=0.5)
    assert Measured.of(on_time).waiting(on_time).link.fixed == pytest.approx(1e-4)
    slow = Measured.of(sharding(Line(1, 1e-9), Line(1, 0)))
    with pytest.raises(ValueError, match="no number of nodes"):
        slow.nodes_for(1.0, 64)


def test_a_table_without_results_says_so() -> None:
    page = page_with_tables("# x\n\n<!-- table scans -->\nold\n<!-- end -->\n", {})
    assert "Not measured yet: `python -m benchmarks.large_scans`" in page
    assert "old" not in page
    with pytest.raises(UserError, match="has a table 'other'"):
        page_with_tables("<!-- table other -->\n<!-- end -->", {})


def test_tables_and_plots_are_written_into_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "scaling.md"
    page.write_text(
        "# x\n\n<!-- table checked -->\nold\n<!-- end -->\n\n<!-- table projection -->\n<!-- end -->\nafter\n"
    )
    result = sharding(Line(1e-3, 2e-6), Line(1e-4, 1e-9), two=1.25)
    (tmp_path / "sharding-2026-01-01-cpu.json").write_text(json.dumps({**result, "throughput": []}))
    (tmp_path / "sharding-2026-01-02-cpu.json").write_text(json.dumps({**result, "date": "2026-01-02"}))
    for _ in range(2):
        assert run(scaling.main, ["--page", str(page), "--results", str(tmp_path)]) == 0
        text = page.read_text()
        assert "old" not in text
        assert "| 100,000 | 2 | 127 ms | 79% | 101 ms | -20% |" in text
        assert text.endswith("<!-- end -->\nafter\n")
        assert text.count("![") == 1
        assert (tmp_path / "scaling-projection.svg").read_bytes().startswith(b"<?xml")
        assert (tmp_path / "scaling-sharding.svg").is_file()


def test_the_page_says_what_the_result_files_say() -> None:
    page, results = scaling.PAGE.read_text(), latest(scaling.RESULTS)
    assert page_with_tables(page, results) == page, "run python -m benchmarks.scaling"
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", page)
    for picture in pictures:
        assert (scaling.PAGE.parent / picture).is_file(), picture
