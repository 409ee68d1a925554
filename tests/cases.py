# SPDX-License-Identifier: Apache-2.0
"""The one table of problems: forward, gradient, layout, compile tests and the bench all read it.

A row is a :class:`Case` (case.py). Those of convolutions that are not depthwise are in
cases_dilated.py.

Tags: ``smoke`` (every property is tested on these), ``odd`` (awkward sizes), ``edge`` (limits),
``model`` (true layers of published networks, bench only; tests take :meth:`Case.small`), ``bar``
(rows with a promised speed), ``fft`` (kernels for the FFT), ``bf16``/``fp16`` (the dtype the model
uses; float32 otherwise).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from case import (
    CHANNELS_LAST,
    LAYOUTS,
    MODES,
    NCDHW,
    Case,
    Padding,
    Pairs,
    Tensors,
    Triple,
    triple,
)
from cases_dilated import DILATED

__all__ = [
    "BY_NAME",
    "CASES",
    "CHANNELS_LAST",
    "LAYOUTS",
    "MODES",
    "NCDHW",
    "Case",
    "Padding",
    "Pairs",
    "Tensors",
    "Triple",
    "scaled_down",
    "select",
]


def _dw(
    name: str,
    kernel: int | Triple,
    channels: int,
    size: int | Triple,
    stride: int | Triple = 1,
    dilation: int | Triple = 1,
    **fields: Any,
) -> Case:
    """A depthwise row; the padding keeps the size (at stride 1, odd kernel) unless given."""
    kernel, dilation = triple(kernel), triple(dilation)
    centred = tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    fields = {"padding": centred, "kernel": kernel, "dilation": dilation} | fields
    return Case(name, channels=channels, size=triple(size), stride=triple(stride), **fields)


def _up(name: str, kernel: int | Triple, channels: int, size: int | Triple, **fields: Any) -> Case:
    """A depthwise transposed row, stride 2 unless given."""
    stride, dilation = fields.pop("stride", 2), fields.pop("dilation", 1)
    case = _dw(name, kernel, channels, size, stride=stride, dilation=dilation, **fields)
    return replace(case, op="transposed")


def _stages(
    model: str, kernel: int, stages: Iterable[tuple[int, int | Triple]], **fields: Any
) -> list[Case]:
    """One row for each (channels, size) of a network, named model_dwK_channels@size."""
    rows = []
    for channels, size in stages:
        place = size if isinstance(size, int) else "x".join(map(str, size))
        rows.append(_dw(f"{model}_dw{kernel}_{channels}@{place}", kernel, channels, size, **fields))
    return rows


def _tagged(tag: str, rows: Iterable[Case]) -> list[Case]:
    return [replace(row, tags=(tag, *row.tags)) for row in rows]


_FFT = ("fft",)

SMOKE = _tagged(
    "smoke",
    [
        _dw("dw3", 3, 4, (6, 7, 10), n=2),
        _dw("dw5", 5, 3, (7, 9, 19)),
        _dw("dw7", 7, 2, (9, 8, 23)),
        _dw("dw3_valid", 3, 9, (5, 6, 18), padding="valid"),
        _dw("dw3_stride2", 3, 3, (8, 9, 21), stride=2),
        _dw("dw5_dilation2", 5, 2, (11, 12, 25), dilation=2),
        _dw("dw3_multiplier2", 3, 3, (5, 6, 12), multiplier=2, n=2),
        _dw("dw3_replicate", 3, 3, (5, 6, 12), mode="replicate"),
        _dw("dw3_reflect", 3, 3, (5, 6, 12), mode="reflect"),
        _dw("dw3_circular", 3, 3, (5, 6, 12), mode="circular"),
        _up("up3", 3, 4, (4, 5, 9), n=2),
        _up("up3_full", 3, 3, (3, 4, 7), output_padding=(1, 1, 1)),
    ],
)

ODD = _tagged(
    "odd",
    [
        _dw("dw357", (3, 5, 7), 5, (7, 9, 11), n=3),
        _dw("dw511", (5, 1, 1), 7, (9, 4, 13)),
        _dw("dw119", (1, 1, 9), 3, (3, 5, 37)),
        _dw("dw171", (1, 7, 1), 3, (3, 15, 6)),
        _dw("dw3_wide", 3, 2, (4, 3, 131)),
        _dw("dw3_circular_depth", 3, 2, (6, 4, 40), mode="circular", padding=(1, 0, 0)),
        _dw("dw3_replicate_height", 3, 2, (6, 4, 40), mode="replicate", padding=(0, 1, 0)),
        _dw("dw3_deep", 3, 2, (37, 5, 18)),
        _dw("dw5_deep", 5, 2, (24, 5, 8)),
        _dw("dw7_eight_planes", 7, 2, (8, 5, 9)),
        _dw("dw3_stride2_wide", 3, 2, (4, 5, 67), stride=2),
        _dw("dw3_stride2_pieces", 3, 2, (3, 50, 100), stride=2),
        _dw("dw3_stride2_long_lines", 3, 1, (4, 7, 2000), stride=2),
        _dw("dw1_stride132_flat", (1, 1, 3), 2, (3, 1, 12), padding=(0, 1, 1), stride=(1, 3, 2)),
        _dw("dw3_stride2_valid", 3, 2, (8, 9, 22), padding=0, stride=2),
        _dw("dw5_stride2_deep", 5, 2, (50, 4, 9), stride=2),
        _dw("dw3_c16_stride2", 3, 16, (9, 7, 32), stride=2),
        _dw("dw5_c8_stride212", 5, 8, (5, 9, 48), stride=(2, 1, 2)),
        _dw("dw3_multiplier2_stride2", 3, 8, (5, 6, 32), stride=2, multiplier=2),
        _dw("dw4_deep_stride", 4, 2, (37, 5, 18), stride=(3, 1, 1), dilation=(2, 1, 1)),
        _dw("dw7_wide", 7, 1, (5, 4, 97)),
        _dw("dw3_c17", 3, 17, (5, 4, 7), n=2),
        _dw("dw3_c48", 3, 48, (4, 5, 6)),
        _dw("dw3_c20_pieces", 3, 20, (3, 47, 41)),
        _dw("dw3_c40_stride2_dilation2", 3, 40, (7, 9, 25), stride=2, dilation=2),
        _dw("dw133_c19", (1, 3, 3), 19, (3, 6, 13), n=2),
        _dw("dw3_c144", 3, 144, (3, 4, 5)),
        _dw("dw2_c150", 2, 150, (3, 4, 5)),
        _dw("dw5_c24_wide", 5, 24, (5, 6, 29)),
        _dw("dw5_c16_stride211", 5, 16, (6, 7, 9), stride=(2, 1, 1)),
        _dw("dw5_c33", 5, 33, (6, 5, 8)),
        _dw("dw3_stride123", 3, 4, (9, 10, 17), stride=(1, 2, 3)),
        _dw("dw5_stride122", 5, 3, (7, 11, 18), stride=(1, 2, 2)),
        _dw("dw7_stride2", 7, 2, (13, 12, 21), stride=2),
        _dw("dw3_stride2_dilation2", 3, 3, (11, 10, 20), stride=2, dilation=2),
        _dw("dw3_stride3_dilation2", 3, 3, (12, 13, 22), stride=3, dilation=2, multiplier=2),
        _dw("dw3_dilation123", 3, 3, (9, 11, 19), dilation=(1, 2, 3)),
        _dw("dw7_dilation3", 7, 2, (21, 20, 23), dilation=3),
        _dw("dw3_pairs", 3, 3, (6, 7, 12), padding=((0, 2), (1, 0), (3, 1))),
        _dw("dw5_pairs_stride", 5, 3, (8, 7, 19), padding=((4, 0), (0, 3), (2, 1)), stride=2),
        _dw("dw3_same_stride2", 3, 3, (7, 8, 13), padding="same", stride=2),
        _dw("dw4_same", 4, 3, (7, 8, 13), padding="same"),
        _dw("dw4_same_stride3", 4, 2, (10, 11, 12), padding="same", stride=3),
        _dw("dw3_multiplier3", 3, 5, (4, 6, 11), multiplier=3, n=2),
        _dw("dw5_replicate_stride", 5, 2, (7, 8, 15), mode="replicate", stride=(2, 1, 2)),
        _dw("dw3_reflect_pairs", 3, 2, (5, 6, 9), mode="reflect", padding=((4, 1), (0, 3), (2, 8))),
        _dw(
            "dw5_circular_pairs", 5, 2, (6, 5, 9), mode="circular", padding=((6, 1), (0, 5), (2, 2))
        ),
        _dw(
            "dw3_circular_stride2_dilation2",
            3,
            2,
            (6, 7, 14),
            mode="circular",
            dilation=2,
            stride=2,
            multiplier=2,
        ),
        _dw("dw5_reflect_same", 5, 2, (6, 7, 9), mode="reflect", padding="same", stride=2),
        _up("up2", 2, 3, (3, 4, 9)),
        _up("up4", 4, 3, (3, 4, 9)),
        _up("up5_stride123", 5, 5, (5, 4, 7), stride=(1, 2, 3), output_padding=(0, 1, 2)),
        _up("up3_multiplier2", 3, 3, (3, 4, 6), multiplier=2, n=2),
        _up("up3_dilation2", 3, 2, (4, 5, 6), dilation=2),
        _up("up3_stride1", 3, 3, (4, 5, 11), stride=1),
        _up("up3_c18", 3, 18, (3, 5, 13), output_padding=(1, 0, 1)),
    ],
)

EDGE = _tagged(
    "edge",
    [
        _dw("dw1", 1, 3, (4, 5, 9), n=2),
        _dw("dw1_multiplier4", 1, 3, (4, 5, 9), multiplier=4),
        _dw("dw1_stride2", 1, 3, (4, 5, 9), stride=2),
        _dw("one_voxel", 3, 3, (1, 1, 1)),
        _dw("one_channel", 3, 1, (5, 6, 9)),
        _dw("one_output", 5, 3, (5, 5, 5), padding=0),
        _dw("kernel_over_volume", 7, 3, (2, 3, 4)),
        _dw("kernel_over_width", 9, 2, (11, 10, 3)),
        _dw("kernel_over_volume_pairs", (9, 7, 5), 3, (3, 2, 2), padding=((6, 3), (1, 6), (3, 4))),
        _dw("padding_over_kernel", 3, 2, (3, 4, 5), padding=(4, 5, 6)),
        _dw("padding_over_kernel_stride", 2, 2, (3, 4, 5), padding=5, stride=3),
        _dw("line3_padding24_stride2", (1, 1, 3), 2, (2, 52, 1), (1, 1, 2), padding=(0, 0, 24)),
        _dw(
            "line5_padding28_stride2",
            (1, 1, 5),
            2,
            (1, 67, 16),
            (1, 1, 2),
            padding=((0, 0), (0, 0), (0, 28)),
        ),
        _dw("stride_over_kernel", 2, 3, (9, 11, 14), padding=0, stride=(4, 3, 5)),
        _dw("dw2", 2, 3, (5, 6, 17), padding=1),
        _dw("dw4", 4, 3, (6, 5, 18), padding=2),
        _dw("dw6_stride2", 6, 2, (9, 8, 20), padding=3, stride=2),
        _dw("dw246", (2, 4, 6), 3, (5, 7, 12), padding=(1, 2, 3)),
        _dw("dilation_over_volume", 3, 2, (4, 5, 6), dilation=7),
        _dw("reflect_most", 3, 2, (3, 4, 5), mode="reflect", padding=(2, 3, 4)),
        _dw("circular_most", 3, 2, (3, 4, 5), mode="circular", padding=(3, 4, 5)),
        _dw("replicate_far", 3, 2, (3, 1, 5), mode="replicate", padding=(7, 6, 5)),
        _up("up_stride_over_kernel", 3, 2, (3, 4, 5), stride=(4, 5, 4)),
        _up(
            "up_gap_output_padding",
            (1, 2, 1),
            2,
            (2, 3, 4),
            stride=(3, 4, 2),
            output_padding=(2, 3, 1),
        ),
        _up("up_one_voxel", 3, 2, (1, 1, 1), padding=0),
        _up("up_output_padding_over_stride", 3, 2, 4, dilation=3, output_padding=(2, 1, 2)),
        _dw("dw1x1x31", (1, 1, 31), 2, (3, 4, 40)),
        _dw("dw31x1x3", (31, 1, 3), 2, (33, 4, 9)),
        _dw("dw13", 13, 2, (9, 14, 15), tags=_FFT),
        _dw("dw15_stride2", 15, 2, (16, 11, 13), stride=2, tags=_FFT),
        _dw("dw13_dilation2", 13, 1, (9, 10, 27), dilation=2, tags=_FFT),
        _dw("dw9_dilation312", 9, 2, (20, 7, 9), dilation=(3, 1, 2), tags=_FFT),
        _dw("dw14_pairs", 14, 2, (9, 12, 15), padding=((6, 7), (0, 9), (4, 4)), tags=_FFT),
        _dw("dw13_circular", 13, 1, (9, 10, 14), mode="circular", tags=_FFT),
        _up("up13", 13, 2, (5, 6, 7), output_padding=(1, 0, 1), tags=_FFT),
    ],
)

_UXNET = [(48, 48), (96, 24), (192, 12), (384, 6)]
_MEDNEXT = {"stages": [(32, 128), (64, 64), (128, 32), (256, 16), (512, 8)], "n": 2}
_UNIFORMER = [(64, (8, 56, 56)), (128, (8, 28, 28)), (320, (8, 14, 14)), (512, (8, 7, 7))]
_X3D = [(54, (16, 56, 56)), (108, (16, 28, 28)), (216, (16, 14, 14)), (432, (16, 7, 7))]
_CSN = [(64, (32, 56, 56)), (128, (32, 28, 28)), (256, (32, 14, 14)), (512, (32, 7, 7))]
_MOBILENET = [(144, (8, 28, 28)), (192, (4, 14, 14)), (960, (1, 4, 4))]

MODEL = _tagged(
    "model",
    [
        *_stages("uxnet", 7, _UXNET[:2], tags=("bar",), source="3D UX-Net"),
        *_stages("uxnet", 7, _UXNET[2:], source="3D UX-Net"),
        _dw("uxnet_mlp_48@48", 1, 48, 48, multiplier=4, source="3D UX-Net, grouped 1^3 48->192"),
        *_stages("repux", 21, _UXNET, tags=_FFT, source="RepUX-Net"),
        *_stages("mednext", 3, **_MEDNEXT, source="MedNeXt"),
        *_stages("mednext", 5, **_MEDNEXT, source="MedNeXt"),
        *_stages("mednext", 7, **_MEDNEXT, source="MedNeXt as in MONAI"),
        _dw("mednext_down3_32@128", 3, 32, 128, n=2, stride=2, source="MedNeXt down"),
        _dw("mednext_down5_32@128", 5, 32, 128, n=2, stride=2, source="MedNeXt down"),
        _up("mednext_up3_64@64", 3, 64, 64, n=2, source="MedNeXt up"),
        _up("mednext_up5_64@64", 5, 64, 64, n=2, source="MedNeXt up"),
        *_stages("uniformer", 3, _UNIFORMER, source="UniFormer-B"),
        *_stages("uniformer", 5, _UNIFORMER[:2], source="UniFormer-B"),
        *_stages("x3d", 3, _X3D, source="X3D-M"),
        _dw("x3d_stem", (5, 1, 1), 24, (16, 112, 112), source="X3D-M stem, temporal"),
        _dw("x3d_stride122", 3, 54, (16, 112, 112), stride=(1, 2, 2), source="X3D-M"),
        *_stages("csn", 3, _CSN, n=8, source="ir-CSN-50"),
        _dw("mobilenet_stride2", 3, 96, (16, 56, 56), stride=2, source="MobileNetV2-3D"),
        *_stages("mobilenet", 3, _MOBILENET, source="MobileNetV2-3D"),
        *_stages("lka", 5, [(32, 32), (64, 16)], source="LKA-3D, near"),
        *_stages("lka_dilation3", 7, [(32, 32), (64, 16)], dilation=3, source="LKA-3D, far"),
        *_stages("lka_dilation3", 5, [(128, 8)], dilation=3, source="LKA-3D, far"),
        *_stages("lka_dilation2", 3, [(256, 4)], dilation=2, source="LKA-3D, far"),
        *_stages("segformer", 3, [(128, 32)], layout=CHANNELS_LAST, source="SegFormer3D DWConv"),
        _dw(
            "decoder_512@61x45x80",
            (3, 5, 5),
            512,
            (61, 45, 80),
            padding=(0, 2, 2),
            tags=("bf16",),
            source="video decoder, rocm-libraries#5916",
        ),
        *_stages("lidar", 3, [(64, (15, 75, 315))], tags=("fp16",), source="pytorch#110885"),
    ],
)

_BAR_SIZES = [(48, 48), (64, 32), (96, 24)]

BAR = _tagged(
    "bar",
    [
        *_stages("bar", 3, [*_BAR_SIZES, (32, 64)]),
        *_stages("bar", 5, _BAR_SIZES),
        *_stages("bar", 7, [(64, 32)]),  # 48@48 and 96@24 are 3D UX-Net's own
        *_stages("bar_dilation2", 3, [(48, 48), (32, 64)], dilation=2),
        *_stages("bar_dilation3", 3, [(48, 48), (32, 64)], dilation=3),
        *_stages("bar_dilation2", 5, [(48, 48)], dilation=2),
        *_stages("bar_dilation3", 5, [(48, 48)], dilation=3),
        *_stages("bar_dilation2", 7, [(48, 48)], dilation=2),
        *_stages("bar_dilation3", 7, [(48, 48)], dilation=3),
        *_stages("bar_stride2", 3, [(48, 48)], stride=2),
        *_stages("bar_stride2", 5, [(48, 48)], stride=2),
        *_stages("bar_stride2", 7, [(48, 48)], stride=2),
        *_stages("bar", 13, [(48, 24)], tags=_FFT),
        *_stages("bar", 17, [(48, 24)], tags=_FFT),
        *_stages("bar", 21, [(48, 24)], tags=_FFT),
        *_stages("bar", 31, [(48, 24)], tags=_FFT),
        _up("bar_up2_48@24", 2, 48, 24),
        _up("bar_up3_48@24", 3, 48, 24, output_padding=(1, 1, 1)),
    ],
)

CASES: tuple[Case, ...] = (*SMOKE, *ODD, *EDGE, *MODEL, *BAR, *DILATED)
BY_NAME = {case.name: case for case in CASES}


def select(*tags: str) -> list[Case]:
    """The rows that carry any of ``tags``, in table order."""
    return [case for case in CASES if set(tags) & set(case.tags)]


def scaled_down(*tags: str) -> list[Case]:
    """``small()`` of those rows, without the ones that become the same problem."""
    unique: dict[Case, Case] = {}
    for case in map(Case.small, select(*tags)):
        unique.setdefault(replace(case, name="", tags=(), source=""), case)
    return list(unique.values())
