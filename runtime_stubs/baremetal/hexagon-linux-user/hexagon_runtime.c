/* What compiled code calls that an SDK's C library and compiler runtime would hold: memory functions, divisions, and
 * what quantized networks begin and end with of libm. */
#include <stddef.h>
#include <stdint.h>

/* --- memory ----------------------------------------------------------------------------------------------- */

enum { VECTOR = 128 };
typedef int8_t any_vector __attribute__((vector_size(VECTOR), aligned(1), may_alias));
typedef uint64_t any_pair __attribute__((may_alias));

void *memcpy(void *restrict to, const void *restrict from, size_t size) {
    uint8_t *out = to;
    const uint8_t *in = from;
    if (size >= VECTOR) {
        size_t at = 0;
        for (; at + VECTOR <= size; at += VECTOR) *(any_vector *)(out + at) = *(const any_vector *)(in + at);
        /* The last vector overlaps the one before. */
        *(any_vector *)(out + size - VECTOR) = *(const any_vector *)(in + size - VECTOR);
        return to;
    }
    if ((((uintptr_t)out | (uintptr_t)in) & 7) == 0) {
        for (; size >= 8; size -= 8, out += 8, in += 8) *(any_pair *)out = *(const any_pair *)in;
    }
    while (size-- > 0) *out++ = *in++;
    return to;
}

/* LLVM's name for a copy of 32 bytes or more, in eights, between addresses it believes aligned. */
void *__hexagon_memcpy_likely_aligned_min32bytes_mult8bytes(void *restrict to, const void *restrict from, size_t size) {
    return memcpy(to, from, size);
}

void *memmove(void *to, const void *from, size_t size) {
    uint8_t *out = to;
    const uint8_t *in = from;
    if (out <= in || out >= in + size) {
        for (size_t at = 0; at < size; at++) out[at] = in[at];
    } else {
        while (size-- > 0) out[size] = in[size];
    }
    return to;
}

void *memset(void *to, int value, size_t size) {
    uint8_t *out = to;
    const uint8_t byte = (uint8_t)value;
    if (size >= VECTOR) {
        const any_vector filled = (any_vector){0} + (int8_t)byte;
        size_t at = 0;
        for (; at + VECTOR <= size; at += VECTOR) *(any_vector *)(out + at) = filled;
        *(any_vector *)(out + size - VECTOR) = filled;
        return to;
    }
    while (size-- > 0) *out++ = byte;
    return to;
}

/* --- division: Hexagon has no instruction for it; names and results are those of LLVM's runtime ------------ */

static uint64_t divide(uint64_t n, uint64_t d, uint64_t *remainder) {
    uint64_t quotient = 0;
    if (d != 0 && n >= d) {
        int32_t shift = __builtin_clzll(d) - __builtin_clzll(n);
        d <<= shift;
        for (; shift >= 0; shift--, d >>= 1) {
            quotient <<= 1;
            if (n >= d) n -= d, quotient |= 1;
        }
    }
    *remainder = n;
    return quotient;
}

static uint64_t magnitude(int64_t number) { return number < 0 ? -(uint64_t)number : (uint64_t)number; }

static int64_t divide_signed(int64_t n, int64_t d, int64_t *remainder) {
    uint64_t rest;
    const uint64_t quotient = divide(magnitude(n), magnitude(d), &rest);
    *remainder = n < 0 ? -(int64_t)rest : (int64_t)rest;
    return (n < 0) != (d < 0) ? (int64_t)-quotient : (int64_t)quotient;
}

uint64_t __hexagon_udivdi3(uint64_t n, uint64_t d) { return divide(n, d, &(uint64_t){0}); }
int64_t __hexagon_divdi3(int64_t n, int64_t d) { return divide_signed(n, d, &(int64_t){0}); }
uint32_t __hexagon_udivsi3(uint32_t n, uint32_t d) { return (uint32_t)divide(n, d, &(uint64_t){0}); }
int32_t __hexagon_divsi3(int32_t n, int32_t d) { return (int32_t)divide_signed(n, d, &(int64_t){0}); }

uint64_t __hexagon_umoddi3(uint64_t n, uint64_t d) {
    uint64_t rest;
    (void)divide(n, d, &rest);
    return rest;
}

int64_t __hexagon_moddi3(int64_t n, int64_t d) {
    int64_t rest;
    (void)divide_signed(n, d, &rest);
    return rest;
}

uint32_t __hexagon_umodsi3(uint32_t n, uint32_t d) { return (uint32_t)__hexagon_umoddi3(n, d); }
int32_t __hexagon_modsi3(int32_t n, int32_t d) { return (int32_t)__hexagon_moddi3(n, d); }

/* --- floats ----------------------------------------------------------------------------------------------- */

static uint32_t bits_of(float x) {
    union { float real; uint32_t bits; } view = {x};
    return view.bits;
}

static float float_of(uint32_t bits) {
    union { uint32_t bits; float real; } view = {bits};
    return view.real;
}

enum { FRACTION_BITS = 23, EXPONENT_BIAS = 127, EXPONENT_MAX = 255 };
static const uint32_t HIDDEN = 1u << FRACTION_BITS, INFINITY_BITS = 0x7F800000u, QUIET_NAN = 0x7FC00000u;

/* The fraction with its leading one at bit 23, and the exponent that goes with it, of a finite number but 0. */
static uint32_t normalized(uint32_t bits, int32_t *exponent) {
    uint32_t fraction = bits & (HIDDEN - 1);
    *exponent = (int32_t)(bits >> FRACTION_BITS & EXPONENT_MAX);
    if (*exponent != 0) return fraction | HIDDEN;
    const int32_t shift = __builtin_clz(fraction) - 8;
    *exponent = 1 - shift;
    return fraction << shift;
}

/* IEEE division to nearest, ties to even. */
float __hexagon_divsf3(float a, float b) {
    const uint32_t sign = (bits_of(a) ^ bits_of(b)) & 0x80000000u;
    const uint32_t n = bits_of(a) & 0x7FFFFFFFu, d = bits_of(b) & 0x7FFFFFFFu;
    if (n > INFINITY_BITS || d > INFINITY_BITS || (n == d && (n == 0 || n == INFINITY_BITS))) return float_of(QUIET_NAN);
    if (n == INFINITY_BITS || d == 0) return float_of(sign | INFINITY_BITS);
    if (d == INFINITY_BITS || n == 0) return float_of(sign);
    int32_t n_exponent, d_exponent;
    const uint64_t numerator = normalized(n, &n_exponent), denominator = normalized(d, &d_exponent);
    int32_t exponent = n_exponent - d_exponent + EXPONENT_BIAS;
    /* 26 or 27 bits of quotient; the lowest also says whether anything is left. */
    uint64_t rest;
    uint64_t quotient = divide(numerator << 26, denominator, &rest);
    if (quotient < 1u << 26) {
        quotient = divide(numerator << 27, denominator, &rest);
        exponent--;
    }
    uint32_t fraction = (uint32_t)quotient | (rest != 0);
    if (exponent >= EXPONENT_MAX) return float_of(sign | INFINITY_BITS);
    if (exponent <= 0) {
        const int32_t lost = 1 - exponent;
        fraction = lost > 27 ? 1 : fraction >> lost | ((fraction & ((1u << lost) - 1)) != 0);
        exponent = 0;
    } else {
        fraction &= (1u << 26) - 1;
    }
    const uint32_t below = fraction & 7;
    uint32_t result = (uint32_t)exponent << FRACTION_BITS | fraction >> 3;
    /* A carry out of the fraction rightly raises the exponent. */
    if (below > 4 || (below == 4 && (result & 1))) result++;
    return float_of(sign | result);
}

/* To the nearest whole number, ties to even: beyond 2^23 floats are whole, so adding that and taking it away rounds. */
float nearbyintf(float x) {
    const float whole = float_of((bits_of(x) & 0x80000000u) | bits_of(8388608.0f));
    return (bits_of(x) & 0x7FFFFFFFu) >= bits_of(8388608.0f) ? x : (x + whole) - whole;
}

/* e^x = 2^k e^r with |r| <= ln 2 / 2; ln 2 in two parts (Cody and Waite), e^r by its Taylor series. Within 2 ulp. */
float expf(float x) {
    if (!(x == x)) return x;
    if (x > 88.73f) return float_of(INFINITY_BITS);
    if (x < -104.0f) return 0.0f;
    const float scaled = x * 1.44269504f;
    const int32_t k = (int32_t)(scaled < 0 ? scaled - 0.5f : scaled + 0.5f);
    const float r = (x - (float)k * 0.693359375f) - (float)k * -2.12194440e-4f;
    float power = 1.0f / 5040;
    static const float inverse_factorials[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (uint32_t i = 0; i < 7; i++) power = power * r + inverse_factorials[i];
    /* In two steps, as 2^k itself may be no normal number. */
    const int32_t half = k / 2;
    power *= float_of((uint32_t)(half + EXPONENT_BIAS) << FRACTION_BITS);
    return power * float_of((uint32_t)(k - half + EXPONENT_BIAS) << FRACTION_BITS);
}
