// What the ops have in common: errors, attributes, inputs, and tensors as the core sees them. Nothing is computed in this folder:
// kernels take tensors and variables apart, call include/pqasgd.h, and write where it costs no copy. The graph that they make is in
// ../graph.py.
#ifndef PQASGD_TENSORFLOW_COMMON_H
#define PQASGD_TENSORFLOW_COMMON_H

#include <algorithm>
#include <atomic>
#include <cstring>
#include <iterator>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "pqasgd.h"
#include "pqasgd_cuda.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace pqasgd_tensorflow {

using namespace tensorflow;
using absl::OkStatus;
using absl::Status;
using shape_inference::InferenceContext;

template <class... Args>
Status InvalidArgument(const Args&... args) { return absl::InvalidArgumentError(absl::StrCat(args...)); }
template <class... Args>
Status DataLoss(const Args&... args) { return absl::DataLossError(absl::StrCat(args...)); }
template <class... Args>
Status FailedPrecondition(const Args&... args) { return absl::FailedPreconditionError(absl::StrCat(args...)); }
template <class... Args>
Status Internal(const Args&... args) { return absl::InternalError(absl::StrCat(args...)); }

// ---- in words, by Python: only when something is wrong ----

// Writes the text of what is wrong to `text` and returns a pq kind of error (below), or 0 if it is only taken note of.
typedef int32_t (*Explain)(int64_t explainer, int32_t flags, const uint8_t* data, int64_t nbytes, char* text, int64_t capacity);
extern std::atomic<Explain> g_explain;

// What of flags a header holds.
constexpr int32_t kHeaderFlags = PQ_SENDER_NONFINITE | PQ_MEAN_OVERFLOW | PQ_DESYNCHRONIZED | PQ_MALFORMED;

enum { kNothing = 0, kDesynchronized = 1, kMalformed = 2, kNonFinite = 3, kMismatch = 4 };

inline Status explain(int64_t explainer, int32_t flags, const uint8_t* data, int64_t nbytes) {
  const Explain function = g_explain.load();
  if (!function) return Internal("pqasgd_horovod: flags ", flags, ", and no Python to explain them");
  std::vector<char> text(1 << 14, 0);
  const int32_t kind = function(explainer, flags, data, nbytes, text.data(), (int64_t)text.size() - 1);
  switch (kind) {
    case kNothing: return OkStatus();
    case kMalformed: return DataLoss(text.data());
    case kNonFinite: return InvalidArgument(text.data());
    default: return FailedPrecondition(text.data());
  }
}

// ---- the kernels for GPUs ----

#define PQ_FOR_EACH_KERNEL(F)                                                                                               \
  F(allgather_pack) F(allgather_land) F(two_phase_pack) F(two_phase_mean) F(two_phase_relay) F(two_phase_land) F(apply) F(rebase) \
  F(gather) F(outer) F(scale) F(copy)

struct Kernels {
#define PQ_KERNEL(name) decltype(&pq_device_##name) name = nullptr;
  PQ_FOR_EACH_KERNEL(PQ_KERNEL)
#undef PQ_KERNEL
  decltype(&pq_cuda_error) error = nullptr;
};
extern std::atomic<const Kernels*> g_kernels;

// ---- attributes and inputs ----

inline Status codec_from(const std::vector<int64_t>& spec, pq_codec* codec) {
  int32_t fields[sizeof(pq_codec) / sizeof(int32_t)];
  if (spec.size() != std::size(fields))
    return InvalidArgument("codec has ", spec.size(), " numbers; it must have ", std::size(fields));
  std::copy(spec.begin(), spec.end(), fields);
  std::memcpy(codec, fields, sizeof fields);
  return OkStatus();
}

inline Status dtype_from(DataType dtype, int32_t* code) {
  switch (dtype) {
    case DT_FLOAT: *code = PQ_F32; return OkStatus();
    case DT_DOUBLE: *code = PQ_F64; return OkStatus();
    case DT_HALF: *code = PQ_F16; return OkStatus();
    case DT_BFLOAT16: *code = PQ_BF16_BITS; return OkStatus();
    default: return InvalidArgument("dtype ", DataTypeString(dtype), " is not a float type of the core");
  }
}

inline Status check(int32_t status, const char* what) {
  if (status >= 0) return OkStatus();
  switch (status) {
    case PQ_BAD_LENGTH: return DataLoss(what, ": the payload has not the size that this codec gives this many elements");
    case PQ_BAD_SCALE: return DataLoss(what, ": the payload holds a scale that is negative, NaN or Inf: it is corrupted");
    case PQ_BAD_CODE: return DataLoss(what, ": the payload holds a code that no encoder writes: it is corrupted");
    case PQ_DEVICE_ERROR: return Internal("DeviceError: ", what, ": CUDA refuses: ", g_kernels.load()->error());
    default: return InvalidArgument(what, ": the codec, the range or the memory given to the native core is not valid");
  }
}

template <class T>
inline Status scalar_from(OpKernelContext* context, const char* name, T* value) {
  const Tensor* tensor = nullptr;
  TF_RETURN_IF_ERROR(context->input(name, &tensor));
  if (tensor->NumElements() != 1) return InvalidArgument(name, " has ", tensor->NumElements(), " elements; it must be a scalar");
  *value = tensor->flat<T>()(0);
  return OkStatus();
}

inline void* data_of(const Tensor& tensor) { return const_cast<char*>(tensor.tensor_data().data()); }
inline float* floats_of(const Tensor& tensor) { return (float*)data_of(tensor); }

// Tensors as one flat vector, minus a part of an anchor if there is one.
struct Source {
  std::vector<pq_segment> segments;
  std::vector<int64_t> offsets{0};
  pq_source source{};

  Status add(const Tensor& tensor) {
    pq_segment segment{data_of(tensor), tensor.NumElements(), 0, 0};
    TF_RETURN_IF_ERROR(dtype_from(tensor.dtype(), &segment.dtype));
    segments.push_back(segment);
    offsets.push_back(offsets.back() + segment.numel);
    return OkStatus();
  }
  Status subtract(const Tensor& anchor, int64_t offset) {
    int32_t dtype = 0;
    TF_RETURN_IF_ERROR(dtype_from(anchor.dtype(), &dtype));
    if (offset < 0 || offset + offsets.back() > anchor.NumElements())
      return InvalidArgument("the anchor has ", anchor.NumElements(), " elements; ", offset + offsets.back(), " are needed");
    source.anchor = (char*)data_of(anchor) + offset * DataTypeSize(anchor.dtype());
    source.anchor_dtype = dtype;
    return OkStatus();
  }
  void feed_back(const float* residual, float* next_residual) {
    source.residual = residual;
    source.next_residual = next_residual;
  }
  const pq_source* get() {
    source.segments = segments.data();
    source.offsets = offsets.data();
    source.num_segments = (int64_t)segments.size();
    return &source;
  }
};

}  // namespace pqasgd_tensorflow

#endif
