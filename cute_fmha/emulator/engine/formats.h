/* Floating-point formats narrower than the host's, described by numbers: rounding into any of them. */
#pragma once
#include "alu.h"

typedef struct {
    const char *name;
    int bits;            /* of an element */
    int mantissa, bias;  /* stored mantissa bits, exponent bias */
    uint64_t max;        /* the largest finite magnitude */
    uint64_t infinity;   /* 0: there is none, an overflow saturates */
    uint64_t nan;        /* canonical; without a NaN what NaN converts to */
} Format;

extern const Format format_f16, format_bf16, format_f32, format_f64, format_tf32, format_e4m3, format_e5m2,
    format_e2m3, format_e3m2, format_e2m1;
const Format *format_named(const char *name, size_t length); /* NULL: unknown */

/* A number taken apart: (-1)^negative * significand * 2^exponent, or a NaN or an infinity. */
typedef struct { enum { NUMBER_FINITE, NUMBER_INFINITE, NUMBER_NAN } kind; bool negative;
                 uint64_t significand; int exponent; } Number;
Number number_of_double(double value);
Number number_of_integer(uint64_t bits, bool is_signed);
/* The code of a number in the given rounding; `finite`: overflow gives the largest finite number. */
uint64_t number_encode(const Format *format, Number number, int rounding, bool finite);
double format_decode(const Format *format, uint64_t code);

/* Round an f32 to nearest even into a narrower format. The constants fold after inlining and the loops
 * around it vectorise: subnormal results come from the host's own addition of a power of two whose unit
 * in the last place is the format's smallest subnormal. `over` is the code of an overflow. */
static inline __attribute__((always_inline)) uint32_t narrow(uint32_t x, int bits, int mantissa, int bias,
                                                              uint32_t max, uint32_t over, uint32_t nan) {
    uint32_t magnitude = x & 0x7fffffffu;
    int drop = 23 - mantissa;
    uint32_t normal = magnitude - ((uint32_t)(127 - bias) << 23);
    normal = (normal + ((1u << (drop - 1)) - 1) + ((normal >> drop) & 1)) >> drop;
    uint32_t magic = (uint32_t)(23 + 1 - bias - mantissa + 127) << 23;
    uint32_t subnormal = as_bits(as_float(magnitude) + as_float(magic)) - magic;
    uint32_t code = magnitude < ((uint32_t)(128 - bias) << 23) ? subnormal : normal;
    code = code > max ? over : code;
    code |= (x >> 31) << (bits - 1);
    return magnitude > 0x7f800000u ? nan : code;
}
static inline uint32_t narrow_f16(uint32_t x) { return narrow(x, 16, 10, 15, 0x7bff, 0x7c00, 0x7fff); }
static inline uint32_t narrow_bf16(uint32_t x) { return narrow(x, 16, 7, 127, 0x7f7f, 0x7f80, 0x7fff); }
/* The sign of a NaN is kept: min and max with .xorsign look at it. */
static inline uint32_t widen_f16(uint32_t half) {
    uint32_t magnitude = (half & 0x7fff) << 13;
    /* 2^112 moves the exponent to f32's bias and makes subnormals normal. */
    uint32_t finite = as_bits(as_float(magnitude) * 0x1p112f);
    uint32_t value = magnitude >= 0x0f800000u ? 0x7f800000u : finite;
    return (magnitude > 0x0f800000u ? NAN32 : value) | (half & 0x8000) << 16;
}
