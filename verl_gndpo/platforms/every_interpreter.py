# SPDX-License-Identifier: Apache-2.0
"""Make torchvision and the command `vllm` usable in every interpreter of an environment without an accelerator.

Run it once: `python -m verl_gndpo.platforms.every_interpreter`. verl's plugin does the same in processes that import
verl. But a script that only loads a model with transformers imports torchvision without it, and `vllm serve` vLLM.
"""

import sysconfig
from pathlib import Path

from verl_gndpo.platforms import torchvision_ops, vllm_cpu

NAME = "verl_gndpo_imports.pth"
"""Python runs this file when it starts. It comes after those of editable installs, which are read in order of names."""

# One line, as a .pth file requires. The package may have been removed since.
CODE = (
    "import importlib.util as u; u.find_spec('verl_gndpo') and "
    "__import__('verl_gndpo.platforms.every_interpreter', fromlist=['watch']).watch()\n"
)


def watch() -> None:
    """Prepare the imports of torchvision and vLLM in this process, if they come. Idempotent."""
    torchvision_ops.install()
    vllm_cpu.watch()


def install(folder: Path) -> Path:
    """Write the file into a folder for packages, and return its path."""
    path = folder / NAME
    path.write_text(CODE)
    return path


if __name__ == "__main__":
    install(Path(sysconfig.get_path("purelib")))
