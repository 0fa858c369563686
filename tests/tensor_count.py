# SPDX-License-Identifier: Apache-2.0
"""Count the bytes of the tensors that exist during a pass, on tensors without storage."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorCount(TorchDispatchMode):
    """Counts the bytes of all storages that appear within this context, and forgets each that is freed."""

    def __init__(self, known: Iterable[torch.Tensor] = ()):
        """
        Args:
            known: tensors whose storages do not count, such as weights.
        """
        super().__init__()
        self.peak = 0
        self.now = 0
        self._alive = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and count what it returns."""
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        self._alive[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)
