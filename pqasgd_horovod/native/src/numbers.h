// fp16 and bf16, rounded to nearest even, one number at a time.
#pragma once
#include <cstdint>
#include <cstring>

#include "on_device.h"

namespace pqasgd {

PQ_BOTH inline float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
  float f;
  if (rest >= 0x7c00) {
    const uint32_t u = sign | 0x7f800000u | (rest & 0x3ff) << 13 | ((rest & 0x3ff) ? 0x400000u : 0u);
    std::memcpy(&f, &u, 4);
  } else {
    const uint32_t u = rest << 13;  // a float 2^112 too small, subnormals included
    std::memcpy(&f, &u, 4);
    f *= 0x1p112f;
    uint32_t v;
    std::memcpy(&v, &f, 4);
    v |= sign;
    std::memcpy(&f, &v, 4);
  }
  return f;
}
PQ_BOTH inline uint16_t float_to_half(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  const uint32_t sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
  if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00);  // 65520 and above round to Inf
  if (magnitude < 0x38800000u) {                                   // subnormal: let the adder round at 2^-24
    float a;
    std::memcpy(&a, &magnitude, 4);
    a += 0.5f;
    uint32_t v;
    std::memcpy(&v, &a, 4);
    return (uint16_t)(sign | (v - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000u;
  return (uint16_t)(sign | rounded >> 13);
}
PQ_BOTH inline float bfloat_to_float(uint16_t h) {
  const uint32_t u = (uint32_t)h << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
PQ_BOTH inline uint16_t float_to_bfloat(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000u) return (uint16_t)(u >> 16 | 0x40);
  return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

}  // namespace pqasgd
