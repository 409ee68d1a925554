// SPDX-License-Identifier: Apache-2.0
// What the blocks of depthwise_toeplitz.cuh own, and how the host chooses it: from the shape alone.
#pragma once
#include "launch.cuh"

namespace voxconv {
namespace device {

// A kernel: steps of 16 cells that hold a line of taps (S), tiles of 8 columns of a warp (J),
// planes that it sums up at a time (G), and whether it walks along D.
struct ToeplitzKind {
  int steps, tiles, planes;
  bool walk;

  // Pieces of 8 cells that a warp reads of a line, and the pairs of a line of taps.
  VOXCONV_HD constexpr int pieces() const { return tiles + 2 * steps - 1; }
  VOXCONV_HD constexpr int pairs() const { return 16 * steps + 6; }
  // Places for the taps of one kd: for all of them, or those of the current plane and the next.
  VOXCONV_HD constexpr int places() const { return walk ? planes : planes + 1; }
  // Words of the taps, with a line of zeros before them, in whole 16 bytes.
  VOXCONV_HD constexpr int taps(int kh) const {
    return (4 * pieces() + places() * kh * pairs() + 3) / 4 * 4;
  }
  // Cells from a line to the next in shared memory: an odd number of pieces, so that 8 lines of a
  // piece lie in different banks.
  VOXCONV_HD constexpr int pitch(int wide) const {
    return 8 * ((wide * tiles + 2 * steps - 1) | 1);
  }
};

// Threads of a block, at most; sums and operands fit the 168 registers of two such blocks.
constexpr int kToeplitzThreads = 192;

struct ToeplitzShape {
  int64_t targets;           // batch * channels of the target
  int channels, multiplier;  // of the target, targets that share a source
  int source[3], target[3];  // sizes
  int kernel[3], before[3];  // destination o reads from source cell o - before on
  int wide, high, groups;    // a block's warps along w, halves along h, groups of planes
  int planes;                // of a group
  int blocks_d, blocks_h, blocks_w;
  bool turned;   // the kernel is turned round
  bool aligned;  // lines of the source begin at multiples of 16 bytes
  int activation;

  VOXCONV_HD int lines() const { return high * 8 + kernel[1] - 1; }
  int warps() const { return wide * high * groups / 2; }
  int64_t blocks() const { return targets * blocks_d * blocks_h * blocks_w; }
  int64_t shared(const ToeplitzKind& kind) const {
    return 4 * (int64_t(kind.taps(kernel[1])) + int64_t(groups) * lines() * kind.pitch(wide));
  }
};

// Planes that fit the registers of a warp of so many tiles, beside operands.
constexpr int planes_of(int tiles) { return tiles == 2 ? 10 : tiles == 3 ? 7 : 5; }

// The kernel for a shape: tiles that leave the fewest columns without an output (with 2, taps are
// loaded too often), and a walk where the sums of all kd fit.
inline ToeplitzKind toeplitz_kind(const ToeplitzShape& a) {
  ToeplitzKind kind = {(a.kernel[2] + 22) / 16, 4, 0, false};
  const auto cost = [&](int tiles) {
    return ceil_div(a.target[2], 8 * tiles) * tiles * (tiles == 2 ? 8 : 7);
  };
  for (const int tiles : {3, 2})
    if (cost(tiles) < cost(kind.tiles)) kind.tiles = tiles;
  const int kd = a.kernel[0];
  kind.walk = kind.steps == 1 && (kd == 3 || kd == 5 || kd == 7);
  kind.planes = kind.walk ? kd : planes_of(kind.tiles);
  return kind;
}

// Clocks of a quarter of a multiprocessor of an H200: for a product, at 60 % of its peak; for a
// wavefront of shared memory, which is for all quarters; for a piece's copy, and for a step
// besides. And those that a step waits for copies, and a line of it for what it loads.
struct ToeplitzCosts {
  double product = 6.4, wavefront = 4, piece = 1, step = 150, copies = 1000, line = 100;

  double steps(const ToeplitzShape& a, int planes) const {
    const int live = a.source[0] + (a.groups - 1) * planes, all = planes + a.kernel[0] - 1;
    return live < all ? live : all;
  }
  // What all warps of a block take for groups of `planes`, and how long one of them waits.
  double work(const ToeplitzShape& a, const ToeplitzKind& kind, int planes) const {
    const double loads = 2.0 * kind.steps * planes * a.kernel[0];
    const double products = loads / 2 * kind.tiles * product;
    const double wavefronts = (loads + 2.0 * kind.pieces() * steps(a, planes)) * wavefront;
    const double lines = (products > wavefronts ? products : wavefronts) * a.kernel[1];
    const double copied = double(a.groups) * a.lines() * kind.pitch(a.wide) / 8 * piece;
    return a.warps() * lines + steps(a, planes) * (a.warps() * step + copied);
  }
  double wait(const ToeplitzShape& a, int planes) const {
    return steps(a, planes) * (copies + a.kernel[1] * line);
  }
};

// Bytes of shared memory that a block may have on any GPU since sm_80, but for a kilobyte.
constexpr int kToeplitzShared = 98 << 10;

// Cuts the work for blocks; whether one fits.
inline bool cut_toeplitz(ToeplitzShape& a, const ToeplitzKind& kind, int multiprocessors) {
  constexpr ToeplitzCosts costs;
  const int64_t units = ceil_div(a.target[2], 8 * kind.tiles), halves = ceil_div(a.target[1], 8);
  const int most = kToeplitzThreads / 32, planes = kind.walk ? a.target[0] : kind.planes;
  // First the tile, for groups as large as can be.
  double least = -1;
  ToeplitzShape best = a;
  for (a.wide = 1; a.wide <= units && a.wide <= most; ++a.wide) {
    a.blocks_w = static_cast<int>(ceil_div(units, a.wide));
    for (a.high = 1; a.high <= 2 * most; ++a.high) {
      a.blocks_h = static_cast<int>(ceil_div(halves, a.high));
      a.groups = a.high % 2 == 0 ? 1 : 2;
      if (a.warps() > most || (a.groups > a.target[0] && a.groups > 1)) continue;
      if (a.shared(kind) > kToeplitzShared) continue;
      const double time = costs.work(a, kind, planes) / a.groups * a.blocks_w * a.blocks_h;
      if (least >= 0 && time >= least) continue;
      least = time;
      best = a;
    }
  }
  if (least < 0) return false;
  a = best;
  // Then the planes of a group: small ones share out the work better, large ones take less of it.
  least = -1;
  const int64_t most_groups = ceil_div(a.target[0], a.groups);
  for (int64_t slabs = ceil_div(a.target[0], int64_t(planes) * a.groups);
       slabs <= most_groups && slabs <= 64; ++slabs) {
    a.planes = static_cast<int>(ceil_div(a.target[0], slabs * a.groups));
    a.blocks_d = static_cast<int>(ceil_div(a.target[0], int64_t(a.planes) * a.groups));
    const double time = costs.wait(a, a.planes) + double(ceil_div(a.blocks(), multiprocessors)) *
                                                      costs.work(a, kind, a.planes) / 4;
    if (least >= 0 && time >= least) continue;
    least = time;
    best = a;
  }
  a = best;
  return true;
}

}  // namespace device
}  // namespace voxconv
