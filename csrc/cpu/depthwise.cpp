// SPDX-License-Identifier: Apache-2.0
// The CPU ops of the depthwise family: tensors in, plans and tilings made, kernels run in parallel.
#include "../common/stable.h"

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "depthwise_flat.h"
#include "depthwise_host.h"
#include "depthwise_rows.h"
#include "result_memory.h"
#include "scratch.h"

namespace voxconv {
namespace {

// Staged planes and sums of one piece should fit a private L2 next to the weights. Those of a group
// of neighbouring blocks may be larger: its rows are read and written as whole runs of memory.
constexpr int64_t kBlockBytes = 768 << 10, kGroupBytes = 1536 << 10;
// Source planes that are read in place come in pieces of that many rows at the least. With more
// taps of d and h than that it pays to stage them: measured.
constexpr int64_t kInPlaceRows = 4, kInPlaceTaps = 25;
// In place, vectors of neighbouring channels are visited together, in the order of memory. Sources
// of more than that are asked for ahead of time, all for grad_weight with that many taps of d and
// h. With as many, and rows of that many cells, the others had better stage cells that compete for
// the first cache. Measured.
constexpr int64_t kFarBytes = 6 << 20, kBusyTaps = 25, kBusyCells = 16;
// Vectors of a part of a cache line: where cells do not compete, being no power of two of vectors,
// those of one line are taken after those of the other; so it is with the busy kernels above.
// Sources of more than kPartsBytes, or that the second cache does not hold if a line is not all of
// a cell, are asked for ahead of time. Above kPartsBytes they had better be staged where cells
// compete; above kPartsFarBytes, unless for grad_weight, where cells are not whole lines. Measured.
constexpr int64_t kPartsBytes = 4 << 20, kPartsFarBytes = 16 << 20;
// Multiply-adds of a vector that are worth a thread.
constexpr int64_t kGrainCells = 1 << 14;
// Planes of a chunk of grad_weight at the least, and tasks to split into at the most: fixed by the
// shape alone, because partial sums are added in the order of chunks.
constexpr int64_t kChunkPlanes = 12, kTasks = 64;

bool is_power_of_two(int64_t n) { return (n & (n - 1)) == 0; }

int64_t source_rows(const Links& h, int64_t h0, int64_t h1) {
  int32_t low = INT32_MAX, high = -1;
  for (int32_t at = h.begin[h0]; at < h.begin[h1]; ++at) {
    low = std::min(low, h.list[at].source);
    high = std::max(high, h.list[at].source);
  }
  return high < low ? 0 : high - low + 1;
}

// Cuts axis h into the fewest equal pieces whose staged planes and sums fit the working set, if any
// do.
std::pair<Tiling, bool> tiling_of_group(const Links& d, const Links& h, const RowPlan& row,
                                        int64_t cell_bytes, int64_t group) {
  const auto rows = static_cast<int64_t>(h.begin.size()) - 1;
  Tiling tiling{d.most_sources(), 0, 0, 0, group, 1};
  const int64_t most_bytes = group > 1 ? kGroupBytes : kBlockBytes;
  int64_t bytes = 0;
  do {
    ++tiling.tiles;
    tiling.tile_rows = (rows + tiling.tiles - 1) / tiling.tiles;
    tiling.slot_rows = 1;
    for (int64_t h0 = 0; h0 < rows; h0 += tiling.tile_rows)
      tiling.slot_rows =
          std::max(tiling.slot_rows, source_rows(h, h0, std::min(rows, h0 + tiling.tile_rows)));
    bytes = group * cell_bytes *
            (tiling.slots * tiling.slot_rows * row.staged() + tiling.tile_rows * row.size);
    // Shorter pieces would stage the rows they share with their neighbours too often.
  } while (bytes > most_bytes && tiling.tile_rows > 4 * h.longest());
  tiling.tiles = (rows + tiling.tile_rows - 1) / tiling.tile_rows;
  return {tiling, bytes <= most_bytes};
}

// The largest group that fits.
Tiling make_tiling(const Links& d, const Links& h, const RowPlan& row, int64_t cell_bytes,
                   const LaneMap& map, int64_t step) {
  const int64_t blocks = map.blocks_per_item();
  Tiling tiling;
  bool fits = false;
  for (int64_t group = map.split_batch ? std::min(blocks, kMostGroup) : 1; group > 0 && !fits;
       --group)
    if (blocks % group == 0)  // threads get equal shares
      std::tie(tiling, fits) = tiling_of_group(d, h, row, cell_bytes, group);
  tiling.plane_step = step;
  return tiling;
}

// Whether the window of a tile is many times what the first cache holds of it: cells, or rows, lie
// where they fall on few of its lines.
bool cells_compete(const Conv3dShape& shape, const LaneMap& map, const Tensor& source) {
  const int64_t cells = source.size(4), bytes = map.channels * source.element_size();
  return shape.axis[0].kernel * shape.axis[1].kernel >= kBusyTaps && cells >= kBusyCells &&
         (bytes % (4 * kLineBytes) == 0 || bytes * cells % kWayBytes == 0);
}

// Whether channels-last cells are whole cache lines.
bool cells_are_lines(const LaneMap& map, const Tensor& tensor) {
  return map.channels * static_cast<int64_t>(tensor.element_size()) % kLineBytes == 0;
}

// The kernels for channels-last tensors in place, if they can do a pass and had better.
const DepthwiseKernels* in_place_kernels(const Conv3dShape& shape, const LaneMap& map, Pass pass,
                                         const Tensor& source, const Tensor& target) {
  const DepthwiseKernels* kernels = channels_last_kernels(element_of(source));
  // A last block that is not full overlaps the one before, which then has to be in its group.
  const bool whole = map.channels % map.lanes == 0;
  const bool full = whole || map.blocks_per_item() <= kMostGroup;
  const int64_t bytes = source.numel() * static_cast<int64_t>(source.element_size());
  const bool compete = is_power_of_two(map.blocks_per_item());
  const bool far = pass != Pass::grad_weight && bytes > kPartsFarBytes;
  const bool parts = kernels && kernels->cell_bytes < kLineBytes && whole &&
                     (far ? !cells_are_lines(map, source) : compete && bytes > kPartsBytes);
  const bool suits = shape.mode == kZeros && shape.multiplier == 1 && full && !parts &&
                     map.channels >= map.lanes && is_channels_last_3d(source) &&
                     is_channels_last_3d(target) &&
                     shape.axis[0].kernel * shape.axis[1].kernel <= kInPlaceTaps &&
                     shape.axis[2].kernel <= kLongestInPlace &&
                     (pass == Pass::grad_weight || !cells_compete(shape, map, source));
  return suits ? kernels : nullptr;
}

// Pieces whose source planes, and the one that is asked for meanwhile, stay in a private L2.
Tiling in_place_tiling(const Links& d, const Conv3dShape& shape, Pass pass, int64_t rows,
                       const RowPlan& row, int64_t cell_bytes, const LaneMap& map, int64_t step) {
  const Axis& h = shape.axis[1];
  const int64_t blocks = map.blocks_per_item();
  const int64_t bytes = shape.axis[0].in * h.in * shape.axis[2].in * blocks * cell_bytes;
  const bool busy = shape.axis[0].kernel * h.kernel >= kBusyTaps;
  const bool compete = is_power_of_two(blocks);
  const bool apart = cell_bytes < kLineBytes && map.channels % map.lanes == 0 && (busy || !compete);
  int64_t group = apart ? std::max<int64_t>(1, kLineBytes / cell_bytes) : kMostGroup;
  while (apart && group < kMostGroup && blocks % group != 0) ++group;
  group = std::min(group, blocks);
  while (blocks % group != 0) --group;  // threads get equal shares
  const int64_t near_bytes = cell_bytes == kLineBytes ? kFarBytes
                             : group < blocks         ? caches().second_bytes
                                                      : kPartsBytes;
  const bool ahead = shape.batch * bytes > near_bytes || (busy && pass == Pass::grad_weight);
  const int64_t row_bytes = group * row.source_size * cell_bytes;
  const int64_t most_bytes = caches().second_bytes * 3 / 8;
  const int64_t sources = most_bytes / ((d.most_sources() + 1) * row_bytes);
  const int64_t most = std::max((sources - h.reach()) / h.stride, kInPlaceRows);
  const int64_t tiles = ceil_div(rows, most), tile_rows = ceil_div(rows, tiles);
  return {0, ceil_div(rows, tile_rows), tile_rows, 0, group, step, ahead};
}

LaneMap make_lanes(const Tensor& tensor, int64_t batch, int64_t channels, int64_t lanes) {
  return {batch, channels, lanes, is_channels_last_3d(tensor)};
}

// Runs one of the two directions: `target` = activation(bias + source * weight).
void run_correlate(const Conv3dShape& shape, Pass pass, const Tensor& source, const Tensor& weight,
                   const std::optional<Tensor>& bias, Activation activation, Tensor& target) {
  if (target.numel() == 0) return;
  const DepthwiseKernels& staged = depthwise_kernels(element_of(source));
  const LaneMap map = make_lanes(source, shape.batch, target.size(1), staged.lanes);
  const void* start = bias ? bias->data_ptr() : nullptr;
  if (flat_suits(shape, map, pass, source, target))
    return run_flat(shape, pass, source, weight, start, activation, target);
  const RowsForm form = rows_form(shape, map, pass, source, target);
  if (form != RowsForm::none)
    return run_rows(form, shape, pass, source, weight, start, activation, target);
  const bool backwards = pass == Pass::grad_input;
  const DepthwiseKernels* in_place = in_place_kernels(shape, map, pass, source, target);
  const DepthwiseKernels& kernels = in_place ? *in_place : staged;
  const Links d = plane_links(shape.axis[0], shape.mode, backwards, shape.multiplier);
  const Links h = links_of(shape.axis[1], shape.mode, backwards);
  const RowPlan row = row_of(shape.axis[2], shape.mode, backwards);
  CorrelateArgs a;
  a.source = strided(source);
  a.target = strided(target);
  a.weight = weight.data_ptr();
  a.bias = start;
  a.activation = activation;
  a.divide = backwards ? 1 : shape.multiplier;
  a.gather = backwards ? shape.multiplier : 1;
  a.map = map;
  for (int i = 0; i < 3; ++i) {
    a.source_size[i] = backwards ? shape.axis[i].out : shape.axis[i].in;
    a.target_size[i] = backwards ? shape.axis[i].in : shape.axis[i].out;
    a.kernel[i] = shape.axis[i].kernel;
  }
  a.d = view(d);
  a.h = view(h);
  a.w = view(row);
  const int64_t step = plane_step(shape.axis[0], backwards);
  a.tiling = in_place ? in_place_tiling(d, shape, pass, a.target_size[1], row, kernels.cell_bytes,
                                        map, step)
                      : make_tiling(d, h, row, kernels.cell_bytes, map, step);
  a.past_caches = in_place && cells_are_lines(map, target) &&
                  a.tiling.group * kernels.cell_bytes % kLineBytes == 0 &&
                  past_caches(target, kLineBytes / target.element_size());
  const size_t bytes = kernels.correlate_scratch(a);
  const int64_t unit_cells = a.tiling.tile_rows * a.target_size[2] * shape.taps() * a.gather;
  parallel_for(a.units(), kGrainCells / unit_cells, [&](int64_t begin, int64_t end) {
    kernels.correlate(a, begin, end, scratch(bytes));
  });
}

Tensor depthwise_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                         const Ints& stride, const Ints& padding, const Ints& dilation,
                         int64_t mode, int64_t activation) {
  const Activation then = checked_activation(activation);
  const Conv3dShape shape = forward_shape(x, weight, stride, padding, dilation, mode);
  if (const Cropped crop(shape); crop.smaller)
    return depthwise_forward(x, crop.of(contiguous(weight)), bias, stride, crop.padding, dilation,
                             mode, activation);
  const Axis* axis = shape.axis;
  const int64_t filters = weight.size(0);
  Tensor y = empty_result(x, {shape.batch, filters, axis[0].out, axis[1].out, axis[2].out});
  run_correlate(shape, Pass::forward, x, contiguous(weight), checked_bias(bias, x, filters), then,
                y);
  return y;
}

Tensor depthwise_grad_input(const Tensor& grad, const Tensor& weight, const Ints& size,
                            const Ints& stride, const Ints& padding, const Ints& dilation,
                            int64_t mode, const std::optional<Tensor>& bias) {
  const Conv3dShape shape = grad_input_shape(grad, weight, size, stride, padding, dilation, mode);
  if (const Cropped crop(shape); crop.smaller)
    return depthwise_grad_input(grad, crop.of(contiguous(weight)), size, stride, crop.padding,
                                dilation, mode, bias);
  Tensor x = empty_result(grad, {shape.batch, shape.channels, size[0], size[1], size[2]});
  run_correlate(shape, Pass::grad_input, grad, contiguous(weight),
                checked_bias(bias, grad, shape.channels), kIdentity, x);
  return x;
}

// weight[c][tap] = sum over batch and chunks, in that order, of partial[at(n, c, chunk) + tap *
// step].
template <class F>
void sum_partials(Tensor& weight, const void* partial, int64_t batch, int64_t chunks, int64_t step,
                  const F& at) {
  const int64_t taps = weight.size(2) * weight.size(3) * weight.size(4), terms = batch * chunks;
  dispatch_floating(weight.scalar_type(), "depthwise_grad_weight", [&](auto type) {
    using E = typename decltype(type)::type;
    using T = Accumulator<E>;
    E* to = static_cast<E*>(weight.mutable_data_ptr());
    parallel_for(weight.size(0), kGrainCells / (taps * terms), [&](int64_t begin, int64_t end) {
      std::vector<T> sums(taps);
      for (int64_t c = begin; c < end; ++c) {
        std::fill(sums.begin(), sums.end(), T(0));
        for (int64_t n = 0; n < batch; ++n)
          for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const T* from = static_cast<const T*>(partial) + at(n, c, chunk);
            for (int64_t tap = 0; tap < taps; ++tap) sums[tap] += from[tap * step];
          }
        for (int64_t tap = 0; tap < taps; ++tap) to[c * taps + tap] = static_cast<E>(sums[tap]);
      }
    });
  });
}

Tensor depthwise_grad_weight(const Tensor& grad, const Tensor& x, const Ints& kernel,
                             const Ints& stride, const Ints& padding, const Ints& dilation,
                             int64_t mode) {
  const Conv3dShape shape = grad_weight_shape(grad, x, kernel, stride, padding, dilation, mode);
  const Axis* axis = shape.axis;
  const int64_t filters = grad.size(1);
  Tensor weight = empty_5d(x, {filters, 1, kernel[0], kernel[1], kernel[2]}, false);
  const Cropped crop(shape);
  if (shape.batch == 0 || crop.smaller) torch::stable::zero_(weight);
  if (shape.batch == 0) return weight;
  if (crop.smaller) {
    crop.put(depthwise_grad_weight(grad, x, crop.kernel, stride, crop.padding, dilation, mode),
             weight);
    return weight;
  }
  const DepthwiseKernels& staged = depthwise_kernels(element_of(x));
  const LaneMap map = make_lanes(x, shape.batch, filters, staged.lanes);
  const bool flat = flat_suits(shape, map, Pass::grad_weight, x, grad);
  if (flat || rows_form(shape, map, Pass::grad_weight, x, grad) != RowsForm::none) {
    const RowPartials partials =
        flat ? run_flat_grad_weight(shape, x, grad) : run_rows_grad_weight(shape, x, grad);
    sum_partials(weight, partials.memory.get(), shape.batch, partials.pieces, 1,
                 [&](int64_t n, int64_t c, int64_t piece) {
                   return ((n * filters + c) * partials.pieces + piece) * shape.taps();
                 });
    return weight;
  }
  const DepthwiseKernels* in_place = in_place_kernels(shape, map, Pass::grad_weight, x, grad);
  const DepthwiseKernels& kernels = in_place ? *in_place : staged;
  const Links d = links_of(axis[0], shape.mode, false), h = links_of(axis[1], shape.mode, false);
  const RowPlan row = row_of(axis[2], shape.mode, false);
  GradWeightArgs a;
  a.grad = strided(grad);
  a.x = strided(x);
  a.divide = shape.multiplier;
  a.map = map;
  for (int i = 0; i < 3; ++i) {
    a.x_size[i] = axis[i].in;
    a.grad_size[i] = axis[i].out;
    a.kernel[i] = axis[i].kernel;
  }
  a.d = view(d);
  a.h = view(h);
  a.w = view(row);
  const int64_t step = plane_step(axis[0], false);
  a.tiling = in_place ? in_place_tiling(d, shape, Pass::grad_weight, axis[1].out, row,
                                        kernels.cell_bytes, map, step)
                      : make_tiling(d, h, row, kernels.cell_bytes, map, step);
  const int64_t most =
      std::max<int64_t>(1, std::min(axis[0].out / kChunkPlanes, kTasks / a.map.blocks()));
  // An even number of chunks: of few tasks each of two threads gets as many.
  const int64_t chunks = most > 1 ? most / 2 * 2 : 1;
  a.chunk_planes = (axis[0].out + chunks - 1) / chunks;
  a.chunks = (axis[0].out + a.chunk_planes - 1) / a.chunk_planes;
  const size_t bytes = kernels.grad_weight_scratch(a);
  const Memory partial = allocate(a.chunks * map.blocks() * shape.taps() * kernels.cell_bytes);
  a.partial = partial.get();
  parallel_for(a.tasks(), 1, [&](int64_t begin, int64_t end) {
    kernels.grad_weight(a, begin, end, scratch(bytes));
  });
  sum_partials(weight, a.partial, shape.batch, a.chunks, map.lanes,
               [&](int64_t n, int64_t c, int64_t chunk) {
                 const int64_t pair = n * filters + c;
                 const int64_t block =
                     map.split_batch ? n * map.blocks_per_item() + c / map.lanes : pair / map.lanes;
                 // In place, the last block ends with the channels.
                 const int64_t first = c / map.lanes * map.lanes;
                 const int64_t lane = in_place          ? c - std::min(first, filters - map.lanes)
                                      : map.split_batch ? c - first
                                                        : pair % map.lanes;
                 return (chunk * map.blocks() + block) * shape.taps() * map.lanes + lane;
               });
  return weight;
}

}  // namespace
}  // namespace voxconv

STABLE_TORCH_LIBRARY_IMPL(voxconv, CPU, m) {
  m.impl("depthwise_forward", TORCH_BOX(&voxconv::depthwise_forward));
  m.impl("depthwise_grad_input", TORCH_BOX(&voxconv::depthwise_grad_input));
  m.impl("depthwise_grad_weight", TORCH_BOX(&voxconv::depthwise_grad_weight));
}
