/* tcgen05.cp, tcgen05.shift and tcgen05.commit: what the tensor pipe does besides multiplying.
 *
 * tcgen05.cp moves a K-major tile of rows of 16 or 32 bytes to 4 or 8 columns. Where row r goes:
 *   128x256b, 128x128b       lane r
 *   4x256b                   lane 32 r (plus the lane of the address)
 *   64x128b.warpx2::02_13    lanes r and r + 64
 *   64x128b.warpx2::01_23    lanes r % 32 + 64 (r / 32), and 32 further
 *   32x128b.warpx4           lanes r, r + 32, r + 64, r + 96
 * With cta_group::2 each CTA of the pair copies from its own shared memory to its own tensor memory.
 * Decompression makes bytes of the 16 elements in a chunk of 16 bytes: of 4 bits each, padded by 64 bits
 * (.b4x16_p64), which come to lie in bits 2..5 of their byte; or of 6, padded by 32 (.b6x16_p32), in 0..5.
 *
 * tcgen05.shift moves 8 columns by one lane: lane i becomes lane i + 1 of before in each part of 32 lanes, the
 * last of which stays. So it was measured on a B200 (published for lane 0 of the address, one CTA); the ISA
 * leaves direction and parts open.
 *
 * tcgen05.commit arrives at mbarriers when everything issued to the pipe before it is done. The ISA says
 * this of what the same thread issued; the pipe is in order, so here it holds for every thread's.
 */
#include "tensor.h"

typedef struct { uint8_t group, rows, chunks, copies, quarters, bits; int row_lanes[2], copy_lanes; } Copy;
typedef struct { const Copy *form; SmemTile tile; int lane, column; } CopyOp;
typedef struct { int column, group; } ShiftOp;
enum { SHIFT_COLUMNS = 8 }; /* 32 bytes */
typedef struct { int n; struct { Cta *cta; uint32_t offset; } target[MAX_CLUSTER]; } CommitOp;

/* ---------------------------------------------------------------- cp */
static int copy_lane(const Copy *f, int row, int copy) {
    return row % 32 * f->row_lanes[0] + row / 32 * f->row_lanes[1] + copy * f->copy_lanes;
}

static void record_copy(AsyncOp *op, Cta *cta, const CopyOp *c) {
    const Copy *f = c->form;
    int step = f->row_lanes[0] == 1 ? 32 : 1; /* rows in adjacent lanes go together */
    for (int copy = 0; copy < f->copies; copy++)
        for (int row = 0; row < f->rows; row += step)
            access_tmem(&op->agent, cta, c->lane + copy_lane(f, row, copy), step, c->column, f->chunks * 4,
                        true, op->in);
}

/* 16 elements of 4 or 6 bits, the first in the lowest ones, as bytes. */
static void decompress(const uint8_t *from, int bits, uint32_t word[4]) {
    for (int i = 0; i < 16; i++) {
        int at = i * bits;
        uint32_t two = from[at / 8] | (uint32_t)from[(at + bits - 1) / 8] << 8;
        if (at / 8 == (at + bits - 1) / 8) two = from[at / 8];
        uint32_t value = two >> at % 8 & ((1u << bits) - 1);
        if (i % 4 == 0) word[i / 4] = 0;
        word[i / 4] |= (bits == 4 ? value << 2 : value) << i % 4 * 8;
    }
}

static bool copy_share(Machine *machine, AsyncOp *op, Cta *cta, const CopyOp *c) {
    const Copy *f = c->form;
    const Geometry *g = tile_geometry(&c->tile, MAJOR_K, f->rows, f->chunks);
    if (!tmem_allocated(machine, op->warp, op->in, cta, c->column, f->chunks * 4)) return false;
    const uint8_t *memory = tile_access(machine, op, cta, &c->tile, g);
    if (!memory) return false;
    record_copy(op, cta, c);
    for (int row = 0; row < f->rows; row++)
        for (int chunk = 0; chunk < f->chunks; chunk++) {
            uint32_t word[4];
            const uint8_t *from = memory + g->chunk[row * f->chunks + chunk];
            if (f->bits) decompress(from, f->bits, word);
            else memcpy(word, from, sizeof word);
            for (int copy = 0; copy < f->copies; copy++)
                for (int i = 0; i < 4; i++)
                    *tmem_cell(cta, c->lane + copy_lane(f, row, copy), c->column + chunk * 4 + i) = word[i];
        }
    machine->counters.tmem_write_bytes += (uint64_t)(f->rows * f->chunks * f->copies) * 16;
    machine->counters.shared_read_bytes += (uint64_t)(f->rows * f->chunks) * 16;
    return true;
}

static bool run_copy(Machine *machine, AsyncOp *op) {
    const CopyOp *c = op->payload;
    if (c->form->group == 1) {
        copy_share(machine, op, op->cta, c);
        return true;
    }
    for (int i = 0; i < 2; i++)
        if (!copy_share(machine, op, op->cta->cluster->cta[(op->cta->rank & ~1) + i], c)) break;
    return true;
}

static Status exec_copy(Warp *warp, const Instr *in, uint32_t mask) {
    const Copy *f = in->data;
    Cta *pair[2];
    if (f->group == 2 && !cta_pair(warp, in, pair)) return FATAL;
    FOR_LANES(mask, lane) {
        char why[256];
        bool unmodelled;
        CopyOp c = {.form = f};
        uint32_t address = (uint32_t)lane_address(warp, in, &in->args[0], (int)lane);
        if (!smem_descriptor(lane_value(warp, in, &in->args[1], (int)lane), &c.tile, &unmodelled, why,
                             sizeof why))
            return fail(warp, in, unmodelled ? FINDING_UNMODELLED : FINDING_DESCRIPTOR, "%s", why);
        c.lane = tmem_lane(address);
        c.column = tmem_column(address);
        if (c.lane >= (f->quarters ? 32 : 1))
            return fail(warp, in, FINDING_DESCRIPTOR, "%s cannot begin at lane %d", in->name, c.lane);
        if (c.column % 4)
            return fail(warp, in, FINDING_ALIGNMENT, "column %d: %s needs a multiple of 4", c.column,
                        in->name);
        AsyncOp *op = async_new(warp, in, run_copy, sizeof c, true);
        memcpy(op->payload, &c, sizeof c);
        op->start = 0;
        op->finish = f->rows * f->chunks * 16 / 128.0;
        async_submit(warp->machine, op);
    }
    return warp->machine->fatal ? FATAL : NEXT;
}

static Decoded decode_copy(Decode *d, char *why, size_t size) {
    static const struct { const char *shape, *multicast; Copy form; } forms[] = {
        {"128x256b", NULL, {.rows = 128, .chunks = 2, .copies = 1, .row_lanes = {1, 32}}},
        {"128x128b", NULL, {.rows = 128, .chunks = 1, .copies = 1, .row_lanes = {1, 32}}},
        {"4x256b", NULL, {.rows = 4, .chunks = 2, .copies = 1, .quarters = 1, .row_lanes = {32, 0}}},
        {"64x128b", "warpx2::02_13", {.rows = 64, .chunks = 1, .copies = 2, .row_lanes = {1, 32},
                                      .copy_lanes = 64}},
        {"64x128b", "warpx2::01_23", {.rows = 64, .chunks = 1, .copies = 2, .row_lanes = {1, 64},
                                      .copy_lanes = 32}},
        {"32x128b", "warpx4", {.rows = 32, .chunks = 1, .copies = 4, .row_lanes = {1, 0}, .copy_lanes = 32}},
    };
    static const char *const known[] =
        {"cta_group::1", "cta_group::2", "128x256b", "128x128b", "4x256b", "64x128b",
                                        "32x128b", "warpx2::02_13", "warpx2::01_23", "warpx4", "b8x16",
                                        "b4x16_p64", "b6x16_p32", NULL};
    Instr *in = d->in;
    const char *bad = unknown_modifier(d, 2, known);
    int bits = has(d, "b4x16_p64") ? 4 : has(d, "b6x16_p32") ? 6 : 0;
    if (!bad && has(d, "b8x16") != (bits != 0)) bad = "b8x16 without its source format, or the reverse";
    if (bad) return tensor_refuse(why, size, "modifier .%s of tcgen05.cp is not modelled", bad);
    int group = cta_group(d, why, size);
    if (!group) return REFUSED;
    if (in->n != 2 || in->args[0].kind != OPERAND_ADDRESS) return tensor_refuse(why, size, "wrong operands");
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++) {
        bool multicast = has(d, "warpx2::02_13") || has(d, "warpx2::01_23") || has(d, "warpx4");
        if (!has(d, forms[i].shape) || (forms[i].multicast ? !has(d, forms[i].multicast) : multicast))
            continue;
        Copy *form = arena(d->program, sizeof *form);
        *form = forms[i].form;
        form->group = (uint8_t)group;
        form->bits = (uint8_t)bits;
        in->data = form;
        in->exec = exec_copy;
        in->class_ = CLASS_MMA;
        return DECODED;
    }
    return tensor_refuse(why, size, "no such shape and multicast: %s", d->text);
}

/* ---------------------------------------------------------------- shift */
static bool shift_share(Machine *machine, AsyncOp *op, Cta *cta, int column) {
    if (!tmem_allocated(machine, op->warp, op->in, cta, column, SHIFT_COLUMNS)) return false;
    for (int part = 0; part < TMEM_LANES; part += LANES) {
        access_tmem(&op->agent, cta, part + 1, LANES - 1, column, SHIFT_COLUMNS, false, op->in);
        access_tmem(&op->agent, cta, part, LANES - 1, column, SHIFT_COLUMNS, true, op->in);
        for (int c = 0; c < SHIFT_COLUMNS; c++) {
            uint32_t *cell = tmem_cell(cta, part, column + c);
            memmove(cell, cell + 1, (LANES - 1) * sizeof *cell);
        }
    }
    return true;
}

static bool run_shift(Machine *machine, AsyncOp *op) {
    const ShiftOp *s = op->payload;
    Cluster *cluster = op->cta->cluster;
    if (s->group == 1) shift_share(machine, op, op->cta, s->column);
    else if (shift_share(machine, op, cluster->cta[op->cta->rank & ~1], s->column))
        shift_share(machine, op, cluster->cta[op->cta->rank | 1], s->column);
    return true;
}

static Status exec_shift(Warp *warp, const Instr *in, uint32_t mask) {
    Cta *pair[2];
    int group = (int)in->u[0];
    if (group == 2 && !cta_pair(warp, in, pair)) return FATAL;
    FOR_LANES(mask, lane) {
        uint32_t address = (uint32_t)lane_address(warp, in, &in->args[0], (int)lane);
        if (tmem_lane(address) % LANES)
            return fail(warp, in, FINDING_DESCRIPTOR, "%s at lane %d: it needs a multiple of 32", in->name,
                        tmem_lane(address));
        if (tmem_lane(address))
            return fail(warp, in, FINDING_UNMODELLED, "%s at lane %d: the ISA does not say what moves", in->name,
                        tmem_lane(address));
        AsyncOp *op = async_new(warp, in, run_shift, sizeof(ShiftOp), true);
        *(ShiftOp *)op->payload = (ShiftOp){tmem_column(address), group};
        op->start = 0;
        op->finish = 12; /* cycles between two of them on a B200, as published */
        async_submit(warp->machine, op);
    }
    return warp->machine->fatal ? FATAL : NEXT;
}

static Decoded decode_shift(Decode *d, char *why, size_t size) {
    static const char *const known[] = {"cta_group::1", "cta_group::2", "down", NULL};
    Instr *in = d->in;
    const char *bad = unknown_modifier(d, 2, known);
    if (bad) return tensor_refuse(why, size, "modifier .%s of tcgen05.shift is not modelled", bad);
    int group = cta_group(d, why, size);
    if (!group) return REFUSED;
    if (!has(d, "down") || in->n != 1 || in->args[0].kind != OPERAND_ADDRESS)
        return tensor_refuse(why, size, "no such operation: %s", d->text);
    in->u[0] = (uint64_t)group;
    in->exec = exec_shift;
    in->class_ = CLASS_MMA;
    return DECODED;
}

/* ---------------------------------------------------------------- commit */
static bool run_commit(Machine *machine, AsyncOp *op) {
    const CommitOp *c = op->payload;
    for (int i = 0; i < c->n; i++) {
        Cta *cta = c->target[i].cta;
        MBarrier *bar = mbarrier_at(op->warp, op->in, cta, c->target[i].offset);
        if (!bar) return true;
        mbarrier_arrive(machine, bar, 1, &op->agent, op->finish, op->in);
    }
    return true;
}

static bool commit_targets(Warp *warp, const Instr *in, int lane, CommitOp *c) {
    uint64_t address = lane_address(warp, in, &in->args[0], lane);
    uint32_t offset;
    if (address >> 32 && address >> 60 != SHARED_WINDOW >> 60)
        return fail(warp, in, FINDING_BOUNDS, "0x%llx is no shared memory address",
                    (unsigned long long)address), false;
    Cta *cta = shared_target(warp, in, (uint32_t)address, 8, &offset);
    if (!cta) return false;
    if (in->n == 1) {
        c->n = 1;
        c->target[0].cta = cta;
        c->target[0].offset = offset;
        return true;
    }
    Cluster *cluster = warp->cta->cluster;
    uint32_t mask = (uint32_t)lane_value(warp, in, &in->args[1], lane) & 0xffff;
    if (!mask || mask >> cluster->n)
        return fail(warp, in, FINDING_BARRIER, "multicast mask 0x%x in a cluster of %d CTAs", mask,
                    cluster->n), false;
    FOR_LANES(mask, rank) {
        c->target[c->n].cta = cluster->cta[rank];
        c->target[c->n++].offset = offset;
    }
    return true;
}

static Status exec_commit(Warp *warp, const Instr *in, uint32_t mask) {
    FOR_LANES(mask, lane) {
        CommitOp c = {0};
        if (!commit_targets(warp, in, (int)lane, &c)) return FATAL;
        AsyncOp *op = async_new(warp, in, run_commit, sizeof c, true);
        tensor_fence_before(&op->agent);
        memcpy(op->payload, &c, sizeof c);
        op->start = 0;
        op->finish = 1e-3; /* it takes no time of the pipe */
        async_submit(warp->machine, op);
    }
    return warp->machine->fatal ? FATAL : NEXT;
}

static Decoded decode_commit(Decode *d, char *why, size_t size) {
    static const char *const known[] =
        {"cta_group::1", "cta_group::2", "mbarrier::arrive::one", "shared::cluster",
                                        "multicast::cluster", "b64", NULL};
    Instr *in = d->in;
    const char *bad = unknown_modifier(d, 2, known);
    if (bad) return tensor_refuse(why, size, "modifier .%s of tcgen05.commit is not modelled", bad);
    if (!cta_group(d, why, size)) return REFUSED;
    if (!has(d, "mbarrier::arrive::one"))
        return tensor_refuse(why, size, "tcgen05.commit without .mbarrier::arrive::one");
    if (in->n != 1 + has(d, "multicast::cluster") || in->args[0].kind != OPERAND_ADDRESS)
        return tensor_refuse(why, size, "wrong operands");
    in->exec = exec_commit;
    in->class_ = CLASS_MMA;
    return DECODED;
}

Decoded decode_tmem_copy(Decode *d, char *why, size_t size) {
    if (is(d, 1, "cp")) return decode_copy(d, why, size);
    if (is(d, 1, "commit")) return decode_commit(d, why, size);
    if (is(d, 1, "shift")) return decode_shift(d, why, size);
    return tensor_refuse(why, size, "%s is not modelled", d->text);
}
