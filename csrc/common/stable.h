// SPDX-License-Identifier: Apache-2.0
// The one file that knows the LibTorch stable ABI and what it lacks. Everything else in csrc/ takes
// tensors, checks, allocation, threads and dtypes from here and includes no torch header itself.
//
// Include it before any `#pragma GCC target`: inline functions emitted inside a target region may
// be the copy the linker keeps for the whole library, with instructions an older CPU lacks.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <array>
#include <cstdint>
#include <type_traits>
#include <utility>

// Throws std::runtime_error (RuntimeError in Python) with the streamed arguments as its text.
// Users are answered in Python before an op is reached: checks here guard memory, nothing else.
// The do-while makes STD_TORCH_CHECK, a bare `if`, safe in front of an `else`.
#define VOXCONV_CHECK(condition, ...)          \
  do {                                         \
    STD_TORCH_CHECK((condition), __VA_ARGS__); \
  } while (0)

namespace voxconv {

using torch::stable::Tensor;
using BFloat16 = c10::BFloat16;
using Half = c10::Half;
using ScalarType = torch::headeronly::ScalarType;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// Missing: is_contiguous(MemoryFormat). True if the strides are exactly those of channels_last_3d
// (axes of size 1 do not count) and the tensor is not NCDHW contiguous too, as it is when it has
// one channel, one voxel or no elements; such a tensor is an NCDHW tensor everywhere in voxconv.
inline bool is_channels_last_3d(const Tensor& tensor) {
  if (tensor.dim() != 5 || tensor.is_contiguous()) return false;
  const Sizes sizes = tensor.sizes(), strides = tensor.strides();
  int64_t expected = 1;
  for (int axis : {1, 4, 3, 2, 0}) {
    if (sizes[axis] == 1) continue;
    if (strides[axis] != expected) return false;
    expected *= sizes[axis];
  }
  return true;
}

// Missing: a cheap empty(MemoryFormat); torch::stable::empty is a boxed call, 0.8 us dearer than
// this. Five axes, dtype and device of `like`, NCDHW or channels_last_3d, uninitialised.
inline Tensor empty_5d(const Tensor& like, const std::array<int64_t, 5>& sizes,
                       bool channels_last_3d) {
  static constexpr int kOrder[2][5] = {{4, 3, 2, 1, 0}, {1, 4, 3, 2, 0}};
  std::array<int64_t, 5> strides;
  int64_t stride = 1;
  for (int axis : kOrder[channels_last_3d]) {
    strides[axis] = stride;
    stride *= sizes[axis] > 1 ? sizes[axis] : 1;
  }
  int32_t dtype, device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(5, sizes.data(), strides.data(), dtype,
                                                         device_type, device_index, &handle));
  return Tensor(handle);
}

// An output in the layout of `like` (the first tensor argument of an op).
inline Tensor empty_in_layout_of(const Tensor& like, const std::array<int64_t, 5>& sizes) {
  return empty_5d(like, sizes, is_channels_last_3d(like));
}

template <typename T>
struct Type {
  using type = T;
};

// What T is summed in.
template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls f(Type<T>{}) with the C++ type of the four dtypes voxconv computes in.
template <typename F>
decltype(auto) dispatch_floating(ScalarType dtype, const char* op, F&& f) {
  switch (dtype) {
    case ScalarType::Float: return f(Type<float>{});
    case ScalarType::Double: return f(Type<double>{});
    case ScalarType::BFloat16: return f(Type<BFloat16>{});
    case ScalarType::Half: return f(Type<Half>{});
    default: break;
  }
  VOXCONV_CHECK(false, op, " is not implemented for ", torch::headeronly::toString(dtype));
  return f(Type<float>{});  // unreachable: names the return type
}

// f(begin, end) over [0, count) on torch's threads, at most one contiguous range per thread and
// none shorter than `grain` unless it is the only one. How many ranges there are depends on the
// thread count: whatever is rounded must depend on the index alone, never on begin or end.
template <typename F>
void parallel_for(int64_t count, int64_t grain, const F& f) {
  if (count > 0) torch::stable::parallel_for(0, count, grain > 1 ? grain : 1, f);
}

inline int64_t num_threads() { return torch::stable::get_num_threads(); }

}  // namespace voxconv
