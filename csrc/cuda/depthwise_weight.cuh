// SPDX-License-Identifier: Apache-2.0
// grad_weight of stride 1, dilation 1 and zeros, K taps along every axis, NCDHW:
//   grad_weight[f, kd, kh, kw] = sum of grad[n, f, d, h, w] * x[n, c, d + kd - before, ...].
//
// A block owns a tile of lines and columns of a slab of planes of grad, of a few filters. It walks
// along D over the planes of x, which are copied to shared memory, with the halo of the tile and
// zeros beyond the volume, while the one before is worked on. A thread owns a patch of 4 lines and
// 4 columns of grad, which it loads to registers, and the sums of all taps of some kd: for 3 taps
// all 27, with the patch of three planes; for 5 and 7 those of one kd, and K groups of threads
// share the plane of x. A plane of x costs a thread 3 (K + 3) loads of 4 cells from shared memory,
// of which a warp's take 4 clocks of the multiprocessor, and 16 K^2 multiply-adds for each kd, of
// which a warp's take a quarter of one: K = 3: 72 and 108 clocks, 5: 96 and 100, 7: 120 and 196.
// For 3 taps the 4 KB of a warp's patches of x and grad take device memory 249 (halves: 125).
// The sums of the threads of a block are added in a fixed order and left for sum_partials.
//
// A patch that would leave the volume is moved back to end with it, and cells of its neighbour that
// it then has count as zeros: a tap is never multiplied with a cell of x that it does not meet.
#pragma once
#include "launch.cuh"
#include "sum_partials.cuh"

namespace voxconv {
namespace device {

// Lines and columns of a patch.
constexpr int kPatch = 4;

// Tap planes of a thread; groups of threads that share out all K of them; threads of a block, and
// blocks of a multiprocessor that registers are to be left for.
template <int K>
constexpr int kTapPlanes = K == 3 ? 3 : 1;
template <int K>
constexpr int kTapGroups = K / kTapPlanes<K>;
template <int K>
constexpr int kSlabThreads = K == 3 ? 128 : 32 * K;
template <int K>
constexpr int kSlabBlocks = K == 7 ? 2 : 3;

struct SlabsShape {
  int64_t targets;                  // batch * filters
  int filters, multiplier;          // filters that share a channel of x
  int x[3], grad[3], before[3];     // sizes; grad cell o reads x from o - before on
  int tiles_w, tiles, slab, slabs;  // tiles along w, of a plane; planes of a slab, slabs
  int main, pitch, lines;           // of a plane of x in shared memory: columns but for those of a
                                    // patch that is moved back, all of them, lines
  int copy_lanes, copy_rows;        // threads of a filter that copy it, along columns and lines
};

// Columns of x of a tile or patch of so many columns of grad. They begin so many before those that
// are read that, where the padding is half of the kernel, vectors of x are copied as they lie in
// memory.
template <int K>
constexpr int kXLead = (kPatch - (K - 1) / 2 % kPatch) % kPatch;
template <int K>
VOXCONV_HD constexpr int x_columns(int columns) {
  return columns + (kXLead<K> + K - 1 + kPatch - 1) / kPatch * kPatch;
}

VOXCONV_HD inline int least(int a, int b) { return a < b ? a : b; }
VOXCONV_HD inline int most(int a, int b) { return a > b ? a : b; }

// The patch of a thread in a plane of grad: it begins at (h, w), where lines < skip_h and columns
// < skip_w belong to another thread.
struct Patch {
  int h, w, skip_h, skip_w;
};

template <class Unit, class T>
__device__ inline void load_patch(const T* from, int width, const Patch& patch,
                                  Four<T> (&to)[kPatch]) {
  VOXCONV_UNROLL
  for (int i = 0; i < kPatch; ++i, from += width) {
    VOXCONV_UNROLL
    for (int j = 0; j < kPatch; ++j) narrow(to[i].of[j], 0);
    const bool own = i >= patch.skip_h;
    if constexpr (std::is_same_v<Unit, Four<T>>) {
      if (own && patch.skip_w == 0) to[i] = *reinterpret_cast<const Four<T>*>(from);
    } else {
      VOXCONV_UNROLL
      for (int j = 0; j < kPatch; ++j)
        if (own && j >= patch.skip_w) to[i].of[j] = from[j];
    }
  }
}

// Copies `count` units of a column to shared memory.
template <int K, class Unit>
__device__ inline void copy_units(Unit* to, int to_step, const Unit* from, int from_step,
                                  int count) {
  if constexpr (sizeof(Unit) >= 4) {
    for (; count > 0; --count, to += to_step, from += from_step)
      copy_later<sizeof(Unit)>(to, from, true);
  } else {  // while the thread waits: many at once
    constexpr int kUnits = K < 7 ? 8 : 4;
    for (; count > 0; count -= kUnits) {
      Unit units[kUnits];
      VOXCONV_UNROLL
      for (int i = 0; i < kUnits; ++i, from += from_step)
        if (i < count) units[i] = *from;
      VOXCONV_UNROLL
      for (int i = 0; i < kUnits; ++i, to += to_step)
        if (i < count) *to = units[i];
    }
  }
}

// The products of a patch of grad, of planes [First, Last), and a plane of x.
template <int K, int First, int Last, class T, class S>
__device__ __forceinline__ void add_patch(const T* cells, int pitch,
                                          const S (&grad)[kTapPlanes<K>][kPatch][kPatch],
                                          S (&sum)[kTapPlanes<K>][K][K]) {
  constexpr int kCells = x_columns<K>(kPatch);
  VOXCONV_UNROLL
  for (int line = 0; line < kPatch + K - 1; ++line) {
    S x[kCells];
    VOXCONV_UNROLL
    for (int i = 0; i < kCells; i += kPatch) load_four(cells + line * pitch + i, x + i);
    VOXCONV_UNROLL
    for (int kh = 0; kh < K; ++kh) {
      const int h = line - kh;
      if (h < 0 || h >= kPatch) continue;
      VOXCONV_UNROLL
      for (int kd = First; kd < Last; ++kd) {
        VOXCONV_UNROLL
        for (int w = 0; w < kPatch; ++w) {
          VOXCONV_UNROLL
          for (int kw = 0; kw < K; ++kw) sum[kd][kh][kw] += x[kXLead<K> + w + kw] * grad[kd][h][w];
        }
      }
    }
  }
}

// Bytes of shared memory that a filter of a block needs: two planes of x, or sums to be folded.
template <int K, class T>
int slabs_shared(const SlabsShape& a, int threads) {
  const int planes = 2 * a.lines * a.pitch * static_cast<int>(sizeof(T));
  const int fold = fold_size<kTapPlanes<K> * K>(kTapGroups<K>, threads / kTapGroups<K>) *
                   static_cast<int>(sizeof(Sum<T>));
  return ((planes > fold ? planes : fold) + 15) / 16 * 16;
}

// blockDim is [patches of a tile along w, along h, filters of a block * groups]; blocks are counted
// by tiles, then by slabs, then by filters.
template <class T, int K, class Unit>
__global__ void __launch_bounds__(kSlabThreads<K>, kSlabBlocks<K>)
    depthwise_weight_slabs(SlabsShape a, int shared, const T* x, const T* grad, Sum<T>* partials) {
  using S = Sum<T>;
  constexpr int kPlanes = kTapPlanes<K>, kGroups = kTapGroups<K>;
  constexpr bool kEarly = K < 7;  // patches are loaded a plane ahead, where registers are left
  const int block = static_cast<int>(blockIdx.x), tile = block % a.tiles;
  const int slab = block / a.tiles % a.slabs, first = slab * a.slab;  // plane of grad
  const int last = first + a.slab < a.grad[0] ? first + a.slab : a.grad[0];
  const int group_threads = static_cast<int>(blockDim.x * blockDim.y);
  const int in_group = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  const int group = static_cast<int>(threadIdx.z) % kGroups, deep = threadIdx.z / kGroups;
  const int threads = group_threads * kGroups, thread = group * group_threads + in_group;
  const int64_t number =
      static_cast<int64_t>(block / a.tiles / a.slabs) * (blockDim.z / kGroups) + deep;
  const int64_t at = number < a.targets ? number : a.targets - 1;  // of the last: works in vain
  const int64_t n = at / a.filters, filter = at % a.filters;
  unsigned char* own_memory = shared_memory<unsigned char>() + deep * shared;
  T* planes = reinterpret_cast<T*>(own_memory);
  S* results = nullptr;
  if (number < a.targets)
    results = partials + (((n * a.slabs + slab) * a.tiles + tile) * a.filters + filter) * K * K * K;

  // The tile begins at column `left` and line `top`; its lines before `fresh` are another tile's.
  const int wide = kPatch * static_cast<int>(blockDim.x), left = tile % a.tiles_w * wide;
  const int tall = kPatch * static_cast<int>(blockDim.y), fresh = tile / a.tiles_w * tall;
  const int top = least(fresh, most(a.grad[1] - tall, 0));

  // Where plane p of x is copied to shared memory: what exists of it, the rest stays zero.
  const int plane_size = a.lines * a.pitch;
  for (int i = thread; i < 2 * plane_size; i += threads) narrow(planes[i], 0);
  const int copy_lane = thread % a.copy_lanes, copy_row = thread / a.copy_lanes;
  const int x_top = top - a.before[1], x_left = left - a.before[2] - kXLead<K>;
  const int copy_begin = most(-x_top, 0) + copy_row;
  const int copy_end = least(a.lines, a.x[1] - x_top);
  const int copy_count = (copy_end - copy_begin + a.copy_rows - 1) / a.copy_rows;
  const int64_t x_plane = int64_t(a.x[1]) * a.x[2];
  const T* source = x + (n * (a.filters / a.multiplier) + filter / a.multiplier) * a.x[0] * x_plane;
  const auto copy = [&](int plane) {
    constexpr int kWide = sizeof(Unit) / sizeof(T);
    const T* from = source + plane * x_plane + (x_top + copy_begin) * a.x[2];
    T* to = planes + plane % 2 * plane_size + copy_begin * a.pitch;
    for (int j = copy_lane * kWide; j < a.pitch; j += a.copy_lanes * kWide) {
      const int w = x_left + j + (j < a.main ? 0 : a.grad[2] - kPatch - left - a.main);
      if (w >= 0 && w < a.x[2] && copy_row < a.copy_rows)
        copy_units<K>(reinterpret_cast<Unit*>(to + j), a.copy_rows * a.pitch / kWide,
                      reinterpret_cast<const Unit*>(from + w), a.copy_rows * a.x[2] / kWide,
                      copy_count);
    }
    commit_copies();
  };

  Patch patch;
  const int line = top + kPatch * static_cast<int>(threadIdx.y);
  const int column = left + kPatch * static_cast<int>(threadIdx.x);
  patch.h = least(line, a.grad[1] - kPatch);
  patch.w = least(column, a.grad[2] - kPatch);
  patch.skip_h = most(line, fresh) - patch.h;
  patch.skip_w = column - patch.w;
  const bool in_line = (column - patch.w) % kPatch == 0;
  const T* own_cells = planes + (patch.h - top) * a.pitch + (in_line ? patch.w - left : a.main);

  // Plane p of x meets plane p + ahead - i of grad at the thread's i-th kd.
  const int ahead = a.before[0] - group * kPlanes;
  const int64_t grad_plane = int64_t(a.grad[1]) * a.grad[2];
  const T* own = grad + at * a.grad[0] * grad_plane + patch.h * a.grad[2] + patch.w;
  const auto meets = [&](int plane) { return plane >= first && plane < last; };
  const auto load = [&](int plane, Four<T>(&to)[kPatch]) {
    if (meets(plane)) load_patch<Unit>(own + plane * grad_plane, a.grad[2], patch, to);
  };
  const int begin = most(first - a.before[0], 0);
  const int end = least(last - a.before[0] + K - 1, a.x[0]);
  S sum[kPlanes][K][K], patches[kPlanes][kPatch][kPatch];
  VOXCONV_UNROLL
  for (int i = 0; i < kPlanes * K * K; ++i) sum[i / K / K][i / K % K][i % K] = 0;
  Four<T> next[kPatch] = {};
  const auto take_next = [&] {
    VOXCONV_UNROLL
    for (int i = kPlanes - 1; i > 0; --i) {
      VOXCONV_UNROLL
      for (int j = 0; j < kPatch * kPatch; ++j)
        patches[i][j / kPatch][j % kPatch] = patches[i - 1][j / kPatch][j % kPatch];
    }
    VOXCONV_UNROLL
    for (int j = 0; j < kPatch * kPatch; ++j)
      patches[0][j / kPatch][j % kPatch] = widen(next[j / kPatch].of[j % kPatch]);
  };
  for (int i = kPlanes - 1; i > 0; --i) {
    load(begin + ahead - i, next);
    take_next();
  }
  if (kEarly) load(begin + ahead, next);
  __syncthreads();  // the zeros are there
  if (begin < end) copy(begin);
  for (int plane = begin; plane < end; ++plane) {
    wait_for_copies<0>();
    __syncthreads();  // the copies of all threads are there, and nobody reads the other plane
    const int d = plane + ahead;
    if (kEarly) take_next();
    load(kEarly ? d + 1 : d, next);
    if (plane + 1 < end) copy(plane + 1);
    if (!kEarly) take_next();
    const T* cells = own_cells + plane % 2 * plane_size;
    if (meets(d) && meets(d - kPlanes + 1))
      add_patch<K, 0, kPlanes>(cells, a.pitch, patches, sum);
    else if constexpr (kPlanes > 1) {
      if (meets(d)) add_patch<K, 0, 1>(cells, a.pitch, patches, sum);
      if (meets(d - 1)) add_patch<K, 1, 2>(cells, a.pitch, patches, sum);
      if (meets(d - 2)) add_patch<K, 2, 3>(cells, a.pitch, patches, sum);
    }
  }

  fold_sums<kPlanes * K * K, kPlanes * K>(reinterpret_cast<S*>(own_memory), &sum[0][0][0], group,
                                          kGroups, [&](int of, int i, S total) {
                                            if (results) results[of * kPlanes * K * K + i] = total;
                                          });
}

// Slabs have at most so many planes, because a thread adds 16 products of each to a sum, one after
// the other, and at least so many, of which K - 1 are read for two of them, where they are cut to
// give the multiprocessors of an H200 threads enough.
constexpr int kMostGradSlab = 16, kSlabsWanted = 132 * 384;
template <int K>
constexpr int kLeastGradSlab = K == 3 ? 4 : 8;
constexpr int kSlabsColumn = 16;        // patches of a tile along w, at most
constexpr int kSlabsShared = 48 << 10;  // bytes of a block, at most
constexpr int kSlabsBlocks = 2 * 132;   // before filters share a block of more than a warp

// Whether depthwise_weight_slabs can do it, if there are as many taps.
inline bool slabs_suit(const Conv3dShape& shape, bool channels_last) {
  const Axis* axis = shape.axis;
  if (channels_last || shape.mode != kZeros || shape.batch == 0) return false;
  for (int i = 0; i < 3; ++i)
    if (axis[i].kernel != axis[0].kernel || axis[i].stride != 1 || axis[i].dilation != 1 ||
        axis[i].in + axis[i].before + axis[i].after > INT32_MAX / 2)
      return false;
  const auto plane_fits = [](int64_t h, int64_t w) { return h * w < INT32_MAX; };
  return axis[1].out >= kPatch && axis[2].out >= kPatch && plane_fits(axis[1].in, axis[2].in) &&
         plane_fits(axis[1].out, axis[2].out);
}

template <int K, class Unit, class T, class Launch>
void launch_slabs(const Launch& launch, const Conv3dShape& shape, const T* x, const T* grad,
                  T* grad_weight) {
  constexpr int kGroups = kTapGroups<K>;
  SlabsShape a;
  a.multiplier = static_cast<int>(shape.multiplier);
  a.filters = static_cast<int>(shape.channels * shape.multiplier);
  a.targets = shape.batch * a.filters;
  for (int i = 0; i < 3; ++i) {
    a.x[i] = static_cast<int>(shape.axis[i].in);
    a.grad[i] = static_cast<int>(shape.axis[i].out);
    a.before[i] = static_cast<int>(shape.axis[i].before);
  }
  // Threads along w, then h, then over filters, until a block has all it may have.
  const int64_t patches_w = ceil_div(a.grad[2], kPatch), patches_h = ceil_div(a.grad[1], kPatch);
  const int wide = even_tile(patches_w, kSlabsColumn);
  const int high = even_tile(patches_h, kSlabThreads<K> / kGroups / wide);
  const int threads = wide * high * kGroups;
  a.main = x_columns<K>(wide * kPatch);
  a.pitch = a.main + (a.grad[2] % kPatch ? x_columns<K>(kPatch) : 0);
  a.lines = high * kPatch + K - 1;
  a.copy_lanes = even_tile(a.pitch * int(sizeof(T)) / sizeof(Unit), threads < 32 ? threads : 32);
  a.copy_rows = threads / a.copy_lanes;
  const int bytes = slabs_shared<K, T>(a, threads);
  a.tiles_w = static_cast<int>(ceil_div(patches_w, wide));
  a.tiles = a.tiles_w * static_cast<int>(ceil_div(patches_h, high));
  const int64_t spread = ceil_div(a.targets * a.tiles, kSlabsBlocks), warp = ceil_div(32, threads);
  const int fit = least(kSlabThreads<K> / threads, kSlabsShared / bytes);
  const int deep = least(fit, static_cast<int>(spread > warp ? spread : warp));
  const int64_t blocks = a.tiles * ceil_div(a.targets, deep);
  const int64_t slab = ceil_div(a.grad[0], ceil_div(kSlabsWanted, blocks * threads * deep));
  a.slab = even_tile(a.grad[0], slab > kMostGradSlab       ? kMostGradSlab
                                : slab < kLeastGradSlab<K> ? kLeastGradSlab<K>
                                                           : slab);
  a.slabs = static_cast<int>(ceil_div(a.grad[0], a.slab));
  const int64_t parts = shape.batch * a.slabs * a.tiles, count = a.filters * shape.taps();
  Sum<T>* partials = take_partials(launch, parts, count, grad_weight);
  launch(depthwise_weight_slabs<T, K, Unit>, grid_of(blocks * a.slabs),
         dim3(wide, high, deep * kGroups), deep * bytes, a, bytes, x, grad, partials);
  launch_sum_partials(launch, partials, parts, count, grad_weight);
}

// Whether lines of x and grad may be read by fours, as they lie in memory.
template <int K, class T>
bool slabs_by_fours(const Conv3dShape& shape, const T* x, const T* grad) {
  const Axis& w = shape.axis[2];
  const auto at_four = [](const T* data) {
    return reinterpret_cast<uintptr_t>(data) % sizeof(Four<T>) == 0;
  };
  return w.in % kPatch == 0 && w.out % kPatch == 0 && (w.before + kXLead<K>) % kPatch == 0 &&
         at_four(x) && at_four(grad);
}

// By depthwise_weight_slabs, if it can.
template <class T, class Launch>
bool by_slabs(const Launch& launch, const Conv3dShape& shape, bool channels_last, const T* x,
              const T* grad, T* grad_weight) {
  if constexpr (!std::is_same_v<T, double>) {
    if (!slabs_suit(shape, channels_last)) return false;
    const auto run = [&](auto k) {
      constexpr int K = decltype(k)::value;
      if (slabs_by_fours<K>(shape, x, grad))
        launch_slabs<K, Four<T>>(launch, shape, x, grad, grad_weight);
      else
        launch_slabs<K, T>(launch, shape, x, grad, grad_weight);
    };
    switch (shape.axis[0].kernel) {
      case 3: run(std::integral_constant<int, 3>{}); return true;
      case 5: run(std::integral_constant<int, 5>{}); return true;
      case 7: run(std::integral_constant<int, 7>{}); return true;
      default: break;
    }
  }
  return false;
}

}  // namespace device
}  // namespace voxconv
