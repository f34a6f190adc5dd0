/* Double precision: add, sub, mul, fma, div, rcp, sqrt in every rounding mode, min, max, abs, neg. */
#include "alu.h"

#include <math.h>

/* The canonical NaN of f64 arithmetic. */
#define NAN64 0xfff8000000000000ull
#define RESULT(x) __extension__({ double value_ = (x); value_ != value_ ? NAN64 : as_bits64(value_); })
#define DOUBLE(x) as_double(x)
OP2(add, 64, 64, uint64_t, 64, uint64_t, RESULT(DOUBLE(a) + DOUBLE(b)))
OP2(sub, 64, 64, uint64_t, 64, uint64_t, RESULT(DOUBLE(a) - DOUBLE(b)))
OP2(mul, 64, 64, uint64_t, 64, uint64_t, RESULT(DOUBLE(a) * DOUBLE(b)))
OP2(divide, 64, 64, uint64_t, 64, uint64_t, RESULT(DOUBLE(a) / DOUBLE(b)))
OP3(fused, 64, 64, uint64_t, 64, uint64_t, 64, uint64_t, RESULT(fma(DOUBLE(a), DOUBLE(b), DOUBLE(c))))
OP1(reciprocal, 64, 64, uint64_t, RESULT(1.0 / DOUBLE(a)))
OP1(root, 64, 64, uint64_t, RESULT(sqrt(DOUBLE(a))))
OP1(neg, 64, 64, uint64_t, a ^ 1ull << 63)
OP1(magnitude, 64, 64, uint64_t, a & ~(1ull << 63))

/* -0 is below +0; a NaN gives way to the other source. */
static inline int64_t order(uint64_t bits) {
    return (int64_t)(bits ^ ((uint64_t)((int64_t)bits >> 63) >> 1));
}
static inline uint64_t extremum(uint64_t a, uint64_t b, bool larger) {
    bool a_nan = DOUBLE(a) != DOUBLE(a), b_nan = DOUBLE(b) != DOUBLE(b);
    if (a_nan || b_nan) return a_nan ? (b_nan ? NAN64 : b) : a;
    return (order(a) > order(b)) == larger ? a : b;
}
OP2(min, 64, 64, uint64_t, 64, uint64_t, extremum(a, b, false))
OP2(max, 64, 64, uint64_t, 64, uint64_t, extremum(a, b, true))

Decoded decode_double(Reader *r) {
    static const struct { const char *name; int sources; bool rounds; Exec exec; } table[] = {
        {"add", 2, true, add}, {"sub", 2, true, sub}, {"mul", 2, true, mul}, {"div", 2, true, divide},
        {"fma", 3, true, fused}, {"mad", 3, true, fused}, {"rcp", 1, true, reciprocal},
        {"sqrt", 1, true, root}, {"neg", 1, false, neg}, {"abs", 1, false, magnitude},
        {"min", 2, false, min}, {"max", 2, false, max},
    };
    if (strcmp(r->type, "f64") || r->packed > 1 || has(r->d, "approx")) return NOT_MINE;
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        if (strcmp(table[i].name, r->op)) continue;
        int rounding = table[i].rounds ? take_rounding(r) : ROUND_NEAREST;
        bool optional = i < 3;
        if (rounding < 0 && !optional) return refuse(r, "%s needs a rounding modifier", r->d->text);
        char signature[] = "8888";
        signature[1 + table[i].sources] = 0;
        Decoded decoded = finish(r, table[i].exec, CLASS_FLOAT, signature);
        if (decoded == DECODED) wrap_rounding(r->in, rounding);
        return decoded;
    }
    return NOT_MINE;
}
