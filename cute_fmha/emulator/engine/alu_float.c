/* Single precision: add, sub, mul, fma, div, rcp, sqrt, their packed pairs, abs, neg, copysign.
 *
 * Rounding modes other than nearest run the same loops in the host's mode (wrap_rounding). NaN results
 * are canonical. .ftz flushes subnormal sources and results to zeros of their sign. */
#include "formats.h"

#include <fenv.h>
#include <math.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))
enum { FTZ = 1, SAT = 2 };

ALWAYS_INLINE float operand(uint32_t bits, int how) { return as_float(how & FTZ ? flush32(bits) : bits); }
ALWAYS_INLINE uint32_t outcome(float value, int how) {
    if (how & SAT) value = saturate32(value);
    uint32_t bits = canonical32(value);
    return how & FTZ ? flush32(bits) : bits;
}

/* A result rounded up to the smallest normal number is flushed where it would not be one with an exponent
 * without bounds, as on an H200: to nearest, half a step below goes to even; upwards, a whole one stays. */
ALWAYS_INLINE bool rounds_below(double exact) {
    bool nearest = fegetround() == FE_TONEAREST;
    double size = fabs(exact), limit = 0x1p-126 * (1 - (nearest ? 0x1p-25 : 0x1p-24));
    return size < limit || (size == limit && !nearest);
}
ALWAYS_INLINE bool is_smallest(uint32_t bits) { return (bits & 0x7fffffff) == 0x00800000; }

/* An operation in its four versions; X: the expression of a, b, c;
 * TINY: whether the smallest normal number is flushed, where X can round up to it. A pair of floats in 64
 * bits is two lanes next to each other, so the packed forms are the same loops over twice the elements. */
#define FLOAT_EXEC(NAME, HOW, SOURCES, COUNTS, X, TINY)                                                      \
    static Status NAME(Warp *w, const Instr *in, uint32_t mask) {                                            \
        const uint32_t *pa = src32(w, in, &in->args[1], mask);                                               \
        const uint32_t *pb = SOURCES > 1 ? src32(w, in, &in->args[2], mask) : pa;                            \
        const uint32_t *pc = SOURCES > 2 ? src32(w, in, &in->args[3], mask) : pa;                            \
        uint32_t *d = dst32(w, &in->args[0], mask);                                                          \
        EACH_LANE(mask, float a = operand(pa[i], HOW); float b = operand(pb[i], HOW);                        \
                  float c = operand(pc[i], HOW); (void)b; (void)c; d[i] = outcome(X, HOW);                   \
                  if (HOW & FTZ && is_smallest(d[i]) && (TINY)) d[i] &= 0x80000000);                         \
        if (COUNTS) count_fma(w, mask, 1);                                                                   \
        return NEXT;                                                                                         \
    }
#define PAIR_EXEC(NAME, HOW, SOURCES, X, TINY)                                                               \
    static Status NAME(Warp *w, const Instr *in, uint32_t mask) {                                            \
        const uint32_t *pa = (const uint32_t *)src64(w, in, &in->args[1], mask);                             \
        const uint32_t *pb = (const uint32_t *)src64(w, in, &in->args[2], mask);                             \
        const uint32_t *pc = SOURCES > 2 ? (const uint32_t *)src64(w, in, &in->args[3], mask) : pa;          \
        uint32_t *d = (uint32_t *)dst64(w, &in->args[0], mask);                                              \
        count_fma(w, mask, 2);                                                                               \
        if (mask == FULL_MASK) {                                                                             \
            INDEPENDENT for (uint32_t i = 0; i < 2 * LANES; i++) {                                           \
                float a = operand(pa[i], HOW), b = operand(pb[i], HOW), c = operand(pc[i], HOW);             \
                (void)c;                                                                                     \
                d[i] = outcome(X, HOW);                                                                      \
                if (HOW & FTZ && is_smallest(d[i]) && (TINY)) d[i] &= 0x80000000;                            \
            }                                                                                                \
        } else {                                                                                             \
            FOR_LANES(mask, lane) for (uint32_t i = 2 * lane; i < 2 * lane + 2; i++) {                       \
                float a = operand(pa[i], HOW), b = operand(pb[i], HOW), c = operand(pc[i], HOW);             \
                (void)c;                                                                                     \
                d[i] = outcome(X, HOW);                                                                      \
                if (HOW & FTZ && is_smallest(d[i]) && (TINY)) d[i] &= 0x80000000;                            \
            }                                                                                                \
        }                                                                                                    \
        return NEXT;                                                                                         \
    }
#define FOUR(OP, SOURCES, COUNTS, X, TINY)                                                                   \
    FLOAT_EXEC(OP, 0, SOURCES, COUNTS, X, TINY) FLOAT_EXEC(OP##_ftz, FTZ, SOURCES, COUNTS, X, TINY)          \
    FLOAT_EXEC(OP##_sat, SAT, SOURCES, COUNTS, X, TINY)                                                      \
    FLOAT_EXEC(OP##_ftz_sat, FTZ | SAT, SOURCES, COUNTS, X, TINY)
#define PAIR(OP, SOURCES, X, TINY)                                                                           \
    PAIR_EXEC(OP##_x2, 0, SOURCES, X, TINY) PAIR_EXEC(OP##_x2_ftz, FTZ, SOURCES, X, TINY)
#define EXECS(OP) {OP, OP##_ftz, OP##_sat, OP##_ftz_sat}

FOUR(add, 2, 1, a + b, false)
FOUR(sub, 2, 1, a - b, false)
FOUR(mul, 2, 1, a * b, rounds_below((double)a * b))
FOUR(fuse, 3, 1, fmaf(a, b, c), rounds_below(fma(a, b, c)))
PAIR(add, 2, a + b, false)
PAIR(sub, 2, a - b, false)
PAIR(mul, 2, a * b, rounds_below((double)a * b))
PAIR(fuse, 3, fmaf(a, b, c), rounds_below(fma(a, b, c)))
FOUR(divide, 2, 0, a / b, rounds_below((double)a / b))
FOUR(rcp, 1, 0, 1.0f / a, rounds_below(1.0 / a))
FOUR(root, 1, 0, sqrtf(a), false)

OP1(neg, 32, 32, uint32_t, a ^ 0x80000000u)
OP1(neg_ftz, 32, 32, uint32_t, flush32(a) ^ 0x80000000u)
OP1(magnitude, 32, 32, uint32_t, a & 0x7fffffffu)
OP1(magnitude_ftz, 32, 32, uint32_t, flush32(a) & 0x7fffffffu)
OP2(copysign32, 32, 32, uint32_t, 32, uint32_t, (a & 0x80000000u) | (b & 0x7fffffffu))
OP2(copysign64, 64, 64, uint64_t, 64, uint64_t, (a & 1ull << 63) | (b & ~(1ull << 63)))

/* ---------------------------------------------------------------- add.f32.bf16 and its like
 * The sources of the product, or the first source, are 16-bit floats. u[0]: operation, u[1]: bf16, u[2] and
 * u[3] belong to the rounding. */
enum { MIXED_ADD, MIXED_SUB, MIXED_FMA, MIXED_SAT = 16 };
static Status exec_mixed(Warp *w, const Instr *in, uint32_t mask) {
    int operation = (int)in->u[0] & 15, how = in->u[0] & MIXED_SAT ? SAT : 0;
    const uint32_t *pa = src32(w, in, &in->args[1], mask), *pb = src32(w, in, &in->args[2], mask);
    const uint32_t *pc = operation == MIXED_FMA ? src32(w, in, &in->args[3], mask) : pb;
    uint32_t *d = dst32(w, &in->args[0], mask);
    count_fma(w, mask, 1);
    FOR_LANES(mask, i) {
        float a = as_float(in->u[1] ? pa[i] << 16 : widen_f16(pa[i]));
        float b = as_float(in->u[1] ? pb[i] << 16 : widen_f16(pb[i])), c = as_float(pc[i]);
        d[i] = outcome(operation == MIXED_ADD ? a + c : operation == MIXED_SUB ? a - c : fmaf(a, b, c), how);
    }
    return NEXT;
}

static Decoded decode_mixed(Reader *r) {
    static const char *const names[] = {"add", "sub", "fma"};
    for (int i = 0; i < 3; i++) {
        if (strcmp(r->op, names[i])) continue;
        take(r, "f32");
        int rounding = take_rounding(r);
        r->in->u[0] = (uint64_t)i | (take(r, "sat") ? MIXED_SAT : 0);
        r->in->u[1] = r->kind == 'h';
        Decoded decoded = finish(r, exec_mixed, CLASS_FMA, i == MIXED_FMA ? "4224" : "424");
        if (decoded == DECODED) wrap_rounding(r->in, rounding);
        return decoded;
    }
    return NOT_MINE;
}

/* ---------------------------------------------------------------- decoding */
static const struct {
    const char *name;
    int sources;
    bool rounds, saturates;
    Exec exec[4], pair[2];
} table[] = {
    {"add", 2, true, true, EXECS(add), {add_x2, add_x2_ftz}},
    {"sub", 2, true, true, EXECS(sub), {sub_x2, sub_x2_ftz}},
    {"mul", 2, true, true, EXECS(mul), {mul_x2, mul_x2_ftz}},
    {"fma", 3, true, true, EXECS(fuse), {fuse_x2, fuse_x2_ftz}},
    {"mad", 3, true, true, EXECS(fuse), {0}}, /* fused since sm_20 */
    {"div", 2, true, false, EXECS(divide), {0}},
    {"rcp", 1, true, false, EXECS(rcp), {0}},
    {"sqrt", 1, true, false, EXECS(root), {0}},
    {"neg", 1, false, false, {neg, neg_ftz}, {0}},
    {"abs", 1, false, false, {magnitude, magnitude_ftz}, {0}},
};

Decoded decode_float(Reader *r) {
    if (!strcmp(r->op, "copysign") && r->kind == 'f' && r->packed == 1 && r->bytes == 8)
        return finish(r, copysign64, CLASS_INTEGER, "888");
    if (!strcmp(r->op, "copysign") && r->kind == 'f' && r->packed == 1 && r->bytes == 4)
        return finish(r, copysign32, CLASS_INTEGER, "444");
    if (r->bytes == 2 && r->packed == 1 && (r->kind == 'f' || r->kind == 'h') && has(r->d, "f32"))
        return decode_mixed(r);
    if (strcmp(r->type, "f32") || has(r->d, "approx") || has(r->d, "full")) return NOT_MINE;
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        if (strcmp(table[i].name, r->op)) continue;
        int rounding = table[i].rounds ? take_rounding(r) : ROUND_NEAREST, sources = table[i].sources;
        bool unary_divide = !strcmp(r->op, "div") || !strcmp(r->op, "rcp") || !strcmp(r->op, "sqrt");
        if (rounding < 0 && (sources == 3 || unary_divide))
            return refuse(r, "%s needs a rounding modifier", r->d->text);
        int how = take(r, "ftz") ? FTZ : 0;
        if (table[i].saturates && r->packed == 1 && take(r, "sat")) how |= SAT;
        Exec exec = r->packed == 2 ? table[i].pair[how & FTZ] : table[i].exec[how];
        if (!exec) return refuse(r, "%s is not modelled", r->d->text);
        InstrClass class_ = sources == 3 || (table[i].rounds && !unary_divide) ? CLASS_FMA : CLASS_FLOAT;
        char c = letter(r), signature[] = {c, c, c, c, 0};
        signature[1 + sources] = 0;
        Decoded decoded = finish(r, exec, class_, signature);
        if (decoded == DECODED) wrap_rounding(r->in, rounding);
        return decoded;
    }
    return NOT_MINE;
}
