// SPDX-License-Identifier: Apache-2.0
// Geometry of one 3D convolution, shared by every kernel on every device: plain data, no torch.
#pragma once
#include <cstdint>

// Of functions that device code calls too.
#if defined(__CUDACC__)
#define VOXCONV_HD __host__ __device__
#else
#define VOXCONV_HD
#endif

namespace voxconv {

// Order of the padding modes in the op schemas (python/voxconv/_geometry.py holds the same list).
enum PaddingMode : int { kZeros = 0, kReplicate = 1, kReflect = 2, kCircular = 3 };

// What may follow the sum of an output, in the order of the op schemas (voxconv/_activation.py).
enum Activation : int { kIdentity = 0, kRelu = 1, kLeakyRelu = 2, kGelu = 3, kSilu = 4 };
constexpr double kLeakySlope = 0.01;  // as torch.nn.functional.leaky_relu has it

// What is computed: the output, or the gradient of one of the factors.
enum class Pass { forward, grad_input, grad_weight };

// One spatial axis. Sizes in elements, `before`/`after` is the padding of the forward input.
struct Axis {
  int64_t in, out, kernel, stride, dilation, before, after;

  // Cells from the first tap to the last.
  VOXCONV_HD int64_t reach() const { return (kernel - 1) * dilation; }
  VOXCONV_HD int64_t output_size() const {
    return (in + before + after - reach() - 1) / stride + 1;
  }
};

// x [batch, channels, in...], weight [channels * multiplier, 1, kernel...],
// y [batch, channels * multiplier, out...]; axis order d, h, w.
struct Conv3dShape {
  int64_t batch, channels, multiplier;
  Axis axis[3];
  int mode;

  VOXCONV_HD int64_t taps() const { return axis[0].kernel * axis[1].kernel * axis[2].kernel; }
};

// The input index that position i of the padded axis reads (i counts from the first real element,
// so it is negative in the padding before); -1 where it reads a zero.
VOXCONV_HD inline int64_t source_index(int64_t i, int64_t n, int mode) {
  if (i >= 0 && i < n) return i;
  switch (mode) {
    case kReplicate: return i < 0 ? 0 : n - 1;
    case kReflect: return i < 0 ? -i : 2 * (n - 1) - i;
    case kCircular: return i < 0 ? i + n : i - n;
    default: return -1;
  }
}

}  // namespace voxconv
