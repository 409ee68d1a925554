// SPDX-License-Identifier: Apache-2.0
#include "depthwise_flat.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "depthwise_flat_args.h"
#include "scratch.h"

namespace voxconv {
namespace {

// Multiply-adds of a vector that are worth a thread.
constexpr int64_t kGrainVectors = 1 << 13;
// Planes are cut into pieces, of at least that many vectors, until there are that many units of
// work, and until the copies a tile may need take no more scratch than that.
constexpr int64_t kUnits = 16, kPieceVectors = 64, kCopyBytes = 1 << 20;
// Sums of a tap that are added up in one chain, at most.
constexpr int64_t kChain = 1024;
// What a vector of destinations and a tile of them cost besides their taps, in taps: measured.
constexpr double kMoveCost = 20, kTileCost = 30;
// Vectors of a tile, at most, and from the farthest one that it reads to those it asks for.
constexpr int64_t kTileVectors = 4, kAheadVectors = 2;
// Planes this far apart compete for the same lines of the first cache, which holds that many bytes
// and that many lines of them.
constexpr int64_t kWayBytes = 4096, kCacheBytes = 24 << 10, kWays = 8;

// Tables that FlatArgs points into.
struct FlatTables {
  std::vector<FlatRows> rows;
  std::vector<FlatRun> runs;
  std::vector<int64_t> offsets;
  std::vector<uint16_t> masks;
  std::vector<FlatPhase> phases;
  std::vector<int64_t> tap_phase;
};

struct FlatPass {
  FlatArgs args;
  FlatTables tables;
};

// A run of taps for a tile of `rows` destination planes, the t-th of their class being the first.
FlatRun run_of(const RowPlan& plan, const WClass& planes, const Segment& segment, int32_t t,
               int32_t rows) {
  const int32_t step = planes.x_step, first = segment.offset - plan.left + t * step;
  const int32_t count = rows + segment.length - 1;
  const int32_t low = first < 0 ? (step - 1 - first) / step : 0;
  const int32_t high = first < plan.source_size ? (plan.source_size - 1 - first) / step + 1 : 0;
  return {segment.length, segment.tap, segment.tap_step, first, step, low, std::min(high, count)};
}

// Tiles of up to `most` destination planes; of a power of two of them if `exact`.
void list_rows(FlatTables& tables, const RowPlan& plan, int32_t most, bool exact) {
  for (const WClass& c : plan.classes)
    for (int32_t t = 0; t < c.count;) {
      int32_t count = std::min(most, c.count - t);
      while (exact && (count & (count - 1))) count &= count - 1;
      const auto begin = static_cast<int32_t>(tables.runs.size());
      for (int32_t g = c.segment_begin; g < c.segment_end; ++g) {
        const FlatRun run = run_of(plan, c, plan.segments[g], t, count);
        if (run.low < run.high) tables.runs.push_back(run);
      }
      tables.rows.push_back(
          {c.first + t * c.step, c.step, count, begin, static_cast<int32_t>(tables.runs.size())});
      t += count;
    }
}

int64_t floor_div(int64_t a, int64_t b) { return a < 0 ? -ceil_div(-a, b) : a / b; }

// Where tap k of an axis reads for destination 0.
int64_t origin(const Axis& axis, int64_t k, bool backwards) {
  const int64_t forward = k * axis.dilation - axis.before;
  return backwards ? -forward : forward;
}

// Which phase tap k reads, and how many cells of it further on.
int64_t shift(const Axis& axis, int64_t k, bool backwards) {
  return floor_div(origin(axis, k, backwards), axis.stride);
}
int64_t phase(const Axis& axis, int64_t k, bool backwards) {
  return origin(axis, k, backwards) - shift(axis, k, backwards) * axis.stride;
}

// Destinations [begin, end) for which tap k reads a cell.
std::pair<int64_t, int64_t> live_range(const Axis& axis, int64_t k, bool backwards) {
  const int64_t first = origin(axis, k, backwards), size = target_size(axis, backwards);
  const int64_t begin =
      std::clamp<int64_t>(ceil_div(std::max<int64_t>(0, -first), axis.stride), 0, size);
  return {begin, std::clamp<int64_t>(floor_div(axis.in - 1 - first, axis.stride) + 1, begin, size)};
}

// Lanes of vectors of a plane for which a tap meets a cell of it: bits of [vector][tap].
std::vector<uint16_t> lane_masks(const Axis& h, const Axis& w, bool backwards, int64_t lanes,
                                 int64_t vectors) {
  const int64_t taps = h.kernel * w.kernel, width = w.out, lines = h.out;
  std::vector<uint16_t> masks((vectors + kTileVectors) * taps, 0);
  std::vector<std::pair<int64_t, int64_t>> rows, columns;
  for (int64_t k = 0; k < h.kernel; ++k) rows.push_back(live_range(h, k, backwards));
  for (int64_t k = 0; k < w.kernel; ++k) columns.push_back(live_range(w, k, backwards));
  for (int64_t v = 0; v < vectors; ++v)
    for (int64_t lane = 0; lane < lanes;) {  // the lanes of a line, line by line
      const int64_t line = (v * lanes + lane) / width, column = (v * lanes + lane) % width;
      const int64_t count = std::min(lanes - lane, width - column);
      if (line >= lines) break;
      for (int64_t kw = 0; kw < w.kernel; ++kw) {
        const int64_t begin = std::clamp<int64_t>(columns[kw].first - column, 0, count);
        const int64_t end = std::clamp<int64_t>(columns[kw].second - column, begin, count);
        const auto bits = static_cast<uint16_t>(((1 << end) - (1 << begin)) << lane);
        for (int64_t kh = 0; kh < h.kernel; ++kh)
          if (line >= rows[kh].first && line < rows[kh].second)
            masks[v * taps + kh * w.kernel + kw] |= bits;
      }
      lane += count;
    }
  return masks;
}

// Cells of a line that are visited before the next line, so that what a tile reads of it is still
// in the first cache for the taps of the lines that follow.
int64_t strip_of(int64_t planes, int64_t lines, int64_t line, const FlatKernels& kernels) {
  const int64_t block = kTileVectors * kernels.lanes;
  const int64_t cells = kCacheBytes / (planes * lines * kernels.item_bytes) / block * block;
  return cells >= line ? line : std::max(cells, block);
}

// Cuts planes into pieces and their rows into units.
void cut_pieces(FlatArgs& a, const FlatKernels& kernels, Pass pass) {
  const int64_t reach = a.before + a.after;
  const auto cut = [&](int64_t pieces) {
    a.piece_vectors = round_up(ceil_div(a.vectors, pieces), kTileVectors);
    a.pieces = ceil_div(a.vectors, a.piece_vectors);
    const int64_t cells = a.piece_vectors * kernels.lanes + reach + (a.dealt ? 2 * a.line : 0);
    a.phase_step = odd_lines(cells, kernels.lanes);
    a.copy_step = (a.phase_count | 1) * a.phase_step;
  };
  int64_t pieces = 1;
  cut(pieces);
  a.chunk_tiles = 1;
  const auto copies = [&] {
    return a.gather * a.most_runs * a.most_planes * a.copy_step * kernels.item_bytes;
  };
  while (a.piece_vectors > kPieceVectors &&
         (a.units() < kUnits || (copies() > kCopyBytes && a.piece_vectors * kernels.lanes > reach)))
    cut(++pieces);
  if (pass == Pass::grad_weight)
    a.chunk_tiles =
        std::clamp<int64_t>(kChain * kTileVectors / a.piece_vectors, 1,
                            std::max<int64_t>(1, a.tiles * a.pairs * a.pieces / kUnits));
}

// Offsets of the taps of a plane, and the phases they are in.
void list_phases(FlatTables& tables, const Axis& h, const Axis& w, bool backwards) {
  for (int64_t kh = 0; kh < h.kernel; ++kh)
    for (int64_t kw = 0; kw < w.kernel; ++kw) {
      tables.offsets.push_back(shift(h, kh, backwards) * w.out + shift(w, kw, backwards));
      const int64_t row = phase(h, kh, backwards), column = phase(w, kw, backwards);
      const auto same = [&](const FlatPhase& p) { return p.row == row && p.column == column; };
      const auto at = std::find_if(tables.phases.begin(), tables.phases.end(), same);
      tables.tap_phase.push_back(at - tables.phases.begin());
      if (at == tables.phases.end())
        tables.phases.push_back({row, column, ceil_div(h.in - row, h.stride),
                                 ceil_div(w.in - column, w.stride), -1, false});
    }
  if (w.stride != 2) return;
  for (FlatPhase& even : tables.phases)
    for (size_t i = 0; i < tables.phases.size(); ++i) {
      FlatPhase& odd = tables.phases[i];
      if (even.column == 1 || odd.column == 0 || odd.row != even.row) continue;
      even.partner = static_cast<int64_t>(i);
      odd.along = true;
    }
}

bool keeps_size(const Axis& axis) { return axis.stride == 1 && axis.in == axis.out; }

bool planes_compete(const FlatArgs& a, int64_t item_bytes) {
  return a.source.d * item_bytes % kWayBytes == 0;
}

// The tiles of destination planes, and what they read.
void place_planes(FlatArgs& a, FlatTables& tables, const Axis& d, Pass pass, int64_t item_bytes) {
  const RowPlan planes = row_of(d, kZeros, pass == Pass::grad_input);
  int64_t longest = 1, most_rows = 1;
  for (const Segment& segment : planes.segments)
    longest = std::max<int64_t>(longest, segment.length);
  for (const WClass& c : planes.classes) most_rows = std::max<int64_t>(most_rows, c.count);
  const bool competing = planes_compete(a, item_bytes);
  a.apart = competing && longest + 3 >= kWays;
  a.tile_rows = pass == Pass::grad_weight || most_rows <= 4 || (competing && !a.apart) ? 4 : 8;
  a.most_planes = a.tile_rows + longest - 1;
  list_rows(tables, planes, static_cast<int32_t>(a.tile_rows), pass == Pass::grad_weight);
  a.rows = tables.rows.data();
  a.runs = tables.runs.data();
  a.tiles = static_cast<int64_t>(tables.rows.size());
  a.most_runs = 0;
  for (const FlatRows& rows : tables.rows)
    a.most_runs = std::max<int64_t>(a.most_runs, rows.run_end - rows.run_begin);
}

// The cells of a plane, and what its taps read.
void place_cells(FlatArgs& a, FlatTables& tables, const Axis& h, const Axis& w, bool backwards,
                 const FlatKernels& kernels) {
  a.cells = h.out * w.out;
  a.vectors = ceil_div(a.cells, kernels.lanes);
  a.taps = h.kernel * w.kernel;
  a.row_stride = h.stride;
  a.column_stride = w.stride;
  a.dealt = !keeps_size(h) || !keeps_size(w);
  a.line = w.out;
  a.strip = strip_of(a.most_planes, h.kernel, w.out, kernels);
  if (a.strip == a.line && !a.dealt) a.line = a.strip = a.cells;
  tables.masks = lane_masks(h, w, backwards, kernels.lanes, a.vectors);
  a.masks = tables.masks.data();
  list_phases(tables, h, w, backwards);
  a.phases = tables.phases.data();
  a.phase_count = static_cast<int64_t>(tables.phases.size());
  a.before = a.after = 0;
  for (int64_t offset : tables.offsets) {
    a.before = std::max(a.before, -offset);
    a.after = std::max(a.after, offset);
  }
  a.ahead = a.dealt || planes_compete(a, kernels.item_bytes)
                ? 0
                : a.after + kAheadVectors * kernels.lanes;
}

FlatPass plan_flat(const Conv3dShape& shape, Pass pass, const Tensor& source, const Tensor& target,
                   const FlatKernels& kernels) {
  const bool backwards = pass == Pass::grad_input;
  FlatPass result;
  FlatArgs& a = result.args;
  FlatTables& tables = result.tables;
  static_cast<PassTensors&>(a) = pass_tensors(shape, pass, source, target);
  int64_t items = 1;
  for (int i = 0; i < 5; ++i) items += (source.size(i) - 1) * source.stride(i);
  a.source_begin = source.data_ptr();
  a.source_end = static_cast<const char*>(source.data_ptr()) +
                 items * static_cast<int64_t>(source.element_size());
  a.plane_taps = shape.axis[0].kernel;
  place_planes(a, tables, shape.axis[0], pass, kernels.item_bytes);
  place_cells(a, tables, shape.axis[1], shape.axis[2], backwards, kernels);
  cut_pieces(a, kernels, pass);
  if (a.dealt)
    for (int64_t t = 0; t < a.taps; ++t) tables.offsets[t] += tables.tap_phase[t] * a.phase_step;
  a.offsets = tables.offsets.data();
  return result;
}

template <class F>
void run_units(const FlatArgs& a, const F& f) {
  const int64_t unit =
      a.chunk_tiles * a.tile_rows * a.piece_vectors * a.plane_taps * a.taps * a.gather;
  parallel_for(a.units(), kGrainVectors / unit, f);
}

// Lines of w without gaps, one after the other.
bool planes_are_lines(const Tensor& tensor) {
  return (tensor.size(4) == 1 || tensor.stride(4) == 1) &&
         (tensor.size(3) == 1 || tensor.stride(3) == tensor.size(4));
}

}  // namespace

bool flat_suits(const Conv3dShape& shape, const LaneMap& map, Pass pass, const Tensor& source,
                const Tensor& target) {
  const Axis &d = shape.axis[0], &h = shape.axis[1], &w = shape.axis[2];
  const bool backwards = pass == Pass::grad_input;
  const bool kept = keeps_size(h) && keeps_size(w);
  const auto fits = [](const Axis& axis) { return ceil_div(axis.in, axis.stride) <= axis.out; };
  if (shape.mode != kZeros || !(kept || (!backwards && fits(h) && fits(w))) ||
      !planes_are_lines(target) || !(kept ? planes_are_lines(source) : source.stride(4) == 1))
    return false;
  const int64_t planes = target_size(d, backwards), cells = h.out * w.out;
  const int64_t block = (pass == Pass::grad_weight ? kTileVectors : 1) * map.lanes;
  const double waste = ratio(round_up(cells, block), cells);
  const double vectors = waste * cells / map.lanes;
  const double taps = live_taps(d, kZeros, backwards) * h.kernel * w.kernel;
  const double cost =
      (kMoveCost + taps) * waste + kTileCost / (vectors * std::min<int64_t>(planes, 4));
  return cost < channels_cost(shape, map, pass);
}

void run_flat(const Conv3dShape& shape, Pass pass, const Tensor& source, const Tensor& weight,
              const void* bias, Tensor& target) {
  const FlatKernels& kernels = flat_kernels(element_of(source));
  FlatPass flat = plan_flat(shape, pass, source, target, kernels);
  FlatArgs& a = flat.args;
  a.weight = weight.data_ptr();
  a.bias = bias;
  const size_t bytes = kernels.correlate_scratch(a);
  run_units(a,
            [&](int64_t begin, int64_t end) { kernels.correlate(a, begin, end, scratch(bytes)); });
}

RowPartials run_flat_grad_weight(const Conv3dShape& shape, const Tensor& x, const Tensor& grad) {
  const FlatKernels& kernels = flat_kernels(element_of(x));
  FlatPass flat = plan_flat(shape, Pass::grad_weight, x, grad, kernels);
  FlatArgs& a = flat.args;
  RowPartials result{allocate(a.units() * shape.taps() * kernels.item_bytes),
                     a.pieces * a.chunks()};
  a.partial = result.memory.get();
  const size_t bytes = kernels.grad_weight_scratch(a);
  run_units(
      a, [&](int64_t begin, int64_t end) { kernels.grad_weight(a, begin, end, scratch(bytes)); });
  return result;
}

}  // namespace voxconv
