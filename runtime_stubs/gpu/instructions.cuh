// The instructions of NVIDIA GPUs that kernels use, one function each. `tests/backends/cuda_emulator` has the same
// functions for a CPU. QGPU_ASYNC: copies to shared memory may go on while threads compute. QGPU_DEPENDENT: the launcher
// may start a kernel before the one before it is done.

#ifndef QGPU_INSTRUCTIONS
#define QGPU_INSTRUCTIONS

// Waits until the kernels launched before this one are done, where the launcher lets kernels overlap.
__device__ __forceinline__ void qgpu_wait() {
#if QGPU_DEPENDENT && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel start; it will wait for this one's end before it reads what this one writes.
__device__ __forceinline__ void qgpu_next() {
#if QGPU_DEPENDENT && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ unsigned qgpu_shared(const void *pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Copies BYTES (4, 8, 16) of global to shared memory; done after the `qgpu_arrive` of its batch.
template <int BYTES>
__device__ __forceinline__ void qgpu_copy(void *shared, const void *global) {
#if QGPU_ASYNC && __CUDA_ARCH__ >= 800
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(qgpu_shared(shared)), "l"(global) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(qgpu_shared(shared)), "l"(global), "n"(BYTES)
                     : "memory");
#else
    if (BYTES == 16) *static_cast<int4 *>(shared) = *static_cast<const int4 *>(global);
    if (BYTES == 8) *static_cast<int2 *>(shared) = *static_cast<const int2 *>(global);
    if (BYTES == 4) *static_cast<int *>(shared) = *static_cast<const int *>(global);
#endif
}

// Ends a batch of this thread's copies.
__device__ __forceinline__ void qgpu_batch() {
#if QGPU_ASYNC && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all of this thread's batches but the last PENDING.
template <int PENDING>
__device__ __forceinline__ void qgpu_arrive() {
#if QGPU_ASYNC && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// Four matrices of 8 rows of 16 bytes; lane l gives the address of row l. Lane l gets bytes 4 (l % 4) … of row l / 4.
__device__ __forceinline__ void qgpu_load_matrices(unsigned (&words)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(qgpu_shared(row))
                 : "memory");
}

#define QGPU_MMA_16(shape, types)                                                                                      \
    asm volatile("mma.sync.aligned." shape ".row.col.s32." types ".s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, " \
                 "{%0, %1, %2, %3};"                                                                                   \
                 : "+r"(low[0]), "+r"(low[1]), "+r"(high[0]), "+r"(high[1])                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
#define QGPU_MMA_8(shape, types, sums, a, b)                                                                           \
    asm volatile("mma.sync.aligned." shape ".row.col.s32." types ".s32 {%0, %1}, {%2}, {%3}, {%0, %1};"                \
                 : "+r"(sums[0]), "+r"(sums[1])                                                                        \
                 : "r"(a), "r"(b))
#if __CUDA_ARCH__ >= 800
#define QGPU_MMA(types, long_shape, short_shape) QGPU_MMA_16(long_shape, types)
#else
#define QGPU_MMA(types, long_shape, short_shape)                                                                       \
    QGPU_MMA_8(short_shape, types, low, a[0], b0);                                                                     \
    QGPU_MMA_8(short_shape, types, high, a[1], b0);                                                                    \
    QGPU_MMA_8(short_shape, types, low, a[2], b1);                                                                     \
    QGPU_MMA_8(short_shape, types, high, a[3], b1)
#endif

// Sums of 16 rows and 8 columns over 32 bytes of both operands: 32 numbers of 8 bits, or 64 of 4. The right one is
// signed, the left one if SIGNED. Lane l has rows l / 4 (low) and l / 4 + 8 (high), columns 2 (l % 4) and the next.
template <int BITS, bool SIGNED>
__device__ __forceinline__ void qgpu_mma(int (&low)[2], int (&high)[2], const unsigned (&a)[4], unsigned b0,
                                         unsigned b1) {
    if (BITS == 8 && SIGNED) {
        QGPU_MMA("s8.s8", "m16n8k32", "m8n8k16");
    } else if (BITS == 8) {
        QGPU_MMA("u8.s8", "m16n8k32", "m8n8k16");
    } else if (SIGNED) {
        QGPU_MMA("s4.s4", "m16n8k64", "m8n8k32");
    } else {
        QGPU_MMA("u4.s4", "m16n8k64", "m8n8k32");
    }
}

#endif
