/* cvt of packed values: f16x2 and bf16x2 from f32 pairs, and FP8, FP6, FP4 and UE8M0 pairs to and from
 * f32, f16x2 and bf16x2. Of two f32 sources the first becomes the upper element. */
#include "formats.h"

#include <math.h>

/* u[0]: bits of a destination element. */
enum { RELU = 1, FINITE = 2 }; /* u[1] */
enum { FROM_F32, FROM_F16, FROM_BF16 }; /* u[2] */

static inline uint32_t without_negatives(uint32_t x) {
    return x & 0x80000000u && (x & 0x7fffffffu) <= 0x7f800000u ? 0 : x;
}

/* The upper and lower elements of the lanes as f32 bits. */
static void elements(Warp *w, const Instr *in, uint32_t mask, uint32_t *high, uint32_t *low) {
    const uint32_t *a = src32(w, in, &in->args[1], mask);
    if (in->u[2] == FROM_F32) {
        memcpy(high, a, LANES * sizeof *high);
        memcpy(low, src32(w, in, &in->args[2], mask), LANES * sizeof *low);
    } else if (in->u[2] == FROM_BF16) {
        for (int i = 0; i < LANES; i++) high[i] = a[i] & 0xffff0000u, low[i] = a[i] << 16;
    } else {
        for (int i = 0; i < LANES; i++) high[i] = widen_f16(a[i] >> 16), low[i] = widen_f16(a[i] & 0xffff);
    }
    if (in->u[1] & RELU)
        for (int i = 0; i < LANES; i++)
            high[i] = without_negatives(high[i]), low[i] = without_negatives(low[i]);
}

static Status store(Warp *w, const Instr *in, uint32_t mask, const uint32_t *high, const uint32_t *low) {
    uint32_t *d = dst32(w, &in->args[0], mask);
    int shift = (int)in->u[0];
    EACH_LANE(mask, d[i] = high[i] << shift | low[i]);
    return NEXT;
}

#define NARROWING(NAME, ...)                                                \
    static Status NAME(Warp *w, const Instr *in, uint32_t mask) {           \
        uint32_t high[LANES], low[LANES];                                   \
        elements(w, in, mask, high, low);                                   \
        bool finite = in->u[1] & FINITE;                                    \
        (void)finite;                                                       \
        for (int i = 0; i < LANES; i++) {                                   \
            uint32_t x = high[i];                                           \
            high[i] = __VA_ARGS__;                                          \
            x = low[i];                                                     \
            low[i] = __VA_ARGS__;                                           \
        }                                                                   \
        return store(w, in, mask, high, low);                               \
    }
NARROWING(to_f16, narrow(x, 16, 10, 15, 0x7bff, finite ? 0x7bff : 0x7c00, 0x7fff))
NARROWING(to_bf16, narrow(x, 16, 7, 127, 0x7f7f, finite ? 0x7f7f : 0x7f80, 0x7fff))
NARROWING(to_e4m3, narrow(x, 8, 3, 7, 0x7e, 0x7e, 0x7f))
NARROWING(to_e5m2, narrow(x, 8, 2, 15, 0x7b, 0x7b, 0x7f))
NARROWING(to_e2m3, narrow(x, 6, 3, 1, 0x1f, 0x1f, 0x1f)) /* a NaN becomes the largest number */
NARROWING(to_e3m2, narrow(x, 6, 2, 3, 0x1f, 0x1f, 0x1f))
NARROWING(to_e2m1, narrow(x, 4, 1, 1, 0x7, 0x7, 0x7))

static inline uint32_t truncated(uint32_t x, const Format *format, bool finite) {
    return (uint32_t)number_encode(format, number_of_double((double)as_float(x)), ROUND_ZERO, finite);
}
NARROWING(to_f16_rz, truncated(x, &format_f16, finite))
NARROWING(to_bf16_rz, truncated(x, &format_bf16, finite))

/* The sign is dropped. Towards zero the exponent is what is left; upwards, any fraction of a number above
 * 2^-127 adds one. Infinity overflows to 255, the NaN, or with .satfinite to 254. */
static inline uint32_t scale_code(uint32_t x, bool up, bool finite) {
    uint32_t magnitude = x & 0x7fffffffu, code = magnitude >> 23;
    if (magnitude > 0x7f800000u) return 0xff;
    if (up && (magnitude & 0x7fffff) && magnitude > 0x400000 && magnitude < 0x7f800000u) code++;
    return finite && code == 0xff ? 0xfe : code;
}
NARROWING(to_ue8m0_rz, scale_code(x, false, finite))
NARROWING(to_ue8m0_rp, scale_code(x, true, finite))

/* The frequent one: cvt.rn.bf16x2.f32. */
static Status pair_bf16(Warp *w, const Instr *in, uint32_t mask) {
    const uint32_t *a = src32(w, in, &in->args[1], mask), *b = src32(w, in, &in->args[2], mask);
    uint32_t *d = dst32(w, &in->args[0], mask);
    EACH_LANE(mask, d[i] = narrow_bf16(a[i]) << 16 | narrow_bf16(b[i]));
    return NEXT;
}
static Status pair_f16(Warp *w, const Instr *in, uint32_t mask) {
    const uint32_t *a = src32(w, in, &in->args[1], mask), *b = src32(w, in, &in->args[2], mask);
    uint32_t *d = dst32(w, &in->args[0], mask);
    EACH_LANE(mask, d[i] = narrow_f16(a[i]) << 16 | narrow_f16(b[i]));
    return NEXT;
}

/* ---------------------------------------------------------------- stochastic rounding to 16 bits
 * Random bits are added to the mantissa bits that fall away; a carry rounds away from zero. bf16: 16 bits,
 * the upper half of rbits for a. f16: 13 bits of each half; for results below 2^-14, where more bits fall
 * away, the ISA does not say how the random bits align, so that gives a finding. */
static uint32_t stochastic(uint32_t x, uint32_t random, bool bfloat, bool finite, bool *unknown) {
    uint32_t magnitude = x & 0x7fffffffu, sign = x >> 16 & 0x8000, max = bfloat ? 0x7f7f : 0x7bff;
    if (magnitude > 0x7f800000u) return 0x7fff;
    uint32_t code;
    if (bfloat) {
        code = magnitude < 0x7f800000u ? (magnitude + random) >> 16 : 0x7f80;
    } else {
        if (magnitude && magnitude < 0x38800000u) *unknown = true;
        code = magnitude >= 0x47800000u ? 0x7c00 : magnitude < 0x38800000u ? narrow_f16(magnitude)
                                                 : ((magnitude - 0x38000000u) + (random & 0x1fff)) >> 13;
    }
    return sign | (code > max && finite ? max : code);
}

static Status exec_stochastic(Warp *w, const Instr *in, uint32_t mask) {
    uint32_t high[LANES], low[LANES];
    elements(w, in, mask, high, low);
    const uint32_t *random = src32(w, in, &in->args[3], mask);
    uint32_t *d = dst32(w, &in->args[0], mask);
    bool finite = in->u[1] & FINITE, bfloat = in->u[3], unknown = false;
    FOR_LANES(mask, i)
        d[i] = stochastic(high[i], random[i] >> 16, bfloat, finite, &unknown) << 16 |
               stochastic(low[i], random[i] & 0xffff, bfloat, finite, &unknown);
    if (unknown)
        report(w->machine, FINDING_UNMODELLED, w, in, false,
               "stochastic rounding to a subnormal f16 is not modelled: rounded to nearest");
    return NEXT;
}

/* ---------------------------------------------------------------- widening
 * data: a table of 16-bit codes. */
static Status exec_widen(Warp *w, const Instr *in, uint32_t mask) {
    const uint16_t *table = in->data;
    int bits = (int)in->u[0];
    uint32_t code = (1u << bits) - 1;
    const uint32_t *a = src32(w, in, &in->args[1], mask);
    uint32_t *d = dst32(w, &in->args[0], mask);
    EACH_LANE(mask, d[i] = table[a[i] & code] | (uint32_t)table[a[i] >> bits & code] << 16);
    return NEXT;
}

static double value_of(const Format *from, uint32_t code) {
    if (from) return format_decode(from, code & ((1u << from->bits) - 1));
    return code == 0xff ? NAN : ldexp(1.0, (int)code - 127); /* UE8M0 */
}

static Decoded decode_widening(Reader *r, const char *to, const Format *from) {
    const Format *target = !strcmp(to, "bf16x2") ? &format_bf16 : &format_f16;
    int bits = from == &format_e2m1 ? 4 : 8;
    uint16_t *table = arena(r->d->program, sizeof *table << bits);
    if (!take(r, "rn")) return refuse(r, "%s needs .rn", r->d->text);
    bool relu = take(r, "relu");
    for (uint32_t code = 0; code < 1u << bits; code++) {
        double value = value_of(from, code);
        if (relu && value <= 0.0) value = 0.0;
        table[code] = (uint16_t)number_encode(target, number_of_double(value), ROUND_NEAREST, false);
    }
    r->in->data = table;
    r->in->u[0] = (uint64_t)bits;
    return finish(r, exec_widen, CLASS_CONVERT, bits == 4 ? "4w" : "42");
}

/* ---------------------------------------------------------------- decoding */
static const struct { const char *name; int bits; Exec nearest, zero, up; } targets[] = {
    {"f16x2", 16, to_f16, to_f16_rz, NULL},   {"bf16x2", 16, to_bf16, to_bf16_rz, NULL},
    {"e4m3x2", 8, to_e4m3, NULL, NULL},       {"e5m2x2", 8, to_e5m2, NULL, NULL},
    {"e2m3x2", 8, to_e2m3, NULL, NULL},       {"e3m2x2", 8, to_e3m2, NULL, NULL},
    {"e2m1x2", 4, to_e2m1, NULL, NULL},       {"ue8m0x2", 8, NULL, to_ue8m0_rz, to_ue8m0_rp},
};

static Decoded decode_narrowing(Reader *r, size_t target, int from) {
    Instr *in = r->in;
    bool half = target < 2, scale = target == 7;
    bool stochastic_rounding = half && from == FROM_F32 && take(r, "rs");
    int rounding = stochastic_rounding ? ROUND_STOCHASTIC : take_rounding(r);
    if (half && from != FROM_F32) return refuse(r, "%s is not modelled", r->d->text);
    in->u[0] = (uint64_t)targets[target].bits;
    if (!scale && take(r, "relu")) in->u[1] |= RELU;
    if (take(r, "satfinite")) in->u[1] |= FINITE;
    else if (!half && !scale) return refuse(r, "%s needs .satfinite", r->d->text);
    in->u[2] = (uint64_t)from;
    if (stochastic_rounding) {
        in->u[3] = target == 1;
        return finish(r, exec_stochastic, CLASS_CONVERT, "4444");
    }
    Exec exec = NULL;
    if (rounding == ROUND_NEAREST) exec = targets[target].nearest;
    if (rounding == ROUND_ZERO) exec = targets[target].zero;
    if (rounding == ROUND_UP) exec = targets[target].up;
    if (!exec) return refuse(r, "the rounding of %s is not modelled", r->d->text);
    if (!in->u[1] && exec == to_bf16) exec = pair_bf16;
    if (!in->u[1] && exec == to_f16) exec = pair_f16;
    char to = half ? '4' : target == 6 ? 'w' : '2', signature[] = {to, '4', from == FROM_F32 ? '4' : 0, 0};
    return finish(r, exec, CLASS_CONVERT, signature);
}

Decoded decode_packed_convert(Reader *r) {
    const Decode *d = r->d;
    const char *to = d->part[d->n - 2], *from = d->part[d->n - 1];
    size_t length = strlen(from);
    int source = !strcmp(from, "f32") ? FROM_F32 : !strcmp(from, "f16x2") ? FROM_F16 : -1;
    if (!strcmp(from, "bf16x2")) source = FROM_BF16;
    for (size_t i = 0; i < sizeof targets / sizeof *targets && source >= 0; i++)
        if (!strcmp(targets[i].name, to)) return decode_narrowing(r, i, source);
    if ((!strcmp(to, "f16x2") || !strcmp(to, "bf16x2")) && length > 2 && !strcmp(from + length - 2, "x2")) {
        bool scale = !strcmp(from, "ue8m0x2");
        const Format *format = format_named(from, length - 2);
        if (scale && strcmp(to, "bf16x2")) return refuse(r, "%s is not modelled", d->text);
        if (scale || (format && format->bits <= 8)) return decode_widening(r, to, format);
    }
    return refuse(r, "conversion %s is not modelled", d->text);
}
