// SPDX-License-Identifier: Apache-2.0
#include "depthwise_flat.h"

#include <algorithm>
#include <optional>

#include "caches.h"
#include "depthwise_costs.h"
#include "depthwise_flat_cells.h"
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
// What one of a pair of destinations costs besides its taps, and what a tap of it costs, in taps of
// a vector: measured.
constexpr double kPairMoveCost = 46, kPairTapCost = 1.7;
// What a step of a vector of halves costs, for each of its two taps: measured.
constexpr double kHalvesTapCost = 1.1;
// Planes are split, or merged, from so many destinations of a channel on, with less than that of
// the lanes idle otherwise: measured.
constexpr int64_t kSplitCells = 6000, kSplitWeightCells = 2000, kMergeCells = 8000;
constexpr double kFewIdle = 1.4;
// Where a tile's planes are smaller than that, it asks for the planes of the next one: measured.
constexpr int64_t kAheadBytes = 64 << 10;
// Up to that many taps wait for memory: a target that is written past the caches is worth more than
// the loads that taller tiles save. Measured with 27 and 125.
constexpr int64_t kFewTaps = 64;
// Runs of taps from which on grad_weight takes the most planes of halves at a time even if they
// compete: measured.
constexpr int64_t kTallStepRun = 3;
// Planes of halves that lie a multiple of that apart leave no room in the first cache for what is
// asked for: measured.
constexpr int64_t kPartWayBytes = 1024;
// Planes of a tile that lie a multiple of that apart compete for the buffers between the processor
// and memory, if half a cache line is written at a time: measured.
constexpr int64_t kBuffersBytes = 2048;

struct FlatPass {
  FlatArgs args;
  FlatTables tables;
};

// A run of taps for a tile of `rows` destination planes, the t-th of their class being the first,
// and which of its planes exist.
FlatRun run_of(const RowPlan& plan, const WClass& planes, const Segment& segment, int32_t spread,
               int32_t t, int32_t rows) {
  const int32_t step = planes.x_step / spread;
  const int32_t first = segment.offset - plan.left + t * planes.x_step;
  FlatRun run{segment.length, segment.tap, segment.tap_step, first, step, spread, 0, 0, 0};
  if (first < 0) run.low = (step - 1 - first) / step;
  if (first < plan.source_size) run.high = (plan.source_size - 1 - first) / step + 1;
  run.high = std::min(run.high, run.planes(rows));
  return run;
}

// Where every second plane begins a destination's, runs of all taps in place of those of every
// second one: the planes that a tile reads are then one run.
int32_t spread_runs(RowPlan& plan, const Axis& d) {
  if (d.stride != 2 || d.dilation != 1 || !is_segment_length(static_cast<int>(d.kernel)) ||
      plan.classes.size() != 1)
    return 1;
  plan.segments = {
      {plan.left - static_cast<int32_t>(d.before), 0, 1, static_cast<int32_t>(d.kernel)}};
  plan.classes[0].segment_begin = 0, plan.classes[0].segment_end = 1;
  return 2;
}

// Tiles of up to `most` destination planes; of a power of two of them if `exact`.
void list_rows(FlatTables& tables, const RowPlan& plan, int32_t spread, int32_t most, bool exact) {
  for (const WClass& c : plan.classes)
    for (int32_t t = 0; t < c.count;) {
      int32_t count = std::min(most, c.count - t);
      while (exact && (count & (count - 1))) count &= count - 1;
      const auto begin = static_cast<int32_t>(tables.runs.size());
      for (int32_t g = c.segment_begin; g < c.segment_end; ++g) {
        const FlatRun run = run_of(plan, c, plan.segments[g], spread, t, count);
        if (run.low < run.high) tables.runs.push_back(run);
      }
      tables.rows.push_back({c.first + t * c.step, c.step, count, begin,
                             static_cast<int32_t>(tables.runs.size()), 0});
      t += count;
    }
  // Memory is walked in its own order.
  std::stable_sort(tables.rows.begin(), tables.rows.end(),
                   [](const FlatRows& a, const FlatRows& b) { return a.first < b.first; });
}

// What is read and written after a tile: the next one's planes, or the first one's of a channel
// that lies behind this one.
void link_rows(FlatTables& tables, int32_t source_planes, int32_t target_planes) {
  const size_t tiles = tables.rows.size();
  for (size_t i = 0; i < tiles; ++i) {
    FlatRows& rows = tables.rows[i];
    const bool last = i + 1 == tiles;
    const FlatRows& next = tables.rows[last ? 0 : i + 1];
    rows.next = next.first - rows.first + (last ? target_planes : 0);
    for (int32_t r = rows.run_begin; r < rows.run_end; ++r) {
      const int32_t same = next.run_begin + r - rows.run_begin;
      if (same < next.run_end)
        tables.runs[r].next =
            tables.runs[same].plane - tables.runs[r].plane + (last ? source_planes : 0);
    }
  }
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
    if (a.form == FlatForm::merged)
      a.split.step = odd_lines(a.piece_vectors * kernels.lanes + kernels.lanes, kernels.lanes);
    if (a.form == FlatForm::split) {
      a.split.step = odd_lines(most + kernels.lanes, kernels.lanes);
      most = 2 * a.split.count * a.split.step;
    }
    a.copy_step = odd_lines(most, kernels.lanes);
  };
  int64_t pieces = 1;
  cut(pieces);
  a.chunk_tiles = 1;
  const auto copies = [&] {
    return (a.gather * a.most_runs * a.most_planes * a.copy_step + a.merged_cells()) *
           kernels.item_bytes;
  };
  if (a.form == FlatForm::pairs) return;
  while (a.piece_vectors > kPieceVectors &&
         (a.units() < kUnits || (copies() > kCopyBytes && a.piece_vectors * kernels.lanes > reach)))
    cut(++pieces);
  if (pass == Pass::grad_weight)
    a.chunk_tiles =
        std::clamp<int64_t>(kChain * kTileVectors / a.piece_vectors, 1,
                            std::max<int64_t>(1, a.tiles * a.pairs * a.pieces / kUnits));
}

// The tiles of destination planes, and what they read; with `low`, of 4 planes at most.
void place_planes(FlatArgs& a, FlatTables& tables, const Axis& d, Pass pass,
                  const FlatKernels& kernels, bool low) {
  RowPlan planes = row_of(d, kZeros, pass == Pass::grad_input, kFewestPlanes);
  const int32_t spread = a.form == FlatForm::split ? spread_runs(planes, d) : 1;
  int64_t longest = 1, most_rows = 1;
  for (const Segment& segment : planes.segments)
    longest = std::max<int64_t>(longest, segment.length);
  for (const WClass& c : planes.classes) most_rows = std::max<int64_t>(most_rows, c.count);
  const int64_t plane_bytes = a.source.d * kernels.item_bytes;
  a.compete = a.form != FlatForm::split && plane_bytes % kWayBytes == 0;  // split ones are copies
  a.asks_second = plane_bytes % kPartWayBytes == 0;
  const bool crowded = a.compete && longest + kernels.tall - 1 > caches().first_ways;
  a.apart = crowded && longest + 3 >= kFewestWays;
  a.tile_rows = 4;
  if (pass == Pass::grad_weight) {
    if (a.form == FlatForm::halves) {
      if (longest <= kernels.step_tall_run && (longest >= kTallStepRun || !a.compete))
        a.tile_rows = kernels.step_tall;
    } else if (ceil_div(longest, spread) <= kernels.tall_run && (!crowded || a.apart)) {
      a.tile_rows = kernels.tall;
    }
  } else if (a.form == FlatForm::halves) {
    if (round_up(most_rows, kernels.step_tall) == round_up(most_rows, 4))
      a.tile_rows = kernels.step_tall;
  } else if (a.form == FlatForm::split) {
    // All planes are copied: those of two tiles are too many for the caches.
    if (most_rows <= kernels.tall) a.tile_rows = kernels.tall;
  } else if ((a.form == FlatForm::lines || a.form == FlatForm::merged) && !low && most_rows > 4 &&
             (!crowded || a.apart)) {
    a.tile_rows = kernels.tall;
  }
  a.most_planes = (a.tile_rows - 1) * spread + longest;
  list_rows(tables, planes, spread, static_cast<int32_t>(a.tile_rows), pass == Pass::grad_weight);
  a.rows = tables.rows.data();
  a.runs = tables.runs.data();
  a.tiles = static_cast<int64_t>(tables.rows.size());
  const bool backwards = pass == Pass::grad_input;
  link_rows(tables, static_cast<int32_t>(target_size(d, !backwards)),
            static_cast<int32_t>(target_size(d, backwards)));
  a.most_runs = 0;
  for (const FlatRows& rows : tables.rows)
    a.most_runs = std::max<int64_t>(a.most_runs, rows.run_end - rows.run_begin);
}

// Whether a target is written past the caches, if by so many neighbours at a time.
bool streams(const FlatArgs& a, const Tensor& target, int64_t cells) {
  return a.target.d % cells == 0 && a.target.c % cells == 0 && a.target.n % cells == 0 &&
         past_caches(target, cells);
}

FlatPass plan_flat(const Conv3dShape& shape, Pass pass, const Tensor& source, const Tensor& target,
                   const FlatKernels& kernels) {
  const Axis &d = shape.axis[0], &h = shape.axis[1], &w = shape.axis[2];
  FlatPass result{};
  FlatArgs& a = result.args;
  FlatTables& tables = result.tables;
  static_cast<PassTensors&>(a) = pass_tensors(shape, pass, source, target);
  a.form = flat_form(h, w, pass, kernels);
  int64_t items = 1;
  for (int i = 0; i < 5; ++i) items += (source.size(i) - 1) * source.stride(i);
  a.source_begin = source.data_ptr();
  a.source_end = static_cast<const char*>(source.data_ptr()) +
                 items * static_cast<int64_t>(source.element_size());
  a.plane_taps = d.kernel;
  const bool widened = source.element_size() != static_cast<size_t>(kernels.item_bytes);
  const bool written = pass != Pass::grad_weight && !widened;
  // Where a vector is half a cache line, a block of a tile of 4 planes is a whole one.
  const int64_t lanes = kernels.lanes, line = 2 * lanes * kernels.item_bytes == kLineBytes ? 2 : 1;
  const bool low = written && a.form == FlatForm::lines && line > 1 && shape.taps() <= kFewTaps &&
                   streams(a, target, line * lanes);
  place_planes(a, tables, d, pass, kernels, low);
  place_cells(a, tables, h, w, pass, kernels);
  const bool lines = a.form == FlatForm::lines, split = a.form == FlatForm::split;
  const bool strips = lines && pass == Pass::grad_weight;
  // Where planes are copies, those of the next tile are asked for.
  const bool copies = split || widened || a.apart;
  if (copies ? !widened || lines : strips || !a.compete) {
    a.ahead = a.after + kernels.ahead_vectors * kernels.lanes;
    a.ahead_planes = !split && a.tile_rows * a.cells * kernels.item_bytes <= kAheadBytes;
  }
  a.next_bytes = (split ? h.stride * w.stride : 1) * static_cast<int64_t>(source.element_size());
  cut_pieces(a, kernels, pass);
  part_taps(a, tables);
  const bool merged = a.form == FlatForm::merged;
  const int64_t wide = merged || (lines && a.tile_rows == 4) ? line * lanes : lanes;
  const bool aligned = lines || ((merged || a.form == FlatForm::pairs) && w.in % wide == 0);
  const int64_t apart = plane_step(d, pass == Pass::grad_input) * a.target.d * kernels.item_bytes;
  const bool clash = lines && line > 1 && apart % kBuffersBytes == 0;
  a.past_caches = written && aligned && !clash && (merged || a.most_runs * a.gather == 1) &&
                  streams(a, target, wide);
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
  const bool backwards = pass == Pass::grad_input;
  const FlatKernels& kernels = flat_kernels(element_of(source));
  const FlatForm form = flat_form(h, w, pass, kernels);
  if (shape.mode != kZeros || form == FlatForm::none || !planes_are_lines(target) ||
      !planes_are_lines(source))
    return false;
  if (const std::optional<Way> way = asked_way()) return *way == Way::flat;
  const int64_t planes = target_size(d, backwards);
  const int64_t block = pass == Pass::grad_weight ? kTileVectors : 1;
  const auto vectors = round_up(flat_vectors(form, h, w, map.lanes), block);
  const double idle = idle_lanes(map);
  if (form == FlatForm::split) {
    const int64_t cells = d.out * h.out * w.out;
    return idle > kFewIdle ||
           cells >= (pass == Pass::grad_weight ? kSplitWeightCells : kSplitCells);
  }
  if (form == FlatForm::merged)
    return idle > kFewIdle || d.in * h.in * w.in >= kMergeCells * d.stride * d.stride * d.stride;
  const CostTable& cost = cost_table(pass, kernels.lanes * kernels.item_bytes);
  const double channels = channels_cost(cost, shape, map, pass);
  if (form != FlatForm::pairs) {
    const double tap = form == FlatForm::halves ? kHalvesTapCost * step_taps(w) : 1;
    return flat_cost(cost, shape, map, pass, vectors, tap) < channels;
  }
  // What a destination has of the taps, and the vectors it is one of.
  const double share = live_taps(d, kZeros, backwards) * h.kernel * w.kernel / (2.0 * h.stride);
  const double filled = ratio(2 * vectors * map.lanes, h.in * w.in);
  const double tile = cost.flat_tile / (vectors * std::min<int64_t>(planes, 4));
  return (kPairMoveCost + kPairTapCost * share) * filled + tile < channels;
}

void run_flat(const Conv3dShape& shape, Pass pass, const Tensor& source, const Tensor& weight,
              const void* bias, Activation activation, Tensor& target) {
  const FlatKernels& kernels = flat_kernels(element_of(source));
  FlatPass flat = plan_flat(shape, pass, source, target, kernels);
  FlatArgs& a = flat.args;
  a.weight = weight.data_ptr();
  a.bias = bias;
  a.activation = activation;
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
