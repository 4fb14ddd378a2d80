/* The integer arithmetic of qcompiler/quant/arithmetic.py in C, bit for bit.
 *
 * Portable C99 with two assumptions that every compiler of interest keeps: `>>` of a negative integer is
 * arithmetic, and float is IEEE binary32 evaluated in binary32 (compile with -ffp-contract=off).
 */
#ifndef QARITH_H
#define QARITH_H

#include <stdint.h>
#include <string.h>

/* Indices of qcompiler.simulator.isa.VARIANTS. */
enum { QARITH_FLOAT32 = 0, QARITH_TFLITE = 1, QARITH_TOSA = 2, QARITH_SHIFT = 3 };

/* Additions bring both inputs, of 8 or 16 bits, to a common scale with this many extra bits (TFLite add.cc). */
enum { QARITH_TFLITE_ADD_LEFT_SHIFT = 20, QARITH_TFLITE_ADD_LEFT_SHIFT_INT16 = 15 };

/* Two's complement int32 of x. */
static inline int32_t qarith_wrap_int32(int64_t x) {
    uint32_t bits = (uint32_t)(uint64_t)x;
    int32_t wrapped;
    memcpy(&wrapped, &bits, sizeof wrapped);
    return wrapped;
}

/* High half of 2*a*b, to nearest (gemmlowp SaturatingRoundingDoublingHighMul). */
static inline int64_t qarith_doubling_high_mul(int32_t a, int32_t b) {
    int64_t product = (int64_t)a * b;
    int64_t total = product + (product >= 0 ? (int64_t)1 << 30 : 1 - ((int64_t)1 << 30));
    int64_t high = total / ((int64_t)1 << 31); /* truncates toward zero */
    return high > INT32_MAX ? INT32_MAX : high;
}

/* x / 2^exponent, to nearest, ties away from zero (gemmlowp RoundingDivideByPOT). */
static inline int64_t qarith_rounding_divide_by_pot(int64_t x, int32_t exponent) {
    int64_t mask = ((int64_t)1 << exponent) - 1;
    int64_t threshold = (mask >> 1) + (x < 0);
    return (x >> exponent) + ((x & mask) > threshold);
}

static inline int64_t qarith_rescale_float32(int64_t acc, float multiplier) {
    const float limit = 1073741824.0f; /* 2^30 */
    float scaled = (float)acc * multiplier;
    scaled = scaled > limit ? limit : scaled < -limit ? -limit : scaled;
    /* Half to even without libm: at 2^52 * 1.5 a double's last bit is worth one. */
    const double magic = 6755399441055744.0;
    return (int64_t)(((double)scaled + magic) - magic);
}

/* acc is int64 because an addition's sum may pass int32 before it wraps; so does numpy's. */
static inline int64_t qarith_rescale_tflite(int64_t acc, int32_t multiplier, int32_t shift) {
    int32_t left = shift > 0 ? shift : 0, right = shift < 0 ? -shift : 0;
    int32_t shifted = qarith_wrap_int32((int64_t)((uint64_t)acc << left));
    return qarith_rounding_divide_by_pot(qarith_doubling_high_mul(shifted, multiplier), right);
}

static inline int64_t qarith_rescale_tosa(int64_t acc, int32_t multiplier, int32_t shift) {
    int32_t total = 31 - shift;
    return (acc * multiplier + ((int64_t)1 << (total - 1))) >> total;
}

static inline int64_t qarith_rescale_shift(int64_t acc, int32_t shift) {
    int32_t left = shift > 0 ? shift : 0, right = shift < 0 ? -shift : 0;
    int64_t rounding = right > 0 ? (int64_t)1 << (right - 1) : 0;
    return ((int64_t)((uint64_t)acc << left) + rounding) >> right;
}

/* `multiplier` holds the bits of a float32 in the float32 variant. */
static inline int64_t qarith_rescale(int64_t acc, int32_t multiplier, int32_t shift, int32_t variant) {
    float real;
    switch (variant) {
    case QARITH_FLOAT32:
        memcpy(&real, &multiplier, sizeof real);
        return qarith_rescale_float32(acc, real);
    case QARITH_TFLITE: return qarith_rescale_tflite(acc, multiplier, shift);
    case QARITH_TOSA: return qarith_rescale_tosa(acc, multiplier, shift);
    default: return qarith_rescale_shift(acc, shift);
    }
}

/* The upper 16 bits of a multiplier, to nearest, at most 2^15 - 1. */
static inline int32_t qarith_reduced_multiplier(int32_t multiplier) {
    int64_t reduced = ((int64_t)multiplier + (1 << 15)) >> 16;
    return (int32_t)(reduced > 0x7FFF ? 0x7FFF : reduced);
}

/* arithmetic.rescale_wide: acc has up to 48 bits; shift is at most 14. */
static inline int64_t qarith_rescale_wide(int64_t acc, int32_t multiplier, int32_t shift, int32_t variant) {
    if (variant == QARITH_FLOAT32 || variant == QARITH_SHIFT) return qarith_rescale(acc, multiplier, shift, variant);
    int32_t total = 15 - shift;
    return (acc * qarith_reduced_multiplier(multiplier) + ((int64_t)1 << (total - 1))) >> total;
}

static inline int32_t qarith_clamp(int64_t x, int32_t low, int32_t high) {
    return (int32_t)(x < low ? low : x > high ? high : x);
}

/* The factors of arithmetic.add_factors, in its order. */
typedef struct {
    int32_t multiplier_a, shift_a, multiplier_b, shift_b, multiplier_y, shift_y;
} qarith_add_factors;

/* a ± b of 8 or 16 bits without zero points, rescaled to the output; neither zero point nor saturation. */
static inline int64_t qarith_add(int32_t a, int32_t b, int32_t bits, const qarith_add_factors *f, int32_t variant,
                                 int subtract) {
    int64_t sign = subtract ? -1 : 1;
    if (variant == QARITH_TFLITE) {
        const int64_t one = (int64_t)1 << (bits == 16 ? QARITH_TFLITE_ADD_LEFT_SHIFT_INT16 : QARITH_TFLITE_ADD_LEFT_SHIFT);
        int64_t scaled_a = qarith_rescale_tflite(a * one, f->multiplier_a, f->shift_a);
        int64_t scaled_b = qarith_rescale_tflite(b * one, f->multiplier_b, f->shift_b);
        return qarith_rescale_tflite(scaled_a + sign * scaled_b, f->multiplier_y, f->shift_y);
    }
    int64_t total = (int64_t)a * f->multiplier_a + sign * ((int64_t)b * f->multiplier_b);
    return (total + ((int64_t)1 << (f->shift_y - 1))) >> f->shift_y;
}

/* One element of arithmetic.softmax; `total` is the sum of the row's exponentials. No saturation. */
static inline int64_t qarith_softmax(int32_t exponential, int64_t total, int32_t inverse_scale, int32_t zero_point) {
    int64_t scaled = total << 8;
    return (2 * (int64_t)exponential * inverse_scale + scaled) / (2 * scaled) + zero_point;
}

/* Of a positive number, as 32 bits. */
static inline int32_t qarith_leading_zeros(int64_t positive) {
    int32_t zeros = 0;
    while ((positive << zeros) < (int64_t)1 << 31) ++zeros;
    return zeros;
}

/* --- functions of 16 bits: qcompiler/quant/interpolation.py --- */

enum { QARITH_ENTRIES = 513, QARITH_SOFTMAX_ENTRIES = 2 * QARITH_ENTRIES + 2 };

/* A table's straight line at x, which has 16 bits. */
static inline int32_t qarith_interpolate(int32_t x, const int32_t *table) {
    int32_t index = (x >> 7) + 256, base = table[index];
    return base + (((table[index + 1] - base) * (x & 127) + 64) >> 7);
}

/* The exponential of an element below its row's largest by -difference; `table` is interpolation.softmax_table's. */
static inline int32_t qarith_softmax16_term(int32_t difference, const int32_t *table) {
    const int32_t *factor = table + 2 * QARITH_ENTRIES;
    int64_t scaled = qarith_rescale_tflite(difference, factor[0], factor[1]) + INT16_MAX;
    return qarith_interpolate(qarith_clamp(scaled, INT16_MIN, INT16_MAX), table);
}

/* `total` is the row's sum of terms, positive and below 2^31. Stores the shift of the elements. */
static inline int32_t qarith_softmax16_reciprocal(int64_t total, const int32_t *table, int32_t *shift) {
    int32_t headroom = qarith_leading_zeros(total);
    int64_t fraction = (((total << (headroom - 1)) + (1 << 13)) >> 14) - ((1 << 15) + (1 << 16));
    *shift = 31 - headroom;
    return qarith_interpolate(qarith_clamp(fraction, INT16_MIN, INT16_MAX), table + QARITH_ENTRIES);
}

/* One element, not negative. */
static inline int64_t qarith_softmax16(int32_t exponential, int32_t reciprocal, int32_t shift) {
    int64_t result = ((int64_t)exponential * reciprocal + ((int64_t)1 << (shift - 1))) >> shift;
    return result < 0 ? 0 : result;
}

/* --- softmax as TFLite's reference kernel has it: qcompiler/quant/tflite_functions.py --- */

/* What an exponential (Q0.31) adds to a sum of them (Q12.19). */
static inline int64_t qarith_tflite_softmax_term(int32_t exponential) {
    return qarith_rounding_divide_by_pot(exponential, 12);
}

/* `total` is the row's sum of terms, at least one and below 2^31. Stores the shift of the elements. */
static inline int32_t qarith_tflite_softmax_reciprocal(int64_t total, int32_t *shift) {
    int32_t headroom = qarith_leading_zeros(total);
    /* Newton and Raphson on half of the denominator: 48/17 - 32/17 * half is the first guess, in Q2.29. */
    int32_t half = (int32_t)((total << headroom) >> 1);
    int32_t x = (int32_t)(1515870810 + qarith_doubling_high_mul(half, -1010580540));
    for (int step = 0; step < 3; ++step) {
        int32_t error = (int32_t)(((int64_t)1 << 29) - qarith_doubling_high_mul(half, x));
        x += (int32_t)(qarith_doubling_high_mul(x, error) * 4);
    }
    *shift = 12 - headroom + 31 - 8;
    return x >= 1 << 30 ? INT32_MAX : x * 2;
}

/* One element. No saturation. */
static inline int64_t qarith_tflite_softmax(int32_t exponential, int32_t reciprocal, int32_t shift, int32_t zero_point) {
    return qarith_rounding_divide_by_pot(qarith_doubling_high_mul(reciprocal, exponential), shift) + zero_point;
}

#endif
