// SPDX-License-Identifier: Apache-2.0
// How the channels_last kernels cut up a tensor. A block works on some columns and lines of a few
// channels; a line of them in shared memory is [column, channel] without gaps, so that neighbouring
// threads, which own neighbouring cells of it, read 32 cells in one wavefront whatever the count of
// channels, and none of them idles.
#pragma once
#include "launch.cuh"

namespace voxconv {
namespace device {

// Channels of a block, at most: short runs of them leave shared memory for wide tiles, and 16 are
// still whole sectors of the memory.
constexpr int kMostChannels = 16;

// Room for the line of `columns` and K - 1 more, where `cells` is at least columns * channels.
template <int K>
VOXCONV_HD constexpr int line_pitch(int cells) {
  return cells + (K - 1) * kMostChannels;
}

// The channels of a tensor, how many a block owns, and how many elements are copied at once.
struct Channels {
  int all, own, unit;
};

// What a block has of a plane: `lines` and `columns` from (h, w) on, of channels from `c` on.
struct Window {
  int h, w, c, lines, columns;
};

// Copies windows of planes [height, width, channels] to shared memory, in lines `kPitch` elements
// apart, with zeros for what does not exist. A thread copies one part of the channels of columns
// column_, column_ + columns_step_, ... of lines line_, line_ + lines_step_, ....
template <class T, int kPitch>
class WindowCopy {
 public:
  __device__ WindowCopy(const Channels& channels, int height, int width, const Window& window,
                        int thread, int threads)
      : channels_(channels), height_(height), width_(width), window_(window) {
    const int parts = channels.own / channels.unit, most = threads / parts;
    part_ = thread % parts * channels.unit;
    columns_step_ = most < window.columns ? most : window.columns;
    lines_step_ = most / columns_step_;
    column_ = thread / parts % columns_step_;
    line_ = thread / parts / columns_step_;
    if (line_ >= lines_step_) line_ = window.lines;  // nothing is left for it
  }

  __device__ void operator()(const T* plane, T* to) const {
    if (channels_.unit * sizeof(T) == 16)
      copy<Four<float>>(plane, to);
    else if (channels_.unit * sizeof(T) == 4)
      copy<float>(plane, to);
    else
      copy<T>(plane, to);
  }

 private:
  template <class Unit>
  __device__ __forceinline__ void copy(const T* plane, T* to) const {
    const int c = window_.c + part_;
    const unsigned row = static_cast<unsigned>(width_) * channels_.all;
    for (int j = column_; j < window_.columns; j += columns_step_) {
      const int w = window_.w + j;
      const bool live = w >= 0 && w < width_ && c < channels_.all;
      unsigned h = window_.h + line_, from = h * row + w * channels_.all + c;
      T* place = to + line_ * kPitch + j * channels_.own + part_;
      for (int i = line_; i < window_.lines; i += lines_step_) {
        const bool exists = live && h < static_cast<unsigned>(height_);
        copy_unit(reinterpret_cast<Unit*>(place),
                  reinterpret_cast<const Unit*>(plane + (exists ? from : 0u)), exists);
        h += lines_step_;
        from += lines_step_ * row;
        place += lines_step_ * kPitch;
      }
    }
  }

  const Channels channels_;
  const int height_, width_;
  const Window window_;
  int part_, column_, columns_step_, line_, lines_step_;
};

// How blocks share out the planes of a tensor.
struct Tiles {
  int columns, along_w, along_h;  // columns of a tile; tiles
  int slab, slabs;                // planes of a slab; slabs
};

// The tile of a block; blocks are counted by channels, then by tiles, slabs and the batch.
struct ChannelsTile {
  int c, w, h, first, last;  // channel, column, line and plane that it begins with; its last + 1
  int64_t n;
  int64_t number;  // of tiles and slabs
};
__device__ inline ChannelsTile tile_of_block(const Channels& channels, const Tiles& tiles,
                                             int lines, int planes) {
  const int groups = (channels.all + channels.own - 1) / channels.own;
  int i = static_cast<int>(blockIdx.x);
  ChannelsTile tile;
  tile.c = i % groups * channels.own, i /= groups;
  tile.number = i;
  tile.w = i % tiles.along_w * tiles.columns, i /= tiles.along_w;
  tile.h = i % tiles.along_h * lines, i /= tiles.along_h;
  tile.first = i % tiles.slabs * tiles.slab, i /= tiles.slabs;
  tile.last = tile.first + tiles.slab < planes ? tile.first + tiles.slab : planes;
  tile.n = i;
  return tile;
}

// Channels of a block that are copied as many bytes at once as the places of all cells allow: 16,
// 4, or one element. `at`: the addresses of the tensors, all in one.
template <class T>
Channels share_channels(int64_t channels, uintptr_t at) {
  constexpr int kBytes = static_cast<int>(sizeof(T));
  at |= channels * kBytes;
  const int unit = at % 16 == 0 ? 16 / kBytes : at % 4 == 0 ? 4 / kBytes : 1;
  const int64_t each = ceil_div(channels, ceil_div(channels, kMostChannels));
  return {static_cast<int>(channels), static_cast<int>(ceil_div(each, unit)) * unit, unit};
}

// Blocks that a multiprocessor holds, and how many keep it busy.
struct Residents {
  int held, busy;
};
constexpr int kMultiprocessors = 132;  // of an H200

// Planes of a slab, and how long the multiprocessor with the most blocks works, in planes.
struct Slab {
  int planes;
  int64_t time;
};
// The best slab (of at most `most`) for `planes`, if there would be `blocks` that walk through all
// of them. The shorter, the better is the work shared out, but `more` planes than those of a slab
// are worked on each time.
inline Slab best_slab(int64_t planes, int64_t blocks, int more, int64_t most,
                      const Residents& residents) {
  Slab best{1, INT64_MAX};
  for (int64_t slabs = ceil_div(planes, most); slabs <= planes; ++slabs) {
    const int64_t slab = ceil_div(planes, slabs);
    const int64_t busiest = ceil_div(blocks * ceil_div(planes, slab), kMultiprocessors);
    const int64_t rest = busiest % residents.held;
    const int64_t idle = rest > 0 && rest < residents.busy ? residents.busy - rest : 0;
    const int64_t time = (busiest + idle) * (slab + more);
    if (time < best.time) best = {static_cast<int>(slab), time};
    if (busiest > 4 * residents.held) break;  // shared out well
  }
  return best;
}

// Tiles of `lines` lines and up to `cells` cells of a line, over planes of a tensor of this size.
inline Tiles tiles_over(const int (&size)[3], const Channels& channels, int cells, int lines) {
  Tiles tiles;
  tiles.along_w = static_cast<int>(ceil_div(size[2], cells / channels.own));
  tiles.columns = static_cast<int>(ceil_div(size[2], tiles.along_w));
  tiles.along_h = static_cast<int>(ceil_div(size[1], lines));
  tiles.slab = size[0];
  tiles.slabs = 1;
  return tiles;
}

// Blocks that a grid of these tiles has.
inline int64_t blocks_of(const Tiles& tiles, const Channels& channels, int64_t batch) {
  return batch * ceil_div(channels.all, channels.own) * tiles.along_h * tiles.along_w * tiles.slabs;
}

// Whether the kernels can do a pass, if they have as many taps.
inline bool channels_suit(const Conv3dShape& shape, bool channels_last) {
  const Axis* axis = shape.axis;
  if (!channels_last || shape.mode != kZeros || shape.multiplier != 1) return false;
  if (shape.batch == 0 || shape.channels == 0) return false;
  for (int i = 0; i < 3; ++i)
    if (axis[i].kernel != axis[0].kernel || axis[i].stride != 1 || axis[i].dilation != 1 ||
        axis[i].in == 0 || axis[i].out == 0 ||
        axis[i].in + axis[i].before + axis[i].after > INT32_MAX / 2)
      return false;
  return axis[1].in * axis[2].in <= INT32_MAX / shape.channels &&
         axis[1].out * axis[2].out <= INT32_MAX / shape.channels;
}

}  // namespace device
}  // namespace voxconv
