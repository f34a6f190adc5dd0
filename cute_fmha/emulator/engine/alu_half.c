/* f16, bf16 and their pairs: add, sub, mul, fma, min, max, neg, abs, ex2 and tanh.
 *
 * Sources are widened to f32, where products and most sums are exact; the exact result (of fma: rounded to
 * odd, so that the second rounding sees on which side of a tie it lies) is then rounded once. ex2 and tanh
 * are the exact functions, rounded once; the ISA allows 2^-9.9 (ex2.f16), 2^-7 (ex2.bf16), 2^-10.987
 * (tanh.f16) and 2^-8 (tanh.bf16). */
#include "formats.h"

#include <math.h>

enum { OP_ADD, OP_SUB, OP_MUL, OP_FMA, OP_MIN, OP_MAX, OP_NEG, OP_ABS, OP_EX2, OP_TANH };
enum { FTZ = 1, SAT = 2, RELU = 4, NANS = 8, XORSIGN = 16, BFLOAT = 32, PAIRS = 64 };
enum { ELEMENTS = 2 * LANES };

/* u[0]: operation, u[1]: flags. */
static void gather(const uint32_t *from, uint64_t flags, uint32_t *to) {
    int halves = flags & PAIRS ? 2 : 1;
    bool flush = flags & FTZ;
    uint32_t exponent = flags & BFLOAT ? 0x7f80 : 0x7c00;
    for (int half = 0; half < halves; half++)
        for (int i = 0; i < LANES; i++) {
            uint32_t x = from[i] >> 16 * half & 0xffff;
            if (flush) x = x & exponent ? x : x & 0x8000;
            to[half * LANES + i] = flags & BFLOAT ? x << 16 : widen_f16(x);
        }
}

/* A double rounded to f32 towards zero, its last bit set if anything was lost (round to odd). */
static inline float odd_float(double value) {
    float nearest = (float)value;
    uint32_t bits = as_bits(nearest);
    if ((double)nearest == value || value != value) return nearest;
    if (fabs((double)nearest) > fabs(value)) bits--;
    return as_float(bits | 1);
}

/* a * b + c: the product of two short numbers is exact in double; what the sum loses goes into its last
 * bit. */
static inline float fused(float a, float b, float c) {
    double product = (double)a * (double)b, sum = product + (double)c;
    double part = sum - product, error = (product - (sum - part)) + ((double)c - part);
    if (error > 0.0 || error < 0.0) {
        uint64_t bits = as_bits64(sum);
        if ((error < 0.0) != (sum < 0.0)) bits--;
        sum = as_double(bits | 1);
    }
    return odd_float(sum);
}

static inline int32_t order(uint32_t bits) {
    return (int32_t)(bits ^ ((uint32_t)((int32_t)bits >> 31) >> 1));
}
static inline float extremum(float a, float b, bool larger, uint64_t flags) {
    uint32_t x = as_bits(a), y = as_bits(b), sign = flags & XORSIGN ? (x ^ y) & 0x80000000u : 0;
    if (flags & XORSIGN) x &= 0x7fffffffu, y &= 0x7fffffffu;
    bool x_nan = a != a, y_nan = b != b;
    if ((x_nan && y_nan) || ((flags & NANS) && (x_nan || y_nan))) return as_float(NAN32);
    uint32_t r = x_nan ? y : y_nan ? x : (order(x) > order(y)) == larger ? x : y;
    return as_float(r | sign);
}

static void compute(int operation, uint64_t flags, int n, const float *a, const float *b, const float *c,
                    float *r) {
    switch (operation) {
    case OP_ADD: for (int i = 0; i < n; i++) r[i] = odd_float((double)a[i] + (double)b[i]); break;
    case OP_SUB: for (int i = 0; i < n; i++) r[i] = odd_float((double)a[i] - (double)b[i]); break;
    case OP_MUL: for (int i = 0; i < n; i++) r[i] = odd_float((double)a[i] * (double)b[i]); break;
    case OP_FMA: for (int i = 0; i < n; i++) r[i] = fused(a[i], b[i], c[i]); break;
    case OP_MIN: for (int i = 0; i < n; i++) r[i] = extremum(a[i], b[i], false, flags); break;
    case OP_MAX: for (int i = 0; i < n; i++) r[i] = extremum(a[i], b[i], true, flags); break;
    case OP_EX2: for (int i = 0; i < n; i++) r[i] = odd_float(exp2((double)a[i])); break;
    default: for (int i = 0; i < n; i++) r[i] = odd_float(tanh((double)a[i])); break;
    }
}

static inline uint32_t rounded(float value, uint64_t flags) {
    if (flags & SAT) value = saturate32(value);
    if ((flags & RELU) && !(value > 0.0f) && value == value) value = 0.0f;
    /* What would be below the normal numbers with an exponent without bounds is flushed, as on an H200: also
     * some of what rounds to the smallest normal number. */
    float limit = flags & BFLOAT ? 0x1p-126f * (1 - 0x1p-9f) : 0x1p-14f * (1 - 0x1p-12f);
    if ((flags & FTZ) && fabsf(value) < limit) value = copysignf(0.0f, value);
    return flags & BFLOAT ? narrow_bf16(as_bits(value)) : narrow_f16(as_bits(value));
}

static Status exec_half(Warp *w, const Instr *in, uint32_t mask) {
    int operation = (int)in->u[0], sources = in->n - 1, n = in->u[1] & PAIRS ? ELEMENTS : LANES;
    uint64_t flags = in->u[1];
    uint32_t from[3][ELEMENTS];
    float r[ELEMENTS];
    for (int s = 0; s < sources; s++) gather(src32(w, in, &in->args[1 + s], mask), flags, from[s]);
    for (int s = sources; s < 3; s++) memset(from[s], 0, sizeof from[s]);
    compute(operation, flags, n, (const float *)from[0], (const float *)from[1], (const float *)from[2], r);
    if (operation >= OP_EX2) count_mufu(w, mask, n / LANES);
    else if (operation <= OP_FMA) count_fma(w, mask, n / LANES);
    uint32_t *d = dst32(w, &in->args[0], mask);
    if (n == LANES) EACH_LANE(mask, d[i] = rounded(r[i], flags));
    else EACH_LANE(mask, d[i] = rounded(r[i], flags) | rounded(r[LANES + i], flags) << 16);
    return NEXT;
}

/* neg and abs touch the sign alone. u[0]: bits to flip, u[1]: flags; u[2]: bits to keep. */
static Status exec_sign(Warp *w, const Instr *in, uint32_t mask) {
    const uint32_t *a = src32(w, in, &in->args[1], mask);
    uint32_t *d = dst32(w, &in->args[0], mask), flip = (uint32_t)in->u[0], keep = (uint32_t)in->u[2];
    bool flush = in->u[1] & FTZ;
    EACH_LANE(mask, uint32_t x = a[i];
              uint32_t low = flush && !(x & 0x7c00) ? x & 0x8000 : x & 0xffff;
              uint32_t high = flush && !(x & 0x7c000000) ? x & 0x80000000u : x & 0xffff0000u;
              d[i] = ((low | high) ^ flip) & keep);
    return NEXT;
}

static Decoded decode_sign(Reader *r, uint64_t flags) {
    bool negates = !strcmp(r->op, "neg");
    uint32_t signs = r->packed == 2 ? 0x80008000u : 0x8000u, all = r->packed == 2 ? FULL_MASK : 0xffffu;
    r->in->u[0] = negates ? signs : 0;
    r->in->u[1] = flags;
    r->in->u[2] = negates ? all : all & ~signs;
    return finish(r, exec_sign, CLASS_FLOAT, r->packed == 2 ? "44" : "22");
}

static Decoded decode_half_approx(Reader *r, int operation, uint64_t flags) {
    if (!take(r, "approx")) return refuse(r, "%s needs .approx", r->d->text);
    if (operation == OP_EX2 && (flags & BFLOAT)) { /* that form always names .ftz */
        if (!take(r, "ftz")) return refuse(r, "%s needs .ftz", r->d->text);
        flags |= FTZ;
    }
    r->in->u[0] = (uint64_t)operation;
    r->in->u[1] = flags;
    return finish(r, exec_half, CLASS_MUFU, r->packed == 2 ? "44" : "22");
}

Decoded decode_half(Reader *r) {
    static const char *const names[] = {"add", "sub", "mul", "fma", "min",
                                        "max", "neg", "abs", "ex2", "tanh"};
    if ((r->kind != 'f' && r->kind != 'h') || r->bytes != 2) return NOT_MINE;
    int operation = 0;
    while (operation < 10 && strcmp(names[operation], r->op)) operation++;
    if (operation == 10) return NOT_MINE;
    bool bfloat = r->kind == 'h', extremes = operation == OP_MIN || operation == OP_MAX;
    uint64_t flags = (bfloat ? BFLOAT : 0) | (r->packed == 2 ? PAIRS : 0);
    if (operation >= OP_EX2) return decode_half_approx(r, operation, flags);
    if (!bfloat && take(r, "ftz")) flags |= FTZ;
    if (operation >= OP_NEG) return decode_sign(r, flags);
    if (extremes) {
        if (take(r, "NaN")) flags |= NANS;
        if (take(r, "xorsign")) {
            flags |= XORSIGN;
            if (!take(r, "abs")) return refuse(r, "%s: .xorsign needs .abs", r->d->text);
        }
    } else {
        if (!take(r, "rn") && operation == OP_FMA) return refuse(r, "%s needs .rn", r->d->text);
        if (!bfloat && take(r, "sat")) flags |= SAT;
        if (operation == OP_FMA && take(r, "relu")) flags |= RELU;
    }
    r->in->u[0] = (uint64_t)operation;
    r->in->u[1] = flags;
    char c = letter(r), signature[] = {c, c, c, operation == OP_FMA ? c : 0, 0};
    return finish(r, exec_half, extremes ? CLASS_MAX : CLASS_FMA, signature);
}
