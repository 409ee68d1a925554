// SPDX-License-Identifier: Apache-2.0
// Passes with lanes along w: when they are the better way, and how they are set up.
#pragma once
#include "depthwise_args.h"
#include "depthwise_host.h"
#include "scratch.h"

namespace voxconv {

// What a row is: a line of w, or a plane of such lines. None: lanes over channels suit better.
enum class RowsForm { none, lines, planes };

// Source and target of grad_weight are x and grad; its rows are never lines.
RowsForm rows_form(const Conv3dShape& shape, const LaneMap& map, Pass pass, const Tensor& source,
                   const Tensor& target);

// target = activation(bias + source * weight), by rows of that form.
void run_rows(RowsForm form, const Conv3dShape& shape, Pass pass, const Tensor& source,
              const Tensor& weight, const void* bias, Activation activation, Tensor& target);

// Sums of grad * x over pieces of planes: [batch * channels, pieces, taps].
struct RowPartials {
  Memory memory;
  int64_t pieces;
};
RowPartials run_rows_grad_weight(const Conv3dShape& shape, const Tensor& x, const Tensor& grad);

}  // namespace voxconv
