# SPDX-License-Identifier: Apache-2.0
"""Write the memory tables of docs/teacher.md from verl_gndpo/plan.py.

python docs/make_memory.py
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before transformers, because the plugin makes torchvision importable on machines without an accelerator.
import verl  # noqa: F401

from verl_gndpo.plan import GB, Machine, ModelSize, Plan, Run, make_plan, measure, title

PAGE = Path(__file__).with_name("teacher.md")

# Of Qwen2.5-VL by size: hidden size, layers, heads, heads of keys, feed-forward width, vocabulary, whether embeddings
# are tied, feed-forward width of the vision tower; as in the config.json of the released checkpoints.
SIZES = {
    "3B": (2048, 36, 16, 2, 11008, 151936, True, 3420),
    "7B": (3584, 28, 28, 4, 18944, 152064, False, 3420),
    "32B": (5120, 64, 40, 8, 27648, 152064, False, 3456),
    "72B": (8192, 80, 64, 8, 29568, 152064, False, 3456),
}
PAIRS = (("3B", "7B"), ("7B", "32B"), ("7B", "72B"))
MACHINES = {"1 x 80 GB": (1, 1), "4 x 80 GB": (4, 1), "8 x 80 GB": (8, 1), "2 nodes of 8 x 80 GB": (8, 2)}


def config(size: str) -> Any:
    """Return the config of a released Qwen2.5-VL."""
    from transformers import Qwen2_5_VLConfig

    hidden, layers, heads, shared, inner, vocabulary, tied, tower = SIZES[size]
    return Qwen2_5_VLConfig(
        tie_word_embeddings=tied,
        text_config={
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": shared,
            "vocab_size": vocabulary,
            "max_position_embeddings": 128000,
            "rope_scaling": {"rope_type": "default", "type": "mrope", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
            "tie_word_embeddings": tied,
        },
        vision_config={"depth": 32, "hidden_size": 1280, "intermediate_size": tower, "num_heads": 16}
        | {"out_hidden_size": hidden},
    )


def tables() -> dict[str, str]:
    """Return each table as Markdown, by the name of its place on the page."""
    models = {size: measure(config(size), size) for size in SIZES}
    return {"eight GPUs": _eight_gpus(models), "placements": _placements(models)}


def _plan(models: dict[str, ModelSize], pair: tuple[str, str], gpus: int, nodes: int) -> Plan:
    student, teacher = (models[size] for size in pair)
    return make_plan(student, teacher, Machine(gpus, nodes, 80 * GB), Run())


def _eight_gpus(models: dict[str, ModelSize]) -> str:
    columns: dict[str, Callable[[dict[str, dict[str, float]], dict[str, float], dict[str, float]], float]] = {
        "actor's states": lambda p, _, __: p["score"]["student's weights"] + p["score"]["optimizer states"],
        "CUDA contexts": lambda p, _, __: p["score"]["CUDA contexts"],
        "teacher's weights": lambda p, _, __: p["score"]["teacher's weights"],
        "gathered": lambda p, _, __: p["score"]["gathered weights"],
        "activations and logits": lambda p, _, __: p["score"]["activations"] + p["score"]["logits"],
        "**in all, scoring**": lambda p, _, __: sum(p["score"].values()),
        "**in all, update**": lambda p, _, __: sum(p["update"].values()),
        "host, between calls": lambda _, host, __: sum(host.values()),
        "host, at the start": lambda _, __, start: sum(start.values()),
    }
    lines = [f"| student <- teacher | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for pair in PAIRS:
        # The first one: colocated, with the actor on the GPUs.
        placement = _plan(models, pair, 8, 1).placements[0]
        cells = [f"{of(placement.phases, placement.host, placement.host_start) / GB:.1f}" for of in columns.values()]
        lines.append(f"| {' <- '.join(pair)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _placements(models: dict[str, ModelSize]) -> str:
    lines = [f"| GPUs | {' | '.join(' <- '.join(pair) for pair in PAIRS)} |", "|---" * (len(PAIRS) + 1) + "|"]
    for name, (gpus, nodes) in MACHINES.items():
        cells = []
        for pair in PAIRS:
            plan = _plan(models, pair, gpus, nodes)
            fitting: dict[str, str] = {}
            for placement in plan.placements:
                if placement.fits:
                    fitting.setdefault(placement.settings["teacher.placement"], title(placement))
            phase, missing = max(plan.chosen.short.items(), key=lambda item: item[1], default=("", 0.0))
            cells.append("; or ".join(fitting.values()) or f"no: {phase} lacks {missing / GB:.0f} GB")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """Return the page's text with the tables of today.

    Raises:
        SystemExit: the page has no place for a table.
    """
    for name, table in tables().items():
        place = re.compile(rf"(<!-- make_memory\.py: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = place.subn(lambda found: f"{found[1]}{table}\n{found[2]}", text)  # noqa: B023
        if count != 1:
            sys.exit(f"{PAGE} has {count} places for the table {name!r}")
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
