// SPDX-License-Identifier: Apache-2.0
#include "depthwise_plan.h"

#include <algorithm>
#include <numeric>

namespace voxconv {
namespace {

Links group_by_destination(const std::vector<std::vector<Link>>& per_destination) {
  Links links;
  links.begin.reserve(per_destination.size() + 1);
  links.begin.push_back(0);
  for (const auto& list : per_destination) {
    links.list.insert(links.list.end(), list.begin(), list.end());
    links.begin.push_back(static_cast<int32_t>(links.list.size()));
  }
  return links;
}

// Appends `count` taps that share loads, cut into lengths the kernels have.
void append_segments(RowPlan& plan, int64_t offset, int64_t tap, int64_t tap_step, int64_t count,
                     int64_t x_step) {
  while (count > 0) {
    // 6 = 3 + 3 beats 5 + 1, and 8 = 4 + 4 beats 7 + 1: a segment of one tap shares nothing.
    int64_t length = count == 6 ? 3 : count == 8 ? 4 : 0;
    for (int candidate : kSegmentLengths)
      if (length == 0 && candidate <= count) length = candidate;
    plan.segments.push_back({static_cast<int32_t>(offset), static_cast<int32_t>(tap),
                             static_cast<int32_t>(tap_step), static_cast<int32_t>(length)});
    offset += length * x_step;
    tap += length * tap_step;
    count -= length;
  }
}

void append_class(RowPlan& plan, int64_t first, int64_t step, int64_t size, int64_t x_step,
                  int32_t segment_begin) {
  plan.classes.push_back({static_cast<int32_t>(first), static_cast<int32_t>(step),
                          static_cast<int32_t>((size - first + step - 1) / step),
                          static_cast<int32_t>(x_step), segment_begin,
                          static_cast<int32_t>(plan.segments.size())});
}

// Sets the margins from the lowest and highest position that any segment reads, and makes the
// offsets count from the start of the margin.
void set_margins(RowPlan& plan, int64_t source_size) {
  int64_t lowest = 0, highest = source_size - 1;
  for (const WClass& c : plan.classes)
    for (int32_t s = c.segment_begin; s < c.segment_end; ++s) {
      const Segment& segment = plan.segments[s];
      lowest = std::min<int64_t>(lowest, segment.offset);
      highest = std::max<int64_t>(
          highest, segment.offset + int64_t(c.count + segment.length - 2) * c.x_step);
    }
  plan.left = static_cast<int32_t>(-lowest);
  plan.right = static_cast<int32_t>(highest - (source_size - 1));
  plan.source_size = static_cast<int32_t>(source_size);
  for (Segment& segment : plan.segments) segment.offset += plan.left;
}

// grad_input of a run of `size` cells whose first cell is position `origin` of the unpadded axis.
RowPlan gather_row(const Axis& axis, int64_t size, int64_t origin, int64_t shortest) {
  const int64_t s = axis.stride, d = axis.dilation, g = std::gcd(s, d), q = s / g;
  const int64_t shared = d / g;
  const bool share = size / (s * shared) >= shortest;
  const int64_t e = share ? shared : 1;
  RowPlan plan;
  plan.size = plan.kept = static_cast<int32_t>(size);
  for (int64_t r = 0; r < std::min(s * e, size); ++r) {
    // Taps k with (p - k d) divisible by s; there are none or every q-th.
    const int64_t p = r + origin + axis.before;
    const auto begin = static_cast<int32_t>(plan.segments.size());
    int64_t last = -1, count = 0;
    for (int64_t k = 0; k < axis.kernel; ++k)
      if ((p - k * d) % s == 0) last = k, ++count;
    if (share) {
      if (count) append_segments(plan, (p - last * d) / s, last, -q, count, e);
    } else {
      for (int64_t k = last; count > 0; k -= q, --count)
        append_segments(plan, (p - k * d) / s, k, 0, 1, e);
    }
    append_class(plan, r, s * e, size, e, begin);
  }
  set_margins(plan, axis.out);
  return plan;
}

RowPlan forward_row(const Axis& axis, int mode, int64_t shortest) {
  const int64_t s = axis.stride, d = axis.dilation, g = std::gcd(s, d);
  const int64_t shared = d / g;
  const bool share = axis.out / shared >= shortest;
  const int64_t e = share ? shared : 1, q = s / g;
  RowPlan plan;
  plan.size = plan.kept = static_cast<int32_t>(axis.out);
  for (int64_t r = 0; r < std::min(e, axis.out); ++r) {
    const auto begin = static_cast<int32_t>(plan.segments.size());
    const int64_t origin = r * s - axis.before;
    if (share)
      for (int64_t phase = 0; phase < std::min(q, axis.kernel); ++phase)
        append_segments(plan, origin + phase * d, phase, q, (axis.kernel - phase + q - 1) / q,
                        e * s);
    else
      for (int64_t k = 0; k < axis.kernel; ++k)
        append_segments(plan, origin + k * d, k, 0, 1, e * s);
    append_class(plan, r, e, axis.out, e * s, begin);
  }
  set_margins(plan, axis.in);
  if (mode != kZeros)
    for (int64_t i = -plan.left; i < axis.in + plan.right; ++i) {
      if ((i >= 0 && i < axis.in) || i < -axis.before || i >= axis.in + axis.after) continue;
      plan.margin.push_back({static_cast<int32_t>(source_index(i, axis.in, mode) + plan.left),
                             static_cast<int32_t>(i + plan.left)});
    }
  return plan;
}

RowPlan grad_input_row(const Axis& axis, int mode, int64_t shortest) {
  if (mode == kZeros || axis.before + axis.after == 0)
    return gather_row(axis, axis.in, 0, shortest);
  RowPlan plan = gather_row(axis, axis.in + axis.before + axis.after, -axis.before, shortest);
  plan.keep = static_cast<int32_t>(axis.before);
  plan.kept = static_cast<int32_t>(axis.in);
  for (int64_t i = -axis.before; i < axis.in + axis.after; ++i)
    if (i < 0 || i >= axis.in)
      plan.folds.push_back({static_cast<int32_t>(i + axis.before),
                            static_cast<int32_t>(source_index(i, axis.in, mode) + axis.before)});
  return plan;
}

}  // namespace

int64_t Links::longest() const {
  int64_t longest = 0;
  for (size_t i = 0; i + 1 < begin.size(); ++i)
    longest = std::max<int64_t>(longest, begin[i + 1] - begin[i]);
  return longest;
}

int64_t Links::most_sources() const {
  int64_t most = 1;
  std::vector<int32_t> sources;
  for (size_t i = 0; i + 1 < begin.size(); ++i) {
    sources.clear();
    for (int32_t at = begin[i]; at < begin[i + 1]; ++at) sources.push_back(list[at].source);
    std::sort(sources.begin(), sources.end());
    const auto distinct = std::unique(sources.begin(), sources.end()) - sources.begin();
    most = std::max<int64_t>(most, distinct);
  }
  return most;
}

Links links_of(const Axis& axis, int mode, bool backwards) {
  std::vector<std::vector<Link>> lists(backwards ? axis.in : axis.out);
  for (int64_t o = 0; o < axis.out; ++o)
    for (int64_t k = 0; k < axis.kernel; ++k) {
      const int64_t i =
          source_index(o * axis.stride + k * axis.dilation - axis.before, axis.in, mode);
      if (i >= 0)
        lists[backwards ? i : o].push_back(
            {static_cast<int32_t>(backwards ? o : i), static_cast<int32_t>(k)});
    }
  return group_by_destination(lists);
}

Links plane_links(const Axis& axis, int mode, bool backwards, int64_t multiplier) {
  const Links links = links_of(axis, mode, backwards);
  if (!backwards || multiplier == 1) return links;
  const auto destinations = static_cast<int64_t>(links.begin.size()) - 1;
  std::vector<std::vector<Link>> lists(destinations);
  for (int64_t i = 0; i < destinations; ++i)
    for (int64_t j = 0; j < multiplier; ++j)
      for (int32_t at = links.begin[i]; at < links.begin[i + 1]; ++at)
        lists[i].push_back({static_cast<int32_t>(links.list[at].source + j * axis.out),
                            static_cast<int32_t>(links.list[at].tap + j * axis.kernel)});
  return group_by_destination(lists);
}

int64_t plane_step(const Axis& axis, bool backwards) {
  const int64_t step = axis.dilation / std::gcd(axis.stride, axis.dilation);
  return (backwards && axis.stride > 1) || step >= (backwards ? axis.in : axis.out) ? 1 : step;
}

RowPlan row_of(const Axis& axis, int mode, bool backwards, int64_t shortest) {
  return backwards ? grad_input_row(axis, mode, shortest) : forward_row(axis, mode, shortest);
}

}  // namespace voxconv
