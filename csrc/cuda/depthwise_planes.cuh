// SPDX-License-Identifier: Apache-2.0
// Forward and grad_input of stride 1 and zeros, K taps along every axis, NCDHW. They are one
// correlation: grad_input is that of the gradient with the kernel turned round. With a dilation, a
// block has every dilation-th destination, which read every dilation-th cell of the source.
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
  int64_t targets;           // batch * channels of the target
  int channels, multiplier;  // of the target, targets that share a source
  int source[3], target[3];  // sizes
  int step[3];               // from tap to tap, and from destination to destination of a block
  int before[3];             // destination o reads source cells o - before + step * k
  int tile_h, tile_w;        // of destinations
  int tiles_h, tiles_w;
  int slab, slabs;  // destination planes of a slab; slabs
  bool turned;      // the kernel is turned round
  int copy_bytes;   // of a copy to shared memory
  int activation;
};

// Destinations of a thread: columns, and lines, fewer where the sums would leave no registers.
constexpr int kColumns = 4;
template <int K>
constexpr int kLines = K > 7   ? 1
                       : K > 5 ? 2
                               : 4;

constexpr int kPlanesThreads = 128;  // of a block, at most
// Blocks that a multiprocessor is to hold, of which follow the registers of a thread.
template <int K>
constexpr int kPlanesResident = K == 5   ? 2
                                : K == 7 ? 3
                                         : 4;

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

// A thread's share of a plane and what lies around the tile, in runs of `cells` cells that it
// copies to shared memory; the first line and column that the tile reads are (h, w) of the source.
template <int K, class T>
class Runs {
 public:
  __device__ Runs(const PlanesShape& a, int h, int w, int cells)
      : a_(a), h_(h), w_(w - kLead<K, T> * a.step[2]), pitch_(planes_pitch<K, T>(a.tile_w)) {
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
    const int h = h_ + line_ * a_.step[1], w = w_ + cell_ * a_.step[2];
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
// that reads it with tap kd. Unless kWhole, the block only has those with first <= kd <= last. A
// line of taps is loaded once for all lines of the thread, and those of the source as they are
// needed.
template <int K, bool kWhole, class T>
__device__ __forceinline__ void add_plane(const T* cells, int pitch, const Sum<T>* taps, int first,
                                          int last, Sum<T> (&sum)[K][kLines<K>][kColumns]) {
  using S = Sum<T>;
  // The first cell that is read, from the vector on that holds it.
  constexpr int kFirst = kLead<K, T> % 4, kVectors = (kFirst + kColumns + K - 1 + 3) / 4;
  constexpr int kTapVectors = kTapPitch<K> / 4;
  S x[kLines<K> + K - 1][kVectors][4];
  const auto load_line = [&](int line) {
    VOXCONV_UNROLL
    for (int i = 0; i < kVectors; ++i) load_four(cells + line * pitch + 4 * i, x[line][i]);
  };
  VOXCONV_UNROLL
  for (int line = 0; line < kLines<K>; ++line) load_line(line);
  VOXCONV_UNROLL
  for (int kh = 0; kh < K; ++kh) {
    if (kh + 1 < K) load_line(kLines<K> + kh);  // of the next kh
    VOXCONV_UNROLL
    for (int kd = 0; kd < K; ++kd) {
      if (!kWhole && (kd < first || kd > last)) continue;
      S tap[kTapVectors][4];
      VOXCONV_UNROLL
      for (int i = 0; i < kTapVectors; ++i)
        load_four(taps + (kd * K + kh) * kTapPitch<K> + 4 * i, tap[i]);
      VOXCONV_UNROLL
      for (int kw = 0; kw < K; ++kw) {
        VOXCONV_UNROLL
        for (int i = 0; i < kLines<K> * kColumns; ++i) {
          const int h = i / kColumns, w = i % kColumns, cell = kFirst + w + kw;
          sum[kd][h][w] += x[h + kh][cell / 4][cell % 4] * tap[kw / 4][kw % 4];
        }
      }
    }
  }
}

// blockDim is [tile_w / kColumns, tile_h / kLines, channels of a block]; blocks are counted by
// tiles, then by slabs, then by channels.
template <class T, int K>
__global__ void __launch_bounds__(kPlanesThreads, kPlanesResident<K>)
    depthwise_planes(PlanesShape a, const T* source, const T* weight, const T* bias, T* target) {
  using S = Sum<T>;
  constexpr int kThreadCells = kLines<K> * kColumns;
  int rest = static_cast<int>(blockIdx.x);
  const auto part = [&](int parts) {
    const int i = rest % parts;
    rest /= parts;
    return i;
  };
  // Where the block's destinations begin, and of them its tile and planes.
  const int begin_w = part(a.step[2]), begin_h = part(a.step[1]), begin_d = part(a.step[0]);
  const int w = part(a.tiles_w) * a.tile_w, h = part(a.tiles_h) * a.tile_h;
  const int first = part(a.slabs) * a.slab;
  const int planes_of = (a.target[0] - begin_d + a.step[0] - 1) / a.step[0];
  const int last = first + a.slab < planes_of ? first + a.slab : planes_of;
  const int64_t number = static_cast<int64_t>(rest) * blockDim.z + threadIdx.z;
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
  const auto plane_at = [&](int step) {
    return begin_d - a.before[0] + a.step[0] * (first + step);
  };
  const auto copy = [&](int step) {
    const int plane = plane_at(step);
    if (step < steps && plane >= 0 && plane < a.source[0])
      copy_plane<K>(a, from + plane * source_plane, begin_h - a.before[1] + a.step[1] * h,
                    begin_w - a.before[2] + a.step[2] * w, planes + step % 2 * plane_size);
    commit_copies();
  };
  copy(0);
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<0>();
    __syncthreads();  // the copies of all threads are there, and nobody reads the other plane
    copy(step + 1);
    const int plane = plane_at(step);
    if (plane >= 0 && plane < a.source[0]) {
      const T* cells = planes + step % 2 * plane_size + first_cell;
      const int least =
          step - (last - first - 1);  // tap along D with which the last plane reads it
      if (least <= 0 && step >= K - 1)
        add_plane<K, true>(cells, pitch, taps, 0, K - 1, sum);
      else
        add_plane<K, false>(cells, pitch, taps, least, step, sum);
    }
    // The plane that reads this one with its last tap has all it needs.
    const int d = first + step - (K - 1);
    if (d >= first && exists) {
      VOXCONV_UNROLL
      for (int i = 0; i < kLines<K>; ++i) {
        const int q_h = h + static_cast<int>(threadIdx.y) * kLines<K> + i;
        const int q_w = w + static_cast<int>(threadIdx.x) * kColumns;
        const int row = begin_h + a.step[1] * q_h, column = begin_w + a.step[2] * q_w;
        if (row < a.target[1])
          store_four(
              to + (begin_d + a.step[0] * d) * target_plane + row * int64_t(a.target[2]) + column,
              sum[K - 1][i], a.activation, (a.target[2] - column + a.step[2] - 1) / a.step[2],
              a.step[2] == 1 && a.target[2] % 4 == 0, a.step[2]);
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

// Threads of a block along W, at most, and its shared memory: what it may have without asking for
// more.
constexpr int kPlanesWide = 16;
constexpr size_t kPlanesShared = 48 << 10;
// A plane of the source that a slab shares with the next takes this part of one of its own.
constexpr double kPlanesEnds = 0.2;

// Whether depthwise_planes can do a pass, if it has as many taps, and had better.
inline bool planes_suit(const Conv3dShape& shape, bool channels_last, bool backwards) {
  constexpr int64_t kMostDilation = 16;
  const Axis* axis = shape.axis;
  if (channels_last || shape.mode != kZeros) return false;
  if (backwards && shape.multiplier != 1) return false;
  for (int i = 0; i < 3; ++i)
    if (axis[i].kernel != axis[0].kernel || axis[i].stride != 1 ||
        axis[i].dilation > kMostDilation ||
        axis[i].in + axis[i].before + axis[i].after > INT32_MAX / 2)
      return false;
  if (axis[1].in * axis[2].in > INT32_MAX || axis[1].out * axis[2].out > INT32_MAX) return false;
  // The columns of a block then lie apart, which costs bandwidth; depthwise_lines has them
  // together.
  const bool apart = axis[2].dilation == 2 || axis[2].dilation == 3;
  return !(apart && axis[0].kernel == 3);
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
    a.step[i] = static_cast<int>(axis.dilation);
    a.before[i] = static_cast<int>(backwards ? axis.reach() - axis.before : axis.before);
  }
  const auto own = [&](int i, int cells) {  // threads, of the destinations that a block may have
    return ceil_div(ceil_div(a.target[i], a.step[i]), cells);
  };
  const auto shared = [](int64_t wide, int64_t high) -> size_t {
    return planes_shared<K, T>(static_cast<int>(high) * kLines<K>,
                               static_cast<int>(wide) * kColumns);
  };
  const int64_t depth = own(0, 1), phases = int64_t(a.step[0]) * a.step[1] * a.step[2];
  Tile tile;
  double least = 0;
  for (int64_t slabs = 1; slabs <= depth; slabs += ceil_div(slabs, 3)) {
    const int64_t slab = ceil_div(depth, slabs);
    const Tile found =
        best_tile(own(2, kColumns), own(1, kLines<K>), a.targets, phases * slabs, kPlanesWide,
                  kPlanesThreads, double(K - 1) / kLines<K>, kPlanesShared, shared);
    const double cost = found.cost * (slab + kPlanesEnds * (K - 1));
    if (least != 0 && cost >= least) continue;
    least = cost;
    tile = found;
    a.slab = static_cast<int>(slab);
  }
  a.slabs = static_cast<int>(ceil_div(depth, a.slab));
  a.tile_w = tile.wide * kColumns;
  a.tile_h = tile.high * kLines<K>;
  a.tiles_w = static_cast<int>(ceil_div(own(2, 1), a.tile_w));
  a.tiles_h = static_cast<int>(ceil_div(own(1, 1), a.tile_h));
  // Copies are as wide as lines, and where tiles begin in them, are aligned.
  a.copy_bytes = 16;
  const auto aligned = [&](int bytes) {
    const int cells = bytes / int(sizeof(T));
    return a.step[2] == 1 && a.source[2] % cells == 0 && a.tile_w % cells == 0 &&
           (a.before[2] - K / 2) % cells == 0 && reinterpret_cast<uintptr_t>(source) % bytes == 0;
  };
  while (a.copy_bytes > int(sizeof(T)) && !aligned(a.copy_bytes)) a.copy_bytes /= 2;
  const int64_t blocks =
      int64_t(a.tiles_w) * a.tiles_h * a.slabs * phases * ceil_div(a.targets, tile.deep);
  launch(depthwise_planes<T, K>, grid_of(blocks), dim3(tile.wide, tile.high, tile.deep),
         tile.deep * shared(tile.wide, tile.high), a, source, weight, bias, target);
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
      case 9: run(std::integral_constant<int, 9>{}); return true;
      default: break;
    }
  }
  return false;
}

}  // namespace device
}  // namespace voxconv
