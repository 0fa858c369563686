# SPDX-License-Identifier: Apache-2.0
"""Write the report: one self-contained page (no network, no script, PNGs inside), its PNGs and its table."""

import base64
import json
import os
from html import escape
from itertools import groupby
from pathlib import Path

from verl_gndpo.report.drawing import LONG, SMOOTHING, Picture
from verl_gndpo.report.logs import ReportError, read_arms
from verl_gndpo.report.plots import PLOTS, draw_plots
from verl_gndpo.report.table import ACCURACY_COLUMNS, RUN_COLUMNS, read_teacher, summarise

# Marks the summary.json of a report. The quickstart writes another one, beside its log.
FORMAT = "verl-gndpo report"

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222;
  background: #fff; overflow-wrap: break-word; }
table { border-collapse: collapse; font-size: 85%; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
th, td { border: 1px solid #ccc; padding: .3rem .45rem; text-align: right; vertical-align: top; }
th { background: #f3f3f3; }
th.text, td.text { text-align: left; overflow-wrap: anywhere; min-width: 6rem; }
small { display: block; color: #555; white-space: nowrap; }
.plots { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1.5rem; grid-auto-flow: dense; }
figure { margin: 0; }
figure.all { grid-column: 1 / -1; }
figcaption { font-size: 85%; }
img { box-sizing: border-box; max-width: 100%; height: auto; border: 1px solid #eee; }
@media (max-width: 50rem) {
  .plots { grid-template-columns: minmax(0, 1fr); }
  .wide img { max-width: none; width: 50rem; }
}
code { overflow-wrap: anywhere; }
"""


def write_report(arguments: list[str], out: Path, teacher_accuracy: list[str]) -> tuple[Path, list[dict]]:
    """Read runs, draw them and write `index.html`, its PNGs and `summary.json`, each whole or not at all.

    Args:
        arguments: PATH or LABEL=PATH, as in `read_arms`.
        out: the folder, made if it is missing. PNGs of an earlier report that this one doesn't have are removed.
        teacher_accuracy: SHARE or SOURCE=SHARE, as in `read_teacher`.

    Returns:
        the path of the page, and the table from `summarise`.

    Raises:
        ReportError: an argument is wrong, a run has no metrics, or `out` has a summary.json that isn't a report's.
        OSError: a file can't be read or written.
    """
    _refuse_foreign_summary(out / "summary.json")
    arms = read_arms(arguments)
    teacher = read_teacher(teacher_accuracy, arms)
    table = summarise(arms, teacher)
    out.mkdir(parents=True, exist_ok=True)

    pictures = draw_plots(arms, teacher)
    drawn = {f"{picture.plot.name}.png": picture.png for picture in pictures if picture.png}
    for name, png in drawn.items():
        _write(out / name, png)
    summary = {"format": FORMAT, "arms": table}
    _write(out / "summary.json", (json.dumps(summary, indent=2, allow_nan=False) + "\n").encode())
    _write(out / "index.html", render(table, pictures).encode("utf-8", "replace"))
    for name in {f"{plot.name}.png" for plot in PLOTS} - drawn.keys():
        (out / name).unlink(missing_ok=True)
    return out / "index.html", table


def render(table: list[dict], pictures: list[Picture]) -> str:
    """Return the page as HTML.

    Args:
        table: from `summarise`.
        pictures: from `draw_plots`.
    """
    title = escape(", ".join(arm["label"] for arm in table))
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title} · verl-gndpo report</title><style>{STYLE}</style></head><body>",
        f"<h1>{title}</h1>",
        _render_table(table),
        _render_notes(table),
        "<h2>Plots</h2>",
        "<p>Several runs of one arm are drawn as the median over runs, with a band from the least to the greatest. "
        f"Lines of more than {LONG} values are running medians over {100 // SMOOTHING} % of them, drawn over the "
        "values or the band. A gap is a value that is not finite.</p>",
    ]
    drawn = [(picture, picture.png) for picture in pictures if picture.png]
    for section, group in groupby(drawn, key=lambda pair: pair[0].plot.section):
        parts += [f"<h3>{section}</h3><div class=plots>", *(_render_picture(*pair) for pair in group), "</div>"]
    if missing := [picture for picture in pictures if not picture.png]:
        items = "".join(f"<li>{escape(p.plot.title)}: {escape('; '.join(p.remarks))}</li>" for p in missing)
        parts.append(f"<h2>Not drawn</h2><ul>{items}</ul>")
    return "\n".join([*parts, "</body></html>\n"])


def _render_table(table: list[dict]) -> str:
    columns = ACCURACY_COLUMNS | RUN_COLUMNS
    several = len({source for arm in table for source in arm["accuracy"]}) > 1
    heads = ["<th class=text>arm", "<th>runs", *(["<th class=text>data source"] if several else [])]
    heads += [f'<th title="{escape(meaning)}">{escape(heading)}' for heading, meaning in columns.values()]
    rows = []
    for arm in table:
        sources = list(arm["accuracy"].items()) or [("", {})]
        span = f" rowspan={len(sources)}"
        for i, (source, accuracy) in enumerate(sources):
            row = [] if i else [f"<td class=text{span}>{escape(arm['label'])}", f"<td{span}>{len(arm['runs'])}"]
            row += [f"<td class=text>{escape(source).replace('/', '/<wbr>')}"] if several else []
            row += [f"<td>{_cell(accuracy.get(column), '.3f')}" for column in ACCURACY_COLUMNS]
            row += [] if i else [f"<td{span}>{_cell(arm[column], '.4g')}" for column in RUN_COLUMNS]
            rows.append("<tr>" + "".join(row))
    legend = "; ".join(f"<b>{escape(heading)}</b>: {escape(meaning)}" for heading, meaning in columns.values())
    return (
        f"<div class=wide><table><tr>{''.join(heads)}{''.join(rows)}</table></div>"
        "<p>Accuracies are shares. Several runs have their mean, and the range below it. –: the log doesn't say. "
        f"{legend}.</p>"
    )


def _cell(spread: dict | None, form: str) -> str:
    if spread is None or spread["mean"] is None:
        return "–"
    known = [value for value in spread["values"] if value is not None]
    text = f"{spread['mean']:{form}}"
    details = [f"{spread['min']:{form}} to {spread['max']:{form}}"] if spread["min"] < spread["max"] else []
    details += [f"{len(known)} run(s)"] if len(known) < len(spread["values"]) else []
    return text + (f"<small>{', '.join(details)}</small>" if details else "")


def _render_notes(table: list[dict]) -> str:
    items = []
    for arm in table:
        for run in arm["runs"]:
            notes = "".join(f"<li>{escape(note)}</li>" for note in run["notes"])
            steps = "steps {} to {}".format(*run["steps"]) if run["steps"] else "no training step"
            head = f"{escape(arm['label'])}: <code>{escape(run['path'])}</code>, {steps}"
            items.append(f"<li>{head}<ul>{notes}</ul></li>")
    return f"<h2>Logs</h2><ul>{''.join(items)}</ul>"


def _render_picture(picture: Picture, png: bytes) -> str:
    data = base64.b64encode(png).decode()
    names = ", ".join(f"<code>{escape(name)}</code>" for name in picture.metrics)
    remarks = "".join(f" <b>{escape(remark[0].upper() + remark[1:])}.</b>" for remark in picture.remarks)
    return (
        f"<figure{' class=all' if picture.wide else ''}><div{' class=wide' if picture.wide else ''}>"
        f'<img alt="{escape(picture.plot.title)}" src="data:image/png;base64,{data}"></div>'
        f"<figcaption>{escape(picture.plot.reading)} From {names}.{remarks}</figcaption></figure>"
    )


def _refuse_foreign_summary(path: Path) -> None:
    if not path.exists():
        return
    try:
        summary = json.loads(path.read_bytes())
    except ValueError:
        summary = None
    if not isinstance(summary, dict) or summary.get("format") != FORMAT:
        raise ReportError(f"{path} is not from a report and would be overwritten -> another --out")


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: first under a temporary name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
