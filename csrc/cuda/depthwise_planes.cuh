// SPDX-License-Identifier: Apache-2.0
// Forward and grad_input of stride 1, dilation 1 and zeros, K taps along every axis, NCDHW. They
// are one correlation: grad_input is that of the gradient with the kernel turned round.
//
// A block owns a tile of lines and columns of a few channels, and walks along D through a slab of
// destination planes. A plane of the source, with the halo of the tile and zeros beyond the volume,
// is copied to shared memory while the one before it is worked on. A thread owns 4 columns of some
// lines of K destination planes at a time, which the current plane of the source is the last, ...,
// the first to reach: a cell read from shared memory is worth up to 4 K^2 multiply-adds, the sums
// stay in registers, and the planes of the source are read once, but for halos.
//
// Of a tile of h x w the source is read (1 + (K-1)/h)(1 + (K-1)/w) times, mostly from the second
// cache; of a slab of n planes K-1 more than n are worked on.
#pragma once
#include "launch.cuh"

namespace voxconv {
namespace device {

struct PlanesShape {
  int64_t targets;              // batch * channels of the target
  int channels, multiplier;     // of the target, targets that share a source
  int source[3], target[3];     // sizes
  int before[3];                // destination o reads from source cell o - before on
  int tile_h, tile_w, tiles_w;  // of destinations
  int slab, slabs;              // destination planes of a slab; slabs
  int copy_bytes;               // of a copy to shared memory
  bool turned;                  // the kernel is turned round
  int activation;
};

// Destinations of a thread: columns, and lines, fewer where the sums would leave no registers.
constexpr int kColumns = 4;
template <int K>
constexpr int kLines = K > 5 ? 2 : 4;

constexpr int kPlanesThreads = 128;  // of a block, at most

// Weights of a line of taps, in whole vectors of 4.
template <int K>
constexpr int kTapPitch = (K + 3) / 4 * 4;

// Planes are copied to shared memory 16 bytes at a time where they can be. So that the cells of a
// tile with as much padding as is usual, K / 2, begin with such a vector, lines there have so many
// cells in front of the first that is read.
template <class T>
constexpr int kCopyCells = 16 / int(sizeof(T));
template <int K, class T>
constexpr int kLead = kCopyCells<T> - K / 2;

template <int K, class T>
VOXCONV_HD constexpr int planes_pitch(int tile_w) {
  return (kLead<K, T> + tile_w + K - 1 + kCopyCells<T> - 1) / kCopyCells<T> * kCopyCells<T>;
}
template <int K>
VOXCONV_HD constexpr int planes_lines(int tile_h) {
  return tile_h + K - 1;
}

// Bytes of shared memory that a channel of a block needs: taps, and two planes.
template <int K, class T>
VOXCONV_HD constexpr int planes_shared(int tile_h, int tile_w) {
  return K * K * kTapPitch<K> * int(sizeof(Sum<T>)) +
         2 * planes_lines<K>(tile_h) * planes_pitch<K, T>(tile_w) * int(sizeof(T));
}

// A thread's share of a plane and what lies around the tile that begins at destination (h, w), in
// runs of `cells` cells that it copies to shared memory.
template <int K, class T>
class Runs {
 public:
  __device__ Runs(const PlanesShape& a, int h, int w, int cells)
      : a_(a),
        h_(h - a.before[1]),
        w_(w - a.before[2] - kLead<K, T>),
        pitch_(planes_pitch<K, T>(a.tile_w)) {
    const int threads = static_cast<int>(blockDim.x * blockDim.y), runs = pitch_ / cells;
    const int mine = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
    line_ = mine / runs, cell_ = mine % runs * cells;
    more_lines_ = threads / runs, more_cells_ = threads % runs * cells;
  }
  __device__ bool more() const { return line_ < planes_lines<K>(a_.tile_h); }
  __device__ void advance() {  // without a division
    line_ += more_lines_, cell_ += more_cells_;
    if (cell_ >= pitch_) cell_ -= pitch_, ++line_;
  }
  __device__ int place() const { return line_ * pitch_ + cell_; }
  // Its cell in the plane, or -1 where there are zeros.
  __device__ int source() const {
    const int h = h_ + line_, w = w_ + cell_;
    const bool exists = h >= 0 && h < a_.source[1] && w >= 0 && w < a_.source[2];
    return exists ? h * a_.source[2] + w : -1;
  }

 private:
  const PlanesShape& a_;
  int h_, w_, pitch_, line_, cell_, more_lines_, more_cells_;
};

template <int K, int Bytes, class T>
__device__ void copy_runs(const PlanesShape& a, const T* plane, int h, int w, T* to) {
  for (Runs<K, T> run(a, h, w, Bytes / int(sizeof(T))); run.more(); run.advance()) {
    const int from = run.source();
    copy_later<Bytes>(to + run.place(), plane + (from < 0 ? 0 : from), from >= 0);
  }
}

// Copies plane `plane` of the source into `to`. Single halves cannot be copied later: they are
// copied here, a few at a time, so that their loads wait for memory together.
template <int K, class T>
__device__ void copy_plane(const PlanesShape& a, const T* plane, int h, int w, T* to) {
  switch (a.copy_bytes) {
    case 16: return copy_runs<K, 16>(a, plane, h, w, to);
    case 8: return copy_runs<K, 8>(a, plane, h, w, to);
    case 4: return copy_runs<K, 4>(a, plane, h, w, to);
    default: break;
  }
  constexpr int kTogether = 8;
  for (Runs<K, T> run(a, h, w, 1); run.more();) {
    T cells[kTogether];
    int places[kTogether];
    VOXCONV_UNROLL
    for (int i = 0; i < kTogether; ++i) {
      places[i] = run.more() ? run.place() : -1;
      const int from = run.more() ? run.source() : -1;
      narrow(cells[i], 0);
      if (from >= 0) cells[i] = plane[from];
      run.advance();
    }
    VOXCONV_UNROLL
    for (int i = 0; i < kTogether; ++i)
      if (places[i] >= 0) to[places[i]] = cells[i];
  }
}

// What a plane of the source in shared memory adds to the sums of a thread: sum[kd] is of the plane
// that reads it with tap kd.
template <int K, class T>
__device__ void add_plane(const T* cells, int pitch, const Sum<T>* taps,
                          Sum<T> (&sum)[K][kLines<K>][kColumns]) {
  using S = Sum<T>;
  // The first cell that is read, from the vector on that holds it.
  constexpr int kFirst = kLead<K, T> % 4, kVectors = (kFirst + kColumns + K - 1 + 3) / 4;
  constexpr int kTapVectors = kTapPitch<K> / 4;
  VOXCONV_UNROLL
  for (int line = 0; line < kLines<K> + K - 1; ++line) {
    S x[kVectors][4];
    VOXCONV_UNROLL
    for (int i = 0; i < kVectors; ++i) load_four(cells + line * pitch + 4 * i, x[i]);
    VOXCONV_UNROLL
    for (int kh = 0; kh < K; ++kh) {
      const int h = line - kh;
      if (h < 0 || h >= kLines<K>) continue;
      VOXCONV_UNROLL
      for (int kd = 0; kd < K; ++kd) {
        S tap[kTapVectors][4];
        VOXCONV_UNROLL
        for (int i = 0; i < kTapVectors; ++i)
          load_four(taps + (kd * K + kh) * kTapPitch<K> + 4 * i, tap[i]);
        VOXCONV_UNROLL
        for (int kw = 0; kw < K; ++kw) {
          VOXCONV_UNROLL
          for (int w = 0; w < kColumns; ++w) {
            const int cell = kFirst + w + kw;
            sum[kd][h][w] += x[cell / 4][cell % 4] * tap[kw / 4][kw % 4];
          }
        }
      }
    }
  }
}

// blockDim is [tile_w / kColumns, tile_h / kLines, channels of a block]; blocks are counted by
// tiles, then by slabs, then by channels.
template <class T, int K>
__global__ void __launch_bounds__(kPlanesThreads)
    depthwise_planes(PlanesShape a, const T* source, const T* weight, const T* bias, T* target) {
  using S = Sum<T>;
  constexpr int kThreadCells = kLines<K> * kColumns;
  const int tiles = a.tiles_w * ((a.target[1] + a.tile_h - 1) / a.tile_h);
  const int block = static_cast<int>(blockIdx.x), tile = block % tiles;
  const int first = block / tiles % a.slabs * a.slab;  // destination plane
  const int last = first + a.slab < a.target[0] ? first + a.slab : a.target[0];
  const int h = tile / a.tiles_w * a.tile_h, w = tile % a.tiles_w * a.tile_w;
  const int64_t number = static_cast<int64_t>(block / tiles / a.slabs) * blockDim.z + threadIdx.z;
  const bool exists = number < a.targets;
  const int64_t at = exists ? number : a.targets - 1;  // of the last block: works in vain
  const int64_t source_plane = int64_t(a.source[1]) * a.source[2];
  const int64_t target_plane = int64_t(a.target[1]) * a.target[2];
  const int channel = static_cast<int>(at % a.channels);
  const T* from = source + at / a.multiplier * (a.source[0] * source_plane);
  T* to = target + at * (a.target[0] * target_plane);

  auto* own = shared_memory<char>() + threadIdx.z * planes_shared<K, T>(a.tile_h, a.tile_w);
  S* taps = reinterpret_cast<S*>(own);
  T* planes = reinterpret_cast<T*>(taps + K * K * kTapPitch<K>);
  const int pitch = planes_pitch<K, T>(a.tile_w), plane_size = planes_lines<K>(a.tile_h) * pitch;
  const int threads = static_cast<int>(blockDim.x * blockDim.y);
  for (int i = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x); i < K * K * kTapPitch<K>;
       i += threads) {
    const int tap = i / kTapPitch<K> * K + i % kTapPitch<K>;
    const bool padding = i % kTapPitch<K> >= K;
    const T* filter = weight + channel * int64_t(K * K * K);
    taps[i] = padding ? S(0) : widen(filter[a.turned ? K * K * K - 1 - tap : tap]);
  }

  const S start = bias ? widen(bias[channel]) : S(0);
  S sum[K][kLines<K>][kColumns];
  VOXCONV_UNROLL
  for (int kd = 0; kd < K; ++kd) {
    VOXCONV_UNROLL
    for (int i = 0; i < kThreadCells; ++i) sum[kd][i / kColumns][i % kColumns] = start;
  }

  const int first_cell = static_cast<int>(threadIdx.y) * kLines<K> * pitch +
                         static_cast<int>(threadIdx.x) * kColumns + kLead<K, T> / 4 * 4;
  const int steps = last - first + K - 1;
  const auto copy = [&](int step) {
    const int plane = first - a.before[0] + step;
    if (step < steps && plane >= 0 && plane < a.source[0])
      copy_plane<K>(a, from + plane * source_plane, h, w, planes + step % 2 * plane_size);
    commit_copies();
  };
  copy(0);
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<0>();
    __syncthreads();  // the copies of all threads are there, and nobody reads the other plane
    copy(step + 1);
    const int plane = first - a.before[0] + step;
    if (plane >= 0 && plane < a.source[0])
      add_plane<K>(planes + step % 2 * plane_size + first_cell, pitch, taps, sum);
    // The plane that reads this one with its last tap has all it needs.
    const int d = first + step - (K - 1);
    if (d >= first && exists) {
      VOXCONV_UNROLL
      for (int i = 0; i < kLines<K>; ++i) {
        const int row = h + static_cast<int>(threadIdx.y) * kLines<K> + i;
        const int column = w + static_cast<int>(threadIdx.x) * kColumns;
        if (row < a.target[1])
          store_four(to + d * target_plane + row * int64_t(a.target[2]) + column, sum[K - 1][i],
                     a.activation, a.target[2] - column, a.target[2] % 4 == 0);
      }
    }
    VOXCONV_UNROLL
    for (int kd = K - 1; kd > 0; --kd) {
      VOXCONV_UNROLL
      for (int i = 0; i < kThreadCells; ++i)
        sum[kd][i / kColumns][i % kColumns] = sum[kd - 1][i / kColumns][i % kColumns];
    }
    VOXCONV_UNROLL
    for (int i = 0; i < kThreadCells; ++i) sum[0][i / kColumns][i % kColumns] = start;
  }
  wait_for_copies<0>();
}

// Blocks of depthwise_planes have columns of so many threads at most, and as much shared memory as
// a block may have without asking for more. Slabs are cut until there are so many blocks, two waves
// of an H200's.
constexpr int kPlanesColumn = 16, kPlanesShared = 48 << 10;
constexpr int kPlanesBlocks = 2 * 132 * 4;
// Slabs are never shorter than that many times the kernel.
constexpr int kLeastSlab = 4;

// Whether depthwise_planes can do a pass, if it has as many taps.
inline bool planes_suit(const Conv3dShape& shape, bool channels_last, bool backwards) {
  const Axis* axis = shape.axis;
  if (channels_last || shape.mode != kZeros) return false;
  if (backwards && shape.multiplier != 1) return false;
  for (int i = 0; i < 3; ++i)
    if (axis[i].kernel != axis[0].kernel || axis[i].stride != 1 || axis[i].dilation != 1 ||
        axis[i].in + axis[i].before + axis[i].after > INT32_MAX / 2)
      return false;
  return axis[1].in * axis[2].in <= INT32_MAX && axis[1].out * axis[2].out <= INT32_MAX;
}

template <int K, class T, class Launch>
void launch_planes(const Launch& launch, const Conv3dShape& shape, bool backwards, const T* source,
                   const T* weight, const T* bias, int activation, T* target) {
  PlanesShape a;
  a.multiplier = static_cast<int>(backwards ? 1 : shape.multiplier);
  a.channels = static_cast<int>(shape.channels * shape.multiplier);
  a.targets = shape.batch * a.channels;
  a.turned = backwards;
  a.activation = activation;
  for (int i = 0; i < 3; ++i) {
    const Axis& axis = shape.axis[i];
    a.source[i] = static_cast<int>(backwards ? axis.out : axis.in);
    a.target[i] = static_cast<int>(backwards ? axis.in : axis.out);
    a.before[i] = static_cast<int>(backwards ? K - 1 - axis.before : axis.before);
  }
  // Threads along w, then h, then over channels, until a block has all it may have.
  const auto along = [&](int64_t cells, int64_t own, int64_t most) {
    const int64_t threads = ceil_div(cells, own);
    return static_cast<int>(threads < most ? threads : most);
  };
  const int wide = along(a.target[2], kColumns, kPlanesColumn);
  const int free = kPlanesThreads / wide;
  const int high = along(a.target[1], kLines<K>, free < kPlanesColumn ? free : kPlanesColumn);
  a.tile_w = wide * kColumns;
  a.tile_h = high * kLines<K>;
  const int shared = planes_shared<K, T>(a.tile_h, a.tile_w);
  const int by_threads = free / high, by_shared = kPlanesShared / shared;
  const int most = by_threads < by_shared ? by_threads : by_shared;
  const int deep = static_cast<int>(most < a.targets ? most : a.targets);
  a.tiles_w = static_cast<int>(ceil_div(a.target[2], a.tile_w));
  const int64_t tiles = a.tiles_w * ceil_div(a.target[1], a.tile_h);
  const int64_t rows = ceil_div(a.targets, deep), wanted = ceil_div(kPlanesBlocks, tiles * rows);
  const int64_t slab = ceil_div(a.target[0], wanted);
  a.slab = static_cast<int>(slab > kLeastSlab * K ? slab : kLeastSlab * K);
  a.slabs = static_cast<int>(ceil_div(a.target[0], a.slab));
  // Copies are as wide as lines, and where tiles begin in them, are aligned.
  a.copy_bytes = 16;
  const auto aligned = [&](int bytes) {
    const int64_t cells = bytes / int(sizeof(T));
    return a.source[2] % cells == 0 && (a.before[2] - K / 2) % cells == 0 &&
           reinterpret_cast<uintptr_t>(source) % bytes == 0;
  };
  while (a.copy_bytes > int(sizeof(T)) && !aligned(a.copy_bytes)) a.copy_bytes /= 2;
  launch(depthwise_planes<T, K>, static_cast<unsigned>(tiles * a.slabs * rows),
         dim3(wide, high, deep), deep * shared, a, source, weight, bias, target);
}

// By depthwise_planes, if it can: `target` = activation(source * weight + bias).
template <class T, class Launch>
bool by_planes(const Launch& launch, const Conv3dShape& shape, bool channels_last, bool backwards,
               const T* source, const T* weight, const T* bias, int activation, T* target) {
  if constexpr (!std::is_same_v<T, double>) {
    if (!planes_suit(shape, channels_last, backwards)) return false;
    const auto run = [&](auto k) {
      launch_planes<decltype(k)::value>(launch, shape, backwards, source, weight, bias, activation,
                                        target);
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
