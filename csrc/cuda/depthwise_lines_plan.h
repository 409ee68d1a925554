// SPDX-License-Identifier: Apache-2.0
// What the host works out for depthwise_lines: the phases of each axis, the order of the taps along
// W, and the tile of a block.
#pragma once
#include <algorithm>
#include <numeric>
#include <utility>

#include "launch.cuh"

namespace voxconv {
namespace device {

// Destinations of a thread, for each phase of W that is a block's.
template <int P>
constexpr int kLinesPlanes = P > 2 ? 2 : 4;
constexpr int kLinesLines = 2, kLinesColumns = 4;

constexpr int kLinesThreads = 128;  // of a block, at most
// Blocks that a multiprocessor is to hold, of which follow the registers of a thread.
template <class T, int P>
constexpr int kLinesResident = std::is_same_v<T, double> ? 2
                               : P > 1                   ? 4
                                                         : 5;
constexpr int kLinesWide = 16;  // along W, at most
constexpr int kLongestRun = 7;  // taps; there is none of 6
// Bytes of shared memory: of a block that leaves room for others, and where its taps need more.
constexpr size_t kLinesShared = 48 << 10, kLinesSharedMost = 96 << 10;
constexpr int kMostPhases = 16, kMostSublines = 32, kMostRuns = 32;

// Of phase p, destination first + step * q reads with tap k, k < taps, the source's cell
// source + source_step * (stride * q + k); that is tap `tap + tap_step * k` of the kernel.
struct Phase {
  int first, source, taps, tap;
};
struct PhasedAxis {
  int source, target;                         // sizes
  int source_pitch, target_pitch, tap_pitch;  // from one to the next, in elements
  int step, source_step, stride, tap_step;    // there are `step` phases
  Phase phase[kMostPhases];
};

// Taps along W that read neighbours of a subline: the first one its cell `cell` for q = 0. It is
// tap `tap` of the kernel, and `slot` of a line of taps in shared memory.
struct Run {
  int subline, cell, taps, tap, slot;
};

struct LinesShape {
  PhasedAxis d, h, w;
  int64_t targets, source_cells, target_cells;  // batch * channels; of a volume
  int channels, filters, sharing;  // of the target; filters of one of them; that share a source
  int filter_taps, mode, activation;
  int groups;  // of phases along W: a block owns one
  int tiles_d, tiles_h, tiles_w;
  // Of a line in shared memory: sublines of group g, [first_subline[g], first_subline[g + 1]), and
  // where they begin in the source for q = 0; cells that are read of one, and from one to the next.
  int first_subline[kMostPhases + 1], subline[kMostSublines];
  int cells, pitch;
  int copied;  // columns of them that the threads of a channel copy at a time
  // Runs of phase p of W: [first_run[p], first_run[p + 1]).
  int first_run[kMostPhases + 1];
  Run run[kMostRuns];
  int tap_pitch, tap_lag;         // from one line of taps to the next; to the one that the next
                                  // line of a thread meets where one line meets the first
  int line, plane, taps, shared;  // sizes in shared memory; of all that is a channel's
};

struct LinesPlan {
  LinesShape shape;
  unsigned blocks;
  dim3 threads;
  size_t shared;  // bytes
};

// As many as whole vectors of 4 hold.
VOXCONV_HD constexpr int fours(int count) { return (count + 3) / 4 * 4; }

// Phases along W that a block owns.
inline int phases_of_block(const PhasedAxis& w) { return w.step <= 3 ? w.step : 1; }

// The phases of an axis, if there are not too many.
inline bool phases_of(const Axis& axis, bool backwards, PhasedAxis& to) {
  // Numbers beyond this might not fit into an int where a tile goes beyond the volume.
  constexpr int64_t kMost = 1 << 28, kMostStep = 1 << 16;
  if (axis.in + axis.before + axis.after > kMost || axis.out > kMost || axis.kernel > kMost ||
      axis.stride > kMostStep || axis.dilation > kMostStep)
    return false;
  const int kernel = static_cast<int>(axis.kernel), before = static_cast<int>(axis.before);
  const int stride = static_cast<int>(axis.stride), dilation = static_cast<int>(axis.dilation);
  const int turn = stride / std::gcd(stride, dilation);
  to.source = static_cast<int>(backwards ? axis.out : axis.in);
  to.target = static_cast<int>(backwards ? axis.in : axis.out);
  to.stride = backwards ? 1 : turn;
  to.source_step = backwards ? turn * dilation / stride : dilation;
  to.step = backwards ? turn * dilation : turn * dilation / stride;
  to.tap_step = backwards ? -turn : 1;
  if (to.step > kMostPhases || to.stride > kMostPhases) return false;
  for (int p = 0; p < to.step; ++p) {
    Phase& phase = to.phase[p];
    phase = {p, stride * p - before, kernel, 0};
    if (!backwards) continue;
    // Cell p of the input is read by output o with tap k where o * stride + k * dilation is
    // p + before: with every turn-th tap, if with any.
    int first = 0;
    while (first < turn && (p + before - first * dilation) % stride != 0) ++first;
    phase.taps = 0;
    if (first == turn || first >= kernel) continue;
    phase.taps = static_cast<int>(ceil_div(kernel - first, turn));
    phase.tap = first + turn * (phase.taps - 1);
    phase.source = (p + before - phase.tap * dilation) / stride;
  }
  return true;
}

// Where `value` is among place[begin], ..., place[end - 1], or `end`.
inline int find(const int* place, int begin, int end, int value) {
  while (begin < end && place[begin] != value) ++begin;
  return begin;
}

// Cuts the taps along W into runs, and finds the sublines that they read; false if they are too
// many. Phases of a group may have taps and sublines in common.
inline bool cut_runs(LinesShape& a) {
  const int own = phases_of_block(a.w);
  int runs = 0, sublines = 0, slots = 0;
  a.groups = a.w.step / own;
  a.tap_pitch = a.first_run[0] = a.first_subline[0] = 0;
  for (int p = 0; p < a.w.step; ++p) {
    const Phase& phase = a.w.phase[p];
    const int group = p / own, first_subline = a.first_subline[group];
    if (p % own == 0) slots = 0;
    for (int k = 0; k < a.w.stride && k < phase.taps; ++k) {
      // Taps k, k + stride, ... read a subline cell by cell.
      const int begin = phase.source + a.w.source_step * k;
      const int subline = find(a.subline, first_subline, sublines, begin);
      if (subline == kMostSublines) return false;
      a.subline[subline] = begin;
      if (subline == sublines) ++sublines;
      const int taps = static_cast<int>(ceil_div(phase.taps - k, a.w.stride));
      for (int cell = 0, taken; cell < taps; cell += taken, ++runs) {
        const int left = taps - cell;
        taken = left <= 5 || left == kLongestRun ? left : 4;  // windows begin at whole vectors
        if (runs == kMostRuns) return false;
        const int tap = phase.tap + a.w.tap_step * (k + a.w.stride * cell);
        a.run[runs] = {subline - first_subline, cell, taken, tap, slots};
        for (int r = a.first_run[group * own]; r < runs; ++r)
          if (a.run[r].tap == tap) a.run[runs].slot = a.run[r].slot;
        if (a.run[runs].slot == slots) slots += fours(taken);
      }
    }
    a.first_run[p + 1] = runs;
    a.first_subline[group + 1] = sublines;
    a.tap_pitch = std::max(a.tap_pitch, slots);
  }
  a.tap_lag = a.h.stride * a.tap_pitch;
  return true;
}

// Sizes in shared memory for a block of so many threads along W and H.
inline void size_tile(LinesShape& a, int wide, int high) {
  const auto most_taps = [](const PhasedAxis& axis) {
    int most = 0;
    for (int p = 0; p < axis.step; ++p) most = std::max(most, axis.phase[p].taps);
    return most;
  };
  int read = 0, loaded = 0, sublines = 0;
  for (int r = 0; r < a.first_run[a.w.step]; ++r) {
    read = std::max(read, a.run[r].cell + a.run[r].taps + kLinesColumns - 1);
    loaded = std::max(loaded, a.run[r].cell + fours(a.run[r].taps + kLinesColumns - 1));
  }
  for (int g = 0; g < a.groups; ++g)
    sublines = std::max(sublines, a.first_subline[g + 1] - a.first_subline[g]);
  a.cells = (wide - 1) * kLinesColumns + read;
  a.pitch = (wide - 1) * kLinesColumns + loaded;
  a.line = sublines * a.pitch;
  a.plane = (a.h.stride * (high * kLinesLines - 1) + most_taps(a.h)) * a.line;
  a.taps = a.filters * most_taps(a.d) * most_taps(a.h) * a.tap_pitch;
  a.shared = a.taps + 2 * a.plane;
}

// How many columns `threads` threads copy at a time, so that few of them wait for the others.
inline void share_columns(LinesShape& a, int threads) {
  constexpr int kTurn = 2;  // the start of a column takes as long as so many cells
  const int lines = a.plane / a.line, columns = a.line / a.pitch * a.cells;
  int64_t least = 0;
  for (int turns = 1; turns <= columns; ++turns) {
    const int own = static_cast<int>(ceil_div(columns, turns));
    if (own > threads) continue;
    const int64_t cost = turns * (kTurn + ceil_div(lines, threads / own));
    if (least != 0 && cost >= least) continue;
    least = cost;
    a.copied = own;
  }
}

inline bool plan_lines(const Conv3dShape& shape, bool backwards, int activation, size_t sum,
                       LinesPlan& plan) {
  LinesShape& a = plan.shape;
  if (backwards && shape.mode != kZeros) return false;
  PhasedAxis* const axes[] = {&a.d, &a.h, &a.w};
  int64_t source_cells = 1, target_cells = 1, taps = 1;
  for (int i = 2; i >= 0; --i) {
    PhasedAxis& axis = *axes[i];
    if (!phases_of(shape.axis[i], backwards, axis)) return false;
    axis.source_pitch = static_cast<int>(source_cells);
    axis.target_pitch = static_cast<int>(target_cells);
    axis.tap_pitch = static_cast<int>(taps);
    source_cells *= axis.source;
    target_cells *= axis.target;
    taps *= shape.axis[i].kernel;
    if (source_cells > INT32_MAX || target_cells > INT32_MAX || taps > INT32_MAX) return false;
  }
  // A thread's lines may be planes, if there is but one line.
  if (a.h.target == 1 && a.d.target > 1) std::swap(a.d, a.h);
  a.source_cells = source_cells;
  a.target_cells = target_cells;
  a.filter_taps = static_cast<int>(taps);
  a.mode = shape.mode;
  a.activation = activation;
  a.filters = static_cast<int>(backwards ? shape.multiplier : 1);
  a.sharing = static_cast<int>(backwards ? 1 : shape.multiplier);
  a.channels = static_cast<int>(shape.channels * a.sharing);
  a.targets = shape.batch * a.channels;
  if (!cut_runs(a)) return false;

  const auto columns = ceil_div(ceil_div(a.w.target, a.w.step), kLinesColumns);
  const auto lines = ceil_div(ceil_div(a.h.target, a.h.step), kLinesLines);
  const auto shared = [&](int64_t wide, int64_t high) {
    size_tile(a, static_cast<int>(wide), static_cast<int>(high));
    return a.shared * sum;
  };
  shared(1, 1);
  const double halo = double(a.plane / a.line - a.h.stride) / (a.h.stride * kLinesLines);
  const size_t limit = a.taps * sum > kLinesShared / 2 ? kLinesSharedMost : kLinesShared;
  const int own_planes = phases_of_block(a.w) == 3 ? kLinesPlanes<3> : kLinesPlanes<1>;
  a.tiles_d = static_cast<int>(ceil_div(ceil_div(a.d.target, a.d.step), own_planes));
  const int64_t times = int64_t(a.groups) * a.h.step * a.d.step * a.tiles_d;
  const Tile tile =
      best_tile(columns, lines, a.targets, times, kLinesWide, kLinesThreads, halo, limit, shared);
  if (tile.deep == 0) return false;
  plan.threads = dim3(tile.wide, tile.high, tile.deep);
  plan.shared = tile.deep * shared(tile.wide, tile.high);
  a.tiles_w = static_cast<int>(ceil_div(columns, tile.wide));
  a.tiles_h = static_cast<int>(ceil_div(lines, tile.high));
  share_columns(a, tile.wide * tile.high);
  const int64_t blocks = a.tiles_w * a.tiles_h * times;
  if (blocks > INT32_MAX / ceil_div(a.targets, tile.deep)) return false;
  plan.blocks = static_cast<unsigned>(blocks * ceil_div(a.targets, tile.deep));
  return true;
}

}  // namespace device
}  // namespace voxconv
