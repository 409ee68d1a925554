// SPDX-License-Identifier: Apache-2.0
#include "depthwise_flat_cells.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace voxconv {
namespace {

// What a tile reads of a line should stay in the first cache.
constexpr int64_t kCacheBytes = 24 << 10;

int64_t floor_div(int64_t a, int64_t b) { return a < 0 ? -ceil_div(-a, b) : a / b; }

// A tap of an axis: destination i of `targets` reads cell first + i * stride of `cells`, if there
// is one.
struct AxisTap {
  int64_t first, stride, cells, targets;

  // Destinations [begin, end) for which there is.
  std::pair<int64_t, int64_t> live() const {
    const int64_t begin =
        std::clamp<int64_t>(ceil_div(std::max<int64_t>(0, -first), stride), 0, targets);
    return {begin, std::clamp<int64_t>(floor_div(cells - 1 - first, stride) + 1, begin, targets)};
  }
};
using AxisTaps = std::vector<AxisTap>;

// In the order of the cells they read: backwards the last tap comes first.
AxisTaps taps_of(const Axis& axis, bool backwards) {
  AxisTaps taps;
  for (int64_t k = 0; k < axis.kernel; ++k) {
    const int64_t tap = backwards ? axis.kernel - 1 - k : k;
    const int64_t first = tap * axis.dilation - axis.before;
    taps.push_back(
        {backwards ? -first : first, axis.stride, axis.in, target_size(axis, backwards)});
  }
  return taps;
}

// Lanes of vectors of a plane for which a tap meets a cell of it: bits of [vector][tap]. `order`
// are the taps in their order, if it is not that of the axes.
struct LaneMasks {
  std::vector<std::pair<int64_t, int64_t>> lines, columns;  // that the taps of h and w read for
  std::vector<int64_t> place;                               // of a tap
  std::vector<uint16_t> bits;

  LaneMasks(const AxisTaps& h, const AxisTaps& w, int64_t vectors,
            const std::vector<int64_t>& order = {})
      : place(h.size() * w.size()), bits(vectors * h.size() * w.size(), 0) {
    for (const AxisTap& tap : h) lines.push_back(tap.live());
    for (const AxisTap& tap : w) columns.push_back(tap.live());
    std::iota(place.begin(), place.end(), 0);
    for (size_t i = 0; i < order.size(); ++i) place[order[i]] = static_cast<int64_t>(i);
  }

  // Lanes [lane, lane + count) of vector v are cells from `column` on of a line.
  void add(int64_t v, int64_t lane, int64_t line, int64_t column, int64_t count) {
    uint16_t* vector = bits.data() + v * static_cast<int64_t>(lines.size() * columns.size());
    for (size_t kw = 0; kw < columns.size(); ++kw) {
      const int64_t begin = std::clamp<int64_t>(columns[kw].first - column, 0, count);
      const int64_t end = std::clamp<int64_t>(columns[kw].second - column, begin, count);
      const auto live = static_cast<uint16_t>(((1 << end) - (1 << begin)) << lane);
      for (size_t kh = 0; kh < lines.size(); ++kh)
        if (line >= lines[kh].first && line < lines[kh].second)
          vector[place[kh * columns.size() + kw]] |= live;
    }
  }
};

// Destinations that a half of a vector has.
int64_t half_of(const Axis& w, int64_t lanes) { return std::min(lanes / 2, w.out); }

// Lanes are the cells of a plane, one after the other.
void place_lanes(LaneMasks& masks, int64_t cells, int64_t line, int64_t lanes) {
  for (int64_t cell = 0; cell < cells;) {
    const int64_t lane = cell % lanes, count = std::min(lanes - lane, line - cell % line);
    masks.add(cell / lanes, lane, cell / line, cell % line, count);
    cell += count;
  }
}

// Lines of a plane are visited in strips, so that what a tile reads of one is still in the first
// cache for the taps of the lines that follow.
void place_strips(FlatArgs& a, const Axis& h, const Axis& w, const FlatKernels& kernels) {
  const int64_t block = kTileVectors * kernels.lanes;
  const int64_t cells =
      kCacheBytes / (a.most_planes * h.kernel * kernels.item_bytes) / block * block;
  const bool whole = cells >= w.out;
  a.line = whole ? a.vectors * kernels.lanes : w.out;
  a.strip = whole ? a.line : std::max(cells, block);
}

// Halves of vectors are those of the lines; the last one of a line ends with it, the last vector
// has the last half twice. For grad_weight no cell counts twice.
void place_halves(FlatArgs& a, FlatTables& tables, LaneMasks& masks, const Axis& h, const Axis& w,
                  int64_t lanes, Pass pass) {
  const int64_t per_line = ceil_div(w.out, a.half);
  const int64_t halves = 2 * round_up(a.vectors, kTileVectors);
  tables.half_from.resize(halves);
  tables.half_to.resize(halves);
  a.half_from = tables.half_from.data();
  a.half_to = tables.half_to.data();
  for (int64_t i = 0; i < halves; ++i) {
    const int64_t half = std::min(i, h.out * per_line - 1), line = half / per_line;
    const int64_t column = std::min(half % per_line * a.half, w.out - a.half);
    tables.half_to[i] = line * w.out + column;
    tables.half_from[i] = line * h.stride * w.in + column * w.stride;
    const int64_t again = pass == Pass::grad_weight ? a.half_again(i) : 0;
    masks.add(i / 2, i % 2 * lanes / 2 + again, line, column + again, a.half - again);
  }
  tables.half_least = tables.half_most = tables.half_from;
  std::vector<int64_t>&least = tables.half_least, &most = tables.half_most;
  for (int64_t i = halves - 1; i > 0; --i) least[i - 1] = std::min(least[i - 1], least[i]);
  for (int64_t i = 1; i < halves; ++i) most[i] = std::max(most[i - 1], most[i]);
  a.half_least = least.data();
  a.half_most = most.data();
}

// What a pair of destinations reads: the cell that many lines and columns from its own, with these
// taps for the even and for the odd one, if there are any.
struct PairTaps {
  int64_t line, column, tap[2];
};

// Of the lines of a phase of h, which share them, in the order of the lines they read. Neighbouring
// taps along w read the same cell.
std::vector<PairTaps> pair_taps(const Axis& h, const Axis& w, int64_t phase) {
  std::vector<PairTaps> taps;
  for (int64_t kh = h.kernel; kh-- > 0;) {
    const int64_t line = phase + h.before - kh * h.dilation;
    if (line % h.stride != 0) continue;
    for (int64_t kw = 0; kw < w.kernel; ++kw) {
      const int64_t column = w.before - kw * w.dilation, tap = kh * w.kernel + kw;
      const bool odd = column % 2 != 0, both = !odd && w.dilation == 1 && kw + 1 < w.kernel;
      taps.push_back({line / h.stride,
                      floor_div(column + odd, 2),
                      {odd ? -1 : tap, odd    ? tap
                                       : both ? tap + 1
                                              : -1}});
      kw += both;
    }
  }
  return taps;
}

// Pairs of destinations in a line of h of a plane, and how many of them a half of a vector has.
struct PairLine {
  int64_t pairs, half, halves;

  PairLine(const Axis& w, int64_t lanes)
      : pairs(ceil_div(w.in, 2)), half(std::min(lanes / 2, pairs)), halves(ceil_div(pairs, half)) {}
  int64_t vectors(const Axis& h, int64_t phase) const {
    return round_up(ceil_div(ceil_div(h.in - phase, h.stride) * halves, 2), kPairVectors);
  }
};

// Lanes are pairs of destinations of the lines of a phase of h, and of the next phase after these.
// The last half of a line ends with it, the last vectors of a phase have its last half again.
void place_pairs(FlatArgs& a, FlatTables& tables, const Axis& h, const Axis& w, int64_t lanes) {
  const PairLine row(w, lanes);
  int64_t begin = 0, low = 0, high = 0;
  for (int64_t phase = 0; phase < std::min(h.stride, h.in); ++phase) {
    const std::vector<PairTaps> taps = pair_taps(h, w, phase);
    const auto count = static_cast<int64_t>(taps.size());
    const auto step = static_cast<int64_t>(tables.pair_steps.size());
    const auto mask = static_cast<int64_t>(tables.masks.size());
    const int64_t vectors = row.vectors(h, phase), lines = ceil_div(h.in - phase, h.stride);
    tables.masks.resize(mask + vectors * count * 2);
    for (int64_t i = 0; i < 2 * vectors; ++i) {
      const int64_t half = std::min(i, lines * row.halves - 1), line = half / row.halves;
      const int64_t column = std::min(half % row.halves * row.half, row.pairs - row.half);
      tables.half_from.push_back(line * w.out + column);
      tables.half_to.push_back((phase + line * h.stride) * w.in + 2 * column);
      tables.half_cells.push_back(std::min(2 * row.half, w.in - 2 * column));
      for (int64_t t = 0; t < count; ++t) {
        const int64_t from_line = line + taps[t].line, from = column + taps[t].column;
        low = std::min(low, from_line * w.out + from);
        high = std::max(high, from_line * w.out + from);
        if (from_line < 0 || from_line >= h.out) continue;
        const int64_t first = std::clamp<int64_t>(-from, 0, row.half);
        const int64_t last = std::clamp<int64_t>(w.out - from, first, row.half);
        for (int odd = 0; odd < 2; ++odd)
          if (taps[t].tap[odd] >= 0)
            tables.masks[mask + (i / 2 * count + t) * 2 + odd] |=
                static_cast<uint16_t>(((1 << last) - (1 << first)) << i % 2 * lanes / 2);
      }
    }
    for (const PairTaps& t : taps)
      tables.pair_steps.push_back(
          {t.line * w.out + t.column,
           {std::max<int64_t>(t.tap[0], 0), std::max<int64_t>(t.tap[1], 0)}});
    tables.phases.push_back({begin, begin + vectors, step, step + count, mask});
    begin += vectors;
  }
  a.whole_halves = row.half == lanes / 2 && w.in % 2 == 0;
  a.before = lanes / 2 - low;
  a.after = std::max<int64_t>(0, high + lanes - a.cells);
  a.half_from = tables.half_from.data();
  a.half_to = tables.half_to.data();
  a.half_cells = tables.half_cells.data();
  a.phases = tables.phases.data();
  a.phase_count = static_cast<int64_t>(tables.phases.size());
  a.pair_steps = tables.pair_steps.data();
  a.masks = tables.masks.data();
}

// Where the taps of a plane read.
void place_taps(FlatTables& tables, const AxisTaps& h, const AxisTaps& w, int64_t line) {
  for (const AxisTap& kh : h)
    for (const AxisTap& kw : w) tables.offsets.push_back(kh.first * line + kw.first);
}

// The same, and the parts of the source that they read, see part_taps: part by part, so that it is
// one that passes through the first cache at a time.
void place_parts(FlatArgs& a, FlatTables& tables, const AxisTaps& h, const AxisTaps& w) {
  std::vector<int64_t>& first = tables.split_first;
  struct Tap {
    int64_t part, offset, number;
  };
  std::vector<Tap> taps;
  for (const AxisTap& kh : h) {
    const int64_t line = floor_div(kh.first, kh.stride), from = kh.first - line * kh.stride;
    const auto part = std::find(first.begin(), first.end(), from) - first.begin();
    if (part == static_cast<int64_t>(first.size())) first.push_back(from);
    for (const AxisTap& kw : w) {
      const int64_t column = floor_div(kw.first, 2), number = static_cast<int64_t>(taps.size());
      taps.push_back({2 * part + kw.first - 2 * column, line * kw.targets + column, number});
    }
  }
  std::stable_sort(taps.begin(), taps.end(),
                   [](const Tap& a, const Tap& b) { return a.part < b.part; });
  for (const Tap& tap : taps) {
    tables.tap_parts.push_back(tap.part);
    tables.offsets.push_back(tap.offset);
    tables.tap_order.push_back(tap.number);
  }
  a.tap_order = tables.tap_order.data();
  a.split = {
      first.data(), static_cast<int64_t>(first.size()), h[0].stride, 0, w[0].targets, h[0].cells,
      w[0].cells};
}

// Taps of an axis that destinations phase, phase + stride, ... of a pass backwards have, in the
// order of the cells they read, and which they are.
std::pair<AxisTaps, std::vector<int64_t>> taps_of_phase(const Axis& axis, int64_t stride,
                                                        int64_t phase, int64_t targets) {
  std::pair<AxisTaps, std::vector<int64_t>> taps;
  for (int64_t k = axis.kernel; k-- > 0;)
    if (const int64_t first = phase + axis.before - k * axis.dilation; first % stride == 0) {
      taps.first.push_back({first / stride, 1, axis.out, targets});
      taps.second.push_back(k);
    }
  return taps;
}

// The parts of the merged form, their taps and their lanes.
void place_merged(FlatArgs& a, FlatTables& tables, const Axis& h, const Axis& w, int64_t lanes) {
  for (int64_t line = 0; line < h.stride; ++line)
    for (int64_t column = 0; column < 2; ++column) {
      const int64_t lines = ceil_div(h.in - line, h.stride), cells = lines * w.out;
      const auto [kh, rows] = taps_of_phase(h, h.stride, line, lines);
      const auto [kw, columns] = taps_of_phase(w, 2, column, w.out);
      tables.parts.push_back({static_cast<int64_t>(tables.offsets.size()),
                              static_cast<int64_t>(kh.size() * kw.size()),
                              static_cast<int64_t>(tables.masks.size()), cells, line, column});
      place_taps(tables, kh, kw, w.out);
      for (const int64_t row : rows)
        for (const int64_t k : columns) tables.tap_order.push_back(row * w.kernel + k);
      LaneMasks masks(kh, kw, round_up(a.vectors, kTileVectors) + kTileVectors);
      place_lanes(masks, cells, w.out, lanes);
      tables.masks.insert(tables.masks.end(), masks.bits.begin(), masks.bits.end());
    }
  a.tap_order = tables.tap_order.data();
  a.split = {nullptr, h.stride, h.stride, 0, w.out, h.in, w.in};
}

void bound_taps(FlatArgs& a, const FlatTables& tables) {
  a.taps = a.places = static_cast<int64_t>(tables.offsets.size());
  a.offsets = tables.offsets.data();
  const auto [low, high] = std::minmax_element(tables.offsets.begin(), tables.offsets.end());
  a.before = std::max<int64_t>(0, -*low);
  a.after = std::max<int64_t>(0, *high);
}

// Steps of halves: of two neighbours along w, if these read neighbours. Those of an odd kernel are
// as many wherever they begin: at even cells they cross fewer cache lines.
void place_steps(FlatArgs& a, FlatTables& tables, const Axis& w) {
  const bool both = w.dilation == 1;
  const int64_t first = both && w.kernel % 2 == 1 && w.before % 2 == 1 ? -1 : 0;
  for (int64_t line = 0; line < a.taps; line += w.kernel)
    for (int64_t kw = first; kw < w.kernel; kw += both ? 2 : 1) {
      const int64_t next = both && kw + 1 < w.kernel ? line + kw + 1 : -1;
      tables.tap_order.insert(tables.tap_order.end(), {kw < 0 ? -1 : line + kw, next});
      tables.steps.push_back(tables.offsets[line] + kw * w.dilation);
      a.before = std::max(a.before, -tables.steps.back());
    }
  a.steps = tables.steps.data();
  a.step_count = static_cast<int64_t>(tables.steps.size());
  a.tap_order = tables.tap_order.data();
  a.places = 2 * a.step_count;
}

// Bits 0 to 7, two apart.
uint32_t two_apart(uint32_t bits) {
  bits = (bits | bits << 4) & 0x0f0f;
  bits = (bits | bits << 2) & 0x3333;
  return (bits | bits << 1) & 0x5555;
}

// The lanes of the steps of each half, from those of its taps.
void place_step_lanes(const FlatArgs& a, FlatTables& tables, const LaneMasks& masks,
                      int64_t lanes) {
  const auto halves = static_cast<int64_t>(tables.half_to.size());
  tables.masks.reserve(halves * a.step_count);
  for (int64_t i = 0; i < halves; ++i) {
    const uint16_t* vector = masks.bits.data() + i / 2 * a.taps;
    const auto lanes_of = [&](int64_t tap) {
      const uint32_t bits = tap < 0 ? 0 : vector[tap] >> (i % 2 * lanes / 2);
      return two_apart(bits & ((1u << lanes / 2) - 1));
    };
    for (const int64_t* tap = a.tap_order; tap < a.tap_order + a.places; tap += 2)
      tables.masks.push_back(static_cast<uint16_t>(lanes_of(tap[0]) | lanes_of(tap[1]) << 1));
  }
}

}  // namespace

void part_taps(FlatArgs& a, FlatTables& tables) {
  for (size_t t = 0; t < tables.tap_parts.size(); ++t)
    tables.offsets[t] += tables.tap_parts[t] * a.split.step;
}

FlatForm flat_form(const Axis& h, const Axis& w, Pass pass, const FlatKernels& kernels) {
  if (h.stride == 1 && w.stride == 1 && h.in == h.out && w.in == w.out) return FlatForm::lines;
  if (w.stride != 2) return FlatForm::none;
  const bool splits = kernels.splits && w.in > 1 && w.in <= 2 * w.out;
  if (pass == Pass::grad_input) return splits ? FlatForm::merged : FlatForm::pairs;
  return splits ? FlatForm::split : FlatForm::halves;
}

int64_t flat_vectors(FlatForm form, const Axis& h, const Axis& w, int64_t lanes) {
  if (form == FlatForm::lines || form == FlatForm::split) return ceil_div(h.out * w.out, lanes);
  if (form == FlatForm::merged) return ceil_div(ceil_div(h.in, h.stride) * w.out, lanes);
  if (form == FlatForm::halves) return ceil_div(h.out * ceil_div(w.out, half_of(w, lanes)), 2);
  int64_t vectors = 0;
  for (int64_t phase = 0; phase < std::min(h.stride, h.in); ++phase)
    vectors += PairLine(w, lanes).vectors(h, phase);
  return vectors;
}

double step_taps(const Axis& w) {
  return ratio(w.dilation > 1 ? 2 * w.kernel : round_up(w.kernel, 2), w.kernel);
}

void place_cells(FlatArgs& a, FlatTables& tables, const Axis& h, const Axis& w, Pass pass,
                 const FlatKernels& kernels) {
  const bool backwards = pass == Pass::grad_input;
  const AxisTaps kh = taps_of(h, backwards), kw = taps_of(w, backwards);
  const bool split = a.form == FlatForm::split, merged = a.form == FlatForm::merged;
  a.cells = backwards || split ? h.out * w.out : h.in * w.in;
  a.vectors = flat_vectors(a.form, h, w, kernels.lanes);
  a.tap_next = backwards && !merged ? -1 : 1;
  if (merged)
    place_merged(a, tables, h, w, kernels.lanes);
  else if (split)
    place_parts(a, tables, kh, kw);
  else
    place_taps(tables, kh, kw, backwards ? w.out : w.in);
  bound_taps(a, tables);
  if (!merged) tables.parts = {{0, a.taps, 0, a.cells, 0, 0}};
  a.parts = tables.parts.data();
  a.part_count = static_cast<int64_t>(tables.parts.size());
  if (a.form == FlatForm::pairs) return place_pairs(a, tables, h, w, kernels.lanes);
  LaneMasks masks(kh, kw, round_up(a.vectors, kTileVectors) + kTileVectors,
                  split ? tables.tap_order : std::vector<int64_t>{});
  if (a.form == FlatForm::halves) {
    a.half = half_of(w, kernels.lanes);
    place_steps(a, tables, w);
    place_halves(a, tables, masks, h, w, kernels.lanes, pass);
  } else {
    place_strips(a, h, w, kernels);
    if (!merged) place_lanes(masks, a.cells, w.out, kernels.lanes);
  }
  if (a.form == FlatForm::halves)
    place_step_lanes(a, tables, masks, kernels.lanes);
  else if (!merged)
    tables.masks = std::move(masks.bits);
  a.masks = tables.masks.data();
}

}  // namespace voxconv
