// SPDX-License-Identifier: Apache-2.0
// Forward of zeros, NCDHW, of stride 1 or 2, and grad_input of stride 1, which is the forward pass
// of the gradient with the kernel turned round. With a dilation, a block has every dilation-th
// destination, which read every dilation-th cell of the source.
//
// A block owns a tile of lines and columns of a few channels, and walks along D through a slab of
// destination planes. A plane of the source, with the halo of the tile and zeros beyond the volume,
// is copied to shared memory while the one before it is worked on. A thread owns 4 columns of some
// lines of the destination planes, KD of them with stride 1, which the current plane of the source
// is the last, ..., the first to reach: a cell read from shared memory is worth up to 4 K KD
// multiply-adds, the sums stay in registers, and the planes of the source are read once, but for
// halos.
//
// Of a tile of h x w the source is read (1 + (K-1)/h)(1 + (K-1)/w) times, mostly from the second
// cache; of a slab of n planes KD-1 more than n are worked on.
#pragma once
#include "source_tile.cuh"

namespace voxconv {
namespace device {

struct PlanesShape {
  int64_t targets;           // batch * channels of the target
  int channels, multiplier;  // of the target, targets that share a source
  int planes;                // of the source
  int target[3];             // sizes
  int step[3];               // from tap to tap, and from destination to destination of a block
  int before[3];             // destination o reads source cells S * o - before + step * k
  int tile_h, tile_w;        // of destinations
  int tiles_h, tiles_w;
  int slab, slabs;  // destination planes of a slab; slabs
  bool turned;      // the kernel is turned round
  int activation;
  SourceTile tile;
  int plane, shared;  // bytes of shared memory: of a plane; of all that is a channel's
};

// Destinations of a thread: columns, and lines, fewer where the sums would leave no registers.
constexpr int kColumns = 4;
template <class Form>
constexpr int kLines = Form::K > 7                  ? 1
                       : Form::K > 5 || Form::S > 1 ? 2
                                                    : 4;

// Blocks that a multiprocessor is to hold, of which follow the registers of a thread.
template <class Form>
constexpr int kPlanesResident = Form::K == 5 && Form::KD == 5 && Form::S == 1    ? 2
                                : Form::K == 7 || (Form::K == 5 && Form::S == 1) ? 3
                                                                                 : 4;

// Destination planes that a plane of the source meets: ring r with tap parity + SD * r.
template <class Form>
constexpr int kRing = (Form::KD + Form::SD - 1) / Form::SD;

// So that the cells of a tile with as much padding as is usual, K / 2, begin with a whole copy,
// lines have so many cells in front of the first that is read.
template <class Form, class T>
constexpr int kLead = kCopyCells<T> - Form::K / 2;
template <class Form, class T>
constexpr bool kSkewed = Form::S == 2 && sizeof(T) == 4;

// What a plane of the source in shared memory adds to the sums of a thread: sum[r] is of the plane
// that reads it with tap Parity + SD * r. Unless kWhole, the block only has those with first <= r
// <= last. A line of taps is loaded once for all lines of the thread, and those of the source as
// they are needed.
template <class Form, int Parity, bool kWhole, class T>
__device__ __forceinline__ void add_plane(const T* cells, int pitch, const Sum<T>* taps, int first,
                                          int last,
                                          Sum<T> (&sum)[kRing<Form>][kLines<Form>][kColumns]) {
  using S = Sum<T>;
  constexpr int K = Form::K, kStride = Form::S, kHigh = kLines<Form>;
  // The first cell that is read, from the vector on that holds it.
  constexpr int kFirst = kLead<Form, T> % 4;
  constexpr int kVectors = (kFirst + kStride * (kColumns - 1) + K + 3) / 4;
  constexpr int kTapVectors = kTapPitch<K> / 4, kBegin = kStride * (kHigh - 1) + 1;
  // Where a window goes on behind a gap of the line.
  const int gap = kSkewed<Form, T> && threadIdx.x % 4 == 3 ? 4 : 0;
  S x[kBegin + K - 1][kVectors][4];
  const auto load_line = [&](int line) {
    VOXCONV_UNROLL
    for (int i = 0; i < kVectors; ++i)
      load_four(cells + line * pitch + 4 * i + (i >= 2 ? gap : 0), x[line][i]);
  };
  VOXCONV_UNROLL
  for (int line = 0; line < kBegin; ++line) load_line(line);
  VOXCONV_UNROLL
  for (int kh = 0; kh < K; ++kh) {
    if (kh + 1 < K) load_line(kBegin + kh);  // of the next kh
    VOXCONV_UNROLL
    for (int r = 0; r < kRing<Form>; ++r) {
      const int kd = Parity + Form::SD * r;
      if (kd >= Form::KD || (!kWhole && (r < first || r > last))) continue;
      S tap[kTapVectors][4];
      VOXCONV_UNROLL
      for (int i = 0; i < kTapVectors; ++i)
        load_four(taps + (kd * K + kh) * kTapPitch<K> + 4 * i, tap[i]);
      VOXCONV_UNROLL
      for (int kw = 0; kw < K; ++kw) {
        VOXCONV_UNROLL
        for (int i = 0; i < kHigh * kColumns; ++i) {
          const int h = i / kColumns, w = i % kColumns, cell = kFirst + kStride * w + kw;
          sum[r][h][w] += x[kStride * h + kh][cell / 4][cell % 4] * tap[kw / 4][kw % 4];
        }
      }
    }
  }
}

// blockDim is [tile_w / kColumns, tile_h / kLines, channels of a block]; blocks are counted by
// tiles, then by slabs, then by channels.
template <class T, int KD, int K, int SD, int S_>
__global__ void __launch_bounds__(kWalkThreads, kPlanesResident<Stencil<KD, K, SD, S_>>)
    depthwise_planes(PlanesShape a, const T* source, const T* weight, const T* bias, T* target) {
  using S = Sum<T>;
  using Form = Stencil<KD, K, SD, S_>;
  constexpr int kHigh = kLines<Form>, kPlanes = kRing<Form>, kThreadCells = kHigh * kColumns;
  static_assert((KD - 1) % SD == 0, "the first tap along D and the last fall together");
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
  const int64_t source_plane = int64_t(a.tile.size[0]) * a.tile.size[1];
  const int64_t target_plane = int64_t(a.target[1]) * a.target[2];
  const int channel = static_cast<int>(at % a.channels);
  const T* from = source + at / a.multiplier * (a.planes * source_plane);
  T* to = target + at * (a.target[0] * target_plane);

  auto* own = shared_memory<char>() + threadIdx.z * a.shared;
  S* taps = reinterpret_cast<S*>(own);
  T* planes = reinterpret_cast<T*>(taps + KD * K * kTapPitch<K>);
  copy_taps<Form>(weight + channel * int64_t(KD * K * K), a.turned, taps);

  const S start = bias ? widen(bias[channel]) : S(0);
  S sum[kPlanes][kHigh][kColumns];
  VOXCONV_UNROLL
  for (int r = 0; r < kPlanes; ++r) {
    VOXCONV_UNROLL
    for (int i = 0; i < kThreadCells; ++i) sum[r][i / kColumns][i % kColumns] = start;
  }

  const int first_cell = static_cast<int>(threadIdx.y) * kHigh * S_ * a.tile.pitch +
                         place_of<kSkewed<Form, T>>(static_cast<int>(threadIdx.x) * kColumns * S_ +
                                                    kLead<Form, T> / 4 * 4);
  const int steps = SD * (last - first - 1) + KD;
  const auto plane_at = [&](int step) {
    return begin_d - a.before[0] + a.step[0] * (SD * first + step);
  };
  const auto copy = [&](int step) {
    const int plane = plane_at(step);
    if (step < steps && plane >= 0 && plane < a.planes)
      copy_tile<kSkewed<Form, T>>(a.tile, from + plane * source_plane,
                                  begin_h - a.before[1] + a.step[1] * S_ * h,
                                  begin_w - a.before[2] + a.step[2] * (S_ * w - kLead<Form, T>),
                                  planes + step % 2 * a.plane);
    commit_copies();
  };
  // Parity and kRing of a plane; see add_plane.
  const auto add = [&](auto parity, int step) {
    const T* cells = planes + step % 2 * a.plane + first_cell;
    const int newest = step / SD, least = newest - (last - first - 1);
    if (least <= 0 && newest >= kPlanes - 1)
      add_plane<Form, decltype(parity)::value, true>(cells, a.tile.pitch, taps, 0, 0, sum);
    else
      add_plane<Form, decltype(parity)::value, false>(cells, a.tile.pitch, taps, least, newest,
                                                      sum);
  };
  copy(0);
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<0>();
    __syncthreads();  // the copies of all threads are there, and nobody reads the other plane
    copy(step + 1);
    const int plane = plane_at(step);
    if (plane >= 0 && plane < a.planes) {
      if (SD == 1 || step % SD == 0)
        add(std::integral_constant<int, 0>{}, step);
      else
        add(std::integral_constant<int, SD - 1>{}, step);
    }
    // The plane that reads this one with its last tap has all it needs.
    const int d = first + step / SD - (kPlanes - 1);
    if (step % SD == 0 && d >= first && exists) {
      VOXCONV_UNROLL
      for (int i = 0; i < kHigh; ++i) {
        const int q_h = h + static_cast<int>(threadIdx.y) * kHigh + i;
        const int q_w = w + static_cast<int>(threadIdx.x) * kColumns;
        const int row = begin_h + a.step[1] * q_h, column = begin_w + a.step[2] * q_w;
        if (row < a.target[1])
          store_four(
              to + (begin_d + a.step[0] * d) * target_plane + row * int64_t(a.target[2]) + column,
              sum[kPlanes - 1][i], a.activation, (a.target[2] - column + a.step[2] - 1) / a.step[2],
              a.step[2] == 1 && a.target[2] % 4 == 0, a.step[2]);
      }
    }
    if (step % SD != SD - 1) continue;
    VOXCONV_UNROLL
    for (int r = kPlanes - 1; r > 0; --r) {
      VOXCONV_UNROLL
      for (int i = 0; i < kThreadCells; ++i)
        sum[r][i / kColumns][i % kColumns] = sum[r - 1][i / kColumns][i % kColumns];
    }
    VOXCONV_UNROLL
    for (int i = 0; i < kThreadCells; ++i) sum[0][i / kColumns][i % kColumns] = start;
  }
  wait_for_copies<0>();
}

// A plane of the source that a slab shares with the next takes this part of one of its own.
constexpr double kPlanesEnds = 0.2;

// Whether depthwise_planes can do a pass, if it has its stencil, and had better.
inline bool planes_suit(const Conv3dShape& shape, bool channels_last, bool backwards) {
  constexpr int64_t kMostDilation = 16;
  const Axis* axis = shape.axis;
  const bool strided = axis[2].stride > 1;
  if (channels_last || shape.mode != kZeros) return false;
  if (backwards && (shape.multiplier != 1 || strided)) return false;
  for (int i = 0; i < 3; ++i)
    if (axis[i].dilation > (strided ? 1 : kMostDilation) ||
        axis[i].in + axis[i].before + axis[i].after > INT32_MAX / 2)
      return false;
  if (axis[1].in * axis[2].in > INT32_MAX || axis[1].out * axis[2].out > INT32_MAX) return false;
  // The columns of a block then lie apart, which costs bandwidth; depthwise_lines has them
  // together.
  const bool apart = axis[2].dilation == 2 || axis[2].dilation == 3;
  return !(apart && axis[2].kernel == 3);
}

template <class Form, class T, class Launch>
void launch_planes(const Launch& launch, const Conv3dShape& shape, bool backwards, const T* source,
                   const T* weight, const T* bias, int activation, T* target) {
  constexpr int KD = Form::KD, K = Form::K, SD = Form::SD, S = Form::S, kHigh = kLines<Form>;
  PlanesShape a;
  a.multiplier = static_cast<int>(backwards ? 1 : shape.multiplier);
  a.channels = static_cast<int>(shape.channels * shape.multiplier);
  a.targets = shape.batch * a.channels;
  a.turned = backwards;
  a.activation = activation;
  int size[3];
  for (int i = 0; i < 3; ++i) {
    const Axis& axis = shape.axis[i];
    size[i] = static_cast<int>(backwards ? axis.out : axis.in);
    a.target[i] = static_cast<int>(backwards ? axis.in : axis.out);
    a.step[i] = static_cast<int>(axis.dilation);
    a.before[i] = static_cast<int>(backwards ? axis.reach() - axis.before : axis.before);
  }
  a.planes = size[0];
  a.tile = SourceTile{{size[1], size[2]}, {a.step[1], a.step[2]}};
  const auto own = [&](int i, int cells) {  // threads, of the destinations that a block may have
    return ceil_div(ceil_div(a.target[i], a.step[i]), cells);
  };
  const auto shared = [&](int64_t wide, int64_t high) -> size_t {
    constexpr int kCells = kCopyCells<T>;
    const int read = kLead<Form, T> + S * (static_cast<int>(wide) * kColumns - 1) + K;
    a.tile.lines = S * (static_cast<int>(high) * kHigh - 1) + K;
    a.tile.cells = (read + kCells - 1) / kCells * kCells;
    a.tile.pitch = (place_of<kSkewed<Form, T>>(a.tile.cells) + kCells - 1) / kCells * kCells;
    a.plane = a.tile.lines * a.tile.pitch;
    a.shared = KD * K * kTapPitch<K> * int(sizeof(Sum<T>)) + 2 * a.plane * int(sizeof(T));
    return a.shared;
  };
  const int64_t phases = int64_t(a.step[0]) * a.step[1] * a.step[2];
  const Walk walk =
      best_walk(own(0, 1), kPlanesEnds * (KD - 1) / SD, own(2, kColumns), own(1, kHigh), a.targets,
                phases, double(K - S) / (S * kHigh), shared);
  const Tile& tile = walk.tile;
  a.slab = walk.slab;
  a.slabs = walk.slabs;
  a.tile_w = tile.wide * kColumns;
  a.tile_h = tile.high * kHigh;
  a.tiles_w = static_cast<int>(ceil_div(own(2, 1), a.tile_w));
  a.tiles_h = static_cast<int>(ceil_div(own(1, 1), a.tile_h));
  const size_t bytes = tile.deep * shared(tile.wide, tile.high);
  a.tile.copy_bytes = bytes_of_copy(a.tile, S * a.tile_w, a.before[2] - K / 2, source);
  const int64_t blocks =
      int64_t(a.tiles_w) * a.tiles_h * a.slabs * phases * ceil_div(a.targets, tile.deep);
  launch(depthwise_planes<T, KD, K, SD, S>, grid_of(blocks), dim3(tile.wide, tile.high, tile.deep),
         bytes, a, source, weight, bias, target);
}

// What there is a kernel for: taps along D, along H and W, and the strides of these.
using PlanesStencils =
    StencilList<Stencil<3, 3, 1, 1>, Stencil<5, 5, 1, 1>, Stencil<7, 7, 1, 1>, Stencil<9, 9, 1, 1>,
                Stencil<3, 5, 1, 1>, Stencil<3, 3, 2, 2>, Stencil<5, 5, 2, 2>, Stencil<7, 7, 2, 2>,
                Stencil<3, 3, 1, 2>, Stencil<5, 5, 1, 2>>;

// By depthwise_planes, if it can: `target` = activation(source * weight + bias).
template <class T, class Launch>
bool by_planes(const Launch& launch, const Conv3dShape& shape, bool channels_last, bool backwards,
               const T* source, const T* weight, const T* bias, int activation, T* target) {
  if constexpr (std::is_same_v<T, double>) {
    return false;
  } else {
    return planes_suit(shape, channels_last, backwards) &&
           with_stencil(PlanesStencils{}, shape, [&](auto form) {
             launch_planes<decltype(form)>(launch, shape, backwards, source, weight, bias,
                                           activation, target);
           });
  }
}

}  // namespace device
}  // namespace voxconv
