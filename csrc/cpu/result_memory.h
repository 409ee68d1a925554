// SPDX-License-Identifier: Apache-2.0
// Where the results of ops lie. malloc takes every 32 MiB and more from the system and gives it
// back when it is freed, and the system clears each page anew: more time than many a convolution
// takes. So large results are kept when they are freed, and serve the next ones.
#pragma once
#include <array>

#include "../common/stable.h"

namespace voxconv {

// An uninitialised output in the layout of `like`, the first tensor argument of an op.
Tensor empty_result(const Tensor& like, const std::array<int64_t, 5>& sizes);

// Gives what is kept back to the system.
void empty_result_cache();

}  // namespace voxconv
