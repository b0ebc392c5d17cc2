// The text of a thread's last error of CUDA's.
#pragma once
#include <string>

#include "pqasgd_cuda.h"
#include "runtime.h"

namespace pqasgd {
namespace gpu {

inline thread_local std::string last_error;

inline int32_t set_error(const char* text) {
  last_error = text;
  return PQ_DEVICE_ERROR;
}

inline bool failed(cudaError_t error) {
  if (error == cudaSuccess) return false;
  set_error(cudaGetErrorString(error));
  (void)cudaGetLastError();  // or later calls would return it again
  return true;
}

}  // namespace gpu
}  // namespace pqasgd
