/* mbarrier objects: phases, arrivals, transaction bytes, and waits for them.
 *
 * A phase completes when no arrival and no byte is missing. Its clock joins what every arrival released;
 * a wait that sees the phase completed acquires it. A failed try_wait blocks its warp until the phase
 * is over or the scheduler lets it time out once.
 *
 * Scopes: a wait is for a barrier of the own CTA, so that a thread of another CTA synchronises with it only
 * if its arrival and the wait are both of .cluster scope. What such arrivals release is kept apart (`far`)
 * where it makes a difference. What TMA and the tensor core signal always reaches the waiting CTA. Without
 * a scope, .cta is meant; but kernels arrive at the barriers of other CTAs so (CuTe DSL gives no way to
 * name another), which is .cluster here unless strict_scopes says otherwise.
 */
#include "sync.h"

enum { COUNT_LIMIT = (1 << 20) - 1 };

/* With what waits have seen, to notice a phase that a waiter misses. */
typedef struct {
    MBarrier bar;
    uint32_t observed[MAX_WARPS]; /* completed phases at the last test by a warp of this CTA */
    uint32_t tested;              /* which warps tested it at all */
} Watched;

/* Reports for operations in flight name their issuer. */
static const Warp *actor(const Agent *agent) {
    if (agent && agent->index < MAX_WARPS && agent->index < agent->cta->n_warps)
        return &agent->cta->warps[agent->index];
    return async_running ? async_running->warp : NULL;
}

#define NAMED "mbarrier at shared+%u of CTA %u"

/* ---------------------------------------------------------------- objects */
MBarrier *mbarrier_at(Warp *warp, const Instr *in, Cta *cta, uint32_t offset) {
    if (offset % 8) {
        report(warp->machine, FINDING_ALIGNMENT, warp, in, true, NAMED " is not aligned to 8 bytes", offset,
               cta->id);
        return NULL;
    }
    MBarrier *bar = cta->mbarriers && offset + 8 <= cta->shared_bytes ? cta->mbarriers[offset / 8] : NULL;
    if (!bar || !bar->valid) {
        report(warp->machine, FINDING_BARRIER, warp, in, true, "no " NAMED ": it was %s", offset, cta->id,
               bar ? "invalidated" : "never initialised");
        return NULL;
    }
    return bar;
}

void barrier_free_cta(Cta *cta) {
    for (uint32_t i = 0; cta->mbarriers && i < cta->shared_bytes / 8; i++) {
        MBarrier *bar = cta->mbarriers[i];
        if (!bar) continue;
        clock_free(&bar->arriving);
        clock_free(&bar->complete);
        clock_free(&bar->far_arriving);
        clock_free(&bar->far_complete);
        free(bar);
        cta->mbarriers[i] = NULL;
    }
    for (int i = 0; i < 16; i++) {
        clock_free(&cta->named[i].arriving);
        clock_free(&cta->named[i].complete);
    }
}

static bool is_blocked_on(const Warp *warp, const MBarrier *bar) {
    if (warp->wait.kind == WAIT_MBARRIER && warp->wait.mbarrier == bar) return true;
    for (int i = 0; warp->fragments > 1 && i < warp->fragments; i++)
        if (warp->waits[i].kind == WAIT_MBARRIER && warp->waits[i].mbarrier == bar) return true;
    return false;
}

static void check_reuse(Warp *warp, const Instr *in, const MBarrier *bar, const char *verb) {
    for (int i = 0; i < bar->cta->n_warps; i++)
        if (bar->cta->warps[i].live && is_blocked_on(&bar->cta->warps[i], bar))
            report(warp->machine, FINDING_BARRIER, warp, in, false, NAMED " is %s while warp %d waits for it",
                   bar->offset, bar->cta->id, verb, i);
    if (bar->pending != (int32_t)bar->expected || bar->tx)
        report(warp->machine, FINDING_BARRIER, warp, in, false,
               NAMED " is %s in the middle of a phase: %d of %u arrivals and %lld bytes missing", bar->offset,
               bar->cta->id, verb, bar->pending, bar->expected, (long long)bar->tx);
}

static bool initialise(Warp *warp, const Instr *in, Cta *cta, uint32_t offset, uint32_t count) {
    if (offset % 8) {
        fail(warp, in, FINDING_ALIGNMENT, NAMED " is not aligned to 8 bytes", offset, cta->id);
        return false;
    }
    if (!count || count > COUNT_LIMIT) {
        fail(warp, in, FINDING_BARRIER, NAMED " is initialised for %u arrivals", offset, cta->id, count);
        return false;
    }
    if (!cta->mbarriers && !(cta->mbarriers = calloc(cta->shared_bytes / 8 + 1, sizeof(MBarrier *)))) abort();
    MBarrier *bar = cta->mbarriers[offset / 8];
    if (!bar) {
        Watched *watched = calloc(1, sizeof *watched);
        if (!watched) abort();
        bar = cta->mbarriers[offset / 8] = &watched->bar;
    } else if (bar->valid) {
        check_reuse(warp, in, bar, "initialised again");
    }
    access_mbarrier(&warp->agent, cta, offset, MBARRIER_INIT, GENERIC_PROXY, in);
    clock_clear(&bar->arriving);
    clock_clear(&bar->complete);
    clock_clear(&bar->far_arriving);
    clock_clear(&bar->far_complete);
    ((Watched *)bar)->tested = 0;
    bar->cta = cta;
    bar->offset = offset;
    bar->expected = count;
    bar->pending = (int32_t)count;
    bar->tx = 0;
    bar->phase = 0;
    bar->n_arrivals = 0;
    bar->arriving_at = bar->complete_at = warp->now;
    bar->valid = true;
    bar->initialised_by = in;
    return true;
}

/* ---------------------------------------------------------------- who arrives */
static bool same_site(const Arrival *a, const Arrival *b) {
    return a->pc == b->pc && a->warp == b->warp && a->cta == b->cta && a->lane_class == b->lane_class;
}

static void remember_site(Machine *machine, const Arrival *site) {
    for (int i = 0; i < machine->n_arrivals; i++) {
        const Arrival *known = &machine->arrivals[i];
        if (known->pc == site->pc && known->warp == site->warp && known->offset == site->offset) return;
    }
    if (machine->n_arrivals == machine->c_arrivals) {
        machine->c_arrivals = machine->c_arrivals ? 2 * machine->c_arrivals : 64;
        machine->arrivals = realloc(machine->arrivals, (size_t)machine->c_arrivals * sizeof *site);
        if (!machine->arrivals) abort();
    }
    machine->arrivals[machine->n_arrivals++] = *site;
}

/* For the table of a deadlock. */
static void note_arrival(Machine *machine, MBarrier *bar, const Agent *agent, const Instr *in) {
    const Warp *warp = actor(agent);
    if (!warp || !in) return;
    bool direct = agent->index < MAX_WARPS;
    Arrival site = {in->pc, warp->cta->id, bar->phase, bar->offset, (int16_t)warp->index,
                    direct ? 4 : async_running ? async_running->lane_class & 3 : 3};
    for (int i = 0; i < bar->n_arrivals; i++)
        if (same_site(&bar->arrivals[i], &site)) {
            bar->arrivals[i].phase = bar->phase;
            return;
        }
    int at = bar->n_arrivals < ARRIVALS_KEPT ? bar->n_arrivals++ : 0;
    for (int i = 1; at == 0 && i < bar->n_arrivals; i++) /* the one not seen for longest makes room */
        if (bar->arrivals[i].phase < bar->arrivals[at].phase) at = i;
    bar->arrivals[at] = site;
    remember_site(machine, &site);
}

/* ---------------------------------------------------------------- phases */
static void complete_phase(Machine *machine, MBarrier *bar, const Agent *agent, const Instr *in) {
    Watched *watched = (Watched *)bar;
    clock_join(&bar->complete, &bar->arriving);
    clock_clear(&bar->arriving);
    clock_join(&bar->far_complete, &bar->far_arriving);
    clock_clear(&bar->far_arriving);
    if (bar->arriving_at > bar->complete_at) bar->complete_at = bar->arriving_at;
    bar->phase++;
    bar->pending = (int32_t)bar->expected;
    bar->tx = 0;
    machine->progress = true;
    for (int i = 0; watched->tested >> i && i < bar->cta->n_warps; i++) {
        const Warp *waiter = &bar->cta->warps[i];
        if (watched->tested >> i & 1 && bar->phase - watched->observed[i] >= 2 && waiter->live &&
            is_blocked_on(waiter, bar))
            report(machine, FINDING_PARITY, actor(agent), in, false,
                   NAMED " completed two phases (now %u) while warp %d still waits for the first of them",
                   bar->offset, bar->cta->id, bar->phase, i);
    }
}

static void check_phase(Machine *machine, MBarrier *bar, const Agent *agent, const Instr *in) {
    if (bar->pending) return;
    if (!bar->tx) complete_phase(machine, bar, agent, in);
    else if (bar->tx < 0)
        report(machine, FINDING_TRANSACTION, actor(agent), in, false,
               NAMED ": all %u arrivals are there, but %lld more bytes arrived than were expected",
               bar->offset, bar->cta->id, bar->expected, (long long)-bar->tx);
}

/* An arrival has to be of one phase whatever the timing: who arrives must know that the phase before is
 * over. And nobody may arrive at a barrier of a CTA that is gone. */
static void check_arrival(Machine *machine, const MBarrier *bar, const Agent *agent, const Instr *in) {
    if (bar->cta->done)
        report(machine, FINDING_BARRIER, actor(agent), in, false,
               NAMED ": an arrival after the CTA has exited", bar->offset, bar->cta->id);
    if (!clock_covers(agent->clock, &bar->complete))
        report(machine, FINDING_BARRIER, actor(agent), in, false,
               NAMED ": an arrival in phase %u, but nothing orders it after the end of phase %u: with other "
               "timing it would count there", bar->offset, bar->cta->id, bar->phase, bar->phase - 1);
}

/* What arrives at a CTA's barriers must have happened before the CTA exits, whatever the timing: its
 * shared memory is another CTA's afterwards. Its warps know of it together. */
void barrier_cta_exited(Cta *cta, const Warp *last) {
    Clock known = {0};
    for (int i = 0; i < cta->n_warps; i++) clock_join(&known, cta->warps[i].agent.clock);
    for (uint32_t i = 0; cta->mbarriers && i < cta->shared_bytes / 8; i++) {
        const MBarrier *bar = cta->mbarriers[i];
        if (!bar || !bar->valid || (clock_covers(&known, &bar->complete) && clock_covers(&known, &bar->arriving)))
            continue;
        report(cta->machine, FINDING_BARRIER, last, bar->initialised_by, false,
               NAMED ": nothing orders all arrivals (phase %u) before the exit of the CTA", bar->offset, cta->id,
               bar->phase);
    }
    clock_free(&known);
}

static bool far(const MBarrier *bar, const Agent *agent) {
    return wide_clocks && agent->index < MAX_WARPS && agent->cta != bar->cta;
}

static void release_by(MBarrier *bar, Agent *agent, Scope scope, bool relaxed) {
    bool remote = far(bar, agent);
    if (remote) clock_join_order(&bar->arriving, agent->clock);
    if (remote && scope > SCOPE_CLUSTER) agent_tick(agent);
    else if (relaxed) release_relaxed(remote ? &bar->far_arriving : &bar->arriving, agent,
                                      remote ? SCOPE_CLUSTER : SCOPE_CTA);
    else release_to(remote ? &bar->far_arriving : &bar->arriving, agent);
}

static void acquire_by(Warp *warp, const MBarrier *bar, Scope scope, bool relaxed) {
    if (relaxed) acquire_relaxed(&warp->agent, &bar->complete, SCOPE_CTA);
    else acquire_from(&warp->agent, &bar->complete);
    if (!wide_clocks || scope > SCOPE_CLUSTER) return;
    if (relaxed) acquire_relaxed(&warp->agent, &bar->far_complete, SCOPE_CLUSTER);
    else acquire_from(&warp->agent, &bar->far_complete);
}

/* u[1]: the instruction gives no scope. */
static Scope barrier_scope(const Machine *machine, const Instr *in) {
    return !in->u[1] ? (Scope)in->scope : machine->config.strict_scopes ? SCOPE_CTA : SCOPE_CLUSTER;
}

static void arrive_with(Machine *machine, MBarrier *bar, uint32_t count, Agent *agent, double now,
                        Scope scope, bool relaxed, const Instr *in) {
    access_mbarrier(agent, bar->cta, bar->offset, MBARRIER_USE, GENERIC_PROXY, in);
    check_arrival(machine, bar, agent, in);
    release_by(bar, agent, scope, relaxed);
    if (now > bar->arriving_at) bar->arriving_at = now;
    if (count > (uint32_t)bar->pending) {
        report(machine, FINDING_BARRIER, actor(agent), in, false,
               NAMED ": %u arrivals, but only %d of %u are missing in phase %u", bar->offset, bar->cta->id,
               count, bar->pending, bar->expected, bar->phase);
        count = (uint32_t)bar->pending;
    }
    bar->pending -= (int32_t)count;
    note_arrival(machine, bar, agent, in);
    check_phase(machine, bar, agent, in);
}

void mbarrier_arrive(Machine *machine, MBarrier *bar, uint32_t count, Agent *agent, double now,
                     const Instr *in) {
    arrive_with(machine, bar, count, agent, now, SCOPE_CLUSTER, false, in);
}

static void check_tx(Machine *machine, const MBarrier *bar, const Instr *in) {
    if (bar->tx > COUNT_LIMIT || bar->tx < -COUNT_LIMIT)
        report(machine, FINDING_TRANSACTION, actor(NULL), in, false,
               NAMED ": transaction count %lld is out of range",
               bar->offset, bar->cta->id, (long long)bar->tx);
}

void mbarrier_expect(Machine *machine, MBarrier *bar, int64_t bytes, const Instr *in) {
    bar->tx += bytes;
    check_tx(machine, bar, in);
}

void mbarrier_complete_tx(Machine *machine, MBarrier *bar, int64_t bytes, Agent *agent, double now,
                          const Instr *in) {
    Proxy proxy = agent->index < MAX_WARPS ? GENERIC_PROXY : ASYNC_PROXY;
    access_mbarrier(agent, bar->cta, bar->offset, MBARRIER_USE, proxy, in);
    check_arrival(machine, bar, agent, in);
    release_to(&bar->arriving, agent);
    if (now > bar->arriving_at) bar->arriving_at = now;
    bar->tx -= bytes;
    check_tx(machine, bar, in);
    note_arrival(machine, bar, agent, in);
    check_phase(machine, bar, agent, in);
}

/* ---------------------------------------------------------------- addresses */
/* The barrier of one lane's operand; generic addresses lose their window. */
static bool target(Warp *warp, const Instr *in, const Operand *o, int lane, Cta **cta, uint32_t *offset) {
    uint64_t address = lane_address(warp, in, o, lane);
    if (address >= SHARED_WINDOW && address < LOCAL_WINDOW) address -= SHARED_WINDOW;
    if (address >> 32) {
        fail(warp, in, FINDING_BOUNDS, "0x%llx is not an address in shared memory",
             (unsigned long long)address);
        return false;
    }
    *cta = shared_target(warp, in, (uint32_t)address, 8, offset);
    return *cta != NULL;
}

/* Lanes grouped by the barrier that they name. */
typedef struct { MBarrier *bar; uint32_t lanes; } Group;
static int group_lanes(Warp *warp, const Instr *in, const Operand *o, uint32_t mask, Group *groups) {
    int n = 0;
    uint64_t last = 0;
    FOR_LANES(mask, lane) {
        uint64_t address = lane_address(warp, in, o, (int)lane);
        if (n && address == last) {
            groups[n - 1].lanes |= 1u << lane;
            continue;
        }
        Cta *cta;
        uint32_t offset;
        if (!target(warp, in, o, (int)lane, &cta, &offset)) return -1;
        MBarrier *bar = mbarrier_at(warp, in, cta, offset);
        if (!bar) return -1;
        last = address;
        int g = 0;
        while (g < n && groups[g].bar != bar) g++;
        if (g == n) groups[n++] = (Group){bar, 0};
        groups[g].lanes |= 1u << lane;
        if (g != n - 1) last = ~0ull; /* the shortcut is for the newest group only */
    }
    return n;
}

/* ---------------------------------------------------------------- init, inval, bytes */
static Status exec_init(Warp *warp, const Instr *in, uint32_t mask) {
    struct { Cta *cta; uint32_t offset, count; } done[LANES];
    int n = 0;
    FOR_LANES(mask, lane) {
        Cta *cta;
        uint32_t offset, count = (uint32_t)lane_value(warp, in, &in->args[1], (int)lane);
        if (!target(warp, in, &in->args[0], (int)lane, &cta, &offset)) return FATAL;
        int i = 0;
        while (i < n && (done[i].cta != cta || done[i].offset != offset)) i++;
        if (i < n) { /* several lanes initialise one barrier: harmless if they agree */
            if (done[i].count != count)
                report(warp->machine, FINDING_BARRIER, warp, in, false,
                       "lanes initialise the " NAMED " for %u and for %u arrivals", offset, cta->id,
                       done[i].count, count);
            continue;
        }
        done[n].cta = cta;
        done[n].offset = offset;
        done[n++].count = count;
        if (!initialise(warp, in, cta, offset, count)) return FATAL;
    }
    return NEXT;
}

static Status exec_inval(Warp *warp, const Instr *in, uint32_t mask) {
    Group groups[LANES];
    int n = group_lanes(warp, in, &in->args[0], mask, groups);
    if (n < 0) return FATAL;
    for (int i = 0; i < n; i++) {
        MBarrier *bar = groups[i].bar;
        check_reuse(warp, in, bar, "invalidated");
        access_mbarrier(&warp->agent, bar->cta, bar->offset, MBARRIER_INIT, GENERIC_PROXY, in);
        shadow_forget_shared(bar->cta, bar->offset, 8);
        bar->valid = false;
    }
    return NEXT;
}

static Status exec_bytes(Warp *warp, const Instr *in, uint32_t mask) { /* u[0]: complete_tx */
    Group groups[LANES];
    int n = group_lanes(warp, in, &in->args[0], mask, groups);
    if (n < 0) return FATAL;
    for (int i = 0; i < n; i++)
        FOR_LANES(groups[i].lanes, lane) {
            int64_t bytes = (int64_t)(uint32_t)lane_value(warp, in, &in->args[1], (int)lane);
            if (in->u[0])
                mbarrier_complete_tx(warp->machine, groups[i].bar, bytes, &warp->agent, warp->now, in);
            else mbarrier_expect(warp->machine, groups[i].bar, bytes, in);
        }
    return NEXT;
}

/* ---------------------------------------------------------------- arrivals */
enum { EXPECT_TX = 1, NO_COMPLETE = 2, DROP = 4, RELAXED = 8, COUNTED = 16 };

/* The opaque state: the phase that the arrival belonged to, and the arrivals missing before it. A warp's
 * lanes arrive as one, so that all get the same (as on an H200). */
static uint64_t state_of(const MBarrier *bar) {
    return 1ull << 63 | (uint64_t)(uint32_t)bar->pending << 32 | bar->phase;
}

static void drop_expected(Warp *warp, const Instr *in, MBarrier *bar, uint32_t count) {
    if (count > bar->expected)
        report(warp->machine, FINDING_BARRIER, warp, in, false, NAMED ": %u arrivals dropped of %u",
               bar->offset,
               bar->cta->id, count, bar->expected);
    bar->expected -= count > bar->expected ? bar->expected : count;
}

static Status exec_arrive(Warp *warp, const Instr *in, uint32_t mask) {
    Machine *machine = warp->machine;
    Group groups[LANES];
    const uint64_t flags = in->u[0];
    int n = group_lanes(warp, in, &in->args[1], mask, groups);
    if (n < 0) return FATAL;
    for (int i = 0; i < n; i++) {
        MBarrier *bar = groups[i].bar;
        uint32_t total = 0;
        FOR_LANES(groups[i].lanes, lane) {
            uint32_t value = in->n > 2 ? (uint32_t)lane_value(warp, in, &in->args[2], (int)lane) : 1;
            if (flags & EXPECT_TX) mbarrier_expect(machine, bar, value, in);
            uint32_t count = flags & COUNTED ? value : 1;
            if (!count || count > COUNT_LIMIT)
                return fail(warp, in, FINDING_BARRIER, NAMED ": %u arrivals at once", bar->offset,
                            bar->cta->id, count);
            set_lane(warp, &in->args[0], (int)lane, state_of(bar));
            total += count;
        }
        if (flags & NO_COMPLETE && total >= (uint32_t)bar->pending && !bar->tx)
            report(machine, FINDING_BARRIER, warp, in, false,
                   NAMED ": an arrival with .noComplete completes phase %u",
                   bar->offset, bar->cta->id, bar->phase);
        if (flags & DROP) drop_expected(warp, in, bar, total);
        arrive_with(machine, bar, total, &warp->agent, warp->now, barrier_scope(machine, in), flags & RELAXED, in);
    }
    return NEXT;
}

/* ---------------------------------------------------------------- waits */
enum { BY_PARITY = 1, BLOCKING = 2, RELAXED_WAIT = 4 };

/* A waiter that lost a phase: the barrier moved on by two since this warp last looked, the parity is
 * the same again, and the warp knows of that in no other way. */
static void check_parity(Warp *warp, const Instr *in, MBarrier *bar, uint32_t parity, bool passed) {
    Watched *watched = (Watched *)bar;
    uint32_t bit = 1u << warp->index;
    if (!passed && watched->tested & bit && bar->phase - watched->observed[warp->index] >= 2 &&
        !clock_covers(warp->agent.clock, &bar->complete))
        report(warp->machine, FINDING_PARITY, warp, in, false,
               NAMED ": warp %d waits for parity %u, but %u phases have completed since it last looked at "
               "phase %u",
               bar->offset, bar->cta->id, warp->index, parity, bar->phase - watched->observed[warp->index],
               watched->observed[warp->index]);
    watched->tested |= bit;
    watched->observed[warp->index] = bar->phase;
}

/* Whether one lane's wait is over; *parity: of the phase that it is for. */
static bool test(Warp *warp, const Instr *in, const MBarrier *bar, uint64_t operand, uint32_t *parity) {
    if (in->u[0] & BY_PARITY) {
        if (operand > 1)
            report(warp->machine, FINDING_PARITY, warp, in, false, NAMED ": %llu is not a parity",
                   bar->offset,
                   bar->cta->id, (unsigned long long)operand);
        *parity = operand & 1;
        return (bar->phase & 1) != *parity;
    }
    uint32_t phase = (uint32_t)operand;
    *parity = phase & 1;
    if (!(operand >> 63) || bar->phase - phase > 1)
        report(warp->machine, FINDING_PARITY, warp, in, false,
               NAMED ": the state is of phase %u, neither the current one (%u) nor the one before",
               bar->offset, bar->cta->id, phase, bar->phase);
    return bar->phase != phase;
}

/* try_wait may give up early; under the random policy it now and then does, so that a kernel that does
 * not try again is noticed. */
static bool gives_up(Machine *machine) {
    return machine->config.policy == POLICY_RANDOM && next_random(machine) % 16 == 0;
}

static Status exec_wait(Warp *warp, const Instr *in, uint32_t mask) {
    Group groups[LANES];
    Wait blocked = {0};
    uint32_t passed = 0;
    int n = group_lanes(warp, in, &in->args[1], mask, groups);
    if (n < 0) return FATAL;
    const bool timed_out = warp->wait.kind == WAIT_MBARRIER && warp->wait.timed_out;
    for (int i = 0; i < n; i++) {
        MBarrier *bar = groups[i].bar;
        if (bar->cta != warp->cta)
            return fail(warp, in, FINDING_BARRIER, NAMED ": a wait is for barriers of the own CTA only",
                        bar->offset,
                        bar->cta->id);
        access_mbarrier(&warp->agent, bar->cta, bar->offset, MBARRIER_USE, GENERIC_PROXY, in);
        bool all = true;
        uint32_t parity = 0;
        FOR_LANES(groups[i].lanes, lane) {
            uint32_t of_lane;
            if (test(warp, in, bar, lane_value(warp, in, &in->args[2], (int)lane), &of_lane))
                passed |= 1u << lane;
            else all = false, parity = of_lane;
        }
        if (in->u[0] & BY_PARITY) check_parity(warp, in, bar, parity, all);
        if (!all && blocked.kind == WAIT_NONE)
            blocked = (Wait){.kind = WAIT_MBARRIER, .mbarrier = bar, .parity = parity, .what = "mbarrier"};
    }
    if (blocked.kind != WAIT_NONE) {
        warp->machine->counters.wait_failures++;
        if (in->u[0] & BLOCKING && !timed_out && !gives_up(warp->machine)) return block_on(warp, blocked);
    }
    for (int i = 0; i < n; i++) {
        if (!(groups[i].lanes & passed)) continue;
        if (groups[i].bar->complete_at > warp->now) warp->now = groups[i].bar->complete_at;
        acquire_by(warp, groups[i].bar, barrier_scope(warp->machine, in), in->u[0] & RELAXED_WAIT);
    }
    set_pred(warp, &in->args[0], mask, passed);
    return NEXT;
}

static Status exec_pending_count(Warp *warp, const Instr *in, uint32_t mask) {
    FOR_LANES(mask, lane) {
        uint64_t state = lane_value(warp, in, &in->args[1], (int)lane);
        set_lane(warp, &in->args[0], (int)lane, state >> 32 & COUNT_LIMIT);
    }
    return NEXT;
}

/* ---------------------------------------------------------------- decode */
static bool known_modifier(const char *part) {
    static const char *const known[] = {"shared", "shared::cta", "shared::cluster", "b64", "release",
                                        "acquire", "relaxed", "cta", "cluster", "parity", "expect_tx",
                                        "noComplete"};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(part, known[i])) return true;
    return false;
}

static Decoded wrong(char *why, size_t n, const char *what) {
    snprintf(why, n, "%s", what);
    return REFUSED;
}

Decoded decode_mbarrier(Decode *d, char *why, size_t size) {
    Instr *in = d->in;
    for (int i = 2; i < d->n; i++)
        if (!known_modifier(d->part[i])) {
            snprintf(why, size, "mbarrier modifier .%s is not modelled", d->part[i]);
            return REFUSED;
        }
    in->class_ = CLASS_BARRIER;
    const char *op = d->n > 1 ? d->part[1] : "";
    bool relaxed = has(d, "relaxed");
    in->scope = has(d, "cta") ? SCOPE_CTA : SCOPE_CLUSTER;
    in->u[1] = !has(d, "cta") && !has(d, "cluster");
    d->program->narrow_barriers |= has(d, "cta");
    d->program->relaxed_barriers |= relaxed;
    int least = 2, most = 2;
    if (!strcmp(op, "init")) in->exec = exec_init;
    else if (!strcmp(op, "inval")) in->exec = exec_inval, least = most = 1;
    else if (!strcmp(op, "expect_tx")) in->exec = exec_bytes;
    else if (!strcmp(op, "complete_tx")) in->exec = exec_bytes, in->u[0] = 1;
    else if (!strcmp(op, "pending_count")) in->exec = exec_pending_count;
    else if (!strcmp(op, "arrive") || !strcmp(op, "arrive_drop")) {
        bool bytes = has(d, "expect_tx");
        in->exec = exec_arrive;
        most = 3;
        least = bytes || has(d, "noComplete") ? 3 : 2;
        in->u[0] = (bytes ? EXPECT_TX : in->n == 3 ? COUNTED : 0) | (has(d, "noComplete") ? NO_COMPLETE : 0) |
                   (relaxed ? RELAXED : 0) | (!strcmp(op, "arrive_drop") ? DROP : 0);
    } else if (!strcmp(op, "test_wait") || !strcmp(op, "try_wait")) {
        in->exec = exec_wait;
        in->class_ = CLASS_WAIT;
        least = 3;
        most = op[1] == 'r' ? 4 : 3;
        in->u[0] = (has(d, "parity") ? BY_PARITY : 0) | (op[1] == 'r' ? BLOCKING : 0) |
                   (relaxed ? RELAXED_WAIT : 0);
    } else {
        return wrong(why, size, "this mbarrier operation is not modelled");
    }
    if (in->n < least || in->n > most) return wrong(why, size, "wrong number of operands");
    int address = in->exec == exec_arrive || in->exec == exec_wait ? 1 : 0;
    if (in->exec != exec_pending_count && in->args[address].kind != OPERAND_ADDRESS)
        return wrong(why, size, "an address in brackets is expected");
    return DECODED;
}
