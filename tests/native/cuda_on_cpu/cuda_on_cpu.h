// Runs CUDA kernels on a CPU, so that tests see every byte that they make where there is no GPU.
//
// The threads of a group are fibers of one thread. They take turns: each runs until it waits for the others. Who comes first is
// decided by pq_cuda_on_cpu_order: what depends on it is a race, and gives other bytes in another order. A group whose threads wait for
// some that have left, or at different places, ends the program with a message.
#pragma once
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cfenv>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __constant__
#define __grid_constant__
#define PQ_NOINLINE
#define PQ_IS_GLOBAL(pointer)
#define __maxnreg__(registers)
#define __launch_bounds__(...)

namespace cuda_on_cpu {

struct Index {
  unsigned x = 0;
};

// Memory of the device: out of the host's reach but for kernels and copies, as long as there is a Reach.
class DeviceMemory {
 public:
  void* allocate(size_t nbytes) {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    void* const memory = mmap(nullptr, nbytes, protection(), MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
    pieces_[(uintptr_t)memory] = nbytes;
    return memory;
  }
  bool release(void* memory) {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    const auto piece = pieces_.find((uintptr_t)memory);
    if (piece == pieces_.end()) return false;
    munmap(memory, piece->second);
    pieces_.erase(piece);
    return true;
  }
  bool holds(const void* memory) {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    const auto next = pieces_.upper_bound((uintptr_t)memory);
    if (next == pieces_.begin()) return false;
    const auto& [begin, nbytes] = *std::prev(next);
    return (uintptr_t)memory < begin + nbytes;
  }
  void reach() {
    mutex_.lock();
    if (++reached_ == 1) protect();
  }
  void leave() {
    if (--reached_ == 0) protect();
    mutex_.unlock();
  }

 private:
  int protection() const { return reached_ ? PROT_READ | PROT_WRITE : PROT_NONE; }
  void protect() {
    for (const auto& [begin, nbytes] : pieces_) mprotect((void*)begin, nbytes, protection());
  }

  std::recursive_mutex mutex_;
  std::map<uintptr_t, size_t> pieces_;
  int reached_ = 0;
};

inline DeviceMemory device_memory;

struct Reach {
  Reach() { device_memory.reach(); }
  ~Reach() { device_memory.leave(); }
  Reach(const Reach&) = delete;
  Reach& operator=(const Reach&) = delete;
};

inline Index thread_index, group_index, group_size, num_groups;
inline std::vector<unsigned char> shared_memory;
inline unsigned order_seed = 0;  // 0: as they are numbered; 1: the other way round; else shuffled

constexpr size_t kStack = 1 << 16;

enum class State { kReady, kAtGroup, kAtWarp, kDone };

struct Fiber {
  ucontext_t context;  // for its start only: later turns are jumps, which ask nothing of the system
  jmp_buf place;
  bool started = false;
  State state = State::kDone;
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStack);
};

// Subnormals are kept, also where the caller's thread flushes them to 0, as those of TensorFlow do.
struct AsOnGpu {
  std::fenv_t saved;
  AsOnGpu() {
    std::fegetenv(&saved);
    std::fesetenv(FE_DFL_ENV);
  }
  ~AsOnGpu() { std::fesetenv(&saved); }
};

class Group {
 public:
  // Runs all groups of a launch, one after the other.
  void launch(unsigned groups, unsigned threads, size_t shared_nbytes, const std::function<void()>& kernel) {
    const std::lock_guard<std::mutex> one_at_a_time(mutex_);
    const Reach reach;
    const AsOnGpu arithmetic;
    if (threads % 32 != 0 || threads > 1024 || shared_nbytes > 49152) fail("a launch that no GPU takes");
    kernel_ = &kernel;
    group_size.x = threads;
    num_groups.x = groups;
    while (fibers_.size() < threads) fibers_.push_back(std::make_unique<Fiber>());
    std::mt19937 shuffle(order_seed);
    for (unsigned g = 0; g < groups; ++g) {
      group_index.x = g;
      shared_memory.assign(shared_nbytes, 0xff);  // NaN: nothing is 0 by itself
      run(threads, shuffle);
    }
  }

  void wait(State at) {
    Fiber& me = *fibers_[thread_index.x];
    me.state = at;
    if (!_setjmp(me.place)) _longjmp(scheduler_, 1);
  }

  uint64_t exchange(uint64_t own, unsigned lane) {  // what `lane` of the same warp gives
    given_[thread_index.x] = own;
    wait(State::kAtWarp);
    const uint64_t theirs = given_[thread_index.x / 32 * 32 + lane];
    wait(State::kAtWarp);
    return theirs;
  }
  uint32_t ballot(bool own) {
    given_[thread_index.x] = own;
    wait(State::kAtWarp);
    uint32_t all = 0;
    for (unsigned lane = 0; lane < 32; ++lane) all |= (uint32_t)given_[thread_index.x / 32 * 32 + lane] << lane;
    wait(State::kAtWarp);
    return all;
  }
  bool any(bool own) {
    given_[thread_index.x] = own;
    wait(State::kAtGroup);
    bool all = false;
    for (unsigned t = 0; t < group_size.x; ++t) all |= given_[t] != 0;
    wait(State::kAtGroup);
    return all;
  }

 private:
  [[noreturn]] static void fail(const char* what) {
    std::fprintf(stderr, "cuda_on_cpu: %s (group of %u threads)\n", what, group_size.x);
    std::abort();
  }

  static void work();

  void run(unsigned threads, std::mt19937& shuffle) {
    std::vector<unsigned> order(threads);
    std::iota(order.begin(), order.end(), 0u);
    if (order_seed == 1) std::reverse(order.begin(), order.end());
    for (unsigned t = 0; t < threads; ++t) fibers_[t]->state = State::kReady;
    for (bool left = true; left;) {
      if (order_seed > 1) {
        std::shuffle(order.begin(), order.end(), shuffle);
        for (unsigned first : order)  // a warp goes on as far as it can without the others
          do
            for (unsigned t : order)
              if (t / 32 == first / 32 && fibers_[t]->state == State::kReady) go_on(t);
          while (release_warp(first / 32 * 32));
      } else {
        for (unsigned t : order)
          if (fibers_[t]->state == State::kReady) go_on(t);
      }
      left = release(threads);
    }
  }

  // Until it waits, or is done.
  void go_on(unsigned t) {
    Fiber& fiber = *fibers_[t];
    thread_index.x = t;
    if (_setjmp(scheduler_)) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, work, 0);
    setcontext(&fiber.context);
  }

  bool release_warp(unsigned warp) {
    for (unsigned t = warp; t < warp + 32; ++t)
      if (fibers_[t]->state != State::kAtWarp) return false;
    for (unsigned t = warp; t < warp + 32; ++t) fibers_[t]->state = State::kReady;
    return true;
  }

  // Lets those go on who have all met; false if all are done.
  bool release(unsigned threads) {
    unsigned done = 0, at_group = 0;
    bool released = false;
    for (unsigned warp = 0; warp < threads; warp += 32) {
      released |= release_warp(warp);
      for (unsigned t = warp; t < warp + 32; ++t) {
        done += fibers_[t]->state == State::kDone;
        at_group += fibers_[t]->state == State::kAtGroup;
      }
    }
    if (at_group == threads) {
      for (unsigned t = 0; t < threads; ++t) fibers_[t]->state = State::kReady;
      released = true;
    }
    if (!released && done < threads) fail("threads wait for others that do not come");
    return done < threads;
  }

  std::mutex mutex_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  jmp_buf scheduler_;
  uint64_t given_[1024];
  const std::function<void()>* kernel_ = nullptr;
};

inline Group group;

// A fiber takes part in one group after the other.
inline void Group::work() {
  for (;;) {
    (*group.kernel_)();
    group.wait(State::kDone);
  }
}

}  // namespace cuda_on_cpu

#define threadIdx cuda_on_cpu::thread_index
#define blockIdx cuda_on_cpu::group_index
#define blockDim cuda_on_cpu::group_size
#define gridDim cuda_on_cpu::num_groups

inline void __syncthreads() { cuda_on_cpu::group.wait(cuda_on_cpu::State::kAtGroup); }
inline void __syncwarp() { cuda_on_cpu::group.wait(cuda_on_cpu::State::kAtWarp); }
inline int __syncthreads_or(int x) { return cuda_on_cpu::group.any(x != 0); }
inline uint32_t __ballot_sync(uint32_t, bool x) { return cuda_on_cpu::group.ballot(x); }
template <class T>
T __shfl_xor_sync(uint32_t, T x, int other) {
  uint64_t word = 0;
  std::memcpy(&word, &x, sizeof x);
  word = cuda_on_cpu::group.exchange(word, threadIdx.x % 32 ^ (unsigned)other);
  std::memcpy(&x, &word, sizeof x);
  return x;
}
template <class T, class U>
T atomicOr(T* to, U x) {
  const T old = *to;
  *to = old | x;
  return old;
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

// The runtime: whatever is put on a stream is done at once. `memory_left` can be made little, and devices break.
typedef void* cudaStream_t;
enum cudaError_t { cudaSuccess, cudaErrorMemoryAllocation, cudaErrorInvalidDevice, cudaErrorLaunchFailure };
enum cudaMemcpyKind { cudaMemcpyDefault };
enum cudaDeviceAttr { cudaDevAttrConcurrentManagedAccess };
enum cudaMemoryType { cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice, cudaMemoryTypeManaged };
enum cudaMemoryAdvise { cudaMemAdviseSetPreferredLocation, cudaMemAdviseSetAccessedBy };
constexpr unsigned cudaMemAttachGlobal = 1, cudaHostAllocPortable = 1;
struct cudaFuncAttributes {};
struct cudaPointerAttributes {
  cudaMemoryType type;
};
struct cudaDeviceProp {
  struct {
    char bytes[16];
  } uuid;
};

namespace cuda_on_cpu {
inline int64_t memory_left = INT64_MAX;
inline int64_t allocated = 0;  // how many pieces of memory there are
inline int64_t launched = 0;   // how many kernels were
inline int current_device = 0;
inline bool broken = false;  // then no work is done any more
constexpr int kDevices = 4;

inline cudaError_t allocate(void** memory, size_t nbytes, bool is_of_device) {
  if ((int64_t)nbytes > memory_left) return cudaErrorMemoryAllocation;
  memory_left -= (int64_t)nbytes;
  ++allocated;
  *memory = is_of_device ? device_memory.allocate(nbytes) : std::aligned_alloc(256, (nbytes + 255) / 256 * 256);
  return *memory ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t release(void* memory) {
  allocated -= memory != nullptr;
  if (!device_memory.release(memory)) std::free(memory);
  return cudaSuccess;
}
}  // namespace cuda_on_cpu

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  const char* const texts[] = {"no error", "out of memory", "invalid device ordinal", "unspecified launch failure"};
  return texts[error];
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = cuda_on_cpu::current_device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= cuda_on_cpu::kDevices) return cudaErrorInvalidDevice;
  cuda_on_cpu::current_device = device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 1;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  const int64_t words[2] = {getpid(), device};
  std::memcpy(properties->uuid.bytes, words, sizeof words);
  return cudaSuccess;
}
inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* memory) {
  found->type = cuda_on_cpu::device_memory.holds(memory) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  return cudaSuccess;
}
inline cudaError_t cudaMalloc(void** memory, size_t nbytes) { return cuda_on_cpu::allocate(memory, nbytes, true); }
inline cudaError_t cudaMallocManaged(void** memory, size_t nbytes, unsigned) { return cuda_on_cpu::allocate(memory, nbytes, false); }
inline cudaError_t cudaHostAlloc(void** memory, size_t nbytes, unsigned) { return cuda_on_cpu::allocate(memory, nbytes, false); }
inline cudaError_t cudaFree(void* memory) { return cuda_on_cpu::release(memory); }
inline cudaError_t cudaFreeHost(void* memory) { return cuda_on_cpu::release(memory); }
inline cudaError_t cudaMemAdvise(const void*, size_t, cudaMemoryAdvise, int) { return cudaSuccess; }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t nbytes, cudaMemcpyKind, cudaStream_t) {
  if (cuda_on_cpu::broken) return cudaErrorLaunchFailure;
  const cuda_on_cpu::Reach reach;
  std::memcpy(to, from, nbytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t nbytes, cudaStream_t) {
  const cuda_on_cpu::Reach reach;
  std::memset(memory, value, nbytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}

#define CUDART_VERSION 12000
#define PQ_LAUNCH(kernel, groups, threads, shared_nbytes, stream, ...)                                         \
  ((void)(stream), cuda_on_cpu::group.launch((unsigned)(groups), (unsigned)(threads), (size_t)(shared_nbytes), \
                                             [&] { kernel(__VA_ARGS__); }), ++cuda_on_cpu::launched)
#define PQ_SHARED_MEMORY(name) unsigned char* const name = cuda_on_cpu::shared_memory.data()

// For tests.
#define PQ_CUDA_ON_CPU_EXPORT extern "C" __attribute__((visibility("default"), weak))
PQ_CUDA_ON_CPU_EXPORT void pq_cuda_on_cpu_order(unsigned seed) { cuda_on_cpu::order_seed = seed; }
PQ_CUDA_ON_CPU_EXPORT void pq_cuda_on_cpu_limit(int64_t nbytes) { cuda_on_cpu::memory_left = nbytes < 0 ? INT64_MAX : nbytes; }
PQ_CUDA_ON_CPU_EXPORT void pq_cuda_on_cpu_break(int32_t broken) { cuda_on_cpu::broken = broken != 0; }
PQ_CUDA_ON_CPU_EXPORT int64_t pq_cuda_on_cpu_launched() { return cuda_on_cpu::launched; }
PQ_CUDA_ON_CPU_EXPORT int64_t pq_cuda_on_cpu_allocated() { return cuda_on_cpu::allocated; }
