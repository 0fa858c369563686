# SPDX-License-Identifier: Apache-2.0
"""The machinery behind the index of patches: what an entry says, how it is applied, and what became of it.

A patch is a function that carries `@patches(NAME)`, where NAME is its entry in the index. It returns whether it changed
anything. Nothing here imports verl or torch, because every process of a run loads it.
"""

import functools
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Literal, ParamSpec

from verl_gndpo.versions import judge, version_of

Where = Literal["every process", "actor", "trainer", "without accelerator", "vLLM without accelerator"]
"""The processes that a patch belongs to. "actor" and "trainer" mean those of a run that uses our estimators."""

_P = ParamSpec("_P")


@dataclass(frozen=True)
class Patch:
    """One entry of the index: one change to code that is not ours."""

    name: str
    """Identifies the entry."""

    module: str
    """The module whose code is changed. An import hook waits for it."""

    changes: str
    """What is changed in it."""

    applied_by: str
    """The function that changes it, as "module:function"."""

    breaks: str
    """What goes wrong without the patch, in one sentence."""

    since: str
    """The first version that needs it."""

    upstream: str
    """Issue or pull request, or "none known"."""

    remove_when: str
    """The version or the condition that makes the patch needless."""

    where: Where
    """The processes that it belongs to."""

    on_import: bool = True
    """True: it is given the module once that has been imported. False: our own code calls it."""

    diff: str | None = None
    """The upstream-ready diff with the same effect: its name in patches/verl-<version>/."""


_INDEX: dict[str, Patch] = {}
_HOOKED: set[str] = set()
_STATES: dict[str, str] = {}


def index(*entries: Patch) -> tuple[Patch, ...]:
    """Make `entries` the index.

    Raises:
        ValueError: two entries have the same name.
    """
    _INDEX.clear()
    for entry in entries:
        if entry.name in _INDEX:
            raise ValueError(f"two patches are called {entry.name}")
        _INDEX[entry.name] = entry
    return entries


def patches(name: str) -> Callable[[Callable[_P, bool]], Callable[_P, bool]]:
    """Make a function the one that applies the entry `name`.

    If the entry changes verl, the function does not run with a verl that is older than the tested ones. The version is
    that of the verl to which the first argument belongs, if that is a module, and else of the imported verl. With a
    verl that was not tested, a function that does not fit it leaves it as it is, with a warning. A function that finds
    a fix of verl's own returns False.

    Returns:
        A decorator for a function that returns whether it changed anything.
    """

    def decorate(change: Callable[_P, bool]) -> Callable[_P, bool]:
        @functools.wraps(change)
        def apply_checked(*args: _P.args, **kwargs: _P.kwargs) -> bool:
            entry = _INDEX[name]
            of_verl = entry.module.split(".")[0] == "verl"
            if of_verl:
                subject = args[0] if args and isinstance(args[0], ModuleType) else sys.modules["verl"]
                version = version_of(subject)
                if judge(version) == "too old":
                    _STATES[name] = "version differs"
                    return False
            try:
                changed = change(*args, **kwargs)
            # What the function changes is not where it was.
            except (AttributeError, ImportError) as error:
                if not of_verl or judge(version) == "tested":
                    raise
                _STATES[name] = "target has changed"
                warnings.warn(
                    f"verl-gndpo: {entry.module} of verl {version} is not what the patch {name} was written for "
                    f"({type(error).__name__}: {error}), so it is left out. Without it: {entry.breaks}",
                    stacklevel=2,
                )
                return False
            _STATES[name] = "applied" if changed else "not needed"
            return changed

        return apply_checked

    return decorate


def apply(*names: str) -> None:
    """Apply patches to their modules: now where a module has been imported, otherwise on its import.

    Repeated calls for the same patch have no effect.
    """
    # Here, because interpreters that only watch for torchvision and vLLM load this file when they start.
    from wrapt import register_post_import_hook

    for name in names:
        if name not in _HOOKED:
            _HOOKED.add(name)
            register_post_import_hook(_INDEX[name].applied_by, _INDEX[name].module)


def apply_all(where: Where) -> None:
    """Apply the patches that belong to all processes of one kind and wait for the import of a module."""
    apply(*(entry.name for entry in _INDEX.values() if entry.where == where and entry.on_import))


def describe() -> list[dict[str, str]]:
    """Return the index with the state of each patch in this process, one dictionary per patch.

    The key `state` is one of:
        "applied";
        "not needed": it belongs to other processes, or there was nothing to change, as in a verl with a fix of its own;
        "version differs": verl is older than the versions that were tested;
        "target has changed": this verl is not one of those tested, and the patch does not fit it;
        "waits for MODULE": this process has not imported the module yet.
    """
    rows = []
    for entry in _INDEX.values():
        waiting = f"waits for {entry.module}" if entry.name in _HOOKED else "not needed"
        rows.append(
            {
                "name": entry.name,
                "state": _STATES.get(entry.name, waiting),
                "where": entry.where,
                "changes": f"{entry.module}: {entry.changes}",
                "breaks": entry.breaks,
                "since": entry.since,
                "upstream": entry.upstream,
                "remove_when": entry.remove_when,
                "diff": entry.diff or "none",
            }
        )
    return rows


def replace(module: ModuleType, name: str, function: Callable) -> None:
    """Replace `module.name`, also in verl's modules that have bound it by `from module import name`."""
    original = getattr(module, name)
    setattr(module, name, function)
    # Another plugin, loaded before this one, may have imported verl's workers.
    for importer_name, importer in list(sys.modules.items()):
        # vars(): getattr on a lazily loaded package would import what it looks for.
        if importer_name.startswith("verl.") and vars(importer).get(name) is original:
            setattr(importer, name, function)
