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

#if defined(__linux__)
#include <dlfcn.h>
#endif

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

// What an output takes from a tensor argument of its op, and its sizes.
struct Layout5d {
  std::array<int64_t, 5> sizes, strides;
  int32_t dtype, device_type, device_index;

  // Five axes, dtype and device of `like`, NCDHW or channels_last_3d.
  Layout5d(const Tensor& like, const std::array<int64_t, 5>& sizes, bool channels_last_3d)
      : sizes(sizes) {
    static constexpr int kOrder[2][5] = {{4, 3, 2, 1, 0}, {1, 4, 3, 2, 0}};
    int64_t stride = 1;
    for (int axis : kOrder[channels_last_3d]) {
      strides[axis] = stride;
      stride *= sizes[axis] > 1 ? sizes[axis] : 1;
    }
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  }
};

// Missing: a cheap empty(MemoryFormat); torch::stable::empty is a boxed call, 0.8 us dearer than
// this. Uninitialised.
inline Tensor empty_5d(const Layout5d& layout) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(5, layout.sizes.data(), layout.strides.data(), layout.dtype,
                               layout.device_type, layout.device_index, &handle));
  return Tensor(handle);
}

inline Tensor empty_5d(const Tensor& like, const std::array<int64_t, 5>& sizes,
                       bool channels_last_3d) {
  return empty_5d(Layout5d(like, sizes, channels_last_3d));
}

// Missing: from_blob with a deleter, which torch has since 2.11. Linking to it would end our life
// with torch 2.10: it is looked up, and null there.
using FromBlob = AOTITorchError (*)(void* data, int64_t ndim, const int64_t* sizes,
                                    const int64_t* strides, int64_t storage_offset, int32_t dtype,
                                    int32_t device_type, int32_t device_index,
                                    AtenTensorHandle* result, int32_t layout,
                                    const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
                                    void (*deleter)(void* data, void* context), void* context);
inline FromBlob find_from_blob() {
#if defined(__linux__)
  static const auto found = reinterpret_cast<FromBlob>(dlsym(RTLD_DEFAULT, "torch_from_blob"));
  return found;
#else
  return nullptr;
#endif
}

// A tensor in `memory`; `deleter(memory, context)` is called with the last reference to it.
inline Tensor tensor_in(FromBlob from_blob, void* memory, const Layout5d& layout,
                        void (*deleter)(void*, void*), void* context) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(from_blob(
      memory, 5, layout.sizes.data(), layout.strides.data(), 0, layout.dtype, layout.device_type,
      layout.device_index, &handle, aoti_torch_layout_strided(), nullptr, 0, deleter, context));
  return Tensor(handle);
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
