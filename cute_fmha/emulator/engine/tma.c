/* cp.async.bulk.tensor and cp.reduce.async.bulk.tensor: boxes of tensors between global memory and the
 * swizzled boxes of shared memory. Everything here is of the async proxy. */
#include "tensormap.h"

typedef struct {
    uint8_t rank, gather, multicast, pair, own, hint; /* pair: .cta_group::2 */
    Reduction r;
} TmaKind;

typedef struct {
    Box box;
    Transfer *transfer;
    uint32_t offset, bar;            /* in every target */
    uint32_t n; Cta *target[MAX_CLUSTER], *bar_cta[MAX_CLUSTER];
    uint8_t data[];                  /* of a store: the dense box, not swizzled */
} Tma;

/* ---------------------------------------------------------------- rows in shared memory */
static inline uint32_t chunk_at(const Box *box, uint32_t offset, uint32_t row, uint32_t chunk) {
    return swizzled(offset + row * box->pitch + chunk * 16, box->map.swizzle);
}

static void write_row(const Box *box, uint8_t *shared, uint32_t offset, uint32_t row, const uint8_t *from) {
    if (!box->map.swizzle) {
        memcpy(shared + offset + (size_t)row * box->row_bytes, from, box->row_bytes);
        return;
    }
    for (uint32_t c = 0; c < box->row_bytes / 16; c++)
        memcpy(shared + chunk_at(box, offset, row, c), from + c * 16, 16);
}

static void read_row(const Box *box, const uint8_t *shared, uint32_t offset, uint32_t row, uint8_t *to) {
    if (!box->map.swizzle) {
        memcpy(to, shared + offset + (size_t)row * box->row_bytes, box->row_bytes);
        return;
    }
    for (uint32_t c = 0; c < box->row_bytes / 16; c++)
        memcpy(to + c * 16, shared + chunk_at(box, offset, row, c), 16);
}

/* The box's place in shared memory. A swizzle permutes chunks within 128 aligned bytes, so that a box of
 * whole 128 bytes, with nothing between its rows, is one range. */
static void record_box(AsyncOp *op, const Box *box, Cta *cta, uint32_t offset, bool write) {
    Run run = {.machine = cta->machine, .agent = &op->agent, .in = op->in, .write = write, .proxy = ASYNC_PROXY};
    if (!box->map.swizzle || (box->row_bytes == box->pitch && box->bytes % 128 == 0)) {
        run_add(&run, SPACE_SHARED, cta, offset, box->bytes);
    } else {
        for (uint32_t r = 0; r < box->rows; r++)
            for (uint32_t c = 0; c < box->row_bytes / 16; c++)
                run_add(&run, SPACE_SHARED, cta, chunk_at(box, offset, r, c), 16);
    }
    run_flush(&run);
}

/* The chunks of a store whose elements are in bounds, at least in part. */
static void record_inside(AsyncOp *op, const Box *box, Cta *cta, uint32_t offset) {
    Run run = {.machine = cta->machine, .agent = &op->agent, .in = op->in, .proxy = ASYNC_PROXY};
    uint32_t first = box->first * box->map.element / 16, last = (box->last * box->map.element + 15) / 16;
    uint64_t address;
    for (uint32_t r = 0; r < box->rows; r++)
        if (box_row(box, r, &address))
            for (uint32_t c = first; c < last; c++)
                run_add(&run, SPACE_SHARED, cta, chunk_at(box, offset, r, c), 16);
    run_flush(&run);
}

/* ---------------------------------------------------------------- loads */
static void fill_outside(const TensorMap *map, uint8_t *row, uint32_t bytes) {
    memset(row, 0, bytes);
    if (!map->nan) return;
    const uint16_t nan = 0x7ff7; /* on an H200, for elements of every size */
    for (uint32_t i = 0; i < bytes; i += sizeof nan) memcpy(row + i, &nan, sizeof nan);
}

static void load_row(const Tma *t, uint32_t row, const uint8_t *from) {
    for (uint32_t i = 0; i < t->n; i++) write_row(&t->box, t->target[i]->shared, t->offset, row, from);
}

/* The rows of the box; returns the bytes read. */
static bool load_rows(Machine *m, AsyncOp *op, Tma *t) {
    const Box *box = &t->box;
    uint8_t padded[256 * 8], outside[256 * 8];
    uint32_t skip = box->first * box->map.element, bytes = (box->last - box->first) * box->map.element;
    Run read = {.machine = m, .agent = &op->agent, .in = op->in, .proxy = ASYNC_PROXY};
    fill_outside(&box->map, outside, box->row_bytes);
    memcpy(padded, outside, box->row_bytes);
    for (uint32_t r = 0; r < box->rows; r++) {
        uint64_t address;
        if (!box_row(box, r, &address)) {
            load_row(t, r, outside);
            continue;
        }
        const uint8_t *from = global_target(m, op->warp, op->in, address + skip, bytes, false);
        if (!from) return false;
        run_add(&read, SPACE_GLOBAL, NULL, address + skip, bytes);
        if (bytes < box->row_bytes) {
            memcpy(padded + skip, from, bytes);
            from = padded;
        }
        load_row(t, r, from);
    }
    run_flush(&read);
    return true;
}

static bool run_load(Machine *m, AsyncOp *op) {
    Tma *t = op->payload;
    for (uint32_t i = 0; i < t->n; i++) {
        if (!cta_reachable(m, op, t->target[i])) return true;
        record_box(op, &t->box, t->target[i], t->offset, true);
    }
    if (!load_rows(m, op, t)) return true;
    m->counters.tma_load_bytes += t->box.bytes;
    m->counters.tma_multicast_bytes += (uint64_t)t->box.bytes * (t->n - 1);
    for (uint32_t i = 0; i < t->n && !m->fatal; i++)
        if (!deliver_bytes(m, op, t->bar_cta[i], t->bar, t->box.bytes)) return true;
    return true;
}

/* ---------------------------------------------------------------- stores and reductions */
static void read_box(AsyncOp *op, Tma *t) {
    const Box *box = &t->box;
    if (box_inside(box)) record_box(op, box, op->cta, t->offset, false);
    else record_inside(op, box, op->cta, t->offset);
    for (uint32_t r = 0; r < box->rows; r++)
        read_row(box, op->cta->shared, t->offset, r, t->data + (size_t)r * box->row_bytes);
}

static bool store_rows(Machine *m, AsyncOp *op, Tma *t) {
    const TmaKind *kind = op->in->data;
    const Box *box = &t->box;
    uint32_t skip = box->first * box->map.element, bytes = (box->last - box->first) * box->map.element;
    Reduction r = {kind->r.op, (uint8_t)box->map.element, box->map.kind, false}; /* as in copy.c */
    Run write = {.machine = m, .agent = &op->agent, .in = op->in, .write = true, .proxy = ASYNC_PROXY};
    for (uint32_t i = 0; i < box->rows; i++) {
        uint64_t address;
        if (!box_row(box, i, &address)) continue;
        uint8_t *to = global_target(m, op->warp, op->in, address + skip, bytes, true);
        if (!to) return false;
        const uint8_t *from = t->data + (size_t)i * box->row_bytes + skip;
        if (r.op) {
            access_atomic(&op->agent, SPACE_GLOBAL, NULL, address + skip, bytes, true, false, false, op->in);
            m->counters.global_write_bytes += bytes;
            reduce(&r, to, from, bytes / r.bytes);
        } else {
            run_add(&write, SPACE_GLOBAL, NULL, address + skip, bytes);
            memcpy(to, from, bytes);
        }
    }
    run_flush(&write);
    return true;
}

static bool run_store(Machine *m, AsyncOp *op) {
    Tma *t = op->payload;
    if (op->stage++ == 0) {
        read_box(op, t);
        transfer_read(m, t->transfer, op);
        return false;
    }
    if (!store_rows(m, op, t)) return true;
    m->counters.tma_store_bytes += t->box.bytes;
    transfer_done(m, t->transfer, op);
    return true;
}

/* ---------------------------------------------------------------- issue */
/* [map, {coordinates}] is a vector of an address and a vector. */
static bool read_box_operands(Warp *w, const Instr *in, const TmaKind *kind, int map, uint32_t lane,
                              Box *box) {
    const Operand *parts = in->args[map].parts, *at = &parts[1];
    uint64_t address = lane_address(w, in, &parts[0], (int)lane);
    if (!tensor_map_read(w, in, address, kind->rank, &box->map)) return false;
    box->gather = kind->gather;
    for (uint32_t i = 0; i < at->count; i++) {
        int32_t v = (int32_t)lane_value(w, in, &at->parts[i], (int)lane);
        if (kind->gather && i) box->row[i - 1] = v;
        else box->at[i] = v;
    }
    if (kind->gather && box->map.box[1] != 1) {
        fail(w, in, FINDING_DESCRIPTOR, "gather4 and scatter4 need a box of one row, not %u", box->map.box[1]);
        return false;
    }
    char why[120];
    if (box_init(box, why, sizeof why)) return true;
    fail(w, in, FINDING_DESCRIPTOR, "%s", why);
    return false;
}

static Cta *box_in_shared(Warp *w, const Instr *in, const Box *box, uint64_t address, uint32_t *offset) {
    if (!aligned_to(w, in, address, 128, "shared address of a box")) return NULL;
    return shared_target(w, in, (uint32_t)address, box->extent, offset);
}

/* Which barrier each target's bytes go to: its own, or with .cta_group::2 that of the CTA of its pair
 * whose parity is the given barrier's. */
static bool place_barriers(Warp *w, const Instr *in, const TmaKind *kind, Cta *bar, Tma *t) {
    Cluster *cluster = w->cta->cluster;
    for (uint32_t i = 0; i < t->n; i++) {
        int rank = t->target[i]->rank;
        if (kind->pair) rank = (rank & ~1) | (bar->rank & 1);
        if (rank >= cluster->n || (!kind->multicast && cluster->cta[rank] != bar)) {
            fail(w, in, FINDING_BARRIER, "the mbarrier of CTA %d cannot receive the bytes written to CTA %d",
                 bar->rank, t->target[i]->rank);
            return false;
        }
        t->bar_cta[i] = cluster->cta[rank];
    }
    return true;
}

/* Hopper raises an illegal instruction where a store or a reduction begins at a negative coordinate. Its
 * end may lie outside. */
static bool store_begins_inside(Warp *w, const Instr *in, const Box *box) {
    for (int i = 0; i < MAP_RANK; i++)
        if (box->at[i] < 0) {
            fail(w, in, FINDING_DESCRIPTOR, "a store to coordinate %d of dimension %d", (int)box->at[i], i);
            return false;
        }
    return true;
}

static bool issue_load(Warp *w, const Instr *in, const TmaKind *kind, uint32_t lane, Tma *t) {
    if (!read_box_operands(w, in, kind, 1, lane, &t->box)) return false;
    t->n = 1;
    t->target[0] = box_in_shared(w, in, &t->box, lane_address(w, in, &in->args[0], (int)lane), &t->offset);
    if (!t->target[0]) return false;
    if (kind->own && t->target[0] != w->cta) {
        fail(w, in, FINDING_BOUNDS, "the destination is another CTA's, which needs .shared::cluster");
        return false;
    }
    uint64_t address = lane_address(w, in, &in->args[2], (int)lane);
    if (!aligned_to(w, in, address, 8, "mbarrier")) return false;
    Cta *bar = shared_target(w, in, (uint32_t)address, 8, &t->bar);
    if (!bar) return false;
    if (kind->multicast) {
        uint32_t mask = (uint32_t)lane_value(w, in, &in->args[3], (int)lane) & 0xffff;
        if (!(t->n = multicast_targets(w, in, mask, t->target))) return false;
    }
    return place_barriers(w, in, kind, bar, t);
}

static Status exec_load(Warp *w, const Instr *in, uint32_t mask) {
    const TmaKind *kind = in->data;
    FOR_LANES(mask, l) {
        Tma t = {0};
        if (!issue_load(w, in, kind, l, &t)) return FATAL;
        AsyncOp *op = async_new(w, in, run_load, sizeof(Tma), false);
        memcpy(op->payload, &t, sizeof t);
        copy_times(op, t.box.bytes, 0);
        async_submit(w->machine, op);
    }
    return NEXT;
}

static bool reduction_fits(Warp *w, const Instr *in, const TmaKind *kind, const TensorMap *map) {
    Reduction r = {kind->r.op, (uint8_t)map->element, map->kind, false};
    if (kind->r.op == RED_AND || kind->r.op == RED_OR || kind->r.op == RED_XOR) r.kind = 'b';
    bool bits_of_whole = r.kind != 'b' || map->kind == 'u' || map->kind == 's';
    if (!kind->r.op || (reduction_allowed(&r) && bits_of_whole)) return true;
    fail(w, in, FINDING_DESCRIPTOR, "the reduction does not exist for the tensor map's element type");
    return false;
}

/* Lanes with the same operands as `lane`. Kernels let all lanes of a warp issue the same store, of which
 * ptxas makes one instruction on uniform registers: it counts as one store here. */
static uint32_t same_operands(Warp *w, const Instr *in, uint32_t mask, int lane) {
    const Operand *map = &in->args[0].parts[0], *at = &in->args[0].parts[1], *from = &in->args[1];
    uint32_t lanes = 0;
    FOR_LANES(mask, l) {
        bool same = lane_address(w, in, map, (int)l) == lane_address(w, in, map, lane) &&
                    lane_address(w, in, from, (int)l) == lane_address(w, in, from, lane);
        for (uint32_t i = 0; same && i < at->count; i++)
            same = lane_value(w, in, &at->parts[i], (int)l) == lane_value(w, in, &at->parts[i], lane);
        if (same) lanes |= 1u << l;
    }
    return lanes;
}

static Status exec_store(Warp *w, const Instr *in, uint32_t mask) {
    const TmaKind *kind = in->data;
    uint32_t left = mask;
    FOR_LANES(mask, l) {
        if (!(left >> l & 1)) continue;
        uint32_t lanes = kind->r.op ? 1u << l : same_operands(w, in, left, (int)l);
        left &= ~lanes;
        Tma t = {0};
        if (!read_box_operands(w, in, kind, 0, l, &t.box) || !store_begins_inside(w, in, &t.box)) return FATAL;
        if (!reduction_fits(w, in, kind, &t.box.map)) return FATAL;
        Cta *from = box_in_shared(w, in, &t.box, lane_address(w, in, &in->args[1], (int)l), &t.offset);
        if (!from) return FATAL;
        if (from != w->cta) return fail(w, in, FINDING_BOUNDS, "the source is another CTA's shared memory");
        t.transfer = transfer_open(w, lanes, true);
        AsyncOp *op = async_new(w, in, run_store, sizeof(Tma) + t.box.bytes, false);
        memcpy(op->payload, &t, sizeof t);
        copy_times(op, t.box.bytes, 1);
        async_submit(w->machine, op);
    }
    return NEXT;
}

static Status exec_prefetch(Warp *w, const Instr *in, uint32_t mask) {
    FOR_LANES(mask, l) {
        Box box = {0};
        if (!read_box_operands(w, in, in->data, 0, l, &box)) return FATAL;
    }
    return NEXT;
}

/* ---------------------------------------------------------------- decoding */
static bool take_rank(const char *part, TmaKind *kind) {
    if (part[0] < '1' || part[0] > '5' || part[1] != 'd' || part[2]) return false;
    kind->rank = (uint8_t)(part[0] - '0');
    return true;
}

static bool take_modifier(const char *p, TmaKind *kind, bool *barrier, bool *group) {
    if (!strcmp(p, "tile")) return true;
    if (!strcmp(p, "tile::gather4") || !strcmp(p, "tile::scatter4")) kind->gather = 1;
    else if (!strcmp(p, "mbarrier::complete_tx::bytes")) *barrier = true;
    else if (!strcmp(p, "bulk_group")) *group = true;
    else if (!strcmp(p, "multicast::cluster")) kind->multicast = 1;
    else if (!strcmp(p, "cta_group::1")) kind->pair = 0;
    else if (!strcmp(p, "cta_group::2")) kind->pair = 1;
    else if (!strcmp(p, "L2::cache_hint")) kind->hint = 1;
    else if (!kind->r.op && red_op(p) && red_op(p) < RED_EXCH) kind->r.op = (uint8_t)red_op(p);
    else return false;
    return true;
}

/* A map with as many coordinates as the mode takes. */
static bool map_operand(const Operand *o, const TmaKind *kind) {
    return o->kind == OPERAND_VECTOR && o->count == 2 && o->parts[0].kind == OPERAND_ADDRESS
        && o->parts[1].kind == OPERAND_VECTOR && o->parts[1].count == (kind->gather ? 5 : kind->rank);
}

static Decoded finish_decode(Decode *d, const TmaKind *kind, Exec exec) {
    d->in->data = arena(d->program, sizeof *kind);
    memcpy(d->in->data, kind, sizeof *kind);
    d->in->exec = exec;
    d->in->class_ = CLASS_TMA;
    return DECODED;
}

static Decoded decode_tensor(Decode *d, int tensor, char *why, size_t n) {
    Instr *in = d->in;
    TmaKind kind = {0};
    bool reduces = is(d, 1, "reduce"), prefetch = is(d, tensor - 1, "prefetch");
    bool barrier = false, group = false;
    int from = tensor + 4;
    if (d->n < tensor + 4 || !take_rank(d->part[tensor + 1], &kind))
        return deny(why, n, "no such copy: %s", d->text);
    bool load = !prefetch && !is(d, tensor + 2, "global");
    kind.own = is(d, tensor + 2, "shared::cta");
    bool places = prefetch ? is(d, tensor + 2, "L2") && is(d, tensor + 3, "global")
                : load ? (kind.own || is(d, tensor + 2, "shared::cluster")) && is(d, tensor + 3, "global")
                       : is(d, tensor + 3, "shared::cta");
    if (!places) return deny(why, n, "no such copy: %s", d->text);
    for (int i = from; i < d->n; i++)
        if (!take_modifier(d->part[i], &kind, &barrier, &group))
            return deny(why, n, "the modifier .%s is not modelled", d->part[i]);
    if ((kind.gather && kind.rank != 2) || reduces != (kind.r.op != 0) || barrier != load
        || group != (!load && !prefetch) || (reduces && (load || kind.gather))
        || ((kind.multicast || kind.pair) && !load))
        return deny(why, n, "no such copy: %s", d->text);
    int map = load ? 1 : 0, others = load ? 3 + kind.multicast : prefetch ? 1 : 2;
    if (in->n != others + kind.hint || !map_operand(&in->args[map], &kind)
        || (load && (in->args[0].kind != OPERAND_ADDRESS || in->args[2].kind != OPERAND_ADDRESS))
        || (!load && !prefetch && in->args[1].kind != OPERAND_ADDRESS))
        return deny(why, n, "operands that %s does not take", d->text);
    return finish_decode(d, &kind, load ? exec_load : prefetch ? exec_prefetch : exec_store);
}

Decoded decode_tma(Decode *d, char *why, size_t n) {
    if (is(d, 0, "tensormap")) return deny(why, n, "tensor maps made on the device are not modelled");
    if (!is(d, 0, "cp")) return NOT_MINE;
    for (int i = 3; i < d->n && i < 6; i++)
        if (is(d, i, "tensor")) return decode_tensor(d, i, why, n);
    return NOT_MINE;
}
