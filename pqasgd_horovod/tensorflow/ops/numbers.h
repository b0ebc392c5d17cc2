// Where numbers are. Ops that touch what a model is made of have kernels for GPUs, too: the same classes with numbers of a Device
// instead of the Host. Messages, flags and scalars are in host memory everywhere. Those kernels call include/pqasgd_cuda.h, of a
// library that is loaded when somebody needs it: this one needs neither CUDA nor a TensorFlow that was built with it.
#ifndef PQASGD_TENSORFLOW_NUMBERS_H
#define PQASGD_TENSORFLOW_NUMBERS_H

#include "common.h"
#include "xla/stream_executor/stream.h"

namespace pqasgd_tensorflow {

// mean = base + scale * mean, rounded twice, as exchange/base.py does it; no base: scale * mean. The scale is not 1 where ranks
// are absent.
inline void scale_mean(float scale, const float* base, int64_t count, float* mean) {
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

inline Status source_from(OpKernelContext* context, int64_t anchor_offset, Source* source) {
  OpInputList tensors, anchors;
  TF_RETURN_IF_ERROR(context->input_list("tensors", &tensors));
  TF_RETURN_IF_ERROR(context->input_list("anchors", &anchors));
  for (const Tensor& tensor : tensors) TF_RETURN_IF_ERROR(source->add(tensor));
  return anchors.size() ? source->subtract(anchors[0], anchor_offset) : OkStatus();
}

}  // namespace pqasgd_tensorflow

#endif
