// SPDX-License-Identifier: Apache-2.0
// channel_sum: [N, C, D, H, W] -> [C], the bias gradient. Reads each element once, writes C.
//
// The tensor is seen as `units` runs of `rows` rows of `width` neighbours that belong to `width`
// different channels: NCDHW is N * C units of D * H * W rows of one, channels_last_3d is one unit
// of N * D * H * W rows of C. Work is cut into chunks of rows whose length depends on the shape
// alone; one chunk is one task, writes its own partial sums, and the partials are added in order:
// the result has the same bits for any number of threads.
//
// Elements go to lanes by their position; a float lane takes at most kBlock of them before the
// lanes are folded into doubles, so the error does not grow with the size of the volume.
#include <algorithm>
#include <cstring>
#include <vector>

#include "../common/stable.h"

// The loops below vectorise as they stand; a clone per x86-64 level is all they lack without
// -march. Needs ifunc (glibc) and gcc >= 12. Lanes are never reassociated, so every clone gives the
// same bits.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define VOXCONV_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define VOXCONV_CLONES
#endif

namespace voxconv {
namespace {

constexpr int64_t kChunk = 1 << 16;  // elements: 256 KB of float, a task of about 20 us
constexpr int64_t kLanes = 256;      // partial sums side by side: 1 KB of float, stays in L1
constexpr int64_t kBlock = 64;       // elements of a lane between two flushes; multiple of 4

struct View {
  int64_t units, rows, width;
  int64_t size[4], stride[4];  // the row index, outermost axis first: N, D, H, W
  int64_t unit_size;           // unit u is number u % unit_size of group u / unit_size,
  int64_t unit_stride[2];      // and these are the strides of group and number
  bool dense;                  // rows of a unit follow each other without a gap

  int64_t unit_offset(int64_t unit) const {
    return unit / unit_size * unit_stride[0] + unit % unit_size * unit_stride[1];
  }
};

View make_view(const Tensor& grad) {
  const Sizes n = grad.sizes(), s = grad.strides();
  const int64_t volume = n[2] * n[3] * n[4];
  // Rows of channels if channels are neighbours; with one channel or as an NCDHW tensor, rows of 1.
  const bool channels = s[1] == 1 && n[1] > 1;
  View view{};
  view.units = channels ? 1 : n[0] * n[1];
  view.rows = channels ? n[0] * volume : volume;
  view.width = channels ? n[1] : 1;
  view.unit_size = n[1];
  view.unit_stride[0] = channels ? 0 : s[0];
  view.unit_stride[1] = channels ? 0 : s[1];
  view.dense = true;
  int64_t expected = view.width;
  for (int i = 3; i >= 0; --i) {
    const int axis = i == 0 ? 0 : i + 1;
    view.size[i] = i == 0 && !channels ? 1 : n[axis];
    view.stride[i] = s[axis];
    if (view.size[i] == 1) continue;
    view.dense = view.dense && s[axis] == expected;
    expected *= view.size[i];
  }
  return view;
}

// Copies rows [begin, end) of a unit that is not dense to `out`.
template <typename T>
void gather(const T* unit, const View& view, int64_t begin, int64_t end, T* out) {
  int64_t w = begin % view.size[3], rest = begin / view.size[3];
  while (begin < end) {
    const T* line = unit + rest % view.size[2] * view.stride[2] +
                    rest / view.size[2] % view.size[1] * view.stride[1] +
                    rest / view.size[2] / view.size[1] * view.stride[0];
    const int64_t stop = std::min(view.size[3], w + end - begin);
    begin += stop - w;
    for (; w < stop; ++w, out += view.width) {
      if (view.width == 1)
        *out = line[w * view.stride[3]];
      else
        std::memcpy(out, line + w * view.stride[3], view.width * sizeof(T));
    }
    w = 0;
    ++rest;
  }
}

// result[c] += the sum of p[c], p[c + width], ... over `count` elements. Lane i takes the elements
// i, i + lanes, ...; lanes is width * 2^k, so that folding the lanes in half ends at the channels.
template <typename T, typename A>
VOXCONV_CLONES void add_block(const T* __restrict p, int64_t count, int64_t lanes, int64_t width,
                              A* __restrict acc, double* __restrict result) {
  for (int64_t i = 0; i < lanes; ++i) acc[i] = A(0);
  const T* end = p + count;
  for (; end - p >= 4 * lanes; p += 4 * lanes)
    for (int64_t i = 0; i < lanes; ++i)
      acc[i] += (A(p[i]) + A(p[i + lanes])) + (A(p[i + 2 * lanes]) + A(p[i + 3 * lanes]));
  while (p < end) {
    const int64_t length = std::min<int64_t>(lanes, end - p);
    for (int64_t i = 0; i < length; ++i) acc[i] += A(p[i]);
    p += length;
  }
  for (int64_t half = lanes / 2; half >= width; half /= 2)
    for (int64_t i = 0; i < half; ++i) acc[i] += acc[i + half];
  for (int64_t c = 0; c < width; ++c) result[c] += acc[c];
}

template <typename T>
void sum_channels(const Tensor& grad, Tensor& out) {
  using A = Accumulator<T>;
  const View view = make_view(grad);
  const int64_t channels = grad.size(1), width = view.width;
  // Enough lanes for long vectors, few when a unit is short.
  int64_t lanes = width;
  while (lanes < kLanes && lanes * 8 < view.rows * width) lanes *= 2;
  const int64_t block_rows = kBlock * (lanes / width);
  const int64_t chunk_rows = std::max<int64_t>(kChunk / (block_rows * width), 1) * block_rows;
  const int64_t chunks = (view.rows + chunk_rows - 1) / chunk_rows;
  std::vector<double> partial(view.units * chunks * width);

  const T* data = grad.const_data_ptr<T>();
  const int64_t task = std::max<int64_t>(std::min(chunk_rows, view.rows) * width, 1);
  parallel_for(view.units * chunks, kChunk / task, [&](int64_t from, int64_t to) {
    std::vector<A> acc(lanes);
    std::vector<T> copy(view.dense ? 0 : block_rows * width);
    for (int64_t index = from; index < to; ++index) {
      const T* unit = data + view.unit_offset(index / chunks);
      const int64_t first = index % chunks * chunk_rows;
      const int64_t last = std::min(first + chunk_rows, view.rows);
      for (int64_t row = first; row < last; row += block_rows) {
        const int64_t stop = std::min(row + block_rows, last);
        const T* p = unit + row * width;
        if (!view.dense) {
          gather(unit, view, row, stop, copy.data());
          p = copy.data();
        }
        add_block<T, A>(p, (stop - row) * width, lanes, width, acc.data(),
                        partial.data() + index * width);
      }
    }
  });

  T* result = out.mutable_data_ptr<T>();
  for (int64_t c = 0; c < channels; ++c) {
    // A channel is column c of every chunk of the one unit, or every chunk of units c, c + C, ...
    const int64_t first = width == 1 ? c : 0, step = width == 1 ? channels : 1;
    const int64_t column = width == 1 ? 0 : c;
    double sum = 0;
    for (int64_t unit = first; unit < view.units; unit += step)
      for (int64_t k = 0; k < chunks; ++k) sum += partial[(unit * chunks + k) * width + column];
    result[c] = static_cast<T>(static_cast<A>(sum));
  }
}

Tensor channel_sum(const Tensor& grad) {
  VOXCONV_CHECK(grad.dim() == 5, "channel_sum takes a 5-D tensor, got ", grad.dim(), " axes");
  Tensor out = torch::stable::new_empty(grad, {grad.size(1)});
  dispatch_floating(grad.scalar_type(), "channel_sum",
                    [&](auto type) { sum_channels<typename decltype(type)::type>(grad, out); });
  return out;
}

}  // namespace
}  // namespace voxconv

STABLE_TORCH_LIBRARY_IMPL(voxconv, CPU, m) {
  m.impl("channel_sum", TORCH_BOX(&voxconv::channel_sum));
}
