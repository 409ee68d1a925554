# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of voxconv: device code and launchers, without autograd.

Installed as ``voxconv.triton_kernels``, because the bare name ``triton_kernels`` belongs to Triton.
The depthwise family on the CPU needs none, so there are none yet.
"""
