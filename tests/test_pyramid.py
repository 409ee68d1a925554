# SPDX-License-Identifier: Apache-2.0
"""Branches of several dilations on one input."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from voxconv import nn


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_equals_the_separate_convolutions(mode: Any) -> None:
    made = nn.DilatedPyramid3d(3, 5, dilations=(1, 2, 1, 3), padding_mode=mode)
    x = torch.randn(2, 3, 7, 8, 9, requires_grad=True)
    y = made(x)
    assert y.shape == (2, 20, 7, 8, 9)
    branches = []
    for branch in made.branches:
        kind = torch.nn.Conv3d(
            3, 5, branch.kernel_size, padding="same", dilation=branch.dilation, padding_mode=mode
        )
        kind.load_state_dict(branch.state_dict())
        branches.append(kind(x))
    expected = torch.cat(branches, 1)
    torch.testing.assert_close(y, expected)
    up = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, up), torch.autograd.grad(expected, x, up))
    torch.testing.assert_close(made(x[0]), y[0])


def test_activation_follows_each_branch() -> None:
    made = nn.DilatedPyramid3d(2, 3, (1, 3), (1, 2), activation="relu")
    plain = nn.DilatedPyramid3d(2, 3, (1, 3), (1, 2))
    plain.load_state_dict(made.state_dict())
    x = torch.randn(1, 2, 5, 6, 7)
    torch.testing.assert_close(made(x), plain(x).relu())


@pytest.mark.parametrize(
    ("sizes", "dilations"), [((), ()), ((3, 3), (1,)), ((3,), (0,)), ((0,), (1,))]
)
def test_refuses(sizes: Any, dilations: Any) -> None:
    with pytest.raises(ValueError, match=r"kernel_size|dilation"):
        nn.DilatedPyramid3d(2, 3, sizes, dilations)
