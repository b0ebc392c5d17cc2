// The core as TensorFlow ops. Nothing is computed here: kernels take tensors and variables apart, call include/pqasgd.h, and
// write where it costs no copy. The graph that they make is in ../graph.py.
//
// Ops that touch what a model is made of have kernels for GPUs, too: the same classes with numbers of a Device instead of the
// Host. Messages, flags and scalars are in host memory everywhere. Those kernels call include/pqasgd_cuda.h, of a library that is
// loaded when somebody needs it: this one needs neither CUDA nor a TensorFlow that was built with it.
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <iterator>
#include <limits>
#include <string>
#include <unordered_map>
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
#include "xla/stream_executor/stream.h"

namespace {

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
std::atomic<Explain> g_explain{nullptr};

// What of flags a header holds.
constexpr int32_t kHeaderFlags = PQ_SENDER_NONFINITE | PQ_MEAN_OVERFLOW | PQ_DESYNCHRONIZED | PQ_MALFORMED;

enum { kNothing = 0, kDesynchronized = 1, kMalformed = 2, kNonFinite = 3, kMismatch = 4 };

Status explain(int64_t explainer, int32_t flags, const uint8_t* data, int64_t nbytes) {
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
std::atomic<const Kernels*> g_kernels{nullptr};

// ---- attributes and inputs ----

Status codec_from(const std::vector<int64_t>& spec, pq_codec* codec) {
  int32_t fields[sizeof(pq_codec) / sizeof(int32_t)];
  if (spec.size() != std::size(fields))
    return InvalidArgument("codec has ", spec.size(), " numbers; it must have ", std::size(fields));
  std::copy(spec.begin(), spec.end(), fields);
  std::memcpy(codec, fields, sizeof fields);
  return OkStatus();
}

Status dtype_from(DataType dtype, int32_t* code) {
  switch (dtype) {
    case DT_FLOAT: *code = PQ_F32; return OkStatus();
    case DT_DOUBLE: *code = PQ_F64; return OkStatus();
    case DT_HALF: *code = PQ_F16; return OkStatus();
    case DT_BFLOAT16: *code = PQ_BF16_BITS; return OkStatus();
    default: return InvalidArgument("dtype ", DataTypeString(dtype), " is not a float type of the core");
  }
}

Status check(int32_t status, const char* what) {
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
Status scalar_from(OpKernelContext* context, const char* name, T* value) {
  const Tensor* tensor = nullptr;
  TF_RETURN_IF_ERROR(context->input(name, &tensor));
  if (tensor->NumElements() != 1) return InvalidArgument(name, " has ", tensor->NumElements(), " elements; it must be a scalar");
  *value = tensor->flat<T>()(0);
  return OkStatus();
}

void* data_of(const Tensor& tensor) { return const_cast<char*>(tensor.tensor_data().data()); }
float* floats_of(const Tensor& tensor) { return (float*)data_of(tensor); }

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

// ---- where numbers are ----

// mean = base + scale * mean, rounded twice, as exchange/base.py does it; no base: scale * mean. The scale is not 1 where ranks
// are absent.
void scale_mean(float scale, const float* base, int64_t count, float* mean) {
  for (int64_t i = 0; i < count; ++i) mean[i] *= scale;
  if (base)
    for (int64_t i = 0; i < count; ++i) mean[i] += base[i];
}

class Host {
 public:
  Status open(OpKernelContext*) { return OkStatus(); }

#define PQ_ON_HOST(name) \
  template <class... Args> \
  int32_t name(Args... args) const { return pq_##name(args...); }
  PQ_ON_HOST(allgather_pack)
  PQ_ON_HOST(allgather_land)
  PQ_ON_HOST(two_phase_pack)
  PQ_ON_HOST(two_phase_mean)
  PQ_ON_HOST(two_phase_relay)
  PQ_ON_HOST(two_phase_land)
  PQ_ON_HOST(apply)
  PQ_ON_HOST(rebase)
  PQ_ON_HOST(gather)
  PQ_ON_HOST(outer)
#undef PQ_ON_HOST
  int32_t scale(float scale, const float* base, int64_t count, float* mean) const {
    scale_mean(scale, base, count, mean);
    return PQ_OK;
  }
  int32_t copy(void* to, const void* from, int64_t nbytes) const {
    std::memcpy(to, from, (size_t)nbytes);
    return PQ_OK;
  }
  // anchor[begin, begin + n) += mean[begin, begin + n).
  Status move(const float* mean, int64_t begin, int64_t n, const Tensor& anchor) const {
    return anchor.dtype() == DT_DOUBLE ? add(mean + begin, n, (double*)data_of(anchor) + begin)
                                       : add(mean + begin, n, floats_of(anchor) + begin);
  }
  Status distance(OpKernelContext*, const pq_source* source, int64_t start, int64_t count, const float* center, double* distance) const {
    return check(pq_distance(source, start, count, center, distance), "distance");
  }
 private:
  template <class T>
  static Status add(const float* mean, int64_t n, T* anchor) {
    for (int64_t i = 0; i < n; ++i) anchor[i] += (T)mean[i];
    return OkStatus();
  }
};

// Numbers in the memory of a GPU, on the stream that TensorFlow puts its own work on.
class Device {
 public:
  Status open(OpKernelContext* context) {
    kernels_ = g_kernels.load();
    if (!kernels_) return FailedPrecondition("pqasgd_horovod: the kernels for GPUs were not loaded");
    const auto* info = context->device()->tensorflow_accelerator_device_info();
    if (info) index_ = info->gpu_id;  // else it is a CPU, which plays the first GPU
    const DeviceContext* device = context->op_device_context();
    if (device && device->stream()) stream_ = device->stream()->platform_specific_handle().stream;
    return OkStatus();
  }

#define PQ_ON_DEVICE_(name) \
  template <class... Args> \
  int32_t name(Args... args) const { return kernels_->name(index_, stream_, args...); }
  PQ_FOR_EACH_KERNEL(PQ_ON_DEVICE_)
#undef PQ_ON_DEVICE_

  // A kernel writes the anchor, and what it has written to a segment: that is the anchor, too.
  Status move(const float* mean, int64_t begin, int64_t n, const Tensor& anchor) const {
    Source target;
    TF_RETURN_IF_ERROR(target.add(anchor));
    TF_RETURN_IF_ERROR(target.subtract(anchor, 0));
    return check(apply(mean + begin, begin, n, target.get()), "apply");
  }
  // It is rare: the host does it.
  Status distance(OpKernelContext* context, const pq_source* source, int64_t start, int64_t count, const float* center,
                  double* distance) const {
    Tensor gathered;
    std::vector<float> numbers, center_on_host;
    TF_RETURN_IF_ERROR(context->allocate_temp(DT_FLOAT, {count}, &gathered));
    TF_RETURN_IF_ERROR(check(gather(source, start, count, data_of(gathered), (int32_t)PQ_F32), "distance"));
    TF_RETURN_IF_ERROR(read(floats_of(gathered), count, &numbers));
    TF_RETURN_IF_ERROR(read(center, count, &center_on_host));
    const pq_segment segment{numbers.data(), count, PQ_F32, 0};
    const int64_t offsets[2] = {0, count};
    const pq_source on_host{&segment, offsets, 1, nullptr, PQ_F32, 0, nullptr, nullptr};
    return Host().distance(context, &on_host, 0, count, center_on_host.data(), distance);
  }

 private:
  Status read(const float* numbers, int64_t count, std::vector<float>* on_host) const {
    on_host->resize((size_t)count);
    return check(copy(on_host->data(), numbers, count * (int64_t)sizeof(float)), "copy");
  }

  const Kernels* kernels_ = nullptr;
  int32_t index_ = 0;
  pq_stream stream_ = nullptr;
};

// A kernel for numbers of a Host or a Device; on a GPU the inputs and outputs that `in_host_memory` names are in host memory. With
// the label that of a GPU runs on a CPU: for tests, with kernels that do.
#define PQ_REGISTER(name, Op, in_host_memory)                                                     \
  REGISTER_KERNEL_BUILDER(Name(name).Device(DEVICE_CPU), Op<Host>);                               \
  REGISTER_KERNEL_BUILDER(Name(name).Device(DEVICE_GPU) in_host_memory, Op<Device>);              \
  REGISTER_KERNEL_BUILDER(Name(name).Device(DEVICE_CPU).Label("pqasgd_gpu"), Op<Device>)

// Of a GPU too they take time: they wait for it, and TensorFlow is to go on meanwhile.
class NumbersOp : public OpKernel {
 public:
  using OpKernel::OpKernel;
  bool IsExpensive() override { return true; }
};

// Parts of float32 variables that nothing but these ops reads or writes during a round, each bucket its own.
class Part {
 public:
  // `input` is that of the handle.
  Status open(OpKernelContext* context, int input, int64_t offset, int64_t count, const char* name) {
    TF_RETURN_IF_ERROR(LookupResource(context, HandleFromInput(context, input), &variable_));
    tf_shared_lock lock(*variable_->mu());
    tensor_ = *variable_->tensor();
    if (tensor_.dtype() != DT_FLOAT || offset < 0 || offset + count > tensor_.NumElements())
      return InvalidArgument(name, " has ", tensor_.NumElements(), " elements; ", offset + count, " float32 ones are needed");
    data_ = (float*)data_of(tensor_) + offset;
    return OkStatus();
  }
  float* data() const { return data_; }

 private:
  core::RefCountPtr<Var> variable_;
  Tensor tensor_;  // it keeps the memory
  float* data_ = nullptr;
};

// What was not sent before, and what is not sent this time: two of them, or none.
class Residuals {
 public:
  // `first` is the input that the variables begin at.
  Status open(OpKernelContext* context, int first, int count, int64_t offset, int64_t num_elements) {
    if (count == 0) return OkStatus();
    for (int i = 0; i < 2; ++i) TF_RETURN_IF_ERROR(parts_[i].open(context, first + i, offset, num_elements, "a residual"));
    return OkStatus();
  }
  const float* kept() const { return parts_[0].data(); }
  float* next() const { return parts_[1].data(); }

 private:
  Part parts_[2];
};

Status source_from(OpKernelContext* context, int64_t anchor_offset, Source* source) {
  OpInputList tensors, anchors;
  TF_RETURN_IF_ERROR(context->input_list("tensors", &tensors));
  TF_RETURN_IF_ERROR(context->input_list("anchors", &anchors));
  for (const Tensor& tensor : tensors) TF_RETURN_IF_ERROR(source->add(tensor));
  return anchors.size() ? source->subtract(anchors[0], anchor_offset) : OkStatus();
}

// What all messages of a rank have in common; `number` is the attribute that counts what they are about.
class MessageOp : public NumbersOp {
 public:
  MessageOp(OpKernelConstruction* context, const char* number) : NumbersOp(context) {
    std::vector<int64_t> codec;
    int64_t bucket = 0, rank = 0, size = 0, digest = 0, seed = 0;
    OP_REQUIRES_OK(context, context->GetAttr("codec", &codec));
    OP_REQUIRES_OK(context, context->GetAttr(number, &bucket));
    OP_REQUIRES_OK(context, context->GetAttr("rank", &rank));
    OP_REQUIRES_OK(context, context->GetAttr("size", &size));
    OP_REQUIRES_OK(context, context->GetAttr("digest", &digest));
    OP_REQUIRES_OK(context, context->GetAttr("seed", &seed));
    OP_REQUIRES_OK(context, codec_from(codec, &codec_));
    OP_REQUIRES(context, size > 0 && rank >= 0 && rank < size, InvalidArgument("rank is ", rank, " of ", size));
    bucket_.bucket = (uint32_t)bucket;
    bucket_.rank = (int32_t)rank;
    bucket_.size = (int32_t)size;
    bucket_.digest = (uint64_t)digest;
    bucket_.seed = (uint64_t)seed;
  }

 protected:
  Status begin(OpKernelContext* context, pq_bucket* bucket) const {
    *bucket = bucket_;
    int64_t step = 0, round = 0;
    TF_RETURN_IF_ERROR(scalar_from(context, "step", &step));
    TF_RETURN_IF_ERROR(scalar_from(context, "round", &round));
    bucket->step = (uint64_t)step;
    bucket->round = (uint64_t)round;
    return OkStatus();
  }

  pq_codec codec_{};
  pq_bucket bucket_{};
};

class BucketOp : public MessageOp {
 public:
  explicit BucketOp(OpKernelConstruction* context) : MessageOp(context, "bucket") {
    std::vector<int64_t> second;
    OP_REQUIRES_OK(context, context->GetAttr("second_codec", &second));
    OP_REQUIRES_OK(context, context->GetAttr("num_elements", &bucket_.num_elements));
    OP_REQUIRES_OK(context, context->GetAttr("shards", &shards_));
    OP_REQUIRES_OK(context, codec_from(second, &second_codec_));
    OP_REQUIRES(context, shards_.empty() || (int64_t)shards_.size() == bucket_.size + 1,
                InvalidArgument("shards has ", shards_.size(), " limits; it must have ", bucket_.size + 1));
  }

 protected:
  bool two_phase() const { return !shards_.empty(); }
  int64_t shard_elements(int64_t rank) const { return shards_[(size_t)rank + 1] - shards_[(size_t)rank]; }

  pq_codec second_codec_{};
  std::vector<int64_t> shards_;
};

#define PQ_BUCKET_ATTRS                                                                                        \
  Attr("codec: list(int)").Attr("second_codec: list(int)").Attr("bucket: int").Attr("num_elements: int").Attr( \
      "rank: int").Attr("size: int").Attr("digest: int").Attr("seed: int").Attr("shards: list(int)")
#define PQ_SOURCE_ATTRS                                                                                                   \
  Attr("dtypes: list({float, double, half, bfloat16}) >= 1").Attr("anchor_dtypes: list({float, double}) >= 0").Attr("start: int") \
      .Attr("anchor_offset: int")

Status bytes_and_flags(InferenceContext* c) {
  c->set_output(0, c->Vector(InferenceContext::kUnknownDim));
  c->set_output(1, c->Scalar());
  return OkStatus();
}

// ---- the two halves of an exchange ----

REGISTER_OP("PqasgdPack")
    .Input("step: int64")
    .Input("round: int64")
    .Input("known: num_known * int32")
    .Input("tensors: dtypes")
    .Input("anchors: anchor_dtypes")
    .Input("residuals: num_residuals * resource")
    .Output("messages: uint8")
    .Output("flags: int32")
    .PQ_BUCKET_ATTRS.PQ_SOURCE_ATTRS.Attr("num_residuals: int >= 0")
    .Attr("num_known: int >= 0")
    .SetIsStateful()
    .SetShapeFn(bytes_and_flags);

template <class Where>
class PackOp : public BucketOp {
 public:
  explicit PackOp(OpKernelConstruction* context) : BucketOp(context) {
    OP_REQUIRES_OK(context, context->GetAttr("start", &start_));
    OP_REQUIRES_OK(context, context->GetAttr("anchor_offset", &anchor_offset_));
    OP_REQUIRES_OK(context, context->GetAttr("num_residuals", &num_residuals_));
    if (two_phase()) {
      for (int32_t owner = 0; owner < bucket_.size; ++owner)
        if (owner != bucket_.rank) nbytes_ += PQ_HEADER_NBYTES + pq_payload_nbytes(&codec_, shard_elements(owner));
    } else {
      nbytes_ = PQ_HEADER_NBYTES + pq_payload_nbytes(&codec_, bucket_.num_elements);
    }
  }

  void Compute(OpKernelContext* context) override {
    Where where;
    OP_REQUIRES_OK(context, where.open(context));
    pq_bucket bucket;
    Source source;
    Tensor *messages = nullptr, *flags = nullptr;
    OP_REQUIRES_OK(context, begin(context, &bucket));
    OP_REQUIRES_OK(context, source_from(context, anchor_offset_, &source));
    Residuals residuals;
    OP_REQUIRES_OK(context, residuals.open(context, context->num_inputs() - num_residuals_, num_residuals_, anchor_offset_,
                                           start_ + bucket.num_elements));
    source.feed_back(residuals.kept(), residuals.next());
    OpInputList known;
    OP_REQUIRES_OK(context, context->input_list("known", &known));
    for (const Tensor& flags_known : known) bucket.flags |= flags_known.flat<int32>()(0) & kHeaderFlags;
    OP_REQUIRES_OK(context, context->allocate_output("messages", {nbytes_}, &messages));
    OP_REQUIRES_OK(context, context->allocate_output("flags", {}, &flags));
    uint8_t* out = messages->flat<uint8>().data();
    const int32_t status = two_phase()
                               ? where.two_phase_pack(&codec_, &bucket, shards_.data(), source.get(), start_, out, nbytes_)
                               : where.allgather_pack(&codec_, &bucket, source.get(), start_, out, nbytes_);
    OP_REQUIRES_OK(context, check(status, "encode"));
    flags->scalar<int32>()() = status;
  }

 private:
  int64_t start_ = 0, anchor_offset_ = 0, nbytes_ = 0;
  int num_residuals_ = 0;
};
PQ_REGISTER("PqasgdPack", PackOp,
           .HostMemory("step").HostMemory("round").HostMemory("known").HostMemory("residuals").HostMemory("messages")
              .HostMemory("flags"));

REGISTER_OP("PqasgdMean")
    .Input("step: int64")
    .Input("round: int64")
    .Input("flags: int32")
    .Input("received: uint8")
    .Input("tensors: dtypes")
    .Input("anchors: anchor_dtypes")
    .Input("residuals: num_residuals * resource")
    .Input("mean_residuals: num_mean_residuals * resource")
    .Output("message: uint8")
    .Output("new_flags: int32")
    .Output("mean: float")
    .PQ_BUCKET_ATTRS.PQ_SOURCE_ATTRS.Attr("num_residuals: int >= 0")
    .Attr("num_mean_residuals: int >= 0")
    .Attr("offset: int")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      c->set_output(2, c->Vector(InferenceContext::kUnknownDim));
      return bytes_and_flags(c);
    });

template <class Where>
class MeanOp : public BucketOp {
 public:
  explicit MeanOp(OpKernelConstruction* context) : BucketOp(context) {
    OP_REQUIRES_OK(context, context->GetAttr("start", &start_));
    OP_REQUIRES_OK(context, context->GetAttr("anchor_offset", &anchor_offset_));
    OP_REQUIRES_OK(context, context->GetAttr("num_residuals", &num_residuals_));
    OP_REQUIRES_OK(context, context->GetAttr("num_mean_residuals", &num_mean_residuals_));
    OP_REQUIRES_OK(context, context->GetAttr("offset", &offset_));
    OP_REQUIRES(context, two_phase(), InvalidArgument("shards is empty; a two-phase exchange has some"));
    count_ = shard_elements(bucket_.rank);
    nbytes_ = PQ_HEADER_NBYTES + pq_payload_nbytes(&second_codec_, count_);
  }

  void Compute(OpKernelContext* context) override {
    Where where;
    OP_REQUIRES_OK(context, where.open(context));
    pq_bucket bucket;
    Source source;
    Tensor *message = nullptr, *new_flags = nullptr, *mean = nullptr;
    const Tensor *flags, *received;
    OP_REQUIRES_OK(context, begin(context, &bucket));
    OP_REQUIRES_OK(context, source_from(context, anchor_offset_, &source));
    Residuals residuals, of_means;
    const int of_means_from = context->num_inputs() - num_mean_residuals_;
    OP_REQUIRES_OK(context, residuals.open(context, of_means_from - num_residuals_, num_residuals_, anchor_offset_,
                                           start_ + bucket.num_elements));
    OP_REQUIRES_OK(context, of_means.open(context, of_means_from, num_mean_residuals_, offset_ + shards_[(size_t)bucket.rank], count_));
    source.feed_back(residuals.kept(), residuals.next());
    OP_REQUIRES_OK(context, context->input("flags", &flags));
    OP_REQUIRES_OK(context, context->input("received", &received));
    OP_REQUIRES_OK(context, context->allocate_output("message", {nbytes_}, &message));
    OP_REQUIRES_OK(context, context->allocate_output("new_flags", {}, &new_flags));
    OP_REQUIRES_OK(context, context->allocate_output("mean", {count_}, &mean));
    const int32_t status = where.two_phase_mean(
        &codec_, &second_codec_, &bucket, shards_.data(), flags->flat<int32>()(0), received->flat<uint8>().data(),
        received->NumElements(), source.get(), start_, of_means.kept(), of_means.next(), mean->flat<float>().data(),
        message->flat<uint8>().data(), nbytes_);
    OP_REQUIRES_OK(context, check(status, "mean"));
    new_flags->scalar<int32>()() = status;
  }

 private:
  int64_t start_ = 0, anchor_offset_ = 0, offset_ = 0, count_ = 0, nbytes_ = 0;
  int num_residuals_ = 0, num_mean_residuals_ = 0;
};
PQ_REGISTER("PqasgdMean", MeanOp,
           .HostMemory("step").HostMemory("round").HostMemory("flags").HostMemory("received").HostMemory("residuals")
              .HostMemory("mean_residuals").HostMemory("message").HostMemory("new_flags"));

// Writes base + scale * mean, or scale * mean, to a part of `arriving`, which nothing but these ops ever reads or writes.
REGISTER_OP("PqasgdLand")
    .Input("step: int64")
    .Input("round: int64")
    .Input("received: uint8")
    .Input("scale: float")
    .Input("bases: base_dtypes")
    .Input("arriving: resource")
    .Output("flags: int32")
    .PQ_BUCKET_ATTRS.Attr("base_dtypes: list({float}) >= 0")
    .Attr("offset: int")
    .Attr("explainer: int")
    .SetIsStateful()
    .SetShapeFn(shape_inference::ScalarShape);

template <class Where>
class LandOp : public BucketOp {
 public:
  explicit LandOp(OpKernelConstruction* context) : BucketOp(context) {
    OP_REQUIRES_OK(context, context->GetAttr("offset", &offset_));
    OP_REQUIRES_OK(context, context->GetAttr("explainer", &explainer_));
  }

  void Compute(OpKernelContext* context) override {
    Where where;
    OP_REQUIRES_OK(context, where.open(context));
    pq_bucket bucket;
    OpInputList bases;
    const Tensor* received;
    Tensor* flags = nullptr;
    core::RefCountPtr<Var> arriving;
    OP_REQUIRES_OK(context, begin(context, &bucket));
    OP_REQUIRES_OK(context, context->input("received", &received));
    OP_REQUIRES_OK(context, context->input_list("bases", &bases));
    OP_REQUIRES_OK(context, LookupResource(context, HandleFromInput(context, context->num_inputs() - 1), &arriving));
    OP_REQUIRES_OK(context, context->allocate_output("flags", {}, &flags));
    float scale = 1;
    OP_REQUIRES_OK(context, scalar_from(context, "scale", &scale));
    const int64_t end = offset_ + bucket.num_elements;
    const uint8_t* bytes = received->flat<uint8>().data();
    int32_t status = 0;
    {
      tf_shared_lock lock(*arriving->mu());  // buckets land beside each other
      Tensor* destination = arriving->tensor();
      OP_REQUIRES(context,
                  destination->dtype() == DT_FLOAT && destination->NumElements() >= end &&
                      (bases.size() == 0 || bases[0].NumElements() >= end),
                  InvalidArgument("arriving and base must have at least ", end, " float32 elements"));
      float* mean = floats_of(*destination) + offset_;
      const float* base = bases.size() ? bases[0].flat<float>().data() + offset_ : nullptr;
      const float* added = scale == 1 ? base : nullptr;
      status = two_phase() ? where.two_phase_land(&second_codec_, &bucket, shards_.data(), bytes, received->NumElements(), added, mean)
                           : where.allgather_land(&codec_, &bucket, bytes, received->NumElements(), added, mean);
      if (status == 0 && scale != 1) status = where.scale(scale, base, bucket.num_elements, mean);
    }
    OP_REQUIRES_OK(context, check(status, "decode"));
    if (status) OP_REQUIRES_OK(context, explain(explainer_, status, bytes, received->NumElements()));
    flags->scalar<int32>()() = status;
  }

 private:
  int64_t offset_ = 0, explainer_ = 0;
};
PQ_REGISTER("PqasgdLand", LandOp,
           .HostMemory("step").HostMemory("round").HostMemory("received").HostMemory("scale").HostMemory("arriving")
              .HostMemory("flags"));

// The message of an owner that has taken its node's mean to other nodes; `flags` and a part of `arriving` are what came of it.
REGISTER_OP("PqasgdRelay")
    .Input("step: int64")
    .Input("round: int64")
    .Input("flags: int32")
    .Input("arriving: resource")
    .Output("message: uint8")
    .PQ_BUCKET_ATTRS.Attr("offset: int")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      c->set_output(0, c->Vector(InferenceContext::kUnknownDim));
      return OkStatus();
    });

template <class Where>
class RelayOp : public BucketOp {
 public:
  explicit RelayOp(OpKernelConstruction* context) : BucketOp(context) {
    OP_REQUIRES_OK(context, context->GetAttr("offset", &offset_));
  }

  void Compute(OpKernelContext* context) override {
    Where where;
    OP_REQUIRES_OK(context, where.open(context));
    pq_bucket bucket;
    const Tensor* flags;
    Tensor* message = nullptr;
    core::RefCountPtr<Var> arriving;
    const int64_t count = bucket_.num_elements, nbytes = PQ_HEADER_NBYTES + count * (int64_t)sizeof(float);
    OP_REQUIRES_OK(context, begin(context, &bucket));
    OP_REQUIRES_OK(context, context->input("flags", &flags));
    OP_REQUIRES_OK(context, LookupResource(context, HandleFromInput(context, context->num_inputs() - 1), &arriving));
    OP_REQUIRES_OK(context, context->allocate_output("message", {nbytes}, &message));
    tf_shared_lock lock(*arriving->mu());
    const Tensor* mean = arriving->tensor();
    OP_REQUIRES(context, mean->dtype() == DT_FLOAT && mean->NumElements() >= offset_ + count,
                InvalidArgument("arriving must have at least ", offset_ + count, " float32 elements"));
    OP_REQUIRES_OK(context, check(where.two_phase_relay(&bucket, flags->flat<int32>()(0), floats_of(*mean) + offset_, count,
                                                        message->flat<uint8>().data(), nbytes),
                                  "relay"));
  }

 private:
  int64_t offset_ = 0;
};
PQ_REGISTER("PqasgdRelay", RelayOp,
           .HostMemory("step").HostMemory("round").HostMemory("flags").HostMemory("arriving").HostMemory("message"));

// ---- low rank: between the exchanges of the two factors; see exchange/low_rank.py ----

class LowRankOp : public OpKernel {
 public:
  explicit LowRankOp(OpKernelConstruction* context) : OpKernel(context) {
    std::vector<int64_t> shapes;
    int64_t rank = 0;
    OP_REQUIRES_OK(context, context->GetAttr("matrices", &shapes));
    OP_REQUIRES_OK(context, context->GetAttr("approximation_rank", &rank));
    OP_REQUIRES_OK(context, context->GetAttr("offset", &offset_));
    OP_REQUIRES_OK(context, context->GetAttr("left_offset", &left_offset_));
    OP_REQUIRES_OK(context, context->GetAttr("right_offset", &right_offset_));
    OP_REQUIRES(context, shapes.size() % 2 == 0, InvalidArgument("matrices has ", shapes.size(), " numbers; it must have pairs"));
    OP_REQUIRES(context, rank >= 1 && rank <= PQ_MAX_APPROXIMATION_RANK, InvalidArgument("approximation_rank is ", rank));
    rank_ = (int32_t)rank;
    for (size_t i = 0; i < shapes.size(); i += 2) {
      matrices_.push_back({shapes[i], shapes[i + 1]});
      rows_.push_back(shapes[i]);
      cols_.push_back(shapes[i + 1]);
      elements_ += shapes[i] * shapes[i + 1];
      left_elements_ += rank * shapes[i];
      right_elements_ += rank * shapes[i + 1];
    }
    count_ = (int64_t)matrices_.size();
  }

 protected:
  std::vector<pq_matrix> matrices_;
  std::vector<int64_t> rows_, cols_;
  int32_t rank_ = 0;
  int64_t count_ = 0, elements_ = 0, left_elements_ = 0, right_elements_ = 0;
  int64_t offset_ = 0, left_offset_ = 0, right_offset_ = 0;  // of the bucket in vector, left factors and right factors
};

#define PQ_LOW_RANK_ATTRS \
  Attr("matrices: list(int)").Attr("approximation_rank: int").Attr("offset: int").Attr("left_offset: int").Attr("right_offset: int")

REGISTER_OP("PqasgdProject")
    .Input("tensors: dtypes")
    .Input("anchors: anchor_dtypes")
    .Input("starts: resource")
    .Input("residuals: num_residuals * resource")
    .Output("own_left: float")
    .PQ_LOW_RANK_ATTRS.PQ_SOURCE_ATTRS.Attr("num_residuals: int >= 2")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      c->set_output(0, c->Vector(InferenceContext::kUnknownDim));
      return OkStatus();
    });

class ProjectOp : public LowRankOp {
 public:
  explicit ProjectOp(OpKernelConstruction* context) : LowRankOp(context) {
    OP_REQUIRES_OK(context, context->GetAttr("start", &start_));
    OP_REQUIRES_OK(context, context->GetAttr("anchor_offset", &anchor_offset_));
  }
  void Compute(OpKernelContext* context) override {
    Source source;
    Residuals residuals;
    Part starts;
    Tensor* own_left = nullptr;
    OP_REQUIRES_OK(context, source_from(context, anchor_offset_, &source));
    const int first = context->num_inputs() - 2;
    OP_REQUIRES_OK(context, residuals.open(context, first, 2, anchor_offset_, start_ + elements_));
    OP_REQUIRES_OK(context, starts.open(context, first - 1, right_offset_, right_elements_, "starts"));
    source.feed_back(residuals.kept(), residuals.next());
    OP_REQUIRES_OK(context, context->allocate_output(0, {left_elements_}, &own_left));
    OP_REQUIRES_OK(context, check(pq_low_rank_project(matrices_.data(), count_, rank_, source.get(), start_, starts.data(),
                                                      own_left->flat<float>().data()),
                                  "project"));
  }

 private:
  int64_t start_ = 0, anchor_offset_ = 0;
};
REGISTER_KERNEL_BUILDER(Name("PqasgdProject").Device(DEVICE_CPU), ProjectOp);

// Where the left factor's mean is wrong there is no right factor: zeros are sent, and nobody uses what arrives.
REGISTER_OP("PqasgdBackproject")
    .Input("flags: int32")
    .Input("left: resource")
    .Input("next_residual: resource")
    .Output("own_right: float")
    .PQ_LOW_RANK_ATTRS.SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      c->set_output(0, c->Vector(InferenceContext::kUnknownDim));
      return OkStatus();
    });

class BackprojectOp : public LowRankOp {
 public:
  using LowRankOp::LowRankOp;
  void Compute(OpKernelContext* context) override {
    Part left, matrices;
    Tensor* own_right = nullptr;
    OP_REQUIRES_OK(context, left.open(context, 1, left_offset_, left_elements_, "left"));
    OP_REQUIRES_OK(context, matrices.open(context, 2, offset_, elements_, "next_residual"));
    OP_REQUIRES_OK(context, context->allocate_output(0, {right_elements_}, &own_right));
    float* right = own_right->flat<float>().data();
    if (context->input(0).flat<int32>()(0)) {
      std::fill(right, right + right_elements_, 0.0f);
      return;
    }
    OP_REQUIRES_OK(context, check(pq_orthogonalize(rows_.data(), count_, rank_, left.data()), "orthogonalize"));
    OP_REQUIRES_OK(context, check(pq_low_rank_backproject(matrices_.data(), count_, rank_, matrices.data(), left.data(), right),
                                  "backproject"));
  }
};
REGISTER_KERNEL_BUILDER(Name("PqasgdBackproject").Device(DEVICE_CPU), BackprojectOp);

REGISTER_OP("PqasgdReconstruct")
    .Input("step: int64")
    .Input("scale: float")
    .Input("left_flags: int32")
    .Input("right_flags: int32")
    .Input("own_right: float")
    .Input("bases: base_dtypes")
    .Input("left: resource")
    .Input("right: resource")
    .Input("arriving: resource")
    .Input("next_residual: resource")
    .Input("next_starts: resource")
    .Output("flags: int32")
    .PQ_LOW_RANK_ATTRS.Attr("base_dtypes: list({float}) >= 0")
    .Attr("seed: int")
    .Attr("first: int")
    .SetIsStateful()
    .SetShapeFn(shape_inference::ScalarShape);

class ReconstructOp : public LowRankOp {
 public:
  explicit ReconstructOp(OpKernelConstruction* context) : LowRankOp(context) {
    OP_REQUIRES_OK(context, context->GetAttr("seed", &seed_));
    OP_REQUIRES_OK(context, context->GetAttr("first", &first_));
  }
  void Compute(OpKernelContext* context) override {
    Part left, right, arriving, rest, next;
    OpInputList bases;
    const Tensor* own_right = nullptr;
    Tensor* flags = nullptr;
    int64_t step = 0;
    int32_t of_left = 0, of_right = 0;
    float scale = 1;
    OP_REQUIRES_OK(context, scalar_from(context, "step", &step));
    OP_REQUIRES_OK(context, scalar_from(context, "scale", &scale));
    OP_REQUIRES_OK(context, scalar_from(context, "left_flags", &of_left));
    OP_REQUIRES_OK(context, scalar_from(context, "right_flags", &of_right));
    OP_REQUIRES_OK(context, context->input("own_right", &own_right));
    OP_REQUIRES_OK(context, context->input_list("bases", &bases));
    const int handles = context->num_inputs() - 5;
    OP_REQUIRES_OK(context, left.open(context, handles, left_offset_, left_elements_, "left"));
    OP_REQUIRES_OK(context, right.open(context, handles + 1, right_offset_, right_elements_, "right"));
    OP_REQUIRES_OK(context, arriving.open(context, handles + 2, offset_, elements_, "arriving"));
    OP_REQUIRES_OK(context, rest.open(context, handles + 3, offset_, elements_, "next_residual"));
    OP_REQUIRES_OK(context, next.open(context, handles + 4, right_offset_, right_elements_, "next_starts"));
    OP_REQUIRES(context, own_right->NumElements() == right_elements_ && (bases.size() == 0 || bases[0].NumElements() >= offset_ + elements_),
                InvalidArgument("own_right and base do not fit the matrices"));
    OP_REQUIRES_OK(context, context->allocate_output("flags", {}, &flags));
    flags->scalar<int32>()() = of_left | of_right;
    if (of_left | of_right) {
      std::fill(arriving.data(), arriving.data() + elements_, std::numeric_limits<float>::quiet_NaN());
      return;
    }
    const float* base = bases.size() ? bases[0].flat<float>().data() + offset_ : nullptr;
    OP_REQUIRES_OK(context, check(pq_low_rank_reconstruct(matrices_.data(), count_, rank_, left.data(), own_right->flat<float>().data(),
                                                          right.data(), scale == 1 ? base : nullptr, arriving.data(), rest.data()),
                                  "reconstruct"));
    if (scale != 1) scale_mean(scale, base, elements_, arriving.data());
    std::copy(right.data(), right.data() + right_elements_, next.data());
    OP_REQUIRES_OK(context, check(pq_orthogonalize(cols_.data(), count_, rank_, next.data()), "orthogonalize"));
    OP_REQUIRES_OK(context, check(pq_low_rank_redraw(matrices_.data(), count_, rank_, (uint64_t)seed_, (uint64_t)step, (uint32_t)first_,
                                                     next.data()),
                                  "redraw"));
  }

 private:
  int64_t seed_ = 0, first_ = 0;
};
REGISTER_KERNEL_BUILDER(Name("PqasgdReconstruct").Device(DEVICE_CPU), ReconstructOp);

// ---- rows of a table; see exchange/rows.py ----

class RowsOp : public MessageOp {
 public:
  explicit RowsOp(OpKernelConstruction* context) : MessageOp(context, "table") {
    OP_REQUIRES_OK(context, context->GetAttr("num_rows", &table_.num_rows));
    OP_REQUIRES_OK(context, context->GetAttr("row_size", &table_.row_size));
  }

 protected:
  pq_table table_{};
};

#define PQ_ROWS_ATTRS                                                                                                    \
  Attr("codec: list(int)").Attr("table: int").Attr("num_rows: int").Attr("row_size: int").Attr("rank: int").Attr("size: int") \
      .Attr("digest: int").Attr("seed: int")

// `kept` is what was not sent of these rows before, or empty; then nothing is left either.
REGISTER_OP("PqasgdPackRows")
    .Input("step: int64")
    .Input("round: int64")
    .Input("rows: int64")
    .Input("values: dtype")
    .Input("kept: float")
    .Output("message: uint8")
    .Output("left: float")
    .PQ_ROWS_ATTRS.Attr("dtype: {float, double, half, bfloat16}")
    .SetShapeFn([](InferenceContext* c) {
      c->set_output(0, c->Vector(InferenceContext::kUnknownDim));
      c->set_output(1, c->input(4));
      return OkStatus();
    });

class PackRowsOp : public RowsOp {
 public:
  using RowsOp::RowsOp;
  void Compute(OpKernelContext* context) override {
    pq_bucket bucket;
    Source source;
    const Tensor *rows, *values, *kept;
    Tensor *message = nullptr, *left = nullptr;
    OP_REQUIRES_OK(context, begin(context, &bucket));
    OP_REQUIRES_OK(context, context->input("rows", &rows));
    OP_REQUIRES_OK(context, context->input("values", &values));
    OP_REQUIRES_OK(context, context->input("kept", &kept));
    const int64_t count = rows->NumElements();
    bucket.num_elements = count * table_.row_size;
    OP_REQUIRES(context,
                values->NumElements() == bucket.num_elements && (kept->NumElements() == 0 || kept->NumElements() == bucket.num_elements),
                InvalidArgument("values have ", values->NumElements(), " elements; ", count, " rows have ", bucket.num_elements));
    OP_REQUIRES_OK(context, source.add(*values));
    OP_REQUIRES_OK(context, context->allocate_output("left", kept->shape(), &left));
    if (kept->NumElements()) source.feed_back(kept->flat<float>().data(), left->flat<float>().data());
    const int64_t nbytes = pq_rows_nbytes(&codec_, &table_, count);
    OP_REQUIRES_OK(context, check(nbytes < 0 ? PQ_BAD_ARGUMENT : PQ_OK, "rows"));
    OP_REQUIRES_OK(context, context->allocate_output("message", {PQ_HEADER_NBYTES + nbytes}, &message));
    OP_REQUIRES_OK(context, check(pq_rows_pack(&codec_, &bucket, &table_, count, rows->flat<int64_t>().data(), source.get(),
                                               message->flat<uint8>().data(), PQ_HEADER_NBYTES + nbytes),
                                  "encode"));
  }
};
REGISTER_KERNEL_BUILDER(Name("PqasgdPackRows").Device(DEVICE_CPU), PackRowsOp);

REGISTER_OP("PqasgdLandRows")
    .Input("step: int64")
    .Input("round: int64")
    .Input("received: uint8")
    .Input("scale: float")
    .Output("rows: int64")
    .Output("values: float")
    .Output("flags: int32")
    .PQ_ROWS_ATTRS.Attr("explainer: int")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      int64_t row_size = 0;
      TF_RETURN_IF_ERROR(c->GetAttr("row_size", &row_size));
      c->set_output(0, c->Vector(InferenceContext::kUnknownDim));
      c->set_output(1, c->Matrix(InferenceContext::kUnknownDim, row_size));
      c->set_output(2, c->Scalar());
      return OkStatus();
    });

class LandRowsOp : public RowsOp {
 public:
  explicit LandRowsOp(OpKernelConstruction* context) : RowsOp(context) {
    OP_REQUIRES_OK(context, context->GetAttr("explainer", &explainer_));
  }
  void Compute(OpKernelContext* context) override {
    pq_bucket bucket;
    const Tensor* received;
    Tensor *rows = nullptr, *values = nullptr, *flags = nullptr;
    float scale = 1;
    OP_REQUIRES_OK(context, begin(context, &bucket));
    OP_REQUIRES_OK(context, scalar_from(context, "scale", &scale));
    OP_REQUIRES_OK(context, context->input("received", &received));
    OP_REQUIRES_OK(context, context->allocate_output("flags", {}, &flags));
    const uint8_t* bytes = received->flat<uint8>().data();
    const int64_t nbytes = received->NumElements();
    int64_t total = 0, count = 0;
    std::vector<int64_t> all;
    int32_t status = pq_rows_total(&codec_, &bucket, &table_, bytes, nbytes, &total);
    if (!status) {
      all.resize((size_t)total);
      status = pq_rows_union(&codec_, &bucket, &table_, bytes, nbytes, all.data(), &count);
    }
    OP_REQUIRES_OK(context, check(status, "rows"));
    OP_REQUIRES_OK(context, context->allocate_output("rows", {count}, &rows));
    OP_REQUIRES_OK(context, context->allocate_output("values", {count, table_.row_size}, &values));
    if (!status) {
      std::copy(all.begin(), all.begin() + count, rows->flat<int64_t>().data());
      status = pq_rows_land(&codec_, &bucket, &table_, bytes, nbytes, count, all.data(), values->flat<float>().data());
      OP_REQUIRES_OK(context, check(status, "rows"));
      if (status == 0 && scale != 1) scale_mean(scale, nullptr, values->NumElements(), values->flat<float>().data());
    }
    if (status) OP_REQUIRES_OK(context, explain(explainer_, status, bytes, nbytes));
    flags->scalar<int32>()() = status;
  }

 private:
  int64_t explainer_ = 0;
};
REGISTER_KERNEL_BUILDER(Name("PqasgdLandRows").Device(DEVICE_CPU), LandRowsOp);

// ---- what all ranks have to say alike ----

REGISTER_OP("PqasgdVerdict")
    .Input("flags: n * int32")
    .Attr("n: int >= 0")
    .Attr("explainer: int")
    .SetIsStateful()
    .SetShapeFn(shape_inference::NoOutputs);

class VerdictOp : public OpKernel {
 public:
  explicit VerdictOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("explainer", &explainer_));
  }
  void Compute(OpKernelContext* context) override {
    OpInputList list;
    OP_REQUIRES_OK(context, context->input_list("flags", &list));
    int32_t all = 0;
    for (const Tensor& flags : list) all |= flags.flat<int32>()(0);
    if (all) OP_REQUIRES_OK(context, explain(explainer_, all, nullptr, 0));
  }

 private:
  int64_t explainer_ = 0;
};
REGISTER_KERNEL_BUILDER(Name("PqasgdVerdict").Device(DEVICE_CPU), VerdictOp);

// Raises unless the records that all ranks have sent are this rank's own, again and again.
REGISTER_OP("PqasgdAgree")
    .Input("own: int64")
    .Input("gathered: int64")
    .Attr("explainer: int")
    .SetIsStateful()
    .SetShapeFn(shape_inference::NoOutputs);

class AgreeOp : public OpKernel {
 public:
  explicit AgreeOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("explainer", &explainer_));
  }
  void Compute(OpKernelContext* context) override {
    const absl::string_view own = context->input(0).tensor_data(), all = context->input(1).tensor_data();
    bool same = !own.empty() && all.size() % own.size() == 0;
    for (size_t at = 0; same && at < all.size(); at += own.size()) same = !std::memcmp(own.data(), all.data() + at, own.size());
    if (!same) OP_REQUIRES_OK(context, explain(explainer_, 1, (const uint8_t*)all.data(), (int64_t)all.size()));
  }

 private:
  int64_t explainer_ = 0;
};
REGISTER_KERNEL_BUILDER(Name("PqasgdAgree").Device(DEVICE_CPU), AgreeOp);

// A 64-bit checksum of the bytes of each tensor: replicas that differ are to be found, not attackers.
REGISTER_OP("PqasgdDigest")
    .Input("tensors: dtypes")
    .Output("digests: int64")
    .Attr("dtypes: list(type) >= 1")
    .SetShapeFn([](InferenceContext* c) {
      c->set_output(0, c->Vector(c->num_inputs()));
      return OkStatus();
    });

class DigestOp : public OpKernel {
 public:
  using OpKernel::OpKernel;
  void Compute(OpKernelContext* context) override {
    Tensor* digests = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(0, {context->num_inputs()}, &digests));
    for (int i = 0; i < context->num_inputs(); ++i) {
      const absl::string_view bytes = context->input(i).tensor_data();
      uint64_t lanes[4] = {1, 2, 3, 4};
      size_t at = 0;
      for (; at + 32 <= bytes.size(); at += 32)
        for (int lane = 0; lane < 4; ++lane) lanes[lane] = mix(lanes[lane], bytes.data() + at + 8 * lane, 8);
      for (; at < bytes.size(); at += 8) lanes[0] = mix(lanes[0], bytes.data() + at, std::min<size_t>(8, bytes.size() - at));
      uint64_t all = bytes.size();
      for (uint64_t lane : lanes) all = mix(all, (const char*)&lane, 8);
      digests->flat<int64_t>()(i) = (int64_t)all;
    }
  }

 private:
  static uint64_t mix(uint64_t hash, const char* bytes, size_t n) {
    uint64_t x = 0;
    std::memcpy(&x, bytes, n);
    hash = (hash ^ x) * 0x9E3779B97F4A7C15u;
    return hash ^ hash >> 29;
  }
};
REGISTER_KERNEL_BUILDER(Name("PqasgdDigest").Device(DEVICE_CPU), DigestOp);

// ---- where means go ----

// A tensor to be overwritten in whole: the variable's own, or a new one where somebody still reads the old.
Status writable(OpKernelContext* context, Var* variable, Tensor** tensor) {
  *tensor = variable->tensor();
  if ((*tensor)->RefCountIsOne() || variable->copy_on_read_mode.load()) return OkStatus();
  Tensor fresh;
  TF_RETURN_IF_ERROR(context->allocate_temp((*tensor)->dtype(), (*tensor)->shape(), &fresh));
  **tensor = fresh;
  return OkStatus();
}

// A tensor to be changed in place: a copy where somebody still reads it.
template <class Where>
Status unshared(OpKernelContext* context, const Where& where, Tensor* tensor) {
  if (tensor->RefCountIsOne()) return OkStatus();
  Tensor copy;
  TF_RETURN_IF_ERROR(context->allocate_temp(tensor->dtype(), tensor->shape(), &copy));
  TF_RETURN_IF_ERROR(check(where.copy(data_of(copy), data_of(*tensor), (int64_t)tensor->TotalBytes()), "copy"));
  *tensor = copy;
  return OkStatus();
}

// After a round: of each bucket that has a mean, limits[i] to limits[i + 1] of which flags[i] is 0, the next residual is kept.
REGISTER_OP("PqasgdKeep")
    .Input("kept: resource")
    .Input("next: resource")
    .Input("flags: n * int32")
    .Attr("n: int >= 1")
    .Attr("limits: list(int)")
    .SetIsStateful()
    .SetShapeFn(shape_inference::NoOutputs);

template <class Where>
class KeepOp : public NumbersOp {
 public:
  explicit KeepOp(OpKernelConstruction* context) : NumbersOp(context) {
    OP_REQUIRES_OK(context, context->GetAttr("limits", &limits_));
    OP_REQUIRES(context, (int)limits_.size() == 2 * (context->num_inputs() - 2), InvalidArgument("limits must be two for each bucket"));
  }
  void Compute(OpKernelContext* context) override {
    Where where;
    OP_REQUIRES_OK(context, where.open(context));
    core::RefCountPtr<Var> kept, next;
    OP_REQUIRES_OK(context, LookupResource(context, HandleFromInput(context, 0), &kept));
    OP_REQUIRES_OK(context, LookupResource(context, HandleFromInput(context, 1), &next));
    mutex_lock kept_lock(*kept->mu());
    mutex_lock next_lock(*next->mu());
    bool all = limits_.front() == 0 && limits_.back() == kept->tensor()->NumElements();
    for (size_t i = 0; 2 * i < limits_.size(); ++i)
      all &= !context->input((int)i + 2).flat<int32>()(0) && (i == 0 || limits_[2 * i] == limits_[2 * i - 1]);
    if (all) {  // as is usual: no walk over memory
      std::swap(*kept->tensor(), *next->tensor());
      Tensor* unused;
      OP_REQUIRES_OK(context, writable(context, next.get(), &unused));
      return;
    }
    OP_REQUIRES_OK(context, unshared(context, where, kept->tensor()));
    float* to = kept->tensor()->flat<float>().data();
    const float* from = next->tensor()->flat<float>().data();
    for (size_t i = 0; 2 * i < limits_.size(); ++i)
      if (!context->input((int)i + 2).flat<int32>()(0))
        OP_REQUIRES_OK(context, check(where.copy(to + limits_[2 * i], from + limits_[2 * i],
                                                 (limits_[2 * i + 1] - limits_[2 * i]) * (int64_t)sizeof(float)),
                                      "copy"));
  }

 private:
  std::vector<int64_t> limits_;
};
PQ_REGISTER("PqasgdKeep", KeepOp, .HostMemory("kept").HostMemory("next").HostMemory("flags"));

// How far `tensors`, minus an anchor if there is one, are from what has arrived in `spans`; see pq_distance.
REGISTER_OP("PqasgdDistance")
    .Input("arriving: resource")
    .Input("tensors: dtypes")
    .Input("anchors: anchor_dtypes")
    .Output("distance: double")
    .Attr("dtypes: list({float, double, half, bfloat16}) >= 1")
    .Attr("anchor_dtypes: list({float, double}) >= 0")
    .Attr("spans: list(int)")
    .SetIsStateful()
    .SetShapeFn(shape_inference::ScalarShape);

template <class Where>
class DistanceOp : public NumbersOp {
 public:
  explicit DistanceOp(OpKernelConstruction* context) : NumbersOp(context) {
    OP_REQUIRES_OK(context, context->GetAttr("spans", &spans_));
  }
  void Compute(OpKernelContext* context) override {
    Where where;
    OP_REQUIRES_OK(context, where.open(context));
    core::RefCountPtr<Var> arriving;
    OpInputList tensors, anchors;
    Tensor* result = nullptr;
    Source source;
    OP_REQUIRES_OK(context, LookupResource(context, HandleFromInput(context, 0), &arriving));
    OP_REQUIRES_OK(context, context->input_list("tensors", &tensors));
    OP_REQUIRES_OK(context, context->input_list("anchors", &anchors));
    OP_REQUIRES_OK(context, context->allocate_output("distance", {}, &result));
    for (const Tensor& tensor : tensors) OP_REQUIRES_OK(context, source.add(tensor));
    if (anchors.size()) OP_REQUIRES_OK(context, source.subtract(anchors[0], 0));
    tf_shared_lock lock(*arriving->mu());
    const float* center = arriving->tensor()->flat<float>().data();
    double total = 0, part = 0;
    for (size_t i = 0; i + 1 < spans_.size(); i += 2) {
      if (spans_[i + 1] <= spans_[i]) continue;
      OP_REQUIRES(context, spans_[i + 1] <= arriving->tensor()->NumElements(), InvalidArgument("spans go beyond what arrives"));
      OP_REQUIRES_OK(context, where.distance(context, source.get(), spans_[i], spans_[i + 1] - spans_[i], center + spans_[i], &part));
      total += part;
    }
    result->scalar<double>()() = total;
  }

 private:
  std::vector<int64_t> spans_;
};
PQ_REGISTER("PqasgdDistance", DistanceOp, .HostMemory("arriving").HostMemory("distance"));

// An outer step on what has arrived in `spans`, a beginning and an end each, before it is committed; see pq_outer.
REGISTER_OP("PqasgdOuter")
    .Input("arriving: resource")
    .Input("momentum: resource")
    .Input("coefficients: float")
    .Attr("spans: list(int)")
    .SetIsStateful()
    .SetShapeFn(shape_inference::NoOutputs);

template <class Where>
class OuterOp : public NumbersOp {
 public:
  explicit OuterOp(OpKernelConstruction* context) : NumbersOp(context) {
    OP_REQUIRES_OK(context, context->GetAttr("spans", &spans_));
  }
  void Compute(OpKernelContext* context) override {
    Where where;
    OP_REQUIRES_OK(context, where.open(context));
    core::RefCountPtr<Var> arriving, momentum;
    OP_REQUIRES_OK(context, LookupResource(context, HandleFromInput(context, 0), &arriving));
    OP_REQUIRES_OK(context, LookupResource(context, HandleFromInput(context, 1), &momentum));
    const Tensor& coefficients = context->input(2);
    OP_REQUIRES(context, coefficients.NumElements() == 3, InvalidArgument("coefficients must be 3 numbers"));
    mutex_lock arriving_lock(*arriving->mu());
    mutex_lock momentum_lock(*momentum->mu());
    Tensor* own = momentum->tensor();
    OP_REQUIRES(context, own->NumElements() <= arriving->tensor()->NumElements(),
                InvalidArgument("momentum has more elements than what has arrived"));
    OP_REQUIRES_OK(context, unshared(context, where, own));
    const auto c = coefficients.flat<float>();
    for (size_t i = 0; i + 1 < spans_.size(); i += 2) {
      const int64_t begin = spans_[i], count = std::min(spans_[i + 1], own->NumElements()) - begin;
      if (count <= 0) continue;
      OP_REQUIRES_OK(context, check(where.outer(c(0), c(1), c(2), count, own->flat<float>().data() + begin,
                                             arriving->tensor()->flat<float>().data() + begin),
                                    "outer"));
    }
  }

 private:
  std::vector<int64_t> spans_;
};
PQ_REGISTER("PqasgdOuter", OuterOp, .HostMemory("arriving").HostMemory("momentum").HostMemory("coefficients"));

// Somewhere a round ends: variables of the same place, which are written, or tensors of which new ones are made.
class TargetsOp : public NumbersOp {
 public:
  explicit TargetsOp(OpKernelConstruction* context) : NumbersOp(context) {
    OP_REQUIRES_OK(context, context->GetAttr("n", &num_variables_));
    OP_REQUIRES_OK(context, context->GetAttr("spans", &spans_));
  }

 protected:
  // Calls act(target, at, count) for each, of `count` elements that begin at `at`. `whole`: all of them will be overwritten.
  // Variables begin at input `first`.
  template <class Where, class F>
  Status for_targets(OpKernelContext* context, const Where& where, int first, bool whole, F act) const {
    int64_t at = 0;
    for (int i = 0; i < num_variables_; ++i) {
      core::RefCountPtr<Var> variable;
      TF_RETURN_IF_ERROR(LookupResource(context, HandleFromInput(context, first + i), &variable));
      mutex_lock lock(*variable->mu());
      Tensor* tensor = variable->tensor();
      if (whole) TF_RETURN_IF_ERROR(writable(context, variable.get(), &tensor));
      else TF_RETURN_IF_ERROR(unshared(context, where, tensor));
      TF_RETURN_IF_ERROR(act(*tensor, at, tensor->NumElements()));
      at += tensor->NumElements();
    }
    for (int i = 0; i < context->num_outputs(); ++i) {
      const int input = first + num_variables_ + i;
      const Tensor given = context->input(input);
      Tensor* tensor = nullptr;
      TF_RETURN_IF_ERROR(context->forward_input_or_allocate_output({input}, i, given.shape(), &tensor));
      if (!whole && !tensor->SharesBufferWith(given))
        TF_RETURN_IF_ERROR(check(where.copy(data_of(*tensor), data_of(given), (int64_t)given.TotalBytes()), "copy"));
      TF_RETURN_IF_ERROR(act(*tensor, at, tensor->NumElements()));
      at += tensor->NumElements();
    }
    return OkStatus();
  }

  // Calls act(begin, n) for what of `spans`, or of all if there are none, is in `count` elements from `at`.
  template <class F>
  Status for_spans(int64_t at, int64_t count, F act) const {
    const int64_t whole[2] = {at, at + count};
    const int64_t* spans = spans_.empty() ? whole : spans_.data();
    for (size_t k = 0; k < std::max<size_t>(2, spans_.size()); k += 2) {
      const int64_t begin = std::max(spans[k], at), n = std::min(spans[k + 1], at + count) - begin;
      if (n > 0) TF_RETURN_IF_ERROR(act(begin, n));
    }
    return OkStatus();
  }

  int num_variables_ = 0;
  std::vector<int64_t> spans_;
};

Status results_like_tensors(InferenceContext* c) {
  const int first = c->num_inputs() - c->num_outputs();
  for (int i = 0; i < c->num_outputs(); ++i) c->set_output(i, c->input(first + i));
  return OkStatus();
}

// What has arrived is the next anchor: the two change places; or, if it is to be added, the mean, which the anchor moves by.
// Then the variables become the anchor; without one they become the mean. With `spans`, a beginning and an end each, that is done
// for these elements only. Variables that are elsewhere are given as tensors, and get the results.
REGISTER_OP("PqasgdCommit")
    .Input("arriving: resource")
    .Input("anchors: num_anchors * resource")
    .Input("variables: n * resource")
    .Input("tensors: dtypes")
    .Output("results: dtypes")
    .Attr("num_anchors: int >= 0")
    .Attr("n: int >= 0")
    .Attr("dtypes: list({float, double, half, bfloat16}) >= 0")
    .Attr("add: bool")
    .Attr("spans: list(int)")
    .SetIsStateful()
    .SetShapeFn(results_like_tensors);

template <class Where>
class CommitOp : public TargetsOp {
 public:
  explicit CommitOp(OpKernelConstruction* context) : TargetsOp(context) {
    OP_REQUIRES_OK(context, context->GetAttr("num_anchors", &num_anchors_));
    OP_REQUIRES_OK(context, context->GetAttr("add", &add_));
  }

  void Compute(OpKernelContext* context) override {
    Where where;
    OP_REQUIRES_OK(context, where.open(context));
    core::RefCountPtr<Var> arriving, anchor;
    OP_REQUIRES_OK(context, LookupResource(context, HandleFromInput(context, 0), &arriving));
    mutex_lock arriving_lock(*arriving->mu());
    if (num_anchors_ == 0) {
      OP_REQUIRES_OK(context, write(context, where, *arriving->tensor(), nullptr));
      return;
    }
    OP_REQUIRES_OK(context, LookupResource(context, HandleFromInput(context, 1), &anchor));
    mutex_lock anchor_lock(*anchor->mu());
    Tensor* old = anchor->tensor();
    if (!add_) {
      OP_REQUIRES(context, old->dtype() == DT_FLOAT && old->shape() == arriving->tensor()->shape(), InvalidArgument("anchor and arriving differ in shape"));
      if (!spans_.empty()) {
        OP_REQUIRES_OK(context, unshared(context, where, old));
        const float* from = arriving->tensor()->flat<float>().data();
        float* to = old->flat<float>().data();
        OP_REQUIRES_OK(context, for_spans(0, old->NumElements(), [&](int64_t begin, int64_t n) {
                         return check(where.copy(to + begin, from + begin, n * (int64_t)sizeof(float)), "copy");
                       }));
        OP_REQUIRES_OK(context, write(context, where, *old, nullptr));
        return;
      }
      std::swap(*old, *arriving->tensor());
      Tensor* unused;
      OP_REQUIRES_OK(context, writable(context, arriving.get(), &unused));
      OP_REQUIRES_OK(context, write(context, where, *anchor->tensor(), nullptr));
      return;
    }
    OP_REQUIRES_OK(context, unshared(context, where, old));
    if (num_variables_ || context->num_outputs()) {
      OP_REQUIRES_OK(context, write(context, where, *arriving->tensor(), old));
      return;
    }
    const float* mean = arriving->tensor()->flat<float>().data();
    OP_REQUIRES(context, old->NumElements() <= arriving->tensor()->NumElements(), InvalidArgument("anchor and arriving differ in shape"));
    OP_REQUIRES_OK(context, for_spans(0, old->NumElements(), [&](int64_t begin, int64_t n) { return where.move(mean, begin, n, *old); }));
  }

 private:
  // Targets = mean, or with an anchor: anchor += mean, targets = anchor.
  Status write(OpKernelContext* context, const Where& where, const Tensor& mean, Tensor* anchor) const {
    if (!num_variables_ && !context->num_outputs()) return OkStatus();
    const float* means = mean.flat<float>().data();
    int64_t total = 0;
    const auto put = [&](const Tensor& tensor, int64_t at, int64_t count) {
      Source target;
      TF_RETURN_IF_ERROR(target.add(tensor));
      if (anchor) TF_RETURN_IF_ERROR(target.subtract(*anchor, at));
      if (at + count > mean.NumElements()) return InvalidArgument("more variables than means");
      total = at + count;
      return for_spans(at, count, [&](int64_t begin, int64_t n) {
        return check(where.apply(means + begin, begin - at, n, target.get()), "apply");
      });
    };
    TF_RETURN_IF_ERROR(for_targets(context, where, 1 + num_anchors_, spans_.empty(), put));
    return total == mean.NumElements() ? OkStatus() : InvalidArgument("fewer variables than means");
  }

  int num_anchors_ = 0;
  bool add_ = false;
};
PQ_REGISTER("PqasgdCommit", CommitOp, .HostMemory("arriving").HostMemory("anchors").HostMemory("variables"));

// The means as tensors like `tensors`, in their memory where nobody else needs them; times `factor`.
REGISTER_OP("PqasgdScatter")
    .Input("arriving: resource")
    .Input("tensors: dtypes")
    .Output("means: dtypes")
    .Attr("dtypes: list({float, double, half, bfloat16}) >= 1")
    .Attr("factor: float = 1.0")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      for (int i = 0; i < c->num_outputs(); ++i) c->set_output(i, c->input(i + 1));
      return OkStatus();
    });

template <class Where>
class ScatterOp : public NumbersOp {
 public:
  explicit ScatterOp(OpKernelConstruction* context) : NumbersOp(context) {
    OP_REQUIRES_OK(context, context->GetAttr("factor", &factor_));
  }
  void Compute(OpKernelContext* context) override {
    Where where;
    OP_REQUIRES_OK(context, where.open(context));
    core::RefCountPtr<Var> arriving;
    OP_REQUIRES_OK(context, LookupResource(context, HandleFromInput(context, 0), &arriving));
    mutex_lock lock(*arriving->mu());
    Tensor* means = arriving->tensor();
    Source target;
    for (int i = 0; i < context->num_outputs(); ++i) {
      Tensor* output = nullptr;
      OP_REQUIRES_OK(context, context->forward_input_or_allocate_output({i + 1}, i, context->input(i + 1).shape(), &output));
      OP_REQUIRES_OK(context, target.add(*output));
    }
    OP_REQUIRES(context, target.offsets.back() == means->NumElements(), InvalidArgument("tensors and means differ in size"));
    float* mean = means->flat<float>().data();
    if (factor_ != 1.0f) OP_REQUIRES_OK(context, check(where.scale(factor_, (const float*)nullptr, means->NumElements(), mean), "scale"));
    OP_REQUIRES_OK(context, check(where.apply(mean, 0, means->NumElements(), target.get()), "apply"));
  }

 private:
  float factor_ = 1;
};
PQ_REGISTER("PqasgdScatter", ScatterOp, .HostMemory("arriving"));

// ---- a codec by itself ----

Status keys_from(OpKernelContext* context, pq_keys* keys) {
  uint64 own = 0, shared = 0;
  TF_RETURN_IF_ERROR(scalar_from(context, "key", &own));
  TF_RETURN_IF_ERROR(scalar_from(context, "shared_key", &shared));
  *keys = {own, shared};
  return OkStatus();
}

REGISTER_OP("PqasgdEncode")
    .Input("values: T")
    .Input("key: uint64")
    .Input("shared_key: uint64")
    .Output("payload: uint8")
    .Attr("T: {float, double, half, bfloat16}")
    .Attr("codec: list(int)")
    .SetShapeFn([](InferenceContext* c) {
      std::vector<int64_t> spec;
      TF_RETURN_IF_ERROR(c->GetAttr("codec", &spec));
      pq_codec codec;
      TF_RETURN_IF_ERROR(codec_from(spec, &codec));
      const auto count = c->NumElements(c->input(0));
      c->set_output(0, c->ValueKnown(count) ? c->Vector(pq_payload_nbytes(&codec, c->Value(count)))
                                            : c->Vector(InferenceContext::kUnknownDim));
      return OkStatus();
    });

class EncodeOp : public OpKernel {
 public:
  explicit EncodeOp(OpKernelConstruction* context) : OpKernel(context) {
    std::vector<int64_t> spec;
    OP_REQUIRES_OK(context, context->GetAttr("codec", &spec));
    OP_REQUIRES_OK(context, codec_from(spec, &codec_));
  }
  void Compute(OpKernelContext* context) override {
    const Tensor& values = context->input(0);
    Source source;
    pq_keys keys{};
    OP_REQUIRES_OK(context, source.add(values));
    OP_REQUIRES_OK(context, keys_from(context, &keys));
    const int64_t nbytes = pq_payload_nbytes(&codec_, values.NumElements());
    OP_REQUIRES_OK(context, check(nbytes < 0 ? PQ_BAD_ARGUMENT : PQ_OK, "encode"));
    Tensor* payload = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(0, {nbytes}, &payload));
    const int32_t status =
        pq_encode(&codec_, source.get(), 0, values.NumElements(), keys, payload->flat<uint8>().data(), nbytes);
    OP_REQUIRES_OK(context, check(status, "encode"));
    OP_REQUIRES(context, status != PQ_NONFINITE,
                InvalidArgument("values hold NaN, Inf or a number beyond the codec's range, which it cannot encode: look for a "
                                        "diverging loss, or lower the learning rate"));
  }

 private:
  pq_codec codec_{};
};
REGISTER_KERNEL_BUILDER(Name("PqasgdEncode").Device(DEVICE_CPU), EncodeOp);

class DecodeAddBase : public OpKernel {
 public:
  explicit DecodeAddBase(OpKernelConstruction* context) : OpKernel(context) {
    std::vector<int64_t> spec;
    OP_REQUIRES_OK(context, context->GetAttr("codec", &spec));
    OP_REQUIRES_OK(context, codec_from(spec, &codec_));
  }

 protected:
  Status add(OpKernelContext* context, Tensor* destination) const {
    const Tensor& payload = context->input(1);
    pq_keys keys{};
    float weight = 0;
    TF_RETURN_IF_ERROR(keys_from(context, &keys));
    TF_RETURN_IF_ERROR(scalar_from(context, "weight", &weight));
    return check(pq_decode_add(&codec_, payload.flat<uint8>().data(), payload.NumElements(), destination->NumElements(), keys,
                               weight, destination->flat<float>().data()),
                 "decode");
  }
  pq_codec codec_{};
};

REGISTER_OP("PqasgdDecodeAdd")
    .Input("destination: float")
    .Input("payload: uint8")
    .Input("key: uint64")
    .Input("shared_key: uint64")
    .Input("weight: float")
    .Output("sum: float")
    .Attr("codec: list(int)")
    .SetShapeFn(shape_inference::UnchangedShape);

class DecodeAddOp : public DecodeAddBase {
 public:
  using DecodeAddBase::DecodeAddBase;
  void Compute(OpKernelContext* context) override {
    const Tensor& destination = context->input(0);
    Tensor* sum = nullptr;
    OP_REQUIRES_OK(context, context->forward_input_or_allocate_output({0}, 0, destination.shape(), &sum));
    if (!sum->SharesBufferWith(destination)) std::memcpy(data_of(*sum), data_of(destination), destination.TotalBytes());
    OP_REQUIRES_OK(context, add(context, sum));
  }
};
REGISTER_KERNEL_BUILDER(Name("PqasgdDecodeAdd").Device(DEVICE_CPU), DecodeAddOp);

REGISTER_OP("PqasgdDecodeAddVariable")
    .Input("destination: resource")
    .Input("payload: uint8")
    .Input("key: uint64")
    .Input("shared_key: uint64")
    .Input("weight: float")
    .Attr("codec: list(int)")
    .SetIsStateful()
    .SetShapeFn(shape_inference::NoOutputs);

class DecodeAddVariableOp : public DecodeAddBase {
 public:
  using DecodeAddBase::DecodeAddBase;
  void Compute(OpKernelContext* context) override {
    core::RefCountPtr<Var> variable;
    OP_REQUIRES_OK(context, LookupResource(context, HandleFromInput(context, 0), &variable));
    mutex_lock lock(*variable->mu());
    Tensor* tensor = variable->tensor();
    OP_REQUIRES(context, tensor->dtype() == DT_FLOAT, InvalidArgument("destination is not float32"));
    OP_REQUIRES_OK(context, unshared(context, Host(), tensor));
    OP_REQUIRES_OK(context, add(context, tensor));
  }
};
REGISTER_KERNEL_BUILDER(Name("PqasgdDecodeAddVariable").Device(DEVICE_CPU), DecodeAddVariableOp);

// ---- an average that goes on beside the next steps ----

// snapshot[spans] = tensors, as one flat vector.
REGISTER_OP("PqasgdSnapshot")
    .Input("snapshot: resource")
    .Input("tensors: dtypes")
    .Attr("dtypes: list({float, double, half, bfloat16}) >= 1")
    .Attr("spans: list(int)")
    .SetIsStateful()
    .SetShapeFn(shape_inference::NoOutputs);

template <class Where>
class SnapshotOp : public NumbersOp {
 public:
  explicit SnapshotOp(OpKernelConstruction* context) : NumbersOp(context) {
    OP_REQUIRES_OK(context, context->GetAttr("spans", &spans_));
  }
  void Compute(OpKernelContext* context) override {
    Where where;
    OP_REQUIRES_OK(context, where.open(context));
    core::RefCountPtr<Var> snapshot;
    OpInputList tensors;
    Source source;
    OP_REQUIRES_OK(context, LookupResource(context, HandleFromInput(context, 0), &snapshot));
    OP_REQUIRES_OK(context, context->input_list("tensors", &tensors));
    for (const Tensor& tensor : tensors) OP_REQUIRES_OK(context, source.add(tensor));
    mutex_lock lock(*snapshot->mu());
    Tensor* to = snapshot->tensor();
    OP_REQUIRES_OK(context, unshared(context, where, to));
    int32_t dtype = 0;
    OP_REQUIRES_OK(context, dtype_from(to->dtype(), &dtype));
    for (size_t i = 0; i + 1 < spans_.size(); i += 2) {
      OP_REQUIRES(context, spans_[i + 1] <= to->NumElements(), InvalidArgument("spans go beyond the snapshot"));
      char* at = (char*)data_of(*to) + spans_[i] * DataTypeSize(to->dtype());
      OP_REQUIRES_OK(context, check(where.gather(source.get(), spans_[i], spans_[i + 1] - spans_[i], at, dtype), "snapshot"));
    }
  }

 private:
  std::vector<int64_t> spans_;
};
PQ_REGISTER("PqasgdSnapshot", SnapshotOp, .HostMemory("snapshot"));

// In spans: variables = anchor + (variables - snapshot); what follows the parameters, buffers, becomes the anchor.
// Variables that are elsewhere are given as tensors, and get the results.
REGISTER_OP("PqasgdRebase")
    .Input("anchor: resource")
    .Input("snapshot: resource")
    .Input("variables: n * resource")
    .Input("tensors: dtypes")
    .Output("results: dtypes")
    .Attr("n: int >= 0")
    .Attr("dtypes: list({float, double, half, bfloat16}) >= 0")
    .Attr("num_parameters: int")
    .Attr("spans: list(int) >= 2")
    .SetIsStateful()
    .SetShapeFn(results_like_tensors);

template <class Where>
class RebaseOp : public TargetsOp {
 public:
  explicit RebaseOp(OpKernelConstruction* context) : TargetsOp(context) {
    OP_REQUIRES_OK(context, context->GetAttr("num_parameters", &num_parameters_));
  }
  void Compute(OpKernelContext* context) override {
    Where where;
    OP_REQUIRES_OK(context, where.open(context));
    core::RefCountPtr<Var> anchor, snapshot;
    OP_REQUIRES_OK(context, LookupResource(context, HandleFromInput(context, 0), &anchor));
    OP_REQUIRES_OK(context, LookupResource(context, HandleFromInput(context, 1), &snapshot));
    tf_shared_lock anchor_lock(*anchor->mu());
    mutex_lock snapshot_lock(*snapshot->mu());
    const Tensor& base = *anchor->tensor();
    Tensor* before = snapshot->tensor();
    OP_REQUIRES_OK(context, unshared(context, where, before));
    OP_REQUIRES(context, base.dtype() == before->dtype() && base.shape() == before->shape(),
                InvalidArgument("anchor and snapshot differ in type or shape"));
    const int64_t width = DataTypeSize(base.dtype());
    int32_t dtype = 0;
    OP_REQUIRES_OK(context, dtype_from(base.dtype(), &dtype));
    OP_REQUIRES_OK(context, for_targets(context, where, 2, false, [&](const Tensor& tensor, int64_t at, int64_t count) {
      if (at + count > base.NumElements()) return InvalidArgument("more variables than anchors");
      Source target;
      TF_RETURN_IF_ERROR(target.add(tensor));
      return for_spans(at, count, [&](int64_t begin, int64_t n) {
        if (at >= num_parameters_) {
          target.source.anchor = nullptr;
          TF_RETURN_IF_ERROR(check(where.gather(target.get(), begin - at, n, (char*)data_of(*before) + begin * width, dtype), "rebase"));
        }
        TF_RETURN_IF_ERROR(target.subtract(*before, at));
        return check(where.rebase((const char*)data_of(base) + begin * width, begin - at, n, target.get()), "rebase");
      });
    }));
  }

 private:
  int64_t num_parameters_ = 0;
};
PQ_REGISTER("PqasgdRebase", RebaseOp, .HostMemory("anchor").HostMemory("snapshot").HostMemory("variables"));

// What a thread of Python's is doing: a graph may wait for it, and holds no thread of TensorFlow's meanwhile.
struct Gate {
  bool open = false;
  int32_t failed = 0;
  std::vector<std::function<void(int32_t)>> waiting;
};
mutex g_gates_lock;
std::unordered_map<int64_t, Gate>& gates() {
  static auto* all = new std::unordered_map<int64_t, Gate>();
  return *all;
}

REGISTER_OP("PqasgdAwait").Output("failed: int32").Attr("gate: int").SetIsStateful().SetShapeFn(shape_inference::ScalarShape);

class AwaitOp : public AsyncOpKernel {
 public:
  explicit AwaitOp(OpKernelConstruction* context) : AsyncOpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("gate", &gate_));
  }
  void ComputeAsync(OpKernelContext* context, DoneCallback done) override {
    Tensor* failed = nullptr;
    OP_REQUIRES_OK_ASYNC(context, context->allocate_output(0, {}, &failed), done);
    const auto finish = [failed, done](int32_t result) {
      failed->scalar<int32>()() = result;
      done();
    };
    int32_t result = 0;
    {
      mutex_lock lock(g_gates_lock);
      Gate& gate = gates()[gate_];
      if (!gate.open) {
        gate.waiting.push_back(finish);
        return;
      }
      result = gate.failed;
    }
    finish(result);
  }

 private:
  int64_t gate_ = 0;
};
REGISTER_KERNEL_BUILDER(Name("PqasgdAwait").Device(DEVICE_CPU), AwaitOp);

// Which GPU of CUDA's the op is on; -1: a CPU.
REGISTER_OP("PqasgdOrdinal").Output("index: int32").SetIsStateful().SetShapeFn(shape_inference::ScalarShape);

class OrdinalOp : public OpKernel {
 public:
  using OpKernel::OpKernel;
  void Compute(OpKernelContext* context) override {
    Tensor* index = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(0, {}, &index));
    const auto* info = context->device()->tensorflow_accelerator_device_info();
    index->scalar<int32>()() = info ? info->gpu_id : -1;
  }
};
REGISTER_KERNEL_BUILDER(Name("PqasgdOrdinal").Device(DEVICE_CPU), OrdinalOp);
REGISTER_KERNEL_BUILDER(Name("PqasgdOrdinal").Device(DEVICE_GPU).HostMemory("index"), OrdinalOp);

// TensorFlow's own clock, Timestamp, is an error where ops are to be deterministic; nothing that is trained depends on this.
REGISTER_OP("PqasgdClock").Output("seconds: double").SetIsStateful().SetShapeFn(shape_inference::ScalarShape);

class ClockOp : public OpKernel {
 public:
  using OpKernel::OpKernel;
  void Compute(OpKernelContext* context) override {
    Tensor* seconds = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(0, {}, &seconds));
    seconds->scalar<double>()() = std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  }
};
REGISTER_KERNEL_BUILDER(Name("PqasgdClock").Device(DEVICE_CPU), ClockOp);

}  // namespace

#define PQ_FOR_PYTHON extern "C" __attribute__((visibility("default")))

PQ_FOR_PYTHON void pqasgd_tensorflow_set_explain(Explain function) { g_explain = function; }

// Loads the kernels for GPUs, which Python has loaded before and found good; returns what is wrong, if anything is.
PQ_FOR_PYTHON const char* pqasgd_tensorflow_load_kernels(const char* path) {
  void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) return dlerror();
  auto* found = new Kernels();  // for good: ops may be running
#define PQ_LOOK_UP(name)                                                        \
  found->name = (decltype(found->name))dlsym(library, "pq_device_" #name); \
  if (!found->name) return "it has no pq_device_" #name;
  PQ_FOR_EACH_KERNEL(PQ_LOOK_UP)
#undef PQ_LOOK_UP
  found->error = (decltype(found->error))dlsym(library, "pq_cuda_error");
  if (!found->error) return "it has no pq_cuda_error";
  g_kernels = found;
  return nullptr;
}

PQ_FOR_PYTHON void pqasgd_tensorflow_close_gate(int64_t number) {
  mutex_lock lock(g_gates_lock);
  gates()[number].open = false;
}

PQ_FOR_PYTHON void pqasgd_tensorflow_open_gate(int64_t number, int32_t failed) {
  std::vector<std::function<void(int32_t)>> waiting;
  {
    mutex_lock lock(g_gates_lock);
    Gate& gate = gates()[number];
    gate.open = true;
    gate.failed = failed;
    waiting.swap(gate.waiting);
  }
  for (const auto& finish : waiting) finish(failed);
}
