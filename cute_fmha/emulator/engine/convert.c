/* cvt between integers and the scalar floating-point types, to tf32, and cvt.pack. The packed forms of 16
 * bits and less are in convert_packed.c. */
#include "formats.h"

#include <math.h>

/* ---------------------------------------------------------------- the frequent ones */
OP1(u32_from_u16, 32, 32, uint16_t, a)
OP1(u16_from_u32, 32, 32, uint32_t, (uint16_t)a)
OP1(s32_from_s16, 32, 32, int16_t, (int32_t)a)
OP1(u64_from_u32, 64, 32, uint32_t, a)
OP1(s64_from_s32, 64, 32, int32_t, (int64_t)a)
OP1(u32_from_u64, 32, 64, uint64_t, a)
OP1(f32_from_s32, 32, 32, int32_t, as_bits((float)a))
OP1(f32_from_u32, 32, 32, uint32_t, as_bits((float)a))
OP1(f32_from_f16, 32, 32, uint16_t, canonical32(as_float(widen_f16(a))))
OP1(f32_from_bf16, 32, 32, uint16_t, (uint32_t)a << 16)
OP1(f16_from_f32, 32, 32, uint32_t, narrow_f16(a))
OP1(bf16_from_f32, 32, 32, uint32_t, narrow_bf16(a))
static inline int32_t truncate_s32(float f) {
    return f != f ? 0 : f >= 0x1p31f ? INT32_MAX : f < -0x1p31f ? INT32_MIN : (int32_t)f;
}
OP1(s32_from_f32, 32, 32, uint32_t, truncate_s32(as_float(a)))
static const struct { const char *types; Exec exec; const char *signature; } frequent[] = {
    {"u32.u16", u32_from_u16, "42"}, {"u16.u32", u16_from_u32, "24"}, {"s32.s16", s32_from_s16, "42"},
    {"u64.u32", u64_from_u32, "84"}, {"s64.s32", s64_from_s32, "84"}, {"u32.u64", u32_from_u64, "48"},
    {"rn.f32.s32", f32_from_s32, "44"}, {"rn.f32.u32", f32_from_u32, "44"}, {"f32.f16", f32_from_f16, "42"},
    {"f32.bf16", f32_from_bf16, "42"}, {"rn.f16.f32", f16_from_f32, "24"},
    {"rn.bf16.f32", bf16_from_f32, "24"}, {"rzi.s32.f32", s32_from_f32, "44"},
};

/* ---------------------------------------------------------------- any other: data is a Conversion */
enum { INTEGRAL_NONE, INTEGRAL_NEAREST, INTEGRAL_ZERO, INTEGRAL_DOWN, INTEGRAL_UP };
typedef struct {
    char to_kind, from_kind; /* 'u', 's', 'f' */
    int to_bits, from_bits;
    const Format *to, *from; /* of floats */
    int rounding, integral;
    bool ftz, sat, relu, finite, nan_is_zero;
} Conversion;

/* Lanes of the source, cut to its type: integers extended to 64 bits, floats as doubles. */
static void load(Warp *w, const Instr *in, const Conversion *c, uint32_t mask, uint64_t *bits,
                 double *value) {
    const Operand *o = &in->args[1];
    int shift = 64 - c->from_bits;
    if (o->kind == OPERAND_IMMEDIATE || o->width == 8)
        memcpy(bits, src64(w, in, o, mask), LANES * sizeof *bits);
    else {
        const uint32_t *from = src32(w, in, o, mask);
        for (int i = 0; i < LANES; i++) bits[i] = from[i];
    }
    for (int i = 0; i < LANES; i++)
        bits[i] = c->from_kind == 's' ? (uint64_t)((int64_t)(bits[i] << shift) >> shift)
                                      : bits[i] << shift >> shift;
    if (c->from_kind != 'f') return;
    bool flushes = c->ftz && c->to != &format_f16; /* an H200 does not, as rounding up or down shows */
    for (int i = 0; i < LANES; i++) {
        uint32_t low = (uint32_t)bits[i];
        if (c->from == &format_f64) value[i] = as_double(bits[i]);
        else if (c->from == &format_f32) value[i] = (double)as_float(flushes ? flush32(low) : low);
        else value[i] = (double)as_float(c->from == &format_bf16 ? low << 16 : widen_f16(low));
    }
}

static double integral(double value, int how) {
    switch (how) {
    case INTEGRAL_NEAREST: return nearbyint(value);
    case INTEGRAL_ZERO: return trunc(value);
    case INTEGRAL_DOWN: return floor(value);
    case INTEGRAL_UP: return ceil(value);
    default: return value;
    }
}

static uint64_t integer_limit(const Conversion *c, bool upper) {
    if (c->to_kind == 'u') return upper ? ~0ull >> (64 - c->to_bits) : 0;
    uint64_t least = ~0ull << (c->to_bits - 1);
    return upper ? ~least : least;
}

/* Float to integer: out of range clamps. A NaN gives 0, or the most negative number (for unsigned types the
 * same bit) if either side has 64 bits. */
static uint64_t to_integer(const Conversion *c, double value) {
    if (value != value) return c->nan_is_zero ? 0 : 1ull << (c->to_bits - 1);
    value = integral(value, c->integral);
    double limit = ldexp(1.0, c->to_kind == 'u' ? c->to_bits : c->to_bits - 1);
    if (value >= limit) return integer_limit(c, true);
    if (c->to_kind == 'u') return value < 0.0 ? 0 : (uint64_t)value;
    return value < -limit ? integer_limit(c, false) : (uint64_t)(int64_t)value;
}

static uint64_t clamp_integer(const Conversion *c, uint64_t bits) {
    if (c->from_kind == 'u') return bits > integer_limit(c, true) ? integer_limit(c, true) : bits;
    int64_t value = (int64_t)bits;
    if (c->to_kind == 'u')
        return value < 0 ? 0 : bits > integer_limit(c, true) ? integer_limit(c, true) : bits;
    if (value > (int64_t)integer_limit(c, true)) return integer_limit(c, true);
    return value < (int64_t)integer_limit(c, false) ? integer_limit(c, false) : bits;
}

/* A NaN is the format's own one, except where an H200 keeps its sign and the upper bits. False: not kept. */
static bool kept_nan(const Conversion *c, uint64_t bits, uint64_t *nan) {
    if (c->from == &format_f64 && c->to != &format_tf32) {
        uint64_t magnitude = (bits & 0xfffffffffffffull) >> (52 - c->to->mantissa);
        *nan = bits >> 63 << (c->to_bits - 1) | c->to->infinity | 1ull << (c->to->mantissa - 1) | magnitude;
        return true;
    }
    if (c->to != &format_tf32 || c->rounding != ROUND_AWAY) return false;
    *nan = (bits & 0xffffe000u) - (c->finite ? 0x2000 : 0); /* saturating takes one step towards zero */
    return true;
}

static uint64_t to_float(const Conversion *c, uint64_t bits, double value) {
    Number number;
    uint64_t nan;
    if (c->from_kind == 'f' && value != value && !c->sat && kept_nan(c, bits, &nan)) return nan;
    if (c->from_kind == 'f') {
        value = integral(value, c->integral);
        if (c->sat) value = value > 0.0 ? (value < 1.0 ? value : 1.0) : 0.0;
        if (c->relu && value <= 0.0) value = 0.0;
        number = number_of_double(value);
    } else {
        number = number_of_integer(bits, c->from_kind == 's');
        if (c->sat && number.significand) number = number_of_integer(!number.negative, false);
    }
    uint64_t code = number_encode(c->to, number, c->rounding, c->finite);
    if (c->to == &format_tf32) return code << 13;
    return c->ftz && c->to == &format_f32 ? flush32((uint32_t)code) : code;
}

static Status exec_convert(Warp *w, const Instr *in, uint32_t mask) {
    const Conversion *c = in->data;
    uint64_t bits[LANES];
    double value[LANES];
    load(w, in, c, mask, bits, value);
    for (int i = 0; i < LANES; i++) {
        if (!(mask >> i & 1)) continue;
        uint64_t r;
        if (c->to_kind == 'f') r = to_float(c, bits[i], value[i]);
        else if (c->from_kind == 'f') r = to_integer(c, value[i]);
        else r = c->sat ? clamp_integer(c, bits[i]) : bits[i];
        /* A destination wider than its type is filled with zeros or signs. */
        int shift = 64 - c->to_bits;
        r = c->to_kind == 's' ? (uint64_t)((int64_t)(r << shift) >> shift) : r << shift >> shift;
        if (in->args[0].width == 1) r = (uint8_t)r;
        set_lane(w, &in->args[0], i, r);
    }
    return NEXT;
}

/* ---------------------------------------------------------------- cvt.pack.sat.to.s32{.b32}
 * Two clamped integers side by side, then the low bits of c. u[0]: bits, u[1]: signed. */
static Status exec_pack(Warp *w, const Instr *in, uint32_t mask) {
    const uint32_t *a = src32(w, in, &in->args[1], mask), *b = src32(w, in, &in->args[2], mask);
    const uint32_t *c = in->n == 4 ? src32(w, in, &in->args[3], mask) : NULL;
    uint32_t *d = dst32(w, &in->args[0], mask);
    int bits = (int)in->u[0];
    Conversion how = {.to_kind = in->u[1] ? 's' : 'u', .from_kind = 's', .to_bits = bits};
    uint32_t field = bits == 16 ? 0xffff : (1u << bits) - 1;
    FOR_LANES(mask, i) {
        uint32_t high = (uint32_t)clamp_integer(&how, (uint64_t)(int64_t)(int32_t)a[i]) & field;
        uint32_t low = (uint32_t)clamp_integer(&how, (uint64_t)(int64_t)(int32_t)b[i]) & field;
        d[i] = low | high << bits | (c ? c[i] << 2 * bits : 0);
    }
    return NEXT;
}

static Decoded decode_pack(Reader *r) {
    static const char *const names[] = {"u16", "s16", "u8", "s8", "u4", "s4", "u2", "s2"};
    int type = take_one(r, names, 8);
    bool three = r->in->n == 4;
    if (type < 0 || !take(r, "sat") || (type < 2) == three)
        return refuse(r, "%s is not modelled", r->d->text);
    if (three ? !take(r, "s32") || strcmp(r->type, "b32") : strcmp(r->type, "s32") != 0)
        return refuse(r, "%s is not modelled", r->d->text);
    r->in->u[0] = 16u >> (type / 2);
    r->in->u[1] = type & 1;
    return finish(r, exec_pack, CLASS_CONVERT, three ? "4444" : "444");
}

/* ---------------------------------------------------------------- decoding */
static bool read_type(const char *name, char *kind, int *bits, const Format **format) {
    int bytes;
    if (!strcmp(name, "tf32")) {
        *kind = 'f', *bits = 32, *format = &format_tf32;
        return true;
    }
    if (!ptx_type(name, &bytes, kind) || *kind == 'b' || bytes > 8) return false;
    if (*kind == 'h') *kind = 'f';
    *bits = 8 * bytes;
    *format = *kind == 'f' ? format_named(name, strlen(name)) : NULL;
    return true;
}

static Decoded decode_scalar(Reader *r, Conversion *c) {
    static const char *const integrals[] = {"rni", "rzi", "rmi", "rpi"};
    bool narrow = c->to && c->to_bits < 32 && c->from == &format_f32;
    c->integral = 1 + take_one(r, integrals, 4);
    int rounding = c->to == &format_tf32 && take(r, "rna") ? ROUND_AWAY : take_rounding(r);
    bool single = c->to == &format_f32 || c->from == &format_f32;
    c->ftz = single && take(r, "ftz");
    c->sat = take(r, "sat");
    if (narrow || c->to == &format_tf32) {
        c->relu = take(r, "relu");
        c->finite = take(r, "satfinite");
    }
    bool both = c->to && c->from, exact = both && c->to_bits > c->from_bits && c->to != &format_tf32;
    bool same = both && c->to == c->from;
    if (c->to == &format_tf32 && c->from != &format_f32) return refuse(r, "%s is not modelled", r->d->text);
    if (c->integral && (!c->from || (c->to && !same))) return refuse(r, "%s: integer rounding", r->d->text);
    if (rounding >= 0 && !c->to) return refuse(r, "%s: rounding of a float for an integer", r->d->text);
    if (c->to && rounding < 0 && !exact && !same)
        return refuse(r, "%s needs a rounding modifier", r->d->text);
    if (!c->integral && c->from && !c->to) c->integral = INTEGRAL_ZERO;
    c->rounding = rounding < 0 ? ROUND_NEAREST : rounding;
    c->nan_is_zero = c->from_bits != 64 && c->to_bits != 64;
    return finish(r, exec_convert, CLASS_CONVERT, "ww");
}

Decoded decode_convert(Decode *d, char *why, size_t n) {
    Reader reader = reader_new(d, why, n), *r = &reader;
    Instr *in = d->in;
    if (strcmp(r->op, "cvt")) return NOT_MINE;
    if (take(r, "pack")) return decode_pack(r);
    if (d->n < 3) return refuse(r, "%s needs two types", d->text);
    r->used |= 1u << (d->n - 2);
    Conversion *c = arena(d->program, sizeof *c);
    if (!read_type(d->part[d->n - 2], &c->to_kind, &c->to_bits, &c->to) ||
        !read_type(d->part[d->n - 1], &c->from_kind, &c->from_bits, &c->from))
        return decode_packed_convert(r);
    in->data = c;
    for (size_t i = 0; i < sizeof frequent / sizeof *frequent; i++) {
        if (strcmp(d->text + strlen("cvt."), frequent[i].types)) continue;
        Reader copy = reader;
        copy.used = ~0u; /* the whole text is known */
        if (finish(&copy, frequent[i].exec, CLASS_CONVERT, frequent[i].signature) == DECODED) return DECODED;
    }
    return decode_scalar(r, c);
}
