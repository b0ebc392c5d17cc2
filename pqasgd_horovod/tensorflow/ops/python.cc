// What a graph asks of the world around it: a thread of Python's, the GPU that it runs on, the clock. And what Python calls.
#include <dlfcn.h>

#include <chrono>
#include <functional>
#include <unordered_map>

#include "common.h"

namespace pqasgd_tensorflow {

std::atomic<Explain> g_explain{nullptr};
std::atomic<const Kernels*> g_kernels{nullptr};

namespace {

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
}  // namespace pqasgd_tensorflow

using namespace pqasgd_tensorflow;

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
