// SPDX-License-Identifier: Apache-2.0
// grad_weight of any kernel, stride and dilation, zeros, NCDHW: what depthwise_weight_slabs leaves.
//
// The axes are called plane, row and column: d, h and w, or h, d and w where only d has taps. A
// block owns a slab of planes of grad, a tile of its rows and columns, and a chunk of taps of a
// filter: all or up to 8 plane taps, a warp or more for each, Q row taps, W column taps. It walks
// over the planes of x, copies the cells that it reads to shared memory while the plane before is
// worked on, and each warp multiplies it with the plane of grad that meets it at the warp's tap. A
// thread goes down a column: Q rows of x at W columns are in registers, W loads from shared memory
// bring the next row, one load from the first cache the cell of grad, for Q * W multiply-adds into
// as many sums:
//   7 row taps by 4: 5 loads for 28, 5 by 3: 4 for 15, 3 by 3: 4 for 9.
//
// Rows are taken apart by stride and dilation so that Q taps always reach Q neighbours: of
// g = gcd(stride, dilation), row taps stride / g apart and rows dilation / g apart read rows of x
// that are stride * dilation / g apart. Only these rows of x are copied.
#pragma once
#include "launch.cuh"
#include "sum_partials.cuh"

namespace voxconv {
namespace device {

constexpr int kWeightLineThreads = 256;  // of a block, at most
constexpr int kLineGroups = 8;           // plane taps of a block, at most

struct LinesAxis {
  int x, grad, kernel, stride, dilation, before;
  int x_step, grad_step, tap_step;  // elements from one to the next
};

struct WeightLinesShape {
  LinesAxis plane, row, column;
  int filters, multiplier, taps;
  int64_t x_volume, grad_volume;
  // Row taps that are tap_stride apart, rows of grad that are row_stride apart, and of x.
  int tap_stride, row_stride, x_row_stride;
  int plane_chunks, row_chunks, column_chunks;  // of taps; row_chunks of each class
  int columns, rows;                            // of a tile; rows of a thread
  int column_tiles, row_tiles;                  // row_tiles of each class
  int slab, slabs, plane_step;  // planes; from a plane of x to the next that is read
  int x_rows, pitch;            // of a plane of x in shared memory
  int copy_lanes, copy_rows;
};

// Copies `count` cells of a column to shared memory.
template <class T>
__device__ inline void copy_cells(Sum<T>* to, int to_step, const T* from, int64_t from_step,
                                  int count) {
  if constexpr (std::is_same_v<T, Sum<T>>) {
    for (; count > 0; --count, to += to_step, from += from_step)
      copy_later<sizeof(T)>(to, from, true);
  } else {  // while the thread waits: many at once
    constexpr int kCells = 8;
    for (; count > 0; count -= kCells) {
      T cells[kCells];
      VOXCONV_UNROLL
      for (int i = 0; i < kCells; ++i, from += from_step)
        if (i < count) cells[i] = *from;
      VOXCONV_UNROLL
      for (int i = 0; i < kCells; ++i, to += to_step)
        if (i < count) *to = widen(cells[i]);
    }
  }
}

// The products of `count` rows of a column of grad, zeros if not `live`, and the rows of x that Q
// by W taps meet there.
template <int Q, int W, class T, class S>
__device__ __forceinline__ void add_rows(const S* x, int pitch, int tap_step, const T* grad,
                                         int grad_step, int count, bool live, S (&sum)[Q][W]) {
  constexpr int kRows = Q * (Q < 8 ? 8 / Q : 1);  // at a time
  S rows[Q][W];                                   // row i is in rows[i % Q]
  const auto load = [&](S(&row)[W]) {
    VOXCONV_UNROLL
    for (int w = 0; w < W; ++w) row[w] = x[w * tap_step];
    x += pitch;
  };
  VOXCONV_UNROLL
  for (int q = 0; q < Q - 1; ++q) load(rows[q]);
  for (int first = 0; first < count; first += kRows) {
    T cells[kRows];
    VOXCONV_UNROLL
    for (int i = 0; i < kRows; ++i) {
      narrow(cells[i], 0);
      if (first + i < count && live) cells[i] = *grad;
      grad += grad_step;
    }
    VOXCONV_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if (first + i >= count) return;
      load(rows[(i + Q - 1) % Q]);
      VOXCONV_UNROLL
      for (int q = 0; q < Q; ++q) {
        VOXCONV_UNROLL
        for (int w = 0; w < W; ++w) sum[q][w] += rows[(i + q) % Q][w] * widen(cells[i]);
      }
    }
  }
}

// blockDim is [columns of a tile, threads along rows, plane taps]; blocks are counted by chunks of
// taps, then by tiles and slabs, then by filters and samples.
template <class T, int Q, int W>
__global__ void __launch_bounds__(kWeightLineThreads, 2)
    depthwise_weight_lines(WeightLinesShape a, const T* x, const T* grad, Sum<T>* partials) {
  using S = Sum<T>;
  int64_t rest = blockIdx.x;
  const auto count_off = [&rest](int count) {
    const int i = static_cast<int>(rest % count);
    rest /= count;
    return i;
  };
  const int groups = static_cast<int>(blockDim.z), group = static_cast<int>(threadIdx.z);
  const int first_tap = count_off(a.plane_chunks) * groups;
  const int row_class = count_off(a.tap_stride), row_chunk = count_off(a.row_chunks);
  const int row_tap = row_class + row_chunk * Q * a.tap_stride;
  const int column_tap = count_off(a.column_chunks) * W;
  int part = 0;
  const auto part_off = [&](int count) {
    const int i = count_off(count);
    part = part * count + i;
    return i;
  };
  const int left = part_off(a.column_tiles) * a.columns;
  const int tall = a.rows * static_cast<int>(blockDim.y), top = part_off(a.row_tiles) * tall;
  const int grad_class = part_off(a.row_stride);
  const int first = part_off(a.slabs) * a.slab;
  const int last = first + a.slab < a.plane.grad ? first + a.slab : a.plane.grad;
  const int filter = count_off(a.filters);
  const int64_t n = rest;

  const int group_threads = static_cast<int>(blockDim.x * blockDim.y);
  const int in_group = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  const int threads = group_threads * groups, thread = group * group_threads + in_group;

  // Row i of the tile in shared memory is row x_top + i * x_row_stride of x.
  S* planes = shared_memory<S>();
  const int plane_size = a.x_rows * a.pitch;
  for (int i = thread; i < 2 * plane_size; i += threads) planes[i] = 0;
  const int x_top =
      (grad_class + top * a.row_stride) * a.row.stride + row_tap * a.row.dilation - a.row.before;
  const int x_left = left * a.column.stride + column_tap * a.column.dilation - a.column.before;
  const int copy_lane = thread % a.copy_lanes, copy_row = thread / a.copy_lanes;
  const auto rows_to = [&](int row) {  // rows of the tile before that row of x
    return row <= x_top ? 0 : (row - x_top + a.x_row_stride - 1) / a.x_row_stride;
  };
  const int copy_begin = rows_to(0) + copy_row, rows_end = rows_to(a.row.x);
  const int copy_end = rows_end < a.x_rows ? rows_end : a.x_rows;
  const int copy_count = (copy_end - copy_begin + a.copy_rows - 1) / a.copy_rows;
  const T* source = x + (n * (a.filters / a.multiplier) + filter / a.multiplier) * a.x_volume;
  const auto copy = [&](int plane, S* to) {
    const T* from = source + int64_t(plane) * a.plane.x_step +
                    int64_t(x_top + copy_begin * a.x_row_stride) * a.row.x_step;
    if (copy_row < a.copy_rows)
      for (int j = copy_lane; j < a.pitch; j += a.copy_lanes)
        if (x_left + j >= 0 && x_left + j < a.column.x)
          copy_cells<T>(to + copy_begin * a.pitch + j, a.copy_rows * a.pitch, from + x_left + j,
                        int64_t(a.copy_rows * a.x_row_stride) * a.row.x_step, copy_count);
    commit_copies();
  };

  // The thread's rows of grad; a thread behind the last column does its work again, with zeros.
  const int own_top = top + a.rows * static_cast<int>(threadIdx.y);
  const int class_rows = (a.row.grad - grad_class + a.row_stride - 1) / a.row_stride;
  const int own_rows = class_rows - own_top < a.rows ? class_rows - own_top : a.rows;
  const bool live = left + static_cast<int>(threadIdx.x) < a.column.grad;
  const int column = live ? left + static_cast<int>(threadIdx.x) : a.column.grad - 1;
  const T* own_grad = grad + (n * a.filters + filter) * a.grad_volume + column +
                      int64_t(grad_class + own_top * a.row_stride) * a.row.grad_step;
  const int own_x =
      a.rows * static_cast<int>(threadIdx.y) * a.pitch + (column - left) * a.column.stride;

  S sum[Q][W] = {};
  const int plane_tap = first_tap + group;
  const int last_tap =
      (first_tap + groups < a.plane.kernel ? first_tap + groups : a.plane.kernel) - 1;
  const int reach = first_tap * a.plane.dilation - a.plane.before;
  int begin = first * a.plane.stride + reach;
  if (begin < 0) begin += (-begin + a.plane_step - 1) / a.plane_step * a.plane_step;
  const int behind = (last - 1) * a.plane.stride + last_tap * a.plane.dilation - a.plane.before + 1;
  const int end = behind < a.plane.x ? behind : a.plane.x;
  __syncthreads();  // the zeros are there
  if (begin < end) copy(begin, planes);
  for (int plane = begin, step = 0; plane < end; plane += a.plane_step, ++step) {
    wait_for_copies<0>();
    __syncthreads();  // the copies of all threads are there, and nobody reads the other plane
    if (plane + a.plane_step < end)
      copy(plane + a.plane_step, planes + (step + 1) % 2 * plane_size);
    const int met = plane + a.plane.before - plane_tap * a.plane.dilation;
    const int d = met / a.plane.stride;
    if (met < 0 || met % a.plane.stride != 0 || d < first || d >= last) continue;
    if (plane_tap > last_tap) continue;
    add_rows<Q, W>(planes + step % 2 * plane_size + own_x, a.pitch, a.column.dilation,
                   own_grad + int64_t(d) * a.plane.grad_step, a.row_stride * a.row.grad_step,
                   own_rows, live, sum);
  }

  const int64_t parts = int64_t(a.column_tiles) * a.row_tiles * a.row_stride * a.slabs;
  S* results = partials + ((n * parts + part) * a.filters + filter) * a.taps;
  fold_sums<Q * W, W>(planes, &sum[0][0], group, groups, [&](int of, int i, S total) {
    const int kd = first_tap + of, kh = row_tap + i / W * a.tap_stride, kw = column_tap + i % W;
    if (kd < a.plane.kernel && kh < a.row.kernel && kw < a.column.kernel)
      results[kd * a.plane.tap_step + kh * a.row.tap_step + kw] = total;
  });
}

// Threads get so many rows, where there are as many; slabs so many planes that a sum has no more
// than kLineChain products of a thread, at least kLeastLineSlab where slabs are cut to give the
// multiprocessors of an H200 threads enough.
constexpr int kLineRows = 16, kLineChain = 256, kLeastLineSlab = 4, kLineWanted = 132 * 768;
constexpr int kLineShared = 48 << 10;  // bytes of a block, at most

inline int greatest_divisor(int a, int b) { return b == 0 ? a : greatest_divisor(b, a % b); }

template <int Q, int W, class T, class Launch>
bool launch_lines(const Launch& launch, const Conv3dShape& shape, WeightLinesShape a, const T* x,
                  const T* grad, T* grad_weight) {
  const LinesAxis &p = a.plane, &r = a.row, &c = a.column;
  const int groups = even_tile(p.kernel, kLineGroups);
  a.plane_chunks = static_cast<int>(ceil_div(p.kernel, groups));
  a.plane_step = groups == 1 ? p.stride : greatest_divisor(p.stride, p.dilation);
  const int common = greatest_divisor(r.stride, r.dilation);
  a.tap_stride = r.stride / common;
  a.row_stride = r.dilation / common;
  a.x_row_stride = r.stride * a.row_stride;
  a.row_chunks = static_cast<int>(ceil_div(ceil_div(r.kernel, a.tap_stride), Q));
  a.column_chunks = static_cast<int>(ceil_div(c.kernel, W));
  a.tap_stride = r.kernel < a.tap_stride ? r.kernel : a.tap_stride;

  a.columns = even_tile(c.grad, 32);
  a.column_tiles = static_cast<int>(ceil_div(c.grad, a.columns));
  const int64_t class_rows = ceil_div(r.grad, a.row_stride);
  const int64_t high = kWeightLineThreads / (a.columns * groups),
                wanted = ceil_div(class_rows, kLineRows);
  const int threads_h = static_cast<int>(high < wanted ? (high < 1 ? 1 : high) : wanted);
  a.row_tiles = static_cast<int>(ceil_div(class_rows, threads_h * kLineRows));
  a.rows = static_cast<int>(ceil_div(class_rows, a.row_tiles * threads_h));
  a.x_rows = a.rows * threads_h + Q - 1;
  const int64_t pitch = (a.columns - 1) * int64_t(c.stride) + (W - 1) * int64_t(c.dilation) + 1;
  if (pitch * a.x_rows * sizeof(Sum<T>) > kLineShared) return false;
  a.pitch = static_cast<int>(pitch);
  const int threads = a.columns * threads_h * groups;
  a.copy_lanes = even_tile(a.pitch, threads < 32 ? threads : 32);
  a.copy_rows = threads / a.copy_lanes;
  const int planes = 2 * a.x_rows * a.pitch, fold = fold_size<W>(groups, threads / groups);
  const int64_t bytes = int64_t(planes > fold ? planes : fold) * sizeof(Sum<T>);
  if (bytes > kLineShared) return false;

  const int64_t chunks = int64_t(a.plane_chunks) * a.tap_stride * a.row_chunks * a.column_chunks;
  const int64_t tiles = int64_t(a.column_tiles) * a.row_tiles * a.row_stride;
  const int64_t blocks = chunks * tiles * shape.batch * a.filters;
  const int64_t most = kLineChain / a.rows,
                slab = ceil_div(p.grad, ceil_div(kLineWanted, blocks * threads));
  a.slab = even_tile(p.grad, slab > most ? most : slab < kLeastLineSlab ? kLeastLineSlab : slab);
  a.slabs = static_cast<int>(ceil_div(p.grad, a.slab));
  const int64_t parts = shape.batch * tiles * a.slabs, count = int64_t(a.filters) * a.taps;
  Sum<T>* partials = take_partials(launch, parts, count, grad_weight);
  launch(depthwise_weight_lines<T, Q, W>, grid_of(blocks * a.slabs),
         dim3(a.columns, threads_h, groups), static_cast<size_t>(bytes), a, x, grad, partials);
  launch_sum_partials(launch, partials, parts, count, grad_weight);
  return true;
}

// The chunks of row and column taps that kernels are made for, no more than registers can take.
constexpr int kRowChunks[] = {1, 2, 3, 4, 5, 7}, kColumnChunks[] = {1, 3, 4, 5};
constexpr int kMostLineSums = 28;

// Which of them take the fewest instructions: a row costs a multiply-add for each tap, a load and
// an addition for each column tap, and some for the cell of grad and the loop.
inline void choose_chunks(int64_t row_taps, int64_t column_taps, int& q, int& w) {
  int64_t least = INT64_MAX;
  for (const int rows : kRowChunks)
    for (const int columns : kColumnChunks) {
      const int64_t cost = ceil_div(row_taps, rows) * ceil_div(column_taps, columns) *
                           (rows * columns + 2 * columns + 5);
      if (rows * columns <= kMostLineSums && cost < least) least = cost, q = rows, w = columns;
    }
}

// By depthwise_weight_lines, if it can.
template <class T, class Launch>
bool by_weight_lines(const Launch& launch, const Conv3dShape& shape, bool channels_last, const T* x,
                     const T* grad, T* grad_weight) {
  if constexpr (!std::is_same_v<T, double>) {
    if (channels_last || shape.mode != kZeros || shape.batch == 0) return false;
    const Axis* axis = shape.axis;
    for (int i = 0; i < 3; ++i)
      if (axis[i].in + axis[i].before + axis[i].after > INT32_MAX / 2) return false;
    const int64_t x_plane = axis[1].in * axis[2].in, grad_plane = axis[1].out * axis[2].out;
    if (x_plane > INT32_MAX || grad_plane > INT32_MAX || shape.taps() > INT32_MAX) return false;
    WeightLinesShape a;
    a.multiplier = static_cast<int>(shape.multiplier);
    a.filters = static_cast<int>(shape.channels * shape.multiplier);
    a.taps = static_cast<int>(shape.taps());
    a.x_volume = axis[0].in * x_plane;
    a.grad_volume = axis[0].out * grad_plane;
    const auto lines_axis = [&](int i, int64_t x_step, int64_t grad_step, int64_t tap_step) {
      const Axis& own = axis[i];
      const auto narrow = [](int64_t value) { return static_cast<int>(value); };
      return LinesAxis{narrow(own.in),     narrow(own.out),      narrow(own.kernel),
                       narrow(own.stride), narrow(own.dilation), narrow(own.before),
                       narrow(x_step),     narrow(grad_step),    narrow(tap_step)};
    };
    a.plane = lines_axis(0, x_plane, grad_plane, axis[1].kernel * axis[2].kernel);
    a.row = lines_axis(1, axis[2].in, axis[2].out, axis[2].kernel);
    a.column = lines_axis(2, 1, 1, 1);
    if (a.row.kernel == 1) std::swap(a.plane, a.row);
    const int64_t common = greatest_divisor(a.row.stride, a.row.dilation);
    int q = 1, w = 1;
    choose_chunks(ceil_div(a.row.kernel, a.row.stride / common), a.column.kernel, q, w);
    const auto run = [&](auto rows, auto columns) {
      constexpr int kRows = decltype(rows)::value, kColumns = decltype(columns)::value;
      if constexpr (kRows * kColumns <= kMostLineSums)
        return launch_lines<kRows, kColumns>(launch, shape, a, x, grad, grad_weight);
      return false;
    };
    const auto run_columns = [&](auto rows) {
      switch (w) {
        case 1: return run(rows, std::integral_constant<int, 1>{});
        case 3: return run(rows, std::integral_constant<int, 3>{});
        case 4: return run(rows, std::integral_constant<int, 4>{});
        default: return run(rows, std::integral_constant<int, 5>{});
      }
    };
    switch (q) {
      case 1: return run_columns(std::integral_constant<int, 1>{});
      case 2: return run_columns(std::integral_constant<int, 2>{});
      case 3: return run_columns(std::integral_constant<int, 3>{});
      case 4: return run_columns(std::integral_constant<int, 4>{});
      case 5: return run_columns(std::integral_constant<int, 5>{});
      default: return run_columns(std::integral_constant<int, 7>{});
    }
  }
  return false;
}

}  // namespace device
}  // namespace voxconv
