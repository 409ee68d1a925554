// SPDX-License-Identifier: Apache-2.0
#include "spectral_plan.h"

#include <algorithm>
#include <cmath>

namespace voxconv {
namespace {

// The taps of an axis that ever meet an element of the input, and their places.
struct Taps {
  int64_t first, count, low, high;
};

Taps live_taps(const Axis& a) {
  const int64_t past = std::max<int64_t>(a.before - (a.out - 1) * a.stride, 0);
  const int64_t first = std::min((past + a.dilation - 1) / a.dilation, a.kernel - 1);
  const int64_t last = std::max(std::min(a.kernel - 1, (a.in - 1 + a.before) / a.dilation), first);
  return {first, last - first + 1, first * a.dilation - a.before, last * a.dilation - a.before};
}

// A way to cut an axis besides a number of pieces: see cut_lattice.
constexpr int64_t kLattice = 0;

int64_t floor_divide(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

Window reversed(const Window& w) {
  return {w.begin, w.size, w.first, w.count, -w.step, -w.offset, w.skip};
}

// Outputs (grad_input: inputs) begin .. end, and all that they read: an output at place p reads the
// inputs at p + the place of a tap. Raises `length` until what wraps around meets nothing that
// counts and no two elements share a place.
Piece make_piece(const Axis& a, const Taps& t, Pass pass, int64_t begin, int64_t end,
                 int64_t& length) {
  const int64_t s = a.stride, size = end - begin;
  const Window taps = {t.first, t.count, 0, t.count, a.dilation, t.low};
  length = std::max(length, t.high - t.low + 1);
  if (pass == Pass::grad_input) {
    const int64_t first = std::max<int64_t>(-floor_divide(t.high - begin, s), 0);
    const int64_t last = std::max(std::min(a.out - 1, floor_divide(end - 1 - t.low, s)), first - 1);
    const int64_t count = last - first + 1, low = first * s - begin, high = last * s - begin;
    length = std::max(length, size);
    if (count > 0)
      length = std::max({length, size - low - t.low, high + t.high + 1, high - low + 1});
    return {{first, count, 0, count, s, low}, taps, {begin, size, 0, size, 1, 0}};
  }
  const int64_t first = std::max<int64_t>(begin * s + t.low, 0);
  const int64_t last = std::max(std::min(a.in - 1, (end - 1) * s + t.high), first - 1);
  const int64_t count = last - first + 1, low = first - begin * s, high = last - begin * s;
  const int64_t reach = (size - 1) * s;
  length = std::max(length, reach + 1);
  if (count > 0) length = std::max({length, reach + t.high - low + 1, high - t.low + 1});
  const Window in = {first, count, 0, count, 1, low}, out = {begin, size, 0, size, s, 0};
  return pass == Pass::forward ? Piece{in, reversed(taps), out} : Piece{in, reversed(out), taps};
}

// Moves a whole axis of which only some elements have places.
void widen(Window& window, int64_t size) {
  window.first += window.begin;
  window.begin = 0;
  window.size = size;
}

int64_t remainder(int64_t a, int64_t b) { return a - b * floor_divide(a, b); }

// Every dilation-th element of the target reads every dilation-th element of the source with a
// dilation of 1: short circles, and as many of them.
AxisCut cut_lattice(const Axis& a, Pass pass) {
  const int64_t step = a.dilation, sign = pass == Pass::grad_input ? 1 : -1;
  const int64_t size = pass == Pass::grad_input ? a.in : a.out;
  const int64_t read = pass == Pass::grad_input ? a.out : a.in;
  const Taps taps = live_taps(a);
  AxisCut cut{1, {}};
  for (int64_t i = 0; i < std::min(step, size); ++i) {
    // Target i + j * step reads source from + (j + sign * (tap - before)) * step.
    const int64_t from = remainder(i + sign * a.before, step);
    const int64_t before = sign * floor_divide(i + sign * a.before, step);
    const int64_t targets = (size - i + step - 1) / step;
    const int64_t sources = std::max<int64_t>((read - from + step - 1) / step, 0);
    Axis axis{targets, sources, a.kernel, 1, 1, before, 0};
    if (pass != Pass::grad_input) std::swap(axis.in, axis.out);
    const Taps places = {taps.first, taps.count, taps.first - before,
                         taps.first + taps.count - 1 - before};
    Piece piece = make_piece(axis, places, pass, 0, targets, cut.length);
    if (pass == Pass::grad_weight) {  // which adds up tiles: taps need the same places in all
      piece.a.offset += before;
      piece.result.offset += before;
    }
    Window& target = pass == Pass::grad_weight ? piece.b : piece.result;
    piece.a.begin = from + piece.a.begin * step;
    target.begin = i + target.begin * step;
    piece.a.skip = target.skip = step;
    cut.pieces.push_back(piece);
  }
  cut.length = fast_length(cut.length);
  return cut;
}

// Into pieces, or for kLattice along the lattice of the dilation.
AxisCut cut_axis(const Axis& a, Pass pass, int64_t pieces) {
  if (pieces == kLattice) return cut_lattice(a, pass);
  const int64_t size = pass == Pass::grad_input ? a.in : a.out;
  const int64_t step = (size + pieces - 1) / pieces;
  const Taps taps = live_taps(a);
  AxisCut cut{1, {}};
  for (int64_t begin = 0; begin < size; begin += step)
    cut.pieces.push_back(
        make_piece(a, taps, pass, begin, std::min(size, begin + step), cut.length));
  cut.length = fast_length(cut.length);
  return cut;
}

// An axis cut in one way, as the estimate sees it.
struct Candidate {
  int64_t cut, pieces;
  double length, line_cost, a, b, result;
};

Candidate make_candidate(const Axis& axis, Pass pass, int64_t pieces) {
  const AxisCut cut = cut_axis(axis, pass, pieces);
  Candidate c{pieces, static_cast<int64_t>(cut.pieces.size()), double(cut.length), 0, 0, 0, 0};
  c.line_cost = fft_cost(cut.length);
  for (const Piece& p : cut.pieces) {
    c.a = std::max(c.a, double(p.a.size));
    c.b = std::max(c.b, double(p.b.size));
    c.result = std::max(c.result, double(p.result.size));
  }
  return c;
}

// Scratch up to this stays near; beyond it every doubling costs this share more. Measured with
// blocks of 3 to 120 MB on a processor of 1 MB L2 and 32 MB L3, which others used too.
constexpr double kNearBytes = 5 << 20, kFarFactor = 0.4, kCellBytes = 128;

double scratch_bytes(const Candidate& d, const Candidate& h, const Candidate& w) {
  const double columns = std::floor(w.length / 2) + 1;
  return kCellBytes * columns * (std::max(d.a * h.a, d.result * h.result) + d.b * h.b);
}

// Cycles of a block, roughly.
double estimate(const Candidate& d, const Candidate& h, const Candidate& w) {
  // Of a real cell that is moved, and of a cell when two rows are separated or merged.
  constexpr double kMoveCost = 5, kPairCost = 6;
  const double columns = std::floor(w.length / 2) + 1;
  const double rows = d.a * h.a + d.b * h.b + d.result * h.result;
  const double cells = d.a * h.a * w.a + d.b * h.b * w.b + d.result * h.result * w.result;
  const double cycles = kMoveCost * cells + rows / 2 * (w.line_cost + kPairCost * w.length) +
                        columns * (d.a + d.b + d.result) * h.line_cost +
                        columns * h.length * 3 * d.line_cost;
  const double far = std::log2(scratch_bytes(d, h, w) / kNearBytes);
  return cycles * (1 + kFarFactor * std::max(far, 0.0)) * double(d.pieces * h.pieces * w.pieces);
}

// The cheapest cut of the three axes: d along its lattice (so h for grad_weight, which has two
// large operands in the scratch; otherwise h, and always w, would take planes apart: measured to be
// slower), and into pieces, but not where the scratch is near anyway.
void choose_pieces(const Axis (&axis)[3], Pass pass, int64_t (&chosen)[3]) {
  constexpr int64_t kShortestPiece = 8;
  std::vector<Candidate> list[3];
  for (int i = 0; i < 3; ++i) list[i].push_back(make_candidate(axis[i], pass, 1));
  const bool near = scratch_bytes(list[0][0], list[1][0], list[2][0]) <= kNearBytes;
  for (int i = 0; i < (pass == Pass::grad_weight ? 2 : 1); ++i)
    if (axis[i].dilation > 1 && axis[i].stride == 1)
      list[i].push_back(make_candidate(axis[i], pass, kLattice));
  for (int i = 0; i < 3 && !near; ++i) {
    const Axis& a = axis[i];
    const int64_t size = pass == Pass::grad_input ? a.in : a.out * a.stride;
    double shortest = list[i][0].length;
    for (int64_t pieces = 2; size / pieces >= kShortestPiece; pieces += 1 + pieces / 4) {
      const Candidate c = make_candidate(a, pass, pieces);
      if (c.length < shortest) list[i].push_back(c), shortest = c.length;
    }
  }
  double least = estimate(list[0][0], list[1][0], list[2][0]);
  for (const Candidate& d : list[0])
    for (const Candidate& h : list[1])
      for (const Candidate& w : list[2]) {
        const double cost = estimate(d, h, w);
        if (cost >= least) continue;
        least = cost;
        chosen[0] = d.cut;
        chosen[1] = h.cut;
        chosen[2] = w.cut;
      }
}

}  // namespace

SpectralPlan::SpectralPlan(const Axis (&axis)[3], Pass pass, bool is_double) {
  int64_t pieces[] = {1, 1, 1};
  choose_pieces(axis, pass, pieces);
  for (int i = 0; i < 3; ++i) cut_[i] = cut_axis(axis[i], pass, pieces[i]);
  // Rows are moved in long runs where they are whole.
  for (Piece& piece : cut_[2].pieces) {
    widen(pass == Pass::grad_weight ? piece.result : piece.b, axis[2].kernel);
    if (cut_[2].pieces.size() == 1)
      widen(piece.a, pass == Pass::grad_input ? axis[2].out : axis[2].in);
  }
  // An odd pitch: planes a large power of two apart would meet in few sets of a cache.
  pitch_ = cut_[1].length | 1;
  std::vector<SpectralAxis> tables[3];
  for (int i = 0; i < 3; ++i) tables[i] = make_tables(i, is_double);
  for (size_t d = 0; d < tables[0].size(); ++d)
    for (size_t h = 0; h < tables[1].size(); ++h)
      for (size_t w = 0; w < tables[2].size(); ++w)
        tiles_.push_back({{&cut_[0].pieces[d], &cut_[1].pieces[h], &cut_[2].pieces[w]},
                          {tables[0][d], tables[1][h], tables[2][w]}});
}

template <class F>
const int32_t* SpectralPlan::table(int64_t length, const F& f) {
  std::vector<int32_t>& made = tables_.emplace_back(length);
  for (int64_t slot = 0; slot < length; ++slot) made[slot] = static_cast<int32_t>(f(slot));
  return made.data();
}

// The cell of the element that sits where slot i reads or writes; the one after the last cell of
// the window where there is none.
template <class F>
const int32_t* SpectralPlan::places(const Window& window, int64_t unit, int64_t length,
                                    const F& position) {
  std::vector<int64_t> element(length, window.size);
  for (int64_t i = 0; i < window.count; ++i)
    element[((window.offset + i * window.step) % length + length) % length] = window.first + i;
  return table(length, [&](int64_t slot) { return unit * element[position(slot)]; });
}

std::vector<SpectralAxis> SpectralPlan::make_tables(int i, bool is_double) {
  const int64_t length = cut_[i].length;
  const FftPlan& fft = fft_.emplace_back(length, is_double);
  const auto first = [&](int64_t slot) { return fft.first_position(slot); };
  const auto last = [&](int64_t slot) { return fft.last_position(slot); };
  // Along w rows are separated, which needs the order of frequencies. Otherwise a spectrum stays in
  // the order in which the last pass finds it.
  std::vector<int64_t> cell(length);
  for (int64_t slot = 0; slot < length; ++slot) cell[last(slot)] = 2 * (i == 2 ? last(slot) : slot);
  SpectralAxis axis;
  axis.fft = fft.view();
  axis.to_spectrum = table(length, [&](int64_t slot) { return cell[last(slot)]; });
  axis.from_spectrum = table(length, [&](int64_t slot) { return cell[first(slot)]; });
  const int64_t unit = i == 0 ? 2 * pitch_ : i == 1 ? 2 : 1;
  std::vector<SpectralAxis> made;
  for (const Piece& piece : cut_[i].pieces) {
    axis.from_a = places(piece.a, unit, length, first);
    axis.from_b = places(piece.b, unit, length, first);
    axis.to_result = places(piece.result, unit, length, last);
    made.push_back(axis);
  }
  return made;
}

}  // namespace voxconv
