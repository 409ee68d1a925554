// SPDX-License-Identifier: Apache-2.0
#include "depthwise_rows.h"

#include <algorithm>
#include <vector>

#include "scratch.h"

namespace voxconv {
namespace {

// Staged planes should leave room in a private L2 for what streams past them.
constexpr int64_t kPlanesBytes = 512 << 10;
// Multiply-adds of a vector that are worth a thread.
constexpr int64_t kGrainVectors = 1 << 13;
// Measured time of a vector of channels over that of a vector of a row, both full: channels are
// transposed in registers on their way in and out. Rows of one vector share loads less well.
constexpr double kChannelsCost = 1.3, kChannelsCostShort = 0.75;

// The axes of a pass as tables; RowsArgs points into it.
struct RowsTables {
  RowPlan h;
  std::vector<int32_t> row_source;
  std::vector<int64_t> offsets, piece_rows;
  std::vector<Fold> margin;
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

}  // namespace

bool rows_suit(const Conv3dShape& shape, const RowPlan& w, const LaneMap& map, bool backwards,
               const Tensor& source, const Tensor& target) {
  const Axis& axis = shape.axis[2];
  const bool folded = backwards && shape.mode != kZeros &&
                      (shape.axis[1].before + shape.axis[1].after > 0 || !w.folds.empty());
  if (axis.stride != 1 || folded || source.stride(4) != 1 || target.stride(4) != 1) return false;
  const int64_t width = backwards ? axis.in : axis.out, lanes = map.lanes;
  const int64_t vectors = (width + lanes - 1) / lanes;
  const auto waste = [](int64_t used, int64_t wanted) {
    return static_cast<double>(used) / static_cast<double>(wanted);
  };
  const double cost = vectors > 1 ? kChannelsCost : kChannelsCostShort;
  return waste(vectors * lanes, width) <=
         cost * waste(map.blocks() * lanes, map.batch * map.channels);
}

void run_rows(const Conv3dShape& shape, const Links& d, const Tiling& tiling, bool backwards,
              const Tensor& source, const Tensor& weight, const void* bias, Tensor& target) {
  const RowsKernels& kernels = rows_kernels(element_of(source));
  const int64_t cell = kernels.item_bytes;
  RowsTables tables;
  tables.h = backwards ? grad_input_row(shape.axis[1], shape.mode)
                       : forward_row(shape.axis[1], shape.mode);
  tables.row_source = staged_sources(tables.h);

  RowsArgs a;
  a.source = strided(source);
  a.target = strided(target);
  a.weight = weight.data_ptr();
  a.bias = bias;
  a.channels = target.size(1);
  a.pairs = shape.batch * a.channels;
  a.divide = backwards ? 1 : shape.multiplier;
  a.gather = backwards ? shape.multiplier : 1;
  for (int i = 0; i < 3; ++i) {
    a.source_size[i] = source.size(2 + i);
    a.target_size[i] = target.size(2 + i);
    a.kernel[i] = shape.axis[i].kernel;
  }
  a.d = view(d);
  a.h = view(tables.h);

  const Axis& w = shape.axis[2];
  const int64_t reach = (w.kernel - 1) * w.dilation;
  const int64_t before = backwards ? reach - w.before : w.before;
  for (int64_t k = 0; k < w.kernel; ++k)
    tables.offsets.push_back((backwards ? w.kernel - 1 - k : k) * w.dilation);
  a.staged = a.target_size[2] + reach;
  a.inner = std::min(std::max<int64_t>(0, before), a.staged);
  a.inner_end = std::max(a.inner, std::min(a.staged, before + a.source_size[2]));
  a.inner_source = a.inner - before;
  for (int64_t i = 0; i < a.staged; ++i) {
    const int64_t from = source_index(i - before, a.source_size[2], shape.mode);
    if (from >= 0 && (i < a.inner || i >= a.inner_end))
      tables.margin.push_back({static_cast<int32_t>(from), static_cast<int32_t>(i)});
  }
  a.margin = tables.margin.data();
  a.margin_count = static_cast<int64_t>(tables.margin.size());
  // An odd number of cache lines: rows above each other do not compete for the same few of them.
  a.pitch = (a.staged + kernels.lanes - 1) / kernels.lanes * kernels.lanes;
  if (a.pitch / kernels.lanes % 2 == 0) a.pitch += kernels.lanes;

  const bool bare = tables.h.left == 0 && tables.h.right == 0 && before == 0 && reach == 0;
  a.in_place =
      cell == static_cast<int64_t>(source.element_size()) && a.target_size[2] >= kernels.lanes;
  a.direct = bare && a.in_place;
  a.tiling = tiling;
  const int64_t rows = a.target_size[1];
  a.tiling.tiles = 0;
  do {
    ++a.tiling.tiles;
    a.tiling.tile_rows = (rows + a.tiling.tiles - 1) / a.tiling.tiles;
    a.tiling.slot_rows = cut_rows(tables.h, a.tiling.tile_rows, tables.piece_rows);
    // Shorter pieces would stage the rows they share with their neighbours too often.
  } while (!a.direct && a.tiling.slots * a.tiling.slot_rows * a.pitch * cell > kPlanesBytes &&
           a.tiling.tile_rows > 4 * (tables.h.staged() - rows + 1));
  a.tiling.tiles = (rows + a.tiling.tile_rows - 1) / a.tiling.tile_rows;
  a.row_source = tables.row_source.data();
  a.piece_rows = tables.piece_rows.data();
  a.offsets = tables.offsets.data();

  const size_t bytes = kernels.scratch(a);
  const int64_t vectors = (a.target_size[2] + kernels.lanes - 1) / kernels.lanes;
  const int64_t unit = a.tiling.tile_rows * vectors * shape.taps() * a.gather;
  parallel_for(a.units(), kGrainVectors / unit,
               [&](int64_t begin, int64_t end) { kernels.run(a, begin, end, scratch(bytes)); });
}

}  // namespace voxconv
