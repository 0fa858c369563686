# SPDX-License-Identifier: Apache-2.0
"""Write docs/models.md: how each architecture of the tests' zoo is scored as a teacher.

python docs/make_models.py
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
OUTPUT = ROOT / "docs" / "models.md"

HEAD = """# Architectures of teachers

How a teacher of each architecture is scored: the outcome of the trial (`teacher.sharing=auto`) with random models of
transformers {version}. `tests/integration/test_zoo.py` compares every one of them with plain forward passes of
transformers' own class: the log-probs agree within 1e-4 nats in float32. An architecture that is not listed is tried in
the same way before a run, and `verl-gndpo doctor` says what comes of it.

- **attention**: the responses to a prompt stand behind it in one row. The fastest way.
- **cache**: the prompt runs once into the model's own cache, which is copied for its responses.
- **none**: each response runs with its own prompt, beside others of similar length, or alone where the model mixes
  rows.

`python docs/make_models.py` writes this page.

| architecture | images | prompts are shared through | why not faster |
|---|---|---|---|
"""


def render(checkpoint: Callable[[str], Path]) -> str:
    """Return the page.

    Args:
        checkpoint: returns the folder of a member of the zoo.
    """
    import transformers

    from tests import zoo
    from verl_gndpo.teacher.architecture import try_teacher

    lines = []
    for name in sorted(zoo.ZOO):
        path = checkpoint(name)
        config = transformers.AutoConfig.from_pretrained(path, attn_implementation=zoo.attention_of(name))
        verdict = try_teacher(config, str(path), sharing="auto", trust_remote_code=False)
        reasons = "; ".join(f"{way}: {_short(reason, path)}" for way, reason in verdict.reasons.items())
        sees = "yes" if name in zoo.IMAGE_FAMILIES else ""
        lines.append(f"| {name} (`{config.architectures[0]}`) | {sees} | {verdict.sharing} | {reasons} |")
    return HEAD.format(version=transformers.__version__) + "\n".join(lines) + "\n"


def _short(reason: str, path: Path) -> str:
    """Return a reason without the type of its exception, the folder's name, and digits that depend on the machine."""
    if reason.startswith("log-probs differ"):
        return "other log-probs"
    return reason.split(": ", 1)[-1].replace(f"{path} has", "it has")


def main() -> None:
    import verl  # noqa: F401  loads the plugin

    from tests import zoo

    with tempfile.TemporaryDirectory() as folder:
        OUTPUT.write_text(render(lambda name: zoo.build(name, Path(folder) / name)))


if __name__ == "__main__":
    main()
