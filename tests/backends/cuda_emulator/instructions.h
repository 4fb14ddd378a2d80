// The functions of runtime_stubs/gpu/instructions.cuh on a CPU. What a warp does together, its lanes do by showing each
// other their registers (`emulator_exchange`).
#pragma once

#include <cstdio>
#include <cstdlib>

#define QGPU_INSTRUCTIONS

constexpr int LANES = 32, MOST_WORDS = 8;
struct Registers {
    std::uint64_t words[MOST_WORDS];
};

extern "C" {
// Waits until all lanes of the warp have come here, and gives what each has shown.
const Registers *emulator_exchange(const Registers *own);
// What the kernels before this one write is within reach from now on.
void emulator_wait();
// Some copies are done at once, others when they must be.
void emulator_copy(void *to, const void *from, unsigned bytes);
void emulator_batch();
void emulator_arrive(unsigned pending);
}

inline void emulator_check(bool holds, const char *what) {
    if (holds) return;
    std::fprintf(stderr, "%s\n", what);
    std::abort();
}

inline void qgpu_wait() { emulator_wait(); }
inline void qgpu_next() {}

template <int BYTES>
inline void qgpu_copy(void *shared, const void *global) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
    auto bits = reinterpret_cast<std::uintptr_t>(shared) | reinterpret_cast<std::uintptr_t>(global);
    emulator_check(bits % BYTES == 0, "copies to shared memory start at multiples of their size");
    emulator_copy(shared, global, BYTES);
}

inline void qgpu_batch() { emulator_batch(); }

template <int PENDING>
inline void qgpu_arrive() {
    emulator_arrive(PENDING);
}

inline void qgpu_load_matrices(unsigned (&words)[4], const void *row) {
    emulator_check(reinterpret_cast<std::uintptr_t>(row) % 16 == 0, "rows of a matrix start at multiples of 16 bytes");
    Registers own{{reinterpret_cast<std::uint64_t>(row)}};
    const Registers *all = emulator_exchange(&own);
    unsigned lane = threadIdx.x % LANES;
    for (unsigned i = 0; i < 4; ++i) {
        auto matrix_row = reinterpret_cast<const char *>(all[8 * i + lane / 4].words[0]);
        std::memcpy(&words[i], matrix_row + lane % 4 * 4, 4);
    }
}

template <int BITS, bool SIGNED>
inline int emulator_element(std::uint64_t word, int position) {
    int up = int(unsigned(word) << (32 - BITS * (position + 1)));
    return SIGNED ? up >> (32 - BITS) : int(unsigned(up) >> (32 - BITS));
}

template <int BITS, bool SIGNED>
inline void qgpu_mma(int (&low)[2], int (&high)[2], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    Registers own{{a[0], a[1], a[2], a[3], b0, b1}};
    const Registers *all = emulator_exchange(&own);
    unsigned lane = threadIdx.x % LANES, row = lane / 4;
    for (unsigned half = 0; half < 2; ++half)
        for (unsigned quarter = 0; quarter < 4; ++quarter)
            for (int e = 0; e < 32 / BITS; ++e) {
                int upper = emulator_element<BITS, SIGNED>(all[4 * row + quarter].words[2 * half], e);
                int lower = emulator_element<BITS, SIGNED>(all[4 * row + quarter].words[2 * half + 1], e);
                for (unsigned column = 0; column < 2; ++column) {
                    auto right = all[4 * (2 * (lane % 4) + column) + quarter].words[4 + half];
                    low[column] += upper * emulator_element<BITS, true>(right, e);
                    high[column] += lower * emulator_element<BITS, true>(right, e);
                }
            }
}
