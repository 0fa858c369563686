# SPDX-License-Identifier: Apache-2.0
"""An accelerator in name only: tensors that say that they are on "cuda", compute on the host, and tell of each wait.

Code that runs on them meets what it would meet on a GPU, with real numbers: an operation on tensors of both kinds
fails, a branch for CUDA is taken, and whatever makes the host wait for the device is recorded with the line that did
it. It is no GPU: kernels, precision and timing are those of the CPU, and autocast does nothing.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd.graph import _engine_run_backward
from torch.nn.attention.bias import CausalBias
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
PACKAGE = Path(__file__).resolve().parents[1] / "verl_gndpo"

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense.default,
    aten.bincount.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.nonzero_numpy.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
}
"""Operations whose result the host has to see, or whose shape depends on values."""


COPYING = {aten.copy_.default, aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
"""Operations that take tensors of the host and copy them to the device, or back."""


class DeviceMismatchError(RuntimeError):
    """An operation got tensors of the host and of the device."""


@dataclass(frozen=True)
class Wait:
    """One time that the host waits for the device."""

    what: str
    """Name of the operation; "upload" for a copy to the device."""

    file: str
    """Of the innermost line that is not torch's."""

    line: int

    @property
    def ours(self) -> bool:
        """Return whether the line belongs to this project."""
        return PACKAGE in Path(self.file).parents


class DeviceTensor(torch.Tensor):
    """A tensor that says that it is on the device. To C++ it is on the host, where it computes."""

    inner: torch.Tensor
    waits: list[Wait]

    @staticmethod
    def __new__(cls, inner: torch.Tensor, waits: list[Wait]) -> "DeviceTensor":
        shape = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, inner.size(), **shape, device="cpu")
        tensor.inner, tensor.waits = inner.detach(), waits
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:
        return DEVICE

    @property
    def is_cuda(self) -> bool:
        return True

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec)

    def __repr__(self) -> str:
        return f"DeviceTensor({self.inner})"

    @classmethod
    def __torch_dispatch__(
        cls, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        waits = next(x.waits for x in tensors if isinstance(x, DeviceTensor))
        # As on a GPU, a number in a tensor of the host may take part, and indices of the host are copied to the device.
        of_host = any(not isinstance(x, DeviceTensor) and x.dim() for x in tensors)
        crossing = of_host and function in COPYING
        if of_host and not crossing:
            raise DeviceMismatchError(f"{function} got tensors on cuda and on the host: {_line()}")
        if crossing or function in WAITING or _waits_for_shape(function, args, kwargs):
            _record(waits, str(function))

        def of_device(x: Any) -> Any:
            return x.inner if isinstance(x, DeviceTensor) else x

        inner_args, inner_kwargs = tree_map(of_device, args), tree_map(of_device, kwargs)
        if function is aten.mm.dtype:
            # Which the CPU does not have.
            one, other, dtype = inner_args
            out = one.to(dtype) @ other.to(dtype)
        else:
            out = function(*inner_args, **inner_kwargs)
        out = tree_map(lambda x: DeviceTensor(x, waits) if isinstance(x, torch.Tensor) else x, out)
        return return_and_correct_aliasing(function, args, kwargs, out)


def _waits_for_shape(function: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Return whether an operation has a result whose shape depends on values that it is given."""
    if function is aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    if function in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
        by_mask = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        # A single value is filled in where the mask is true, whatever their number.
        return by_mask and (function is aten.index.Tensor or args[2].numel() != 1)
    return False


def _frame() -> Any:
    """Return the innermost frame that is neither torch's nor of this file."""
    frame = sys._getframe(1)
    while frame is not None and (frame.f_code.co_filename == __file__ or "/torch/" in frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def _line() -> str:
    frame = _frame()
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _record(waits: list[Wait], what: str) -> None:
    frame = _frame()
    waits.append(Wait(what, frame.f_code.co_filename, frame.f_lineno))


def _is_device(value: Any) -> bool:
    if isinstance(value, bool) or value is None:
        return False
    if isinstance(value, int):
        return True
    return isinstance(value, str | torch.device) and torch.device(value).type == "cuda"


class EmulatedDevice(TorchFunctionMode):
    """Within this context there is a device "cuda". `waits` lists each time that the host waited for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []

    def wrap(self, tensor: torch.Tensor) -> DeviceTensor:
        """Return a tensor of the host as one of the device, with the same memory."""
        return tensor if isinstance(tensor, DeviceTensor) else DeviceTensor(tensor, self.waits)

    def move(self, model: torch.nn.Module) -> None:
        """Move a model's parameters and buffers to the device. Tied parameters stay tied."""
        moved: dict[int, torch.nn.Parameter] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    if id(parameter) not in moved:
                        new = torch.nn.Parameter(self.wrap(parameter.detach()), parameter.requires_grad)
                        moved[id(parameter)] = new
                    module._parameters[name] = moved[id(parameter)]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = self.wrap(buffer)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        subject = args[0] if args else None
        if function is torch.Tensor.backward:
            # It runs functions of autograd and checkpoints, which belong to this context, too.
            gradient = torch.ones_like(subject)
            with self:
                return _engine_run_backward(
                    (subject,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True
                )
        if name in ("to", "cuda", "cpu") and isinstance(subject, torch.Tensor):
            return self._move(function, name, subject, list(args[1:]), kwargs)
        if isinstance(subject, DeviceTensor):
            if name == "tolist":
                _record(self.waits, "tolist")
                return subject.inner.tolist()
            if name == "numpy":
                raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
            if name == "new_tensor":
                _record(self.waits, "upload")
                return self.wrap(function(subject.inner, *args[1:], **kwargs))
        if name == "scaled_dot_product_attention":
            args = tuple(self._mask(x, args[0]) for x in args)
            kwargs = {key: self._mask(x, args[0]) for key, x in kwargs.items()}
        if _is_device(kwargs.get("device")):
            kwargs["device"] = "cpu"
            if name in ("tensor", "as_tensor"):
                _record(self.waits, "upload")
            if not any(isinstance(x, DeviceTensor) for x in tree_leaves((args, kwargs))):
                return self.wrap(function(*args, **kwargs))
        return function(*args, **kwargs)

    def _mask(self, value: Any, query: torch.Tensor) -> Any:
        """Return a mask in name only as one that can be computed with."""
        if not isinstance(value, CausalBias):
            return value
        with torch._C.DisableTorchFunction():
            mask = value._materialize(torch.device("cpu"))
        return self.wrap(mask) if isinstance(query, DeviceTensor) else mask

    def _move(self, function: Any, name: str, tensor: torch.Tensor, args: list, kwargs: dict[str, Any]) -> Any:
        """Run `Tensor.to`, `cuda` or `cpu`."""
        targets = [x for x in (*args[:1], kwargs.pop("device", None)) if not isinstance(x, torch.dtype | bool)]
        target = next((x for x in targets if x is not None), None)
        if isinstance(target, torch.Tensor):
            kwargs.setdefault("dtype", target.dtype)
            target = target.device
            args = []
        elif target is not None and args and args[0] is target:
            args = args[1:]
        if name != "to":
            target, args, kwargs = name, [], {}
        on_device = isinstance(tensor, DeviceTensor)
        wanted = on_device if target is None else _is_device(target)
        convert = torch.Tensor.to
        if wanted == on_device:
            # To the same device; only the type may change.
            return convert(tensor, *args, **kwargs) if args or kwargs else tensor
        kwargs.pop("non_blocking", None)
        if wanted:
            _record(self.waits, "upload")
            inner = convert(tensor, *args, **kwargs) if args or kwargs else tensor.clone()
            return self.wrap(inner)
        _record(self.waits, "download")
        return convert(tensor.inner, *args, **kwargs) if args or kwargs else tensor.inner.clone()


@contextmanager
def emulated_device() -> Iterator[EmulatedDevice]:
    """Have a device "cuda" within this context."""
    with EmulatedDevice() as device:
        yield device
