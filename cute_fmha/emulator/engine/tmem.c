/* tcgen05.ld and tcgen05.st, their waits, fences.
 *
 * The ISA lets tcgen05 accesses of several threads be ordered in two ways: by what orders memory (release and
 * acquire), and by tcgen05.fence around what only orders execution (.relaxed operations). Either will do
 * here. With strict_tcgen05_fence the second one is required: asynchronous tcgen05 instructions are not in
 * order with anything else in their thread unless the ISA says so, and of waits for other threads it says
 * so of the fences alone. Kernels of FlashAttention-4 and CUTLASS have no fences (notes/emulator.md).
 *
 * In time: a store captures its registers when it is issued and lands in its warp's order, at the latest
 * at wait::st. A load takes its values at once, but counts as a read until it is over: what may overwrite
 * the cells meanwhile is a race. It is over at wait::ld, or when one of its registers is used, as the ISA
 * lets a use of the register wait for the value (canonical synchronization patterns, "register
 * dependencies, same thread"); with strict_tmem_load such a use is a finding.
 *
 * .pack::16b and .unpack::16b use the low halves of two cells for one register; unpacking writes zeros to
 * the high halves. Alignments of columns are those that a B300 was seen to trap at.
 */
#include "sync.h"
#include "tensor.h"

typedef enum { SHAPE_32x32B, SHAPE_16x64B, SHAPE_16x128B, SHAPE_16x256B, SHAPE_16x32Bx2, SHAPES } Shape;
typedef enum { REDUCE_NONE, REDUCE_F32, REDUCE_U32, REDUCE_S32 } Reduce;
typedef struct {
    uint8_t shape, packed, reduce, maximum, absolute, nan;
    uint8_t address, vector, result;      /* operands; result: of a reduction */
    int registers, columns, split;        /* columns of one access; 16x32bx2 makes two, split apart */
    uint32_t *place;                      /* [registers][32]: column << 8 | lane; NULL for 32x32b unpacked */
} Access;

/* ---------------------------------------------------------------- what a load or store touches */
/* The value that all lanes must share. */
static bool uniform_address(Warp *warp, const Instr *in, const Operand *o, uint32_t mask, uint32_t *value) {
    int first = __builtin_ctz(mask);
    *value = (uint32_t)lane_address(warp, in, o, first);
    const Operand *base = &o->parts[0];
    if (base->kind != OPERAND_REGISTER || base->width != 4) return true;
    const uint32_t *lanes = src32(warp, in, base, mask);
    uint32_t differs = 0;
    FOR_LANES(mask, lane) differs |= lanes[lane] ^ lanes[first];
    if (differs) fail(warp, in, FINDING_TMEM, "the lanes of a warp give different tensor memory addresses");
    return !differs;
}

/* Cell of register r of thread t, relative to the address: the fragment layouts of the PTX ISA. */
static void fragment_cell(Shape shape, int split, int r, int t, int *lane, int *column) {
    switch (shape) {
    case SHAPE_16x64B: *lane = t / 4 + t % 2 * 8, *column = 2 * r + t / 2 % 2; break;
    case SHAPE_16x128B: *lane = t / 4 + r % 2 * 8, *column = r / 2 * 4 + t % 4; break;
    case SHAPE_16x256B: *lane = t / 4 + r / 2 % 2 * 8, *column = r / 4 * 8 + t % 4 * 2 + r % 2; break;
    case SHAPE_16x32Bx2: *lane = t % 16, *column = r + t / 16 * split; break;
    default: *lane = t, *column = r; break;
    }
}

static void map_fragment(const Decode *d, Access *a) {
    a->place = arena(d->program, (size_t)a->registers * LANES * sizeof *a->place);
    for (int r = 0; r < a->registers; r++)
        for (int t = 0; t < LANES; t++) {
            int lane, column;
            fragment_cell(a->shape, 0, r, t, &lane, &column);
            if (a->packed) column *= 2;
            if (a->shape == SHAPE_16x32Bx2) column += t / 16 * a->split;
            a->place[r * LANES + t] = (uint32_t)column << 8 | (uint32_t)lane;
        }
}

static Status find_span(Warp *warp, const Instr *in, const Access *a, uint32_t mask, Span *span) {
    uint32_t address;
    if (!uniform_address(warp, in, &in->args[a->address], mask, &address)) return FATAL;
    int lane = tmem_lane(address), column = tmem_column(address), own = warp->index % 4 * 32;
    bool half = a->shape != SHAPE_32x32B;
    if (lane != own && !(half && lane == own + 16))
        return fail(warp, in, FINDING_TMEM, "warp %d may use lanes %d..%d only%s, not 0x%08x", warp->index,
                    own, own + 31, half ? " (from their first or their 16th)" : "", address);
    bool even = a->packed || a->reduce || (half && a->shape != SHAPE_16x32Bx2);
    if (even && column % 2)
        return fail(warp, in, FINDING_ALIGNMENT, "column %d: %s needs an even one", column, in->name);
    int second = a->shape == SHAPE_16x32Bx2 ? column + a->split : -1;
    *span = (Span){lane, half ? 16 : 32, column, a->columns, second};
    if (!tmem_allocated(warp->machine, warp, in, warp->cta, column, a->columns)) return FATAL;
    if (span->second >= 0 && !tmem_allocated(warp->machine, warp, in, warp->cta, span->second, a->columns))
        return FATAL;
    return NEXT;
}

static void record_span(Agent *agent, Cta *cta, const Span *span, bool write, const Instr *in) {
    access_tmem(agent, cta, span->lane, span->lanes, span->column, span->columns, write, in);
    if (span->second >= 0)
        access_tmem(agent, cta, span->lane, span->lanes, span->second, span->columns, write, in);
}

static Traffic *traffic_of(Warp *warp) {
    if (!warp->tmem_traffic && !(warp->tmem_traffic = calloc(1, sizeof(Traffic)))) abort();
    return warp->tmem_traffic;
}

void tmem_free_warp(Warp *warp) {
    Traffic *traffic = warp->tmem_traffic;
    if (traffic) clock_free(&traffic->stored);
    free(traffic);
    warp->tmem_traffic = NULL;
}

/* ---------------------------------------------------------------- loads */
static void mark_loaded(Warp *warp, const Instr *in, uint32_t defined) {
    const Access *a = in->data;
    const Operand *parts = in->args[a->vector].parts;
    for (int r = 0; r < a->registers; r++)
        if (parts[r].kind == OPERAND_REGISTER) warp->defined[parts[r].index] = defined;
    if (a->reduce && in->args[a->result].kind == OPERAND_REGISTER)
        warp->defined[in->args[a->result].index] = defined;
}

/* The load is over now: what overwrote its cells since it was issued is found here. */
static void settle_load(Warp *warp, const PendingLoad *load) {
    mark_loaded(warp, load->in, FULL_MASK);
    if (load->time != agent_time(&warp->agent))
        record_span(&warp->agent, warp->cta, &load->span, false, load->in);
}

static void forget_load(Traffic *traffic, int i) {
    traffic->n_loads--;
    memmove(&traffic->loads[i], &traffic->loads[i + 1],
            (size_t)(traffic->n_loads - i) * sizeof *traffic->loads);
}

static void remember_load(Warp *warp, const Instr *in, const Span *span) {
    Traffic *traffic = traffic_of(warp);
    if (traffic->n_loads == PENDING_LOADS) { /* loads that nobody uses or waits for */
        settle_load(warp, &traffic->loads[0]);
        forget_load(traffic, 0);
    }
    traffic->loads[traffic->n_loads++] = (PendingLoad){*span, agent_time(&warp->agent), in};
    mark_loaded(warp, in, 0);
}

static bool loads_register(const Instr *in, uint32_t index) {
    const Access *a = in->data;
    const Operand *parts = in->args[a->vector].parts;
    if (a->reduce && in->args[a->result].kind == OPERAND_REGISTER && in->args[a->result].index == index)
        return true;
    for (int r = 0; r < a->registers; r++)
        if (parts[r].kind == OPERAND_REGISTER && parts[r].index == index) return true;
    return false;
}

bool tmem_load_arrives(Warp *warp, uint32_t index) {
    Traffic *traffic = warp->tmem_traffic;
    if (!traffic || warp->machine->config.strict_tmem_load) return false;
    for (int i = traffic->n_loads; i-- > 0;)
        if (loads_register(traffic->loads[i].in, index)) {
            settle_load(warp, &traffic->loads[i]);
            forget_load(traffic, i);
            return true;
        }
    return false;
}

/* For reports of strict_tmem_load: which registers are undefined because of a load. */
static void make_pending(Warp *warp, const Operand *o) {
    if (o->kind != OPERAND_REGISTER) return;
    /* drop those read or overwritten */
    if (warp->n_tmem_loads == warp->c_tmem_loads && warp->n_tmem_loads >= 1024) {
        int kept = 0;
        for (int i = 0; i < warp->n_tmem_loads; i++)
            if (warp->defined[warp->tmem_loads[i]] != FULL_MASK)
                warp->tmem_loads[kept++] = warp->tmem_loads[i];
        warp->n_tmem_loads = kept;
    }
    if (warp->n_tmem_loads == warp->c_tmem_loads) {
        warp->c_tmem_loads = warp->c_tmem_loads ? 2 * warp->c_tmem_loads : 128;
        warp->tmem_loads = realloc(warp->tmem_loads, (size_t)warp->c_tmem_loads * sizeof *warp->tmem_loads);
        if (!warp->tmem_loads) abort();
    }
    warp->tmem_loads[warp->n_tmem_loads++] = o->index;
}

static void load_registers(Warp *warp, const Instr *in, const Access *a, const Span *span) {
    const Operand *parts = in->args[a->vector].parts;
    for (int r = 0; r < a->registers; r++) {
        uint32_t *to = dst32(warp, &parts[r], FULL_MASK);
        if (!a->place) {
            memcpy(to, tmem_cell(warp->cta, span->lane, span->column + r), LANES * sizeof *to);
            continue;
        }
        const uint32_t *from = tmem_cell(warp->cta, span->lane, span->column), *place = a->place + r * LANES;
        for (int t = 0; t < LANES; t++) {
            const uint32_t *cell = from + (place[t] >> 8) * TMEM_LANES + (place[t] & 255);
            to[t] = a->packed ? (cell[0] & 0xffff) | cell[TMEM_LANES] << 16 : *cell;
        }
    }
}

static uint32_t reduce_two(const Access *a, uint32_t x, uint32_t y) {
    if (a->reduce == REDUCE_U32) return (x < y) != a->maximum ? x : y;
    if (a->reduce == REDUCE_S32) return ((int32_t)x < (int32_t)y) != a->maximum ? x : y;
    float f = as_float(x), g = as_float(y);
    if (f != f || g != g) {
        if (a->nan || (f != f && g != g)) return 0x7fffffff;
        return f != f ? y : x;
    }
    if (f == g) return a->maximum ? x & y : x | y; /* -0 is less than +0; else they are equal */
    return (f < g) != a->maximum ? x : y;
}

static void reduce_registers(Warp *warp, const Instr *in, const Access *a) {
    const Operand *parts = in->args[a->vector].parts;
    uint32_t result[LANES], clear = a->absolute ? 0x7fffffff : FULL_MASK;
    for (int r = 0; r < a->registers; r++) {
        const uint32_t *value = (const uint32_t *)(warp->registers + parts[r].offset);
        for (int t = 0; t < LANES; t++)
            result[t] = r ? reduce_two(a, result[t], value[t] & clear) : value[t] & clear;
    }
    memcpy(dst32(warp, &in->args[a->result], FULL_MASK), result, sizeof result);
}

static Status exec_load(Warp *warp, const Instr *in, uint32_t mask) {
    const Access *a = in->data;
    Machine *machine = warp->machine;
    Span span;
    Status status = whole_warp(warp, in, mask);
    if (status == NEXT) status = find_span(warp, in, a, mask, &span);
    if (status != NEXT) return status;
    record_span(&warp->agent, warp->cta, &span, false, in);
    if (wide_clocks) warp->tensor_loaded = agent_time(&warp->agent);
    load_registers(warp, in, a, &span);
    if (a->reduce) reduce_registers(warp, in, a);
    int accesses = 1 + (span.second >= 0);
    machine->counters.tmem_read_bytes += (uint64_t)span.lanes * (uint64_t)(a->columns * accesses) * 4;
    warp->now += a->columns * accesses - 1;
    if (machine->config.races || machine->config.strict_tmem_load) remember_load(warp, in, &span);
    if (machine->config.strict_tmem_load) {
        for (int r = 0; r < a->registers; r++) make_pending(warp, &in->args[a->vector].parts[r]);
        if (a->reduce) make_pending(warp, &in->args[a->result]);
    }
    return NEXT;
}

static Status exec_wait_load(Warp *warp, const Instr *in, uint32_t mask) {
    Status status = whole_warp(warp, in, mask);
    Traffic *traffic = warp->tmem_traffic;
    if (status != NEXT || !traffic) return status;
    for (int i = 0; i < traffic->n_loads; i++) settle_load(warp, &traffic->loads[i]);
    traffic->n_loads = warp->n_tmem_loads = 0;
    return NEXT;
}

/* ---------------------------------------------------------------- stores */
typedef struct { const Access *access; Span span; uint32_t value[][LANES]; } Store;

static void store_registers(Cta *cta, const Store *store) {
    const Access *a = store->access;
    const Span *span = &store->span;
    for (int r = 0; r < a->registers; r++) {
        const uint32_t *value = store->value[r];
        if (!a->place) {
            memcpy(tmem_cell(cta, span->lane, span->column + r), value, sizeof store->value[r]);
            continue;
        }
        uint32_t *to = tmem_cell(cta, span->lane, span->column);
        const uint32_t *place = a->place + r * LANES;
        for (int t = 0; t < LANES; t++) {
            uint32_t *cell = to + (place[t] >> 8) * TMEM_LANES + (place[t] & 255);
            *cell = a->packed ? value[t] & 0xffff : value[t];
            if (a->packed) cell[TMEM_LANES] = value[t] >> 16;
        }
    }
}

static bool run_store(Machine *machine, AsyncOp *op) {
    const Store *store = op->payload;
    Traffic *traffic = op->warp->tmem_traffic;
    const Span *span = &store->span;
    if (!tmem_allocated(machine, op->warp, op->in, op->cta, span->column, span->columns)) return true;
    if (span->second >= 0 && !tmem_allocated(machine, op->warp, op->in, op->cta, span->second, span->columns))
        return true;
    acquire_from(&op->agent, &traffic->stored); /* stores of a warp land in order */
    clock_join_view(&op->clock, &traffic->stored);
    record_span(&op->agent, op->cta, span, true, op->in);
    store_registers(op->cta, store);
    tensor_view_own(&op->agent);
    clock_join_view(&traffic->stored, &op->clock);
    release_to(&traffic->stored, &op->agent);
    return true;
}

static void store_landed(Machine *machine, AsyncOp *op) {
    (void)machine;
    if (op->warp->last_tmem_store == op) op->warp->last_tmem_store = NULL;
}

static bool overlap(int a, int n, int b, int m) { return a < b + m && b < a + n; }

static bool spans_overlap(const Span *a, const Span *b) {
    if (!overlap(a->lane, a->lanes, b->lane, b->lanes)) return false;
    int from[2] = {a->column, a->second}, to[2] = {b->column, b->second};
    for (int i = 0; i < 4; i++)
        if (from[i / 2] >= 0 && to[i % 2] >= 0 && overlap(from[i / 2], a->columns, to[i % 2], b->columns))
            return true;
    return false;
}

/* A store over cells that a load of the same warp may still read. */
static void check_pending_loads(Warp *warp, const Instr *in, const Span *span) {
    const Traffic *traffic = warp->tmem_traffic;
    for (int i = 0; traffic && i < traffic->n_loads; i++)
        if (spans_overlap(span, &traffic->loads[i].span)) {
            report(warp->machine, FINDING_PENDING_LOAD, warp, in, false,
                   "columns %d..%d are stored to before the load of line %u was waited for", span->column,
                   span->column + span->columns - 1, traffic->loads[i].in->line);
            return;
        }
}

static Status exec_store(Warp *warp, const Instr *in, uint32_t mask) {
    const Access *a = in->data;
    Span span;
    Status status = whole_warp(warp, in, mask);
    if (status == NEXT) status = find_span(warp, in, a, mask, &span);
    if (status != NEXT) return status;
    const uint32_t *from[128]; /* reading them completes loads, which must come before the store */
    for (int r = 0; r < a->registers; r++) from[r] = src32(warp, in, &in->args[a->vector].parts[r], mask);
    check_pending_loads(warp, in, &span);
    const size_t bytes = sizeof(Store) + (size_t)a->registers * LANES * sizeof(uint32_t);
    AsyncOp *op = async_new(warp, in, run_store, bytes, false);
    Store *store = op->payload;
    store->access = a;
    store->span = span;
    for (int r = 0; r < a->registers; r++) memcpy(store->value[r], from[r], sizeof store->value[r]);
    int columns = a->columns * (1 + (span.second >= 0));
    warp->machine->counters.tmem_write_bytes += (uint64_t)span.lanes * (uint64_t)columns * 4;
    warp->now += columns - 1;
    op->queue = &traffic_of(warp)->stores;
    op->pending = &warp->tmem_stores;
    op->done = store_landed;
    op->lane_class = 3;
    op->start = 0;
    op->finish = 2.0 * columns;
    warp->tmem_stores++;
    warp->last_tmem_store = op;
    async_submit(warp->machine, op);
    return warp->machine->fatal ? FATAL : NEXT;
}

static Status exec_wait_store(Warp *warp, const Instr *in, uint32_t mask) {
    Status status = whole_warp(warp, in, mask);
    Traffic *traffic = warp->tmem_traffic;
    if (status != NEXT || !traffic) return status;
    if (traffic->stores.tail && traffic->stores.tail->finish > warp->now)
        warp->now = traffic->stores.tail->finish;
    async_flush_queue(warp->machine, &traffic->stores);
    acquire_from(&warp->agent, &traffic->stored);
    clock_join_view(&warp->clock, &traffic->stored);
    return warp->machine->fatal ? FATAL : NEXT;
}

static Status exec_fence(Warp *warp, const Instr *in, uint32_t mask) {
    (void)mask;
    if (in->u[0]) tensor_fence_before(&warp->agent);
    else tensor_fence_after(&warp->agent);
    return NEXT;
}

/* ---------------------------------------------------------------- decoding */
static bool find_shape(const Decode *d, Access *a, char *why, size_t size) {
    static const char *const names[SHAPES] = {"32x32b", "16x64b", "16x128b", "16x256b", "16x32bx2"};
    static const int registers[SHAPES] = {1, 1, 2, 4, 1}, columns[SHAPES] = {1, 2, 4, 8, 1};
    int shape = -1, repeat = 0;
    for (int i = 2; i < d->n; i++) {
        for (int s = 0; s < SHAPES; s++)
            if (is(d, i, names[s])) shape = s;
        if (d->part[i][0] == 'x') repeat = atoi(d->part[i] + 1);
    }
    if (shape < 0) return tensor_refuse(why, size, "unknown shape in %s", d->text), false;
    if (repeat < 1 || repeat > 128 || repeat & (repeat - 1) || repeat * registers[shape] > 128)
        return tensor_refuse(why, size, "no such repetition in %s", d->text), false;
    a->shape = (uint8_t)shape;
    a->registers = repeat * registers[shape];
    a->columns = repeat * columns[shape] * (a->packed ? 2 : 1);
    return true;
}

static bool find_reduction(const Decode *d, Access *a, char *why, size_t size) {
    a->maximum = has(d, "max");
    a->absolute = has(d, "abs");
    a->nan = has(d, "NaN");
    a->reduce = has(d, "f32") ? REDUCE_F32 : has(d, "u32") ? REDUCE_U32 : has(d, "s32") ? REDUCE_S32
        : REDUCE_NONE;
    if (!a->reduce || has(d, "max") == has(d, "min") ||
        ((a->absolute || a->nan) && a->reduce != REDUCE_F32) ||
        a->packed)
        return tensor_refuse(why, size, "unknown reduction in %s", d->text), false;
    if (a->registers < 2) return tensor_refuse(why, size, "tcgen05.ld.red needs .x2 at least"), false;
    if (a->shape != SHAPE_32x32B && a->shape != SHAPE_16x32Bx2)
        return tensor_refuse(why, size, "tcgen05.ld.red has the shapes .32x32b and .16x32bx2"), false;
    return true;
}

/* ld: registers, (result,) [address] (, split). st: [address], (split,) registers. */
static bool find_operands(const Instr *in, Access *a, bool load, char *why, size_t size) {
    bool split = a->shape == SHAPE_16x32Bx2;
    int expected = 2 + split + (a->reduce != REDUCE_NONE), at = 0;
    if (in->n != expected)
        return tensor_refuse(why, size, "%d operands instead of %d", in->n, expected), false;
    if (load) a->vector = (uint8_t)at++;
    if (a->reduce) a->result = (uint8_t)at++;
    a->address = (uint8_t)at++;
    if (split) {
        if (in->args[at].kind != OPERAND_IMMEDIATE)
            return tensor_refuse(why, size, "the split must be an immediate"), false;
        a->split = (int)in->args[at++].immediate;
        if (a->split < 0 || a->split >= TMEM_COLUMNS)
            return tensor_refuse(why, size, "no such split: %d", a->split), false;
    }
    if (!load) a->vector = (uint8_t)at++;
    const Operand *vector = &in->args[a->vector];
    if (in->args[a->address].kind != OPERAND_ADDRESS)
        return tensor_refuse(why, size, "the address is missing"), false;
    int count = vector->kind == OPERAND_VECTOR ? vector->count : 1;
    if (count != a->registers)
        return tensor_refuse(why, size, "%d registers instead of %d", count, a->registers), false;
    for (int r = 0; vector->kind == OPERAND_VECTOR && r < count; r++)
        if (vector->parts[r].kind == OPERAND_REGISTER && vector->parts[r].width != 4)
            return tensor_refuse(why, size, "registers must be of 32 bits"), false;
    return true;
}

/* A single register stands for a vector of one. */
static void make_vector(const Decode *d, Operand *o) {
    if (o->kind == OPERAND_VECTOR) return;
    Operand *part = arena(d->program, sizeof *part);
    *part = *o;
    *o = (Operand){.kind = OPERAND_VECTOR, .count = 1, .parts = part};
}

static Decoded decode_access(Decode *d, char *why, size_t size) {
    static const char *const known[] =
        {"sync", "aligned", "32x32b", "16x64b", "16x128b", "16x256b", "16x32bx2", "x1",
        "x2", "x4", "x8", "x16", "x32", "x64", "x128", "b32", "pack::16b", "unpack::16b", "red", "min", "max",
            "abs",
        "NaN", "f32", "u32", "s32", NULL};
    Instr *in = d->in;
    bool load = is(d, 1, "ld"), reduce = has(d, "red");
    const char *bad = unknown_modifier(d, 2, known);
    if (!bad && has(d, load ? "unpack::16b" : "pack::16b")) bad = load ? "unpack::16b" : "pack::16b";
    if (!bad && reduce && !load) bad = "red";
    if (bad) return tensor_refuse(why, size, "modifier .%s of tcgen05.%s is not modelled", bad, d->part[1]);
    Access *a = arena(d->program, sizeof *a);
    a->packed = has(d, "pack::16b") || has(d, "unpack::16b");
    if (!find_shape(d, a, why, size)) return REFUSED;
    if (reduce && !find_reduction(d, a, why, size)) return REFUSED;
    if (!find_operands(in, a, load, why, size)) return REFUSED;
    make_vector(d, &in->args[a->vector]);
    if (a->shape != SHAPE_32x32B || a->packed) map_fragment(d, a);
    in->data = a;
    in->exec = load ? exec_load : exec_store;
    in->flags |= ALIGNED;
    in->class_ = load ? CLASS_TMEM_LOAD : CLASS_TMEM_STORE;
    return DECODED;
}

static Decoded decode_wait(Decode *d, char *why, size_t size) {
    static const char *const known[] = {"sync", "aligned", NULL};
    Instr *in = d->in;
    const char *bad = unknown_modifier(d, 2, known);
    if (bad) return tensor_refuse(why, size, "modifier .%s of tcgen05.%s is not modelled", bad, d->part[1]);
    in->exec = is(d, 1, "wait::ld") ? exec_wait_load : is(d, 1, "wait::st") ? exec_wait_store : exec_fence;
    if (in->exec != exec_fence) in->flags |= ALIGNED;
    in->class_ = in->exec == exec_fence ? CLASS_FENCE : CLASS_WAIT;
    in->u[0] = is(d, 1, "fence::before_thread_sync");
    d->program->tensor_fences |= in->exec == exec_fence;
    return DECODED;
}

Decoded decode_tmem(Decode *d, char *why, size_t size) {
    if (!is(d, 0, "tcgen05") || is(d, 1, "mma")) return NOT_MINE;
    if (is(d, 1, "alloc") || is(d, 1, "dealloc") || is(d, 1, "relinquish_alloc_permit"))
        return decode_tmem_alloc(d, why, size);
    if (is(d, 1, "ld") || is(d, 1, "st")) return decode_access(d, why, size);
    if (is(d, 1, "wait::ld") || is(d, 1, "wait::st") || is(d, 1, "fence::before_thread_sync") ||
        is(d, 1, "fence::after_thread_sync"))
        return decode_wait(d, why, size);
    return decode_tmem_copy(d, why, size);
}
