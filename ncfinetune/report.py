"""``ncfinetune report``: logged runs become one table and one picture.

It reads the files that a run writes: its ``config.yaml``, and its event files or ``metrics.csv``.
"""

from __future__ import annotations

import argparse
import base64
import html
import sys
from collections.abc import Sequence
from pathlib import Path

from ncfinetune.atomic import replacing
from ncfinetune.grouping import group
from ncfinetune.report_figures import picture
from ncfinetune.report_table import as_html, legend, markdown, rows
from ncfinetune.runs import find_runs

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font-family: sans-serif; margin: 2em; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 0.85em; }}
th, td {{ border-bottom: 1px solid #ccc; padding: 0.3em 0.5em; text-align: left; }}
img {{ max-width: 100%; }}
</style>
</head>
<body>
<h1>{title}</h1>
<div class="wide">
{table}
</div>
<p>{legend}</p>
<img alt="{alt}" src="data:image/png;base64,{picture}">
</body>
</html>
"""


def main(words: Sequence[str]) -> int:
    """Print the table of the runs under the folders that the words name, and save table and picture.

    Raises:
        FileNotFoundError, ValueError: A folder does not exist, there is no run, or no run of the baseline.
    """
    options = _options(words)
    experiments = group(find_runs(options.runs))
    table = rows(experiments, options.baseline)
    text = "\n\n".join(filter(None, [markdown(table), "\n".join(legend(table))]))
    out = options.out or options.runs[0]
    written = {"table": out / "report.md", "picture": out / "report.png"}
    with replacing(written["table"]) as part:
        part.write_text(text + "\n", encoding="utf-8")
    with replacing(written["picture"]) as part:
        picture(experiments).savefig(part, format="png", dpi=120)
    if options.html is not None:
        written["page"] = options.html
        title = f"Report of {', '.join(map(str, options.runs))}"
        with replacing(options.html) as part:
            part.write_text(_page(title, table, written["picture"].read_bytes()), encoding="utf-8")
    print(text + "\n")
    for name, path in written.items():
        print(f"{name + ':':12} {path}")
    print(f"TensorBoard: {Path(sys.executable).parent / 'tensorboard'} --logdir {options.runs[0]}")
    return 0


def _options(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ncfinetune report",
        description="Make one table and one picture of runs, from their configurations and what they logged. A row is "
        "one configuration: runs that differ in their seed alone are averaged, a run that was resumed is one, and "
        "unfinished runs are named and left out of all numbers.",
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders in which runs lie, however deep")
    parser.add_argument("--out", type=Path, help="folder for report.md and report.png; the first of RUNS unless given")
    parser.add_argument(
        "--baseline",
        metavar="METHOD",
        help="the method, as the table names it, that the others of its task are compared with; the linear probe, or "
        "the first row of a task without one, unless given",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="table and picture as one HTML file, too")
    options = parser.parse_args(words)
    out = options.out
    if out is not None and not out.is_dir() and (out.is_file() or out.suffix in (".md", ".png", ".html")):
        parser.error(
            f"expected --out FOLDER, for report.md and report.png in it, got {str(out)!r}; a page is --html FILE"
        )
    return options


def _page(title: str, table: Sequence[dict[str, str]], drawn: bytes) -> str:
    """One page that needs no other file."""
    return _PAGE.format(
        title=html.escape(title),
        table=as_html(table),
        legend=html.escape(" ".join(legend(table))),
        alt="NC1 and accuracies of the methods in the table",
        picture=base64.b64encode(drawn).decode(),
    )
