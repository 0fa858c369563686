# SPDX-License-Identifier: Apache-2.0
"""Write docs/settings.md from the declarations in verl_gndpo/config.py and of the registered bounds.

python docs/make_settings.py
"""

import json
from pathlib import Path

from verl_gndpo.advantage import BOUNDS
from verl_gndpo.config import StudentSection, TeacherSection, declared_settings, default_groups, gndpo_section
from verl_gndpo.presets import PRESETS, RECIPE
from verl_gndpo.setting import Setting

PAGE = Path(__file__).with_name("settings.md")
GROUPS = {"algorithm.gndpo": ("gndpo", "default"), "teacher": ("teacher", "worker"), "student": ("student", "default")}
"""The group of Hydra with the defaults of each section."""

HEAD = """\
# Settings

`python docs/make_settings.py` writes this page from `verl_gndpo/config.py` and from the bounds in
`verl_gndpo/advantage.py`, where each setting is declared once.

`algorithm.adv_estimator` names a preset:

{presets}.

With any other estimator verl behaves as if this plugin were not installed, unless `student.share_prompts=True`.

`+recipe=gndpo` brings the whole published method into a config, estimator included; its table is below.
`+gndpo=default`, `+teacher=worker` (or `+teacher=server`) and `+student=default` bring all settings of this project's
sections. Without these groups, put a `+` before a key that is new to the config: `+teacher.model.path=...`.

An unknown key is an error that names the nearest known one. A value out of range is an error before anything is
started.

What a config gives wins over the preset, setting by setting.
"""


def table(section: str, schema: type, head: str) -> str:
    """Return the settings of a section as a Markdown table."""
    lines = [f"## `{section}`", "", head, "", "| key | default | allowed | meaning |", "|---|---|---|---|"]
    for key, declared in declared_settings(section, schema).items():
        allowed = declared.range.replace("|", "\\|")
        name = key.removeprefix(f"{section}.")
        lines.append(f"| `{name}` | {default(key, declared)} | {allowed} | {meaning(key, declared)} |")
    return "\n".join(lines) + "\n"


def default(key: str, declared: Setting) -> str:
    """Return the value in a config that does not give the setting, as YAML; behind it, the one that null stands for."""
    section = next(section for section in GROUPS if key.startswith(f"{section}."))
    value: object = default_groups()[GROUPS[section]]
    for part in key.removeprefix(f"{section}.").split("."):
        value = value.get(part, declared.default) if isinstance(value, dict) else declared.default
    given = f"`{json.dumps(value)}`"
    return f"{given} (`{json.dumps(declared.default)}`)" if value is None and declared.default is not None else given


def meaning(key: str, declared: Setting) -> str:
    """Return the documentation of a setting in one line."""
    name = key.removeprefix("algorithm.gndpo.")
    bounds = [bound for bound, known in BOUNDS.items() if known.parameters.get(name) == declared]
    prefix = f"With bound={', '.join(bounds)}: " if bounds and key.startswith("algorithm.gndpo.") else ""
    doc = declared.doc[0].lower() + declared.doc[1:] if prefix else declared.doc
    return prefix + doc + (f" null: {declared.null}." if declared.null else "")


RECIPE_HEAD = """\
The settings of verl in the published runs that define the update of a batch. The override wins over config files and
over what stands before it in a command, and what stands after it wins over it. In the defaults list of your own config
file, write `recipe: gndpo`. `verl-gndpo doctor` lists every difference of a config. Batch size, learning rate, lengths
and the frozen vision tower are in `examples/run_qwen2_5vl_gndpo.sh`.
"""


def recipe() -> str:
    """Return the published recipe as a Markdown table."""
    lines = ["## `+recipe=gndpo`", "", RECIPE_HEAD, "| key | published |", "|---|---|"]
    for key, value in RECIPE.items():
        text = value if isinstance(value, str) else json.dumps(value)
        lines.append(f"| `{key}` | `{text}` |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """Return the whole page."""
    presets = ", ".join(f"`{name}`" for name in PRESETS)
    signal = (
        "How the teacher-student log-ratio becomes an advantage: [signal.md](signal.md) has the formulas. A default in "
        "brackets is what null stands for unless the preset says otherwise."
    )
    teacher = "What scores the student's tokens, and where: [teacher.md](teacher.md)."
    student = "How the actor's passes over a batch are laid out: [student.md](student.md)."
    return "\n".join(
        [
            HEAD.format(presets=presets),
            recipe(),
            table("algorithm.gndpo", gndpo_section(), signal),
            table("teacher", TeacherSection, teacher),
            table("student", StudentSection, student),
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(page())
