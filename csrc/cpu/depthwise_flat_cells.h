// SPDX-License-Identifier: Apache-2.0
// How the cells of a plane become lanes of vectors, and what its taps read then.
#pragma once
#include <vector>

#include "depthwise_flat_args.h"
#include "depthwise_host.h"

namespace voxconv {

// Vectors of a tile, at most; of pairs.
constexpr int64_t kTileVectors = 4, kPairVectors = 2;

FlatForm flat_form(const Axis& h, const Axis& w, Pass pass, const FlatKernels& kernels);

// Vectors of a plane.
int64_t flat_vectors(FlatForm form, const Axis& h, const Axis& w, int64_t lanes);

// Taps of the steps of halves, for each tap of w.
double step_taps(const Axis& w);

// Tables that FlatArgs points into.
struct FlatTables {
  std::vector<FlatRows> rows;
  std::vector<FlatRun> runs;
  std::vector<int64_t> offsets, split_first, tap_parts, tap_order, steps;
  std::vector<FlatPart> parts;
  std::vector<uint16_t> masks;
  std::vector<int64_t> half_from, half_to, half_cells, half_least, half_most;
  std::vector<FlatPhase> phases;
  std::vector<FlatPairStep> pair_steps;
};

// Sets the cells, vectors, lanes, taps and halves of a plane. Tiles read a.most_planes at most,
// which is set before.
void place_cells(FlatArgs& a, FlatTables& tables, const Axis& h, const Axis& w, Pass pass,
                 const FlatKernels& kernels);

// Moves the taps of the split form to their parts of a copied plane, once a.split.step is known.
void part_taps(FlatArgs& a, FlatTables& tables);

}  // namespace voxconv
