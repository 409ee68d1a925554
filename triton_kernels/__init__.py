# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of voxconv: device code and launchers, without autograd.

Installed as ``voxconv.triton_kernels``, because the bare name ``triton_kernels`` belongs to Triton.
Triton is imported with ``voxconv.triton_kernels.depthwise``, not before.
"""
