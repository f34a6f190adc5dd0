/* Approximations: ex2, lg2, rcp, rsqrt, sqrt, sin, cos, tanh, div.approx and div.full.
 *
 * The hardware's tables are not public. Here every function is the exact one, computed in double precision
 * and rounded once to f32 (ex2: within 1e-15 before rounding), so results may differ from a GPU's by what
 * the ISA allows: ex2 2 ulp, lg2 2^-22 absolute in [0.5, 2] and 2^-22 relative elsewhere, rcp 1 ulp,
 * rsqrt 2^-22.9 relative, sqrt 2^-23 relative, sin and cos 2^-20.5 absolute in [-2 pi, 2 pi], tanh 2^-11
 * relative, div.approx and div.full 2 ulp; f64: 2^-20 relative; f16 and bf16 forms of ex2 and tanh:
 * see alu_half.c. */
#include "alu.h"

#include <math.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))
enum { FTZ = 1 };

ALWAYS_INLINE float operand(uint32_t bits, bool flush) { return as_float(flush ? flush32(bits) : bits); }
ALWAYS_INLINE uint32_t outcome(float value, bool flush) {
    uint32_t bits = canonical32(value);
    return flush ? flush32(bits) : bits;
}

/* 2^x without a call, so that the loop vectorises: x = n + f, |f| <= 1/2, by the addition of 1.5 * 2^52;
 * 2^f by its series to the twelfth power; n goes into the exponent. */
ALWAYS_INLINE float exp2_of(float value) {
    double x = value < -200.0f ? -200.0 : value > 200.0f ? 200.0 : (double)value;
    double shifted = x + 0x1.8p52, f = x - (shifted - 0x1.8p52);
    double p = 2.5678435993488206e-11; /* ln(2)^k / k!, k = 12 first */
    p = p * f + 4.4455382718708116e-10;
    p = p * f + 7.054911620801123e-09;
    p = p * f + 1.0178086009239699e-07;
    p = p * f + 1.3215486790144307e-06;
    p = p * f + 1.5252733804059841e-05;
    p = p * f + 0.0001540353039338161;
    p = p * f + 0.0013333558146428443;
    p = p * f + 0.009618129107628477;
    p = p * f + 0.05550410866482158;
    p = p * f + 0.2402265069591007;
    p = p * f + 0.6931471805599453;
    p = p * f + 1.0;
    uint64_t scale = (as_bits64(shifted) + 1023) << 52;
    float r = (float)(p * as_double(scale));
    return value != value ? value : r;
}

/* sin and cos turn their argument into revolutions by a product in f32, rounded towards zero, and look at
 * its fraction: of large arguments little is left, and above 2^25 nothing. Measured on an H200, which is
 * within 2^-21.7 of this for any argument; the ISA promises nothing beyond 100 pi. */
ALWAYS_INLINE double angle(float a) {
    double exact = (double)a * (double)0.15915494f;
    float product = (float)exact;
    if (fabs((double)product) > fabs(exact)) product = as_float(as_bits(product) - 1);
    double turns = product, fraction = turns - nearbyint(turns);
    return fraction == 0.0 ? copysign(0.0, turns) : 6.283185307179586 * fraction;
}

#define FUNCTION(NAME, FLUSH, X)                                                                        \
    static Status NAME(Warp *w, const Instr *in, uint32_t mask) {                                       \
        const uint32_t *pa = src32(w, in, &in->args[1], mask);                                          \
        uint32_t *d = dst32(w, &in->args[0], mask);                                                     \
        count_mufu(w, mask, 1);                                                                         \
        EACH_LANE(mask, float a = operand(pa[i], FLUSH); d[i] = outcome((float)(X), FLUSH));            \
        return NEXT;                                                                                    \
    }
#define BOTH(NAME, X) FUNCTION(NAME, false, X) FUNCTION(NAME##_ftz, true, X)
BOTH(ex2, exp2_of(a))
BOTH(lg2, log2((double)a))
BOTH(rcp, 1.0f / a)
BOTH(rsqrt, 1.0 / sqrt((double)a))
BOTH(root, sqrtf(a))
BOTH(sine, sin(angle(a)))
BOTH(cosine, cos(angle(a)))
FUNCTION(hyperbolic, false, tanh((double)a))

/* div.approx is a * rcp(b): for 2^126 < |b| < 2^128 the reciprocal underflows to 0, as the ISA says. */
ALWAYS_INLINE float divide_approx(float a, float b) {
    float magnitude = fabsf(b);
    if (magnitude > 0x1p126f && magnitude < INFINITY) return a * copysignf(0.0f, b);
    return a / b;
}
#define QUOTIENT(NAME, FLUSH, X)                                                                             \
    OP2(NAME, 32, 32, uint32_t, 32, uint32_t,                                                                \
        __extension__({ float x = operand(a, FLUSH), y = operand(b, FLUSH); outcome(X, FLUSH); }))
QUOTIENT(div_approx, false, divide_approx(x, y))
QUOTIENT(div_approx_ftz, true, divide_approx(x, y))
QUOTIENT(div_full, false, x / y)
QUOTIENT(div_full_ftz, true, x / y)

/* rcp.approx.ftz.f64 and rsqrt.approx{.ftz}.f64 look at the upper word of the source alone and give one
 * with a lower word of zeros. */
#define FLUSH64(bits) ((bits) & 0x7ff0000000000000ull ? (bits) : (bits) & 1ull << 63)
#define UPPER(bits) ((bits) & 0xffffffff00000000ull)
#define APPROX64(x) __extension__({ double value_ = (x); value_ != value_ ? 0x7fffffff00000000ull \
                                                                          : UPPER(as_bits64(value_)); })
OP1(rcp64, 64, 64, uint64_t, FLUSH64(APPROX64(1.0 / as_double(FLUSH64(UPPER(a))))))
OP1(rsqrt64, 64, 64, uint64_t, APPROX64(1.0 / sqrt(as_double(UPPER(a)))))
OP1(rsqrt64_ftz, 64, 64, uint64_t, APPROX64(1.0 / sqrt(as_double(FLUSH64(UPPER(a))))))

Decoded decode_approx(Reader *r) {
    static const struct { const char *name; Exec exec[2]; } table[] = {
        {"ex2", {ex2, ex2_ftz}}, {"lg2", {lg2, lg2_ftz}}, {"rcp", {rcp, rcp_ftz}},
        {"rsqrt", {rsqrt, rsqrt_ftz}}, {"sqrt", {root, root_ftz}}, {"sin", {sine, sine_ftz}},
        {"cos", {cosine, cosine_ftz}}, {"tanh", {hyperbolic, NULL}},
    };
    if (r->kind != 'f' || r->packed > 1 || r->bytes == 2) return NOT_MINE;
    if (r->bytes == 4 && !strcmp(r->op, "div")) {
        bool full = take(r, "full");
        if (!full && !take(r, "approx")) return NOT_MINE;
        bool flush = take(r, "ftz");
        Exec exec = full ? (flush ? div_full_ftz : div_full) : flush ? div_approx_ftz : div_approx;
        return finish(r, exec, CLASS_FLOAT, "444");
    }
    if (!take(r, "approx")) return NOT_MINE;
    bool flush = take(r, "ftz");
    if (r->bytes == 8) {
        Exec exec = NULL;
        if (!strcmp(r->op, "rcp") && flush) exec = rcp64;
        if (!strcmp(r->op, "rsqrt")) exec = flush ? rsqrt64_ftz : rsqrt64;
        return exec ? finish(r, exec, CLASS_MUFU, "88") : refuse(r, "%s is not modelled", r->d->text);
    }
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (!strcmp(table[i].name, r->op) && table[i].exec[flush])
            return finish(r, table[i].exec[flush], CLASS_MUFU, "44");
    return refuse(r, "%s is not modelled", r->d->text);
}
