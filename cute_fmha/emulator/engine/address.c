/* Address arithmetic between state spaces, and what concerns caches alone: prefetches and policies. */
#include "memory.h"

static uint64_t window_of(Space space) {
    return space == SPACE_SHARED || space == SPACE_SHARED_CLUSTER ? SHARED_WINDOW
         : space == SPACE_LOCAL ? LOCAL_WINDOW : 0;
}

static Status exec_to_generic(Warp *w, const Instr *in, uint32_t mask) {
    uint64_t window = window_of((Space)in->u[0]), a[LANES];
    lane_addresses(w, in, &in->args[1], mask, a);
    FOR_LANES(mask, l) set_lane(w, &in->args[0], (int)l, window ? window + (uint32_t)a[l] : a[l]);
    return NEXT;
}

/* An address that is not of the space becomes one that no access accepts. */
static Status exec_from_generic(Warp *w, const Instr *in, uint32_t mask) {
    Space space = (Space)in->u[0];
    uint64_t window = window_of(space), a[LANES];
    lane_addresses(w, in, &in->args[1], mask, a);
    FOR_LANES(mask, l) {
        uint64_t v = a[l];
        if (window) v = v >> 60 == window >> 60 ? (uint32_t)v : 0xff000000u | (uint32_t)v;
        set_lane(w, &in->args[0], (int)l, v);
    }
    return NEXT;
}

static Status exec_isspacep(Warp *w, const Instr *in, uint32_t mask) {
    uint64_t a[LANES];
    uint32_t yes = 0;
    Space wanted = (Space)in->u[0];
    lane_addresses(w, in, &in->args[1], mask, a);
    FOR_LANES(mask, l) {
        Space space = space_of(w, SPACE_GENERIC, a[l]);
        bool own = (uint32_t)a[l] >> SHARED_RANK_SHIFT == (uint32_t)w->cta->rank;
        bool hit = wanted == SPACE_SHARED_CLUSTER ? space == SPACE_SHARED
                 : wanted == SPACE_SHARED ? space == SPACE_SHARED && own : space == wanted;
        yes |= (uint32_t)hit << l;
    }
    set_pred(w, &in->args[0], mask, yes);
    return NEXT;
}

/* A rank that the cluster lacks gives an address that no access accepts. */
static Status exec_mapa(Warp *w, const Instr *in, uint32_t mask) {
    uint64_t a[LANES];
    lane_addresses(w, in, &in->args[1], mask, a);
    FOR_LANES(mask, l) {
        uint64_t rank = lane_value(w, in, &in->args[2], (int)l) & FULL_MASK;
        uint64_t window = in->u[0] == SPACE_GENERIC ? SHARED_WINDOW : 0;
        if (rank >= (uint64_t)w->cta->cluster->n) rank = 0xff;
        if (window && a[l] >> 60 != 1)
            return fail(w, in, FINDING_BOUNDS, "0x%llx is no address of shared memory",
                        (unsigned long long)a[l]);
        set_lane(w, &in->args[0], (int)l, window | rank << SHARED_RANK_SHIFT | (a[l] & SHARED_OFFSET_MASK));
    }
    return NEXT;
}

static Status exec_getctarank(Warp *w, const Instr *in, uint32_t mask) {
    uint64_t a[LANES];
    lane_addresses(w, in, &in->args[1], mask, a);
    FOR_LANES(mask, l) set_lane(w, &in->args[0], (int)l, (uint32_t)a[l] >> SHARED_RANK_SHIFT);
    return NEXT;
}

static Decoded decode_cvta(Decode *d, char *why, size_t n) {
    Instr *in = d->in;
    bool to = is(d, 1, "to");
    Space space;
    if (d->n != 3 + to || !space_modifier(d->part[1 + to], &space) || in->n != 2)
        return deny(why, n, "no such conversion: %s", d->text);
    if (strcmp(d->part[2 + to], "u64")) return deny(why, n, "32-bit generic addresses are not modelled");
    in->u[0] = space;
    in->exec = to ? exec_from_generic : exec_to_generic;
    in->class_ = CLASS_MOVE;
    return DECODED;
}

static Decoded decode_isspacep(Decode *d, char *why, size_t n) {
    Space space;
    if (d->n != 2 || !space_modifier(d->part[1], &space) || d->in->n != 2)
        return deny(why, n, "no such query: %s", d->text);
    if (space == SPACE_CONST) return deny(why, n, "constant memory is not told from global memory");
    d->in->u[0] = space;
    d->in->exec = exec_isspacep;
    d->in->class_ = CLASS_PREDICATE;
    return DECODED;
}

static Decoded decode_rank(Decode *d, bool mapa, char *why, size_t n) {
    bool cluster = is(d, 1, "shared::cluster");
    if (d->n != 2 + cluster || d->in->n != 2 + mapa
        || (strcmp(d->part[1 + cluster], "u32") && strcmp(d->part[1 + cluster], "u64")))
        return deny(why, n, "no such query: %s", d->text);
    d->in->u[0] = cluster ? SPACE_SHARED_CLUSTER : SPACE_GENERIC;
    d->in->exec = mapa ? exec_mapa : exec_getctarank;
    d->in->class_ = CLASS_INTEGER;
    return DECODED;
}

/* ---------------------------------------------------------------- prefetches and policies */
static Status exec_nothing(Warp *w, const Instr *in, uint32_t mask) {
    uint64_t a[LANES];
    for (int i = 0; i < in->n; i++)
        if (in->args[i].kind == OPERAND_ADDRESS) lane_addresses(w, in, &in->args[i], mask, a);
    return NEXT;
}

/* The bytes are afterwards anything: ones, which read as NaN. */
static Status exec_discard(Warp *w, const Instr *in, uint32_t mask) {
    FOR_LANES(mask, l) {
        Place p;
        uint64_t a = lane_address(w, in, &in->args[0], (int)l);
        if (!aligned_to(w, in, a, 128, "address")) return FATAL;
        if (!locate(w, in, SPACE_GLOBAL, a, 128, (int)l, true, &p)) return FATAL;
        access_global(&w->agent, a, 128, true, GENERIC_PROXY, in);
        memset(p.host, 0xff, 128);
    }
    return NEXT;
}

static Status exec_createpolicy(Warp *w, const Instr *in, uint32_t mask) {
    uint64_t *to = dst64(w, &in->args[0], mask);
    FOR_LANES(mask, l) to[l] = 0;
    return NEXT;
}

static Decoded decode_prefetch(Decode *d, char *why, size_t n) {
    static const char *const known[] = {"global", "local", "param", "const", "L1", "L2", "tensormap",
                                        "L2::evict_last", "L2::evict_normal"};
    for (int i = 1; i < d->n; i++) {
        bool found = false;
        for (size_t k = 0; k < sizeof known / sizeof *known; k++) found |= is(d, i, known[k]);
        if (!found) return deny(why, n, "the modifier .%s is not modelled", d->part[i]);
    }
    d->in->exec = exec_nothing;
    d->in->class_ = CLASS_OTHER;
    return DECODED;
}

static Decoded decode_range(Decode *d, bool discard, char *why, size_t n) {
    Instr *in = d->in;
    for (int i = 1; i < d->n; i++)
        if (!is(d, i, "global") && !is(d, i, discard ? "L2" : "L2::evict_normal"))
            return deny(why, n, "the modifier .%s is not modelled", d->part[i]);
    if (in->n != 2 || in->args[1].kind != OPERAND_IMMEDIATE || in->args[1].immediate != 128)
        return deny(why, n, "a range of other than 128 bytes");
    in->exec = discard ? exec_discard : exec_nothing;
    in->class_ = CLASS_OTHER;
    return DECODED;
}

Decoded decode_address(Decode *d, char *why, size_t n) {
    if (is(d, 0, "cvta")) return decode_cvta(d, why, n);
    if (is(d, 0, "isspacep")) return decode_isspacep(d, why, n);
    if (is(d, 0, "mapa")) return decode_rank(d, true, why, n);
    if (is(d, 0, "getctarank")) return decode_rank(d, false, why, n);
    if (is(d, 0, "prefetch") || is(d, 0, "prefetchu")) return decode_prefetch(d, why, n);
    if (is(d, 0, "discard")) return decode_range(d, true, why, n);
    if (is(d, 0, "applypriority")) return decode_range(d, false, why, n);
    if (is(d, 0, "createpolicy")) {
        d->in->exec = exec_createpolicy;
        d->in->class_ = CLASS_OTHER;
        return DECODED;
    }
    if (is(d, 0, "alloca") || is(d, 0, "stacksave") || is(d, 0, "stackrestore"))
        return deny(why, n, "a stack of variable size is not modelled");
    return NOT_MINE;
}
