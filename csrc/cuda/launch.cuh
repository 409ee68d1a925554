// SPDX-License-Identifier: Apache-2.0
// What the host needs to start kernels. They are started through a `launch` of CUDA's
// (depthwise.cu) or on the CPU (tests/cuda_on_cpu), which has
//   launch(kernel, grid, block, bytes of shared memory, arguments...)
//   void* launch.scratch(bytes)  device memory until the last kernel of the pass is done
//   int launch.multiprocessors()  that share out the blocks
#pragma once
#include <algorithm>

#include "device.cuh"

namespace voxconv {
namespace device {

// Which kernel family a pass is to take (VOXCONV_CUDA_WAY); one that cannot do a pass leaves it to
// the next in the order of depthwise_launch.cuh.
enum class Way { choose, any, planes, channels, lines, slabs, weight_lines, toeplitz, hankel };
constexpr const char* kWayNames[] = {"choose", "any",          "planes",   "channels", "lines",
                                     "slabs",  "weight_lines", "toeplitz", "hankel"};
constexpr int kWays = sizeof kWayNames / sizeof *kWayNames;

// Whether `own` may run a pass where `asked` was asked for.
inline bool allows(Way asked, Way own) { return asked == Way::choose || asked == own; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The grid of so many blocks; an empty one, which CudaLaunch refuses, if a GPU cannot count them.
inline unsigned grid_of(int64_t blocks) {
  return blocks <= INT32_MAX ? static_cast<unsigned>(blocks) : 0;
}

// Threads of a block along W and H, and channels; how long it takes, in a unit of its own.
struct Tile {
  int wide = 0, high = 0, deep = 0;
  double cost = 0;
};

// The tile for `columns` by `lines` threads of each of `targets` channels, `times` over, at most
// `most_wide` along W and `most` of a block, in `limit` bytes of shared memory, of which a channel
// takes `shared(wide, high)`. A tile reads `halo` threads' lines more than it has. The
// multiprocessor that has most to do is to be ready first; one with a few warps takes as long as
// with kBusy. `deep` is 0 if none fits.
template <class Shared>
Tile best_tile(int64_t columns, int64_t lines, int64_t targets, int64_t times, int most_wide,
               int most, double halo, size_t limit, const Shared& shared) {
  constexpr int kMultiprocessors = 132;  // an H200's
  constexpr int kWarp = 32, kBusy = 8;
  constexpr double kCrowd = 0.25;  // but a warp is the slower the more there are, by this part
  constexpr double kCopy = 0.3;    // to copy a line takes this part of what its sums take
  Tile best;
  int64_t wide = ceil_div(columns, ceil_div(columns, most_wide));
  while (wide > 1 && shared(wide, 1) > limit) wide = ceil_div(wide, 2);
  for (int64_t high = 1; high <= lines && wide * high <= most; ++high) {
    const int64_t fit = static_cast<int64_t>(limit / shared(wide, high));
    const int64_t tiles = ceil_div(columns, wide) * ceil_div(lines, high) * times;
    for (int64_t lanes = most; lanes > 0; lanes -= kWarp) {
      const int64_t deep = std::min({lanes / (wide * high), fit, targets});
      if (deep == 0) break;
      const int64_t blocks = tiles * ceil_div(targets, deep);
      const int64_t warps =
          ceil_div(blocks, kMultiprocessors) * ceil_div(wide * high * deep, kWarp);
      const double cost =
          (std::max<int64_t>(warps, kBusy) + kCrowd * warps) * (1 + kCopy * (1 + halo / high));
      if (best.deep == 0 || cost < best.cost)
        best = Tile{static_cast<int>(wide), static_cast<int>(high), static_cast<int>(deep), cost};
    }
  }
  return best;
}

// `all` things, at most `most` to a tile: how many a tile has, where tiles are as even as can be.
inline int even_tile(int64_t all, int64_t most) {
  return static_cast<int>(ceil_div(all, ceil_div(all, most)));
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
