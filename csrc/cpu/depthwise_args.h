// SPDX-License-Identifier: Apache-2.0
// Arguments of the depthwise kernels: plain data, the same for every instruction set.
#pragma once
#include <cstddef>
#include <cstdint>

#include "depthwise_plan.h"

namespace voxconv {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A 5-D tensor; strides in elements.
struct Strided {
  void* data;
  int64_t n, c, d, h, w;
};

struct LinksView {
  const int32_t* begin;
  const Link* list;
  int64_t longest;
};

struct RowView {
  int64_t left, source_size, staged, size, keep, kept;
  const WClass* classes;
  const Segment* segments;
  const Fold *margin, *folds;
  int64_t class_count, margin_count, fold_count;
};

inline LinksView view(const Links& links) {
  return {links.begin.data(), links.list.data(), links.longest()};
}

inline RowView view(const RowPlan& row) {
  return {row.left,
          row.source_size,
          row.staged(),
          row.size,
          row.keep,
          row.kept,
          row.classes.data(),
          row.segments.data(),
          row.margin.data(),
          row.folds.data(),
          static_cast<int64_t>(row.classes.size()),
          static_cast<int64_t>(row.margin.size()),
          static_cast<int64_t>(row.folds.size())};
}

// Which (batch, channel) pairs share a vector. A block is one vector of them: kLanes consecutive
// pairs, or, with `split_batch`, consecutive channels of one batch item (so that a channels-last
// tensor is read by whole vectors).
struct LaneMap {
  int64_t batch, channels, lanes;
  bool split_batch;

  int64_t blocks_per_item() const { return (channels + lanes - 1) / lanes; }
  int64_t blocks() const {
    return split_batch ? batch * blocks_per_item() : (batch * channels + lanes - 1) / lanes;
  }
  int64_t live(int64_t block) const {
    const int64_t left = split_batch ? channels - block % blocks_per_item() * lanes
                                     : batch * channels - block * lanes;
    return left < lanes ? left : lanes;
  }
  int64_t item(int64_t block, int64_t lane) const {
    return split_batch ? block / blocks_per_item() : (block * lanes + lane) / channels;
  }
  int64_t channel(int64_t block, int64_t lane) const {
    return split_batch ? block % blocks_per_item() * lanes + lane
                       : (block * lanes + lane) % channels;
  }
};

// Blocks of neighbouring channels that are staged together, at most.
constexpr int64_t kMostGroup = 8;

// How work is cut so that what a thread touches stays in its caches.
struct Tiling {
  int64_t slots;       // source planes held at a time
  int64_t tiles;       // pieces of axis h
  int64_t tile_rows;   // destination rows of a piece
  int64_t slot_rows;   // source rows of a piece, at most
  int64_t group;       // blocks staged together: of neighbouring channels, if channels are last
  int64_t plane_step;  // planes are visited in this step, so that dilated neighbours share sources
  bool ahead = false;  // in place: what the next plane reads is asked for

  // The row behind the piece of axis h that begins at `row`, of `rows` in all.
  int64_t piece_end(int64_t row, int64_t rows) const {
    return row + tile_rows < rows ? row + tile_rows : rows;
  }

  // Plane number i of the order 0, step, 2 step, ..., 1, 1 + step, ...
  int64_t plane_at(int64_t i, int64_t planes) const {
    const int64_t shorter = planes / plane_step, longer = planes % plane_step;
    const int64_t first = longer * (shorter + 1);  // planes in the classes of one more plane
    if (i < first) return i / (shorter + 1) + i % (shorter + 1) * plane_step;
    return longer + (i - first) / shorter + (i - first) % shorter * plane_step;
  }
};

// Consecutive blocks of one group.
struct Group {
  int64_t first, count;
};

// Groups of `size` blocks, none of which belongs to two items.
inline int64_t groups_of(const LaneMap& map, int64_t size) {
  const int64_t item = map.split_batch ? map.blocks_per_item() : map.blocks();
  return (item + size - 1) / size * (map.blocks() / item);
}

inline Group group_at(const LaneMap& map, int64_t size, int64_t index) {
  const int64_t item = map.split_batch ? map.blocks_per_item() : map.blocks();
  const int64_t per_item = (item + size - 1) / size, first = index % per_item * size;
  return {index / per_item * item + first, item - first < size ? item - first : size};
}

// target = activation(bias + sum over taps of source * weight): forward, and grad_input read
// backwards, which has no activation.
// Target channel c reads source channels c / divide * gather + j and weights c * gather + j for
// j < gather; the links of d count planes j * source planes + plane.
struct CorrelateArgs {
  Strided source, target;
  const void* weight;  // [channels * gather, kernel...], contiguous
  const void* bias;    // [channels] or null
  Activation activation;
  LaneMap map;
  int64_t divide, gather;
  int64_t source_size[3], target_size[3], kernel[3];
  LinksView d, h;
  RowView w;
  Tiling tiling;
  bool past_caches;  // the target is written there, if it is in place

  // One unit of work is a destination plane of a piece of a group.
  int64_t units() const { return groups_of(map, tiling.group) * tiling.tiles * target_size[0]; }
};

// What the passes with lanes along w know of their tensors. Target channel c reads source channels
// source_channel(c) + j and weights c * gather + j for j < gather, as in CorrelateArgs.
struct PassTensors {
  Strided source, target;
  const void* weight;  // [channels * gather, taps], contiguous
  const void* bias;    // [channels] or null
  Activation activation;
  void* partial;  // of grad_weight
  int64_t pairs;  // batch * channels
  int64_t channels, divide, gather;

  int64_t source_channel(int64_t c) const { return (divide == 1 ? c : c / divide) * gather; }
};

// Source lines from .. from + count - 1 go to staged lines to ..
struct LineRun {
  int32_t from, to, count;
};

// The same as CorrelateArgs, with lanes along w: for sources and targets whose lines lie in memory
// as they are, and a stride of 1 along w. The kernel knows planes (which only add up), rows (whose
// taps share loads), the lines of a row and lanes; which axis is which is the host's choice.
//
// Staged row q is source row row_source[q] with its padding, or zeros if that is < 0: runs of
// lines, of a line `inner_count` cells and then those of `margin` (from a cell to a cell). Tap i of
// a row reads the cell offsets[i] behind that of the destination. Sums of a row are those of one
// line after the other (`by_line`), or `width` cells from its first line to its last, and what lies
// between its lines is thrown away.
struct RowsArgs : PassTensors {
  struct Steps {
    int64_t plane, row, line;
  };
  Steps source_step, target_step;
  int64_t source_planes, planes, rows, width;  // width: of what is summed as one
  int64_t plane_taps, row_taps, taps;          // the weight's: of planes, of rows, of a row
  LinksView d;
  RowView h;
  const int32_t* row_source;
  const int64_t *piece_rows, *offsets;  // of a piece: first and last staged row
  const LineRun* lines;
  const Fold* margin;
  int64_t line_runs, margin_count;
  int64_t inner_source, inner_count, inner;
  int64_t line_pitch, pitch;  // of staged lines and rows
  int64_t target_lines, line_width;
  bool direct;   // nothing to pad or to widen: planes are read where they are
  bool by_line;  // of correlate: sums are the target itself
  Tiling tiling;

  // Destination rows [begin, end) and the staged rows [low, high) that they read.
  struct Piece {
    int64_t begin, end, low, high;
  };
  Piece piece(int64_t i) const {
    const int64_t begin = i * tiling.tile_rows;
    return {begin, tiling.piece_end(begin, rows), piece_rows[2 * i], piece_rows[2 * i + 1]};
  }

  // One unit of work is a destination plane of a piece of a (batch, channel) pair.
  int64_t units() const { return pairs * tiling.tiles * planes; }
};

// weight gradient: partial[chunk * blocks + block][tap][lane], summed by the caller over batch and
// chunks. One task is a chunk of planes of a group. Channel c of grad meets channel c / divide of
// x. Links as in forward.
struct GradWeightArgs {
  Strided grad, x;
  void* partial;
  LaneMap map;
  int64_t divide;
  int64_t x_size[3], grad_size[3], kernel[3];
  LinksView d, h;
  RowView w;
  Tiling tiling;
  int64_t chunks, chunk_planes;
  int64_t tasks() const { return groups_of(map, tiling.group) * chunks; }
};

// The kernels of one instruction set for one element type.
struct DepthwiseKernels {
  int64_t lanes;       // channels in a vector
  int64_t cell_bytes;  // bytes of a vector
  size_t (*correlate_scratch)(const CorrelateArgs&);
  void (*correlate)(const CorrelateArgs&, int64_t begin, int64_t end, void* scratch);
  size_t (*grad_weight_scratch)(const GradWeightArgs&);
  void (*grad_weight)(const GradWeightArgs&, int64_t begin, int64_t end, void* scratch);
};

// The same with lanes along w.
struct RowsKernels {
  int64_t lanes;       // neighbours in a vector
  int64_t item_bytes;  // of a staged cell
  size_t (*correlate_scratch)(const RowsArgs&);
  size_t (*grad_weight_scratch)(const RowsArgs&);
  void (*correlate)(const RowsArgs&, int64_t begin, int64_t end, void* scratch);
  void (*grad_weight)(const RowsArgs&, int64_t begin, int64_t end, void* scratch);
};

enum class Element { f32, f64, bf16, f16 };

// The kernels for this processor.
const DepthwiseKernels& depthwise_kernels(Element element);
const RowsKernels& rows_kernels(Element element);

// Those that read and write channels-last tensors in place: zeros padding, no channel multiplier,
// at least a vector of channels. Null but for float32 in vectors of 32 bytes or more.
const DepthwiseKernels* channels_last_kernels(Element element);

}  // namespace voxconv
