// CUDA, or what stands for it where tests run the kernels on a CPU: tests/native/cuda_on_cpu.
#pragma once

#if defined(PQ_CUDA_ON_CPU)
#include "cuda_on_cpu.h"
#else
#include <cuda_runtime.h>
#define PQ_LAUNCH(kernel, groups, threads, shared_nbytes, stream, ...) \
  kernel<<<groups, threads, shared_nbytes, stream>>>(__VA_ARGS__)
#define PQ_NOINLINE __noinline__
#define PQ_IS_GLOBAL(pointer) __builtin_assume(__isGlobal(pointer))  // which the compiler cannot know of one that was read
#define PQ_SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
#endif
