"""Tensors on the CPU that say they are on ``cuda:0``: what mixes them with others fails, as it would on a GPU.

No GPU is at hand, and a test on the CPU sees no tensor that was left behind. Here operators of both kinds of tensors,
generators of the CPU and conversions to numpy raise. Kernels, autocast, streams and memory are not imitated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._pytree import tree_leaves, tree_map

from nemo_llm_feedback.asr.likelihood import autograd

DEVICE = torch.device("cuda:0")
ATEN = torch.ops.aten
_COPIES = {ATEN.copy_.default, ATEN._to_copy.default, ATEN.set_.source_Tensor}
# Indices may be on the CPU.
_INDEXED = {ATEN.index.Tensor, ATEN._unsafe_index.Tensor, ATEN.index_put.default, ATEN.index_put_.default}
_INDEXED |= {ATEN._index_put_impl_.default, ATEN._unsafe_index_put.default}


class DeviceError(RuntimeError):
    """Two devices met."""


class FakeCuda(Tensor):
    """A tensor of the CPU behind a device of another name."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type, held: Tensor, requires_grad: bool = False) -> Any:
        layout: dict[str, Any] = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        layout |= {"dtype": held.dtype, "layout": held.layout, "device": torch.device("cpu")}
        made: Any = Tensor._make_wrapper_subclass(cls, held.size(), **layout, requires_grad=requires_grad)
        made.held = held.detach()
        return made

    def get_device(self) -> int:
        return 0

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise DeviceError("a tensor on cuda:0 is no numpy array")

    __array__ = numpy  # type: ignore[assignment]

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"FakeCuda({self.held!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return FakeCuda, (self.held.clone(), self.requires_grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copy = memo[id(self)] = FakeCuda(self.held.clone(), self.requires_grad)
            copy.__dict__.update({name: value for name, value in self.__dict__.items() if name != "held"})
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _check(func, args, kwargs)
        found = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if func is ATEN.copy_.default and not isinstance(args[0], FakeCuda):
            return args[0]
        if any(part.alias_info is not None and part.alias_info.is_write for part in func._schema.returns):
            written = [
                args[i] if i < len(args) else kwargs.get(argument.name)
                for i, argument in enumerate(func._schema.arguments)
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
            return written[0] if len(func._schema.returns) == 1 else tuple(written)
        return tree_map(_faked, found)


def _check(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Raises where a GPU would."""
    if getattr(kwargs.get("generator"), "device", DEVICE).type == "cpu":
        raise DeviceError(f"{func}: a generator of the CPU")
    checked = args
    if func in _INDEXED and isinstance(args[0], FakeCuda):
        checked = args[2:]
    plain = [t for t in tree_leaves((checked, kwargs)) if isinstance(t, Tensor) and not isinstance(t, FakeCuda)]
    if func not in _COPIES and any(tensor.dim() for tensor in plain):
        raise DeviceError(f"{func}: tensors on cuda:0 and on the CPU, of {[tuple(t.shape) for t in plain]}")


def _held(value: Any) -> Any:
    return value.held if isinstance(value, FakeCuda) else value


def _faked(value: Any) -> Any:
    return FakeCuda(value) if isinstance(value, Tensor) and not isinstance(value, FakeCuda) else value


class _ToCuda(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return FakeCuda(x.detach().clone())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _held(grads[0]).clone()


class _ToCPU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x.held.detach().clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _faked(grads[0])


def _moved(tensor: Tensor, *, cuda: bool) -> Any:
    if isinstance(tensor, FakeCuda) == cuda:
        return tensor
    return (_ToCuda if cuda else _ToCPU).apply(tensor)


def _is_cuda(device: Any) -> bool | None:
    """None of what is no device."""
    if isinstance(device, str):
        device = torch.device(device)
    return device.type == "cuda" if isinstance(device, torch.device) else None


class _Mode(TorchFunctionMode):
    """Sends what is made on, or moved to, ``cuda`` to fake tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        kwargs |= {"pin_memory": False} if kwargs.get("pin_memory") else {}
        if func is torch.autograd.grad:
            return _grad(func, args, kwargs)
        if name in _OWN:
            return _OWN[name](func, args, kwargs)
        place = _is_cuda(kwargs.get("device"))
        if place is not None:
            kwargs["device"] = torch.device("cpu")
        if place and getattr(kwargs.get("generator"), "device", DEVICE).type == "cpu":
            raise DeviceError(f"{name}: a generator of the CPU")
        if place is False and args and isinstance(args[0], FakeCuda):  # empty_like, new_zeros …
            args = (args[0].held, *args[1:])
        found = func(*args, **kwargs)
        fake = lambda t: FakeCuda(t.detach(), t.requires_grad)  # noqa: E731
        return tree_map(lambda t: fake(t) if type(t) is Tensor else t, found) if place else found


def _to(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensor, *rest = args
    other = kwargs.pop("other", None)
    rest += [other] if other is not None else []
    place = _is_cuda(kwargs.pop("device", None))
    left = []
    for value in rest:
        if isinstance(value, Tensor):
            place, value = isinstance(value, FakeCuda), value.dtype
        elif _is_cuda(value) is not None:
            place = _is_cuda(value)
            continue
        left.append(value)
    if place is not None:
        tensor = _moved(tensor, cuda=place)
    dtypes = [value for value in left if isinstance(value, torch.dtype)]
    dtypes += [kwargs["dtype"]] if kwargs.get("dtype") is not None else []
    copied = tensor.clone() if kwargs.get("copy") else tensor
    return func(copied, dtypes[0]) if dtypes else copied


def _numpy(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return args[0].numpy() if isinstance(args[0], FakeCuda) else func(*args, **kwargs)


def _stft(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Its operators ask for a device by the C++ name, which would be the CPU."""
    found = [isinstance(t, FakeCuda) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if any(found) and not all(found):
        raise DeviceError("stft: signal and window")
    result = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    return _faked(result) if any(found) else result


def _backward(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Autograd's engine, with the mode on inside."""
    loss, gradient, *_ = (*args, None)
    return _engine((loss,), kwargs.get("gradient", gradient), (), kwargs, allow_unreachable=True, accumulate_grad=True)


def _grad(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The same for ``torch.autograd.grad``."""
    given = dict(zip(("outputs", "inputs", "grad_outputs"), args, strict=False)) | kwargs
    outputs, inputs = (part if isinstance(part, Sequence) else (part,) for part in (given["outputs"], given["inputs"]))
    unused = bool(given.get("allow_unused"))
    gradients = given.get("grad_outputs")
    return _engine(tuple(outputs), gradients, tuple(inputs), given, allow_unreachable=unused, accumulate_grad=False)


def _engine(outputs: tuple[Any, ...], gradients: Any, inputs: Any, given: dict[str, Any], **options: Any) -> Any:
    with _Mode():
        found = gradients if isinstance(gradients, Sequence) else [gradients] * len(outputs)
        ones = tuple(torch.ones_like(y) if g is None else g for y, g in zip(outputs, found, strict=True))
        kept, created = bool(given.get("retain_graph")), bool(given.get("create_graph"))
        return _engine_run_backward(outputs, ones, kept, created, inputs, **options)


_OWN: dict[str, Callable[[Any, Any, dict[str, Any]], Any]] = {
    "to": _to,
    "cpu": lambda func, args, kwargs: _moved(args[0], cuda=False),
    "cuda": lambda func, args, kwargs: _moved(args[0], cuda=True),
    "pin_memory": lambda func, args, kwargs: args[0],
    "tolist": lambda func, args, kwargs: func(_held(args[0])),
    "numpy": _numpy,
    "stft": _stft,
    "backward": _backward,
}


def _no_inference(mode: bool = True) -> torch.no_grad:
    """In place of ``inference_mode``, which such tensors lack."""
    return torch.no_grad()


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Inside this context ``cuda`` is a device."""
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    nothing: Any = {"get_device_states": lambda *args: ([], [])}
    try:
        with (
            mock.patch.object(torch, "inference_mode", _no_inference),
            mock.patch.multiple(checkpoint, **nothing),
            mock.patch.multiple(torch.cuda, Stream=mock.DEFAULT, current_stream=mock.DEFAULT, stream=nullcontext),
            mock.patch.multiple(autograd, **nothing, set_device_states=lambda *args: None),
            _Mode(),
        ):
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)


class _Accelerator(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        """Takes any."""


def fake_trainer(**settings: Any) -> pl.Trainer:
    """A trainer on this device; used inside :func:`fake_cuda`."""
    strategy = SingleDeviceStrategy(device=DEVICE, accelerator=_Accelerator())
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "log_every_n_steps": 1, "num_sanity_val_steps": 0}
    return pl.Trainer(devices=1, strategy=strategy, **(quiet | settings))
