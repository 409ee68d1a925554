// SPDX-License-Identifier: Apache-2.0
// What a depthwise pass reads, as tables: padding, stride, dilation and the direction of the pass
// (forward or grad_input) all end here, and the kernels see only links and segments.
#pragma once
#include <cstdint>
#include <vector>

#include "../common/conv3d.h"

namespace voxconv {

// Destination index i on axis d or h is the sum over its links of source[link.source] *
// w[link.tap].
struct Link {
  int32_t source, tap;
};

struct Links {
  std::vector<int32_t> begin;  // links of i: list[begin[i]] .. list[begin[i + 1]]
  std::vector<Link> list;

  int64_t longest() const;
  int64_t most_sources() const;  // of one destination
};

// Taps tap, tap + tap_step, ... (length of them) of an axis w. For the t-th destination of its
// class, tap number i reads the staged row at offset + (t + i) * x_step: neighbours in t share
// loads, whatever the stride and the dilation are.
struct Segment {
  int32_t offset, tap, tap_step, length;
};

// Destinations first, first + step, ... (count of them) along w, served by the same segments.
struct WClass {
  int32_t first, step, count, x_step, segment_begin, segment_end;

  // How many of them lie before position `end`.
  int64_t before(int64_t end) const { return end > first ? (end - first + step - 1) / step : 0; }
};

struct Fold {
  int32_t from, to;
};

// Axis w of a pass. A staged row is `left` margin cells, the `source_size` cells of the source,
// then `right` margin cells. Margins are zero, or copies of cells of the row (`margin`).
// Destinations are computed on `size` positions, of which [keep, keep + kept) are stored after
// `folds` have been added (grad_input of a padding mode that reads a cell more than once).
struct RowPlan {
  int32_t left = 0, right = 0, source_size = 0, size = 0, keep = 0, kept = 0;
  std::vector<WClass> classes;
  std::vector<Segment> segments;
  std::vector<Fold> margin;
  std::vector<Fold> folds;

  int32_t staged() const { return left + source_size + right; }
};

// Classes of fewer destinations are too short to share loads between neighbours; of fewer planes,
// where a tile is as tall as it is for all of them.
constexpr int64_t kShortestClass = 4, kFewestPlanes = 2;

// The links and the row of a pass: forward, or backwards from the output to grad_input. Classes
// have `shortest` destinations or more, or the taps of all destinations are runs of one.
Links links_of(const Axis& axis, int mode, bool backwards);
RowPlan row_of(const Axis& axis, int mode, bool backwards, int64_t shortest = kShortestClass);

// The links of axis d, for a pass that gathers several source channels into one (the channel
// multiplier of grad_input): repeated for each of them, source-major.
Links plane_links(const Axis& axis, int mode, bool backwards, int64_t multiplier);

// Planes are visited in this step: neighbours on the lattice of a dilation share sources.
int64_t plane_step(const Axis& axis, bool backwards);

// Kernel lengths a segment may have; longer runs of taps are cut into these.
constexpr int kSegmentLengths[] = {7, 5, 4, 3, 2, 1}, kLongestSegment = 7;
// Kernels longer than that are never read in place from channels-last tensors.
constexpr int kLongestInPlace = 5;

constexpr bool is_segment_length(int length) {
  for (int known : kSegmentLengths)
    if (known == length) return true;
  return false;
}

}  // namespace voxconv
