/* Number formats: taking numbers apart, rounding into any format, decoding. */
#include "formats.h"

#include <math.h>

const Format format_f16 = {"f16", 16, 10, 15, 0x7bff, 0x7c00, 0x7fff};
const Format format_bf16 = {"bf16", 16, 7, 127, 0x7f7f, 0x7f80, 0x7fff};
const Format format_f32 = {"f32", 32, 23, 127, 0x7f7fffff, 0x7f800000, NAN32};
const Format format_f64 = {"f64", 64, 52, 1023, 0x7fefffffffffffff, 0x7ff0000000000000, 0xfff8000000000000};
const Format format_tf32 = {"tf32", 19, 10, 127, 0x3fbff, 0x3fc00, 0x3ffff};
const Format format_e4m3 = {"e4m3", 8, 3, 7, 0x7e, 0, 0x7f};
const Format format_e5m2 = {"e5m2", 8, 2, 15, 0x7b, 0x7c, 0x7f};
const Format format_e2m3 = {"e2m3", 6, 3, 1, 0x1f, 0, 0x1f};
const Format format_e3m2 = {"e3m2", 6, 2, 3, 0x1f, 0, 0x1f};
const Format format_e2m1 = {"e2m1", 4, 1, 1, 0x7, 0, 0x7};

const Format *format_named(const char *name, size_t length) {
    static const Format *const all[] = {&format_f16, &format_bf16, &format_f32, &format_f64, &format_tf32,
                                        &format_e4m3, &format_e5m2, &format_e2m3, &format_e3m2, &format_e2m1};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (strlen(all[i]->name) == length && !memcmp(all[i]->name, name, length)) return all[i];
    return NULL;
}

Number number_of_double(double value) {
    uint64_t bits = as_bits64(value), fraction = bits & 0xfffffffffffffull;
    int exponent = (int)(bits >> 52 & 0x7ff);
    Number number = {.kind = NUMBER_FINITE, .negative = bits >> 63};
    if (exponent == 0x7ff) number.kind = fraction ? NUMBER_NAN : NUMBER_INFINITE;
    number.significand = exponent ? fraction | 1ull << 52 : fraction;
    number.exponent = (exponent ? exponent : 1) - 1075;
    return number;
}

Number number_of_integer(uint64_t bits, bool is_signed) {
    Number number = {.kind = NUMBER_FINITE, .negative = is_signed && bits >> 63};
    number.significand = number.negative ? 0 - bits : bits;
    return number;
}

static bool rounds_up(int rounding, bool negative, bool odd, uint64_t lost, uint64_t half, bool sticky) {
    switch (rounding) {
    case ROUND_NEAREST: return lost > half || (lost == half && (sticky || odd));
    case ROUND_AWAY: return lost >= half;
    case ROUND_DOWN: return negative && (lost || sticky);
    case ROUND_UP: return !negative && (lost || sticky);
    default: return false;
    }
}

static uint64_t overflowed(const Format *format, bool negative, int rounding, bool finite) {
    bool outwards = rounding == ROUND_NEAREST || rounding == ROUND_AWAY ||
                    (negative ? rounding == ROUND_DOWN : rounding == ROUND_UP);
    return outwards && format->infinity && !finite ? format->infinity : format->max;
}

uint64_t number_encode(const Format *format, Number number, int rounding, bool finite) {
    uint64_t sign = (uint64_t)number.negative << (format->bits - 1);
    if (number.kind == NUMBER_NAN) return format->nan;
    if (number.kind == NUMBER_INFINITE)
        return sign | (format->infinity && !finite ? format->infinity : format->max);
    if (!number.significand) return sign;
    int zeros = __builtin_clzll(number.significand);
    uint64_t significand = number.significand << zeros; /* the leading one at bit 63 */
    int exponent = number.exponent - zeros + 63, least = 1 - format->bias;
    int drop = 63 - format->mantissa + (exponent < least ? least - exponent : 0);
    uint64_t kept = drop > 63 ? 0 : significand >> drop;
    /* Beyond 64 dropped bits the number is below half of the smallest subnormal. */
    uint64_t lost = drop > 64 ? 0 : drop == 64 ? significand : significand & ((1ull << drop) - 1);
    uint64_t half = drop > 63 ? 1ull << 63 : 1ull << (drop - 1);
    bool sticky = drop > 64;
    if (rounds_up(rounding, number.negative, kept & 1, lost, half, sticky)) kept++;
    uint64_t code = exponent < least ? kept : kept + ((uint64_t)(exponent - least) << format->mantissa);
    if (code > format->max || exponent > format->bias + 1)
        code = overflowed(format, number.negative, rounding, finite);
    return sign | code;
}

double format_decode(const Format *format, uint64_t code) {
    uint64_t magnitude = code & ((1ull << (format->bits - 1)) - 1);
    bool negative = code >> (format->bits - 1) & 1;
    double value;
    if (magnitude > format->max) {
        value = format->infinity && magnitude == format->infinity ? INFINITY : NAN;
    } else {
        uint64_t fraction = magnitude & ((1ull << format->mantissa) - 1);
        int exponent = (int)(magnitude >> format->mantissa);
        if (exponent) fraction |= 1ull << format->mantissa;
        value = ldexp((double)fraction, (exponent ? exponent : 1) - format->bias - format->mantissa);
    }
    return negative ? -value : value;
}

/* ---------------------------------------------------------------- what other families call */
float half_to_float(uint16_t bits) { return as_float(widen_f16(bits)); }
uint16_t float_to_half(float value) { return (uint16_t)narrow_f16(as_bits(value)); }
uint16_t float_to_bfloat(float value) { return (uint16_t)narrow_bf16(as_bits(value)); }

/* 256 entries each, filled when the library is loaded. */
static float e4m3_values[256], e5m2_values[256], e2m3_values[64], e3m2_values[64], e2m1_values[16];
__attribute__((constructor)) static void fill_tables(void) {
    for (int i = 0; i < 256; i++) {
        e4m3_values[i] = (float)format_decode(&format_e4m3, (uint64_t)i);
        e5m2_values[i] = (float)format_decode(&format_e5m2, (uint64_t)i);
        if (i < 64) e2m3_values[i] = (float)format_decode(&format_e2m3, (uint64_t)i);
        if (i < 64) e3m2_values[i] = (float)format_decode(&format_e3m2, (uint64_t)i);
        if (i < 16) e2m1_values[i] = (float)format_decode(&format_e2m1, (uint64_t)i);
    }
}
float e4m3_to_float(uint8_t bits) { return e4m3_values[bits]; }
float e5m2_to_float(uint8_t bits) { return e5m2_values[bits]; }
float e2m3_to_float(uint8_t bits) { return e2m3_values[bits & 63]; }
float e3m2_to_float(uint8_t bits) { return e3m2_values[bits & 63]; }
float e2m1_to_float(uint8_t bits) { return e2m1_values[bits & 15]; }
