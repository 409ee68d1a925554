// SPDX-License-Identifier: Apache-2.0
// Correlation with lanes along w: when it is the better way, and how it is set up.
#pragma once
#include "depthwise_args.h"
#include "depthwise_host.h"

namespace voxconv {

// Whether lanes along w suit a pass better than lanes over channels. `w` is what the lanes over
// channels would use.
bool rows_suit(const Conv3dShape& shape, const RowPlan& w, const LaneMap& map, bool backwards,
               const Tensor& source, const Tensor& target);

// target = bias + source * weight, for a pass that rows suit. `tiling` knows slots and the order of
// planes.
void run_rows(const Conv3dShape& shape, const Links& d, const Tiling& tiling, bool backwards,
              const Tensor& source, const Tensor& weight, const void* bias, Tensor& target);

}  // namespace voxconv
