// SPDX-License-Identifier: Apache-2.0
#include "depthwise_costs.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

namespace voxconv {
namespace {

struct PassCosts {
  CostTable correlate, grad_weight;
};
constexpr PassCosts kCosts64 = {{60, 1.3, 60, 45, 0, 36, 90, 10, 0, false},
                                {40, 1, HUGE_VAL, 30, 0, 20, 90, 10, 0, false}};
constexpr PassCosts kCosts32 = {{25, 1.2, 28, 28, 1.5, 20, 10, 0, 0.8, true},
                                {28, 1.1, HUGE_VAL, 28, 1.5, 20, 10, 0, 0.8, true}};

// Loads for a multiply-add of a tile of 8 planes and a run of 3 taps, which the costs are of.
constexpr double kUsualLoads = 0.42;

}  // namespace

std::optional<Way> asked_way() {
  static const std::optional<Way> asked = []() -> std::optional<Way> {
    constexpr struct {
      const char* name;
      Way way;
    } ways[] = {{"flat", Way::flat},
                {"rows", Way::rows},
                {"channels", Way::channels},
                {"direct", Way::direct},
                {"winograd", Way::winograd}};
    const char* name = std::getenv("VOXCONV_CPU_WAY");
    for (const auto& way : ways)
      if (name && std::strcmp(name, way.name) == 0) return way.way;
    return std::nullopt;
  }();
  return asked;
}

const CostTable& cost_table(Pass pass, int64_t vector_bytes) {
  const PassCosts& costs = vector_bytes == 64 ? kCosts64 : kCosts32;
  return pass == Pass::grad_weight ? costs.grad_weight : costs.correlate;
}

double live_taps(const Axis& axis, int mode, bool backwards) {
  int64_t live = 0;
  for (int64_t o = 0; o < axis.out; ++o)
    for (int64_t k = 0; k < axis.kernel; ++k)
      live += source_index(o * axis.stride + k * axis.dilation - axis.before, axis.in, mode) >= 0;
  return ratio(live, target_size(axis, backwards));
}

double all_taps(const Axis& axis, bool backwards) {
  return ratio(axis.kernel, backwards ? axis.stride : 1);
}

double idle_lanes(const LaneMap& map) {
  return ratio(map.blocks() * map.lanes, map.batch * map.channels);
}

double staged(const CostTable& cost, double move, const Axis& w, bool backwards) {
  const int64_t gaps = (w.dilation - 1) * (w.kernel - 1);
  return move * (1 + cost.staged_gaps * ratio(gaps, target_size(w, backwards)));
}

double few_planes(const CostTable& cost, int64_t planes, int64_t tile) {
  return cost.few_planes * (ratio(tile, std::min(planes, tile)) - 1);
}

double channels_cost(const CostTable& cost, const Conv3dShape& shape, const LaneMap& map,
                     Pass pass) {
  const Axis* axis = shape.axis;
  const bool backwards = pass == Pass::grad_input;
  return staged(cost, cost.channels_move, axis[2], backwards) +
         cost.channels_tap * live_taps(axis[0], shape.mode, backwards) *
             live_taps(axis[1], shape.mode, backwards) * all_taps(axis[2], backwards) *
             idle_lanes(map);
}

double flat_cost(const CostTable& cost, const Conv3dShape& shape, const LaneMap& map, Pass pass,
                 int64_t vectors, double tap) {
  const Axis &d = shape.axis[0], &h = shape.axis[1], &w = shape.axis[2];
  const bool backwards = pass == Pass::grad_input;
  const int64_t planes = target_size(d, backwards);
  // Tiles are of planes that share taps: with a dilation, of every so many, and of one more in some
  // of these classes. The last tile of a class is of 4 planes if that is enough.
  const int64_t classes = std::min(d.dilation, planes), shorter = planes / classes;
  const int64_t longer = planes % classes, tile = shorter + (longer > 0) > 4 ? 8 : 4;
  const double loads = ratio(tile + d.kernel - 1, tile * d.kernel);
  double taps = tap * live_taps(d, kZeros, backwards) * h.kernel * w.kernel *
                (1 + cost.flat_loads * (loads - kUsualLoads));
  const int64_t whole =
      (classes - longer) * round_up(shorter, 4) + longer * round_up(shorter + 1, 4);
  if (cost.whole_tiles) taps *= ratio(whole, planes);
  const double few = few_planes(cost, shorter + (longer > 0), 4);
  return (cost.flat_move + few + taps) * ratio(vectors * map.lanes, h.out * w.out) +
         cost.flat_tile / (vectors * std::min<int64_t>(planes, 4));
}

}  // namespace voxconv
