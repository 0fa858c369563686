# SPDX-License-Identifier: Apache-2.0
"""Make torchvision importable in every interpreter of this environment.

Run it once: `python -m verl_gndpo.platforms.every_interpreter`. verl's plugin does the same in processes that import
verl. But a script that only loads a model with transformers imports torchvision without it.
"""

import sysconfig
from pathlib import Path

NAME = "verl_gndpo_torchvision.pth"
"""Python runs this file when it starts. It comes after those of editable installs, which are read in order of names."""

# One line, as a .pth file requires. The package may have been removed since.
CODE = (
    "import importlib.util as u; u.find_spec('verl_gndpo') and "
    "__import__('verl_gndpo.platforms.torchvision_ops', fromlist=['install']).install()\n"
)


def install(folder: Path) -> Path:
    """Write the file into a folder for packages, and return its path."""
    path = folder / NAME
    path.write_text(CODE)
    return path


if __name__ == "__main__":
    install(Path(sysconfig.get_path("purelib")))
