// SPDX-License-Identifier: Apache-2.0
// What the host needs to start kernels. They are started through a `launch` of CUDA's
// (depthwise.cu) or on the CPU (tests/cuda_on_cpu), which has
//   launch(kernel, grid, block, bytes of shared memory, arguments...)
//   void* launch.scratch(bytes)  device memory until the last kernel of the pass is done
//   int launch.multiprocessors()  that share out the blocks: 132, as an H200 has
#pragma once
#include "device.cuh"

namespace voxconv {
namespace device {

// Which kernel family a pass is to take (VOXCONV_CUDA_WAY); one that cannot do a pass leaves it to
// the next in the order of depthwise_launch.cuh.
enum class Way { choose, any, planes, toeplitz, hankel };

// Whether `own` may run a pass where `asked` was asked for.
inline bool allows(Way asked, Way own) { return asked == Way::choose || asked == own; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A tensor without gaps, NCDHW or channels_last_3d.
template <class T>
View<T> dense(T* data, bool channels_last, int64_t channels, int64_t d, int64_t h, int64_t w) {
  const int64_t cells = d * h * w, step = channels_last ? channels : 1;
  return {data, channels * cells, channels_last ? 1 : cells, h * w * step, w * step, step};
}

// x or the output, and their gradients.
template <class T>
View<T> input_of(const Conv3dShape& shape, bool channels_last, T* data) {
  const Axis* axis = shape.axis;
  return dense(data, channels_last, shape.channels, axis[0].in, axis[1].in, axis[2].in);
}
template <class T>
View<T> output_of(const Conv3dShape& shape, bool channels_last, T* data) {
  const Axis* axis = shape.axis;
  return dense(data, channels_last, shape.channels * shape.multiplier, axis[0].out, axis[1].out,
               axis[2].out);
}

}  // namespace device
}  // namespace voxconv
