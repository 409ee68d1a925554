# SPDX-License-Identifier: Apache-2.0
"""The rows of the table whose outputs read many channels; see cases.py.

Tags: ``dense`` (every property is tested on these), ``dense_odd`` (awkward sizes), ``dense_model``
(layers of published networks, bench only; tests take :meth:`Case.small`), ``dense_bar`` (rows with
a promised speed).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from case import Case, Triple, triple


def _conv(
    name: str,
    kernel: int | Triple,
    channels: tuple[int, int],
    size: int | Triple,
    stride: int | Triple = 1,
    dilation: int | Triple = 1,
    **fields: Any,
) -> Case:
    """``channels`` are read and made; padding keeps the size (stride 1) unless given."""
    kernel, dilation = triple(kernel), triple(dilation)
    centred = tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    fields = {"padding": centred, "kernel": kernel, "dilation": dilation} | fields
    return Case(
        name,
        op="dilated",
        channels=channels[0],
        filters=channels[1],
        size=triple(size),
        stride=triple(stride),
        **fields,
    )


def _up(
    name: str, kernel: int | Triple, channels: tuple[int, int], size: Triple, **fields: Any
) -> Case:
    """A transposed row, stride 2 unless given."""
    stride, dilation = fields.pop("stride", 2), fields.pop("dilation", 1)
    case = _conv(name, kernel, channels, size, stride=stride, dilation=dilation, **fields)
    return replace(case, op="transposed")


def _tagged(tag: str, rows: Iterable[Case]) -> list[Case]:
    return [replace(row, tags=(tag, *row.tags)) for row in rows]


SMOKE = _tagged(
    "dense",
    [
        _conv("dense3", 3, (4, 7), (5, 6, 18), n=2),
        _conv("dense3_dilation2", 3, (5, 5), (7, 8, 19), dilation=2),
        _conv("dense3_groups", 3, (6, 9), (5, 6, 11), groups=3),
        _conv("dense3_stride2", 3, (3, 5), (6, 7, 21), stride=2),
        _conv("dense3_same_stride2", 3, (3, 4), (7, 8, 13), padding="same", stride=2, dilation=2),
        _conv("dense3_causal", 3, (4, 3), (5, 6, 9), padding=((2, 0), (1, 1), (1, 1))),
        _conv("dense3_replicate", 3, (3, 4), (4, 5, 9), mode="replicate"),
        _conv("dense3_reflect", 3, (3, 2), (5, 6, 9), mode="reflect", dilation=2),
        _conv("dense3_circular", 3, (2, 3), (4, 5, 9), mode="circular", stride=2),
        _conv("dense_one_channel", 3, (1, 6), (4, 5, 17)),
        _up("dense_up3", 3, (4, 5), (3, 4, 9), n=2),
        _up("dense_up3_groups", 3, (4, 6), (3, 4, 7), groups=2, output_padding=(1, 1, 1)),
    ],
)

ODD = _tagged(
    "dense_odd",
    [
        _conv("dense1", 1, (7, 9), (4, 5, 6), n=2),
        _conv("dense357", (3, 5, 7), (2, 3), (5, 7, 11)),
        _conv("dense133", (1, 3, 3), (5, 6), (3, 6, 33)),
        _conv("dense311", (3, 1, 1), (5, 6), (7, 3, 8)),
        _conv("dense2_even", 2, (3, 4), (4, 5, 7), padding=((1, 0), (0, 1), (1, 1))),
        _conv("dense4_same_stride3", 4, (2, 3), (8, 9, 10), padding="same", stride=3),
        _conv("dense3_dilation123", 3, (3, 4), (7, 9, 13), dilation=(1, 2, 3)),
        _conv("dense3_dilation16", 3, (3, 2), (5, 18, 40), dilation=16),
        _conv("dense3_dilation_far", 3, (2, 2), (3, 4, 5), dilation=9),
        _conv("dense3_stride3_dilation2", 3, (3, 2), (10, 11, 20), stride=3, dilation=2),
        _conv("dense5_pairs_stride", 5, (2, 3), (8, 7, 19), stride=2,
              padding=((4, 0), (0, 3), (2, 1))),
        _conv("dense3_one_output", 3, (5, 1), (4, 5, 9)),
        _conv("dense3_c21", 3, (21, 11), (3, 4, 10)),
        _conv("dense3_c30", 3, (30, 30), (3, 3, 35)),
        _conv("dense3_many", 3, (70, 41), (2, 3, 8)),
        _conv("dense3_many_in", 3, (530, 3), (2, 4, 9)),
        _conv("dense3_many_in_rows", 3, (530, 11), (2, 9, 20), dilation=(1, 1, 2)),
        _conv("dense3_many_in_cut", 3, (530, 3), (1, 3, 40), dilation=(1, 1, 17)),
        _conv("dense3_rows", 3, (3, 4), (2, 37, 5)),
        _conv("dense3_groups_of_one", 3, (6, 4), (4, 5, 9), groups=2, stride=(1, 2, 1)),
        _conv("dense7_small", 7, (2, 3), (3, 4, 5)),
        _conv("dense3_valid", 3, (3, 5), (5, 6, 18), padding="valid"),
        _conv("dense3_far_padding", 3, (2, 3), (3, 4, 5), padding=4),
        _conv("dense3_circular_pairs", 3, (2, 2), (5, 4, 7), mode="circular",
              padding=((3, 1), (0, 2), (2, 4)), stride=(1, 2, 2)),
        _up("dense_up2", 2, (3, 4), (3, 4, 9), padding=0),
        _up("dense_up5_stride123", 5, (2, 3), (4, 3, 6), stride=(1, 2, 3),
            output_padding=(0, 1, 2)),
        _up("dense_up3_dilation2", 3, (3, 2), (4, 5, 6), dilation=2),
        _up("dense_up_stride4", 3, (2, 3), (3, 2, 5), stride=4, padding=0),
    ],
)  # fmt: skip

_MESHNET = [
    _conv(f"meshnet_{c}_dilation{d}@{size}", 3, (c, c), size, dilation=d, source="MeshNet")
    for c, size, dilations in ((30, 64, (1, 2, 4, 8, 16)), (5, 96, (4,)), (11, 64, (4,)),
                               (20, 64, (8,)), (21, 64, (16,)))
    for d in dilations
]  # fmt: skip

MODEL = _tagged(
    "dense_model",
    [
        *_MESHNET,
        _conv("highresnet_16", 3, (16, 16), 64, source="HighResNet, scaled"),
        _conv("highresnet_32_dilation2", 3, (32, 32), 64, dilation=2, source="HighResNet, scaled"),
        _conv("highresnet_64_dilation4", 3, (64, 64), 48, dilation=4, source="HighResNet, scaled"),
        *(
            _conv(f"aspp_dilation{d}", 3, (64, 32), 32, dilation=d, source="MONAI SimpleASPP")
            for d in (2, 4, 6)
        ),
        _conv("uxnet_stem", 7, (1, 48), 64, stride=2, source="3D UX-Net, scaled"),
        _conv("nnunet_32", 3, (32, 32), 64, source="DynUNet, scaled"),
        _conv("nnunet_320", 3, (320, 320), 8, source="DynUNet"),
        _up("nnunet_up_64", 2, (64, 32), (32, 32, 32), padding=0, source="DynUNet"),
        _conv("vae_causal_96", 3, (96, 96), (4, 76, 52), source="Wan VAE, scaled",
              padding=((2, 0), (1, 1), (1, 1))),
        _conv("vae_causal_384", 3, (384, 384), (1, 38, 26), source="Wan VAE",
              padding=((2, 0), (1, 1), (1, 1))),
        _conv("pytorch167420", 3, (384, 384), (3, 34, 34), tags=("bf16",),
              source="pytorch#167420, one sample"),
        _conv("pytorch185352", 3, (8, 8), (16, 32, 32), dilation=2,
              source="pytorch#185352, scaled"),
        _conv("pytorch163539", 3, (32, 32), (16, 64, 64), tags=("bf16",),
              source="pytorch#163539, scaled"),
    ],
)  # fmt: skip

BAR = _tagged(
    "dense_bar",
    [
        _conv("dense3_32@48", 3, (32, 32), 48),
        _conv("dense3_32@48_dilation2", 3, (32, 32), 48, dilation=2),
        _conv("dense3_16@32_dilation2", 3, (16, 16), 32, dilation=2),
        _conv("meshnet_30_dilation16@128", 3, (30, 30), 128, dilation=16),
        _conv("meshnet_30_stride2@64", 3, (30, 30), 64, stride=2, padding="same"),
    ],
)

DILATED = (*SMOKE, *ODD, *MODEL, *BAR)
