// nvcuda::wmma for 16x16x16 fragments of int8, one lane at a time: a lane owns eight neighbours in a row of the sums and
// computes them by itself, from the matrices in memory. Which elements a lane owns is not said by CUDA either.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "cuda.h"

namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major };

template <typename Use, int M, int N, int K, typename T, typename Layout = void>
struct fragment {
    const T *matrix;
    unsigned pitch;
};

template <>
struct fragment<accumulator, 16, 16, 16, int, void> {
    int x[8];
    static constexpr int num_elements = 8;
};

inline unsigned lane_row() { return threadIdx.x % 32 / 2; }
inline unsigned lane_column() { return threadIdx.x % 2 * 8; }

template <typename Use, typename Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, signed char, Layout> &into, const signed char *matrix, unsigned pitch) {
    if (reinterpret_cast<std::uintptr_t>(matrix) % 32 != 0 || pitch % 16 != 0) {
        std::fprintf(stderr, "a fragment must be loaded from 32-byte boundaries, its rows from 16-byte ones\n");
        std::abort();
    }
    into.matrix = matrix;
    into.pitch = pitch;
}

inline void mma_sync(fragment<accumulator, 16, 16, 16, int> &d,
                     const fragment<matrix_a, 16, 16, 16, signed char, row_major> &a,
                     const fragment<matrix_b, 16, 16, 16, signed char, col_major> &b,
                     const fragment<accumulator, 16, 16, 16, int> &c) {
    for (unsigned e = 0; e < 8; ++e) {
        int sum = c.x[e];
        for (unsigned k = 0; k < 16; ++k)
            sum += a.matrix[lane_row() * a.pitch + k] * b.matrix[(lane_column() + e) * b.pitch + k];
        d.x[e] = sum;
    }
}

inline void store_matrix_sync(int *into, const fragment<accumulator, 16, 16, 16, int> &from, unsigned pitch, layout_t) {
    for (unsigned e = 0; e < 8; ++e) into[lane_row() * pitch + lane_column() + e] = from.x[e];
}

}  // namespace nvcuda::wmma
