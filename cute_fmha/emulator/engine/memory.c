/* Loads and stores of every state space, and where addresses lead. Address arithmetic is in
 * address.c, atomics are in atomic.c, ldmatrix and its relatives in matrix.c; decode_memory() asks them
 * too. */
#include "memory.h"
#include "sync.h"
#include <stdarg.h>

typedef struct {
    uint8_t space, bytes, count, size; /* of an element; how many; bytes * count */
    char kind;
    bool atomic, acquire, release;     /* volatile, relaxed, acquire, release: no races among themselves */
    bool partly;                       /* a vector with parts that go nowhere, which are not read: */
    uint8_t parts;                     /* those that are */
} Access;

Decoded deny(char *why, size_t size, const char *format, ...) {
    va_list list;
    va_start(list, format);
    vsnprintf(why, size, format, list);
    va_end(list);
    return REFUSED;
}

/* ---------------------------------------------------------------- where addresses lead */
static bool is_param(const Machine *m, uint64_t address) {
    uint64_t start = (uint64_t)(uintptr_t)m->params;
    return m->params && address >= start && address < start + m->program->param_bytes;
}

Space space_of(const Warp *w, Space space, uint64_t address) {
    switch (space) {
    case SPACE_SHARED: case SPACE_SHARED_CLUSTER: return SPACE_SHARED;
    case SPACE_PARAM: case SPACE_LOCAL: return space;
    case SPACE_GENERIC: {
        uint64_t window = address >> 60;
        if (window == SHARED_WINDOW >> 60) return SPACE_SHARED;
        if (window == LOCAL_WINDOW >> 60) return SPACE_LOCAL;
        return is_param(w->machine, address) ? SPACE_PARAM : SPACE_GLOBAL;
    }
    default: return is_param(w->machine, address) ? SPACE_PARAM : SPACE_GLOBAL;
    }
}

static bool locate_local(Warp *w, const Instr *in, uint64_t address, uint32_t bytes, int lane, Place *place) {
    uint64_t at = address & (LOCAL_WINDOW - 1), have = w->program->local_bytes;
    if (at + bytes > have || !w->local) {
        fail(w, in, FINDING_BOUNDS, "local offset %llu, %u bytes, but a lane has %llu bytes of local memory",
             (unsigned long long)at, bytes, (unsigned long long)have);
        return false;
    }
    *place = (Place){SPACE_LOCAL, NULL, at, w->local + (size_t)lane * have + at};
    return true;
}

bool locate(Warp *w, const Instr *in, Space space, uint64_t address, uint32_t bytes, int lane, bool write,
            Place *place) {
    Machine *m = w->machine;
    switch (space_of(w, space, address)) {
    case SPACE_SHARED: {
        uint32_t offset;
        Cta *cta = shared_target(w, in, (uint32_t)address, bytes, &offset);
        if (!cta) return false;
        if (space == SPACE_SHARED && cta != w->cta) {
            fail(w, in, FINDING_BOUNDS, "address 0x%x is CTA %d's of the cluster, which needs .shared::cluster",
                 (uint32_t)address, cta->rank);
            return false;
        }
        if (space == SPACE_GENERIC && (address & (SHARED_WINDOW - 1)) >> 32) {
            fail(w, in, FINDING_BOUNDS, "generic address 0x%llx lies outside of the shared window",
                 (unsigned long long)address);
            return false;
        }
        *place = (Place){SPACE_SHARED, cta, offset, cta->shared + offset};
        return true;
    }
    case SPACE_LOCAL: return locate_local(w, in, address, bytes, lane, place);
    case SPACE_PARAM: {
        uint64_t start = (uint64_t)(uintptr_t)m->params;
        if (write || address < start || address + bytes > start + m->program->param_bytes) {
            fail(w, in, FINDING_BOUNDS, "%s of %u bytes at offset %lld of the %u parameter bytes",
                 write ? "a store" : "a load", bytes, (long long)(address - start), m->program->param_bytes);
            return false;
        }
        *place = (Place){SPACE_PARAM, NULL, address, (uint8_t *)(uintptr_t)address};
        return true;
    }
    default: {
        uint8_t *host = global_target(m, w, in, address, bytes, write);
        if (host) *place = (Place){SPACE_GLOBAL, NULL, address, host};
        return host != NULL;
    }
    }
}

void lane_addresses(Warp *w, const Instr *in, const Operand *o, uint32_t mask, uint64_t *out) {
    const Operand *base = o->kind == OPERAND_ADDRESS ? &o->parts[0] : o;
    uint64_t offset = o->kind == OPERAND_ADDRESS ? (uint64_t)o->immediate : 0;
    if (base->kind == OPERAND_IMMEDIATE) {
        for (int l = 0; l < LANES; l++) out[l] = (uint64_t)base->immediate + offset;
    } else if (base->width == 8) {
        const uint64_t *a = src64(w, in, base, mask);
        for (int l = 0; l < LANES; l++) out[l] = a[l] + offset;
    } else {
        const uint32_t *a = src32(w, in, base, mask);
        for (int l = 0; l < LANES; l++) out[l] = a[l] + (uint32_t)offset;
    }
}

bool aligned_to(Warp *w, const Instr *in, uint64_t address, uint32_t bytes, const char *what) {
    if (!(address & (bytes - 1))) return true;
    fail(w, in, FINDING_ALIGNMENT, "%s 0x%llx is not a multiple of %u", what, (unsigned long long)address,
         bytes);
    return false;
}

/* ---------------------------------------------------------------- records of accesses */
void run_flush(Run *r) {
    if (!r->bytes) return;
    Counters *c = &r->machine->counters;
    if (r->space == SPACE_SHARED) {
        access_shared(r->agent, r->cta, (uint32_t)r->at, r->bytes, r->write, r->proxy, r->in);
        *(r->write ? &c->shared_write_bytes : &c->shared_read_bytes) += r->bytes;
    } else if (r->space == SPACE_GLOBAL) {
        access_global(r->agent, r->at, r->bytes, r->write, r->proxy, r->in);
        *(r->write ? &c->global_write_bytes : &c->global_read_bytes) += r->bytes;
    }
    r->bytes = 0;
}

void run_add(Run *r, Space space, Cta *cta, uint64_t at, uint32_t bytes) {
    if (space != SPACE_SHARED && space != SPACE_GLOBAL) return;
    if (r->bytes && r->space == space && r->cta == cta) {
        if (at == r->at + r->bytes) { r->bytes += bytes; return; }
        if (!r->write && at >= r->at && at + bytes <= r->at + r->bytes) return; /* the same again */
    }
    run_flush(r);
    r->space = space, r->cta = cta, r->at = at, r->bytes = bytes;
}

static void record_atomic(Warp *w, const Instr *in, const Access *a, const Place *p, bool write) {
    if (p->space != SPACE_SHARED && p->space != SPACE_GLOBAL) return;
    access_atomic(&w->agent, p->space, p->cta, p->at, a->size, write, a->acquire, a->release, in);
    Counters *c = &w->machine->counters;
    if (p->space == SPACE_SHARED) *(write ? &c->shared_write_bytes : &c->shared_read_bytes) += a->size;
    else *(write ? &c->global_write_bytes : &c->global_read_bytes) += a->size;
}

/* Whether [address, +bytes) is plainly in one place; when in doubt, no. */
static bool plainly_inside(const Warp *w, Space space, uint64_t address, uint64_t bytes) {
    if (space == SPACE_SHARED) {
        uint64_t start = address & SHARED_OFFSET_MASK;
        return start + bytes <= w->cta->shared_bytes;
    }
    if (space != SPACE_GLOBAL) return false;
    const Region *last = w->machine->last_region;
    if (last && address >= last->address && address + bytes <= last->address + last->bytes) return true;
    for (int i = 0; i < w->machine->n_regions; i++) {
        const Region *r = &w->machine->regions[i];
        if (address >= r->address && address + bytes <= r->address + r->bytes) return true;
    }
    return false;
}

static void add_parts(Run *run, const Access *a, Space space, Cta *cta, uint64_t at) {
    for (uint32_t e = 0; e < a->count; e++)
        if (a->parts >> e & 1) run_add(run, space, cta, at + e * a->bytes, a->bytes);
}

/* The common case of scattered lanes: all of them in the CTA's own shared memory. */
static bool own_shared_lanes(Warp *w, const Instr *in, const Access *a, uint32_t mask, const uint64_t *address,
                             bool write, uint8_t **host) {
    Cta *cta = w->cta;
    uint32_t base = (uint32_t)cta->rank << SHARED_RANK_SHIFT, farthest = 0, nearest = UINT32_MAX;
    if (mask == FULL_MASK) {
        for (int l = 0; l < LANES; l++) {
            uint32_t offset = (uint32_t)address[l] - base;
            farthest = offset > farthest ? offset : farthest;
            nearest = offset < nearest ? offset : nearest;
        }
    } else {
        FOR_LANES(mask, l) {
            uint32_t offset = (uint32_t)address[l] - base;
            farthest = offset > farthest ? offset : farthest;
            nearest = offset < nearest ? offset : nearest;
        }
    }
    if (nearest < DYNAMIC_SHARED_START || (uint64_t)farthest + a->size > cta->shared_bytes) return false;
    Run run = {w->machine, &w->agent, in, write, GENERIC_PROXY, SPACE_SHARED, cta, 0, 0};
    FOR_LANES(mask, l) {
        uint32_t offset = (uint32_t)address[l] - base;
        host[l] = cta->shared + offset;
        run_add(&run, SPACE_SHARED, cta, offset, a->size);
    }
    run_flush(&run);
    return true;
}

typedef enum { SCATTERED, CONTIGUOUS, UNIFORM, UNREACHABLE } Shape;

/* The host address of every lane's bytes, checked and recorded. */
static Shape reach(Warp *w, const Instr *in, const Access *a, uint32_t mask, const uint64_t *address,
                   bool write, uint8_t **host) {
    uint32_t first = (uint32_t)__builtin_ctz(mask), size = a->size;
    uint64_t base = address[first], low = 0, differs = 0, gaps = 0;
    if (mask == FULL_MASK) {
        for (uint32_t l = 0; l < LANES; l++) {
            low |= address[l];
            differs |= address[l] ^ base;
            gaps |= address[l] ^ (base + (uint64_t)l * size);
        }
    } else {
        FOR_LANES(mask, l) { low |= address[l]; differs |= address[l] ^ base; }
        gaps = 1;
    }
    if (low & (size - 1u))
        FOR_LANES(mask, l) if (!aligned_to(w, in, address[l], size, "address")) return UNREACHABLE;
    Place p;
    if (!differs && (!write || !(mask & (mask - 1)))) {
        Space space = space_of(w, a->space, base);
        if (space != SPACE_LOCAL) {
            if (!locate(w, in, a->space, base, size, (int)first, write, &p)) return UNREACHABLE;
            if (a->atomic) {
                record_atomic(w, in, a, &p, write);
            } else {
                Run run = {w->machine, &w->agent, in, write, GENERIC_PROXY, p.space, p.cta, p.at, size};
                if (a->partly) run.bytes = 0, add_parts(&run, a, p.space, p.cta, p.at);
                run_flush(&run);
            }
            host[first] = p.host;
            return UNIFORM;
        }
    }
    if (!gaps && !a->atomic && !a->partly && plainly_inside(w, space_of(w, a->space, base), base, size * LANES)) {
        if (!locate(w, in, a->space, base, size * LANES, 0, write, &p)) return UNREACHABLE;
        Run run = {w->machine, &w->agent, in, write, GENERIC_PROXY, p.space, p.cta, p.at, size * LANES};
        run_flush(&run);
        for (uint32_t l = 0; l < LANES; l++) host[l] = p.host + (size_t)l * size;
        return CONTIGUOUS;
    }
    if ((a->space == SPACE_SHARED || a->space == SPACE_SHARED_CLUSTER) && !a->atomic && !a->partly
        && own_shared_lanes(w, in, a, mask, address, write, host)) return SCATTERED;
    Run run = {w->machine, &w->agent, in, write, GENERIC_PROXY, SPACE_PARAM, NULL, 0, 0};
    FOR_LANES(mask, l) {
        if (!locate(w, in, a->space, address[l], size, (int)l, write, &p)) return UNREACHABLE;
        host[l] = p.host;
        if (a->atomic) record_atomic(w, in, a, &p, write);
        else if (a->partly) add_parts(&run, a, p.space, p.cta, p.at);
        else run_add(&run, p.space, p.cta, p.at, size);
    }
    run_flush(&run);
    return SCATTERED;
}

/* ---------------------------------------------------------------- ld */
static uint64_t fetch(const uint8_t *from, const Access *a) {
    uint64_t v = 0;
    memcpy(&v, from, a->bytes);
    if (a->kind == 's' && a->bytes < 8) {
        uint32_t shift = 64u - 8u * a->bytes;
        v = (uint64_t)((int64_t)(v << shift) >> shift);
    }
    return v;
}

static void load_part(Warp *w, const Operand *o, uint32_t mask, uint8_t *const *host, uint32_t at,
                      const Access *a) {
    if (o->kind != OPERAND_REGISTER) return;
    uint8_t *to = w->registers + o->offset;
    if (a->bytes == 4 && o->width == 4) {
        if (mask == FULL_MASK) for (int l = 0; l < LANES; l++) memcpy(to + 4 * l, host[l] + at, 4);
        else FOR_LANES(mask, l) memcpy(to + 4 * l, host[l] + at, 4);
        w->defined[o->index] |= mask;
    } else if (a->bytes == 8 && o->width == 8) {
        FOR_LANES(mask, l) memcpy(to + 8 * l, host[l] + at, 8);
        w->defined[o->index] |= mask;
    } else if (a->bytes == 16) {
        FOR_LANES(mask, l) memcpy(to + 16 * l, host[l] + at, 16);
        w->defined[o->index] |= mask;
    } else {
        FOR_LANES(mask, l) set_lane(w, o, (int)l, fetch(host[l] + at, a));
    }
}

static void load_uniform(Warp *w, const Operand *o, uint32_t mask, const uint8_t *host, const Access *a) {
    if (o->kind != OPERAND_REGISTER) return;
    if (a->bytes == 16) {
        uint8_t *to = w->registers + o->offset;
        FOR_LANES(mask, l) memcpy(to + 16 * l, host, 16);
        w->defined[o->index] |= mask;
        return;
    }
    uint64_t v = fetch(host, a);
    if (mask == FULL_MASK && o->width == 4) {
        uint32_t *to = dst32(w, o, mask);
        for (int l = 0; l < LANES; l++) to[l] = (uint32_t)v;
    } else if (mask == FULL_MASK && o->width == 8) {
        uint64_t *to = dst64(w, o, mask);
        for (int l = 0; l < LANES; l++) to[l] = v;
    } else {
        FOR_LANES(mask, l) set_lane(w, o, (int)l, v);
    }
}

static Status exec_load(Warp *w, const Instr *in, uint32_t mask) {
    const Access *a = in->data;
    uint64_t address[LANES];
    uint8_t *host[LANES];
    lane_addresses(w, in, &in->args[1], mask, address);
    Shape shape = reach(w, in, a, mask, address, false, host);
    if (shape == UNREACHABLE) return FATAL;
    const Operand *to = &in->args[0];
    for (uint32_t e = 0; e < a->count; e++) {
        const Operand *part = to->kind == OPERAND_VECTOR ? &to->parts[e] : to;
        if (shape == UNIFORM) load_uniform(w, part, mask, host[__builtin_ctz(mask)] + e * a->bytes, a);
        else load_part(w, part, mask, host, e * a->bytes, a);
    }
    return NEXT;
}

/* ---------------------------------------------------------------- st */
/* Where the lanes' values of a source lie, and their distance. */
const uint8_t *source_lanes(Warp *w, const Instr *in, const Operand *o, uint32_t mask, uint32_t *stride) {
    if (o->kind == OPERAND_IMMEDIATE) { *stride = 8; return (const uint8_t *)o->broadcast64; }
    need(w, in, o, mask);
    *stride = o->width <= 4 ? 4u : o->width;
    return w->registers + o->offset;
}

static bool disagrees(const uint8_t *from, uint32_t stride, uint32_t bytes, uint32_t mask,
                      uint8_t *const *host, uint32_t at) {
    FOR_LANES(mask, l) if (memcmp(host[l] + at, from + (size_t)l * stride, bytes)) return true;
    return false;
}

static void store_part(const uint8_t *from, uint32_t stride, uint32_t bytes, uint32_t mask,
                       uint8_t *const *host, uint32_t at) {
    if (bytes == 4 && mask == FULL_MASK && stride == 4)
        for (int l = 0; l < LANES; l++) memcpy(host[l] + at, from + 4 * l, 4);
    else if (bytes == 4) FOR_LANES(mask, l) memcpy(host[l] + at, from + (size_t)l * stride, 4);
    else FOR_LANES(mask, l) memcpy(host[l] + at, from + (size_t)l * stride, bytes);
}

/* Whether two lanes may have written to the same place (a false alarm is possible, a miss is not). */
static bool may_collide(uint32_t mask, const uint64_t *address, uint32_t size) {
    uint64_t seen[4] = {0};
    uint32_t shift = (uint32_t)__builtin_ctz(size);
    FOR_LANES(mask, l) {
        uint32_t slot = (uint32_t)(address[l] >> shift) & 255;
        if (seen[slot >> 6] >> (slot & 63) & 1) return true;
        seen[slot >> 6] |= 1ull << (slot & 63);
    }
    return false;
}

/* A store is recorded before it happens, so that memory still holds what it would overwrite. */
struct StoreUnderWay { Warp *warp; const Instr *in; uint32_t mask; const uint64_t *address; };
const struct StoreUnderWay *store_under_way;

/* Byte i of what a lane stores. */
static uint8_t stored_byte(const struct StoreUnderWay *store, uint32_t lane, uint32_t i) {
    const Access *a = store->in->data;
    const Operand *from = &store->in->args[1];
    const Operand *part = from->kind == OPERAND_VECTOR ? &from->parts[i / a->bytes] : from;
    uint32_t stride;
    const uint8_t *lanes = source_lanes(store->warp, store->in, part, 1u << lane, &stride);
    return lanes[(size_t)lane * stride + i % a->bytes];
}

bool store_keeps_bytes(const Cta *cta, uint64_t at, uint32_t mask) {
    const struct StoreUnderWay *store = store_under_way;
    const Access *a = store->in->data;
    FOR_LANES(store->mask, l) {
        uint64_t start = store->address[l];
        if (cta) {
            const Cluster *cluster = store->warp->cta->cluster;
            uint32_t rank = (uint32_t)start >> SHARED_RANK_SHIFT;
            if (rank >= (uint32_t)cluster->n || cluster->cta[rank] != cta) continue;
            start &= SHARED_OFFSET_MASK;
        }
        for (uint32_t i = 0; i < a->size; i++) {
            uint64_t byte = start + i - at; /* in the cell */
            if (byte >= 16 || !(mask >> byte & 1)) continue;
            const uint8_t *now = cta ? cta->shared + start + i : (const uint8_t *)(uintptr_t)(start + i);
            if (stored_byte(store, l, i) != *now) return false;
        }
    }
    return true;
}

static Status exec_store(Warp *w, const Instr *in, uint32_t mask) {
    const Access *a = in->data;
    uint64_t address[LANES];
    uint8_t *host[LANES];
    lane_addresses(w, in, &in->args[0], mask, address);
    const struct StoreUnderWay store = {w, in, mask, address};
    if (!a->atomic) store_under_way = &store;
    Shape shape = reach(w, in, a, mask, address, true, host);
    store_under_way = NULL;
    if (shape == UNREACHABLE) return FATAL;
    const Operand *from = &in->args[1];
    const uint8_t *lanes[8];
    uint32_t stride[8];
    for (uint32_t e = 0; e < a->count; e++) {
        const Operand *part = from->kind == OPERAND_VECTOR ? &from->parts[e] : from;
        lanes[e] = source_lanes(w, in, part, mask, &stride[e]);
        store_part(lanes[e], stride[e], a->bytes, mask, host, e * a->bytes);
    }
    if (shape == SCATTERED && !a->atomic && w->machine->config.races && may_collide(mask, address, a->size))
        for (uint32_t e = 0; e < a->count; e++)
            if (disagrees(lanes[e], stride[e], a->bytes, mask, host, e * a->bytes)) {
                report(w->machine, FINDING_RACE, w, in, false,
                       "lanes of one warp store different values to the same address");
                break;
            }
    return NEXT;
}

/* st.bulk: zeros. */
static Status exec_store_bulk(Warp *w, const Instr *in, uint32_t mask) {
    FOR_LANES(mask, l) {
        uint64_t address = lane_address(w, in, &in->args[0], (int)l);
        uint64_t bytes = lane_value(w, in, &in->args[1], (int)l);
        Place p;
        if (!aligned_to(w, in, address, 8, "address") || !aligned_to(w, in, bytes, 8, "size")) return FATAL;
        if (bytes > SHARED_CAPACITY)
            return fail(w, in, FINDING_BOUNDS, "st.bulk of %llu bytes", (unsigned long long)bytes);
        if (!locate(w, in, (Space)in->u[0], address, (uint32_t)bytes, (int)l, true, &p)) return FATAL;
        if (p.space != SPACE_SHARED || p.cta != w->cta)
            return fail(w, in, FINDING_BOUNDS, "st.bulk writes the CTA's own shared memory alone");
        Run run = {w->machine, &w->agent, in, true, GENERIC_PROXY, p.space, p.cta, p.at, (uint32_t)bytes};
        run_flush(&run);
        memset(p.host, 0, bytes);
    }
    return NEXT;
}

/* ---------------------------------------------------------------- decoding of ld and st */
bool cache_modifier(const char *p) {
    static const char *const known[] = {
        "ca", "cg", "cs", "lu", "cv", "wb", "wt", "L1::evict_normal", "L1::evict_unchanged", "L1::evict_first",
        "L1::evict_last", "L1::no_allocate", "L2::evict_first", "L2::evict_last", "L2::evict_normal",
        "L2::cache_hint", "L2::64B", "L2::128B", "L2::256B"};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) if (!strcmp(p, known[i])) return true;
    return false;
}

bool space_modifier(const char *p, Space *space) {
    static const struct { const char *name; Space space; } spaces[] = {
        {"global", SPACE_GLOBAL}, {"shared", SPACE_SHARED}, {"shared::cta", SPACE_SHARED},
        {"shared::cluster", SPACE_SHARED_CLUSTER}, {"local", SPACE_LOCAL}, {"param", SPACE_PARAM},
        {"param::entry", SPACE_PARAM}, {"const", SPACE_CONST}};
    for (size_t i = 0; i < sizeof spaces / sizeof *spaces; i++)
        if (!strcmp(p, spaces[i].name)) { *space = spaces[i].space; return true; }
    return false;
}

bool scope_modifier(const char *p) {
    return !strcmp(p, "cta") || !strcmp(p, "cluster") || !strcmp(p, "gpu") || !strcmp(p, "sys");
}

InstrClass class_of(Space space) {
    switch (space) {
    case SPACE_SHARED: case SPACE_SHARED_CLUSTER: return CLASS_SHARED;
    case SPACE_LOCAL: return CLASS_LOCAL;
    case SPACE_PARAM: case SPACE_CONST: return CLASS_MOVE;
    default: return CLASS_GLOBAL;
    }
}

/* The modifiers of ld and st between the mnemonic and the type. False: one of them is unknown. */
static bool decode_access(Decode *d, int from, Access *a, char *why, size_t n) {
    Space space = SPACE_GENERIC;
    bool typed = false;
    a->count = 1;
    for (int i = from; i < d->n; i++) {
        const char *p = d->part[i];
        int bytes;
        if (space_modifier(p, &space) || scope_modifier(p) || cache_modifier(p)) continue;
        if (!strcmp(p, "weak") || !strcmp(p, "nc")) continue;
        if (!strcmp(p, "volatile") || !strcmp(p, "relaxed")) a->atomic = true;
        else if (!strcmp(p, "acquire")) a->atomic = a->acquire = true;
        else if (!strcmp(p, "release")) a->atomic = a->release = true;
        else if (!strcmp(p, "v2")) a->count = 2;
        else if (!strcmp(p, "v4")) a->count = 4;
        else if (!strcmp(p, "v8")) a->count = 8;
        else if (i == d->n - 1 && ptx_type(p, &bytes, &a->kind)) { a->bytes = (uint8_t)bytes; typed = true; }
        else { deny(why, n, "the modifier .%s is not modelled", p); return false; }
    }
    bool wide = a->bytes * a->count > 16; /* 256 bits: global memory alone */
    if (!typed || a->bytes == 0 || a->bytes * a->count > 32 || (a->bytes == 16 && a->count > 1)
        || (wide && space != SPACE_GLOBAL && space != SPACE_GENERIC)) {
        deny(why, n, "no such access: %s", d->text);
        return false;
    }
    if (a->atomic) d->in->scope = (uint8_t)scope_of(d);
    d->program->relaxed_memory |= a->atomic && !a->acquire && !a->release;
    a->space = (uint8_t)space;
    a->size = (uint8_t)(a->bytes * a->count);
    return true;
}

static bool operand_counts(const Instr *in, int value, uint32_t count) {
    const Operand *o = &in->args[value];
    return o->kind == OPERAND_VECTOR ? o->count == count : count == 1;
}

static Decoded decode_load_store(Decode *d, bool load, char *why, size_t n) {
    Instr *in = d->in;
    Access a = {0};
    int wanted = 2 + has(d, "L2::cache_hint");
    if (!decode_access(d, 1, &a, why, n)) return REFUSED;
    if (in->n != wanted || in->args[load].kind != OPERAND_ADDRESS || !operand_counts(in, !load, a.count))
        return deny(why, n, "operands that %s does not take", d->text);
    if (!load && (a.space == SPACE_PARAM || a.space == SPACE_CONST))
        return deny(why, n, "a store to read-only memory");
    for (int e = 0; load && in->args[0].kind == OPERAND_VECTOR && e < in->args[0].count; e++) {
        bool used = in->args[0].parts[e].kind != OPERAND_SINK;
        a.parts |= (uint8_t)(used << e);
        a.partly |= !used;
    }
    in->data = arena(d->program, sizeof a);
    memcpy(in->data, &a, sizeof a);
    in->exec = load ? exec_load : exec_store;
    in->class_ = (uint8_t)class_of((Space)a.space);
    return DECODED;
}

static Decoded decode_store_bulk(Decode *d, char *why, size_t n) {
    Instr *in = d->in;
    in->u[0] = SPACE_GENERIC;
    for (int i = 2; i < d->n; i++) {
        Space space;
        if (!strcmp(d->part[i], "weak")) continue;
        if (!space_modifier(d->part[i], &space) || space != SPACE_SHARED)
            return deny(why, n, "the modifier .%s is not modelled", d->part[i]);
        in->u[0] = space;
    }
    if (in->n != 3 || in->args[0].kind != OPERAND_ADDRESS || in->args[2].kind != OPERAND_IMMEDIATE
        || in->args[2].immediate)
        return deny(why, n, "st.bulk stores zeros alone");
    in->exec = exec_store_bulk;
    in->class_ = CLASS_SHARED;
    return DECODED;
}

Decoded decode_memory(Decode *d, char *why, size_t n) {
    if (is(d, 0, "ld")) return decode_load_store(d, true, why, n);
    if (is(d, 0, "ldu")) return decode_load_store(d, true, why, n);
    if (is(d, 0, "st") && is(d, 1, "bulk")) return decode_store_bulk(d, why, n);
    if (is(d, 0, "st") && !is(d, 1, "async")) return decode_load_store(d, false, why, n);
    if (is(d, 0, "multimem")) return deny(why, n, "memory of several GPUs is not modelled");
    DecodeFamily others[] = {decode_address, decode_atomic, decode_matrix};
    for (int i = 0; i < 3; i++) {
        Decoded decoded = others[i](d, why, n);
        if (decoded != NOT_MINE) return decoded;
    }
    return NOT_MINE;
}
