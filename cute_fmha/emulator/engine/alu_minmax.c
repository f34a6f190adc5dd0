/* min and max of f32, of two and of three sources. -0 is below +0. A NaN gives way to the other source,
 * unless .NaN asks for it; .xorsign.abs compares magnitudes and gives the result the xor of the signs. */
#include "alu.h"

#define ALWAYS_INLINE static inline __attribute__((always_inline))
enum { MAXIMUM = 1, FTZ = 2, NANS = 4, XORSIGN = 8, MAGNITUDES = 16 };

ALWAYS_INLINE int32_t order(uint32_t bits) {
    return (int32_t)(bits ^ ((uint32_t)((int32_t)bits >> 31) >> 1));
}
ALWAYS_INLINE bool is_nan(uint32_t bits) { return (bits & 0x7fffffffu) > 0x7f800000u; }
ALWAYS_INLINE uint32_t extremum(uint32_t a, uint32_t b, uint32_t how) {
    uint32_t sign = how & XORSIGN ? (a ^ b) & 0x80000000u : 0;
    if (how & FTZ) a = flush32(a), b = flush32(b);
    if (how & (MAGNITUDES | XORSIGN)) a &= 0x7fffffffu, b &= 0x7fffffffu;
    bool first = how & MAXIMUM ? order(a) > order(b) : order(a) < order(b);
    uint32_t r = (first ? a : b) | sign;
    uint32_t other = how & NANS ? NAN32 : b | sign, one = how & NANS ? NAN32 : a | sign;
    r = is_nan(b) ? one : r;
    r = is_nan(a) ? other : r;
    return is_nan(r) ? NAN32 : r;
}

/* u[0]: how. The frequent forms are instances with a constant. */
#define TWO(NAME, HOW)                                                                                    \
    static Status NAME(Warp *w, const Instr *in, uint32_t mask) {                                         \
        const uint32_t *a = src32(w, in, &in->args[1], mask), *b = src32(w, in, &in->args[2], mask);      \
        uint32_t *d = dst32(w, &in->args[0], mask);                                                       \
        uint32_t how = (HOW);                                                                             \
        EACH_LANE(mask, d[i] = extremum(a[i], b[i], how));                                                \
        return NEXT;                                                                                      \
    }
#define THREE(NAME, HOW)                                                                                  \
    static Status NAME(Warp *w, const Instr *in, uint32_t mask) {                                         \
        const uint32_t *a = src32(w, in, &in->args[1], mask), *b = src32(w, in, &in->args[2], mask);      \
        const uint32_t *c = src32(w, in, &in->args[3], mask);                                             \
        uint32_t *d = dst32(w, &in->args[0], mask);                                                       \
        uint32_t how = (HOW);                                                                             \
        EACH_LANE(mask, d[i] = extremum(extremum(a[i], b[i], how), c[i], how));                           \
        return NEXT;                                                                                      \
    }
TWO(min2, 0)
TWO(max2, MAXIMUM)
TWO(any2, (uint32_t)in->u[0])
THREE(min3, 0)
THREE(max3, MAXIMUM)
THREE(any3, (uint32_t)in->u[0])

Decoded decode_minmax(Reader *r) {
    bool maximum = !strcmp(r->op, "max");
    if ((!maximum && strcmp(r->op, "min")) || strcmp(r->type, "f32") || r->packed > 1) return NOT_MINE;
    bool three = r->in->n == 4;
    uint32_t how = maximum ? MAXIMUM : 0;
    if (take(r, "ftz")) how |= FTZ;
    if (take(r, "NaN")) how |= NANS;
    if (!three && take(r, "xorsign")) {
        how |= XORSIGN;
        if (!take(r, "abs")) return refuse(r, "%s: .xorsign needs .abs", r->d->text);
    } else if (three && take(r, "abs")) {
        how |= MAGNITUDES;
    }
    r->in->u[0] = how;
    Exec exec = how == MAXIMUM ? (three ? max3 : max2) : how ? (three ? any3 : any2) : three ? min3 : min2;
    return finish(r, exec, CLASS_MAX, three ? "4444" : "444");
}
