// SPDX-License-Identifier: Apache-2.0
// What a depthwise pass is as circular convolutions: how its axes are cut into tiles, how long the
// circles are, and where on them the elements of input, output and weight sit.
#pragma once
#include <cstdint>
#include <deque>
#include <vector>

#include "../common/conv3d.h"
#include "fft_plan.h"
#include "spectral_args.h"

namespace voxconv {

// Elements begin, begin + skip, ... (size of them) of an axis of a tensor are moved; `count` of
// them, from `first` of these on, have a place: the i-th at offset + i * step.
struct Window {
  int64_t begin, size, first, count, step, offset, skip = 1;
};

// One axis of a tile: result = a * b.
struct Piece {
  Window a, b, result;
};

struct AxisCut {
  int64_t length;  // of the circle, the same for all pieces
  std::vector<Piece> pieces;
};

struct SpectralTile {
  const Piece* piece[3];
  SpectralAxis axis[3];
};

// A pass as a list of tiles: of the output (forward, grad_weight, which sums over them) or of the
// input (grad_input). Depends on the shape alone. Owns the tables of its tiles.
class SpectralPlan {
 public:
  SpectralPlan(const Axis (&axis)[3], Pass pass, bool is_double);

  const std::vector<SpectralTile>& tiles() const { return tiles_; }
  int64_t pitch() const { return pitch_; }  // see SpectralArgs

 private:
  template <class F>
  const int32_t* table(int64_t length, const F& f);
  template <class F>
  const int32_t* places(const Window& window, int64_t unit, int64_t length, const F& position);
  std::vector<SpectralAxis> make_tables(int i, bool is_double);

  AxisCut cut_[3];
  int64_t pitch_;
  std::deque<FftPlan> fft_;
  std::deque<std::vector<int32_t>> tables_;
  std::vector<SpectralTile> tiles_;
};

}  // namespace voxconv
