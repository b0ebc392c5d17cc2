// Marks functions that a GPU runs too.
#pragma once

#if defined(__CUDACC__)
#define PQ_BOTH __host__ __device__
#else
#define PQ_BOTH
#endif
