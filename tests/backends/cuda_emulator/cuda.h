// CUDA C++ as C++: enough to compile generated kernels for the emulator (libcuda.cpp). One thread of the host runs all
// threads of a block in turn, so that a static variable is what __shared__ means.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(count)

struct Index3 {
    unsigned x, y, z;
};
extern "C" Index3 threadIdx, blockIdx, gridDim;
extern "C" void emulator_barrier();

struct alignas(8) int2 {
    int x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

// Blocks run one after the other.
inline void __threadfence() {}
inline int atomicAdd(int *sum, int term) {
    int before = *sum;
    *sum = int(unsigned(before) + unsigned(term));
    return before;
}
inline int __ldcg(const int *word) { return *word; }

inline void __syncthreads() { emulator_barrier(); }

inline int __dp4a(int a, int b, int c) {
    for (int shift = 0; shift < 32; shift += 8)
        c += static_cast<signed char>(a >> shift) * static_cast<signed char>(b >> shift);
    return c;
}

inline float __int_as_float(int bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline int __float_as_int(float value) {
    int bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) {
    return b < a ? b : a;
}

template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) {
    return a < b ? b : a;
}

#include "instructions.h"
