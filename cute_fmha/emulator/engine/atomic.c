/* Atomics and reductions in memory, and the asynchronous stores and reductions that report to an
 * mbarrier (st.async, red.async). The lanes of a warp take their turns in order. */
#include "memory.h"
#include <math.h>

/* ---------------------------------------------------------------- reductions of elements */
RedOp red_op(const char *name) {
    static const char *const names[] = {"",    "add", "min", "max", "inc", "dec",
                                        "and", "or",  "xor", "exch", "cas"};
    for (int i = 1; i <= RED_CAS; i++) if (!strcmp(name, names[i])) return (RedOp)i;
    return RED_NONE;
}

bool reduction_allowed(const Reduction *r) {
    bool whole = r->kind == 'u' || r->kind == 's';
    switch (r->op) {
    case RED_ADD: return r->kind == 'f' || r->kind == 'h' || (whole && r->bytes >= 4);
    case RED_MIN: case RED_MAX:
        return ((r->kind == 'f' || r->kind == 'h') && r->bytes == 2) || (whole && r->bytes >= 4);
    case RED_INC: case RED_DEC: return r->kind == 'u' && r->bytes == 4;
    case RED_AND: case RED_OR: case RED_XOR:
        return (r->kind == 'b' || r->kind == 'u') && r->bytes >= 4 && r->bytes <= 8;
    case RED_EXCH: return r->bytes >= 4;
    case RED_CAS: return r->kind != 'f' && r->kind != 'h' && r->bytes >= 2;
    default: return false;
    }
}

static float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }

static float smaller_or_larger(float a, float b, bool smaller) {
    if (isnan(a)) return b;
    if (isnan(b)) return a;
    if (a == b) return (signbit(a) != 0) == smaller ? a : b; /* -0 is below +0 */
    return (a < b) == smaller ? a : b;
}

static void reduce_half(const Reduction *r, void *memory, const void *value) {
    uint16_t a, b, out;
    memcpy(&a, memory, 2);
    memcpy(&b, value, 2);
    bool half = r->kind == 'f';
    float x = half ? half_to_float(a) : bfloat_to_float(a), y = half ? half_to_float(b) : bfloat_to_float(b);
    float z = r->op == RED_ADD ? x + y : smaller_or_larger(x, y, r->op == RED_MIN);
    out = isnan(z) ? 0x7fff : half ? float_to_half(z) : float_to_bfloat(z);
    memcpy(memory, &out, 2);
}

static void reduce_float(const Reduction *r, void *memory, const void *value) {
    if (r->bytes == 2) {
        reduce_half(r, memory, value);
    } else if (r->bytes == 4) {
        float a, b;
        memcpy(&a, memory, 4);
        memcpy(&b, value, 4);
        float sum = r->flush ? flushed(flushed(a) + flushed(b)) : a + b;
        if (isnan(sum)) sum = as_float(0x7fffffffu);
        memcpy(memory, &sum, 4);
    } else {
        double a, b;
        memcpy(&a, memory, 8);
        memcpy(&b, value, 8);
        a += b;
        memcpy(memory, &a, 8);
    }
}

static uint64_t reduce_whole(const Reduction *r, uint64_t a, uint64_t b) {
    uint32_t shift = 64u - 8u * r->bytes;
    int64_t sa = (int64_t)(a << shift) >> shift, sb = (int64_t)(b << shift) >> shift;
    bool less = r->kind == 's' ? sa < sb : a < b;
    switch (r->op) {
    case RED_ADD: return a + b;
    case RED_MIN: return less ? a : b;
    case RED_MAX: return less ? b : a;
    case RED_INC: return a >= b ? 0 : a + 1;
    case RED_DEC: return a == 0 || a > b ? b : a - 1;
    case RED_AND: return a & b;
    case RED_OR: return a | b;
    case RED_XOR: return a ^ b;
    default: return b;
    }
}

void reduce(const Reduction *r, void *memory, const void *value, size_t elements) {
    uint8_t *m = memory;
    const uint8_t *v = value;
    for (size_t i = 0; i < elements; i++, m += r->bytes, v += r->bytes) {
        if (r->op == RED_EXCH) {
            memcpy(m, v, r->bytes);
        } else if (r->kind == 'f' || r->kind == 'h') {
            reduce_float(r, m, v);
        } else {
            uint64_t a = 0, b = 0;
            memcpy(&a, m, r->bytes);
            memcpy(&b, v, r->bytes);
            a = reduce_whole(r, a, b);
            memcpy(m, &a, r->bytes);
        }
    }
}

/* ---------------------------------------------------------------- atom, red */
typedef struct {
    Reduction r;
    uint8_t space, parts, packed, size; /* operands of a vector; elements in each; bytes of all */
    bool acquire, release, result;
} Atomic;

/* The bytes of a lane's source, whose parts hold `each` bytes. */
static void gather_source(Warp *w, const Instr *in, const Operand *o, uint32_t parts, uint32_t each,
                          uint32_t lane, uint8_t *out) {
    for (uint32_t e = 0; e < parts; e++) {
        const Operand *part = o->kind == OPERAND_VECTOR ? &o->parts[e] : o;
        uint32_t stride;
        const uint8_t *from = source_lanes(w, in, part, 1u << lane, &stride);
        memcpy(out + e * each, from + (size_t)lane * stride, each);
    }
}

static void set_result(Warp *w, const Operand *o, uint32_t parts, uint32_t each, uint32_t lane,
                       const uint8_t *from) {
    for (uint32_t e = 0; e < parts; e++) {
        const Operand *part = o->kind == OPERAND_VECTOR ? &o->parts[e] : o;
        if (part->kind != OPERAND_REGISTER) continue;
        if (each == 16) {
            memcpy(w->registers + part->offset + 16 * lane, from + e * each, 16);
            w->defined[part->index] |= 1u << lane;
            continue;
        }
        uint64_t v = 0;
        memcpy(&v, from + e * each, each);
        set_lane(w, part, (int)lane, v);
    }
}

static Status exec_atomic(Warp *w, const Instr *in, uint32_t mask) {
    const Atomic *a = in->data;
    uint64_t address[LANES];
    uint32_t each = a->size / a->parts;
    Counters *c = &w->machine->counters;
    lane_addresses(w, in, &in->args[a->result], mask, address);
    FOR_LANES(mask, l) {
        Place p;
        uint8_t value[32] = {0}, swap[32] = {0}, old[32];
        if (!aligned_to(w, in, address[l], a->size, "address")) return FATAL;
        if (!locate(w, in, (Space)a->space, address[l], a->size, (int)l, true, &p)) return FATAL;
        if (p.space == SPACE_LOCAL) return fail(w, in, FINDING_OTHER, "an atomic on local memory");
        access_atomic(&w->agent, p.space, p.cta, p.at, a->size, true, a->acquire, a->release, in);
        gather_source(w, in, &in->args[a->result + 1], a->parts, each, l, value);
        memcpy(old, p.host, a->size);
        Reduction r = a->r;
        r.flush = r.bytes == 4 && r.kind == 'f' && p.space == SPACE_GLOBAL;
        if (r.op == RED_CAS) {
            gather_source(w, in, &in->args[a->result + 2], a->parts, each, l, swap);
            if (!memcmp(old, value, a->size)) memcpy(p.host, swap, a->size);
        } else {
            reduce(&r, p.host, value, (size_t)a->parts * a->packed);
        }
        if (a->result) set_result(w, &in->args[0], a->parts, each, l, old);
        uint64_t *read = p.space == SPACE_SHARED ? &c->shared_read_bytes : &c->global_read_bytes;
        uint64_t *write = p.space == SPACE_SHARED ? &c->shared_write_bytes : &c->global_write_bytes;
        *read += a->size;
        *write += a->size;
    }
    return NEXT;
}

static bool element_type(const char *name, Reduction *r, uint8_t *packed) {
    int bytes;
    *packed = 1;
    r->kind = 0;
    if (!strcmp(name, "f16x2") || !strcmp(name, "bf16x2")) {
        *packed = 2, r->bytes = 2, r->kind = name[0] == 'b' ? 'h' : 'f';
        return true;
    }
    if (!strcmp(name, "bf16")) { r->bytes = 2, r->kind = 'h'; return true; }
    if (!ptx_type(name, &bytes, &r->kind)) return false;
    r->bytes = (uint8_t)bytes;
    return true;
}

/* Modifiers of atom and red from part `from` on. */
static bool decode_modifiers(Decode *d, Atomic *a, char *why, size_t n) {
    bool typed = false, noftz = false;
    Space space = SPACE_GENERIC;
    a->parts = 1;
    for (int i = 1; i < d->n; i++) {
        const char *p = d->part[i];
        if (space_modifier(p, &space) || scope_modifier(p) || !strcmp(p, "relaxed")) continue;
        if (!strcmp(p, "L2::cache_hint")) continue;
        if (!strcmp(p, "acquire")) a->acquire = true;
        else if (!strcmp(p, "release")) a->release = true;
        else if (!strcmp(p, "acq_rel")) a->acquire = a->release = true;
        else if (!strcmp(p, "noftz")) noftz = true;
        else if (!strcmp(p, "v2")) a->parts = 2;
        else if (!strcmp(p, "v4")) a->parts = 4;
        else if (!strcmp(p, "v8")) a->parts = 8;
        else if (!a->r.op && red_op(p)) a->r.op = (uint8_t)red_op(p);
        else if (!typed && element_type(p, &a->r, &a->packed)) typed = true;
        else { deny(why, n, "the modifier .%s is not modelled", p); return false; }
    }
    d->in->scope = (uint8_t)scope_of(d);
    d->program->relaxed_memory |= !a->acquire && !a->release;
    a->space = (uint8_t)space;
    uint32_t size = (uint32_t)a->parts * a->packed * a->r.bytes;
    a->size = (uint8_t)size;
    bool half = a->r.bytes == 2 && (a->r.kind == 'f' || a->r.kind == 'h');
    bool vector_ok = a->parts == 1 || (size <= 16 && (half || (a->r.kind == 'f' && a->r.bytes == 4)));
    if (!typed || !reduction_allowed(&a->r) || !vector_ok || noftz != half || space == SPACE_LOCAL
        || space == SPACE_PARAM || space == SPACE_CONST) {
        deny(why, n, "no such operation: %s", d->text);
        return false;
    }
    return true;
}

static bool register_width_fits(const Operand *o, uint32_t bytes) {
    return bytes != 16 || o->kind != OPERAND_REGISTER || o->width == 16;
}

static Decoded decode_atom(Decode *d, bool result, char *why, size_t n) {
    Instr *in = d->in;
    Atomic a = {.result = result};
    if (!decode_modifiers(d, &a, why, n)) return REFUSED;
    int wanted = result + 2 + (a.r.op == RED_CAS) + has(d, "L2::cache_hint");
    if (in->n != wanted || in->args[result].kind != OPERAND_ADDRESS || (!result && a.r.op >= RED_EXCH))
        return deny(why, n, "operands that %s does not take", d->text);
    for (int i = 0; i < wanted - has(d, "L2::cache_hint"); i++) {
        const Operand *o = &in->args[i];
        if (i == result) continue;
        if ((o->kind == OPERAND_VECTOR ? o->count : 1) != a.parts && o->kind != OPERAND_SINK)
            return deny(why, n, "a vector of another size than %s takes", d->text);
        if (!register_width_fits(o, a.size)) return deny(why, n, "a register that is not 128 bits");
    }
    in->data = arena(d->program, sizeof a);
    memcpy(in->data, &a, sizeof a);
    in->exec = exec_atomic;
    in->class_ = CLASS_ATOMIC;
    return DECODED;
}

/* ---------------------------------------------------------------- st.async, red.async */
typedef struct {
    int n;
    struct { Cta *cta, *bar_cta; uint32_t offset, bar; uint8_t value[16]; } lane[LANES];
} Remote;

/* Lands in a peer's shared memory in the generic proxy, then completes bytes on its barrier. */
static bool run_remote(Machine *m, AsyncOp *op) {
    const Atomic *a = op->in->data;
    Remote *remote = op->payload;
    for (int i = 0; i < remote->n && !m->fatal; i++) {
        Cta *cta = remote->lane[i].cta;
        uint32_t offset = remote->lane[i].offset;
        if (!cta_reachable(m, op, cta)) return true;
        if (a->r.op == RED_EXCH)
            access_shared(&op->agent, cta, offset, a->size, true, GENERIC_PROXY, op->in);
        else
            access_atomic(&op->agent, SPACE_SHARED, cta, offset, a->size, true, false, false, op->in);
        m->counters.shared_write_bytes += a->size;
        reduce(&a->r, cta->shared + offset, remote->lane[i].value, a->parts);
    }
    for (int i = 0; i < remote->n && !m->fatal;) { /* one release for neighbours on the same barrier */
        Cta *cta = remote->lane[i].bar_cta;
        uint32_t bar = remote->lane[i].bar, bytes = 0;
        for (; i < remote->n && remote->lane[i].bar_cta == cta && remote->lane[i].bar == bar; i++)
            bytes += a->size;
        if (!deliver_bytes(m, op, cta, bar, bytes)) return true;
    }
    return true;
}

static Status exec_remote(Warp *w, const Instr *in, uint32_t mask) {
    const Atomic *a = in->data;
    uint64_t address[LANES], bar[LANES];
    lane_addresses(w, in, &in->args[0], mask, address);
    lane_addresses(w, in, &in->args[2], mask, bar);
    AsyncOp *op = async_new(w, in, run_remote, sizeof(Remote), false);
    Remote *remote = op->payload;
    FOR_LANES(mask, l) {
        int i = remote->n++;
        if (!aligned_to(w, in, address[l], a->size, "address") || !aligned_to(w, in, bar[l], 8, "mbarrier"))
            return FATAL;
        remote->lane[i].cta = shared_target(w, in, (uint32_t)address[l], a->size, &remote->lane[i].offset);
        if (!remote->lane[i].cta) return FATAL;
        remote->lane[i].bar_cta = shared_target(w, in, (uint32_t)bar[l], 8, &remote->lane[i].bar);
        if (!remote->lane[i].bar_cta) return FATAL;
        if (remote->lane[i].cta != remote->lane[i].bar_cta)
            return fail(w, in, FINDING_BARRIER, "the mbarrier lies in another CTA than the destination");
        gather_source(w, in, &in->args[1], a->parts, a->r.bytes, l, remote->lane[i].value);
    }
    copy_times(op, a->size * (double)remote->n, 3);
    async_submit(w->machine, op);
    return NEXT;
}

static Decoded decode_remote(Decode *d, bool store, char *why, size_t n) {
    Instr *in = d->in;
    Atomic a = {.parts = 1, .packed = 1, .r.op = store ? RED_EXCH : RED_NONE};
    bool typed = false, completes = false;
    for (int i = 2; i < d->n; i++) {
        const char *p = d->part[i];
        if (!strcmp(p, "shared::cluster") || (store && !strcmp(p, "weak"))) continue;
        if (!store && (!strcmp(p, "relaxed") || !strcmp(p, "cluster"))) continue;
        if (!strcmp(p, "mbarrier::complete_tx::bytes")) completes = true;
        else if (store && !strcmp(p, "v2")) a.parts = 2;
        else if (store && !strcmp(p, "v4")) a.parts = 4;
        else if (!store && !a.r.op && red_op(p) && red_op(p) < RED_EXCH) a.r.op = (uint8_t)red_op(p);
        else if (!typed && element_type(p, &a.r, &a.packed) && a.packed == 1) typed = true;
        else return deny(why, n, "the modifier .%s is not modelled", p);
    }
    a.size = (uint8_t)(a.parts * a.r.bytes);
    if (!typed || !completes || !reduction_allowed(&a.r) || a.r.bytes < 4 || a.size > 16 || in->n != 3
        || in->args[0].kind != OPERAND_ADDRESS || in->args[2].kind != OPERAND_ADDRESS
        || (in->args[1].kind == OPERAND_VECTOR ? in->args[1].count : 1) != a.parts)
        return deny(why, n, "no such operation: %s", d->text);
    in->data = arena(d->program, sizeof a);
    memcpy(in->data, &a, sizeof a);
    in->scope = SCOPE_CLUSTER;
    in->exec = exec_remote;
    in->class_ = store ? CLASS_SHARED : CLASS_ATOMIC;
    return DECODED;
}

Decoded decode_atomic(Decode *d, char *why, size_t n) {
    if (is(d, 0, "st") && is(d, 1, "async")) return decode_remote(d, true, why, n);
    if (is(d, 0, "red") && is(d, 1, "async")) return decode_remote(d, false, why, n);
    if (is(d, 0, "atom")) return decode_atom(d, true, why, n);
    if (is(d, 0, "red")) return decode_atom(d, false, why, n);
    return NOT_MINE;
}
