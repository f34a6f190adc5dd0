/* Comparisons: setp, set, selp, slct, testp. A comparison works on all 32 lanes and gives a lane mask;
 * what the lanes outside of the execution mask hold does not matter. */
#include "formats.h"

#include <math.h>

typedef uint32_t (*Compare)(const void *a, const void *b);

#define COMPARISON(NAME, W, T, LOAD, EXPR)                              \
    static uint32_t NAME(const void *va, const void *vb) {              \
        const uint##W##_t *pa = va, *pb = vb;                           \
        uint32_t result = 0;                                            \
        for (uint32_t i = 0; i < LANES; i++) {                          \
            T a = LOAD(pa[i]), b = LOAD(pb[i]);                         \
            result |= (EXPR) ? lane_bit[i] : 0;                         \
        }                                                               \
        return result;                                                  \
    }
#define TO_S16(x) (int16_t)(x)
#define TO_U16(x) (uint16_t)(x)
#define TO_S32(x) (int32_t)(x)
#define TO_S64(x) (int64_t)(x)
#define SAME(x) (x)
#define FLUSHED(x) as_float(flush32(x))

#define ORDERED(TYPE, W, T, LOAD)             \
    COMPARISON(eq_##TYPE, W, T, LOAD, a == b) \
    COMPARISON(ne_##TYPE, W, T, LOAD, a != b) \
    COMPARISON(lt_##TYPE, W, T, LOAD, a < b)  \
    COMPARISON(le_##TYPE, W, T, LOAD, a <= b) \
    COMPARISON(gt_##TYPE, W, T, LOAD, a > b)  \
    COMPARISON(ge_##TYPE, W, T, LOAD, a >= b)
/* ne is true only for ordered operands; the ...u forms are true if either is a NaN. */
#define FLOATING(TYPE, W, T, LOAD)                            \
    COMPARISON(eq_##TYPE, W, T, LOAD, a == b)                 \
    COMPARISON(ne_##TYPE, W, T, LOAD, (a < b) | (a > b))      \
    COMPARISON(lt_##TYPE, W, T, LOAD, a < b)                  \
    COMPARISON(le_##TYPE, W, T, LOAD, a <= b)                 \
    COMPARISON(gt_##TYPE, W, T, LOAD, a > b)                  \
    COMPARISON(ge_##TYPE, W, T, LOAD, a >= b)                 \
    COMPARISON(equ_##TYPE, W, T, LOAD, !((a < b) | (a > b)))  \
    COMPARISON(neu_##TYPE, W, T, LOAD, a != b)                \
    COMPARISON(ltu_##TYPE, W, T, LOAD, !(a >= b))             \
    COMPARISON(leu_##TYPE, W, T, LOAD, !(a > b))              \
    COMPARISON(gtu_##TYPE, W, T, LOAD, !(a <= b))             \
    COMPARISON(geu_##TYPE, W, T, LOAD, !(a < b))              \
    COMPARISON(num_##TYPE, W, T, LOAD, (a == a) & (b == b))   \
    COMPARISON(nan_##TYPE, W, T, LOAD, (a != a) | (b != b))
ORDERED(u16, 32, uint16_t, TO_U16)
ORDERED(s16, 32, int16_t, TO_S16)
ORDERED(u32, 32, uint32_t, SAME)
ORDERED(s32, 32, int32_t, TO_S32)
ORDERED(u64, 64, uint64_t, SAME)
ORDERED(s64, 64, int64_t, TO_S64)
FLOATING(f32, 32, float, as_float)
FLOATING(ftz, 32, float, FLUSHED)
FLOATING(f64, 64, double, as_double)

static const char *const operators[] = {"eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu",
                                        "geu", "num", "nan", "lo", "ls", "hi", "hs"};
#define SIX(T) {eq_##T, ne_##T, lt_##T, le_##T, gt_##T, ge_##T}
#define FOURTEEN(T) {eq_##T, ne_##T, lt_##T, le_##T, gt_##T, ge_##T, equ_##T, neu_##T, ltu_##T, leu_##T, \
                     gtu_##T, geu_##T, num_##T, nan_##T}

static Compare comparison(Reader *r, bool flush) {
    static const Compare integers[6][6] = {SIX(u16), SIX(s16), SIX(u32), SIX(s32), SIX(u64), SIX(s64)};
    static const Compare floats[3][14] = {FOURTEEN(f32), FOURTEEN(ftz), FOURTEEN(f64)};
    int operation = take_one(r, operators, 18);
    if (operation < 0) return NULL;
    if (r->kind == 'f' || r->kind == 'h')
        return operation < 14 ? floats[r->bytes == 8 ? 2 : flush][operation] : NULL;
    if (r->bytes < 2 || r->bytes > 8) return NULL;
    int size = r->bytes == 2 ? 0 : r->bytes == 4 ? 2 : 4;
    if (operation >= 14) {
        if (r->kind == 's') return NULL;
        operation += 2 - 14; /* lo, ls, hi, hs */
    } else if (operation > 5 || (r->kind == 'b' && operation > 1)) {
        return NULL;
    }
    return integers[size + (r->kind == 's')][operation];
}

/* ---------------------------------------------------------------- setp, set
 * data: a Comparing. 16-bit floats are widened to f32, halves of a pair one after the other. */
enum { COMBINE_NONE, COMBINE_AND, COMBINE_OR, COMBINE_XOR };
typedef struct {
    Compare compare;
    int combine;
    char kind;            /* of 16-bit floats, else 0 */
    int packed;
    bool flush, dual;     /* dual: p|q */
    uint64_t truth[2];    /* set: what a true comparison writes, for each half */
    int to_bytes;         /* set: of the destination */
} Comparing;

static const void *source(Warp *w, const Instr *in, const Operand *o, uint32_t mask) {
    if (o->kind == OPERAND_IMMEDIATE) return o->width == 8 ? (const void *)o->broadcast64 : o->broadcast32;
    need(w, in, o, mask);
    return w->registers + o->offset;
}

static void widen(const Comparing *how, const uint32_t *from, int half, uint32_t *to) {
    for (int i = 0; i < LANES; i++) {
        uint32_t x = from[i] >> 16 * half & 0xffff;
        if (how->flush && !(x & 0x7c00)) x &= 0x8000;
        to[i] = how->kind == 'h' ? x << 16 : widen_f16(x);
    }
}

static uint32_t compare_half(const Comparing *how, const void *a, const void *b, int half) {
    uint32_t wide_a[LANES], wide_b[LANES];
    widen(how, a, half, wide_a);
    widen(how, b, half, wide_b);
    return how->compare(wide_a, wide_b);
}

static uint32_t combined(const Comparing *how, uint32_t value, uint32_t c) {
    switch (how->combine) {
    case COMBINE_AND: return value & c;
    case COMBINE_OR: return value | c;
    case COMBINE_XOR: return value ^ c;
    default: return value;
    }
}

static Status exec_setp(Warp *w, const Instr *in, uint32_t mask) {
    const Comparing *how = in->data;
    const void *a = source(w, in, &in->args[1], mask), *b = source(w, in, &in->args[2], mask);
    uint32_t c = how->combine ? src_pred(w, in, &in->args[3], mask) : 0;
    uint32_t p = how->kind ? compare_half(how, a, b, 0) : how->compare(a, b);
    uint32_t q = how->packed == 2 ? compare_half(how, a, b, 1) : ~p;
    if (how->dual) {
        set_pred(w, &in->args[0].parts[0], mask, combined(how, p, c));
        set_pred(w, &in->args[0].parts[1], mask, combined(how, q, c));
    } else {
        set_pred(w, &in->args[0], mask, combined(how, p, c));
    }
    return NEXT;
}

static Status setp_plain(Warp *w, const Instr *in, uint32_t mask) {
    Compare compare = (Compare)(uintptr_t)in->u[0];
    const void *a = source(w, in, &in->args[1], mask), *b = source(w, in, &in->args[2], mask);
    set_pred(w, &in->args[0], mask, compare(a, b));
    return NEXT;
}

static Status exec_set(Warp *w, const Instr *in, uint32_t mask) {
    const Comparing *how = in->data;
    const void *a = source(w, in, &in->args[1], mask), *b = source(w, in, &in->args[2], mask);
    uint32_t c = how->combine ? src_pred(w, in, &in->args[3], mask) : 0;
    uint32_t p = combined(how, how->kind ? compare_half(how, a, b, 0) : how->compare(a, b), c);
    uint32_t q = how->packed == 2 ? combined(how, compare_half(how, a, b, 1), c) : 0;
    FOR_LANES(mask, i) {
        uint64_t low = p >> i & 1 ? how->truth[0] : 0, high = q >> i & 1 ? how->truth[1] : 0;
        set_lane(w, &in->args[0], (int)i, low | high);
    }
    return NEXT;
}

/* Reads all modifiers of setp and set. */
static Comparing *comparing(Reader *r) {
    static const char *const combinations[] = {"and", "or", "xor"};
    Comparing *how = arena(r->d->program, sizeof *how);
    how->packed = r->packed;
    if (r->kind == 'h' || (r->kind == 'f' && r->bytes == 2)) how->kind = r->kind;
    else if (r->packed == 2) return NULL;
    bool single = r->kind == 'f' && r->bytes <= 4;
    how->flush = single && take(r, "ftz");
    how->combine = 1 + take_one(r, combinations, 3);
    how->compare = comparison(r, how->flush && !how->kind);
    /* The operands' immediates are broadcast by their type's width. */
    for (int i = 1; i < 3 && i < r->in->n; i++)
        if (r->in->args[i].kind == OPERAND_IMMEDIATE) r->in->args[i].width = (uint8_t)(r->bytes == 8 ? 8 : 4);
    return how->compare ? how : NULL;
}

static Decoded decode_setp(Reader *r) {
    Instr *in = r->in;
    Comparing *how = comparing(r);
    if (!how) return refuse(r, "comparison %s is not modelled", in->name);
    Operand to = in->args[0];
    how->dual = to.kind == OPERAND_VECTOR;
    if (how->packed == 2 && !how->dual) return refuse(r, "%s needs p|q", in->name);
    in->data = how;
    in->u[0] = (uint64_t)(uintptr_t)how->compare;
    if (how->dual) {
        if (to.count != 2) return refuse(r, "%s needs p|q", in->name);
        for (int i = 0; i < 2; i++) {
            bool predicate = to.parts[i].kind == OPERAND_REGISTER && !to.parts[i].width;
            if (to.parts[i].kind != OPERAND_SINK && !predicate)
                return refuse(r, "%s writes predicates", in->name);
        }
        in->args[0] = to.parts[0];
    }
    char c = letter(r), signature[] = {'p', c, c, how->combine ? 'p' : 0, 0};
    bool plain = !how->dual && !how->kind && !how->combine;
    Decoded decoded = finish(r, plain ? setp_plain : exec_setp, CLASS_PREDICATE, signature);
    in->args[0] = to;
    return decoded;
}

static Decoded decode_set(Reader *r) {
    const Decode *d = r->d;
    Comparing *how = comparing(r);
    if (!how || d->n < 4) return refuse(r, "comparison %s is not modelled", d->text);
    const char *to = d->part[d->n - 2];
    r->used |= 1u << (d->n - 2);
    how->to_bytes = 4;
    if (!strcmp(to, "u32") || !strcmp(to, "s32")) how->truth[0] = FULL_MASK;
    else if (!strcmp(to, "f32")) how->truth[0] = 0x3f800000;
    else if (!strcmp(to, "u16") || !strcmp(to, "s16")) how->truth[0] = 0xffff, how->to_bytes = 2;
    else if (!strcmp(to, "f16")) how->truth[0] = 0x3c00, how->to_bytes = 2;
    else if (!strcmp(to, "bf16")) how->truth[0] = 0x3f80, how->to_bytes = 2;
    else if (how->packed == 2 && !strcmp(to, "f16x2")) how->truth[0] = 0x3c00, how->truth[1] = 0x3c000000;
    else if (how->packed == 2 && !strcmp(to, "bf16x2")) how->truth[0] = 0x3f80, how->truth[1] = 0x3f800000;
    else return refuse(r, "%s to type .%s is not modelled", r->op, to);
    if (how->packed == 2 && !how->truth[1]) return refuse(r, "%s to type .%s is not modelled", r->op, to);
    r->in->data = how;
    char c = letter(r), signature[] = {how->to_bytes == 2 ? '2' : '4', c, c, how->combine ? 'p' : 0, 0};
    return finish(r, exec_set, CLASS_INTEGER, signature);
}

/* ---------------------------------------------------------------- selp, slct
 * selp moves: what it does not take may be undefined, and what it takes stays undefined. */
#define SELECT(NAME, W, U)                                                                                \
    static Status NAME(Warp *w, const Instr *in, uint32_t mask) {                                         \
        uint32_t p = src_pred(w, in, &in->args[3], mask);                                                 \
        uint32_t defined = (defined_lanes(w, in, &in->args[1], mask & p)) |                               \
                           (defined_lanes(w, in, &in->args[2], mask & ~p));                               \
        const uint##W##_t *a = lanes_of_source(w, &in->args[1], W == 64);                                 \
        const uint##W##_t *b = lanes_of_source(w, &in->args[2], W == 64);                                 \
        uint##W##_t *d = dst##W(w, &in->args[0], mask);                                                   \
        EACH_LANE(mask, d[i] = (U)(p & lane_bit[i] ? a[i] : b[i]));                                       \
        if (defined != mask) set_defined(w, &in->args[0], mask, defined);                                 \
        return NEXT;                                                                                      \
    }
SELECT(selp_16, 32, uint16_t)
SELECT(selp_32, 32, uint32_t)
SELECT(selp_64, 64, uint64_t)

#define SLCT(NAME, W, U, ...) OP3(NAME, W, W, U, W, U, 32, uint32_t, (__VA_ARGS__) ? a : b)
SLCT(slct_16_s32, 32, uint16_t, (int32_t)c >= 0)
SLCT(slct_32_s32, 32, uint32_t, (int32_t)c >= 0)
SLCT(slct_64_s32, 64, uint64_t, (int32_t)c >= 0)
SLCT(slct_16_f32, 32, uint16_t, as_float(c) >= 0.0f)
SLCT(slct_32_f32, 32, uint32_t, as_float(c) >= 0.0f)
SLCT(slct_64_f32, 64, uint64_t, as_float(c) >= 0.0f)
SLCT(slct_16_ftz, 32, uint16_t, as_float(flush32(c)) >= 0.0f)
SLCT(slct_32_ftz, 32, uint32_t, as_float(flush32(c)) >= 0.0f)
SLCT(slct_64_ftz, 64, uint64_t, as_float(flush32(c)) >= 0.0f)

static Decoded decode_selp(Reader *r) {
    static const Exec execs[] = {selp_16, selp_32, selp_64};
    if (r->packed > 1 || r->bytes < 2 || r->bytes > 8) return refuse(r, "%s is not modelled", r->d->text);
    char c = letter(r), signature[] = {c, c, c, 'p', 0};
    return finish(r, execs[r->bytes == 2 ? 0 : r->bytes == 4 ? 1 : 2], CLASS_INTEGER, signature);
}

static Decoded decode_slct(Reader *r) {
    static const Exec execs[3][3] = {{slct_16_s32, slct_32_s32, slct_64_s32},
                                     {slct_16_f32, slct_32_f32, slct_64_f32},
                                     {slct_16_ftz, slct_32_ftz, slct_64_ftz}};
    const Decode *d = r->d;
    int bytes;
    char kind;
    if (d->n < 3 || !ptx_type(d->part[d->n - 2], &bytes, &kind) || bytes < 2 || bytes > 8)
        return refuse(r, "%s is not modelled", d->text);
    r->used |= 1u << (d->n - 2);
    bool floating = !strcmp(r->type, "f32");
    if (!floating && strcmp(r->type, "s32")) return refuse(r, "%s is not modelled", d->text);
    int how = floating ? (take(r, "ftz") ? 2 : 1) : 0;
    char c = bytes == 2 ? '2' : bytes == 4 ? '4' : '8', signature[] = {c, c, c, '4', 0};
    return finish(r, execs[how][bytes == 2 ? 0 : bytes == 4 ? 1 : 2], CLASS_INTEGER, signature);
}

/* ---------------------------------------------------------------- testp: u[0] the property */
enum { TEST_FINITE, TEST_INFINITE, TEST_NUMBER, TEST_NOTANUMBER, TEST_NORMAL, TEST_SUBNORMAL };
static Status exec_testp(Warp *w, const Instr *in, uint32_t mask) {
    bool wide = in->u[1];
    const void *a = source(w, in, &in->args[1], mask);
    uint32_t result = 0;
    FOR_LANES(mask, i) {
        const uint64_t *a64 = a;
        const uint32_t *a32 = a;
        int class = wide ? fpclassify(as_double(a64[i])) : fpclassify(as_float(a32[i]));
        bool yes = false;
        switch (in->u[0]) {
        case TEST_FINITE: yes = class != FP_NAN && class != FP_INFINITE; break;
        case TEST_INFINITE: yes = class == FP_INFINITE; break;
        case TEST_NUMBER: yes = class != FP_NAN; break;
        case TEST_NOTANUMBER: yes = class == FP_NAN; break;
        case TEST_NORMAL: yes = class == FP_NORMAL || class == FP_ZERO; break; /* by the ISA, zero is */
        default: yes = class == FP_SUBNORMAL;
        }
        result |= yes ? lane_bit[i] : 0;
    }
    set_pred(w, &in->args[0], mask, result);
    return NEXT;
}

static Decoded decode_testp(Reader *r) {
    static const char *const names[] = {"finite", "infinite", "number", "notanumber", "normal", "subnormal"};
    int property = take_one(r, names, 6);
    if (property < 0 || r->kind != 'f' || r->bytes < 4 || r->packed > 1)
        return refuse(r, "%s is not modelled", r->d->text);
    r->in->u[0] = (uint64_t)property;
    r->in->u[1] = r->bytes == 8;
    if (r->in->n > 1 && r->in->args[1].kind == OPERAND_IMMEDIATE) r->in->args[1].width = (uint8_t)r->bytes;
    return finish(r, exec_testp, CLASS_PREDICATE, r->bytes == 8 ? "p8" : "p4");
}

Decoded decode_compare(Reader *r) {
    if (!strcmp(r->op, "setp")) return decode_setp(r);
    if (!strcmp(r->op, "set")) return decode_set(r);
    if (!strcmp(r->op, "selp")) return decode_selp(r);
    if (!strcmp(r->op, "slct")) return decode_slct(r);
    if (!strcmp(r->op, "testp")) return decode_testp(r);
    return NOT_MINE;
}
