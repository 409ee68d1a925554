// SPDX-License-Identifier: Apache-2.0
// The depthwise ops for large kernels: circular convolutions by FFT, zero padding only. Here
// tensors get their places on three circles, and the blocks and their phases are shared out to
// threads.
#include "../common/stable.h"

#include <algorithm>
#include <vector>

#include "caches.h"
#include "depthwise_host.h"
#include "result_memory.h"
#include "scratch.h"
#include "spectral_args.h"
#include "spectral_plan.h"

namespace voxconv {
namespace {

// Scratch that a thread keeps, at most. A task that needs more has the threads to itself.
constexpr int64_t kKeptBytes = 64 << 20;
// Scratch up to which blocks that share cache lines are worth having side by side: measured.
constexpr int64_t kGroupBytes = 3 << 20;
// Cells of a transformed volume that are worth a thread.
constexpr int64_t kGrainCells = 1 << 13;

SpectralOperand operand(const Tensor& tensor) { return {strided(tensor), 1, 1, 0, {}}; }

// A contiguous weight [filters, 1, kernel...] or [channels, multiplier, kernel...]: its channels
// are the filters, and it is the same for every item.
SpectralOperand weight_operand(const Tensor& weight) {
  SpectralOperand made = operand(weight);
  made.tensor.n = 0;
  made.tensor.c = weight.size(2) * weight.size(3) * weight.size(4);
  return made;
}

// What all tiles of a pass share; sizes and places are those of a tile.
struct Convolution {
  SpectralOperand a, b, result;
  const void* bias;
  int64_t terms;
  LaneMap map;
  Activation activation = kIdentity;
};

SpectralOperand tile_operand(SpectralOperand whole, const SpectralTile& tile, Window Piece::* which,
                             int64_t item_bytes) {
  int64_t* stride[] = {&whole.tensor.d, &whole.tensor.h, &whole.tensor.w};
  char* data = static_cast<char*>(whole.tensor.data);
  for (int i = 0; i < 3; ++i) {
    const Window& window = tile.piece[i]->*which;
    data += window.begin * *stride[i] * item_bytes;
    *stride[i] *= window.skip;
    whole.size[i] = window.size;
  }
  whole.tensor.data = data;
  return whole;
}

// The convolution of one tile, but for the columns of the shared scratch.
SpectralArgs tile_args(const SpectralPlan& plan, const SpectralTile& tile, const Convolution& c,
                       int64_t item_bytes) {
  SpectralArgs a;
  a.a = tile_operand(c.a, tile, &Piece::a, item_bytes);
  a.b = tile_operand(c.b, tile, &Piece::b, item_bytes);
  a.result = tile_operand(c.result, tile, &Piece::result, item_bytes);
  a.bias = c.bias;
  a.activation = c.activation;
  a.map = c.map;
  std::copy(tile.axis, tile.axis + 3, a.axis);
  a.columns = a.axis[2].fft.length / 2 + 1;
  a.pitch = plan.pitch();
  a.plane = std::max({a.a.plane(), a.b.plane(), a.result.plane()});
  a.line = 0;
  for (const SpectralAxis& axis : a.axis) a.line = std::max(a.line, 2 * (axis.fft.length + 1));
  a.own_a = (std::max(a.a.size[0], a.result.size[0]) + 1) * 2 * a.pitch;
  a.own_b = (a.b.size[0] + 1) * 2 * a.pitch;
  VOXCONV_CHECK(std::max(a.own_a, a.own_b) <= INT32_MAX, "voxconv: too large a kernel for the FFT");
  return a;
}

// The work of a pass. A task is a group of blocks of lanes of a tile: if they are few and small,
// those that share the cache lines of channels-last tensors. Its steps are the terms of a sum.
// Where the sum goes over the tiles too (grad_weight), a task is a group, and tiles are among its
// steps.
class Tasks {
 public:
  Tasks(const SpectralPlan& plan, const Convolution& c, bool over_tiles,
        const SpectralKernels& kernels, int64_t item_bytes)
      : kernels_(kernels), map_(c.map), terms_(c.terms), over_tiles_(over_tiles) {
    const auto odd = [](int64_t cells) { return cells | 1; };  // see SpectralPlan about pitches
    int64_t column_a = 0, column_b = 0, column_result = 0;
    for (const SpectralTile& tile : plan.tiles()) {
      const SpectralArgs& a = tiles_.emplace_back(tile_args(plan, tile, c, item_bytes));
      column_a = std::max(column_a, 2 * odd(a.a.column()));
      column_b = std::max(column_b, 2 * odd(a.b.column()));
      column_result = std::max(column_result, 2 * odd(a.result.column()));
      own_bytes_ = std::max(own_bytes_, a.own_vectors() * kernels.cell_bytes);
      row_units_ = std::max(row_units_, a.row_units());
    }
    const auto tiles = static_cast<int64_t>(tiles_.size());
    steps_ = over_tiles ? terms_ * tiles : terms_;
    // One layout for all tiles: a sum stays where it is from step to step.
    for (SpectralArgs& a : tiles_) {
      a.summed = steps_ > 1;
      a.column_a = a.summed ? column_a : std::max(column_a, column_result);
      a.column_b = column_b;
      a.column_result = a.summed ? column_result : a.column_a;
    }
    const int64_t block_bytes = tiles_[0].shared_vectors() * kernels.cell_bytes;
    const auto set_group = [&](int64_t blocks) {
      group_ = blocks;
      shared_bytes_ = blocks * block_bytes;
      count_ = groups_of(map_, blocks) * (over_tiles ? 1 : tiles);
    };
    set_group(map_.split_batch ? kLineBytes / (map_.lanes * item_bytes) : 1);
    if (shared_bytes_ > kGroupBytes || count_ < num_threads()) set_group(1);
  }

  // Whole tasks, as many for each thread, as long as there are enough; of the others, and of tasks
  // that need much memory, the phases are shared out. Both ways give the same bits.
  void run() const {
    const int64_t threads = num_threads();
    const int64_t whole = shared_bytes_ > kKeptBytes ? 0 : count_ / threads * threads;
    parallel_for(whole, 1, [&](int64_t begin, int64_t end) { run_whole(begin, end); });
    if (whole == count_) return;
    const int64_t fitting = std::max<int64_t>(kKeptBytes / shared_bytes_, 1);
    const int64_t size = std::min(fitting, count_ - whole);
    Memory large = shared_bytes_ > kKeptBytes ? allocate(shared_bytes_) : nullptr;
    void* shared = large ? large.get() : scratch<kSharedScratch>(size * shared_bytes_);
    for (int64_t first = whole; first < count_; first += size)
      run_shared(first, std::min(size, count_ - first), static_cast<char*>(shared));
  }

 private:
  const SpectralArgs& args(int64_t task, int64_t step) const {
    return tiles_[over_tiles_ ? step / terms_ : task % static_cast<int64_t>(tiles_.size())];
  }
  Group group(int64_t task) const {
    return group_at(map_, group_, over_tiles_ ? task : task / static_cast<int64_t>(tiles_.size()));
  }

  void run_whole(int64_t begin, int64_t end) const {
    void *shared = scratch<kSharedScratch>(shared_bytes_), *own = scratch(own_bytes_);
    for (int64_t task = begin; task < end; ++task) {
      for (int64_t step = 0; step < steps_; ++step) {
        const SpectralArgs& a = args(task, step);
        kernels_.rows(a, group(task), step % terms_, 0, a.row_units(), shared, own);
        kernels_.columns(a, group(task), step == 0, 0, a.columns, shared, own);
      }
      const SpectralArgs& a = args(task, 0);
      kernels_.planes(a, group(task), 0, a.result.size[0], shared, own);
    }
  }

  // Tasks first .. first + count, one after the other in `shared`.
  void run_shared(int64_t first, int64_t count, char* shared) const {
    for (int64_t step = 0; step < steps_; ++step) {
      share_out(count, row_units_, [&](int64_t i, int64_t begin, int64_t end, void* own) {
        const SpectralArgs& a = args(first + i, step);
        kernels_.rows(a, group(first + i), step % terms_, begin, std::min(end, a.row_units()),
                      shared + i * shared_bytes_, own);
      });
      share_out(count, tiles_[0].columns, [&](int64_t i, int64_t begin, int64_t end, void* own) {
        kernels_.columns(args(first + i, step), group(first + i), step == 0, begin, end,
                         shared + i * shared_bytes_, own);
      });
    }
    share_out(count, tiles_[0].result.size[0],
              [&](int64_t i, int64_t begin, int64_t end, void* own) {
                const SpectralArgs& a = args(first + i, 0);
                kernels_.planes(a, group(first + i), begin, std::min(end, a.result.size[0]),
                                shared + i * shared_bytes_, own);
              });
  }

  // f(i, first unit, last unit, own scratch), i < count, with the units of all i shared out.
  template <class F>
  void share_out(int64_t count, int64_t units, const F& f) const {
    int64_t cells = 1;
    for (const SpectralAxis& axis : tiles_[0].axis) cells *= axis.fft.length;
    parallel_for(count * units, kGrainCells * units / cells, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end;) {
        const int64_t i = at / units, unit = at % units, last = std::min(units, unit + end - at);
        f(i, unit, last, scratch(own_bytes_));
        at += last - unit;
      }
    });
  }

  const SpectralKernels& kernels_;
  const LaneMap map_;
  std::vector<SpectralArgs> tiles_;
  int64_t terms_, steps_, group_, count_;
  bool over_tiles_;
  int64_t shared_bytes_, own_bytes_ = 0, row_units_ = 0;
};

void convolve(const Conv3dShape& shape, Pass pass, Convolution c, const Tensor& leader) {
  const Element element = element_of(leader);
  const SpectralKernels& kernels = spectral_kernels(element, c.map.batch * c.map.channels);
  c.map.lanes = kernels.lanes;
  const SpectralPlan plan(shape.axis, pass, element == Element::f64);
  Tasks(plan, c, pass == Pass::grad_weight, kernels, leader.element_size()).run();
}

void check_mode(int64_t mode) {
  VOXCONV_CHECK(mode == kZeros, "voxconv: the FFT pads with zeros only");
}

Tensor depthwise_forward_fft(const Tensor& x, const Tensor& weight,
                             const std::optional<Tensor>& bias, const Ints& stride,
                             const Ints& padding, const Ints& dilation, int64_t mode,
                             int64_t activation) {
  check_mode(mode);
  const Activation then = checked_activation(activation);
  const Conv3dShape shape = forward_shape(x, weight, stride, padding, dilation, mode);
  const Axis* axis = shape.axis;
  const int64_t batch = shape.batch, filters = weight.size(0);
  Tensor y = empty_result(x, {batch, filters, axis[0].out, axis[1].out, axis[2].out});
  const Tensor w = contiguous(weight);
  const std::optional<Tensor> b = checked_bias(bias, x, filters);
  if (y.numel() == 0) return y;
  Convolution c{operand(x), weight_operand(w),
                operand(y), b ? b->data_ptr() : nullptr,
                1,          {batch, filters, 0, is_channels_last_3d(x)}};
  c.a.divide = shape.multiplier;
  c.activation = then;
  convolve(shape, Pass::forward, c, x);
  return y;
}

Tensor depthwise_grad_input_fft(const Tensor& grad, const Tensor& weight, const Ints& size,
                                const Ints& stride, const Ints& padding, const Ints& dilation,
                                int64_t mode, const std::optional<Tensor>& bias) {
  check_mode(mode);
  const Conv3dShape shape = grad_input_shape(grad, weight, size, stride, padding, dilation, mode);
  const int64_t batch = shape.batch, channels = shape.channels, multiplier = shape.multiplier;
  Tensor x = empty_result(grad, {batch, channels, size[0], size[1], size[2]});
  const Tensor w = contiguous(weight);
  const std::optional<Tensor> b = checked_bias(bias, grad, channels);
  if (x.numel() == 0) return x;
  Convolution c{operand(grad), weight_operand(w),
                operand(x),    b ? b->data_ptr() : nullptr,
                multiplier,    {batch, channels, 0, is_channels_last_3d(grad)}};
  c.a.gather = c.b.gather = multiplier;
  c.a.term_step = c.a.tensor.c;
  c.b.term_step = c.b.tensor.c;
  convolve(shape, Pass::grad_input, c, grad);
  return x;
}

Tensor depthwise_grad_weight_fft(const Tensor& grad, const Tensor& x, const Ints& kernel,
                                 const Ints& stride, const Ints& padding, const Ints& dilation,
                                 int64_t mode) {
  check_mode(mode);
  const Conv3dShape shape = grad_weight_shape(grad, x, kernel, stride, padding, dilation, mode);
  const int64_t batch = shape.batch, filters = grad.size(1);
  Tensor weight = empty_5d(x, {filters, 1, kernel[0], kernel[1], kernel[2]}, false);
  if (filters == 0) return weight;
  // Taps that meet padding only are not written.
  weight = torch::stable::zero_(weight);
  if (batch == 0) return weight;
  Convolution c{operand(x), operand(grad), weight_operand(weight),
                nullptr,    batch,         {1, filters, 0, is_channels_last_3d(x)}};
  c.a.divide = shape.multiplier;
  c.a.term_step = x.stride(0);
  c.b.term_step = grad.stride(0);
  convolve(shape, Pass::grad_weight, c, x);
  return weight;
}

}  // namespace
}  // namespace voxconv

STABLE_TORCH_LIBRARY_IMPL(voxconv, CPU, m) {
  m.impl("depthwise_forward_fft", TORCH_BOX(&voxconv::depthwise_forward_fft));
  m.impl("depthwise_grad_input_fft", TORCH_BOX(&voxconv::depthwise_grad_input_fft));
  m.impl("depthwise_grad_weight_fft", TORCH_BOX(&voxconv::depthwise_grad_weight_fft));
}
