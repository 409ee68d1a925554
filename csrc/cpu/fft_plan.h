// SPDX-License-Identifier: Apache-2.0
// How a line of 2^a 3^b 5^c cells is transformed: radices, twiddles and the order of the passes'
// cells. Plain data, the same for every instruction set; fft.inc holds the passes.
#pragma once
#include <cstdint>
#include <vector>

namespace voxconv {

constexpr int kLargestRadix = 12, kMostPasses = 64;
constexpr bool is_radix(int r) { return (r >= 1 && r <= 6) || (r >= 8 && r <= 10) || r == 12; }

struct FftView {
  int64_t length, passes;
  int32_t radix[kMostPasses];
  const void* twiddles;  // of the compute type, for each pass but the last
};

// A cheap length >= least.
int64_t fast_length(int64_t least);

// Cycles of a transform of that length, roughly.
double fft_cost(int64_t length);

class FftPlan {
 public:
  FftPlan(int64_t length, bool is_double);
  FftPlan(const FftPlan&) = delete;  // the view points into it
  FftPlan& operator=(const FftPlan&) = delete;

  const FftView& view() const { return view_; }
  // The position on the line of what slot i of the first pass reads and of the last pass writes.
  int64_t first_position(int64_t slot) const;
  int64_t last_position(int64_t slot) const;

 private:
  FftView view_;
  std::vector<double> doubles_;
  std::vector<float> floats_;
};

}  // namespace voxconv
