/* cp.async, cp.async.bulk and cp.reduce.async.bulk without tensor maps, and the groups that lanes wait
 * for. A cp.async belongs to the generic proxy; bulk copies to the async proxy. */
#include "memory.h"

/* ---------------------------------------------------------------- groups */
typedef struct {
    Transfer *first;
    uint32_t committed[LANES]; /* the group that is open, by lane */
    int n;
    Clock old;                 /* of finished transfers that nobody waited for in a long time */
} Tracker;
typedef struct {
    Tracker copies, bulk;
    Queue queue;      /* a warp's cp.async run in order, with the mbarrier arrivals that wait for them */
    Clock finished;   /* of all of the queue so far */
    uint32_t wait_lanes, wait_newest;
    bool wait_bulk, wait_read;
} Groups;
enum { MAX_FINISHED = 32, WAIT_EVERYTHING = UINT32_MAX };

static Groups *groups_of(Warp *w) {
    if (!w->groups && !(w->groups = calloc(1, sizeof(Groups)))) abort();
    return w->groups;
}

static void transfer_free(Transfer *t) {
    clock_free(&t->read_clock);
    clock_free(&t->done_clock);
    free(t);
}

static void tracker_free(Tracker *tracker) {
    for (Transfer *t = tracker->first, *next; t; t = next) {
        next = t->next;
        transfer_free(t);
    }
    clock_free(&tracker->old);
}

void copy_free_groups(Warp *w) {
    Groups *g = w->groups;
    if (!g) return;
    tracker_free(&g->copies);
    tracker_free(&g->bulk);
    clock_free(&g->finished);
    free(g);
    w->groups = NULL;
}

/* The oldest finished transfers beyond MAX_FINISHED become one clock. */
static void forget_finished(Tracker *tracker) {
    Transfer **link = &tracker->first;
    while (*link && tracker->n > MAX_FINISHED) {
        Transfer *t = *link;
        if (!t->done) { link = &t->next; continue; }
        clock_join(&tracker->old, &t->done_clock);
        *link = t->next;
        tracker->n--;
        transfer_free(t);
    }
}

Transfer *transfer_open(Warp *w, uint32_t lanes, bool bulk) {
    Groups *g = groups_of(w);
    Tracker *tracker = bulk ? &g->bulk : &g->copies;
    if (tracker->n > 2 * MAX_FINISHED) forget_finished(tracker);
    Transfer *t = calloc(1, sizeof *t);
    if (!t) abort();
    t->lanes = lanes;
    memcpy(t->group, tracker->committed, sizeof t->group);
    Transfer **link = &tracker->first;
    while (*link) link = &(*link)->next;
    *link = t;
    tracker->n++;
    return t;
}

void transfer_read(Machine *m, Transfer *t, AsyncOp *op) {
    t->read = true;
    m->progress = true;
    release_to(&t->read_clock, &op->agent);
}

void transfer_done(Machine *m, Transfer *t, AsyncOp *op) {
    t->read = t->done = true;
    m->progress = true;
    release_to(&t->done_clock, &op->agent);
}

/* The lanes among `lanes` for which a wait that leaves the `newest` groups covers the transfer. */
static uint32_t covered(const Tracker *tracker, const Transfer *t, uint32_t lanes, uint32_t newest) {
    uint32_t hit = 0;
    if (newest == WAIT_EVERYTHING) return t->lanes & lanes;
    FOR_LANES(t->lanes & lanes, l)
        hit |= (uint32_t)(tracker->committed[l] - t->group[l] > newest) << l;
    return hit;
}

static bool groups_over(Warp *w) {
    Groups *g = w->groups;
    Tracker *tracker = g->wait_bulk ? &g->bulk : &g->copies;
    for (Transfer *t = tracker->first; t; t = t->next)
        if (!(g->wait_read ? t->read : t->done) && covered(tracker, t, g->wait_lanes, g->wait_newest))
            return false;
    return true;
}

/* What the wait covers is known from here on, and forgotten if nothing of it is left to wait for. */
static void acquire_groups(Warp *w, Groups *g) {
    Tracker *tracker = g->wait_bulk ? &g->bulk : &g->copies;
    for (Transfer **link = &tracker->first; *link;) {
        Transfer *t = *link;
        uint32_t hit = covered(tracker, t, g->wait_lanes, g->wait_newest);
        if (hit) acquire_from(&w->agent, g->wait_read ? &t->read_clock : &t->done_clock);
        if (hit && !g->wait_read) t->lanes &= ~hit;
        if (t->lanes) { link = &t->next; continue; }
        *link = t->next;
        tracker->n--;
        transfer_free(t);
    }
    acquire_from(&w->agent, &tracker->old);
}

static Status wait_groups(Warp *w, uint32_t mask, bool bulk, bool read, uint32_t newest, const char *what) {
    Groups *g = groups_of(w);
    g->wait_lanes = mask, g->wait_newest = newest, g->wait_bulk = bulk, g->wait_read = read;
    if (!groups_over(w)) return block_on(w, (Wait){.kind = WAIT_OTHER, .over = groups_over, .what = what});
    acquire_groups(w, g);
    return NEXT;
}

static Status exec_commit(Warp *w, const Instr *in, uint32_t mask) {
    Groups *g = groups_of(w);
    Tracker *tracker = in->u[0] ? &g->bulk : &g->copies;
    FOR_LANES(mask, l) tracker->committed[l]++;
    return NEXT;
}

static Status exec_wait_group(Warp *w, const Instr *in, uint32_t mask) {
    return wait_groups(w, mask, in->u[0], in->u[1], (uint32_t)in->args[0].immediate,
                       in->u[0] ? "groups of bulk copies" : "groups of cp.async");
}

static Status exec_wait_all(Warp *w, const Instr *in, uint32_t mask) {
    (void)in;
    return wait_groups(w, mask, false, false, WAIT_EVERYTHING, "all cp.async");
}

/* ---------------------------------------------------------------- cp.async */
typedef struct {
    Transfer *transfer;
    uint32_t lanes, offset[LANES];
    uint8_t from[LANES]; /* bytes to read; the rest of `size` is zeros */
    uint64_t source[LANES];
} LaneCopies;

static bool run_lane_copies(Machine *m, AsyncOp *op) {
    LaneCopies *c = op->payload;
    uint32_t size = (uint32_t)op->in->u[0];
    Cta *cta = op->cta;
    Run read = {.machine = m, .agent = &op->agent, .in = op->in, .proxy = GENERIC_PROXY};
    Run write = read;
    write.write = true;
    FOR_LANES(c->lanes, l) if (c->from[l]) run_add(&read, SPACE_GLOBAL, NULL, c->source[l], c->from[l]);
    run_flush(&read);
    FOR_LANES(c->lanes, l) {
        uint8_t *to = cta->shared + c->offset[l];
        run_add(&write, SPACE_SHARED, cta, c->offset[l], size);
        memcpy(to, (const void *)(uintptr_t)c->source[l], c->from[l]);
        memset(to + c->from[l], 0, size - c->from[l]);
    }
    run_flush(&write);
    transfer_done(m, c->transfer, op);
    Groups *g = op->warp->groups;
    clock_join(&g->finished, &c->transfer->done_clock);
    return true;
}

/* The bytes that a lane reads: u[1] tells what the fourth operand is (0: none, 1: size, 2: ignore). */
static bool bytes_to_read(Warp *w, const Instr *in, uint32_t lane, uint32_t size, uint32_t ignored,
                          uint8_t *bytes) {
    uint64_t n = size;
    if (in->u[1] == 1) n = lane_value(w, in, &in->args[3], (int)lane) & FULL_MASK;
    if (in->u[1] == 2 && ignored >> lane & 1) n = 0;
    if (n > size) {
        fail(w, in, FINDING_OTHER, "cp.async reads %llu bytes to write %u", (unsigned long long)n, size);
        return false;
    }
    *bytes = (uint8_t)n;
    return true;
}

static Status exec_cp_async(Warp *w, const Instr *in, uint32_t mask) {
    uint32_t size = (uint32_t)in->u[0], ignored = 0;
    uint64_t to[LANES], from[LANES];
    lane_addresses(w, in, &in->args[0], mask, to);
    lane_addresses(w, in, &in->args[1], mask, from);
    if (in->u[1] == 2) ignored = src_pred(w, in, &in->args[3], mask);
    AsyncOp *op = async_new(w, in, run_lane_copies, sizeof(LaneCopies), false);
    LaneCopies *c = op->payload;
    c->lanes = mask;
    FOR_LANES(mask, l) {
        if (!aligned_to(w, in, to[l], size, "destination") || !aligned_to(w, in, from[l], size, "source"))
            return FATAL;
        if (!bytes_to_read(w, in, l, size, ignored, &c->from[l])) return FATAL;
        Place p;
        if (!locate(w, in, SPACE_SHARED, to[l], size, (int)l, true, &p)) return FATAL;
        c->offset[l] = (uint32_t)p.at;
        c->source[l] = from[l];
        if (c->from[l] && !locate(w, in, SPACE_GLOBAL, from[l], c->from[l], (int)l, false, &p)) return FATAL;
    }
    c->transfer = transfer_open(w, mask, false);
    op->queue = &groups_of(w)->queue;
    copy_times(op, size * (double)__builtin_popcount(mask), 0);
    async_submit(w->machine, op);
    return NEXT;
}

/* ---------------------------------------------------------------- cp.async.mbarrier.arrive */
typedef struct { int n; struct { Cta *cta; uint32_t offset; } lane[LANES]; } Arrivals;

/* The queue is in order: everything the lanes issued before has landed. */
static bool run_arrivals(Machine *m, AsyncOp *op) {
    Arrivals *a = op->payload;
    Groups *g = op->warp->groups;
    acquire_from(&op->agent, &g->finished);
    for (int i = 0; i < a->n && !m->fatal;) {
        Cta *cta = a->lane[i].cta;
        uint32_t offset = a->lane[i].offset, count = 0;
        for (; i < a->n && a->lane[i].cta == cta && a->lane[i].offset == offset; i++) count++;
        MBarrier *bar = mbarrier_at(op->warp, op->in, cta, offset);
        if (!bar) return true;
        mbarrier_arrive(m, bar, count, &op->agent, op->finish, op->in);
    }
    return true;
}

static Status exec_copy_arrive(Warp *w, const Instr *in, uint32_t mask) {
    uint64_t address[LANES];
    lane_addresses(w, in, &in->args[0], mask, address);
    AsyncOp *op = async_new(w, in, run_arrivals, sizeof(Arrivals), false);
    Arrivals *a = op->payload;
    FOR_LANES(mask, l) {
        Place p;
        int i = a->n++;
        if (!aligned_to(w, in, address[l], 8, "mbarrier")) return FATAL;
        if (!locate(w, in, (Space)in->u[1], address[l], 8, (int)l, true, &p)) return FATAL;
        if (p.space != SPACE_SHARED || p.cta != w->cta)
            return fail(w, in, FINDING_BARRIER, "an mbarrier outside of the CTA's shared memory");
        a->lane[i].cta = p.cta;
        a->lane[i].offset = (uint32_t)p.at;
        MBarrier *bar = mbarrier_at(w, in, p.cta, (uint32_t)p.at);
        if (!bar) return FATAL;
        if (!in->u[0]) bar->pending++; /* without .noinc the arrival is one more than the phase expected */
    }
    op->queue = &groups_of(w)->queue;
    copy_times(op, 0, 3);
    async_submit(w->machine, op);
    return NEXT;
}

/* ---------------------------------------------------------------- bulk copies */
typedef enum { GLOBAL_TO_SHARED, SHARED_TO_SHARED, SHARED_TO_GLOBAL } Way;
typedef struct { uint8_t way, multicast, hint; Reduction r; bool own; } BulkKind;
typedef struct {
    Transfer *transfer;
    uint32_t bytes, offset, bar, source_offset; /* in every target */
    uint64_t global;
    uint32_t n; Cta *target[MAX_CLUSTER], *bar_cta;
    uint8_t data[];
} Bulk;

bool cta_reachable(Machine *m, AsyncOp *op, Cta *cta) {
    if (!cta->done && cta->shared) return true;
    report(m, FINDING_BOUNDS, op->warp, op->in, false,
           "CTA %d of the cluster has exited before a copy reached it", cta->rank);
    return false;
}

bool deliver_bytes(Machine *m, AsyncOp *op, Cta *cta, uint32_t offset, uint32_t bytes) {
    MBarrier *bar = mbarrier_at(op->warp, op->in, cta, offset);
    if (!bar) return false;
    mbarrier_complete_tx(m, bar, bytes, &op->agent, op->finish, op->in);
    return true;
}

uint32_t multicast_targets(Warp *w, const Instr *in, uint32_t mask, Cta **targets) {
    Cluster *cluster = w->cta->cluster;
    uint32_t n = 0;
    if (!mask || mask >> cluster->n) {
        fail(w, in, FINDING_BOUNDS, "multicast mask 0x%x, but the cluster has %d CTAs", mask, cluster->n);
        return 0;
    }
    for (int i = 0; i < cluster->n; i++) if (mask >> i & 1) targets[n++] = cluster->cta[i];
    return n;
}

static void record_bulk(AsyncOp *op, Space space, Cta *cta, uint64_t at, uint32_t bytes, bool write) {
    Run run = {op->cta->machine, &op->agent, op->in, write, ASYNC_PROXY, space, cta, at, bytes};
    run_flush(&run);
}

static void apply(const BulkKind *kind, uint8_t *to, const void *from, uint32_t bytes) {
    if (kind->r.op) reduce(&kind->r, to, from, bytes / kind->r.bytes);
    else memcpy(to, from, bytes);
}

/* Into shared memory, with an mbarrier. */
static bool run_bulk_in(Machine *m, AsyncOp *op) {
    const BulkKind *kind = op->in->data;
    Bulk *b = op->payload;
    const uint8_t *from = kind->way == GLOBAL_TO_SHARED ? (const uint8_t *)(uintptr_t)b->global
                                                        : op->cta->shared + b->source_offset;
    if (kind->way == GLOBAL_TO_SHARED) record_bulk(op, SPACE_GLOBAL, NULL, b->global, b->bytes, false);
    else record_bulk(op, SPACE_SHARED, op->cta, b->source_offset, b->bytes, false);
    for (uint32_t i = 0; i < b->n; i++) {
        Cta *cta = b->target[i];
        if (!cta_reachable(m, op, cta)) return true;
        if (kind->r.op)
            access_atomic(&op->agent, SPACE_SHARED, cta, b->offset, b->bytes, true, false, false, op->in);
        else record_bulk(op, SPACE_SHARED, cta, b->offset, b->bytes, true);
        apply(kind, cta->shared + b->offset, from, b->bytes);
    }
    if (kind->way == GLOBAL_TO_SHARED) m->counters.tma_load_bytes += b->bytes;
    m->counters.tma_multicast_bytes += (uint64_t)b->bytes * (b->n - 1);
    for (uint32_t i = 0; i < b->n && !m->fatal; i++)
        if (!deliver_bytes(m, op, kind->multicast ? b->target[i] : b->bar_cta, b->bar, b->bytes)) return true;
    return true;
}

/* To global memory, in two stages: the source is read, the destination is written. */
static bool run_bulk_out(Machine *m, AsyncOp *op) {
    const BulkKind *kind = op->in->data;
    Bulk *b = op->payload;
    if (op->stage++ == 0) {
        record_bulk(op, SPACE_SHARED, op->cta, b->source_offset, b->bytes, false);
        memcpy(b->data, op->cta->shared + b->source_offset, b->bytes);
        transfer_read(m, b->transfer, op);
        return false;
    }
    if (kind->r.op)
        access_atomic(&op->agent, SPACE_GLOBAL, NULL, b->global, b->bytes, true, false, false, op->in);
    else access_global(&op->agent, b->global, b->bytes, true, ASYNC_PROXY, op->in);
    apply(kind, (uint8_t *)(uintptr_t)b->global, b->data, b->bytes);
    m->counters.global_write_bytes += b->bytes;
    m->counters.tma_store_bytes += b->bytes;
    transfer_done(m, b->transfer, op);
    return true;
}

static bool bulk_size(Warp *w, const Instr *in, uint32_t lane, uint32_t *bytes) {
    uint64_t n = lane_value(w, in, &in->args[2], (int)lane) & FULL_MASK;
    *bytes = (uint32_t)n;
    if (n > SHARED_CAPACITY) {
        fail(w, in, FINDING_BOUNDS, "a bulk copy of %llu bytes", (unsigned long long)n);
        return false;
    }
    return aligned_to(w, in, n, 16, "size");
}

static bool own_shared(Warp *w, const Instr *in, uint64_t address, uint32_t bytes, uint32_t *offset) {
    Place p;
    if (!aligned_to(w, in, address, 16, "shared address")) return false;
    if (!locate(w, in, SPACE_SHARED, address, bytes, 0, false, &p)) return false;
    *offset = (uint32_t)p.at;
    return true;
}

static bool global_range(Warp *w, const Instr *in, uint64_t address, uint32_t bytes, bool write) {
    Place p;
    if (!aligned_to(w, in, address, 16, "global address")) return false;
    return locate(w, in, SPACE_GLOBAL, address, bytes, 0, write, &p);
}

static bool issue_bulk_in(Warp *w, const Instr *in, uint32_t lane, const BulkKind *kind, uint32_t bytes,
                          AsyncOp *op) {
    Bulk *b = op->payload;
    uint64_t to = lane_address(w, in, &in->args[0], (int)lane);
    uint64_t from = lane_address(w, in, &in->args[1], (int)lane);
    uint64_t bar = lane_address(w, in, &in->args[3], (int)lane);
    if (!aligned_to(w, in, to, 16, "destination") || !aligned_to(w, in, bar, 8, "mbarrier")) return false;
    b->global = from;
    if (kind->way == GLOBAL_TO_SHARED ? !global_range(w, in, from, bytes, false)
                                      : !own_shared(w, in, from, bytes, &b->source_offset)) return false;
    b->n = 1;
    b->target[0] = shared_target(w, in, (uint32_t)to, bytes, &b->offset);
    b->bar_cta = b->target[0] ? shared_target(w, in, (uint32_t)bar, 8, &b->bar) : NULL;
    if (!b->bar_cta) return false;
    if (kind->own && b->target[0] != w->cta) {
        fail(w, in, FINDING_BOUNDS, "the destination is another CTA's, which needs .shared::cluster");
        return false;
    }
    if (b->bar_cta != b->target[0]) {
        fail(w, in, FINDING_BARRIER, "the mbarrier lies in another CTA than the destination");
        return false;
    }
    if (!kind->multicast) return true;
    uint32_t mask = (uint32_t)lane_value(w, in, &in->args[4], (int)lane) & 0xffff;
    return (b->n = multicast_targets(w, in, mask, b->target)) != 0;
}

static bool issue_bulk_out(Warp *w, const Instr *in, uint32_t lane, uint32_t bytes, AsyncOp *op) {
    Bulk *b = op->payload;
    b->global = lane_address(w, in, &in->args[0], (int)lane);
    uint64_t from = lane_address(w, in, &in->args[1], (int)lane);
    if (!own_shared(w, in, from, bytes, &b->source_offset)) return false;
    if (!global_range(w, in, b->global, bytes, true)) return false;
    b->transfer = transfer_open(w, 1u << lane, true);
    return true;
}

static Status exec_bulk(Warp *w, const Instr *in, uint32_t mask) {
    const BulkKind *kind = in->data;
    bool out = kind->way == SHARED_TO_GLOBAL;
    FOR_LANES(mask, l) {
        uint32_t bytes;
        if (!bulk_size(w, in, l, &bytes)) return FATAL;
        if (!bytes) continue;
        size_t payload = sizeof(Bulk) + (out ? bytes : 0);
        AsyncOp *op = async_new(w, in, out ? run_bulk_out : run_bulk_in, payload, false);
        ((Bulk *)op->payload)->bytes = bytes;
        if (out ? !issue_bulk_out(w, in, l, bytes, op) : !issue_bulk_in(w, in, l, kind, bytes, op)) return FATAL;
        copy_times(op, bytes, out);
        async_submit(w->machine, op);
    }
    return NEXT;
}

static Status exec_prefetch(Warp *w, const Instr *in, uint32_t mask) {
    FOR_LANES(mask, l) {
        uint64_t bytes = lane_value(w, in, &in->args[1], (int)l) & FULL_MASK;
        if (!aligned_to(w, in, bytes, 16, "size")) return FATAL;
        if (!aligned_to(w, in, lane_address(w, in, &in->args[0], (int)l), 16, "global address")) return FATAL;
    }
    return NEXT;
}

/* ---------------------------------------------------------------- decoding */
static Decoded decode_cp_async(Decode *d, char *why, size_t n) {
    Instr *in = d->in;
    bool hint = has(d, "L2::cache_hint"), ca = is(d, 2, "ca");
    if (!ca && !is(d, 2, "cg")) return deny(why, n, "no such copy: %s", d->text);
    for (int i = 3; i < d->n; i++)
        if (!is(d, i, "shared") && !is(d, i, "shared::cta") && !is(d, i, "global") && !is(d, i, "L2::cache_hint")
            && !is(d, i, "L2::64B") && !is(d, i, "L2::128B") && !is(d, i, "L2::256B"))
            return deny(why, n, "the modifier .%s is not modelled", d->part[i]);
    int operands = in->n - hint;
    if (operands < 3 || operands > 4 || in->args[2].kind != OPERAND_IMMEDIATE)
        return deny(why, n, "operands that %s does not take", d->text);
    int64_t size = in->args[2].immediate;
    if (size != 16 && !(ca && (size == 4 || size == 8)))
        return deny(why, n, "a copy of %lld bytes", (long long)size);
    in->u[0] = (uint64_t)size;
    bool predicate = operands == 4 && in->args[3].kind == OPERAND_REGISTER && in->args[3].width == 0;
    in->u[1] = operands == 3 ? 0 : predicate ? 2 : 1;
    in->exec = exec_cp_async;
    in->class_ = CLASS_GLOBAL;
    return DECODED;
}

static Decoded decode_group(Decode *d, char *why, size_t n) {
    Instr *in = d->in;
    int i = is(d, 2, "bulk") ? 3 : 2;
    in->u[0] = i == 3;
    in->class_ = CLASS_WAIT;
    if (is(d, i, "commit_group") && d->n == i + 1) {
        in->exec = exec_commit;
        in->class_ = CLASS_OTHER;
        return DECODED;
    }
    if (is(d, i, "wait_all") && i == 2 && d->n == 3) {
        in->exec = exec_wait_all;
        return DECODED;
    }
    in->u[1] = is(d, i + 1, "read");
    if (!is(d, i, "wait_group") || d->n != i + 1 + (int)in->u[1] || (in->u[1] && i == 2) || in->n != 1
        || in->args[0].kind != OPERAND_IMMEDIATE)
        return deny(why, n, "no such instruction: %s", d->text);
    in->exec = exec_wait_group;
    return DECODED;
}

static Decoded decode_copy_arrive(Decode *d, char *why, size_t n) {
    Instr *in = d->in;
    Space space = SPACE_GENERIC;
    for (int i = 4; i < d->n; i++)
        if (!is(d, i, "noinc") && !is(d, i, "b64")
            && !(space_modifier(d->part[i], &space) && space == SPACE_SHARED))
            return deny(why, n, "the modifier .%s is not modelled", d->part[i]);
    if (!is(d, 3, "arrive") || in->n != 1 || in->args[0].kind != OPERAND_ADDRESS)
        return deny(why, n, "no such instruction: %s", d->text);
    in->u[0] = has(d, "noinc");
    in->u[1] = space;
    in->exec = exec_copy_arrive;
    in->class_ = CLASS_BARRIER;
    return DECODED;
}

static bool reduction_type(const char *name, Reduction *r) {
    int bytes;
    if (!strcmp(name, "bf16")) { r->bytes = 2, r->kind = 'h'; return true; }
    if (!ptx_type(name, &bytes, &r->kind)) return false;
    r->bytes = (uint8_t)bytes;
    return true;
}

static bool bulk_modifiers(Decode *d, int from, BulkKind *kind, bool *to_shared, char *why, size_t n) {
    bool reduces = is(d, 1, "reduce"), typed = false;
    for (int i = from; i < d->n; i++) {
        const char *p = d->part[i];
        if (!strcmp(p, "mbarrier::complete_tx::bytes")) *to_shared = true;
        else if (!strcmp(p, "bulk_group")) *to_shared = false;
        else if (!strcmp(p, "multicast::cluster")) kind->multicast = 1;
        else if (!strcmp(p, "L2::cache_hint")) kind->hint = 1;
        else if (reduces && !strcmp(p, "noftz")) continue;
        else if (reduces && !kind->r.op && red_op(p) && red_op(p) < RED_EXCH) kind->r.op = (uint8_t)red_op(p);
        else if (reduces && !typed && reduction_type(p, &kind->r)) typed = true;
        else { deny(why, n, "the modifier .%s is not modelled", p); return false; }
    }
    kind->r.flush = false; /* unlike red.global.add.f32; measured on an H200 */
    if (reduces && (!typed || !reduction_allowed(&kind->r))) {
        deny(why, n, "no such operation: %s", d->text);
        return false;
    }
    return true;
}

/* cp.async.bulk.DST.SRC... or cp.reduce.async.bulk.DST.SRC..., DST at part `at`. */
static Decoded decode_bulk(Decode *d, int at, char *why, size_t n) {
    Instr *in = d->in;
    BulkKind kind = {0};
    bool to_shared = false, from_global = is(d, at + 1, "global"), from_shared = is(d, at + 1, "shared::cta");
    kind.own = is(d, at, "shared::cta");
    if (!bulk_modifiers(d, at + 2, &kind, &to_shared, why, n)) return REFUSED;
    if ((kind.own || is(d, at, "shared::cluster")) && to_shared && (from_global || from_shared))
        kind.way = from_global ? GLOBAL_TO_SHARED : SHARED_TO_SHARED;
    else if (is(d, at, "global") && from_shared && !to_shared) kind.way = SHARED_TO_GLOBAL;
    else return deny(why, n, "no such copy: %s", d->text);
    bool reduces_from_global = kind.r.op && kind.way == GLOBAL_TO_SHARED;
    if (in->n != 3 + to_shared + kind.multicast + kind.hint || reduces_from_global
        || (kind.multicast && kind.way != GLOBAL_TO_SHARED))
        return deny(why, n, "operands that %s does not take", d->text);
    for (int i = 0; i < 4; i++)
        if (i != 2 && i < 3 + to_shared && in->args[i].kind != OPERAND_ADDRESS)
            return deny(why, n, "operand %d is not an address", i);
    in->data = arena(d->program, sizeof kind);
    memcpy(in->data, &kind, sizeof kind);
    in->exec = exec_bulk;
    in->class_ = CLASS_TMA;
    return DECODED;
}

Decoded decode_copy(Decode *d, char *why, size_t n) {
    if (!is(d, 0, "cp")) return NOT_MINE;
    bool tensor = has(d, "tensor");
    if (is(d, 1, "reduce") && is(d, 2, "async") && is(d, 3, "bulk"))
        return tensor ? NOT_MINE : decode_bulk(d, 4, why, n);
    if (!is(d, 1, "async") || tensor) return NOT_MINE;
    if (is(d, 2, "mbarrier")) return decode_copy_arrive(d, why, n);
    if (is(d, 2, "commit_group") || is(d, 2, "wait_group") || is(d, 2, "wait_all"))
        return decode_group(d, why, n);
    if (!is(d, 2, "bulk")) return decode_cp_async(d, why, n);
    if (is(d, 3, "commit_group") || is(d, 3, "wait_group")) return decode_group(d, why, n);
    if (!is(d, 3, "prefetch")) return decode_bulk(d, 3, why, n);
    bool hint = has(d, "L2::cache_hint");
    if (!is(d, 4, "L2") || !is(d, 5, "global") || d->n != 6 + hint || d->in->n != 2 + hint)
        return deny(why, n, "no such prefetch: %s", d->text);
    d->in->exec = exec_prefetch;
    d->in->class_ = CLASS_TMA;
    return DECODED;
}
