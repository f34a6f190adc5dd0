/* Bits: logic, shifts, funnel shifts, permutations, bit fields, counts; and additions with carry. */
#include "alu.h"

/* ---------------------------------------------------------------- logic and shifts, by 16, 32 and 64 bits */
#define THREE(M, OP, ...) M(OP##_16, 32, uint16_t, __VA_ARGS__) M(OP##_32, 32, uint32_t, __VA_ARGS__) \
    M(OP##_64, 64, uint64_t, __VA_ARGS__)
#define NAMES(OP) {OP##_16, OP##_32, OP##_64}
#define SAME1(NAME, W, U, ...) OP1(NAME, W, W, U, (U)(__VA_ARGS__))
#define SAME2(NAME, W, U, ...) OP2(NAME, W, W, U, W, U, (U)(__VA_ARGS__))
THREE(SAME2, and, a & b)
THREE(SAME2, or, a | b)
THREE(SAME2, xor, a ^ b)
THREE(SAME1, not, ~a)
THREE(SAME1, cnot, a == 0)

/* Amounts beyond the width clamp to it: zeros, or signs for shr.s. */
#define SHIFT_LEFT(NAME, W, U, ...) \
    OP2(NAME, W, W, U, 32, uint32_t, b < 8 * sizeof(U) ? (U)((U)a << (b & 63)) : 0)
#define SHIFT_RIGHT(NAME, W, U, ...) \
    OP2(NAME, W, W, U, 32, uint32_t, b < 8 * sizeof(U) ? (U)(a >> (b & 63)) : 0)
#define SHIFT_SIGNED(NAME, W, S, U) \
    OP2(NAME, W, W, S, 32, uint32_t, (U)(a >> (b < 8 * sizeof(S) ? b : 8 * sizeof(S) - 1)))
THREE(SHIFT_LEFT, shl, )
THREE(SHIFT_RIGHT, shr, )
SHIFT_SIGNED(shr_signed_16, 32, int16_t, uint16_t)
SHIFT_SIGNED(shr_signed_32, 32, int32_t, uint32_t)
SHIFT_SIGNED(shr_signed_64, 64, int64_t, uint64_t)

/* Funnel shifts of b:a. */
#define WRAP (c & 31)
#define CLAMP (c < 32 ? c : 32)
#define PAIR_OF(a, b) ((uint64_t)(b) << 32 | (a))
#define FUNNEL(NAME, ...) OP3(NAME, 32, 32, uint32_t, 32, uint32_t, 32, uint32_t, __VA_ARGS__)
FUNNEL(shf_l_wrap, (PAIR_OF(a, b) << WRAP) >> 32)
FUNNEL(shf_l_clamp, (PAIR_OF(a, b) << CLAMP) >> 32)
FUNNEL(shf_r_wrap, PAIR_OF(a, b) >> WRAP)
FUNNEL(shf_r_clamp, PAIR_OF(a, b) >> CLAMP)

/* ---------------------------------------------------------------- lop3
 * u[0] the table, u[1] the predicate form */
enum { LOP3_PLAIN, LOP3_OR, LOP3_AND };
static Status exec_lop3(Warp *w, const Instr *in, uint32_t mask) {
    const uint32_t *a = src32(w, in, &in->args[1], mask), *b = src32(w, in, &in->args[2], mask);
    const uint32_t *c = src32(w, in, &in->args[3], mask);
    uint32_t table[8], q = in->u[1] ? src_pred(w, in, &in->args[5], mask) : 0, nonzero = 0;
    const Operand *to = in->u[1] ? &in->args[0].parts[0] : &in->args[0];
    for (int k = 0; k < 8; k++) table[k] = in->u[0] >> k & 1 ? FULL_MASK : 0;
    uint32_t *d = dst32(w, to, mask);
    EACH_LANE(mask, uint32_t x = a[i], y = b[i], z = c[i];
              uint32_t f0 = (~z & table[0]) | (z & table[1]), f1 = (~z & table[2]) | (z & table[3]);
              uint32_t f2 = (~z & table[4]) | (z & table[5]), f3 = (~z & table[6]) | (z & table[7]);
              d[i] = (~x & ((~y & f0) | (y & f1))) | (x & ((~y & f2) | (y & f3))));
    if (!in->u[1]) return NEXT;
    FOR_LANES(mask, i) nonzero |= d[i] ? lane_bit[i] : 0;
    set_pred(w, &in->args[0].parts[1], mask, in->u[1] == LOP3_OR ? nonzero | q : nonzero & q);
    return NEXT;
}

static Decoded decode_lop3(Reader *r) {
    Instr *in = r->in;
    int form = take(r, "or") ? LOP3_OR : take(r, "and") ? LOP3_AND : LOP3_PLAIN;
    int sources = form ? 6 : 5;
    if (in->n != sources || in->args[4].kind != OPERAND_IMMEDIATE || strcmp(r->type, "b32"))
        return refuse(r, "%s is not modelled", in->name);
    in->u[0] = (uint64_t)in->args[4].immediate & 0xff;
    in->u[1] = (uint64_t)form;
    if (!form) return finish(r, exec_lop3, CLASS_INTEGER, "4444w");
    Operand vector = in->args[0];
    if (vector.kind != OPERAND_VECTOR || vector.count != 2) return refuse(r, "%s needs d|p", in->name);
    if (vector.parts[1].kind != OPERAND_SINK && vector.parts[1].width)
        return refuse(r, "%s needs d|p", in->name);
    in->args[0] = vector.parts[0]; /* finish() checks the first part in its place */
    Decoded decoded = finish(r, exec_lop3, CLASS_INTEGER, "4444wp");
    in->args[0] = vector;
    return decoded;
}

/* ---------------------------------------------------------------- prmt */
static inline uint32_t selected(uint64_t bytes, uint32_t selector) {
    uint32_t byte = (uint32_t)(bytes >> 8 * (selector & 7)) & 0xff;
    return selector & 8 ? (byte & 0x80 ? 0xff : 0) : byte;
}
static inline uint32_t permute(uint64_t v, uint32_t s) {
    return selected(v, s) | selected(v, s >> 4) << 8 | selected(v, s >> 8) << 16 | selected(v, s >> 12) << 24;
}
/* The other modes choose by the two low bits of c; their selectors, byte 0 in the low nibble. */
static const uint16_t prmt_modes[6][4] = {
    {0x3210, 0x4321, 0x5432, 0x6543}, /* f4e */
    {0x5670, 0x6701, 0x7012, 0x0123}, /* b4e */
    {0x0000, 0x1111, 0x2222, 0x3333}, /* rc8 */
    {0x3210, 0x3211, 0x3222, 0x3333}, /* ecl */
    {0x0000, 0x1110, 0x2210, 0x3210}, /* ecr */
    {0x1010, 0x3232, 0x1010, 0x3232}, /* rc16 */
};
FUNNEL(prmt, permute(PAIR_OF(a, b), c))
static Status prmt_mode(Warp *w, const Instr *in, uint32_t mask) {
    const uint32_t *a = src32(w, in, &in->args[1], mask), *b = src32(w, in, &in->args[2], mask);
    const uint32_t *c = src32(w, in, &in->args[3], mask);
    uint32_t *d = dst32(w, &in->args[0], mask);
    FOR_LANES(mask, i) d[i] = permute(PAIR_OF(a[i], b[i]), prmt_modes[in->u[0]][c[i] & 3]);
    return NEXT;
}

/* ---------------------------------------------------------------- bit fields */
static inline uint64_t ones(uint32_t n) { return n < 64 ? (1ull << n) - 1 : ~0ull; }
static inline uint64_t extract(uint64_t a, uint32_t b, uint32_t c, uint32_t bits, bool is_signed) {
    /* The ISA restricts both to 0..255. Beyond, an H200 takes the low byte for 32 bits, all for 64. */
    uint32_t position = bits == 32 ? b & 0xff : b < 255 ? b : 255;
    uint32_t length = bits == 32 ? c & 0xff : c < 255 ? c : 255;
    uint64_t value = position < bits ? (a & ones(bits)) >> position : 0;
    uint32_t top = position + length - 1 < bits - 1 ? position + length - 1 : bits - 1;
    bool sign = is_signed && length && (a >> top & 1);
    if (length < 64) value &= ones(length);
    uint32_t known = position >= bits ? 0 : length < bits - position ? length : bits - position;
    return sign ? value | ~ones(known) : value;
}
static inline uint64_t insert(uint64_t a, uint64_t b, uint32_t c, uint32_t d, uint32_t bits) {
    uint32_t position = c & 0xff, length = d & 0xff;
    if (position >= bits) return b;
    uint64_t field = ones(length) << position;
    return (b & ~field) | (a << position & field);
}
OP3(bfe_u32, 32, 32, uint32_t, 32, uint32_t, 32, uint32_t, extract(a, b, c, 32, false))
OP3(bfe_s32, 32, 32, uint32_t, 32, uint32_t, 32, uint32_t, extract(a, b, c, 32, true))
OP3(bfe_u64, 64, 64, uint64_t, 32, uint32_t, 32, uint32_t, extract(a, b, c, 64, false))
OP3(bfe_s64, 64, 64, uint64_t, 32, uint32_t, 32, uint32_t, extract(a, b, c, 64, true))
#define INSERT(NAME, W)                                                                                   \
    static Status NAME(Warp *w, const Instr *in, uint32_t mask) {                                         \
        const uint##W##_t *a = src##W(w, in, &in->args[1], mask), *b = src##W(w, in, &in->args[2], mask); \
        const uint32_t *c = src32(w, in, &in->args[3], mask), *n = src32(w, in, &in->args[4], mask);      \
        uint##W##_t *d = dst##W(w, &in->args[0], mask);                                                   \
        EACH_LANE(mask, d[i] = (uint##W##_t)insert(a[i], b[i], c[i], n[i], W));                           \
        return NEXT;                                                                                      \
    }
INSERT(bfi_32, 32)
INSERT(bfi_64, 64)

static inline uint32_t reverse(uint32_t x) {
    x = (x >> 1 & 0x55555555u) | (x & 0x55555555u) << 1;
    x = (x >> 2 & 0x33333333u) | (x & 0x33333333u) << 2;
    x = (x >> 4 & 0x0f0f0f0fu) | (x & 0x0f0f0f0fu) << 4;
    return __builtin_bswap32(x);
}
OP1(brev_32, 32, 32, uint32_t, reverse(a))
OP1(brev_64, 64, 64, uint64_t, (uint64_t)reverse((uint32_t)a) << 32 | reverse((uint32_t)(a >> 32)))
OP1(popc_32, 32, 32, uint32_t, __builtin_popcount(a))
OP1(popc_64, 32, 64, uint64_t, __builtin_popcountll(a))
OP1(clz_32, 32, 32, uint32_t, a ? __builtin_clz(a) : 32)
OP1(clz_64, 32, 64, uint64_t, a ? __builtin_clzll(a) : 64)
/* The highest bit that differs from the sign; .shiftamt: the shift that brings it to the top. */
#define FIND(a) ((a) ? 63u - (uint32_t)__builtin_clzll(a) : FULL_MASK)
#define SHIFTAMT(a, bits) ((a) ? (bits) - 64u + (uint32_t)__builtin_clzll(a) : FULL_MASK)
#define NO_SIGN(a) ((a) < 0 ? ~(a) : (a))
OP1(bfind_u32, 32, 32, uint32_t, FIND((uint64_t)a))
OP1(bfind_s32, 32, 32, int32_t, FIND((uint64_t)NO_SIGN(a)))
OP1(bfind_u64, 32, 64, uint64_t, FIND(a))
OP1(bfind_s64, 32, 64, int64_t, FIND((uint64_t)NO_SIGN(a)))
OP1(bfind_shift_u32, 32, 32, uint32_t, SHIFTAMT((uint64_t)a, 32))
OP1(bfind_shift_s32, 32, 32, int32_t, SHIFTAMT((uint64_t)NO_SIGN(a), 32))
OP1(bfind_shift_u64, 32, 64, uint64_t, SHIFTAMT(a, 64))
OP1(bfind_shift_s64, 32, 64, int64_t, SHIFTAMT((uint64_t)NO_SIGN(a), 64))

/* The n-th set bit from `base`, upwards or (negative offsets) downwards. */
static uint32_t nth_set(uint32_t value, uint32_t base, int32_t offset) {
    if (!offset) return base < 32 && value >> base & 1 ? base : FULL_MASK;
    int64_t count = offset > 0 ? offset : -(int64_t)offset;
    for (int64_t position = base; position >= 0 && position < 32; position += offset > 0 ? 1 : -1)
        if ((value >> position & 1) && !--count) return (uint32_t)position;
    return FULL_MASK;
}
OP3(fns, 32, 32, uint32_t, 32, uint32_t, 32, int32_t, nth_set(a, b, c))

static inline uint32_t extend(uint32_t a, uint32_t b, bool clamp, bool is_signed) {
    if (clamp && b >= 32) return a;
    uint32_t n = b & 31;
    if (!n) return 0;
    return is_signed ? (uint32_t)((int32_t)(a << (32 - n)) >> (32 - n)) : a & (FULL_MASK >> (32 - n));
}
OP2(szext_wrap_u32, 32, 32, uint32_t, 32, uint32_t, extend(a, b, false, false))
OP2(szext_wrap_s32, 32, 32, uint32_t, 32, uint32_t, extend(a, b, false, true))
OP2(szext_clamp_u32, 32, 32, uint32_t, 32, uint32_t, extend(a, b, true, false))
OP2(szext_clamp_s32, 32, 32, uint32_t, 32, uint32_t, extend(a, b, true, true))
OP2(bmsk_wrap, 32, 32, uint32_t, 32, uint32_t, ones(b & 31) << (a & 31))
OP2(bmsk_clamp, 32, 32, uint32_t, 32, uint32_t, a < 32 ? (b < 32 ? ones(b) : FULL_MASK) << a : 0)

/* ---------------------------------------------------------------- decoding */
static const struct { const char *name; bool has_b; Exec exec[3]; } plain[] = {
    {"and", true, NAMES(and)}, {"or", true, NAMES(or)}, {"xor", true, NAMES(xor)},
    {"not", false, NAMES(not)}, {"cnot", false, NAMES(cnot)},
};

static Decoded decode_shift(Reader *r, int size) {
    static const Exec left[] = NAMES(shl), right[] = NAMES(shr), signed_right[] = NAMES(shr_signed);
    const Exec *table = !strcmp(r->op, "shl") ? left : r->kind == 's' ? signed_right : right;
    return finish(r, table[size], CLASS_INTEGER, size == 0 ? "224" : size == 1 ? "444" : "884");
}

static Decoded decode_funnel(Reader *r) {
    static const Exec execs[2][2] = {{shf_l_wrap, shf_l_clamp}, {shf_r_wrap, shf_r_clamp}};
    bool right = take(r, "r");
    if (!right && !take(r, "l")) return refuse(r, "%s needs .l or .r", r->d->text);
    bool clamp = take(r, "clamp");
    if (!clamp && !take(r, "wrap")) return refuse(r, "%s needs .clamp or .wrap", r->d->text);
    return finish(r, execs[right][clamp], CLASS_INTEGER, "4444");
}

static Decoded decode_permute(Reader *r) {
    static const char *const modes[] = {"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"};
    /* The mode follows the type: prmt.b32.f4e. */
    int mode = take_one(r, modes, 6);
    for (int i = 0; i < 6 && mode < 0; i++)
        if (!strcmp(r->d->part[r->d->n - 1], modes[i])) mode = i;
    if (!take(r, "b32") && strcmp(r->type, "b32")) return refuse(r, "%s is not modelled", r->d->text);
    r->in->u[0] = (uint64_t)mode;
    return finish(r, mode < 0 ? prmt : prmt_mode, CLASS_INTEGER, "4444");
}

static Decoded decode_find(Reader *r) {
    static const Exec find[2][2] = {{bfind_u32, bfind_s32}, {bfind_u64, bfind_s64}};
    static const Exec shift[2][2] = {{bfind_shift_u32, bfind_shift_s32}, {bfind_shift_u64, bfind_shift_s64}};
    bool amount = take(r, "shiftamt"), wide = r->bytes == 8;
    if (r->bytes < 4) return refuse(r, "%s has no such type", r->d->text);
    return finish(r, (amount ? shift : find)[wide][r->kind == 's'], CLASS_INTEGER, wide ? "48" : "44");
}

static Decoded decode_extend(Reader *r) {
    static const Exec sz[2][2] = {{szext_wrap_u32, szext_wrap_s32}, {szext_clamp_u32, szext_clamp_s32}};
    bool clamp = take(r, "clamp");
    if (!clamp && !take(r, "wrap")) return refuse(r, "%s needs .clamp or .wrap", r->d->text);
    if (!strcmp(r->op, "bmsk")) return finish(r, clamp ? bmsk_clamp : bmsk_wrap, CLASS_INTEGER, "444");
    return finish(r, sz[clamp][r->kind == 's'], CLASS_INTEGER, "444");
}

static Decoded decode_field(Reader *r) {
    static const Exec bfe[2][2] = {{bfe_u32, bfe_s32}, {bfe_u64, bfe_s64}};
    bool wide = r->bytes == 8;
    if (r->bytes < 4) return refuse(r, "%s has no such type", r->d->text);
    if (!strcmp(r->op, "bfe"))
        return finish(r, bfe[wide][r->kind == 's'], CLASS_INTEGER, wide ? "8844" : "4444");
    return finish(r, wide ? bfi_64 : bfi_32, CLASS_INTEGER, wide ? "88844" : "44444");
}

Decoded decode_bits(Reader *r) {
    if (!strcmp(r->op, "prmt")) return decode_permute(r);
    if (!r->kind || r->kind == 'f' || r->kind == 'h' || r->packed > 1) return NOT_MINE;
    int size = r->bytes == 2 ? 0 : r->bytes == 4 ? 1 : r->bytes == 8 ? 2 : -1;
    if (size < 0) return NOT_MINE;
    for (size_t i = 0; i < sizeof plain / sizeof *plain; i++) {
        if (strcmp(plain[i].name, r->op)) continue;
        char c = letter(r), signature[] = {c, c, plain[i].has_b ? c : 0, 0};
        return finish(r, plain[i].exec[size], CLASS_INTEGER, signature);
    }
    bool wide = size == 2;
    if (!strcmp(r->op, "shl") || !strcmp(r->op, "shr")) return decode_shift(r, size);
    if (!strcmp(r->op, "bfind")) return decode_find(r);
    if (!strcmp(r->op, "bfe") || !strcmp(r->op, "bfi")) return decode_field(r);
    if (!strcmp(r->op, "brev") && size)
        return finish(r, wide ? brev_64 : brev_32, CLASS_INTEGER, wide ? "88" : "44");
    if (!strcmp(r->op, "popc") && size)
        return finish(r, wide ? popc_64 : popc_32, CLASS_INTEGER, wide ? "48" : "44");
    if (!strcmp(r->op, "clz") && size)
        return finish(r, wide ? clz_64 : clz_32, CLASS_INTEGER, wide ? "48" : "44");
    if (size != 1) return NOT_MINE;
    if (!strcmp(r->op, "lop3")) return decode_lop3(r);
    if (!strcmp(r->op, "shf")) return decode_funnel(r);
    if (!strcmp(r->op, "fns")) return finish(r, fns, CLASS_INTEGER, "4444");
    if (!strcmp(r->op, "szext") || !strcmp(r->op, "bmsk")) return decode_extend(r);
    return NOT_MINE;
}

/* ---------------------------------------------------------------- carry
 * add.cc, addc, sub.cc, subc, mad.cc, madc.
 * u[0]: bit 0 takes the carry in, 1 writes it, 2 subtracts (the carry is a borrow), 3 multiplies, 4 its high
 * half, 5 of signed numbers. Warp.carry holds CC.CF of the lanes. */
enum { CARRY_IN = 1, CARRY_OUT = 2, SUBTRACTS = 4, MULTIPLIES = 8, HIGH_HALF = 16, SIGNED_PRODUCT = 32 };
static uint64_t product(uint64_t a, uint64_t b, uint64_t how, int bits) {
    if (!(how & HIGH_HALF)) return a * b;
    if (bits == 32)
        return how & SIGNED_PRODUCT ? (uint64_t)((int64_t)(int32_t)a * (int32_t)b) >> 32
                                    : (uint64_t)(uint32_t)a * (uint32_t)b >> 32;
    return how & SIGNED_PRODUCT ? (uint64_t)(((__int128)(int64_t)a * (int64_t)b) >> 64)
                                : (uint64_t)(((unsigned __int128)a * b) >> 64);
}

static Status exec_carry(Warp *w, const Instr *in, uint32_t mask) {
    uint64_t how = in->u[0];
    int bits = (int)in->u[1];
    FOR_LANES(mask, i) {
        uint64_t a = lane_value(w, in, &in->args[1], (int)i) & ones((uint32_t)bits);
        uint64_t b = lane_value(w, in, &in->args[2], (int)i) & ones((uint32_t)bits);
        uint64_t carry = how & CARRY_IN ? w->carry >> i & 1 : 0;
        if (how & MULTIPLIES) {
            a = product(a, b, how, bits) & ones((uint32_t)bits);
            b = lane_value(w, in, &in->args[3], (int)i) & ones((uint32_t)bits);
        }
        unsigned __int128 wide = a, value = how & SUBTRACTS ? wide - b - carry : wide + b + carry;
        set_lane(w, &in->args[0], (int)i, (uint64_t)value & ones((uint32_t)bits));
        if (how & CARRY_OUT) w->carry = (w->carry & ~lane_bit[i]) | (value >> bits & 1 ? lane_bit[i] : 0);
    }
    return NEXT;
}

Decoded decode_carry(Reader *r) {
    static const struct { const char *name; uint64_t how; } ops[] = {
        {"add", 0}, {"sub", SUBTRACTS}, {"mad", MULTIPLIES},
        {"addc", CARRY_IN}, {"subc", CARRY_IN | SUBTRACTS}, {"madc", CARRY_IN | MULTIPLIES},
    };
    if ((r->kind != 'u' && r->kind != 's') || r->bytes < 4 || r->packed > 1) return NOT_MINE;
    for (size_t i = 0; i < sizeof ops / sizeof *ops; i++) {
        if (strcmp(ops[i].name, r->op)) continue;
        uint64_t how = ops[i].how | (r->kind == 's' ? SIGNED_PRODUCT : 0);
        if (take(r, "cc")) how |= CARRY_OUT;
        else if (!(how & CARRY_IN)) return NOT_MINE;
        if (how & MULTIPLIES) {
            if (take(r, "hi")) how |= HIGH_HALF;
            else if (!take(r, "lo")) return refuse(r, "%s needs .lo or .hi", r->d->text);
        }
        r->in->u[0] = how;
        r->in->u[1] = 8 * (uint64_t)r->bytes;
        char c = letter(r), signature[] = {c, c, c, how & MULTIPLIES ? c : 0, 0};
        return finish(r, exec_carry, CLASS_INTEGER, signature);
    }
    return NOT_MINE;
}
