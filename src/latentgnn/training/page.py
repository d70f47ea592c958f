"""The HTML page of a report: its template filled in, with charts drawn and pictures embedded."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from latentgnn.configuration.recipes import to_yaml
from latentgnn.errors import require
from latentgnn.training import charts
from latentgnn.training.runs import RunFolder
from latentgnn.training.sections import Chart, Section, Table

REPORT = "report.html"
"""The name of the page in a run's folder, and of the template beside this file."""

# Wide enough for two panels side by side; a page with a dozen of them stays below a few megabytes.
_WIDEST_PICTURE = 1400


def render(
    run: RunFolder,
    *,
    subtitle: str,
    notes: Sequence[str],
    sections: Sequence[Section],
    commands: Sequence[str],
    tiles: Sequence[tuple[str, str]] = (),
    tiles_of: str = "",
    facts: Sequence[Table] = (),
    title: str = "",
) -> str:
    """Return the HTML of a report.

    Args:
        run: the folder, with its configuration and pictures.
        subtitle: text below the title.
        notes: notes on what is missing.
        sections: the sections, in order.
        commands: the commands that made the run.
        tiles: names and values of the main figures.
        tiles_of: what these figures are computed on.
        facts: tables on machine and data.
        title: heading of the page; empty takes the folder's name.
    """
    require("jinja2", extra="train")
    from jinja2 import Environment, StrictUndefined

    template = Path(__file__).with_name(REPORT).read_text(encoding="utf-8")
    # All of it is text from the user's own files, which must not become markup.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(template).render(
        title=title or run.path.resolve().name,
        subtitle=subtitle,
        notes=notes,
        tiles=tiles,
        tiles_of=tiles_of,
        sections=sections,
        drawings=_drawings,
        encoded=lambda name: _encoded(run.pictures, name),
        width=charts.WIDTH,
        height=charts.HEIGHT,
        commands=commands,
        facts=facts,
        config=to_yaml(run.config),
    )


def _encoded(folder: Path, name: str) -> str | None:
    """A picture in a folder as a data URL, scaled down if it is wide; ``None`` if it cannot be read."""
    require("PIL", extra="train")
    from PIL import Image

    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
        return None
    buffer = io.BytesIO()
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            small = picture.convert("RGB")
            small.thumbnail((_WIDEST_PICTURE, _WIDEST_PICTURE))
            small.save(buffer, "jpeg", quality=85)
    except (OSError, SyntaxError, Image.DecompressionBombError):
        # SyntaxError: raised by Pillow for a damaged PNG.
        return None
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _drawings(section: Section) -> list[tuple[Chart, charts.Drawing]]:
    drawn = [(chart, charts.draw(chart)) for chart in section.charts]
    return [(chart, drawing) for chart, drawing in drawn if drawing is not None]
