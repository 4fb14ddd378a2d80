// Matrix products on tensor cores: rows are output pixels, whose windows are gathered from an NHWC image, columns are
// output channels, and the reduction runs over the window's taps and channels, in bytes. Kernels that TVM writes call
// `qgpu_product` and finish its sums.
//
// A block computes M x N sums; the image's part goes through shared memory in rows of K bytes, several stages ahead,
// in chunks of 16 bytes that are permuted so that eight rows of a matrix lie in different banks. Weights come in the
// order in which threads need them and are copied as they are. Warps share the tile, and the K bytes of a stage among
// WARPS_K; blocks share the reduction among SPLITS.

// The tile of a block. WARP_M and WARP_N: of a warp. K: bytes of the reduction a stage.
template <int M_, int N_, int WARP_M_, int WARP_N_, int WARPS_K_, int K_, int STAGES_>
struct QTile {
    static constexpr int M = M_;
    static constexpr int N = N_;
    static constexpr int WARP_M = WARP_M_;
    static constexpr int WARP_N = WARP_N_;
    static constexpr int WARPS_K = WARPS_K_;
    static constexpr int K = K_;
    static constexpr int STAGES = STAGES_;
    static constexpr int WARPS_M = M / WARP_M;
    static constexpr int WARPS_N = N / WARP_N;
    static constexpr int THREADS = 32 * WARPS_M * WARPS_N * WARPS_K;
    static constexpr int FRAGMENTS_M = WARP_M / 16;
    static constexpr int FRAGMENTS_N = WARP_N / 8;
    static constexpr int STEPS = K / 32;
    // Sums of a thread: SLOTS rows of COLUMNS neighbouring channels.
    static constexpr int SLOTS = 2 * FRAGMENTS_M;
    static constexpr int COLUMNS = 2 * FRAGMENTS_N;
};

// Where windows lie. HEIGHT, WIDTH: of the image, with UP - 1 rows of nothing between its rows; PIXEL: its bytes;
// GROUP: bytes of a pixel that a group of channels reads; OUT_…: of the output.
template <int HEIGHT_, int WIDTH_, int PIXEL_, int GROUP_, int OUT_HEIGHT_, int OUT_WIDTH_, int TAPS_Y_, int TAPS_X_,
          int STRIDE_Y_, int STRIDE_X_, int DILATION_Y_, int DILATION_X_, int PAD_Y_, int PAD_X_, int UP_Y_, int UP_X_>
struct QWindow {
    static constexpr int HEIGHT = HEIGHT_;
    static constexpr int WIDTH = WIDTH_;
    static constexpr int PIXEL = PIXEL_;
    static constexpr int GROUP = GROUP_;
    static constexpr int OUT_HEIGHT = OUT_HEIGHT_;
    static constexpr int OUT_WIDTH = OUT_WIDTH_;
    static constexpr int TAPS_Y = TAPS_Y_;
    static constexpr int TAPS_X = TAPS_X_;
    static constexpr int STRIDE_Y = STRIDE_Y_;
    static constexpr int STRIDE_X = STRIDE_X_;
    static constexpr int DILATION_Y = DILATION_Y_;
    static constexpr int DILATION_X = DILATION_X_;
    static constexpr int PAD_Y = PAD_Y_;
    static constexpr int PAD_X = PAD_X_;
    static constexpr int UP_Y = UP_Y_;
    static constexpr int UP_X = UP_X_;
    static constexpr int TAPS = TAPS_Y * TAPS_X;
    // Whether some window reaches beyond the image.
    static constexpr int OUTSIDE = PAD_Y > 0 || PAD_X > 0 || UP_Y > 1 || UP_X > 1 ||
                                     (OUT_HEIGHT - 1) * STRIDE_Y + (TAPS_Y - 1) * DILATION_Y - PAD_Y > HEIGHT - 1 ||
                                     (OUT_WIDTH - 1) * STRIDE_X + (TAPS_X - 1) * DILATION_X - PAD_X > WIDTH - 1;
};

// How the image's elements get into rows. WORD: bytes read at a time: 4, 8, 16; or 1, then words are put together of
// single elements. ELEMENT_BITS: of an element in the image; BITS: of one in the row. Both are 8 or 4; rows of four bits
// are made of bytes that hold such numbers, eight at a time.
template <int WORD_, int ELEMENT_BITS_, int BITS_, bool SIGNED_, int WEIGHT_BITS_>
struct QOperands {
    static constexpr int WORD = WORD_;
    static constexpr int ELEMENT_BITS = ELEMENT_BITS_;
    static constexpr int BITS = BITS_;
    static constexpr int SIGNED = SIGNED_;
    static constexpr int WEIGHT_BITS = WEIGHT_BITS_;
    // Bytes of the reduction that a copy makes.
    static constexpr int COPY = WORD == 1 || ELEMENT_BITS != BITS ? 4 : WORD;
    static constexpr int PER_COPY = 8 * COPY / BITS;
};

// Eight numbers of four bits, in the low halves of eight bytes.
__device__ __forceinline__ unsigned qgpu_pack_nibbles(unsigned first, unsigned second) {
    unsigned words[2] = {first & 0x0F0F0F0F, second & 0x0F0F0F0F};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        words[i] = (words[i] | words[i] >> 4) & 0x00FF00FF;
        words[i] = (words[i] | words[i] >> 8) & 0x0000FFFF;
    }
    return words[0] | words[1] << 16;
}

template <class T, class W, class O, int ROWS, int K_STAGES>
struct QProduct {
    // The reduction in units of one copy.
    static constexpr int PER_TAP = 8 * W::GROUP / O::ELEMENT_BITS;
    static constexpr int COPIES = T::K / O::COPY;
    static constexpr int CHUNKS = T::K / 16;
    static constexpr int ELEMENTS = W::TAPS * PER_TAP;
    static constexpr int UNITS = (ELEMENTS + O::PER_COPY - 1) / O::PER_COPY;
    static constexpr int ROW_STEP = T::THREADS / COPIES;
    static constexpr int PASSES = (T::M + ROW_STEP - 1) / ROW_STEP;
    static constexpr int ROWS_A_LINE = 8 / CHUNKS;
    // Bytes of the weights of a warp's columns, a stage.
    static constexpr int WEIGHTS = T::STEPS * T::WARP_N * 4 * (O::BITS == 4 ? 8 : O::WEIGHT_BITS);
    static constexpr int IMAGE_BYTES = T::M * T::K;
    static constexpr int STAGE_BYTES = IMAGE_BYTES + T::WARPS_N * WEIGHTS;
    static constexpr int SUMS_BYTES = T::WARPS_K > 1 ? 4 * T::M * T::N * T::WARPS_K : 0;
    static constexpr int STAGES_BYTES = T::STAGES * STAGE_BYTES;
    static constexpr int SHARED_BYTES = STAGES_BYTES > SUMS_BYTES ? STAGES_BYTES : SUMS_BYTES;

    static_assert(T::THREADS % COPIES == 0, "a thread copies one column of a stage");
    static_assert(8 % CHUNKS == 0, "rows of 128 bytes at most");
    static_assert(T::STEPS % T::WARPS_K == 0, "every warp has as many steps");

    const unsigned char *image, *padding, *weights;
    unsigned char *shared;
    unsigned thread, column;
    int base[PASSES], y[PASSES], x[PASSES];

    static __device__ __forceinline__ unsigned place(unsigned row, unsigned byte) {
        unsigned chunk = (byte / 16) ^ (row / ROWS_A_LINE % CHUNKS);
        return row * T::K + chunk * 16 + byte % 16;
    }

    __device__ __forceinline__ void find_rows(unsigned group) {
        column = thread % COPIES;
#pragma unroll
        for (int i = 0; i < PASSES; ++i) {
            unsigned m = blockIdx.x * T::M + thread / COPIES + i * ROW_STEP;
            unsigned batch = m / (W::OUT_HEIGHT * W::OUT_WIDTH);
            y[i] = int(m / W::OUT_WIDTH % W::OUT_HEIGHT) * W::STRIDE_Y - W::PAD_Y;
            x[i] = int(m % W::OUT_WIDTH) * W::STRIDE_X - W::PAD_X;
            base[i] = batch * (W::HEIGHT * W::WIDTH) * W::PIXEL + group * W::GROUP;
        }
    }

    // The pixel under a tap of row i, or nullptr outside the image.
    __device__ __forceinline__ const unsigned char *pixel(int i, unsigned tap) const {
        int at_y = y[i] + int(tap / W::TAPS_X) * W::DILATION_Y, at_x = x[i] + int(tap % W::TAPS_X) * W::DILATION_X;
        if (W::OUTSIDE) {
            // Below zero is far above as an unsigned number.
            if (unsigned(at_y) > (W::HEIGHT - 1) * W::UP_Y || unsigned(at_x) > (W::WIDTH - 1) * W::UP_X) return nullptr;
            if (W::UP_Y > 1 || W::UP_X > 1) {
                if (at_y % W::UP_Y != 0 || at_x % W::UP_X != 0) return nullptr;
                at_y /= W::UP_Y;
                at_x /= W::UP_X;
            }
        }
        return image + (base[i] + (at_y * W::WIDTH + at_x) * W::PIXEL);
    }

    // One byte, as many bits of it as a row has.
    __device__ __forceinline__ unsigned element(int i, unsigned number) const {
        if (number >= ELEMENTS) return 0;
        const unsigned char *at = pixel(i, number / PER_TAP);
        return (at == nullptr ? padding : at + number % PER_TAP)[0] & ((1 << O::BITS) - 1);
    }

    __device__ __forceinline__ void copy_image(unsigned stage, unsigned slot) {
        unsigned unit = stage * COPIES + column;
        unsigned char *into = shared + slot * STAGE_BYTES;
        // Behind the last element weights are zero, and so what is left in memory there adds nothing.
        if (unit >= UNITS) return;
#pragma unroll
        for (int i = 0; i < PASSES; ++i) {
            unsigned row = thread / COPIES + i * ROW_STEP;
            if (T::M % ROW_STEP != 0 && row >= T::M) break;
            if (ROWS % T::M != 0 && blockIdx.x * T::M + row >= ROWS) break;
            void *to = into + place(row, column * O::COPY);
            if (O::WORD == 1) {
                unsigned word = 0;
#pragma unroll
                for (int e = 0; e < 32 / O::BITS; ++e)
                    word |= element(i, unit * O::PER_COPY + e) << e * O::BITS;
                *static_cast<unsigned *>(to) = word;
            } else {
                unsigned first = unit * O::PER_COPY;
                const unsigned char *at = pixel(i, W::TAPS == 1 ? 0 : first / PER_TAP);
                const unsigned char *from = at == nullptr ? padding : at + first % PER_TAP * O::ELEMENT_BITS / 8;
                if (O::ELEMENT_BITS == O::BITS) {
                    qgpu_copy<O::COPY>(to, from);
                } else {
                    uint2 words = *reinterpret_cast<const uint2 *>(from);
                    *static_cast<unsigned *>(to) = qgpu_pack_nibbles(words.x, words.y);
                }
            }
        }
    }

    __device__ __forceinline__ void copy_weights(unsigned stage, unsigned slot) {
        unsigned char *into = shared + slot * STAGE_BYTES + IMAGE_BYTES;
        constexpr int PIECES = WEIGHTS / 16, ALL = T::WARPS_N * PIECES, ROUNDS = (ALL + T::THREADS - 1) / T::THREADS;
#pragma unroll
        for (int i = 0; i < ROUNDS; ++i) {
            unsigned piece = thread + i * T::THREADS;
            if (ALL % T::THREADS != 0 && piece >= ALL) break;
            unsigned warp = piece / PIECES;
            const unsigned char *from = weights + (warp * K_STAGES + stage) * WEIGHTS + piece % PIECES * 16;
            qgpu_copy<16>(into + piece * 16, from);
        }
    }

    __device__ __forceinline__ void multiply(int (*sums)[T::FRAGMENTS_N][2][2], unsigned slot, unsigned warp_m,
                                             unsigned warp_n, unsigned warp_k) {
        const unsigned char *rows = shared + slot * STAGE_BYTES, *columns = rows + IMAGE_BYTES + warp_n * WEIGHTS;
        unsigned lane = thread % 32;
#pragma unroll
        for (int i = 0; i < T::STEPS / T::WARPS_K; ++i) {
            unsigned step = i * T::WARPS_K + warp_k;
            unsigned a[T::FRAGMENTS_M][4], b[T::FRAGMENTS_N][2];
#pragma unroll
            for (int m = 0; m < T::FRAGMENTS_M; ++m)
                qgpu_load_matrices(a[m], rows + place(warp_m * T::WARP_M + m * 16 + lane % 16, step * 32 + lane / 16 * 16));
#pragma unroll
            for (int j = 0; j < T::FRAGMENTS_N; j += 2) {
                unsigned at = (step * T::FRAGMENTS_N / 2 + j / 2) * 32 + lane;
                if (O::BITS == 8 && O::WEIGHT_BITS == 4) {
                    // Sixteen times four bits: a sign extended for nothing, and sums that are sixteen times too large.
                    uint2 words = reinterpret_cast<const uint2 *>(columns)[at];
                    b[j][0] = words.x << 4 & 0xF0F0F0F0;
                    b[j][1] = words.x & 0xF0F0F0F0;
                    b[j + 1][0] = words.y << 4 & 0xF0F0F0F0;
                    b[j + 1][1] = words.y & 0xF0F0F0F0;
                } else {
                    uint4 words = reinterpret_cast<const uint4 *>(columns)[at];
                    b[j][0] = words.x;
                    b[j][1] = words.y;
                    b[j + 1][0] = words.z;
                    b[j + 1][1] = words.w;
                }
            }
#pragma unroll
            for (int m = 0; m < T::FRAGMENTS_M; ++m)
#pragma unroll
                for (int j = 0; j < T::FRAGMENTS_N; ++j)
                    qgpu_mma<O::BITS, O::SIGNED>(sums[m][j][0], sums[m][j][1], a[m], b[j][0], b[j][1]);
        }
    }
};

// The sums of a block, SLOTS rows of COLUMNS to a thread, the slots that `qgpu_slot_is_own` says.
//
// scratch and counters are for SPLITS > 1: M * N sums and one counter a tile, all zero before and after.
// Returns whether this block is to finish the tile.
template <class T, class W, class O, int ROWS, int K_STAGES, int SPLITS>
__device__ __forceinline__ bool qgpu_product(int *result, const void *image, const void *padding, const void *weights,
                                             int *scratch) {
    using P = QProduct<T, W, O, ROWS, K_STAGES>;
    __shared__ int4 memory[P::SHARED_BYTES / 16];
    int sums[T::FRAGMENTS_M][T::FRAGMENTS_N][2][2] = {};
    unsigned thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    unsigned warp_n = warp % T::WARPS_N, warp_m = warp / T::WARPS_N % T::WARPS_M;
    unsigned warp_k = warp / (T::WARPS_N * T::WARPS_M);
    unsigned group = blockIdx.z / SPLITS, split = blockIdx.z % SPLITS;
    P product;
    product.image = static_cast<const unsigned char *>(image);
    product.padding = static_cast<const unsigned char *>(padding);
    product.weights = static_cast<const unsigned char *>(weights) +
                      (group * gridDim.y + blockIdx.y) * (T::WARPS_N * K_STAGES * P::WEIGHTS);
    product.shared = reinterpret_cast<unsigned char *>(memory);
    product.thread = thread;
    product.find_rows(group);

    constexpr int EACH = (K_STAGES + SPLITS - 1) / SPLITS;
    int first = int(split) * EACH, count = SPLITS > 1 ? min(EACH, K_STAGES - first) : EACH;
    qgpu_next();
#pragma unroll
    for (int stage = 0; stage < T::STAGES - 1; ++stage)
        if (stage < count) product.copy_weights(first + stage, stage);
    qgpu_wait();
#pragma unroll
    for (int stage = 0; stage < T::STAGES - 1; ++stage) {
        if (stage < count) product.copy_image(first + stage, stage);
        qgpu_batch();
    }
#pragma unroll 1
    for (int stage = 0, slot = 0; stage < count; ++stage) {
        qgpu_arrive<T::STAGES - 2>();
        __syncthreads();
        int ahead = stage + T::STAGES - 1, free = slot == 0 ? T::STAGES - 1 : slot - 1;
        if (ahead < count) {
            product.copy_weights(first + ahead, free);
            product.copy_image(first + ahead, free);
        }
        qgpu_batch();
        product.multiply(sums, slot, warp_m, warp_n, warp_k);
        slot = slot == T::STAGES - 1 ? 0 : slot + 1;
    }

#pragma unroll
    for (int i = 0; i < T::FRAGMENTS_M; ++i)
#pragma unroll
        for (int j = 0; j < T::FRAGMENTS_N; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                result[(2 * i + e / 2) * T::COLUMNS + 2 * j + e % 2] =
                    O::BITS == 8 && O::WEIGHT_BITS == 4 ? sums[i][j][e / 2][e % 2] >> 4 : sums[i][j][e / 2][e % 2];

    if (T::WARPS_K > 1) {
        int *all = reinterpret_cast<int *>(memory) + (warp_m * T::WARPS_N + warp_n) * (T::WARP_M * T::WARP_N) + lane;
        constexpr int APART = T::M * T::N;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < T::SLOTS; ++i)
            if (i % T::WARPS_K != warp_k)
#pragma unroll
                for (int c = 0; c < T::COLUMNS; ++c)
                    all[warp_k * APART + (i * T::COLUMNS + c) * 32] = result[i * T::COLUMNS + c];
        __syncthreads();
#pragma unroll
        for (int i = 0; i < T::SLOTS; ++i)
            if (i % T::WARPS_K == warp_k)
#pragma unroll
                for (int c = 0; c < T::COLUMNS; ++c)
#pragma unroll
                    for (int k = 1; k < T::WARPS_K; ++k)
                        result[i * T::COLUMNS + c] +=
                            all[(i + k) % T::WARPS_K * APART + (i * T::COLUMNS + c) * 32];
    }
    if (SPLITS == 1) return true;

    // Whole numbers add up to the same in any order. Who comes last finishes, and leaves zeros behind.
    unsigned tile = (group * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    int *counter = scratch + tile;
    int *own = scratch + (gridDim.z / SPLITS * gridDim.y * gridDim.x + 31) / 32 * 32 +
               (tile * T::WARPS_M * T::WARPS_N + warp_m * T::WARPS_N + warp_n) * (T::WARP_M * T::WARP_N) + lane;
#pragma unroll
    for (int i = 0; i < T::SLOTS; ++i)
        if (i % T::WARPS_K == warp_k)
#pragma unroll
            for (int c = 0; c < T::COLUMNS; ++c)
                atomicAdd(own + (i * T::COLUMNS + c) * 32, result[i * T::COLUMNS + c]);
    __threadfence();
    __syncthreads();
    // The stages are no longer needed: their first word tells the others how many came before.
    int *before = reinterpret_cast<int *>(memory);
    if (thread == 0) *before = atomicAdd(counter, 1);
    __syncthreads();
    if (*before != SPLITS - 1) return false;
    __threadfence();
    if (thread == 0) *counter = 0;
#pragma unroll
    for (int i = 0; i < T::SLOTS; ++i)
        if (i % T::WARPS_K == warp_k)
#pragma unroll
            for (int c = 0; c < T::COLUMNS; ++c) {
                int *sum = own + (i * T::COLUMNS + c) * 32;
                result[i * T::COLUMNS + c] = __ldcg(sum);
                *sum = 0;
            }
    return true;
}

__device__ __forceinline__ void qgpu_set(int &number, int bits) { number = bits; }
__device__ __forceinline__ void qgpu_set(float &number, int bits) { number = __int_as_float(bits); }

// WORDS neighbouring words, two or four at once where there are so many.
template <int WORDS, class Number>
__device__ __forceinline__ void qgpu_load(Number *words, const void *from) {
    if (WORDS % 4 == 0) {
#pragma unroll
        for (int i = 0; i < WORDS / 4; ++i) {
            int4 four = static_cast<const int4 *>(from)[i];
            qgpu_set(words[4 * i], four.x);
            qgpu_set(words[4 * i + 1], four.y);
            qgpu_set(words[4 * i + 2], four.z);
            qgpu_set(words[4 * i + 3], four.w);
        }
    } else if (WORDS % 2 == 0) {
#pragma unroll
        for (int i = 0; i < WORDS / 2; ++i) {
            int2 two = static_cast<const int2 *>(from)[i];
            qgpu_set(words[2 * i], two.x);
            qgpu_set(words[2 * i + 1], two.y);
        }
    } else {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) qgpu_set(words[i], static_cast<const int *>(from)[i]);
    }
}

template <int WORDS>
__device__ __forceinline__ void qgpu_store(void *to, const int *words) {
    if (WORDS % 4 == 0) {
#pragma unroll
        for (int i = 0; i < WORDS / 4; ++i)
            static_cast<int4 *>(to)[i] = make_int4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
    } else if (WORDS % 2 == 0) {
#pragma unroll
        for (int i = 0; i < WORDS / 2; ++i) static_cast<int2 *>(to)[i] = make_int2(words[2 * i], words[2 * i + 1]);
    } else {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) static_cast<int *>(to)[i] = words[i];
    }
}
