// SPDX-License-Identifier: Apache-2.0
#include "depthwise_rows.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "depthwise_costs.h"
#include "scratch.h"

namespace voxconv {
namespace {

// Staged planes should leave room in a private L2 for what streams past them.
constexpr int64_t kPlanesBytes = 512 << 10;
// Planes are rows only as long as a tile of them takes no more scratch than that.
constexpr int64_t kTileBytes = 4 << 20;
// Multiply-adds of a vector that are worth a thread.
constexpr int64_t kGrainVectors = 1 << 13;
// Sums that are moved to the target afterwards cost that much more.
constexpr double kMoveSums = 1.1;
// Sums of taps, which grad_weight fetches for every line, cost that much of one vector of it.
constexpr double kFetchSums = 0.25;
// Rows are cut into pieces, of at least a tile, until there are that many: work for threads.
constexpr int64_t kPieces = 16, kPieceRows = 8;

constexpr Axis kNoAxis = {1, 1, 1, 1, 1, 0, 0};

// The axes of a convolution as the kernel sees them, and the steps of its tensors along them.
struct RowsAxes {
  Axis plane, row, line, w;
  RowsArgs::Steps source, target;
};

RowsAxes axes_of(RowsForm form, const Axis* axis, const Strided& x, const Strided& y) {
  if (form == RowsForm::lines)
    return {axis[0], axis[1], kNoAxis, axis[2], {x.d, x.h, 0}, {y.d, y.h, 0}};
  return {kNoAxis, axis[0], axis[1], axis[2], {0, x.d, x.h}, {0, y.d, y.h}};
}

// How the lines of a row are summed: one by one, or all at a time with the margins between them.
// Whatever wastes fewer lanes; sums of one line must be able to be the target itself.
struct RowLanes {
  bool by_line;
  int64_t width;
  double waste;  // lanes over destinations
};

RowLanes row_lanes(const Axis& line, const Axis& w, Pass pass, int64_t lanes,
                   const Tensor& target) {
  const bool backwards = pass == Pass::grad_input;
  const int64_t lines = target_size(line, backwards), width = target_size(w, backwards);
  const int64_t whole = (lines - 1) * (width + w.reach()) + width;
  const double alone = ratio(round_up(width, lanes), width);
  const double together = ratio(round_up(whole, lanes), lines * width);
  if (pass == Pass::grad_weight) {
    // The sums of a line's taps are fetched and stored once for each line.
    const double by_line = alone * (1 + kFetchSums / ratio(round_up(width, lanes), lanes));
    return by_line <= together ? RowLanes{true, width, by_line} : RowLanes{false, whole, together};
  }
  const bool half = element_of(target) == Element::bf16 || element_of(target) == Element::f16;
  if (!half && width >= lanes && alone <= kMoveSums * together) return {true, width, alone};
  return {false, whole, together};
}

// The axes of a pass as tables; RowsArgs points into it.
struct RowsTables {
  Links planes;
  RowPlan rows;
  std::vector<int32_t> row_source;
  std::vector<int64_t> offsets, piece_rows;
  std::vector<LineRun> lines;
  std::vector<Fold> margin;
};

// A line, or the lines of a row: destination i reads the staged cells i + taps[k], and staged cell
// j is cell j - before of the source.
struct Window {
  int64_t source, target, before, staged;
  std::vector<int64_t> taps;

  Window(const Axis& axis, bool backwards)
      : source(backwards ? axis.out : axis.in), target(target_size(axis, backwards)) {
    before = backwards ? axis.reach() - axis.before : axis.before;
    staged = target + axis.reach();
    for (int64_t k = 0; k < axis.kernel; ++k)
      taps.push_back((backwards ? axis.kernel - 1 - k : k) * axis.dilation);
  }
};

std::vector<int32_t> staged_sources(const RowPlan& plan) {
  std::vector<int32_t> source(plan.staged(), -1);
  for (int32_t i = 0; i < plan.source_size; ++i) source[plan.left + i] = i;
  for (const Fold& margin : plan.margin) source[margin.to] = margin.from - plan.left;
  return source;
}

// First and last staged row of each piece; returns the most rows of a piece.
int64_t cut_rows(const RowPlan& h, int64_t tile_rows, std::vector<int64_t>& piece_rows) {
  int64_t most = 1;
  piece_rows.clear();
  for (int64_t h0 = 0; h0 < h.size; h0 += tile_rows) {
    const int64_t h1 = std::min<int64_t>(h.size, h0 + tile_rows);
    int64_t low = h.staged(), high = 0;
    for (const WClass& c : h.classes) {
      const int64_t t0 = c.before(h0), t1 = c.before(h1);
      if (t0 >= t1) continue;
      for (int32_t s = c.segment_begin; s < c.segment_end; ++s) {
        const Segment& segment = h.segments[s];
        low = std::min(low, segment.offset + t0 * c.x_step);
        high = std::max(high, segment.offset + (t1 + segment.length - 2) * c.x_step + 1);
      }
    }
    low = std::min(low, high);
    piece_rows.insert(piece_rows.end(), {low, high});
    most = std::max(most, high - low);
  }
  return most;
}

// Which lines of a source row are staged where, as few runs.
std::vector<LineRun> line_runs(const Window& line, int mode) {
  std::vector<LineRun> runs;
  for (int64_t to = 0; to < line.staged; ++to) {
    const int64_t from = source_index(to - line.before, line.source, mode);
    if (from < 0) continue;
    if (!runs.empty() && from == runs.back().from + runs.back().count &&
        to == runs.back().to + runs.back().count)
      ++runs.back().count;
    else
      runs.push_back({static_cast<int32_t>(from), static_cast<int32_t>(to), 1});
  }
  return runs;
}

// A pass as the kernel wants it. RowsArgs points into the tables.
struct RowsPass {
  RowsArgs args;
  RowsTables tables;
};

void place_cells(RowsArgs& a, RowsTables& tables, const RowsAxes& axes, Pass pass, int mode,
                 int64_t lanes) {
  const bool backwards = pass == Pass::grad_input;
  const Window line(axes.line, backwards), w(axes.w, backwards);
  tables.lines = line_runs(line, mode);
  a.lines = tables.lines.data();
  a.line_runs = static_cast<int64_t>(tables.lines.size());
  a.inner = std::min(std::max<int64_t>(0, w.before), w.staged);
  a.inner_source = a.inner - w.before;
  a.inner_count = std::max<int64_t>(0, std::min(w.staged, w.before + w.source) - a.inner);
  for (int64_t i = 0; i < w.staged; ++i) {
    const int64_t from = source_index(i - w.before, w.source, mode);
    if (from >= 0 && (i < a.inner || i >= a.inner + a.inner_count))
      tables.margin.push_back({static_cast<int32_t>(from), static_cast<int32_t>(i)});
  }
  a.margin = tables.margin.data();
  a.margin_count = static_cast<int64_t>(tables.margin.size());
  a.target_lines = line.target;
  a.line_width = w.target;
  const bool bare = line.taps.size() * w.taps.size() == 1 && line.staged == line.source &&
                    w.staged == w.source && tables.rows.left == 0 && tables.rows.right == 0;
  a.direct = bare && a.by_line && pass != Pass::grad_weight;
  a.line_pitch = a.direct ? a.source_step.line : w.staged;
  a.pitch = odd_lines(line.staged * w.staged, lanes);
  for (int64_t up : line.taps)
    for (int64_t along : w.taps) tables.offsets.push_back(up * a.line_pitch + along);
  a.offsets = tables.offsets.data();
}

void cut_pieces(RowsArgs& a, RowsTables& tables, int64_t cell) {
  for (bool more = true; more;) {
    ++a.tiling.tiles;
    a.tiling.tile_rows = (a.rows + a.tiling.tiles - 1) / a.tiling.tiles;
    a.tiling.slot_rows = cut_rows(tables.rows, a.tiling.tile_rows, tables.piece_rows);
    const int64_t bytes = a.direct ? 0 : a.tiling.slots * a.tiling.slot_rows * a.pitch * cell;
    // Shorter pieces stage the rows they share with their neighbours too often.
    const bool possible = a.tiling.tile_rows > kPieceRows;
    const bool worth = a.tiling.tile_rows > 4 * (tables.rows.staged() - a.rows + 1);
    more =
        (possible && (a.pairs * a.planes * a.tiling.tiles < kPieces || bytes > 2 * kTileBytes)) ||
        (worth && bytes > kPlanesBytes);
  }
  a.tiling.tiles = (a.rows + a.tiling.tile_rows - 1) / a.tiling.tile_rows;
  a.piece_rows = tables.piece_rows.data();
}

RowsPass plan_pass(RowsForm form, const Conv3dShape& shape, Pass pass, const Tensor& source,
                   const Tensor& target, const RowsKernels& kernels) {
  const bool backwards = pass == Pass::grad_input;
  RowsPass result;
  RowsArgs& a = result.args;
  RowsTables& tables = result.tables;
  static_cast<PassTensors&>(a) = pass_tensors(shape, pass, source, target);
  const RowsAxes axes = axes_of(form, shape.axis, a.source, a.target);
  tables.planes = plane_links(axes.plane, shape.mode, backwards, shape.multiplier);
  tables.rows = row_of(axes.row, shape.mode, backwards);
  tables.row_source = staged_sources(tables.rows);
  a.source_step = axes.source;
  a.target_step = axes.target;
  a.source_planes = backwards ? axes.plane.out : axes.plane.in;
  a.planes = target_size(axes.plane, backwards);
  a.rows = tables.rows.size;
  a.plane_taps = axes.plane.kernel;
  a.row_taps = axes.row.kernel;
  a.taps = axes.line.kernel * axes.w.kernel;
  a.d = view(tables.planes);
  a.h = view(tables.rows);
  a.row_source = tables.row_source.data();
  const RowLanes lanes = row_lanes(axes.line, axes.w, pass, kernels.lanes, target);
  a.width = lanes.width;
  a.by_line = lanes.by_line;
  // Backwards there are only zeros beyond an axis: a padding that adds there does not come here.
  place_cells(a, tables, axes, pass, backwards ? kZeros : shape.mode, kernels.lanes);
  a.tiling = {tables.planes.most_sources(), 0, 0, 0, 1, plane_step(axes.plane, backwards)};
  cut_pieces(a, tables, kernels.item_bytes);
  return result;
}

template <class F>
void run_units(const RowsArgs& a, int64_t lanes, const F& f) {
  const int64_t lines = a.by_line ? a.target_lines : 1;
  const int64_t vectors = lines * round_up(a.width, lanes) / lanes;
  const int64_t unit = a.tiling.tile_rows * vectors * a.plane_taps * a.row_taps * a.taps * a.gather;
  parallel_for(a.units(), kGrainVectors / unit, f);
}

}  // namespace

RowsForm rows_form(const Conv3dShape& shape, const LaneMap& map, Pass pass, const Tensor& source,
                   const Tensor& target) {
  const Axis* axis = shape.axis;
  const bool backwards = pass == Pass::grad_input;
  const auto folded = [&](int i) {
    return backwards && shape.mode != kZeros && axis[i].before + axis[i].after > 0;
  };
  if (source.stride(4) != 1 || target.stride(4) != 1 || axis[2].stride != 1 || folded(1) ||
      folded(2))
    return RowsForm::none;
  const double live_d = live_taps(axis[0], shape.mode, backwards);
  const auto all = [&](int i) { return all_taps(axis[i], backwards); };
  const auto waste = [&](const Axis& line) {
    return row_lanes(line, axis[2], pass, map.lanes, target).waste;
  };
  const auto size = [&](int i) { return target_size(axis[i], backwards) + axis[i].reach(); };
  const int64_t tile = (kPieceRows * axis[0].stride + axis[0].reach()) * size(1) * size(2) *
                       rows_kernels(element_of(source)).item_bytes;
  const bool stacked = axis[1].stride == 1 && !folded(0) && tile <= kTileBytes;
  const CostTable& cost = cost_table(pass, depthwise_kernels(element_of(source)).cell_bytes);
  const double channels = channels_cost(cost, shape, map, pass);
  const auto move = [&](double of) { return staged(cost, of, axis[2], backwards); };
  const double lines = move(cost.lines_move) + live_d * all(1) * all(2) * waste(kNoAxis);
  const double planes = stacked
                            ? move(cost.planes_move) + all(0) * all(1) * all(2) * waste(axis[1]) +
                                  few_planes(cost, target_size(axis[0], backwards), kPieceRows)
                            : HUGE_VAL;
  const double rows = std::min(lines, planes);
  const std::optional<Way> way = asked_way();
  if (rows == HUGE_VAL || (way ? *way == Way::channels : channels < rows)) return RowsForm::none;
  return lines < planes ? RowsForm::lines : RowsForm::planes;
}

void run_rows(RowsForm form, const Conv3dShape& shape, Pass pass, const Tensor& source,
              const Tensor& weight, const void* bias, Activation activation, Tensor& target) {
  const RowsKernels& kernels = rows_kernels(element_of(source));
  RowsPass rows = plan_pass(form, shape, pass, source, target, kernels);
  RowsArgs& a = rows.args;
  a.weight = weight.data_ptr();
  a.bias = bias;
  a.activation = activation;
  const size_t bytes = kernels.correlate_scratch(a);
  run_units(a, kernels.lanes,
            [&](int64_t begin, int64_t end) { kernels.correlate(a, begin, end, scratch(bytes)); });
}

RowPartials run_rows_grad_weight(const Conv3dShape& shape, const Tensor& x, const Tensor& grad) {
  const RowsKernels& kernels = rows_kernels(element_of(x));
  RowsPass rows = plan_pass(RowsForm::planes, shape, Pass::grad_weight, x, grad, kernels);
  RowsArgs& a = rows.args;
  RowPartials result{allocate(a.units() * shape.taps() * kernels.item_bytes), a.tiling.tiles};
  a.partial = result.memory.get();
  const size_t bytes = kernels.grad_weight_scratch(a);
  run_units(a, kernels.lanes, [&](int64_t begin, int64_t end) {
    kernels.grad_weight(a, begin, end, scratch(bytes));
  });
  return result;
}

}  // namespace voxconv
