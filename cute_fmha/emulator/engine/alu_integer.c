/* Integer arithmetic: add, sub, mul, mad, div, rem, min, max, sad, abs, neg, dot products. */
#include "alu.h"

#pragma GCC diagnostic ignored "-Wtype-limits" /* the instances for unsigned types compare with 0 too */

/* Six instances of an operation on 16, 32 and 64 bits; S: the values' type, U: the same unsigned. Sums and
 * products are formed unsigned, where they wrap. */
#define SIX(M, OP, ...)                            \
    M(OP##_u16, 32, uint16_t, uint16_t, __VA_ARGS__) M(OP##_s16, 32, int16_t, uint16_t, __VA_ARGS__) \
    M(OP##_u32, 32, uint32_t, uint32_t, __VA_ARGS__) M(OP##_s32, 32, int32_t, uint32_t, __VA_ARGS__) \
    M(OP##_u64, 64, uint64_t, uint64_t, __VA_ARGS__) M(OP##_s64, 64, int64_t, uint64_t, __VA_ARGS__)
#define NAMES(OP) {OP##_u16, OP##_s16, OP##_u32, OP##_s32, OP##_u64, OP##_s64}

#define SAME1(NAME, W, S, U, ...) OP1(NAME, W, W, S, (U)(__VA_ARGS__))
#define SAME2(NAME, W, S, U, ...) OP2(NAME, W, W, S, W, S, (U)(__VA_ARGS__))
#define SAME3(NAME, W, S, U, ...) OP3(NAME, W, W, S, W, S, W, S, (U)(__VA_ARGS__))

SIX(SAME2, add, (uint64_t)a + (uint64_t)b)
SIX(SAME2, sub, (uint64_t)a - (uint64_t)b)
SIX(SAME2, mul_lo, (uint64_t)a * (uint64_t)b)
SIX(SAME2, min, a < b ? a : b)
SIX(SAME2, max, a > b ? a : b)
SIX(SAME3, mad_lo, (uint64_t)a * (uint64_t)b + (uint64_t)c)
SIX(SAME3, sad, (uint64_t)c + (a < b ? (uint64_t)b - (uint64_t)a : (uint64_t)a - (uint64_t)b))
SIX(SAME1, neg, 0 - (uint64_t)a)
SIX(SAME1, abs, a < 0 ? 0 - (uint64_t)a : (uint64_t)a)

/* The high half of the product needs twice the width. */
#define HIGH(S, U) ((U)(((__int128)a * (__int128)b) >> (8 * sizeof(S))))
#define NARROW_HIGH(BITS) (((int64_t)a * (int64_t)b) >> (BITS))
SAME2(mul_hi_u16, 32, uint16_t, uint16_t, NARROW_HIGH(16))
SAME2(mul_hi_s16, 32, int16_t, uint16_t, NARROW_HIGH(16))
SAME2(mul_hi_u32, 32, uint32_t, uint32_t, ((uint64_t)a * (uint64_t)b) >> 32)
SAME2(mul_hi_s32, 32, int32_t, uint32_t, NARROW_HIGH(32))
SAME2(mul_hi_u64, 64, uint64_t, uint64_t, ((unsigned __int128)a * b) >> 64)
SAME2(mul_hi_s64, 64, int64_t, uint64_t, HIGH(int64_t, uint64_t))
SAME3(mad_hi_u16, 32, uint16_t, uint16_t, (uint64_t)NARROW_HIGH(16) + c)
SAME3(mad_hi_s16, 32, int16_t, uint16_t, NARROW_HIGH(16) + c)
SAME3(mad_hi_u32, 32, uint32_t, uint32_t, (((uint64_t)a * (uint64_t)b) >> 32) + c)
SAME3(mad_hi_s32, 32, int32_t, uint32_t, NARROW_HIGH(32) + c)
SAME3(mad_hi_u64, 64, uint64_t, uint64_t, (uint64_t)(((unsigned __int128)a * b) >> 64) + c)
SAME3(mad_hi_s64, 64, int64_t, uint64_t, HIGH(int64_t, uint64_t) + (uint64_t)c)

OP2(mul_wide_u16, 32, 32, uint16_t, 32, uint16_t, (uint32_t)a * b)
OP2(mul_wide_s16, 32, 32, int16_t, 32, int16_t, (int32_t)a * b)
OP2(mul_wide_u32, 64, 32, uint32_t, 32, uint32_t, (uint64_t)a * b)
OP2(mul_wide_s32, 64, 32, int32_t, 32, int32_t, (int64_t)a * b)
OP3(mad_wide_u16, 32, 32, uint16_t, 32, uint16_t, 32, uint32_t, (uint32_t)a * b + c)
OP3(mad_wide_s16, 32, 32, int16_t, 32, int16_t, 32, uint32_t, (uint32_t)((int32_t)a * b) + c)
OP3(mad_wide_u32, 64, 32, uint32_t, 32, uint32_t, 64, uint64_t, (uint64_t)a * b + c)
OP3(mad_wide_s32, 64, 32, int32_t, 32, int32_t, 64, uint64_t, (uint64_t)((int64_t)a * b) + c)

static inline uint32_t clamp_s32(int64_t value) {
    return (uint32_t)(value < INT32_MIN ? INT32_MIN : value > INT32_MAX ? INT32_MAX : value);
}
OP2(add_sat, 32, 32, int32_t, 32, int32_t, clamp_s32((int64_t)a + b))
OP2(sub_sat, 32, 32, int32_t, 32, int32_t, clamp_s32((int64_t)a - b))
OP3(mad_hi_sat, 32, 32, int32_t, 32, int32_t, 32, int32_t, clamp_s32(NARROW_HIGH(32) + c))
OP2(min_relu_s32, 32, 32, int32_t, 32, int32_t, (a < b ? a : b) > 0 ? (a < b ? a : b) : 0)
OP2(max_relu_s32, 32, 32, int32_t, 32, int32_t, (a > b ? a : b) > 0 ? (a > b ? a : b) : 0)

/* 24-bit multiplication: the low 24 bits of the operands; .hi takes bits 16..47 of the product. */
#define U24(x) ((int64_t)((x) & 0xffffff))
#define S24(x) ((int64_t)((int32_t)((x) << 8) >> 8))
OP2(mul24_lo_u32, 32, 32, uint32_t, 32, uint32_t, U24(a) * U24(b))
OP2(mul24_lo_s32, 32, 32, uint32_t, 32, uint32_t, S24(a) * S24(b))
OP2(mul24_hi_u32, 32, 32, uint32_t, 32, uint32_t, (U24(a) * U24(b)) >> 16)
OP2(mul24_hi_s32, 32, 32, uint32_t, 32, uint32_t, (S24(a) * S24(b)) >> 16)
OP3(mad24_lo_u32, 32, 32, uint32_t, 32, uint32_t, 32, uint32_t, U24(a) * U24(b) + c)
OP3(mad24_lo_s32, 32, 32, uint32_t, 32, uint32_t, 32, uint32_t, S24(a) * S24(b) + c)
OP3(mad24_hi_u32, 32, 32, uint32_t, 32, uint32_t, 32, uint32_t, ((U24(a) * U24(b)) >> 16) + c)
OP3(mad24_hi_s32, 32, 32, uint32_t, 32, uint32_t, 32, uint32_t, ((S24(a) * S24(b)) >> 16) + c)
OP3(mad24_hi_sat, 32, 32, uint32_t, 32, uint32_t, 32, int32_t,
    clamp_s32((int64_t)(int32_t)((S24(a) * S24(b)) >> 16) + c))

/* Pairs of 16 bits. */
#define PAIR(LOW, HIGH_) ((uint32_t)(uint16_t)(LOW) | (uint32_t)(uint16_t)(HIGH_) << 16)
#define PAIRS(NAME, T, EXPR)                                                                            \
    static inline T NAME##_one(T x, T y) { return (T)(EXPR); }                                          \
    OP2(NAME, 32, 32, uint32_t, 32, uint32_t,                                                           \
        PAIR(NAME##_one((T)a, (T)b), NAME##_one((T)(a >> 16), (T)(b >> 16))))
PAIRS(add_x2, uint16_t, x + y)
PAIRS(sub_x2, uint16_t, x - y)
PAIRS(min_u16x2, uint16_t, x < y ? x : y)
PAIRS(max_u16x2, uint16_t, x > y ? x : y)
PAIRS(min_s16x2, int16_t, x < y ? x : y)
PAIRS(max_s16x2, int16_t, x > y ? x : y)
PAIRS(min_relu_s16x2, int16_t, (x < y ? x : y) > 0 ? (x < y ? x : y) : 0)
PAIRS(max_relu_s16x2, int16_t, (x > y ? x : y) > 0 ? (x > y ? x : y) : 0)
OP1(neg_s16x2, 32, 32, uint32_t, PAIR(0 - a, 0 - (a >> 16)))

/* ---------------------------------------------------------------- division
 * By zero the ISA leaves the value open: all ones here (the dividend for rem), and a finding. */
static Status divided(Warp *w, const Instr *in, uint32_t mask, uint32_t zero) {
    zero &= mask;
    if (zero)
        report(w->machine, FINDING_OTHER, w, in, false,
               "division by zero in lanes 0x%08x: the result is unspecified", zero);
    return NEXT;
}
#define DIVISION(NAME, W, S, U, QUOTIENT)                                       \
    static Status NAME(Warp *w, const Instr *in, uint32_t mask) {               \
        const uint##W##_t *pa = src##W(w, in, &in->args[1], mask);              \
        const uint##W##_t *pb = src##W(w, in, &in->args[2], mask);              \
        uint##W##_t *d = dst##W(w, &in->args[0], mask);                         \
        uint32_t zero = 0;                                                      \
        FOR_LANES(mask, i) {                                                    \
            S a = (S)pa[i], b = (S)pb[i];                                       \
            if (!b) zero |= 1u << i;                                            \
            d[i] = (U)(QUOTIENT);                                               \
        }                                                                       \
        return divided(w, in, mask, zero);                                      \
    }
/* The most negative number by -1 wraps. */
#define MINUS_ONE(b) ((b) == (__typeof__(b))-1 && (__typeof__(b))-1 < 0)
#define QUOTIENT_OF(a, b) (!(b) ? (uint64_t)-1 : MINUS_ONE(b) ? 0 - (uint64_t)(a) : (uint64_t)((a) / (b)))
#define REMAINDER_OF(a, b) (!(b) ? (uint64_t)(a) : MINUS_ONE(b) ? 0 : (uint64_t)((a) % (b)))
SIX(DIVISION, div, QUOTIENT_OF(a, b))
SIX(DIVISION, rem, REMAINDER_OF(a, b))

/* ---------------------------------------------------------------- dot products */
static inline int32_t byte_of(uint32_t x, int n, bool is_signed) {
    return is_signed ? (int8_t)(x >> 8 * n) : (uint8_t)(x >> 8 * n);
}
/* u[0]: bit 0 a is signed, bit 1 b is signed, bit 2 dp2a, bit 3 its upper half of b. */
static Status exec_dot(Warp *w, const Instr *in, uint32_t mask) {
    const uint32_t *a = src32(w, in, &in->args[1], mask), *b = src32(w, in, &in->args[2], mask);
    const uint32_t *c = src32(w, in, &in->args[3], mask);
    uint32_t *d = dst32(w, &in->args[0], mask);
    bool a_signed = in->u[0] & 1, b_signed = in->u[0] & 2, two = in->u[0] & 4;
    int upper = in->u[0] & 8 ? 2 : 0;
    FOR_LANES(mask, i) {
        uint32_t sum = c[i];
        for (int n = 0; n < (two ? 2 : 4); n++) {
            int32_t x = !two ? byte_of(a[i], n, a_signed)
                             : a_signed ? (int16_t)(a[i] >> 16 * n) : (uint16_t)(a[i] >> 16 * n);
            sum += (uint32_t)(x * byte_of(b[i], n + (two ? upper : 0), b_signed));
        }
        d[i] = sum;
    }
    return NEXT;
}

static Decoded decode_dot(Reader *r) {
    const Decode *d = r->d;
    bool two = !strcmp(r->op, "dp2a");
    if (d->n < 3) return refuse(r, "%s needs two types", d->text);
    const char *a = d->part[d->n - 2], *b = d->part[d->n - 1];
    r->used |= 1u << (d->n - 2);
    if ((strcmp(a, "s32") && strcmp(a, "u32")) || (strcmp(b, "s32") && strcmp(b, "u32")))
        return refuse(r, "types of %s", d->text);
    r->in->u[0] = (uint64_t)(*a == 's') | (uint64_t)(*b == 's') << 1 | (uint64_t)two << 2;
    if (two) {
        bool high = take(r, "hi");
        if (!high && !take(r, "lo")) return refuse(r, "dp2a needs .lo or .hi");
        r->in->u[0] |= (uint64_t)high << 3;
    }
    return finish(r, exec_dot, CLASS_INTEGER, "4444");
}

/* ---------------------------------------------------------------- decoding */
static const struct { const char *name; int sources; Exec exec[6]; } plain[] = {
    {"add", 2, NAMES(add)}, {"sub", 2, NAMES(sub)}, {"min", 2, NAMES(min)}, {"max", 2, NAMES(max)},
    {"div", 2, NAMES(div)}, {"rem", 2, NAMES(rem)}, {"sad", 3, NAMES(sad)}, {"neg", 1, NAMES(neg)},
    {"abs", 1, NAMES(abs)},
};
static const struct { const char *name; Exec exec; } pairs[] = {
    {"add", add_x2}, {"sub", sub_x2}, {"neg", neg_s16x2},
    {"min u16", min_u16x2}, {"max u16", max_u16x2}, {"min s16", min_s16x2}, {"max s16", max_s16x2},
    {"min s16 relu", min_relu_s16x2}, {"max s16 relu", max_relu_s16x2},
};
enum { PART_LOW, PART_HIGH, PART_WIDE };

static Decoded decode_pairs(Reader *r) {
    char name[32];
    bool extremum = !strcmp(r->op, "min") || !strcmp(r->op, "max");
    if (extremum) snprintf(name, sizeof name, "%s %s%s", r->op, r->type, take(r, "relu") ? " relu" : "");
    else snprintf(name, sizeof name, "%s", r->op);
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++)
        if (!strcmp(pairs[i].name, name))
            return finish(r, pairs[i].exec, CLASS_INTEGER, strcmp(name, "neg") ? "444" : "44");
    return NOT_MINE;
}

static Decoded decode_product(Reader *r, int type) {
    static const Exec mul[3][6] = {NAMES(mul_lo), NAMES(mul_hi),
                                   {mul_wide_u16, mul_wide_s16, mul_wide_u32, mul_wide_s32}};
    static const Exec mad[3][6] = {NAMES(mad_lo), NAMES(mad_hi),
                                   {mad_wide_u16, mad_wide_s16, mad_wide_u32, mad_wide_s32}};
    static const char *const parts[] = {"lo", "hi", "wide"};
    bool adds = !strcmp(r->op, "mad");
    if (has(r->d, "cc")) return NOT_MINE;
    int part = take_one(r, parts, 3);
    if (part < 0) return refuse(r, "%s needs .lo, .hi or .wide", r->d->text);
    Exec exec = (adds ? mad : mul)[part][type];
    if (adds && part == PART_HIGH && type == 3 && take(r, "sat")) exec = mad_hi_sat;
    if (!exec) return refuse(r, "%s has no such type", r->d->text);
    char narrow = letter(r), wide = part != PART_WIDE ? narrow : narrow == '2' ? '4' : '8';
    char signature[] = {wide, narrow, narrow, wide, 0};
    if (!adds) signature[3] = 0;
    return finish(r, exec, CLASS_INTEGER, signature);
}

static Decoded decode_24(Reader *r, int type) {
    static const Exec mul[2][2] = {{mul24_lo_u32, mul24_lo_s32}, {mul24_hi_u32, mul24_hi_s32}};
    static const Exec mad[2][2] = {{mad24_lo_u32, mad24_lo_s32}, {mad24_hi_u32, mad24_hi_s32}};
    static const char *const parts[] = {"lo", "hi"};
    int part = take_one(r, parts, 2);
    bool adds = !strcmp(r->op, "mad24");
    if (part < 0 || (type != 2 && type != 3)) return refuse(r, "%s is not modelled", r->d->text);
    Exec exec = (adds ? mad : mul)[part][type & 1];
    if (adds && part == PART_HIGH && type == 3 && take(r, "sat")) exec = mad24_hi_sat;
    return finish(r, exec, CLASS_INTEGER, adds ? "4444" : "444");
}

Decoded decode_integer(Reader *r) {
    if (!strcmp(r->op, "dp4a") || !strcmp(r->op, "dp2a")) return decode_dot(r);
    if (r->kind != 'u' && r->kind != 's') return NOT_MINE;
    if (r->packed == 2) return r->bytes == 2 ? decode_pairs(r) : NOT_MINE;
    int type = (r->bytes == 2 ? 0 : r->bytes == 4 ? 2 : 4) + (r->kind == 's');
    if (r->bytes == 1) return NOT_MINE;
    if (!strcmp(r->op, "mul") || !strcmp(r->op, "mad")) return decode_product(r, type);
    if (!strcmp(r->op, "mul24") || !strcmp(r->op, "mad24")) return decode_24(r, type);
    for (size_t i = 0; i < sizeof plain / sizeof *plain; i++) {
        if (strcmp(plain[i].name, r->op)) continue;
        if (has(r->d, "cc")) return NOT_MINE;
        Exec exec = plain[i].exec[type];
        if (type == 3 && i < 2 && take(r, "sat")) exec = i ? sub_sat : add_sat;
        if (type == 3 && (i == 2 || i == 3) && take(r, "relu")) exec = i == 2 ? min_relu_s32 : max_relu_s32;
        char c = letter(r), signature[5] = {c, c, c, c, 0};
        signature[1 + plain[i].sources] = 0;
        return finish(r, exec, CLASS_INTEGER, signature);
    }
    return NOT_MINE;
}
