// SPDX-License-Identifier: Apache-2.0
// A tile of a plane of the source in shared memory: what depthwise_planes and depthwise_planes_up
// read while the next one is copied.
#pragma once
#include "launch.cuh"

namespace voxconv {
namespace device {

// Planes are copied to shared memory 16 bytes at a time where they can be.
template <class T>
constexpr int kCopyCells = 16 / int(sizeof(T));

// Where a cell of a line lies. Threads whose windows begin 2 vectors of 16 bytes apart (`Skewed`)
// would meet in a half of the banks: so a vector is left free behind every 8.
template <bool Skewed>
VOXCONV_HD constexpr int place_of(int cell) {
  return Skewed ? cell + cell / 32 * 4 : cell;
}

struct SourceTile {
  int size[2];       // of the source along H and W
  int step[2];       // from line to line, and from cell to cell
  int lines, cells;  // of the tile; cells are whole copies
  int pitch;         // from a line to the next in shared memory
  int copy_bytes;
};

// A thread's share of a tile that begins at (h, w) of the source, in runs of `cells` cells that it
// copies to shared memory.
template <bool Skewed>
class Runs {
 public:
  __device__ Runs(const SourceTile& a, int h, int w, int cells) : a_(a), h_(h), w_(w) {
    const int threads = static_cast<int>(blockDim.x * blockDim.y), runs = a.cells / cells;
    const int mine = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
    line_ = mine / runs, cell_ = mine % runs * cells;
    more_lines_ = threads / runs, more_cells_ = threads % runs * cells;
  }
  __device__ bool more() const { return line_ < a_.lines; }
  __device__ void advance() {  // without a division
    line_ += more_lines_, cell_ += more_cells_;
    if (cell_ >= a_.cells) cell_ -= a_.cells, ++line_;
  }
  __device__ int place() const { return line_ * a_.pitch + place_of<Skewed>(cell_); }
  // Its cell in the plane, or -1 where there are zeros.
  __device__ int source() const {
    const int h = h_ + line_ * a_.step[0], w = w_ + cell_ * a_.step[1];
    const bool exists = h >= 0 && h < a_.size[0] && w >= 0 && w < a_.size[1];
    return exists ? h * a_.size[1] + w : -1;
  }

 private:
  const SourceTile& a_;
  int h_, w_, line_, cell_, more_lines_, more_cells_;
};

template <int Bytes, bool Skewed, class T>
__device__ void copy_runs(const SourceTile& a, const T* plane, int h, int w, T* to) {
  for (Runs<Skewed> run(a, h, w, Bytes / int(sizeof(T))); run.more(); run.advance()) {
    const int from = run.source();
    copy_later<Bytes>(to + run.place(), plane + (from < 0 ? 0 : from), from >= 0);
  }
}

// Copies the tile of a plane that begins at (h, w), zeros around the source. Single halves cannot
// be copied later: they are copied here, a few at a time, so that their loads wait for memory
// together.
template <bool Skewed, class T>
__device__ void copy_tile(const SourceTile& a, const T* plane, int h, int w, T* to) {
  switch (a.copy_bytes) {
    case 16: return copy_runs<16, Skewed>(a, plane, h, w, to);
    case 8: return copy_runs<8, Skewed>(a, plane, h, w, to);
    case 4: return copy_runs<4, Skewed>(a, plane, h, w, to);
    default: break;
  }
  constexpr int kTogether = 8;
  for (Runs<Skewed> run(a, h, w, 1); run.more();) {
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

// Bytes of a copy: as wide as lines are, and as where tiles begin in them is aligned: at multiples
// of `tile` and `first` cells.
template <class T>
int bytes_of_copy(const SourceTile& a, int tile, int first, const T* source) {
  int bytes = 16;
  const auto aligned = [&] {
    const int cells = bytes / int(sizeof(T));
    return a.step[1] == 1 && a.size[1] % cells == 0 && tile % cells == 0 && first % cells == 0 &&
           reinterpret_cast<uintptr_t>(source) % bytes == 0;
  };
  while (bytes > int(sizeof(T)) && !aligned()) bytes /= 2;
  return bytes;
}

// Threads of a block that walks through planes, at most, and of them along W; and its shared
// memory: what it may have without asking for more.
constexpr int kWalkThreads = 128, kWalkWide = 16;
constexpr size_t kWalkShared = 48 << 10;

// The tile of a walk, and how `planes` are shared out among blocks.
struct Walk {
  Tile tile;
  int slab = 0, slabs = 0;  // planes of a slab; slabs
};

// The best one, see best_tile; a slab takes as long as `ends` planes more than it has.
template <class Shared>
Walk best_walk(int64_t planes, double ends, int64_t columns, int64_t lines, int64_t targets,
               int64_t times, double halo, const Shared& shared) {
  Walk best;
  double least = 0;
  for (int64_t slabs = 1; slabs <= planes; slabs += ceil_div(slabs, 3)) {
    const int64_t slab = ceil_div(planes, slabs);
    const Tile tile = best_tile(columns, lines, targets, times * slabs, kWalkWide, kWalkThreads,
                                halo, kWalkShared, shared);
    const double cost = tile.cost * (slab + ends);
    if (least != 0 && cost >= least) continue;
    least = cost;
    best = {tile, static_cast<int>(slab), static_cast<int>(ceil_div(planes, slab))};
  }
  return best;
}

// Taps of a kernel along D, along H and W, and from a destination to the next along these.
template <int KD_, int K_, int SD_, int S_>
struct Stencil {
  static constexpr int KD = KD_, K = K_, SD = SD_, S = S_;

  static bool suits(const Conv3dShape& shape) {
    const int kernel[] = {KD, K, K}, stride[] = {SD, S, S};
    for (int i = 0; i < 3; ++i)
      if (shape.axis[i].kernel != kernel[i] || shape.axis[i].stride != stride[i]) return false;
    return true;
  }
};
template <class... Stencils>
struct StencilList {};

// Calls f with the stencil of a list that suits a shape, if one does.
template <class... Stencils, class F>
bool with_stencil(StencilList<Stencils...>, const Conv3dShape& shape, const F& f) {
  return ((Stencils::suits(shape) && (f(Stencils{}), true)) || ...);
}

// A line of taps in whole vectors of 4.
template <int K>
constexpr int kTapPitch = (K + 3) / 4 * 4;

// Copies the taps of a channel, from the last to the first if `turned`, in lines of kTapPitch.
template <class Form, class T>
__device__ void copy_taps(const T* filter, bool turned, Sum<T>* to) {
  constexpr int K = Form::K, kTaps = Form::KD * K * K;
  const int threads = static_cast<int>(blockDim.x * blockDim.y);
  for (int i = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
       i < kTaps / K * kTapPitch<K>; i += threads) {
    const int tap = i / kTapPitch<K> * K + i % kTapPitch<K>;
    const bool padding = i % kTapPitch<K> >= K;
    to[i] = padding ? Sum<T>(0) : widen(filter[turned ? kTaps - 1 - tap : tap]);
  }
}

}  // namespace device
}  // namespace voxconv
