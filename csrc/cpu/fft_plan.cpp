// SPDX-License-Identifier: Apache-2.0
#include "fft_plan.h"

#include <algorithm>
#include <cmath>

#include "cpu_level.h"

namespace voxconv {
namespace {

// Cycles of a pass for a cell, measured in a line that stays in L1: with 32 registers, and with 16,
// which the large radices overflow.
double pass_cost(int radix) {
  const bool many = cpu_level() == CpuLevel::v4;
  switch (radix) {
    case 1: return many ? 4.4 : 2.4;
    case 2: return many ? 4.8 : 2.6;
    case 3: return many ? 4.3 : 3.4;
    case 4: return many ? 4.4 : 3.1;
    case 5: return many ? 5.5 : 4.4;
    case 6: return many ? 5.6 : 3.7;
    case 8: return many ? 6.0 : 4.5;
    case 9: return many ? 7.5 : 6.5;
    case 10: return many ? 7.1 : 10;
    default: return many ? 7.5 : 7.8;
  }
}

// The radices of a length; none if it has another prime factor than 2, 3 and 5.
struct Radices {
  double cost = 0;  // of a cell
  std::vector<int> list;
};

// Replaces `best` if there are cheaper radices for what is left of a length, none of them below the
// last one in `chosen`, so that each set is seen once.
void choose_radices(int64_t left, Radices& chosen, Radices& best) {
  if (left == 1) {
    // There are a first and a last pass, always: only these reach outside of the scratch line.
    Radices all = chosen;
    for (; all.list.size() < 2; all.cost += pass_cost(1)) all.list.insert(all.list.begin(), 1);
    if (best.list.empty() || all.cost < best.cost) best = all;
    return;
  }
  for (int radix = chosen.list.empty() ? 2 : chosen.list.back(); radix <= kLargestRadix; ++radix) {
    if (!is_radix(radix) || left % radix != 0) continue;
    chosen.list.push_back(radix);
    chosen.cost += pass_cost(radix);
    choose_radices(left / radix, chosen, best);
    chosen.cost -= pass_cost(radix);
    chosen.list.pop_back();
  }
}

Radices make_radices(int64_t length) {
  Radices chosen, best;
  choose_radices(length, chosen, best);
  // The largest last, where there are no twiddles, then the next one first: passes in the middle
  // have the costliest addresses.
  if (best.list.size() > 2)
    std::rotate(best.list.begin(), best.list.end() - 2, best.list.end() - 1);
  return best;
}

Radices radices_of(int64_t length) {
  constexpr int64_t kKnown = 512;
  static const std::vector<Radices> known = [] {
    std::vector<Radices> made(kKnown);
    for (int64_t n = 1; n < kKnown; ++n) made[n] = make_radices(n);
    return made;
  }();
  return length < kKnown ? known[length] : make_radices(length);
}

// exp(-2 pi i k / n), by an angle of at most pi / 4
struct Root {
  double re, im;
};
Root root(int64_t k, int64_t n) {
  constexpr double kHalfPi = 1.57079632679489661923;
  const int64_t quadrant = 4 * (k % n) / n, rest = 4 * (k % n) % n;
  const bool upper = 2 * rest > n;
  const double angle =
      kHalfPi * static_cast<double>(upper ? n - rest : rest) / static_cast<double>(n);
  const double c = upper ? std::sin(angle) : std::cos(angle);
  const double s = upper ? std::cos(angle) : std::sin(angle);
  switch (quadrant) {
    case 0: return {c, -s};
    case 1: return {-s, -c};
    case 2: return {-c, s};
    default: return {s, c};
  }
}

}  // namespace

int64_t fast_length(int64_t least) {
  // What a longer circle costs along the other axes, in cycles of a cell.
  constexpr double kOtherAxes = 12;
  int64_t best = 0;
  double best_cost = 0;
  // A power of two is never further away than twice.
  for (int64_t n = least; best == 0 || n <= least + least / 5; ++n) {
    const Radices radices = radices_of(n);
    const double cost = (radices.cost + kOtherAxes) * static_cast<double>(n);
    if (radices.list.empty() || (best != 0 && cost >= best_cost)) continue;
    best = n;
    best_cost = cost;
  }
  return best;
}

double fft_cost(int64_t length) { return radices_of(length).cost * static_cast<double>(length); }

FftPlan::FftPlan(int64_t length, bool is_double) : view_{length, 0, {}, nullptr} {
  for (int radix : radices_of(length).list) view_.radix[view_.passes++] = radix;
  int64_t left = length;
  for (int64_t pass = 0; pass + 1 < view_.passes; ++pass) {
    const int64_t radix = view_.radix[pass], groups = left / radix;
    for (int64_t p = 0; p < groups; ++p)
      for (int64_t j = 1; j < radix; ++j) {
        const Root turn = root(p * j, left);
        doubles_.push_back(turn.re);
        doubles_.push_back(turn.im);
      }
    left = groups;
  }
  view_.twiddles = doubles_.data();
  if (is_double) return;
  floats_.assign(doubles_.begin(), doubles_.end());
  view_.twiddles = floats_.data();
}

int64_t FftPlan::first_position(int64_t slot) const {
  const int64_t radix = view_.radix[0];
  return slot / radix + slot % radix * (view_.length / radix);
}

int64_t FftPlan::last_position(int64_t slot) const {
  const int64_t radix = view_.radix[view_.passes - 1];
  return slot / radix + slot % radix * (view_.length / radix);
}

}  // namespace voxconv
