// SPDX-License-Identifier: Apache-2.0
// What the host needs to start kernels. They are started through a `launch` of CUDA's
// (depthwise.cu) or on the CPU (tests/cuda_on_cpu), which has
//   launch(kernel, grid, block, bytes of shared memory, arguments...)
//   void* launch.scratch(bytes)  device memory until the last kernel of the pass is done
#pragma once
#include <algorithm>

#include "device.cuh"

namespace voxconv {
namespace device {

// Which kernel family a pass is to take (VOXCONV_CUDA_WAY); one that cannot do a pass leaves it to
// the next in the order of depthwise_launch.cuh.
enum class Way { choose, any, planes, lines };

// Whether `own` may run a pass where `asked` was asked for.
inline bool allows(Way asked, Way own) { return asked == Way::choose || asked == own; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int kMultiprocessors = 132;  // of the GPU that launches aim at, an H200

// Threads of a block along W and H, and channels.
struct Tile {
  int wide, high, deep;
};

// The tile for `columns` by `lines` threads of each of `targets` channels, at most `most_wide`
// along W and `most` of a block, in `limit` bytes of shared memory, of which a channel takes
// `shared(wide, high)`: the one that leaves the fewest lanes idle and copies the least. A tile
// reads `halo` threads' lines more than it has. All 0 if none fits.
template <class Shared>
Tile best_tile(int64_t columns, int64_t lines, int64_t targets, int most_wide, int most,
               double halo, size_t limit, const Shared& shared) {
  constexpr double kCopy = 0.3;  // to copy a line takes this part of what its sums take
  Tile best = {0, 0, 0};
  double least = 0;
  for (int64_t wide = ceil_div(columns, ceil_div(columns, most_wide)); wide > 0 && least == 0;
       wide = wide == 1 ? 0 : ceil_div(wide, 2))
    for (int64_t high = 1; high <= lines && wide * high <= most; ++high) {
      const int64_t fit = static_cast<int64_t>(limit / shared(wide, high));
      const int64_t deep = std::min({most / (wide * high), fit, targets});
      if (deep == 0) break;
      const double lanes = static_cast<double>(ceil_div(wide * high * deep, 32) * 32) / deep;
      const double cost = ceil_div(columns, wide) * ceil_div(lines, high) * lanes *
                          (1 + kCopy * (1 + halo / high)) * ceil_div(targets, deep) * deep;
      if (least != 0 && cost > least) continue;
      least = cost;
      best = {static_cast<int>(wide), static_cast<int>(high), static_cast<int>(deep)};
    }
  return best;
}

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
