/* Asynchronous operations and the policies that complete them.
 *
 * An operation belongs to one of two kinds of agents. The tensor pipe of a CTA (of the even CTA for a
 * cta_group::2 operation) works in order, so its clock accumulates what every issuer knew. Everything
 * else takes one of the CTA's asynchronous slots: its clock is the issuer's at issue. Each operation
 * keeps its own clock, because what its issuer learns later must not order it.
 *
 * Times of asynchronous agents go in strides: one operation that releases to several barriers needs
 * times of its own that no later operation of the same slot shares (see agent_tick).
 */
#include "sync.h"

enum { SLOTS = AGENTS - AGENT_ASYNC, MAX_STAGES = 1 << 16 };

AsyncOp *async_running;
static AsyncOp *unused_ops; /* kept with the memory of their clocks */

/* ---------------------------------------------------------------- creation */
static AsyncOp *take_op(void) {
    AsyncOp *op = unused_ops;
    if (!op) {
        op = calloc(1, sizeof *op);
        if (!op) abort();
        return op;
    }
    unused_ops = op->next;
    Clock clock = op->clock;
    memset(op, 0, sizeof *op);
    op->clock = clock;
    return op;
}

static void drop_op(AsyncOp *op) {
    free(op->payload);
    op->payload = NULL;
    op->id = 0;
    op->next = unused_ops;
    unused_ops = op;
}

static Cta *pipe_of(Cta *cta, const Instr *in) {
    return strstr(in->name, "cta_group::2") ? cta->cluster->cta[cta->rank & ~1] : cta;
}

/* The next slot whose last operation the issuer already knows to be over: two operations that share a
 * slot count as ordered, so sharing is harmless only then; the last tcgen05.st has to be in the view of
 * the next. If there is none, the next one in turn. */
static int choose_slot(Cta *cta, const CtaSync *sync, const Clock *issuer, bool store) {
    int first = cta->next_async, chosen = first;
    const uint32_t *times = sync->slot_time;
    ClockPart *part = clock_part((Clock *)issuer, cta->id);
    for (int i = 0; i < SLOTS; i++) {
        int slot = first + i < SLOTS ? first + i : first + i - SLOTS;
        if (times[slot] && !(part && part->seen[AGENT_ASYNC + slot] >= times[slot])) continue;
        if (wide_clocks && store && times[slot] && part->view[AGENT_ASYNC + slot] < sync->slot_store[slot])
            continue;
        chosen = slot;
        break;
    }
    cta->next_async = chosen + 1 < SLOTS ? chosen + 1 : 0;
    return chosen;
}

/* The slot of a new operation, its time advanced. Lanes that execute one instruction together share
 * it: kernels let every lane of a warp start the same copy. */
static int issue_slot(const Warp *warp, const Instr *in) {
    CtaSync *sync = sync_of(warp->cta);
    if (sync->last_issue.warp == warp && sync->last_issue.in == in && sync->last_issue.now == warp->now)
        return sync->last_issue.slot;
    bool store = in->class_ == CLASS_TMEM_STORE;
    int slot = choose_slot(warp->cta, sync, warp->agent.clock, store);
    sync->slot_time[slot] += ASYNC_STRIDE;
    if (store) sync->slot_store[slot] = sync->slot_time[slot];
    sync->last_issue.warp = warp;
    sync->last_issue.in = in;
    sync->last_issue.now = warp->now;
    sync->last_issue.slot = slot;
    return slot;
}

AsyncOp *async_new(Warp *warp, const Instr *in, bool (*run)(Machine *, AsyncOp *), size_t payload_bytes,
                   bool tensor) {
    Cta *cta = warp->cta;
    AsyncOp *op = take_op();
    op->run = run;
    op->cta = cta;
    op->warp = warp;
    op->in = in;
    op->payload = payload_bytes ? calloc(1, payload_bytes) : NULL;
    op->lane_class = tensor ? 2 : 0;
    clock_clear(&op->clock);
    bool races = warp->machine->config.races;
    if (tensor) {
        Cta *pipe = pipe_of(cta, in);
        if (races) {
            tensor_view_own(&warp->agent);
            clock_join(&pipe->tensor_clock, warp->agent.clock);
            clock_join_view(&pipe->tensor_clock, warp->agent.clock);
            ClockPart *own = clock_part_made(&pipe->tensor_clock, pipe->id);
            own->seen[AGENT_TENSOR] = (own->seen[AGENT_TENSOR] / ASYNC_STRIDE + 1) * ASYNC_STRIDE;
            clock_copy(&op->clock, &pipe->tensor_clock);
        }
        op->agent = (Agent){pipe, AGENT_TENSOR, &op->clock};
        op->queue = &pipe->tensor;
    } else {
        int slot = 0;
        if (races) {
            slot = issue_slot(warp, in);
            tensor_view_own(&warp->agent);
            clock_copy(&op->clock, warp->agent.clock);
            clock_part_made(&op->clock, cta->id)->seen[AGENT_ASYNC + slot] = sync_of(cta)->slot_time[slot];
        }
        op->agent = (Agent){cta, AGENT_ASYNC + slot, &op->clock};
    }
    agent_tick(&warp->agent); /* what the issuer does from here on is not before the operation */
    return op;
}

/* ---------------------------------------------------------------- running */
static void unlink_op(Machine *machine, AsyncOp *op) {
    *(op->previous ? &op->previous->next : &machine->pending_head) = op->next;
    *(op->next ? &op->next->previous : &machine->pending_tail) = op->previous;
    machine->n_pending--;
    op->next = op->previous = NULL;
    if (op->queue) { /* only the head of a queue ever runs */
        op->queue->head = op->next_in_queue;
        if (!op->queue->head) op->queue->tail = NULL;
    }
}

static bool runnable(const AsyncOp *op) { return !op->queue || op->queue->head == op; }

static void finish_op(Machine *machine, AsyncOp *op) {
    unlink_op(machine, op);
    op->cta->async_ops--;
    if (op->pending) (*op->pending)--;
    if (op->done) op->done(machine, op);
    if (op->cta->id == machine->config.trace_cta)
        trace_event(machine, op->cta, (Event){.start = op->start, .finish = op->finish,
                    .lane = -1 - (int32_t)op->lane_class, .pc = op->in ? op->in->pc : 0, .kind = 2});
    drop_op(op);
}

/* One stage of one operation; true if that was the last. */
static bool run_stage(Machine *machine, AsyncOp *op) {
    AsyncOp *outer = async_running;
    async_running = op;
    bool over = op->run(machine, op);
    async_running = outer;
    machine->progress = true;
    if (over) finish_op(machine, op);
    return over;
}

static void run_all_stages(Machine *machine, AsyncOp *op) {
    for (int i = 0; i < MAX_STAGES && !machine->fatal; i++)
        if (run_stage(machine, op)) return;
}

/* Modelled time: an operation starts when it is issued and its pipe is free. */
static void set_times(AsyncOp *op) {
    static const double defaults[4] = {700, 700, 32, 100};
    double duration = op->finish - op->start;
    if (duration <= 0) duration = defaults[op->lane_class & 3];
    op->start = op->warp->now;
    if (op->queue && op->queue->tail && op->queue->tail->finish > op->start)
        op->start = op->queue->tail->finish;
    Cta *pipe = op->agent.index == AGENT_TENSOR ? op->agent.cta : NULL;
    if (pipe && pipe->tensor_free > op->start) op->start = pipe->tensor_free;
    op->finish = op->start + duration;
    if (pipe) pipe->tensor_free = op->finish;
}

void async_submit(Machine *machine, AsyncOp *op) {
    set_times(op);
    op->id = ++machine->next_op;
    op->next = op->next_in_queue = NULL;
    op->previous = machine->pending_tail;
    *(op->previous ? &op->previous->next : &machine->pending_head) = op;
    machine->pending_tail = op;
    machine->n_pending++;
    machine->counters.async_operations++;
    op->cta->async_ops++;
    if (op->queue) {
        *(op->queue->tail ? &op->queue->tail->next_in_queue : &op->queue->head) = op;
        op->queue->tail = op;
    }
    if (machine->config.policy == POLICY_EAGER && runnable(op)) run_all_stages(machine, op);
}

/* ---------------------------------------------------------------- policies */
static AsyncOp *random_runnable(Machine *machine) {
    AsyncOp *chosen = NULL;
    uint64_t seen = 0;
    for (AsyncOp *op = machine->pending_head; op; op = op->next)
        if (runnable(op) && next_random(machine) % ++seen == 0) chosen = op;
    return chosen;
}

bool async_run_oldest(Machine *machine) {
    AsyncOp *op = machine->pending_head; /* queues are in order, so the oldest heads its queue */
    if (op && machine->config.policy == POLICY_RANDOM) op = random_runnable(machine);
    if (!op) return false;
    run_stage(machine, op);
    return true;
}

/* Under the random policy the chance to complete differs from seed to seed, so that some seeds keep
 * operations in flight for long and others hardly at all. */
static void random_step(Machine *machine) {
    enum { BATCH = 64 };
    struct { AsyncOp *op; uint64_t id; } batch[BATCH];
    int n = 0;
    unsigned shift = 1 + (unsigned)(machine->config.seed % 4);
    for (AsyncOp *op = machine->pending_head; op && n < BATCH; op = op->next)
        if (runnable(op) && !(next_random(machine) >> 32 & ((1u << shift) - 1))) {
            batch[n].op = op;
            batch[n++].id = op->id;
        }
    for (int i = n - 1; i > 0; i--) { /* operations without a queue land in any order */
        int j = (int)(next_random(machine) % (uint64_t)(i + 1));
        AsyncOp *op = batch[i].op;
        uint64_t id = batch[i].id;
        batch[i] = batch[j];
        batch[j].op = op;
        batch[j].id = id;
    }
    for (int i = 0; i < n && !machine->fatal; i++) /* one may have been flushed by another meanwhile */
        if (batch[i].op->id == batch[i].id && runnable(batch[i].op)) run_stage(machine, batch[i].op);
}

void async_policy_step(Machine *machine) {
    if (!machine->pending_head) return;
    if (machine->config.policy == POLICY_RANDOM) random_step(machine);
    else if (machine->config.policy == POLICY_EAGER)
        while (machine->pending_head && !machine->fatal) run_all_stages(machine, machine->pending_head);
}

bool async_flush_queue(Machine *machine, Queue *queue) {
    bool any = false;
    while (queue->head && !machine->fatal) {
        run_stage(machine, queue->head);
        any = true;
    }
    return any;
}
