// SPDX-License-Identifier: Apache-2.0
// Arguments of the circular convolutions by FFT: plain data, the same for every instruction set.
#pragma once
#include "depthwise_args.h"
#include "fft_plan.h"

namespace voxconv {

// Where an element sits on the circle of its axis is all that tells the passes apart, and tables
// hold it: slot i of the first pass of a transform reads the cell at from_*[i], slot i of a last
// pass writes the cell at to_*[i]. Positions without an element read a zero cell; results that
// nobody wants go to a cell that nobody reads.
struct SpectralAxis {
  FftView fft;
  const int32_t *from_a, *from_b, *to_result;
  const int32_t *to_spectrum, *from_spectrum;
};

// A box of a tensor. Lane l of a block reads channel c / divide * gather of its item, `term_step`
// elements further for each term.
struct SpectralOperand {
  Strided tensor;
  int64_t divide, gather, term_step;
  int64_t size[3];

  int64_t plane() const { return (size[1] + 1) * (size[2] + 1); }  // real, with the odd cells
  int64_t column() const { return size[0] * (size[1] + 1); }
};

// result = a * b, circular along every axis, or the sum of that over steps; then come the bias and
// the activation.
//
// Axes are transformed in the order w, h, d, and back. Along w, where the elements are real, only
// columns 0 .. N / 2 of the spectrum are kept. Of planes and rows that hold no element of an
// operand, or none of the result, nothing is ever computed.
//
// A group of blocks of lanes owns a `shared` scratch. It has, for each block and every column of w
// the [d, h] cells of a, of b and of the result, transformed along w alone. The result replaces a,
// unless it is a sum over steps. A thread owns a plane of real cells, four lines, and of each
// operand one column transformed along h. Sizes count vectors; a complex cell is two.
struct SpectralArgs {
  SpectralOperand a, b, result;
  const void* bias;  // [channels] or null
  Activation activation;
  LaneMap map;
  SpectralAxis axis[3];
  bool summed;
  int64_t columns, column_a, column_b, column_result;
  int64_t pitch;  // of a plane transformed along h
  int64_t plane, line, own_a, own_b;

  int64_t begin_b() const { return columns * column_a; }
  int64_t begin_result() const { return summed ? begin_b() + columns * column_b : 0; }
  int64_t shared_vectors() const {
    return begin_b() + columns * (column_b + (summed ? column_result : 0));
  }
  // Of the shared scratch of a group: that of a block.
  template <class V>
  V* shared_of(void* shared, int64_t block) const {
    return static_cast<V*>(shared) + block * shared_vectors();
  }
  int64_t own_vectors() const { return plane + 4 * line + own_a + own_b; }
  int64_t row_units() const { return a.size[0] + b.size[0]; }
};

// A group in three phases, whose units are independent of each other: who computes which unit
// changes nothing. A unit is one of all blocks of the group, as these share cache lines.
struct SpectralKernels {
  int64_t lanes, cell_bytes;
  // Units are planes: those of a, then those of b, transformed along w.
  void (*rows)(const SpectralArgs&, Group group, int64_t term, int64_t begin, int64_t end,
               void* shared, void* own);
  // Units are columns: transformed along h and d, multiplied, transformed back along d and h, and
  // if summed added to what there is, but for the first step.
  void (*columns)(const SpectralArgs&, Group group, bool first, int64_t begin, int64_t end,
                  void* shared, void* own);
  // Units are planes of the result: transformed back along w and written to the tensor.
  void (*planes)(const SpectralArgs&, Group group, int64_t begin, int64_t end, void* shared,
                 void* own);
};

// The kernels for this processor, with vectors as narrow as (batch, channel) pairs allow.
const SpectralKernels& spectral_kernels(Element element, int64_t pairs);

}  // namespace voxconv
