"""Draw the table of the sample run for the README: ``python -m tools.docs_picture``."""

from __future__ import annotations

import io
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI

from editcli import Recipe, RunReport, load_plugins
from editcli.render.run import run_table
from editcli.runs.apply import apply
from tools.docs_blocks import DOCS, ROOT

COMMAND = "editcli apply sample_edits/facts.jsonl --stabilizer nas"
PICTURE = DOCS / "assets" / "run.svg"
WIDTH = 86
FONTS = "ui-monospace, 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace"


def draw(report: RunReport) -> str:
    """Return the table of a run as SVG that fetches nothing."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(f"[bold green]$[/] {COMMAND}\n")
    console.print(run_table(report))
    drawing = console.export_svg(title="editcli", theme=MONOKAI, unique_id="run")
    # Rich names a font on a server; the reader's own does as well.
    drawing = re.sub(r"@font-face \{.*?\}\s*", "", drawing, flags=re.DOTALL)
    drawing = drawing.replace("font-family: Fira Code, monospace", f"font-family: {FONTS}")
    lines = [line.rstrip() for line in drawing.splitlines() if not line.lstrip().startswith("<!--")]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the sample, draw its table and keep nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "facts-edited"
        recipe = Recipe(edits=str(ROOT / "sample_edits" / "facts.jsonl"), stabilizers=("nas",), out=str(out))
        report = apply(recipe, load_plugins())
        drawing = draw(replace(report, out=out.name))
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(drawing, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
