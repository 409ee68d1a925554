// SPDX-License-Identifier: Apache-2.0
// What the ways to do a pass cost, for a vector of destinations, in taps of lanes along w:
// measured.
#pragma once
#include "depthwise_args.h"
#include "depthwise_host.h"

namespace voxconv {

// What a vector of destinations costs besides its taps. Lanes over channels transpose channels in
// registers on their way in and out, and have taps of their own price. A staged plane is read for
// every plane of taps if rows are lines, and once if they are planes. Planes that are lines
// themselves (flat) are read where they lie, by tiles of planes: a tap of a short run costs more,
// because it loads more, a tile of few planes costs more for each of them, and may take as long as
// a whole one.
struct CostTable {
  double channels_move, channels_tap, lines_move, planes_move, staged_gaps;
  double flat_move, flat_tile, few_planes, flat_loads;
  bool whole_tiles;
};

// Depthwise: planes as lines, rows, lanes over channels. Dilated: all products, or Winograd's.
enum class Way { flat, rows, channels, direct, winograd };

// What VOXCONV_CPU_WAY asks for, where it can do a pass; none: costs decide.
std::optional<Way> asked_way();

const CostTable& cost_table(Pass pass, int64_t vector_bytes);

// Taps of a destination that read a cell of the source, on average; dead ones too.
double live_taps(const Axis& axis, int mode, bool backwards);
double all_taps(const Axis& axis, bool backwards);

// What a staged vector costs to move, with lines along w.
double staged(const CostTable& cost, double move, const Axis& w, bool backwards);

// What a vector costs more if a tile of planes has only so many.
double few_planes(const CostTable& cost, int64_t planes, int64_t tile);

// Of lanes over channels.
double channels_cost(const CostTable& cost, const Conv3dShape& shape, const LaneMap& map,
                     Pass pass);

// Of planes that are lines, `vectors` of them in a plane, a tap of which costs `tap`.
double flat_cost(const CostTable& cost, const Conv3dShape& shape, const LaneMap& map, Pass pass,
                 int64_t vectors, double tap);

// Lanes over those that have a channel.
double idle_lanes(const LaneMap& map);

}  // namespace voxconv
