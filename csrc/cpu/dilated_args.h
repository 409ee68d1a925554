// SPDX-License-Identifier: Apache-2.0
// Arguments of the dilated kernels: plain data, the same for every instruction set.
//
// One pass is out[o, p] = bias[o] + sum over channels i and taps k of w[o, i, k] * x[i, read(p,
// k)]. Along each axis the destinations fall into classes that read the source with the same taps:
// destination first + step * t, t < count, meets tap `tap` at cell stride * t + offset. Forward is
// one class of step 1 and stride S; grad_input has a class for each residue of S, and stride 1.
#pragma once
#include <cstddef>
#include <cstdint>

#include "depthwise_args.h"

namespace voxconv {

// Vectors of an output that a kernel sums up at a time, at most.
constexpr int64_t kMostVectors = 8;

struct AxisTap {
  int32_t tap, offset;
};
struct AxisClass {
  int32_t first, step, count;
  int32_t begin, end;  // of its taps in a list
};

// Of a destination plane, the source plane that it meets with a tap.
struct PlaneTap {
  int32_t tap, source;
};

// Rows [t, t + rows) of a class.
struct RowTile {
  int32_t of, t, rows;
};
// Rows of the source are staged in slots: slot s holds row stride * t + source[s] of it. Tap
// `offset` of a class here is the slot that its first row reads, the next one reads the next slot.
struct RowPlanView {
  const AxisClass* classes;
  const AxisTap* taps;
  const int32_t* slots;       // source of each
  const int32_t* slot_begin;  // of a class
  const RowTile* tiles;
  int64_t tile_count, stride, most_slots;
};

// Cells from, from + step, ... of a row of the source lie at `at` of a staged one.
struct RowSegment {
  int32_t from, step, count, at;
};
// Tap `offset` of a class here is where its first destination reads a staged row.
struct ColumnPlanView {
  const AxisClass* classes;
  const AxisTap* taps;
  const RowSegment* segments;
  int64_t class_count, segment_count;
};

// Rows first + 2 * pair * apart, pair < pairs, and, pair < seconds, the ones `apart` behind them.
struct PairTile {
  int32_t first, pairs, seconds;
};
// Pairs of targets `apart` from each other along D and along H; see dilated_winograd.inc.
struct WinogradView {
  int64_t low[2], apart[2];  // target t reads sources t + low + k * apart, k < 3
  const int32_t* planes;     // first of each pair along D
  const PairTile* tiles;
  int64_t plane_pairs, tile_count, most_pairs;  // most pairs of rows in a tile; 0 if not used
};

struct DilatedArgs {
  Strided source, target;
  const void* weight;              // packed, see pack_weight
  const void* bias;                // [groups * out] or null
  int64_t batch, groups, in, out;  // channels of a group that are read and made
  int64_t kernel[3], source_size[3], target_size[3];
  int mode;
  Activation activation;
  const PlaneTap* planes;
  const int32_t* plane_begin;  // of a destination plane
  const int32_t* plane_order;  // destination planes, those that read the same ones in turn
  int64_t most_planes;
  RowPlanView h;
  ColumnPlanView w;
  WinogradView winograd;
  int64_t pitch, plane_pitch, channel_pitch;  // of staged rows, planes and channels
  int64_t in_chunk;                           // channels that are staged at a time
  int64_t sum_vectors;                        // of a tile, what may be written behind included

  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t units() const {
    return batch * groups *
           (winograd.most_pairs > 0 ? winograd.plane_pairs * winograd.tile_count
                                    : target_size[0] * h.tile_count);
  }
};

// grad_weight: x is the source, grad the target. A chunk of the tiles of a group is summed up by
// itself, into sums [chunk][group][in * taps][out], by parts of the outputs.
struct DilatedWeightArgs : DilatedArgs {
  void* sums;
  int64_t chunks, parts, part;  // part: outputs of one
  int64_t grad_pitch;           // of a staged row of the gradient, whole vectors

  int64_t tiles() const { return batch * target_size[0] * h.tile_count; }
  int64_t tasks() const { return groups * chunks * parts; }
};

// Forward and grad_input: weights are packed by blocks of outputs, then units of work run.
struct CorrelateKernels {
  void (*pack_weight)(const DilatedArgs&, const void* weight, bool backwards, int64_t begin,
                      int64_t end, void* to);
  size_t (*scratch)(const DilatedArgs&);
  void (*run)(const DilatedArgs&, int64_t begin, int64_t end, void* scratch);
};
// The kernels of one instruction set for one element type.
struct DilatedKernels {
  int64_t lanes, item_bytes;        // of a vector; of what is summed
  int64_t most_out;                 // outputs that share loads, at most
  int64_t (*vectors)(int64_t out);  // and vectors of each, of so many outputs
  CorrelateKernels direct, winograd;
  size_t (*grad_weight_scratch)(const DilatedWeightArgs&);
  void (*grad_weight)(const DilatedWeightArgs&, int64_t begin, int64_t end, void* scratch);
};

const DilatedKernels& dilated_kernels(Element element);

// Outputs of a group are cut into blocks, as even as can be; of block i the first.
constexpr int64_t block_count(int64_t out, int64_t most) { return ceil_div(out, most); }
constexpr int64_t block_begin(int64_t out, int64_t blocks, int64_t i) { return out * i / blocks; }

}  // namespace voxconv
