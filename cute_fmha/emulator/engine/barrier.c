/* Named barriers, the cluster barrier, fences, cluster launch control, programmatic launch.
 * mbarrier objects are in mbarrier.c. */
#include "sync.h"

enum { NAMED_BARRIERS = 16 };

static uint32_t lanes_of(uint32_t mask) { return (uint32_t)__builtin_popcount(mask); }
static void later(double *time, double now) { if (now > *time) *time = now; }

/* ---------------------------------------------------------------- named barriers (bar, barrier)
 * Threads are counted by the warp: an arrival of all lanes that live counts a whole warp. Lanes of a
 * warp that has split arrive on their own; those that do not exist arrive with the lowest one. */
enum { BAR_SYNC, BAR_ARRIVE, BAR_POPC, BAR_AND, BAR_OR };

static void complete_named(Machine *machine, NamedBarrier *bar) {
    clock_join(&bar->complete, &bar->arriving);
    clock_clear(&bar->arriving);
    memcpy(bar->result, bar->votes, sizeof bar->result);
    bar->arrived = 0;
    bar->warps = 0;
    bar->phase++;
    machine->progress = true;
}

static void leave_named(Warp *warp, const Instr *in, uint32_t mask, NamedBarrier *bar) {
    acquire_from(&warp->agent, &bar->complete);
    later(&warp->now, bar->at);
    if (in->u[0] == BAR_POPC) FOR_LANES(mask, lane) set_lane(warp, &in->args[0], (int)lane, bar->result[0]);
    else if (in->u[0] == BAR_AND) set_pred(warp, &in->args[0], mask, bar->result[1] ? FULL_MASK : 0);
    else if (in->u[0] == BAR_OR) set_pred(warp, &in->args[0], mask, bar->result[2] ? FULL_MASK : 0);
}

/* Exited threads do not hold up a barrier of all threads. */
static uint32_t exited_threads(const Cta *cta, const NamedBarrier *bar) {
    uint32_t exited = 0;
    for (int i = 0; i < cta->n_warps; i++)
        if (!cta->warps[i].live && !(bar->warps >> i & 1)) exited += LANES;
    return exited;
}

static bool is_complete(const Cta *cta, const NamedBarrier *bar) {
    if (bar->arrived >= bar->expected) return true;
    return bar->everyone && bar->arrived + exited_threads(cta, bar) >= bar->expected;
}

/* The same value in all lanes, or a finding. */
static bool uniform(Warp *warp, const Instr *in, const Operand *o, uint32_t mask, uint32_t *value) {
    bool first = true;
    FOR_LANES(mask, lane) {
        uint32_t of_lane = (uint32_t)lane_value(warp, in, o, (int)lane);
        if (!first && of_lane != *value) {
            fail(warp, in, FINDING_DIVERGENCE, "lanes name different barriers or thread counts: %u and %u",
                 *value, of_lane);
            return false;
        }
        *value = of_lane;
        first = false;
    }
    return true;
}

static void vote(NamedBarrier *bar, uint32_t mask, uint32_t values) {
    if (!bar->arrived) bar->votes[0] = 0, bar->votes[1] = 1, bar->votes[2] = 0;
    bar->votes[0] += lanes_of(values & mask);
    bar->votes[1] &= (values & mask) == mask;
    bar->votes[2] |= (values & mask) != 0;
}

static Status exec_bar(Warp *warp, const Instr *in, uint32_t mask) {
    Fragment *fragment = &warp->fragment[warp->current];
    Cta *cta = warp->cta;
    if (fragment->arrived && warp->wait.kind == WAIT_NAMED) {
        if (warp->wait.named->phase == warp->wait.phase) return block_on(warp, warp->wait);
        leave_named(warp, in, mask, warp->wait.named);
        return NEXT;
    }
    const Operand *args = in->args + (in->u[0] >= BAR_POPC);
    uint32_t id = 0, threads = (uint32_t)cta->n_warps * LANES;
    if (!uniform(warp, in, &args[0], mask, &id)) return FATAL;
    if (in->u[1] && !uniform(warp, in, &args[1], mask, &threads)) return FATAL;
    if (id >= NAMED_BARRIERS) return fail(warp, in, FINDING_BARRIER, "there is no barrier %u", id);
    if (!threads || threads % LANES || threads > (uint32_t)cta->n_warps * LANES)
        return fail(warp, in, FINDING_BARRIER,
                    "barrier %u for %u threads: not a number of whole warps of a CTA of %d",
                    id, threads, cta->n_warps);
    NamedBarrier *bar = &cta->named[id];
    if (bar->arrived && bar->expected != threads)
        report(warp->machine, FINDING_BARRIER, warp, in, false,
               "barrier %u: warp %d arrives for %u threads, others for %u",
               id, warp->index, threads, bar->expected);
    if (!bar->arrived) {
        bar->expected = threads;
        bar->everyone = true;
    }
    bar->everyone &= !in->u[1];
    bool whole = mask == warp->live;
    if (whole && bar->warps >> warp->index & 1)
        report(warp->machine, FINDING_BARRIER, warp, in, false,
               "barrier %u: warp %d arrives twice in phase %u", id,
               warp->index, bar->phase);
    if (in->u[0] >= BAR_POPC) vote(bar, mask, src_pred(warp, in, &args[1 + in->u[1]], mask));
    else vote(bar, 0, 0);
    if (!clock_covers(warp->agent.clock, &bar->complete))
        report(warp->machine, FINDING_BARRIER, warp, in, false,
               "barrier %u: warp %d arrives in phase %u, but nothing tells it that phase %u is over: with "
               "other timing it would arrive twice, or too early", id, warp->index, bar->phase, bar->phase - 1);
    bar->warps |= 1ull << warp->index;
    bar->arrived += whole ? LANES : lanes_of(mask);
    if (!whole && mask & warp->live & -warp->live) bar->arrived += LANES - lanes_of(warp->live);
    release_to(&bar->arriving, &warp->agent);
    later(&bar->at, warp->now);
    if (bar->arrived > bar->expected)
        report(warp->machine, FINDING_BARRIER, warp, in, false,
               "barrier %u: %u threads arrived, %u were expected", id,
               bar->arrived, bar->expected);
    if (is_complete(cta, bar)) {
        complete_named(warp->machine, bar);
        if (in->u[0] != BAR_ARRIVE) leave_named(warp, in, mask, bar);
        return NEXT;
    }
    if (in->u[0] == BAR_ARRIVE) return NEXT;
    fragment->arrived = true;
    return block_on(warp, (Wait){.kind = WAIT_NAMED, .named = bar, .phase = bar->phase,
                                 .what = "named barrier"});
}

/* ---------------------------------------------------------------- cluster barrier
 * Phases are counted by the warp: warps may be one arrival ahead of others. */
static int cluster_index(const Warp *warp) { return warp->cta->rank * MAX_WARPS + warp->index; }

static void check_cluster(Machine *machine, Cluster *cluster) {
    ClusterBarrier *bar = &cluster->barrier;
    bool any = false;
    for (int rank = 0; rank < cluster->n; rank++)
        for (int i = 0; i < cluster->cta[rank]->n_warps; i++) {
            if (!cluster->cta[rank]->warps[i].live) continue;
            if (bar->arrived[rank * MAX_WARPS + i] <= bar->phase) return;
            any = true;
        }
    if (!any) return;
    clock_join(&bar->complete, &bar->arriving);
    clock_clear(&bar->arriving);
    later(&bar->at, bar->arriving_at);
    bar->phase++;
    machine->progress = true;
}

static Status exec_cluster_arrive(Warp *warp, const Instr *in, uint32_t mask) {
    Cluster *cluster = warp->cta->cluster;
    ClusterBarrier *bar = &cluster->barrier;
    int i = cluster_index(warp);
    bool partial = bar->arrived_lanes[i] != 0; /* some lanes of this phase arrived before */
    if (bar->arrived_lanes[i] & mask || (!partial && bar->arrived[i] > bar->waited[i]))
        report(warp->machine, FINDING_BARRIER, warp, in, false,
               "warp %d arrives at the cluster barrier again before it waited for its last arrival",
               warp->index);
    bar->arrived_lanes[i] |= mask;
    if (in->u[0]) {
        if (warp->program->narrow_scopes) release_relaxed(&bar->near[warp->cta->rank], &warp->agent, SCOPE_CTA);
        release_relaxed(&bar->arriving, &warp->agent, SCOPE_CLUSTER);
    } else {
        release_to(&bar->arriving, &warp->agent);
    }
    later(&bar->arriving_at, warp->now);
    if ((bar->arrived_lanes[i] & warp->live) == warp->live) {
        bar->arrived_lanes[i] = 0;
        bar->arrived[i]++;
        check_cluster(warp->machine, cluster);
    }
    return NEXT;
}

static Status exec_cluster_wait(Warp *warp, const Instr *in, uint32_t mask) {
    ClusterBarrier *bar = &warp->cta->cluster->barrier;
    int i = cluster_index(warp);
    if (bar->waited[i] >= bar->arrived[i] && !bar->arrived_lanes[i]) {
        report(warp->machine, FINDING_BARRIER, warp, in, false,
               "warp %d waits for the cluster barrier without having arrived", warp->index);
        return NEXT;
    }
    if (bar->phase <= bar->waited[i])
        return block_on(warp, (Wait){.kind = WAIT_CLUSTER, .cluster = bar, .phase = bar->phase,
                                     .what = "cluster barrier"});
    bar->waited_lanes[i] |= mask;
    if ((bar->waited_lanes[i] & warp->live) == warp->live) {
        bar->waited_lanes[i] = 0;
        bar->waited[i]++;
    }
    const Clock *near = &bar->near[warp->cta->rank];
    if (in->u[0]) {
        acquire_relaxed(&warp->agent, &bar->complete, SCOPE_CLUSTER);
        acquire_relaxed(&warp->agent, near, SCOPE_CTA);
    } else {
        acquire_from(&warp->agent, &bar->complete);
        acquire_from(&warp->agent, near);
    }
    later(&warp->now, bar->at);
    return NEXT;
}

void barrier_warp_exited(Warp *warp) {
    Cta *cta = warp->cta;
    for (int i = 0; i < NAMED_BARRIERS; i++)
        if (cta->named[i].arrived && is_complete(cta, &cta->named[i]))
            complete_named(warp->machine, &cta->named[i]);
    check_cluster(warp->machine, cta->cluster);
}

/* ---------------------------------------------------------------- fences */
enum { FENCE_MEMORY, FENCE_PROXY, FENCE_MBARRIER_INIT, FENCE_NOTHING };

static Status exec_fence(Warp *warp, const Instr *in, uint32_t mask) {
    (void)mask;
    if (!warp->machine->config.races) return NEXT;
    switch (in->u[0]) {
    case FENCE_PROXY: fence_proxy(&warp->agent); break;
    case FENCE_MBARRIER_INIT: /* a release, and what makes initialisations visible to the async proxy */
        agent_time(&warp->agent);
        clock_join(&sync_of(warp->cta)->mbarrier_fence, warp->agent.clock);
        fence_memory(&warp->agent, SCOPE_GPU);
        break;
    case FENCE_MEMORY: fence_memory(&warp->agent, (Scope)in->scope); break;
    default: break;
    }
    return NEXT;
}

static bool starts(const char *text, const char *with) { return !strncmp(text, with, strlen(with)); }

static Decoded decode_fence(Decode *d, char *why, size_t size) {
    d->in->exec = exec_fence;
    d->in->class_ = CLASS_FENCE;
    const char *what = d->n > 1 ? d->part[1] : "";
    if (!strcmp(what, "proxy")) {
        const char *proxy = d->n > 2 ? d->part[2] : "";
        if (!strcmp(proxy, "async") || starts(proxy, "async::")) d->in->u[0] = FENCE_PROXY;
        else if (!strcmp(proxy, "alias")) d->in->u[0] = FENCE_NOTHING; /* every place has one address here */
        else if (starts(proxy, "tensormap")) d->in->u[0] = FENCE_MEMORY;
        else {
            snprintf(why, size, "fence.proxy.%s is not modelled", proxy);
            return REFUSED;
        }
    } else if (!strcmp(what, "mbarrier_init")) {
        d->in->u[0] = FENCE_MBARRIER_INIT;
    } else {
        static const char *const known[] = {"sc", "acq_rel", "acquire", "release", "cta", "cluster", "gpu",
                                            "sys", "gl"};
        for (int i = 1; i < d->n; i++) {
            bool found = starts(d->part[i], "sync_restrict::");
            for (size_t k = 0; k < sizeof known / sizeof *known; k++) found |= !strcmp(d->part[i], known[k]);
            if (found) continue;
            snprintf(why, size, "fence modifier .%s is not modelled", d->part[i]);
            return REFUSED;
        }
        d->in->u[0] = FENCE_MEMORY;
        d->in->scope = (uint8_t)scope_of(d);
    }
    return DECODED;
}

/* ---------------------------------------------------------------- cluster launch control
 * A request takes the next cluster of the grid that has not started; its response is 16 bytes: the
 * coordinates of that cluster's first CTA, and 1; the last is 0 if there is none. */
typedef struct {
    uint32_t offset, barrier;
    int n;
    Cta *target[MAX_CLUSTER], *barrier_cta[MAX_CLUSTER];
} Cancel;

static bool run_cancel(Machine *machine, AsyncOp *op) {
    Cancel *cancel = op->payload;
    uint32_t response[4] = {UINT32_MAX, UINT32_MAX, UINT32_MAX, 0};
    if (machine->next_cluster < machine->total_clusters) {
        uint64_t id = machine->next_cluster++;
        const Launch *launch = &machine->launch;
        for (int i = 0; i < 3; i++) {
            uint32_t clusters = launch->grid[i] / launch->cluster[i];
            response[i] = (uint32_t)(id % clusters) * launch->cluster[i];
            id /= clusters;
        }
        response[3] = 1;
        machine->done_ctas += (uint64_t)launch->cluster[0] * launch->cluster[1] * launch->cluster[2];
    }
    for (int i = 0; i < cancel->n; i++) {
        Cta *cta = cancel->target[i];
        access_shared(&op->agent, cta, cancel->offset, sizeof response, true, ASYNC_PROXY, op->in);
        memcpy(cta->shared + cancel->offset, response, sizeof response);
        MBarrier *bar = mbarrier_at(op->warp, op->in, cancel->barrier_cta[i], cancel->barrier);
        if (!bar) return true;
        mbarrier_complete_tx(machine, bar, sizeof response, &op->agent, op->finish, op->in);
    }
    return true;
}

static Cta *shared_place(Warp *warp, const Instr *in, const Operand *o, int lane, uint32_t bytes,
                         uint32_t *offset) {
    uint64_t address = lane_address(warp, in, o, lane);
    if (address >= SHARED_WINDOW && address < LOCAL_WINDOW) address -= SHARED_WINDOW;
    if (address >> 32) {
        fail(warp, in, FINDING_BOUNDS, "0x%llx is not an address in shared memory",
             (unsigned long long)address);
        return NULL;
    }
    Cta *cta = shared_target(warp, in, (uint32_t)address, bytes, offset);
    if (cta && *offset % bytes) {
        fail(warp, in, FINDING_ALIGNMENT, "shared+%u is not aligned to %u bytes", *offset, bytes);
        return NULL;
    }
    return cta;
}

static Status exec_try_cancel(Warp *warp, const Instr *in, uint32_t mask) {
    FOR_LANES(mask, lane) { /* every lane that gets here makes a request of its own */
        Cancel cancel = {.n = 1};
        cancel.target[0] = shared_place(warp, in, &in->args[0], (int)lane, 16, &cancel.offset);
        if (!cancel.target[0]) return FATAL;
        cancel.barrier_cta[0] = shared_place(warp, in, &in->args[1], (int)lane, 8, &cancel.barrier);
        if (!cancel.barrier_cta[0]) return FATAL;
        if (in->u[0]) { /* multicast: the same offsets in every CTA of the cluster */
            Cluster *cluster = warp->cta->cluster;
            cancel.n = cluster->n;
            for (int i = 0; i < cluster->n; i++) cancel.target[i] = cancel.barrier_cta[i] = cluster->cta[i];
        }
        AsyncOp *op = async_new(warp, in, run_cancel, sizeof cancel, false);
        *(Cancel *)op->payload = cancel;
        op->lane_class = 3;
        async_submit(warp->machine, op);
    }
    return NEXT;
}

enum { QUERY_CANCELED, QUERY_X, QUERY_Y, QUERY_Z, QUERY_ALL };

static Status exec_query_cancel(Warp *warp, const Instr *in, uint32_t mask) {
    const Operand *source = &in->args[1];
    need(warp, in, source, mask);
    uint32_t canceled = 0;
    FOR_LANES(mask, lane) {
        const uint32_t *response = (const uint32_t *)(warp->registers + source->offset + 16 * lane);
        if (response[3]) canceled |= 1u << lane;
        if (in->u[0] == QUERY_CANCELED) continue;
        /* Without a cluster the coordinates are undefined: asking is common, using them goes wrong. */
        if (in->u[0] != QUERY_ALL) {
            set_lane(warp, &in->args[0], (int)lane, response[in->u[0] - QUERY_X]);
            continue;
        }
        for (int i = 0; i < in->args[0].count; i++)
            set_lane(warp, &in->args[0].parts[i], (int)lane, i < 3 ? response[i] : 0);
    }
    if (in->u[0] == QUERY_CANCELED) set_pred(warp, &in->args[0], mask, canceled);
    return NEXT;
}

static Decoded decode_launch_control(Decode *d, char *why, size_t size) {
    Instr *in = d->in;
    if (is(d, 1, "try_cancel") && in->n == 2) {
        static const char *const known[] = {"async", "shared::cta", "b128", "mbarrier::complete_tx::bytes",
                                            "multicast::cluster::all"};
        for (int i = 2; i < d->n; i++) {
            bool found = false;
            for (size_t k = 0; k < sizeof known / sizeof *known; k++) found |= !strcmp(d->part[i], known[k]);
            if (found) continue;
            snprintf(why, size, "modifier .%s is not modelled", d->part[i]);
            return REFUSED;
        }
        in->exec = exec_try_cancel;
        in->class_ = CLASS_TMA;
        in->u[0] = has(d, "multicast::cluster::all");
        return DECODED;
    }
    if (is(d, 1, "query_cancel") && in->n == 2 && in->args[1].kind == OPERAND_REGISTER &&
        in->args[1].width == 16) {
        in->exec = exec_query_cancel;
        if (is(d, 2, "is_canceled")) in->u[0] = QUERY_CANCELED;
        else if (is(d, 2, "get_first_ctaid::x")) in->u[0] = QUERY_X;
        else if (is(d, 2, "get_first_ctaid::y")) in->u[0] = QUERY_Y;
        else if (is(d, 2, "get_first_ctaid::z")) in->u[0] = QUERY_Z;
        else if (is(d, 2, "get_first_ctaid") && is(d, 3, "v4")) in->u[0] = QUERY_ALL;
        else in->exec = NULL;
        if (in->exec) return DECODED;
    }
    snprintf(why, size, "this form of clusterlaunchcontrol is not modelled");
    return REFUSED;
}

/* ---------------------------------------------------------------- decode */
/* Launches run in stream order, each to its end: what an earlier grid wrote is there already, and a
 * dependent grid starts only after this one, so neither instruction has anything to do. */
static Status exec_grid_dependency(Warp *warp, const Instr *in, uint32_t mask) {
    (void)warp, (void)in, (void)mask;
    return NEXT;
}

static Decoded decode_cluster(Decode *d, char *why, size_t size) {
    Instr *in = d->in;
    for (int i = 3; i < d->n; i++)
        if (strcmp(d->part[i], "aligned") && strcmp(d->part[i], "release") && strcmp(d->part[i], "relaxed") &&
            strcmp(d->part[i], "acquire")) {
            snprintf(why, size, "barrier.cluster modifier .%s is not modelled", d->part[i]);
            return REFUSED;
        }
    in->u[0] = has(d, "relaxed");
    in->class_ = CLASS_BARRIER;
    if (has(d, "aligned")) in->flags |= ALIGNED;
    if (is(d, 2, "arrive") && !in->n) in->exec = exec_cluster_arrive;
    else if (is(d, 2, "wait") && !in->n) in->exec = exec_cluster_wait, in->class_ = CLASS_WAIT;
    else {
        snprintf(why, size, "this form of barrier.cluster is not modelled");
        return REFUSED;
    }
    return DECODED;
}

static Decoded decode_named(Decode *d, char *why, size_t size) {
    Instr *in = d->in;
    int at = is(d, 1, "cta") ? 2 : 1;
    bool red = is(d, at, "red");
    in->class_ = CLASS_BARRIER;
    in->exec = exec_bar;
    if (is(d, 0, "bar") || has(d, "aligned")) in->flags |= ALIGNED;
    if (is(d, at, "sync")) in->u[0] = BAR_SYNC;
    else if (is(d, at, "arrive")) in->u[0] = BAR_ARRIVE;
    else if (red && has(d, "popc")) in->u[0] = BAR_POPC;
    else if (red && has(d, "and")) in->u[0] = BAR_AND;
    else if (red && has(d, "or")) in->u[0] = BAR_OR;
    else {
        snprintf(why, size, "this form of barrier is not modelled");
        return REFUSED;
    }
    int least = red ? 3 : in->u[0] == BAR_ARRIVE ? 2 : 1, most = red ? 4 : 2;
    in->u[1] = (uint64_t)(in->n - (red ? 3 : 1)); /* a thread count is given */
    if (in->n < least || in->n > most) {
        snprintf(why, size, "wrong number of operands");
        return REFUSED;
    }
    return DECODED;
}

Decoded decode_barrier(Decode *d, char *why, size_t n) {
    if (is(d, 0, "mbarrier")) return decode_mbarrier(d, why, n);
    if (is(d, 0, "barrier") && is(d, 1, "cluster")) return decode_cluster(d, why, n);
    if (is(d, 0, "bar") && is(d, 1, "warp")) return NOT_MINE;
    if (is(d, 0, "bar") || is(d, 0, "barrier")) return decode_named(d, why, n);
    if (is(d, 0, "fence") || is(d, 0, "membar")) return decode_fence(d, why, n);
    if (is(d, 0, "clusterlaunchcontrol")) return decode_launch_control(d, why, n);
    if (is(d, 0, "griddepcontrol")) {
        if (!is(d, 1, "wait") && !is(d, 1, "launch_dependents")) {
            snprintf(why, n, "this form of griddepcontrol is not modelled");
            return REFUSED;
        }
        d->in->exec = exec_grid_dependency;
        d->in->class_ = CLASS_OTHER;
        return DECODED;
    }
    return NOT_MINE;
}
