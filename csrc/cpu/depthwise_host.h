// SPDX-License-Identifier: Apache-2.0
// What the CPU ops of the depthwise family do with their tensors before and after a kernel runs.
#pragma once
#include "../common/depthwise_checks.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "caches.h"
#include "depthwise_args.h"

namespace voxconv {

inline Element element_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Element::f32;
    case ScalarType::Double: return Element::f64;
    case ScalarType::BFloat16: return Element::bf16;
    case ScalarType::Half: return Element::f16;
    default: break;
  }
  VOXCONV_CHECK(false, "voxconv: dtype must be float32, float64, bfloat16 or float16");
  return Element::f32;
}

// Whether a target is so large that it is written past the caches, where it would take the place of
// what is read (the C library copies so, too), and begins with an aligned vector. Vectors are whole
// cache lines: parts of many lines at a time halve the rate of memory.
inline bool past_caches(const Tensor& target, int64_t lanes) {
  constexpr int64_t kBytes = 16 << 20;
  const int64_t item = target.element_size();
  return lanes * item == kLineBytes && target.numel() * item >= kBytes &&
         reinterpret_cast<uintptr_t>(target.data_ptr()) % kLineBytes == 0;
}

inline Strided strided(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), tensor.stride(0), tensor.stride(1),
          tensor.stride(2),          tensor.stride(3), tensor.stride(4)};
}

// Source and target of grad_weight are x and grad.
inline PassTensors pass_tensors(const Conv3dShape& shape, Pass pass, const Tensor& source,
                                const Tensor& target) {
  const bool backwards = pass == Pass::grad_input;
  const int64_t channels = target.size(1);
  return {strided(source),
          strided(target),
          nullptr,
          nullptr,
          kIdentity,
          nullptr,
          shape.batch * channels,
          channels,
          backwards ? 1 : shape.multiplier,
          backwards ? shape.multiplier : 1};
}

inline double ratio(int64_t a, int64_t b) {
  return static_cast<double>(a) / static_cast<double>(b);
}

inline int64_t round_up(int64_t cells, int64_t lanes) { return ceil_div(cells, lanes) * lanes; }

// An odd number of cache lines: rows above each other do not compete for the same few of them.
inline int64_t odd_lines(int64_t cells, int64_t lanes) {
  const int64_t size = round_up(cells, lanes);
  return size / lanes % 2 ? size : size + lanes;
}

inline int64_t target_size(const Axis& axis, bool backwards) {
  return backwards ? axis.in : axis.out;
}

// A convolution without the taps at the ends of its kernel that meet nothing but zeros: a kernel
// that is larger than the volume has many of them.
struct Cropped {
  std::vector<int64_t> first, kernel, padding;  // the taps that are left, and the padding they need
  bool smaller = false;

  explicit Cropped(const Conv3dShape& shape) {
    for (const Axis& a : shape.axis) {
      // Of `pad` cells of padding no more than `far` are met: as many taps as have no other.
      const auto unmet = [&](int64_t pad, int64_t far, int64_t taps) {
        const int64_t count = std::min(ceil_div(pad - far, a.dilation), pad / a.dilation);
        return shape.mode == kZeros ? std::clamp<int64_t>(count, 0, taps - 1) : 0;
      };
      const int64_t span = (a.out - 1) * a.stride, end = span + a.reach() - a.before - (a.in - 1);
      const int64_t low = unmet(a.before, span, a.kernel);
      const int64_t high = unmet(std::min(a.after, end), span, a.kernel - low);
      first.push_back(low);
      kernel.push_back(a.kernel - low - high);
      padding.push_back(a.before - low * a.dilation);
      padding.push_back(a.after - high * a.dilation);
      smaller |= kernel.back() < a.kernel;
    }
  }
  // What is left of a contiguous weight.
  Tensor of(const Tensor& weight) const {
    Tensor left =
        empty_5d(weight, {weight.size(0), weight.size(1), kernel[0], kernel[1], kernel[2]}, false);
    for_each_run(weight, [&, to = static_cast<char*>(left.mutable_data_ptr()),
                          from = static_cast<const char*>(weight.data_ptr())](
                             int64_t whole, int64_t cropped, int64_t bytes) {
      std::memcpy(to + cropped, from + whole, bytes);
    });
    return left;
  }
  // Puts it back; the other taps stay as they are.
  void put(const Tensor& left, Tensor& weight) const {
    for_each_run(weight, [to = static_cast<char*>(weight.mutable_data_ptr()),
                          from = static_cast<const char*>(left.data_ptr())](
                             int64_t whole, int64_t cropped, int64_t bytes) {
      std::memcpy(to + whole, from + cropped, bytes);
    });
  }

 private:
  // f(byte of the weight, byte of what is left of it, bytes) for taps that are neighbours in both.
  template <class F>
  void for_each_run(const Tensor& weight, const F& f) const {
    const int64_t item = weight.element_size(), filters = weight.size(0) * weight.size(1);
    const int64_t planes = weight.size(2), h = weight.size(3), w = weight.size(4);
    const int64_t lines = kernel[2] == w ? 1 : kernel[1];  // of a plane, else it is one run
    const int64_t run = item * kernel[2] * kernel[1] / lines;
    constexpr int64_t kGrainRuns = 1 << 12;
    parallel_for(filters, kGrainRuns / (kernel[0] * lines), [&](int64_t begin, int64_t end) {
      int64_t cropped = begin * kernel[0] * lines * run;
      for (int64_t filter = begin; filter < end; ++filter)
        for (int64_t d = first[0]; d < first[0] + kernel[0]; ++d)
          for (int64_t line = first[1]; line < first[1] + lines; ++line, cropped += run)
            f(item * (((filter * planes + d) * h + line) * w + first[2]), cropped, run);
    });
  }
};

}  // namespace voxconv
