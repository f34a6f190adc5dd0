/* Arithmetic: reading modifiers, checking operands, moves and predicate logic. The other alu_*.c hold
 * the rest, by the kind of number. */
#include "alu.h"

#include <fenv.h>
#include <stdarg.h>

const uint32_t lane_bit[LANES] = {
    1u << 0,  1u << 1,  1u << 2,  1u << 3,  1u << 4,  1u << 5,  1u << 6,  1u << 7,
    1u << 8,  1u << 9,  1u << 10, 1u << 11, 1u << 12, 1u << 13, 1u << 14, 1u << 15,
    1u << 16, 1u << 17, 1u << 18, 1u << 19, 1u << 20, 1u << 21, 1u << 22, 1u << 23,
    1u << 24, 1u << 25, 1u << 26, 1u << 27, 1u << 28, 1u << 29, 1u << 30, 1u << 31,
};

/* ---------------------------------------------------------------- decoding */
Reader reader_new(Decode *d, char *why, size_t size) {
    Reader r = {.d = d, .in = d->in, .why = why, .size = size, .used = 1, .op = d->part[0], .packed = 1};
    if (d->n < 2) return r;
    const char *last = d->part[d->n - 1];
    size_t length = strlen(last);
    r.used |= 1u << (d->n - 1);
    if (length > 3 && !strcmp(last + length - 2, "x2")) {
        r.packed = 2;
        length -= 2;
    }
    if (length < sizeof r.type) memcpy(r.type, last, length);
    if (!ptx_type(r.type, &r.bytes, &r.kind)) r.bytes = 0, r.kind = 0;
    return r;
}

bool take(Reader *r, const char *modifier) {
    for (int i = 1; i < r->d->n; i++)
        if (!(r->used >> i & 1) && !strcmp(r->d->part[i], modifier)) {
            r->used |= 1u << i;
            return true;
        }
    return false;
}

int take_one(Reader *r, const char *const *names, int n) {
    for (int i = 0; i < n; i++)
        if (take(r, names[i])) return i;
    return -1;
}

int take_rounding(Reader *r) {
    static const char *const names[] = {"rn", "rz", "rm", "rp"};
    return take_one(r, names, 4);
}

Decoded refuse(Reader *r, const char *format, ...) {
    va_list list;
    va_start(list, format);
    vsnprintf(r->why, r->size, format, list);
    va_end(list);
    return REFUSED;
}

char letter(const Reader *r) {
    int bytes = r->bytes * r->packed;
    return bytes == 16 ? 'q' : bytes == 8 ? '8' : bytes == 4 ? '4' : '2';
}

static bool fits(const Operand *o, char want, bool destination) {
    if (o->kind == OPERAND_SINK) return destination;
    if (o->kind == OPERAND_IMMEDIATE) return !destination && want != 'q';
    if (o->kind != OPERAND_REGISTER) return false;
    switch (want) {
    case 'p': return o->width == 0;
    case '2': return o->width == 1 || o->width == 2;
    case '4': return o->width == 4;
    case '8': return o->width == 8;
    case 'q': return o->width == 16;
    default: return o->width && o->width <= 8;
    }
}

Decoded finish(Reader *r, Exec exec, InstrClass class_, const char *signature) {
    for (int i = 1; i < r->d->n; i++)
        if (!(r->used >> i & 1)) return refuse(r, "modifier .%s of %s is not modelled", r->d->part[i], r->op);
    Instr *in = r->in;
    if (in->n != strlen(signature))
        return refuse(r, "%s takes %zu operands, not %u", in->name, strlen(signature), in->n);
    for (int i = 0; i < in->n; i++)
        if (!fits(&in->args[i], signature[i], i == 0))
            return refuse(r, "operand %d of %s has another kind or width than its type", i + 1, in->name);
    in->exec = exec;
    in->class_ = (uint8_t)class_;
    return DECODED;
}

/* Loads and stores of registers cannot move across the opaque calls, so the arithmetic between them runs
 * in the rounding mode that was set. */
static Status exec_rounded(Warp *w, const Instr *in, uint32_t mask) {
    Exec exec = (Exec)(uintptr_t)in->u[3];
    fesetround((int)in->u[2]);
    Status status = exec(w, in, mask);
    fesetround(FE_TONEAREST);
    return status;
}

void wrap_rounding(Instr *in, int rounding) {
    if (rounding <= ROUND_NEAREST) return;
    static const int modes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
    in->u[2] = (uint64_t)modes[rounding];
    in->u[3] = (uint64_t)(uintptr_t)in->exec;
    in->exec = exec_rounded;
}

Decoded decode_alu(Decode *d, char *why, size_t n) {
    static Decoded (*const decoders[])(Reader *) = {
        decode_move, decode_float, decode_approx, decode_integer, decode_bits, decode_compare,
        decode_minmax, decode_double, decode_half, decode_carry,
    };
    for (size_t i = 0; i < sizeof decoders / sizeof *decoders; i++) {
        Reader reader = reader_new(d, why, n);
        Decoded decoded = decoders[i](&reader);
        if (decoded != NOT_MINE) return decoded;
    }
    return NOT_MINE;
}

/* ---------------------------------------------------------------- mov */
/* Compilers move and pack registers that hold nothing. Moves therefore keep a register undefined instead of
 * reporting it. A register is defined or not as a whole: one that is packed from several parts counts as
 * undefined only if all parts are, and the parts taken out of a register are what it is. */
#define MOVE(NAME, D, A, ...)                                                               \
    static Status NAME(Warp *w, const Instr *in, uint32_t mask) {                           \
        uint32_t defined = defined_lanes(w, in, &in->args[1], mask);                        \
        const uint##A##_t *pa = lanes_of_source(w, &in->args[1], A == 64);                  \
        uint##D##_t *d = dst##D(w, &in->args[0], mask);                                     \
        EACH_LANE(mask, uint##A##_t a = pa[i]; d[i] = (uint##D##_t)(__VA_ARGS__));          \
        if (defined != mask) set_defined(w, &in->args[0], mask, defined);                   \
        return NEXT;                                                                        \
    }
MOVE(mov16, 32, 32, (uint16_t)a)
MOVE(mov32, 32, 32, a)
MOVE(mov64, 64, 64, a)
MOVE(mov64_from32, 64, 32, a) /* addresses of shared variables in a 64-bit register */
MOVE(mov32_from64, 32, 64, a)

static Status mov128(Warp *w, const Instr *in, uint32_t mask) {
    uint32_t defined = defined_lanes(w, in, &in->args[1], mask);
    const uint8_t *from = w->registers + in->args[1].offset;
    uint8_t *to = (uint8_t *)dst64(w, &in->args[0], mask);
    if (in->args[0].kind == OPERAND_REGISTER) FOR_LANES(mask, i) memmove(to + 16 * i, from + 16 * i, 16);
    set_defined(w, &in->args[0], mask, defined);
    return NEXT;
}

static Status mov_pred(Warp *w, const Instr *in, uint32_t mask) {
    const Operand *from = &in->args[1];
    uint32_t defined = defined_lanes(w, in, from, mask), p;
    if (defined == mask) p = src_pred(w, in, from, mask);
    else p = *(const uint32_t *)(w->registers + from->offset) ^ (from->negate ? FULL_MASK : 0);
    set_pred(w, &in->args[0], mask, p);
    set_defined(w, &in->args[0], mask, defined);
    return NEXT;
}

/* mov.b64 d, {a, b} and back, with 32-bit parts: by far the most frequent ones. */
static Status pack64(Warp *w, const Instr *in, uint32_t mask) {
    const Operand *parts = in->args[1].parts;
    uint32_t defined = defined_lanes(w, in, &parts[0], mask) | defined_lanes(w, in, &parts[1], mask);
    const uint32_t *a = lanes_of_source(w, &parts[0], false), *b = lanes_of_source(w, &parts[1], false);
    uint64_t *d = dst64(w, &in->args[0], mask);
    EACH_LANE(mask, d[i] = a[i] | (uint64_t)b[i] << 32);
    if (defined != mask) set_defined(w, &in->args[0], mask, defined);
    return NEXT;
}

static Status unpack64(Warp *w, const Instr *in, uint32_t mask) {
    const Operand *parts = in->args[0].parts;
    uint32_t defined = defined_lanes(w, in, &in->args[1], mask);
    const uint64_t *a = lanes_of_source(w, &in->args[1], true);
    for (int part = 0; part < 2; part++) {
        if (parts[part].kind == OPERAND_SINK) continue;
        int shift = 32 * part;
        uint32_t *d = dst32(w, &parts[part], mask);
        EACH_LANE(mask, d[i] = (uint32_t)(a[i] >> shift));
        if (defined != mask) set_defined(w, &parts[part], mask, defined);
    }
    return NEXT;
}

static const uint8_t *lane_bytes(const Warp *w, const Operand *o, size_t *stride) {
    *stride = o->kind == OPERAND_IMMEDIATE || o->width == 8 ? 8 : o->width == 16 ? 16 : 4;
    return lanes_of_source(w, o, true);
}

/* Any other vector: u[0] bytes of a part. */
static Status pack_any(Warp *w, const Instr *in, uint32_t mask) {
    const Operand *vector = &in->args[1], *to = &in->args[0];
    size_t bytes = in->u[0], stride = to->width == 16 ? 16 : to->width == 8 ? 8 : 4, from_stride;
    const uint8_t *from[16];
    size_t strides[16];
    uint32_t defined = 0;
    for (int p = 0; p < vector->count; p++) {
        defined |= defined_lanes(w, in, &vector->parts[p], mask);
        from[p] = lane_bytes(w, &vector->parts[p], &from_stride);
        strides[p] = from_stride;
    }
    set_defined(w, to, mask, defined);
    uint8_t *d = w->registers + to->offset;
    FOR_LANES(mask, i) {
        uint8_t value[16] = {0};
        for (int p = 0; p < vector->count; p++)
            memcpy(value + (size_t)p * bytes, from[p] + i * strides[p], bytes);
        memcpy(d + i * stride, value, stride);
    }
    return NEXT;
}

static Status unpack_any(Warp *w, const Instr *in, uint32_t mask) {
    const Operand *vector = &in->args[0];
    size_t bytes = in->u[0], stride;
    uint32_t defined = defined_lanes(w, in, &in->args[1], mask);
    const uint8_t *from = lane_bytes(w, &in->args[1], &stride);
    for (int p = 0; p < vector->count; p++) {
        FOR_LANES(mask, i) {
            uint64_t value = 0;
            memcpy(&value, from + i * stride + (size_t)p * bytes, bytes);
            set_lane(w, &vector->parts[p], (int)i, value);
        }
        set_defined(w, &vector->parts[p], mask, defined);
    }
    return NEXT;
}

/* Parts of a vector are registers of `bytes` each (also wider ones for bytes), immediates or `_`. */
static bool parts_fit(const Operand *vector, int bytes, bool destination) {
    for (int p = 0; p < vector->count; p++) {
        const Operand *o = &vector->parts[p];
        if (o->kind == OPERAND_REGISTER && (o->width == bytes || (bytes == 1 && o->width && o->width <= 4)))
            continue;
        if (o->kind == (destination ? OPERAND_SINK : OPERAND_IMMEDIATE)) continue;
        return false;
    }
    return true;
}

static Decoded decode_vector_move(Reader *r) {
    Instr *in = r->in;
    bool packs = in->args[1].kind == OPERAND_VECTOR;
    const Operand *vector = &in->args[packs], *scalar = &in->args[!packs];
    int bytes = vector->count ? r->bytes / vector->count : 0;
    bool constant = scalar->kind == OPERAND_IMMEDIATE && !packs && r->bytes <= 8;
    bool scalar_fits = scalar->kind == OPERAND_REGISTER ? scalar->width == r->bytes : constant;
    if (r->used != (1u << r->d->n) - 1 || !scalar_fits || bytes * vector->count != r->bytes ||
        !parts_fit(vector, bytes, !packs))
        return refuse(r, "this form of %s is not modelled", in->name);
    in->class_ = CLASS_MOVE;
    in->u[0] = (uint64_t)bytes;
    if (r->bytes == 8 && bytes == 4) in->exec = packs ? pack64 : unpack64;
    else in->exec = packs ? pack_any : unpack_any;
    return DECODED;
}

static Decoded decode_mov(Reader *r) {
    Instr *in = r->in;
    if (!strcmp(r->type, "pred")) return finish(r, mov_pred, CLASS_PREDICATE, "pp");
    if (!r->bytes || r->packed > 1)
        return refuse(r, "type .%s of mov is not modelled", r->d->part[r->d->n - 1]);
    if (in->n == 2 && (in->args[0].kind == OPERAND_VECTOR || in->args[1].kind == OPERAND_VECTOR))
        return decode_vector_move(r);
    if (in->n != 2 || in->args[1].kind == OPERAND_LABEL)
        return refuse(r, "this form of mov (a label or a function's address?) is not modelled");
    int from = in->args[1].kind == OPERAND_REGISTER ? in->args[1].width : r->bytes;
    switch (r->bytes) {
    case 1: case 2: return finish(r, mov16, CLASS_MOVE, "2w");
    case 4: return finish(r, from == 8 ? mov32_from64 : mov32, CLASS_MOVE, from == 8 ? "48" : "44");
    case 8: return finish(r, from == 4 ? mov64_from32 : mov64, CLASS_MOVE, from == 4 ? "84" : "88");
    default: return finish(r, mov128, CLASS_MOVE, "qq");
    }
}

/* ---------------------------------------------------------------- logic of predicates */
enum { LOGIC_AND, LOGIC_OR, LOGIC_XOR, LOGIC_NOT };
static Status exec_logic(Warp *w, const Instr *in, uint32_t mask) {
    uint32_t a = src_pred(w, in, &in->args[1], mask);
    if (in->u[0] == LOGIC_NOT) {
        set_pred(w, &in->args[0], mask, ~a);
        return NEXT;
    }
    uint32_t b = src_pred(w, in, &in->args[2], mask);
    set_pred(w, &in->args[0], mask, in->u[0] == LOGIC_AND ? a & b : in->u[0] == LOGIC_OR ? a | b : a ^ b);
    return NEXT;
}

Decoded decode_move(Reader *r) {
    static const char *const logic[] = {"and", "or", "xor", "not"};
    if (!strcmp(r->op, "mov")) return decode_mov(r);
    if (strcmp(r->type, "pred")) return NOT_MINE;
    for (int i = 0; i < 4; i++)
        if (!strcmp(r->op, logic[i])) {
            r->in->u[0] = (uint64_t)i;
            return finish(r, exec_logic, CLASS_PREDICATE, i == LOGIC_NOT ? "pp" : "ppp");
        }
    return NOT_MINE;
}
