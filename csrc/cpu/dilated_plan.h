// SPDX-License-Identifier: Apache-2.0
// How a dilated pass is cut into tiles, and what these read: tables for its kernels.
#pragma once
#include <vector>

#include "depthwise_host.h"
#include "dilated_args.h"

namespace voxconv {

// A convolution with groups: of a group, channels that are read and made in forward.
struct DilatedShape {
  Conv3dShape conv;
  int64_t groups, in, out;
};

// An axis of a pass; see dilated_args.h. Taps that meet no cell at all are left out.
struct AxisPlan {
  std::vector<AxisClass> classes;
  std::vector<AxisTap> taps;
  int64_t stride = 1, source = 0;
};
AxisPlan axis_plan(const Axis& axis, int mode, bool backwards);

class DilatedPlan {
 public:
  // For the pass `pass` by `kernels`; fills in all of `a` but its tensors.
  DilatedPlan(const DilatedShape& shape, Pass pass, const DilatedKernels& kernels, DilatedArgs& a);

 private:
  void plan_planes(const AxisPlan& d, const Axis& axis, int mode);
  void plan_columns(const AxisPlan& w, int64_t lanes);
  void cut_columns(const AxisPlan& w, int mode, int64_t lanes);
  int64_t plan_rows(const AxisPlan& h, int64_t rows);
  void choose_tile(const AxisPlan& h, Pass pass, const DilatedKernels& kernels, DilatedArgs& a);

  std::vector<PlaneTap> planes_;
  std::vector<int32_t> plane_begin_, plane_order_;
  std::vector<AxisClass> row_classes_, column_classes_;
  std::vector<AxisTap> row_taps_, column_taps_;
  std::vector<int32_t> slots_, slot_begin_;
  std::vector<RowTile> tiles_;
  std::vector<RowSegment> segments_;
  int64_t pitch_ = 0, most_planes_ = 0, fresh_planes_ = 0;
};

// Pairs of planes and of rows for Winograd's F(2, 3); see dilated_winograd.inc.
class WinogradPlan {
 public:
  // Changes `a`, which DilatedPlan has filled in, where that takes less time.
  WinogradPlan(const DilatedShape& shape, Pass pass, const DilatedKernels& kernels, DilatedArgs& a);

 private:
  std::vector<int32_t> planes_;
  std::vector<PairTile> tiles_;
};

}  // namespace voxconv
