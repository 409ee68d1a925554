// SPDX-License-Identifier: Apache-2.0
// Arguments of the kernels that take a plane as one long line of lanes (depthwise_flat.inc).
#pragma once
#include "depthwise_args.h"

namespace voxconv {

// Lines: neighbours in the target are neighbours in the source. With a stride of 2 along w, vectors
// are two halves of neighbours in a line. Halves: the source is read a half of a vector at a time.
// Split: as lines, of a copy of the source that has its even and its odd columns, and the lines
// that different taps read, apart. Merged: the same of the target, which is put together
// afterwards. Pairs: of destinations, two for each lane.
enum class FlatForm { none, lines, halves, split, merged, pairs };

// Vectors of a plane that a tile of grad_weight takes, where planes are lines.
constexpr int64_t kWeightStrip = 16;

// A tile of destination planes first, first + step, ... (count of them) and its runs of taps; the
// next tile begins `next` planes further on.
struct FlatRows {
  int32_t first, step, count, run_begin, run_end, next;
};

// Taps tap, tap + tap_step, ... (length of them) along d, as a tile of rows reads them: tap number
// i reads, for destination plane t of the tile, source plane plane + j * plane_step with j = t *
// spread + i, of which those with low <= j < high exist. In the next tile that is `next` planes
// further on.
struct FlatRun {
  int32_t length, tap, tap_step, plane, plane_step, spread, low, high, next;

  // Planes that a tile of `rows` reads, or would if they existed.
  int32_t planes(int64_t rows) const { return static_cast<int32_t>(rows - 1) * spread + length; }
  // A bit for each of the planes that exist.
  uint32_t live() const { return (1u << high) - (1u << low); }
};

// What a pair of destinations reads `offset` cells from where its half begins, for the even and for
// the odd one.
struct FlatPairStep {
  int64_t offset, tap[2];
};

// Lines of destinations with the same taps along h: vectors [begin, end) of a plane.
struct FlatPhase {
  int64_t begin, end, step_begin, step_end, mask_begin;
};

// A plane of x in parts of `step` cells: an even and an odd one for each of the `count` sets of
// lines first[i], first[i] + stride, ... that are needed of it. Lines of a part have as many cells
// as those of grad.
struct FlatSplit {
  const int64_t* first;
  int64_t count, stride, step, line;
  int64_t lines, columns;  // of x
};

// Destinations of a plane with the same taps, taps first_tap, first_tap + 1, ... of a plane, and
// their masks. There is one part, but for the merged form: then it has the lines line, line +
// split.stride, ... of the target, and its columns column, column + 2, ...
struct FlatPart {
  int64_t first_tap, taps, mask_begin, cells, line, column;
};

// The same as CorrelateArgs for planes that lie in memory without gaps. Tap t of a plane reads cell
// p + offsets[t] for cell p of the destination, in those lanes of vector v that masks[v][t] has.
// Where every second cell of a line is read, vectors are made of halves
// (depthwise_flat_step.inc): half i, of `half` neighbours in a line of the destination, begins at
// cell half_to[i] of it and reads from cell half_from[i] on. Their taps come in steps of two; step
// s reads from steps[s] cells further on, and masks[i][s] are its lanes. Where every second cell is
// written, halves are of pairs of destinations (depthwise_flat_pairs.inc), half_cells[i] of them.
struct FlatArgs : PassTensors {
  FlatForm form;
  const void *source_begin, *source_end;  // the tensor's memory
  int64_t plane_taps, taps;               // the weight's: along d, of a plane
  const FlatRows* rows;
  const FlatRun* runs;
  int64_t tiles, tile_rows;        // of rows; of one that is not cut short
  int64_t most_runs, most_planes;  // of a tile, of a run
  int64_t cells, vectors;          // of a plane, of a destination plane
  int64_t line, strip;             // cells of a line, and of what is visited of it at a time
  FlatSplit split;
  const FlatPart* parts;
  int64_t part_count;
  const int64_t* offsets;
  const uint16_t* masks;
  // What kernels keep for a plane: a place for each tap, or two for each step of halves.
  int64_t places;
  const int64_t* tap_order;  // the weight's tap of each place, -1 for none; null: as they come
  int64_t tap_next;          // or, if -1, in the opposite one
  int64_t before, after;     // farthest offsets
  // Memory is asked for while a tile is summed (0: it is not): in place that many cells further on
  // in its planes, or the same cells of the planes of the next tile; of copies always those.
  int64_t ahead;
  bool ahead_planes;
  bool asks_second;    // of halves, into the second cache: planes compete too much for the first
  int64_t next_bytes;  // of the source, for each cell of the target
  const int64_t *half_from, *half_to, *half_cells;
  // The least of half_from from half i on, the most of it up to half i: with wide padding the end
  // of a line reads farther than the next line begins.
  const int64_t *half_least, *half_most;
  int64_t half;       // 0: vectors are not made of halves
  bool whole_halves;  // all of half_cells are a vector
  const int64_t* steps;
  int64_t step_count;
  const FlatPhase* phases;
  int64_t phase_count;
  const FlatPairStep* pair_steps;
  bool past_caches;               // the target is written there: its planes are aligned vectors
  bool compete;                   // planes are so far apart that they do for cache lines
  bool apart;                     // planes are copied: too many of them compete
  int64_t copy_step;              // of copies, from plane to plane
  int64_t pieces, piece_vectors;  // a plane is cut into
  int64_t chunk_tiles;            // of a unit

  // Destination planes of the tile that sums so many: few of them take one of 4.
  int64_t height(const FlatRows& tile) const { return tile.count > 4 ? tile_rows : 4; }
  // Cells of the parts of a merged tile.
  int64_t merged_cells() const {
    return form == FlatForm::merged ? part_count * tile_rows * split.step : 0;
  }
  // The cells that vectors [begin, end) read are [first_cell, last_cell); of the split form, those
  // of the lines that have them.
  int64_t first_cell(int64_t begin, int64_t lanes) const {
    if (form == FlatForm::pairs) return -before;
    if (form == FlatForm::split) {
      const int64_t cell = begin * lanes - before;
      return (cell < 0 ? cell - split.line + 1 : cell) / split.line * split.line;
    }
    return (half ? half_least[2 * begin] : begin * lanes) - before;
  }
  int64_t last_cell(int64_t end, int64_t lanes) const {
    if (form == FlatForm::pairs) return cells + after;
    if (form == FlatForm::split)
      return (end * lanes + after + split.line - 1) / split.line * split.line;
    return (half ? half_most[2 * end - 1] + lanes : end * lanes) + after;
  }
  // From what a tile reads, or writes, to what it asks for.
  int64_t from_ahead(const FlatRun& run) const {
    return ahead_planes ? run.next * source.d : ahead;
  }
  int64_t to_ahead(const FlatRows& tile, int64_t block) const {
    return ahead_planes && form != FlatForm::merged ? tile.next * target.d : block;
  }
  // Lanes of a half that are those of the half before, too.
  int64_t half_again(int64_t i) const {
    const int64_t again = i > 0 ? half_to[i - 1] + half - half_to[i] : 0;
    return again > 0 ? again : 0;
  }

  // One unit of work is `chunk_tiles` tiles of rows of a piece of a (batch, channel) pair: tiles
  // [first, last) and vectors [begin, end).
  struct Unit {
    int64_t n, c, first, last, begin, end;
  };
  int64_t chunks() const { return (tiles + chunk_tiles - 1) / chunk_tiles; }
  int64_t units() const { return pairs * pieces * chunks(); }
  Unit unit(int64_t i) const {
    const int64_t pair = i / chunks() / pieces;
    return bounded({pair / channels, pair % channels, i % chunks() * chunk_tiles, 0,
                    i / chunks() % pieces * piece_vectors, 0});
  }
  // The one that follows.
  Unit next(Unit unit) const {
    unit.first += chunk_tiles;
    if (unit.first >= tiles) unit.first = 0, unit.begin += piece_vectors;
    if (unit.begin >= vectors) unit.begin = 0, ++unit.c;
    if (unit.c == channels) unit.c = 0, ++unit.n;
    return bounded(unit);
  }
  Unit bounded(Unit unit) const {
    unit.last = unit.first + chunk_tiles < tiles ? unit.first + chunk_tiles : tiles;
    unit.end = unit.begin + piece_vectors < vectors ? unit.begin + piece_vectors : vectors;
    return unit;
  }
};

// The kernels of one instruction set for one element type.
struct FlatKernels {
  int64_t lanes;       // neighbours in a vector
  int64_t item_bytes;  // of a sum
  size_t (*scratch)(const FlatArgs&);
  void (*run)(const FlatArgs&, int64_t begin, int64_t end, void* scratch);
  // Planes of a tile at most; those of grad_weight have 4 of them for longer runs than that.
  int64_t tall, tall_run, step_tall, step_tall_run;  // as lines, as halves
  bool splits;            // rather than to make vectors of halves, and merges
  int64_t ahead_vectors;  // to those that are asked for
};

// The kernels for this processor.
const FlatKernels& flat_kernels(Element element);
const FlatKernels& flat_weight_kernels(Element element);

}  // namespace voxconv
