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
// Runs of taps from which on grad_weight takes the most planes at a time: measured.
constexpr int64_t kTallRun = 5, kTallStepRun = 3;
// Planes this far apart compete for the same lines of the first cache, which holds that many bytes
// and that many lines of them.
constexpr int64_t kWayBytes = 4096, kCacheBytes = 24 << 10, kWays = 8;

// Tables that FlatArgs points into.
struct FlatTables {
  std::vector<FlatRows> rows;
  std::vector<FlatRun> runs;
  std::vector<int64_t> offsets;
  std::vector<uint16_t> masks;
  std::vector<int64_t> half_from, half_to;
  std::vector<FlatStep> steps;
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

// Destinations [begin, end) for which tap k reads a cell.
std::pair<int64_t, int64_t> live_range(const Axis& axis, int64_t k, bool backwards) {
  const int64_t first = origin(axis, k, backwards), size = target_size(axis, backwards);
  const int64_t begin =
      std::clamp<int64_t>(ceil_div(std::max<int64_t>(0, -first), axis.stride), 0, size);
  return {begin, std::clamp<int64_t>(floor_div(axis.in - 1 - first, axis.stride) + 1, begin, size)};
}

// Lanes of vectors of a plane for which a tap meets a cell of it: bits of [vector][tap].
struct LaneMasks {
  std::vector<std::pair<int64_t, int64_t>> lines, columns;  // that the taps of h and w read for
  std::vector<uint16_t> bits;

  LaneMasks(const Axis& h, const Axis& w, bool backwards, int64_t vectors)
      : bits(vectors * h.kernel * w.kernel, 0) {
    for (int64_t k = 0; k < h.kernel; ++k) lines.push_back(live_range(h, k, backwards));
    for (int64_t k = 0; k < w.kernel; ++k) columns.push_back(live_range(w, k, backwards));
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
          vector[kh * columns.size() + kw] |= live;
    }
  }
};

// Cells of a line that are visited before the next line, so that what a tile reads of it is still
// in the first cache for the taps of the lines that follow.
int64_t strip_of(int64_t planes, int64_t lines, int64_t line, const FlatKernels& kernels) {
  const int64_t block = kTileVectors * kernels.lanes;
  const int64_t cells = kCacheBytes / (planes * lines * kernels.item_bytes) / block * block;
  return cells >= line ? line : std::max(cells, block);
}

// Cuts planes into pieces and their rows into units.
void cut_pieces(FlatArgs& a, const FlatKernels& kernels, Pass pass) {
  const int64_t reach = a.before + a.after, vectors = round_up(a.vectors, kTileVectors);
  const auto cut = [&](int64_t pieces) {
    a.piece_vectors = round_up(ceil_div(a.vectors, pieces), kTileVectors);
    a.pieces = ceil_div(a.vectors, a.piece_vectors);
    int64_t most = 0;
    for (int64_t begin = 0; begin < a.vectors; begin += a.piece_vectors) {
      const int64_t end = std::min(begin + a.piece_vectors, vectors);
      most = std::max(most, a.last_cell(end, kernels.lanes) - a.first_cell(begin, kernels.lanes));
    }
    a.copy_step = odd_lines(most, kernels.lanes);
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

// Neighbours in the destination are neighbours in the source.
bool keeps_size(const Axis& h, const Axis& w) {
  return h.stride == 1 && w.stride == 1 && h.in == h.out && w.in == w.out;
}

// Destinations that a half of a vector has.
int64_t half_of(const Axis& w, int64_t lanes) { return std::min(lanes / 2, w.out); }

// Vectors of a plane.
int64_t flat_vectors(const Axis& h, const Axis& w, int64_t lanes) {
  if (keeps_size(h, w)) return ceil_div(h.out * w.out, lanes);
  return ceil_div(h.out * ceil_div(w.out, half_of(w, lanes)), 2);
}

bool planes_compete(const FlatArgs& a, int64_t item_bytes) {
  return a.source.d * item_bytes % kWayBytes == 0;
}

// The tiles of destination planes, and what they read.
void place_planes(FlatArgs& a, FlatTables& tables, const Axis& d, Pass pass,
                  const FlatKernels& kernels) {
  const RowPlan planes = row_of(d, kZeros, pass == Pass::grad_input);
  int64_t longest = 1, most_rows = 1;
  for (const Segment& segment : planes.segments)
    longest = std::max<int64_t>(longest, segment.length);
  for (const WClass& c : planes.classes) most_rows = std::max<int64_t>(most_rows, c.count);
  const bool competing = planes_compete(a, kernels.item_bytes);
  a.apart = competing && longest + 3 >= kWays;
  a.tile_rows = 4;
  if (pass == Pass::grad_weight) {
    if (a.half ? longest >= kTallStepRun && longest <= kernels.step_tall_run
               : longest >= kTallRun && (!competing || a.apart))
      a.tile_rows = kernels.tall;
  } else if (!a.half && most_rows > 4 && (!competing || a.apart)) {
    a.tile_rows = 8;
  }
  a.most_planes = a.tile_rows + longest - 1;
  list_rows(tables, planes, static_cast<int32_t>(a.tile_rows), pass == Pass::grad_weight);
  a.rows = tables.rows.data();
  a.runs = tables.runs.data();
  a.tiles = static_cast<int64_t>(tables.rows.size());
  a.most_runs = 0;
  for (const FlatRows& rows : tables.rows)
    a.most_runs = std::max<int64_t>(a.most_runs, rows.run_end - rows.run_begin);
}

// Lanes are the cells of a plane, one after the other.
void place_lanes(FlatArgs& a, LaneMasks& masks, const Axis& w, int64_t lanes, int64_t strip) {
  for (int64_t cell = 0; cell < a.cells;) {
    const int64_t lane = cell % lanes, count = std::min(lanes - lane, w.out - cell % w.out);
    masks.add(cell / lanes, lane, cell / w.out, cell % w.out, std::min(count, a.cells - cell));
    cell += count;
  }
  a.strip = strip;
  a.line = strip == w.out ? a.cells : w.out;
  if (strip == w.out) a.strip = a.cells;
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
  a.line = a.strip = a.vectors * lanes;
}

// The taps of a plane: where they read, and, if vectors are made of halves, which read together.
void place_taps(FlatArgs& a, FlatTables& tables, const Axis& h, const Axis& w, bool backwards) {
  a.taps = h.kernel * w.kernel;
  const bool both = a.half && w.dilation == 1;
  for (int64_t kh = 0; kh < h.kernel; ++kh)
    for (int64_t kw = 0; kw < w.kernel; ++kw) {
      tables.offsets.push_back(origin(h, kh, backwards) * w.in + origin(w, kw, backwards));
      if (!both || kw % 2 == 0)
        tables.steps.push_back(
            {tables.offsets.back(), kh * w.kernel + kw, both && kw + 1 < w.kernel});
    }
  a.offsets = tables.offsets.data();
  a.steps = tables.steps.data();
  a.step_count = static_cast<int64_t>(tables.steps.size());
  a.before = std::max<int64_t>(0, -*std::min_element(tables.offsets.begin(), tables.offsets.end()));
  a.after = std::max<int64_t>(0, *std::max_element(tables.offsets.begin(), tables.offsets.end()));
}

// The cells of a plane, and what its taps read.
void place_cells(FlatArgs& a, FlatTables& tables, const Axis& h, const Axis& w, Pass pass,
                 const FlatKernels& kernels) {
  const bool backwards = pass == Pass::grad_input;
  a.cells = h.in * w.in;
  a.vectors = flat_vectors(h, w, kernels.lanes);
  place_taps(a, tables, h, w, backwards);
  LaneMasks masks(h, w, backwards, round_up(a.vectors, kTileVectors) + kTileVectors);
  if (a.half)
    place_halves(a, tables, masks, h, w, kernels.lanes, pass);
  else
    place_lanes(a, masks, w, kernels.lanes, strip_of(a.most_planes, h.kernel, w.out, kernels));
  tables.masks = std::move(masks.bits);
  a.masks = tables.masks.data();
  a.ahead = planes_compete(a, kernels.item_bytes) ? 0 : a.after + kAheadVectors * kernels.lanes;
}

FlatPass plan_flat(const Conv3dShape& shape, Pass pass, const Tensor& source, const Tensor& target,
                   const FlatKernels& kernels) {
  FlatPass result{};
  FlatArgs& a = result.args;
  FlatTables& tables = result.tables;
  static_cast<PassTensors&>(a) = pass_tensors(shape, pass, source, target);
  int64_t items = 1;
  for (int i = 0; i < 5; ++i) items += (source.size(i) - 1) * source.stride(i);
  a.source_begin = source.data_ptr();
  a.source_end = static_cast<const char*>(source.data_ptr()) +
                 items * static_cast<int64_t>(source.element_size());
  a.plane_taps = shape.axis[0].kernel;
  const Axis &h = shape.axis[1], &w = shape.axis[2];
  a.half = keeps_size(h, w) ? 0 : half_of(w, kernels.lanes);
  place_planes(a, tables, shape.axis[0], pass, kernels);
  place_cells(a, tables, h, w, pass, kernels);
  cut_pieces(a, kernels, pass);
  return result;
}

void run_units(const FlatArgs& a, const FlatKernels& kernels) {
  const int64_t unit =
      a.chunk_tiles * a.tile_rows * a.piece_vectors * a.plane_taps * a.taps * a.gather;
  const size_t bytes = kernels.scratch(a);
  parallel_for(a.units(), kGrainVectors / unit,
               [&](int64_t begin, int64_t end) { kernels.run(a, begin, end, scratch(bytes)); });
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
  const bool backwards = pass == Pass::grad_input, kept = keeps_size(h, w);
  if (shape.mode != kZeros || !(kept || (!backwards && w.stride == 2)) ||
      !planes_are_lines(target) || !planes_are_lines(source))
    return false;
  const int64_t planes = target_size(d, backwards);
  const int64_t block = pass == Pass::grad_weight ? kTileVectors : 1;
  const double vectors = static_cast<double>(round_up(flat_vectors(h, w, map.lanes), block));
  const double waste = vectors * map.lanes / (h.out * w.out);
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
  run_units(a, kernels);
}

RowPartials run_flat_grad_weight(const Conv3dShape& shape, const Tensor& x, const Tensor& grad) {
  const FlatKernels& kernels = flat_weight_kernels(element_of(x));
  FlatPass flat = plan_flat(shape, Pass::grad_weight, x, grad, kernels);
  FlatArgs& a = flat.args;
  RowPartials result{allocate(a.units() * shape.taps() * kernels.item_bytes),
                     a.pieces * a.chunks()};
  a.partial = result.memory.get();
  run_units(a, kernels);
  return result;
}

}  // namespace voxconv
