// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>

#include "depthwise_costs.h"
#include "dilated_plan.h"

namespace voxconv {

namespace {

constexpr int64_t kPositions = 16, kMostPairs = 8;
// Clocks of a processor that does two multiply-adds of a vector in each: to stage a vector; to mix
// one of a position; to add one to the outputs of a position; to pack a weight; to read a byte of
// weights from beyond the second cache.
constexpr double kStageClocks = 2, kMixClocks = 4, kAddClocks = 6, kPackClocks = 4,
                 kByteClocks = 0.125;
constexpr int64_t kMostWeightBytes = 64 << 20, kMostSumBytes = 8 << 20;

// Calls visit(first target, pairs, pairs that have a second target) for tiles of `most` pairs of
// targets that are `apart` from each other.
template <class Visit>
void for_each_tile(int64_t size, int64_t apart, int64_t most, const Visit& visit) {
  for (int64_t residue = 0; residue < std::min(apart, size); ++residue)
    for (int64_t first = residue; first < size; first += 2 * most * apart) {
      const int64_t pairs = std::min(most, ceil_div(size - first, 2 * apart));
      visit(first, pairs, std::min(pairs, ceil_div(size - first, apart) / 2));
    }
}

}  // namespace

WinogradPlan::WinogradPlan(const DilatedShape& shape, Pass pass, const DilatedKernels& kernels,
                           DilatedArgs& a) {
  a.winograd = {};
  const std::optional<Way> asked = asked_way();
  if (asked == Way::direct) return;
  const bool backwards = pass == Pass::grad_input;
  WinogradView view = {};
  double direct = 1;
  for (int i = 0; i < 2; ++i) {
    const Axis& axis = shape.conv.axis[i];
    if (axis.kernel != 3 || axis.stride != 1) return;
    view.apart[i] = axis.dilation;
    view.low[i] = backwards ? axis.before - 2 * axis.dilation : -axis.before;
    direct *= live_taps(axis, a.mode, backwards) * double(a.target_size[i]);
  }
  int64_t plane_positions = 0;  // of all pairs of planes
  for_each_tile(a.target_size[0], view.apart[0], 1, [&](int64_t first, int64_t, int64_t seconds) {
    planes_.push_back(static_cast<int32_t>(first));
    plane_positions += 3 + seconds;
  });

  int64_t columns = 0;  // in vectors
  double products = 0;  // of vectors, for a channel read and one made
  for (int64_t c = 0; c < a.w.class_count; ++c) {
    const AxisClass& w = a.w.classes[c];
    columns += ceil_div(w.count, kernels.lanes);
    products += double(w.end - w.begin) * double(ceil_div(w.count, kernels.lanes));
  }
  const int64_t weights = a.groups * a.in * a.out * a.kernel[2];  // of a position
  const int64_t bytes = kPositions * weights * kernels.item_bytes;
  if (bytes > kMostWeightBytes) return;
  const double read = bytes > caches().second_bytes / 2 ? kByteClocks * double(bytes) : 0;
  const double units = double(a.batch * a.groups);
  const double pitch = double(a.pitch) / double(kernels.lanes);
  double least =
      units * (double(a.in * a.out) * direct * products / 2 +
               kStageClocks * double(a.in * 3 * a.target_size[0] * a.target_size[1]) * pitch) +
      9 * kPackClocks * double(weights);
  if (asked == Way::winograd) least = HUGE_VAL;
  const int64_t vectors = kernels.vectors(ceil_div(a.out, block_count(a.out, kernels.most_out)));
  const double room = double(caches().second_bytes) / 2 / double(kernels.item_bytes);
  const int64_t sums = 4 * a.out * columns * kernels.lanes * kernels.item_bytes;
  for (int64_t pairs = 1; pairs <= kMostPairs && pairs * sums <= kMostSumBytes; ++pairs) {
    const int64_t channel = odd_lines(pairs * a.pitch, kLineBytes / kernels.item_bytes);
    const auto fits = static_cast<int64_t>(room / double(kPositions * channel));
    int64_t chunk = std::clamp<int64_t>(fits, std::min<int64_t>(a.in, 8), a.in);
    const int64_t chunks = ceil_div(a.in, chunk);
    chunk = ceil_div(a.in, chunks);
    double made = 0;
    for (int64_t c = 0; c < a.w.class_count; ++c) {
      const AxisClass& w = a.w.classes[c];
      made += double(w.end - w.begin) *
              double(round_up(ceil_div(w.count, kernels.lanes) * pairs, vectors));
    }
    // Of a pair of rows in a position.
    const double each = double(a.in * a.out) * made / double(pairs) / 2 +
                        kMixClocks * double(a.in) * pitch +
                        kAddClocks * double(chunks * a.out * columns);
    double row_positions = 0, staged = 0;
    const auto count = [&](int64_t, int64_t of, int64_t seconds) {
      row_positions += double(3 * of + seconds);
      staged += kStageClocks * double(a.in * (2 * of + 2) * 4) * pitch + read;
    };
    for_each_tile(a.target_size[1], view.apart[1], pairs, count);
    const double clocks =
        units * (double(plane_positions) * row_positions * each + double(planes_.size()) * staged) +
        kPositions * kPackClocks * double(weights);
    if (clocks >= least) continue;
    least = clocks;
    view.most_pairs = pairs;
    a.channel_pitch = channel;
    a.in_chunk = chunk;
    a.sum_vectors = columns * pairs + a.w.class_count * kMostVectors;
  }
  if (view.most_pairs == 0) return;
  const auto add = [&](int64_t first, int64_t pairs, int64_t seconds) {
    tiles_.push_back(
        {static_cast<int32_t>(first), static_cast<int32_t>(pairs), static_cast<int32_t>(seconds)});
  };
  for_each_tile(a.target_size[1], view.apart[1], view.most_pairs, add);
  view.planes = planes_.data();
  view.plane_pairs = static_cast<int64_t>(planes_.size());
  view.tiles = tiles_.data();
  view.tile_count = static_cast<int64_t>(tiles_.size());
  a.winograd = view;
}

}  // namespace voxconv
