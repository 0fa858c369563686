# SPDX-License-Identifier: Apache-2.0
"""Write the page of an evaluation: self-contained, without scripts."""

import base64
from html import escape
from typing import Any

import pyarrow.parquet as pq

from verl_gndpo.evaluation.grading import Graded, Row
from verl_gndpo.evaluation.job import Answers
from verl_gndpo.report.page import STYLE

SHOWN = 30
"""Problems per data source that are shown because models answer them differently."""
BATCH = 16
"""Rows whose images are read at a time."""
CHARS = 1500
"""The end of an answer that is shown."""


def render(
    summary: dict[str, Any],
    by_source: dict[str, list[tuple[int, Row]]],
    graded: dict[str, dict],
    answers: dict[str, Answers],
) -> str:
    """Return the page as HTML.

    Args:
        summary: what summary.json holds.
        by_source: numbers and problems.
        graded: by model, then by data source.
        answers: by model.
    """
    settings = summary["settings"]
    asked = (
        "All problems." if settings["limit"] is None else f"Only the first {settings['limit']} problems of each file."
    )
    for label, server in settings["servers"].items():
        checked = "not compared with those" if label in settings["prompts_unchecked"] else "compared with those"
        asked += f" {label} answered on {server}; its prompts were {checked} of training."
    parts = [
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>verl-gndpo evaluation</title>'
        f"<style>{STYLE} pre {{ white-space: pre-wrap; }} .shown img {{ max-height: 16rem; }}</style></head><body>",
        f"<h1>{escape(', '.join(summary['models']))}</h1>",
        f"<p>{settings['n']} answer(s) per problem, temperature {settings['temperature']}, seed {settings['seed']}. "
        f"{escape(asked)} Accuracies are shares with 95 % intervals.</p>",
    ]
    for source, rows in by_source.items():
        parts.append(f"<h2>{escape(source)}</h2>")
        parts.append(_table({label: found[source] for label, found in summary["models"].items()}))
        parts.append(_compared([entry for entry in summary["comparisons"] if entry["source"] == source]))
        parts.append(_differing(rows, {label: found[source] for label, found in graded.items()}, answers))
    return "\n".join([*parts, "</body></html>\n"])


def _table(models: dict[str, dict]) -> str:
    lines: dict[str, list[str]] = {}

    def add(name: str, value: str) -> None:
        lines.setdefault(name, []).append(f"<td>{value}")

    for found in models.values():
        value, low, high = found["accuracy"]
        add(f"accuracy ({found['problems']} problems)", f"{value:.3f}<small>{low:.3f} to {high:.3f}</small>")
        for k, share in found["pass_at"].items():
            if k != "1":
                add(f"pass@{k}", f"{share:.3f}")
        for breakdown, name, share, count in found["figures"]:
            add(f"{breakdown}: {name} ({count})" if breakdown else f"{name} ({count})", f"{share:.3f}")
        add("form <think>…</think>…\\boxed{}", f"{found['format']:.3f}")
        add("tokens per answer, mean", f"{found['tokens_mean']:.0f}")
        add("cut off at the limit", f"{found['truncated']:.3f}")
        add("no answer found", f"{found['no_answer_found']:.3f}")
        add("prompts too long, counted as wrong", str(found["prompts_too_long"]))
    head = "".join(f"<th>{escape(label)}" for label in models)
    body = "".join(f"<tr><td class=text>{escape(name)}{''.join(cells)}" for name, cells in lines.items())
    return f"<div class=wide><table><tr><th class=text>{head}{body}</table></div>"


def _compared(entries: list[dict]) -> str:
    if not entries:
        return ""
    rows = "".join(
        f"<tr><td class=text>{escape(entry['second'])} − {escape(entry['first'])}"
        f"<td>{entry['difference'][0]:+.3f}"
        f"<small>{entry['difference'][1]:+.3f} to {entry['difference'][2]:+.3f}</small>"
        f"<td>{entry['only_second']} / {entry['only_first']}<td>{entry['p']:.3g}<td>{entry['p_adjusted']:.3g}"
        f"<td class=text>{'different' if entry['different'] else 'not shown to differ'}"
        for entry in entries
    )
    return (
        "<h3>Differences</h3><div class=wide><table><tr><th class=text>models<th>difference<th>better / worse<th>p"
        f"<th>p, all comparisons<th class=text>verdict{rows}</table></div><p>Intervals are of the paired bootstrap. "
        "p is McNemar’s exact test for one answer, a sign-flip test for several or for related problems; "
        "then Holm’s.</p>"
    )


def _differing(rows: list[tuple[int, Row]], models: dict[str, Graded], answers: dict[str, Answers]) -> str:
    shares = {label: graded.acc.mean(axis=1) for label, graded in models.items()}
    places = [p for p in range(len(rows)) if len({float(share[p]) for share in shares.values()}) > 1]
    if not places:
        return ""
    # Of several answers, the greatest differences first.
    places.sort(key=lambda p: min(s[p] for s in shares.values()) - max(s[p] for s in shares.values()))
    parts = [f"<h3>Answered differently: {len(places)}, {min(SHOWN, len(places))} shown</h3>"]
    images = _images([rows[place][1] for place in places[:SHOWN]])
    for place in places[:SHOWN]:
        number, row = rows[place]
        pictures = "".join(f'<img src="data:{kind};base64,{data}">' for kind, data in images[row.file, row.place])
        shown = []
        for label in models:
            texts = [answer["text"] for answer in answers[label][number]["answers"]]
            shown.append(
                f"<details><summary>{escape(label)}: {shares[label][place]:.2f}</summary>"
                f"<pre>{escape(texts[0][-CHARS:] if texts else '(not asked)')}</pre></details>"
            )
        question = str(row.info.get("question") or "")
        parts.append(
            f"<div class=shown><h4>{escape(row.problem.id)}</h4>{pictures}<p>{escape(question)}</p>"
            f"<p><b>Truth:</b> {escape(str(row.truth))}</p>{''.join(shown)}</div>"
        )
    return "".join(parts)


def _images(rows: list[Row]) -> dict[tuple[str, int], list[tuple[str, str]]]:
    """Return types and base64 texts of the images of problems, by file and place. Few rows are in memory at a time."""
    found: dict[tuple[str, int], list[tuple[str, str]]] = {(row.file, row.place): [] for row in rows}
    for path in {row.file for row in rows}:
        with pq.ParquetFile(path) as file:
            if "images" not in file.schema_arrow.names:
                continue
            place = 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if not any((path, wanted) in found for wanted in range(place, place + count)):
                    place += count
                    continue
                for batch in file.iter_batches(BATCH, row_groups=[group], columns=["images"]):
                    for images in batch["images"]:
                        if (path, place) in found:
                            found[path, place] = _as_data(images.as_py() or [])
                        place += 1
    return found


def _as_data(images: list[Any]) -> list[tuple[str, str]]:
    held = [image["bytes"] for image in images if isinstance(image, dict) and image.get("bytes")]
    return [("image/png" if data[:4] == b"\x89PNG" else "image/jpeg", base64.b64encode(data).decode()) for data in held]
