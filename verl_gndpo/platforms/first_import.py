# SPDX-License-Identifier: Apache-2.0
"""Prepares the import of a module that may never be imported. Every interpreter may load this file when it starts."""

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any


class FirstImport(MetaPathFinder):
    """Calls `prepare` when somebody first looks for `module`. It finds no module itself."""

    def __init__(self, module: str, prepare: Callable[[], object]) -> None:
        self.module = module
        self.prepare = prepare
        self.asked = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name == self.module:
            self.asked = True
            sys.meta_path.remove(self)
            self.prepare()
        return None

    def watch(self) -> bool:
        """Watch for the import. Idempotent.

        Returns:
            False if the module had been imported before it could be watched for.
        """
        if not self.asked and self.module not in sys.modules and self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        return self.asked or self in sys.meta_path
