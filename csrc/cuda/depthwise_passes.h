// SPDX-License-Identifier: Apache-2.0
// The passes of the depthwise family for elements T on a GPU; a file for each T compiles them
// (depthwise_f32.cu and so on), and they compile side by side.
#pragma once
#include "cuda_launch.h"
#include "launch.cuh"

namespace voxconv {

// How a pass is to be run: layout of its tensors, and what was asked for by VOXCONV_CUDA_WAY.
struct CudaPlan {
  bool channels_last;
  device::Way way;
};

// Tensors without gaps, NCDHW or channels_last_3d, as in depthwise_launch.cuh.
template <class T>
struct DepthwisePasses {
  static void forward(const CudaLaunch& launch, const Conv3dShape& shape, CudaPlan plan,
                      const void* x, const void* weight, const void* bias, int activation, void* y);
  static void grad_input(const CudaLaunch& launch, const Conv3dShape& shape, CudaPlan plan,
                         const void* grad, const void* weight, const void* bias, void* grad_x);
  static void grad_weight(const CudaLaunch& launch, const Conv3dShape& shape, CudaPlan plan,
                          const void* x, const void* grad, void* grad_weight);
  static void channel_sum(const CudaLaunch& launch, const Conv3dShape& shape, CudaPlan plan,
                          const void* grad, void* sums);
};

}  // namespace voxconv
