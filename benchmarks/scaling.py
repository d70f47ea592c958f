"""Makes the tables and plots of docs/scaling.md from the results of other programs, and a projection.

python -m benchmarks.scaling            # after benchmarks.annotations, .streaming, .sharding and .large_scans

How the projection is computed: see `benchmarks.projection`.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.child import ROOT
from benchmarks.options import RESULTS, program, run
from benchmarks.projection import Results
from benchmarks.scaling_plots import plots
from benchmarks.scaling_tables import (
    annotations_table,
    bytes_table,
    checked_table,
    projection_table,
    scans_table,
    streaming_table,
)
from latentgnn.errors import UserError
from latentgnn.files.writing import write_bytes, write_text

PAGE = ROOT / "docs" / "scaling.md"
PROGRAMS = ("annotations", "streaming", "sharding", "large-scans")
"""Names that result files begin with."""


def latest(folder: Path) -> dict[str, Any]:
    """The newest result of each of `PROGRAMS` that has one; of scans, all results of the newest day, as ``parts``.

    Args:
        folder: with result files.
    """
    found: dict[str, Any] = {}
    for name in PROGRAMS:
        paths = sorted(folder.glob(f"{name}-[0-9]*.json"))
        read = [{**json.loads(path.read_text()), "file": path.stem} for path in paths]
        if name == "large-scans" and read:
            day = max(result["date"][:10] for result in read)
            found[name] = {"parts": [result for result in read if result["date"][:10] == day]}
        elif read:
            found[name] = max(read, key=lambda result: result["date"])
    return found


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Args:
        program: whose results it shows.
        make: the Markdown.
        picture: the name of the plot below it, if there is one.
        shows: what the plot shows.
    """

    program: str
    make: Callable[[Results], str]
    picture: str = ""
    shows: str = ""


TABLES: Mapping[str, Table] = {
    "annotations": Table("annotations", annotations_table, "annotations", "Memory against the number of images"),
    "streaming": Table("streaming", streaming_table, "streaming", "Memory and time a node against the number of nodes"),
    "bytes": Table("sharding", bytes_table, "sharding", "Bytes between processes, and the efficiency of two"),
    "checked": Table("sharding", checked_table),
    "projection": Table("sharding", projection_table, "projection", "Efficiency against processes, computed"),
    "scans": Table("large-scans", scans_table, "scans", "Memory of predict against the number of points"),
}


def page_with_tables(page: str, results: Results) -> str:
    """The page with its tables as the results say: each between ``<!-- table NAME -->`` and ``<!-- end -->``.

    Args:
        page: the Markdown.
        results: of `latest`.

    Raises:
        UserError: a table that is not known.
    """

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise UserError(f"docs/scaling.md has a table {name!r}; expected one of {', '.join(TABLES)}")
        own = TABLES[name]
        if own.program in results:
            text = own.make(results)
            if own.picture:
                text += f"\n\n![{own.shows}]({PAGE.stem}-{own.picture}.svg)"
        else:
            module = own.program.replace("-", "_")
            text = f"Not measured yet: `python -m benchmarks.{module}`, and then `python -m benchmarks.scaling`."
        return f"<!-- table {name} -->\n\n{text}\n\n<!-- end -->"

    return re.sub(r"<!-- table (?P<name>[\w-]+) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)


def main(argv: list[str]) -> None:
    """Write the tables into docs/scaling.md and the plots beside it.

    Args:
        argv: command-line arguments.
    """
    parser = program("scaling", __doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="(benchmarks/results)")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE", help="(docs/scaling.md)")
    given = parser.parse_args(argv)
    results = latest(given.results)
    page = page_with_tables(given.page.read_text(), results)
    pictures = plots(results)
    write_text(given.page, page)
    for name, picture in pictures.items():
        write_bytes(given.page.with_name(f"{given.page.stem}-{name}.svg"), picture)
    print(f"written to {given.page}, with {len(pictures)} plots")


if __name__ == "__main__":
    sys.exit(run(main))
