// SPDX-License-Identifier: Apache-2.0
#include "dilated_plan.h"

#include <algorithm>
#include <numeric>

namespace voxconv {

namespace {

int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); }

// Of `count` destinations those that meet a cell with a tap.
struct Range {
  int64_t begin, end;
};
Range live(const AxisPlan& plan, int64_t offset, int64_t count, int mode) {
  if (mode != kZeros) return {0, count};
  return {ceil_div(std::max<int64_t>(-offset, 0), plan.stride),
          std::min(count, ceil_div(std::max<int64_t>(plan.source - offset, 0), plan.stride))};
}

}  // namespace

AxisPlan axis_plan(const Axis& axis, int mode, bool backwards) {
  AxisPlan plan;
  plan.stride = backwards ? 1 : axis.stride;
  plan.source = backwards ? axis.out : axis.in;
  const int64_t step = backwards ? axis.stride : 1, size = target_size(axis, backwards);
  for (int64_t first = 0; first < step && first < size; ++first) {
    const int64_t count = ceil_div(size - first, step);
    const auto begin = static_cast<int32_t>(plan.taps.size());
    for (int64_t k = 0; k < axis.kernel; ++k) {
      // Backwards, output o reads input first + step * t with tap k where o * stride + k * dilation
      // is their sum and the padding before.
      const int64_t reach = first + axis.before - k * axis.dilation;
      if (backwards && reach % step != 0) continue;
      const int64_t offset = backwards ? reach / step : k * axis.dilation - axis.before;
      const Range met = live(plan, offset, count, mode);
      if (met.begin < met.end)
        plan.taps.push_back({static_cast<int32_t>(k), static_cast<int32_t>(offset)});
    }
    const auto by_offset = [](const AxisTap& a, const AxisTap& b) { return a.offset < b.offset; };
    std::sort(plan.taps.begin() + begin, plan.taps.end(), by_offset);
    plan.classes.push_back({static_cast<int32_t>(first), static_cast<int32_t>(step),
                            static_cast<int32_t>(count), begin,
                            static_cast<int32_t>(plan.taps.size())});
  }
  return plan;
}

void DilatedPlan::plan_planes(const AxisPlan& d, const Axis& axis, int mode) {
  const int64_t size = d.classes.front().step == 1 ? d.classes.front().count : axis.in;
  plane_begin_.push_back(0);
  for (int64_t plane = 0; plane < size; ++plane) {
    const auto classes = static_cast<int64_t>(d.classes.size());
    const AxisClass& of = d.classes[plane % classes];
    for (int32_t i = of.begin; i < of.end; ++i) {
      const int64_t position = d.stride * (plane / classes) + d.taps[i].offset;
      const int64_t source = source_index(position, d.source, mode);
      if (source >= 0) planes_.push_back({d.taps[i].tap, static_cast<int32_t>(source)});
    }
    const auto end = static_cast<int32_t>(planes_.size());
    most_planes_ = std::max<int64_t>(most_planes_, end - plane_begin_.back());
    plane_begin_.push_back(end);
  }
  // Planes so far apart read the same ones but for `fresh_planes_`.
  const int64_t apart = axis.dilation / std::gcd(axis.dilation, d.stride);
  for (int64_t first = 0; first < std::min(apart, size); ++first)
    for (int64_t plane = first; plane < size; plane += apart)
      plane_order_.push_back(static_cast<int32_t>(plane));
  fresh_planes_ = std::min(d.stride, most_planes_);
}

// Cells that are read with one residue of the stride lie side by side in a staged row: so are those
// of neighbouring destinations.
void DilatedPlan::plan_columns(const AxisPlan& w, int64_t lanes) {
  column_taps_ = w.taps;
  int64_t longest = 0;
  for (const AxisClass& c : w.classes) longest = std::max<int64_t>(longest, c.count);
  for (int64_t residue = 0; residue < w.stride; ++residue) {
    const auto is_own = [&](const AxisTap& tap) {
      return tap.offset - floor_div(tap.offset, w.stride) * w.stride == residue;
    };
    int64_t low = INT64_MAX, high = INT64_MIN;
    for (const AxisTap& tap : w.taps)
      if (is_own(tap)) {
        low = std::min(low, floor_div(tap.offset, w.stride));
        high = std::max(high, floor_div(tap.offset, w.stride));
      }
    if (low > high) continue;
    const int64_t count = high - low + round_up(longest, lanes);
    for (size_t i = 0; i < w.taps.size(); ++i)
      if (is_own(w.taps[i]))
        column_taps_[i].offset =
            static_cast<int32_t>(pitch_ + floor_div(w.taps[i].offset, w.stride) - low);
    segments_.push_back({static_cast<int32_t>(residue + w.stride * low),
                         static_cast<int32_t>(w.stride), static_cast<int32_t>(count),
                         static_cast<int32_t>(pitch_)});
    pitch_ += count;
  }
  pitch_ = std::max(round_up(pitch_, lanes), lanes);
}

// Cuts classes of columns, between vectors, into pieces that leave out taps which meet no cell.
void DilatedPlan::cut_columns(const AxisPlan& w, int mode, int64_t lanes) {
  const std::vector<AxisTap> staged = std::move(column_taps_);
  column_taps_.clear();
  for (const AxisClass& c : w.classes) {
    std::vector<Range> met;  // by each tap, in whole vectors
    std::vector<int64_t> cuts = {0, c.count};
    for (int32_t i = c.begin; i < c.end; ++i) {
      const Range range = live(w, w.taps[i].offset, c.count, mode);
      met.push_back({range.begin / lanes * lanes, round_up(range.end, lanes)});
      for (const int64_t cut : {met.back().begin, met.back().end})
        if (cut < c.count) cuts.push_back(cut);
    }
    std::sort(cuts.begin(), cuts.end());
    cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
    for (size_t piece = 0; piece + 1 < cuts.size(); ++piece) {
      const int64_t from = cuts[piece];
      const auto begin = static_cast<int32_t>(column_taps_.size());
      for (int32_t i = c.begin; i < c.end; ++i)
        if (met[i - c.begin].begin <= from && from < met[i - c.begin].end)
          column_taps_.push_back({staged[i].tap, static_cast<int32_t>(staged[i].offset + from)});
      column_classes_.push_back({static_cast<int32_t>(c.first + c.step * from), c.step,
                                 static_cast<int32_t>(cuts[piece + 1] - from), begin,
                                 static_cast<int32_t>(column_taps_.size())});
    }
  }
}

// Tiles of so many rows. Returns the most slots that one of a class needs: taps whose rows overlap,
// or touch, share them.
int64_t DilatedPlan::plan_rows(const AxisPlan& h, int64_t rows) {
  row_classes_ = h.classes;
  row_taps_ = h.taps;
  slots_.clear();
  slot_begin_.assign(1, 0);
  tiles_.clear();
  int64_t most = 0;
  for (size_t c = 0; c < h.classes.size(); ++c) {
    const AxisClass& of = h.classes[c];
    for (int64_t residue = 0; residue < h.stride; ++residue) {
      int64_t run = 0, end = INT64_MIN;  // first slot of the current run; what would follow it
      int64_t low = 0;
      for (int32_t i = of.begin; i < of.end; ++i) {
        const int64_t at = floor_div(h.taps[i].offset, h.stride);
        if (h.taps[i].offset - at * h.stride != residue) continue;
        if (at > end || end == INT64_MIN) {
          run = static_cast<int64_t>(slots_.size());
          low = end = at;
        }
        for (; end < at + rows; ++end)
          slots_.push_back(static_cast<int32_t>(residue + h.stride * end));
        row_taps_[i].offset = static_cast<int32_t>(run + at - low) - slot_begin_.back();
      }
    }
    slot_begin_.push_back(static_cast<int32_t>(slots_.size()));
    most = std::max<int64_t>(most, slot_begin_[c + 1] - slot_begin_[c]);
    for (int64_t t = 0; t < of.count; t += rows)
      tiles_.push_back({static_cast<int32_t>(c), static_cast<int32_t>(t),
                        static_cast<int32_t>(std::min<int64_t>(rows, of.count - t))});
  }
  return most;
}

// The rows of a tile that take the least time, in clocks of a processor that does two multiply-adds
// of a vector in each: more of them share what they read, and come out even in vectors, as long as
// what is staged stays in the second cache.
void DilatedPlan::choose_tile(const AxisPlan& h, Pass pass, const DilatedKernels& kernels,
                              DilatedArgs& a) {
  constexpr int64_t kMostRows = 16, kFewestTiles = 16;
  constexpr double kCopyClocks = 2, kSpillClocks = 3;
  const bool weights = pass == Pass::grad_weight;
  const int64_t lanes = kernels.lanes, planes = weights ? 1 : std::max<int64_t>(most_planes_, 1);
  const int64_t blocks = block_count(a.out, kernels.most_out);
  const int64_t vectors = weights ? 1 : kernels.vectors(ceil_div(a.out, blocks));
  const double room = double(caches().second_bytes) / 2 / double(kernels.item_bytes);
  int64_t tallest = 0, columns = 0;
  for (const AxisClass& c : column_classes_) columns += ceil_div(c.count, lanes);
  for (const AxisClass& c : h.classes) tallest = std::max<int64_t>(tallest, c.count);
  const double row_taps = double(most_planes_) * double(h.taps.size()) / double(h.classes.size());
  const int64_t others = a.batch * a.groups * a.target_size[0] * int64_t(h.classes.size());
  int64_t best = 1;
  double least = 0;
  for (int64_t rows = 1; rows <= std::min(tallest, kMostRows); ++rows) {
    const int64_t slots = plan_rows(h, rows), tiles = ceil_div(tallest, rows);
    const double staged = double(planes * slots * pitch_);
    const double chunks = std::max(1.0, double(a.in) * staged / room);
    const double copied = weights      ? double(most_planes_)
                          : chunks > 1 ? 1
                                       : double(fresh_planes_) / double(planes);
    double products = 0;  // of vectors, for a channel read and one made
    for (const AxisClass& c : column_classes_)
      products += row_taps * double(c.end - c.begin) *
                  double(round_up(ceil_div(c.count, lanes) * rows, vectors));
    double clocks = double(a.in * a.out) * products / 2;
    clocks += kCopyClocks * double(a.in) * staged / double(lanes) * copied;
    clocks += kSpillClocks * (chunks - 1) * double(a.out * columns * rows);
    if (weights)  // sums of lanes
      clocks += 8 * double(a.in * a.out) * row_taps * double(column_taps_.size());
    clocks *= double(tiles);
    if (others * tiles < kFewestTiles) clocks *= double(kFewestTiles) / double(others * tiles);
    if (least != 0 && clocks >= least) continue;
    least = clocks;
    best = rows;
  }
  const int64_t slots = plan_rows(h, best);
  a.pitch = pitch_;
  a.plane_pitch = slots * pitch_;
  a.channel_pitch = odd_lines(planes * a.plane_pitch, kLineBytes / kernels.item_bytes);
  const auto fits = static_cast<int64_t>(room / double(a.channel_pitch));
  a.in_chunk = std::clamp<int64_t>(fits, std::min<int64_t>(a.in, 8), a.in);
  a.in_chunk = ceil_div(a.in, ceil_div(a.in, a.in_chunk));
  a.sum_vectors = columns * best + int64_t(column_classes_.size()) * kMostVectors;
  a.h = {row_classes_.data(),
         row_taps_.data(),
         slots_.data(),
         slot_begin_.data(),
         tiles_.data(),
         static_cast<int64_t>(tiles_.size()),
         h.stride,
         slots};
}

DilatedPlan::DilatedPlan(const DilatedShape& shape, Pass pass, const DilatedKernels& kernels,
                         DilatedArgs& a) {
  const bool backwards = pass == Pass::grad_input;
  const Axis* axis = shape.conv.axis;
  a.batch = shape.conv.batch;
  a.groups = shape.groups;
  a.in = backwards ? shape.out : shape.in;
  a.out = backwards ? shape.in : shape.out;
  a.mode = shape.conv.mode;
  for (int i = 0; i < 3; ++i) {
    a.kernel[i] = axis[i].kernel;
    a.source_size[i] = backwards ? axis[i].out : axis[i].in;
    a.target_size[i] = backwards ? axis[i].in : axis[i].out;
  }
  plan_planes(axis_plan(axis[0], a.mode, backwards), axis[0], a.mode);
  const AxisPlan columns = axis_plan(axis[2], a.mode, backwards);
  plan_columns(columns, kernels.lanes);
  // A weight has the sums of a whole row.
  if (pass == Pass::grad_weight)
    column_classes_ = columns.classes;
  else
    cut_columns(columns, a.mode, kernels.lanes);
  choose_tile(axis_plan(axis[1], a.mode, backwards), pass, kernels, a);
  a.planes = planes_.data();
  a.plane_begin = plane_begin_.data();
  a.plane_order = plane_order_.data();
  a.most_planes = most_planes_;
  a.w = {column_classes_.data(), column_taps_.data(), segments_.data(),
         static_cast<int64_t>(column_classes_.size()), static_cast<int64_t>(segments_.size())};
}

}  // namespace voxconv
