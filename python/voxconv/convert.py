# SPDX-License-Identifier: Apache-2.0
"""Put voxconv's layers in place of torch's in a finished model, and back.

Only the class of a layer changes: its parameters, hooks, buffers, mode and state_dict keys are the
very same objects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from . import nn
from ._dispatch import use_backend
from ._geometry import paddings, pairs, span, triple
from .explain import explain

_SWAPS: dict[type[Module], type[Module]] = {
    torch.nn.Conv3d: nn.Conv3d,
    torch.nn.ConvTranspose3d: nn.ConvTranspose3d,
}
_REVERTS: dict[type[Module], type[Module]] = {
    nn.Conv3d: torch.nn.Conv3d,
    nn.DepthwiseConv3d: torch.nn.Conv3d,
    nn.ConvTranspose3d: torch.nn.ConvTranspose3d,
}
_NAMES_SHOWN = 3


@dataclass(frozen=True)
class Layer:
    """One convolution of a model: its name there, its arguments, and what was decided and why."""

    name: str
    text: str
    reason: str


@dataclass(frozen=True)
class ConvertReport:
    """What `convert` or `revert` did; print it for a table.

    Attributes:
        action: "convert" or "revert".
        swapped: layers that changed class; `reason` is what runs them now.
        left: layers that did not; `reason` says why.
        dry_run: True if nothing was changed, only decided.
    """

    action: str
    swapped: tuple[Layer, ...]
    left: tuple[Layer, ...]
    dry_run: bool = False

    @property
    def total(self) -> int:
        """The number of 3-D convolutions in the model."""
        return len(self.swapped) + len(self.left)

    def __str__(self) -> str:
        verb = "would be swapped" if self.dry_run else "swapped"
        lines = [
            f"voxconv.{self.action}: {len(self.swapped)} of {self.total} 3-D convolutions {verb}"
        ]
        if self.swapped:
            lines += [
                "",
                f"{verb}:",
                *_table(self.swapped, lambda layer: (layer.text, layer.reason)),
            ]
        if self.left:
            lines += ["", "left as they are:", *_table(self.left, lambda layer: (layer.reason,))]
        return "\n".join(lines)


def _table(layers: Iterable[Layer], kind: Callable[[Layer], tuple[str, ...]]) -> list[str]:
    """A line for each kind of layer: how many, what kind, names."""
    kinds: dict[tuple[str, ...], list[str]] = {}
    for layer in layers:
        kinds.setdefault(kind(layer), []).append(layer.name or "(the model itself)")
    rows = []
    for words, names in kinds.items():
        more = len(names) - _NAMES_SHOWN
        shown = ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
        rows.append((f"{len(names)} x", *words, shown))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            ["", *(f"{text:{width}}" for text, width in zip(row, widths, strict=True))]
        ).rstrip()
        for row in rows
    ]


def convert(
    model: Module,
    *,
    dry_run: bool = False,
    everything: bool = False,
    only: Callable[[str, Module], bool] | None = None,
) -> ConvertReport:
    """Swap the 3-D convolutions of a model, in place, for those of `voxconv.nn`.

    By default only layers are swapped of which a voxconv kernel would run a pass, forward or
    backward, of an NCDHW input some 32 cells wide; what runs is decided again at every call, for
    the input that it gets. Left alone, with the reason in the report: subclasses of torch's layers,
    layers whose forward was replaced, lazy layers that have not seen an input, layers with
    arguments or parameters that voxconv refuses. Converting twice changes nothing.

    Equivalent to: `module.__class__ = voxconv.nn.Conv3d` for each `torch.nn.Conv3d`, and likewise
    for `ConvTranspose3d`.

    Args:
        model: any module; a lone convolution too.
        dry_run: decide and report, change nothing.
        everything: swap also layers that voxconv would hand to torch.
        only: `only(name, layer)` returning False leaves a layer alone.

    Returns:
        The report.

    Raises:
        TypeError: `model` is not a module, or is a scripted one.
    """

    def decide(name: str, layer: _ConvNd) -> tuple[type[Module] | None, str]:
        kind = _kind(layer)
        if kind in _REVERTS:
            return None, "voxconv's already"
        refusal = _refusal(layer, kind, _SWAPS)
        if refusal:
            return None, refusal
        if only is not None and not only(name, layer):
            return None, "ruled out by `only`"
        try:
            ours, runs = _who_runs(layer)
        except (TypeError, ValueError) as error:  # what its every call would raise
            return None, f"voxconv refuses it: {error}"
        return (_SWAPS[kind] if ours or everything else None), runs

    return _walk("convert", model, decide, dry_run)


def revert(model: Module, *, dry_run: bool = False) -> ConvertReport:
    """Swap the layers of `voxconv.nn`, in place, for torch's: the model no longer needs voxconv.

    This undoes `convert`, and takes back layers that were voxconv's from the start as well. Layers
    with arguments that torch has not (pairs of padding, "same" with a stride, an activation) are
    left.

    Equivalent to: `module.__class__ = torch.nn.Conv3d` for each `voxconv.nn.Conv3d` or
    `DepthwiseConv3d`, and likewise for `ConvTranspose3d`.

    Args:
        model: any module; a lone convolution too.
        dry_run: decide and report, change nothing.

    Returns:
        The report; torch's own layers are not in it.

    Raises:
        TypeError: `model` is not a module, or is a scripted one.
    """

    def decide(name: str, layer: _ConvNd) -> tuple[type[Module] | None, str] | None:
        kind = _kind(layer)
        if not issubclass(kind, tuple(_REVERTS)):
            return None
        refusal = _refusal(layer, kind, _REVERTS)
        if not refusal and not nn.dense.torch_accepts(
            layer.padding, triple(layer.stride, "stride")
        ):
            refusal = "torch has no such padding"
        if not refusal and getattr(layer, "activation", None) is not None:
            refusal = "torch's layer has no activation"
        return (None, refusal) if refusal else (_REVERTS[kind], "torch")

    return _walk("revert", model, decide, dry_run)


def _walk(
    action: str,
    model: Module,
    decide: Callable[[str, _ConvNd], tuple[type[Module] | None, str] | None],
    dry_run: bool,
) -> ConvertReport:
    if not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"a scripted model is fixed: {action} the model it was scripted from")
    swapped, left, targets = [], [], []
    for name, layer in model.named_modules():
        if not isinstance(layer, (torch.nn.Conv3d, torch.nn.ConvTranspose3d)):
            continue
        decision = decide(name, layer)
        if decision is None:
            continue
        target, reason = decision
        entry = Layer(name, _text(layer), reason)
        if target is None:
            left.append(entry)
        else:
            swapped.append(entry)
            targets.append((layer, target))
    if not dry_run:
        for layer, target in targets:
            _set_class(layer, target)
    return ConvertReport(action, tuple(swapped), tuple(left), dry_run)


def _kind(layer: Module) -> type[Module]:
    """The class of a layer, below the one that parametrizations put on top."""
    return parametrize.type_before_parametrizations(layer)


def _refusal(
    layer: _ConvNd, kind: type[Module], known: dict[type[Module], type[Module]]
) -> str | None:
    """Why a layer must keep its class; None if it need not."""
    if any(is_lazy(p) for p in layer.parameters(recurse=False)):
        return "lazy: run the model once first"
    if kind not in known:
        return f"a subclass of {kind.__bases__[0].__name__}"
    if any(name in vars(layer) for name in ("forward", "_conv_forward")):
        return "its forward was replaced"
    return None


def _set_class(layer: _ConvNd, target: type[Module]) -> None:
    """Change the class; that of a parametrized layer is rebuilt on top of `target`."""
    if parametrize.is_parametrized(layer):
        members = {
            key: value
            for key, value in vars(type(layer)).items()
            if key not in ("__dict__", "__weakref__")
        }
        target = type(f"Parametrized{target.__name__}", (target,), members)
    layer.__class__ = target  # type: ignore[assignment]


def _who_runs(layer: _ConvNd) -> tuple[bool, str]:
    """Whether a kernel of ours runs a pass of this layer where it is now, and which, or why none.

    The input is not known yet: one in NCDHW and somewhat larger than the kernel and the padding is
    supposed. A number that was set in place of three is taken as torch takes it.

    Raises:
        TypeError, ValueError: those of a call.
    """
    parameter = next(layer.parameters(), torch.empty(()))
    device = "cpu" if parameter.device.type == "meta" else parameter.device
    kernel = triple(layer.kernel_size, "kernel_size")
    padding = paddings(layer.padding)
    around = (0, 0, 0) if isinstance(padding, str) else [sum(pair) for pair in pairs(padding)]
    spans = span(kernel, triple(layer.dilation, "dilation"))
    cell = torch.empty((), dtype=parameter.dtype, device=device)

    def stand_in(*shape: int) -> Tensor:
        return cell.expand(shape)

    first, second = layer.out_channels, layer.in_channels // layer.groups
    if layer.transposed:
        first, second = layer.in_channels, layer.out_channels // layer.groups
    with use_backend(None):
        explanation = explain(
            stand_in(
                1, layer.in_channels, *(32 + a + b for a, b in zip(spans, around, strict=True))
            ),
            stand_in(first, second, *kernel),
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            padding_mode=layer.padding_mode,
            transposed=layer.transposed,
        )
    ours = {
        name: f"{choice.backend}, {choice.kernel}"
        for name, choice in explanation.passes._asdict().items()
        if choice.backend != "torch"
    }
    if not ours:
        return False, f"torch: {explanation.reason}"
    if "forward" in ours:
        return True, ours["forward"]
    return True, f"{next(iter(ours.values()))}: {' and '.join(ours)}, the rest by torch"


def _text(layer: _ConvNd) -> str:
    """The layer on one line, shorter than its repr."""
    words = [f"{layer.in_channels}, {layer.out_channels}", f"k={_short(layer.kernel_size)}"]
    for name in ("stride", "dilation", "groups"):
        value = getattr(layer, name)
        if value not in (1, (1, 1, 1)):
            words.append(f"{name}={_short(value)}")
    return f"{_kind(layer).__name__}({', '.join(words)})"


def _short(value: int | tuple[int, ...]) -> str:
    if isinstance(value, int):
        return str(value)
    return str(value[0]) if len(set(value)) == 1 else "x".join(map(str, value))
