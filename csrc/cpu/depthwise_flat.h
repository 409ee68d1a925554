// SPDX-License-Identifier: Apache-2.0
// Passes that take a plane as one long line of lanes: when they are possible, and how they are set
// up.
#pragma once
#include "depthwise_args.h"
#include "depthwise_host.h"
#include "depthwise_rows.h"

namespace voxconv {

// Whether a pass can be done this way, and had better not be done with lanes over channels. Source
// and target of grad_weight are x and grad.
bool flat_suits(const Conv3dShape& shape, const LaneMap& map, Pass pass, const Tensor& source,
                const Tensor& target);

// target = activation(bias + source * weight).
void run_flat(const Conv3dShape& shape, Pass pass, const Tensor& source, const Tensor& weight,
              const void* bias, Activation activation, Tensor& target);

// Sums of grad * x over pieces of planes.
RowPartials run_flat_grad_weight(const Conv3dShape& shape, const Tensor& x, const Tensor& grad);

}  // namespace voxconv
