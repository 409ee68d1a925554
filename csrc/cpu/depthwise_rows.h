// SPDX-License-Identifier: Apache-2.0
// Correlation with lanes along w: when it is the better way, and how it is set up.
#pragma once
#include "depthwise_args.h"
#include "depthwise_host.h"

namespace voxconv {

// What a row is: a line of w, or a plane of such lines. None: lanes over channels suit better.
enum class RowsForm { none, lines, planes };

RowsForm rows_form(const Conv3dShape& shape, const LaneMap& map, bool backwards,
                   const Tensor& source, const Tensor& target);

// target = bias + source * weight, by rows of that form.
void run_rows(RowsForm form, const Conv3dShape& shape, bool backwards, const Tensor& source,
              const Tensor& weight, const void* bias, Tensor& target);

}  // namespace voxconv
