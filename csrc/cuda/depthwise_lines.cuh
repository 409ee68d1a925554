// SPDX-License-Identifier: Apache-2.0
// Forward and grad_input of any kernel, stride, dilation and multiplier, NCDHW; zeros, and forward
// also the other padding modes.
//
// Along each axis the destinations fall into phases, those that read the source with the same taps
// in the same order: of phase p, destination first + step * q reads with tap k the source's cell
// source + source_step * (stride * q + k), see phases_of. A phase is a correlation without dilation
// on a part of the cells. A block owns one phase of D and H, and along W all of them if they are
// few, else one; of these a tile of lines, columns and kLinesPlanes planes, of a few channels. The
// planes of the source that they read are copied to shared memory one after the other, zeros beyond
// the volume; a line lies there as sublines, of the cells that the taps of one phase meet from one
// q to the next, so that neighbours in memory are what a thread's columns read with one tap.
//
// A thread owns 4 columns of kLinesLines lines of kLinesPlanes planes, of each phase of W that is
// the block's. The n taps of a line of the kernel and the n + 3 cells of a subline that they meet
// are loaded from shared memory in fours, the taps by all lanes at once, and give 4 n
// multiply-adds; a cell loaded is used by all lines and planes of the thread that meet it. With 3,
// 5, 7 taps along every axis, stride 1, 32 outputs take
//   multiply-adds of a warp          27   125   343
//   all its instructions            130   296   600   of them 66, 97, 131 to copy
//   wavefronts of shared memory      14    32    64
// of which a multiprocessor issues four instructions and one wavefront a clock: instructions bound
// it, those of the copies where the kernel is short.
//
// Of a kernel of K taps the source is read (1 + (K-1)/planes)(1 + (K-1)/lines)(1 + (K-1)/columns)
// times, but for the first time from the second cache.
#pragma once
#include "depthwise_lines_plan.h"

namespace voxconv {
namespace device {

// Calls f with the number of taps of a run.
template <class F>
__device__ __forceinline__ void with_taps(int taps, const F& f) {
  switch (taps) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
    case 5: return f(std::integral_constant<int, 5>{});
    default: return f(std::integral_constant<int, kLongestRun>{});
  }
}

// The cell of the source that position i of an axis of n cells reads, or -1.
__device__ inline int cell_at(int i, int n, int mode) {
  const auto inside = [&](int cell) { return cell >= 0 && cell < n; };
  if (inside(i) || mode == kZeros) return inside(i) ? i : -1;
  const int cell = static_cast<int>(source_index(i, n, mode));
  return inside(cell) ? cell : -1;  // a tile may go beyond the padding
}

// Copies a plane of the source to `to`: of lines first_h, first_h + step, ... the cells of the
// sublines, from q on. The threads of a channel share it out.
template <class T>
__device__ void copy_sublines(const LinesShape& a, const T* plane, int first_h, int lines,
                              int group, int q, Sum<T>* to) {
  const int threads = static_cast<int>(blockDim.x * blockDim.y);
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  const int first = thread / a.copied, by = threads / a.copied;
  if (first >= by) return;
  int i = thread % a.copied;  // of subline s
  for (int s = a.first_subline[group]; s < a.first_subline[group + 1];) {
    if (i >= a.cells) {
      ++s, i -= a.cells, to += a.pitch;
      continue;
    }
    int w = a.subline[s] + a.w.source_step * a.w.stride * (q + i);
    if (a.mode != kZeros) w = cell_at(w, a.w.source, a.mode);
    const bool column = w >= 0 && w < a.w.source;
    if (a.mode == kZeros || !column)
      copy_column(plane + w, a.h.source_pitch, first_h, a.h.source_step, column ? a.h.source : 0,
                  first, by, lines, to + i, a.line);
    else
      for (int line = first; line < lines; line += by) {
        const int row = cell_at(first_h + a.h.source_step * line, a.h.source, a.mode);
        copy_async(to + i + line * a.line, plane + (row < 0 ? 0 : row * a.h.source_pitch + w),
                   row >= 0);
      }
    i += a.copied;
  }
}

// What a plane of the source adds to the sums of a thread by a run of N taps along W. Line `line`
// of those that the thread reads is met by its line l with tap line - l * a.h.stride; its plane d
// has the taps at taps[d], or null if it does not read this plane.
template <int N, int P, class S>
__device__ __forceinline__ void add_run(const LinesShape& a, const S* cells, int lines, int taps_h,
                                        const S* taps, const int (&plane_taps)[kLinesPlanes<P>],
                                        int phase,
                                        S (&sum)[kLinesPlanes<P>][kLinesLines][P][kLinesColumns]) {
  constexpr int kVectors = fours(kLinesColumns + N - 1) / 4, kTapVectors = fours(N) / 4;
  for (int line = 0; line < lines; ++line, cells += a.line, taps += a.tap_pitch) {
    S x[kVectors][4];
    VOXCONV_UNROLL
    for (int i = 0; i < kVectors; ++i) load_four(cells + 4 * i, x[i]);
    VOXCONV_UNROLL
    for (int d = 0; d < kLinesPlanes<P>; ++d) {
      if (plane_taps[d] < 0) continue;
      VOXCONV_UNROLL
      for (int l = 0; l < kLinesLines; ++l) {
        const int kh = line - l * a.h.stride;
        if (kh < 0 || kh >= taps_h) continue;
        S tap[kTapVectors][4];
        VOXCONV_UNROLL
        for (int i = 0; i < kTapVectors; ++i)
          load_four(taps + (plane_taps[d] - l * a.tap_lag) + 4 * i, tap[i]);
        VOXCONV_UNROLL
        for (int k = 0; k < N; ++k) {
          VOXCONV_UNROLL
          for (int w = 0; w < kLinesColumns; ++w)
            sum[d][l][phase][w] += x[(w + k) / 4][(w + k) % 4] * tap[k / 4][k % 4];
        }
      }
    }
  }
}

// blockDim is [columns / kLinesColumns, lines / kLinesLines, channels] of a block; blocks are
// counted by what they own along W, then H, D and the channels. P phases of W are a block's.
template <class T, int P>
__global__ void __launch_bounds__(kLinesThreads, kLinesResident<T, P>)
    depthwise_lines(const __grid_constant__ LinesShape a, const T* source, const T* weight,
                    const T* bias, T* target) {
  using S = Sum<T>;
  int rest = static_cast<int>(blockIdx.x);
  const auto part = [&](int parts) {
    const int i = rest % parts;
    rest /= parts;
    return i;
  };
  const int group = part(a.groups), tile_w = part(a.tiles_w);
  const Phase& h = a.h.phase[part(a.h.step)];
  const int tile_h = part(a.tiles_h);
  const Phase& d = a.d.phase[part(a.d.step)];
  const int first_d = part(a.tiles_d) * kLinesPlanes<P>;
  const int wide = static_cast<int>(blockDim.x), high = static_cast<int>(blockDim.y);
  const int first_h = tile_h * high * kLinesLines, first_w = tile_w * wide * kLinesColumns;

  const int64_t number = static_cast<int64_t>(rest) * blockDim.z + threadIdx.z;
  const bool exists = number < a.targets;
  const int64_t at = exists ? number : a.targets - 1;  // of the last block: works in vain
  const int64_t channel = at % a.channels;
  const T* from = source + at / a.sharing * a.filters * a.source_cells;

  // The taps, in the order of the runs.
  S* taps = shared_memory<S>() + threadIdx.z * a.shared;
  S* planes = taps + a.taps;
  const int rows = d.taps * h.taps;
  const int thread = static_cast<int>(threadIdx.y) * wide + static_cast<int>(threadIdx.x);
  for (int i = thread; i < a.filters * rows; i += wide * high) {
    const int kd = d.tap + a.d.tap_step * (i % rows / h.taps);
    const int kh = h.tap + a.h.tap_step * (i % h.taps);
    const T* row = weight + (channel * a.filters + i / rows) * a.filter_taps + kd * a.d.tap_pitch +
                   kh * a.h.tap_pitch;
    for (int r = a.first_run[group * P]; r < a.first_run[group * P + P]; ++r)
      for (int k = 0; k < a.run[r].taps; ++k)
        taps[i * a.tap_pitch + a.run[r].slot + k] =
            widen(row[a.run[r].tap + a.w.tap_step * a.w.stride * k]);
  }

  const S start = bias ? widen(bias[channel]) : S(0);
  S sum[kLinesPlanes<P>][kLinesLines][P][kLinesColumns];
  VOXCONV_UNROLL
  for (int i = 0; i < kLinesPlanes<P> * kLinesLines * P * kLinesColumns; ++i)
    sum[i / kLinesColumns / P / kLinesLines][i / kLinesColumns / P % kLinesLines]
       [i / kLinesColumns % P][i % kLinesColumns] = start;

  // The planes that the block reads, of each filter of a channel in turn.
  const int depth = d.taps > 0 ? a.d.stride * (kLinesPlanes<P> - 1) + d.taps : 0;
  const auto plane_at = [&](int i) {
    return cell_at(d.source + a.d.source_step * (a.d.stride * first_d + i % depth), a.d.source,
                   a.mode);
  };
  const int lines_read = h.taps > 0 ? a.h.stride * (high * kLinesLines - 1) + h.taps : 0;
  const auto copy = [&](int i) {
    if (const int plane = i < depth * a.filters ? plane_at(i) : -1; plane >= 0)
      copy_sublines(a, from + i / depth * a.source_cells + plane * a.d.source_pitch,
                    h.source + a.h.source_step * a.h.stride * first_h, lines_read, group, first_w,
                    planes + i % 2 * a.plane);
    commit_copies();
  };
  const int own_lines = h.taps > 0 ? a.h.stride * (kLinesLines - 1) + h.taps : 0;
  const S* own =
      planes + threadIdx.y * kLinesLines * a.h.stride * a.line + threadIdx.x * kLinesColumns;
  copy(0);
  for (int i = 0; i < depth * a.filters; ++i) {
    wait_for_copies<0>();
    __syncthreads();  // the copies of all threads are there, and nobody reads the other plane
    copy(i + 1);
    if (plane_at(i) < 0) continue;
    int plane_taps[kLinesPlanes<P>];
    VOXCONV_UNROLL
    for (int p = 0; p < kLinesPlanes<P>; ++p) {
      const int kd = i % depth - p * a.d.stride;
      const bool reads = kd >= 0 && kd < d.taps;
      plane_taps[p] = reads ? (i / depth * rows + kd * h.taps) * a.tap_pitch : -1;
    }
    VOXCONV_UNROLL
    for (int p = 0; p < P; ++p)
      for (int r = a.first_run[group * P + p]; r < a.first_run[group * P + p + 1]; ++r) {
        const Run& run = a.run[r];
        const S* cells = own + i % 2 * a.plane + run.subline * a.pitch + run.cell;
        with_taps(run.taps, [&](auto n) {
          add_run<decltype(n)::value, P>(a, cells, own_lines, h.taps, taps + run.slot, plane_taps,
                                         p, sum);
        });
      }
  }

  if (!exists) return;
  const int q_w = first_w + static_cast<int>(threadIdx.x) * kLinesColumns;
  const int step = P > 1 ? P : a.w.step;
  T* to = target + at * a.target_cells;
  VOXCONV_UNROLL
  for (int i = 0; i < kLinesPlanes<P> * kLinesLines; ++i) {
    const int q_h = first_h + static_cast<int>(threadIdx.y) * kLinesLines + i % kLinesLines;
    const int o_d = d.first + a.d.step * (first_d + i / kLinesLines);
    const int o_h = h.first + a.h.step * q_h;
    if (o_d >= a.d.target || o_h >= a.h.target) continue;
    T* row = to + o_d * a.d.target_pitch + o_h * a.h.target_pitch;
    VOXCONV_UNROLL
    for (int j = 0; j < P; ++j) {  // the columns of all phases are neighbours
      S four[4];
      VOXCONV_UNROLL
      for (int c = 0; c < 4; ++c)
        four[c] = sum[i / kLinesLines][i % kLinesLines][(4 * j + c) % P][(4 * j + c) / P];
      const int o_w = a.w.phase[group * P].first + step * q_w + 4 * j;
      store_four(row + o_w, four, a.activation, (a.w.target - o_w + step / P - 1) / (step / P),
                 step == P && a.w.target % 4 == 0, step / P);
    }
  }
}

// By depthwise_lines, if it can: `target` = activation(source * weight + bias).
template <class T, class Launch>
bool by_lines(const Launch& launch, const Conv3dShape& shape, bool channels_last, bool backwards,
              const T* source, const T* weight, const T* bias, int activation, T* target) {
  LinesPlan plan;
  if (channels_last || !plan_lines(shape, backwards, activation, sizeof(Sum<T>), plan))
    return false;
  const auto run = [&](auto p) {
    launch(depthwise_lines<T, decltype(p)::value>, plan.blocks, plan.threads, plan.shared,
           plan.shape, source, weight, bias, target);
  };
  switch (phases_of_block(plan.shape.w)) {
    case 2: run(std::integral_constant<int, 2>{}); break;
    case 3: run(std::integral_constant<int, 3>{}); break;
    default: run(std::integral_constant<int, 1>{}); break;
  }
  return true;
}

}  // namespace device
}  // namespace voxconv
