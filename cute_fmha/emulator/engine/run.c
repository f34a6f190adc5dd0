/* The scheduler: which warp runs, which lanes of it, and what happens when nothing can run. */
#include "core.h"

uint64_t next_random(Machine *machine) {
    uint64_t x = machine->random;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    machine->random = x;
    return x * 0x2545f4914f6cdd1dull >> 16;
}

uint8_t *scratch_register(void) {
    static uint8_t scratch[LANES * 16] __attribute__((aligned(64)));
    return scratch;
}

/* Cycles that a warp instruction keeps its scheduler's units busy (an SM has four schedulers), for the
 * timeline's model of time. Special functions and multiply-adds follow the rates of model.py: 16 and 128
 * lanes a cycle and SM. All others are assumptions: 64 lanes a cycle for integers, comparisons, min, max
 * and conversions, 32 for shuffles and accesses to memory, as on earlier GPUs; moves between views of
 * registers mostly vanish in SASS. Warps do not compete for a scheduler. */
static const float issue_cycles[CLASSES] = {
    [CLASS_MOVE] = 0, [CLASS_INTEGER] = 2, [CLASS_FLOAT] = 1, [CLASS_FMA] = 1, [CLASS_MUFU] = 8, [CLASS_MAX] = 2,
    [CLASS_CONVERT] = 2, [CLASS_PREDICATE] = 2, [CLASS_BRANCH] = 1, [CLASS_SHUFFLE] = 4, [CLASS_SHARED] = 4,
    [CLASS_GLOBAL] = 4, [CLASS_LOCAL] = 4, [CLASS_ATOMIC] = 4, [CLASS_BARRIER] = 1, [CLASS_WAIT] = 1,
    [CLASS_TMA] = 1, [CLASS_TMEM_LOAD] = 1, [CLASS_TMEM_STORE] = 1, [CLASS_MMA] = 1, [CLASS_FENCE] = 1,
    [CLASS_OTHER] = 1,
};

/* ---------------------------------------------------------------- waits */
Status block_on(Warp *warp, Wait wait) {
    wait.timed_out = false;
    warp->wait = wait;
    return BLOCKED;
}

static bool is_over(Warp *warp, const Wait *wait) {
    if (wait->timed_out) return true;
    switch (wait->kind) {
    case WAIT_NONE: return true;
    case WAIT_MBARRIER: return !wait->mbarrier || !wait->mbarrier->valid || (wait->mbarrier->phase & 1) != wait->parity;
    case WAIT_NAMED: return !wait->named || wait->named->phase != wait->phase;
    case WAIT_CLUSTER: return !wait->cluster || wait->cluster->phase != wait->phase;
    case WAIT_PENDING: return !wait->pending || *wait->pending <= wait->limit;
    case WAIT_LANES: return false;
    case WAIT_OTHER: return !wait->over || wait->over(warp);
    }
    return true;
}

bool wait_is_over(Warp *warp) { return is_over(warp, &warp->wait); }

/* ---------------------------------------------------------------- fragments
 * Kept sorted by pc, each with its wait. Lanes at the same pc run together unless some of them have
 * already arrived at a barrier there. */
static void fragment_add(Warp *warp, uint32_t pc, uint32_t mask) {
    int i = warp->fragments++;
    warp->fragment[i] = (Fragment){.pc = pc, .mask = mask};
    warp->waits[i] = (Wait){0};
}

static void fragment_remove(Warp *warp, int i) {
    warp->fragments--;
    for (; i < warp->fragments; i++) {
        warp->fragment[i] = warp->fragment[i + 1];
        warp->waits[i] = warp->waits[i + 1];
    }
}

static void fragments_settle(Warp *warp) {
    for (int i = 1; i < warp->fragments; i++) {
        Fragment fragment = warp->fragment[i];
        Wait wait = warp->waits[i];
        int j = i;
        for (; j > 0 && warp->fragment[j - 1].pc > fragment.pc; j--) {
            warp->fragment[j] = warp->fragment[j - 1];
            warp->waits[j] = warp->waits[j - 1];
        }
        warp->fragment[j] = fragment;
        warp->waits[j] = wait;
    }
    for (int i = 0; i < warp->fragments; i++)
        for (int j = i + 1; j < warp->fragments && warp->fragment[j].pc == warp->fragment[i].pc;) {
            if (warp->fragment[i].arrived || warp->fragment[j].arrived) {
                j++;
                continue;
            }
            warp->fragment[i].mask |= warp->fragment[j].mask;
            warp->waits[i] = (Wait){0};
            fragment_remove(warp, j);
        }
}

void fragments_jump(Warp *warp, uint32_t lanes, uint32_t target, uint32_t next) {
    Fragment *f = &warp->fragment[warp->current];
    if (lanes == f->mask) {
        f->pc = target;
        return;
    }
    f->mask &= ~lanes;
    f->pc = next;
    fragment_add(warp, target, lanes);
}

void fragments_exit(Warp *warp, uint32_t lanes, uint32_t next) {
    Fragment *f = &warp->fragment[warp->current];
    warp->live &= ~lanes;
    f->mask &= ~lanes;
    f->pc = next;
    warp->cta->live_threads -= __builtin_popcount(lanes);
    warp->machine->progress = true;
    if (!f->mask) fragment_remove(warp, warp->current);
    fragments_retry(warp);
    if (!warp->live) warp_exited(warp);
}

void fragments_retry(Warp *warp) {
    for (int i = 0; i < warp->fragments; i++)
        if (warp->waits[i].kind == WAIT_LANES) warp->waits[i] = (Wait){0};
}

/* Chooses the fragment that runs: the smallest pc that does not wait for other lanes. If that one is
 * blocked the warp is, unless the machine is at its last resort. `limit`: the pc where it may meet
 * another one. */
static bool choose_fragment(Machine *machine, Warp *warp, uint32_t *limit) {
    *limit = UINT32_MAX;
    if (warp->fragments == 1) {
        const Wait *wait = &warp->waits[0];
        warp->current = 0;
        if (wait->kind == WAIT_NONE) {
            warp->wait.kind = WAIT_NONE;
            return true;
        }
        warp->wait = *wait;
        if (wait->kind != WAIT_LANES) return is_over(warp, wait);
    }
    fragments_settle(warp);
    int chosen = -1;
    bool blocked = false;
    for (int i = 0; i < warp->fragments && chosen < 0; i++) {
        if (warp->waits[i].kind == WAIT_LANES) continue;
        warp->wait = warp->waits[i];
        if (is_over(warp, &warp->waits[i])) chosen = i;
        else if (machine->forcing) blocked = true;
        else return false;
    }
    if (chosen < 0) {
        if (!blocked) report_split_warp(warp);
        return false;
    }
    warp->current = chosen;
    warp->wait = warp->waits[chosen];
    for (int i = chosen + 1; i < warp->fragments; i++)
        if (warp->fragment[i].pc > warp->fragment[chosen].pc) {
            *limit = warp->fragment[i].pc;
            break;
        }
    return true;
}

/* An .aligned instruction without all lanes of the warp: lanes elsewhere may still come, lanes here
 * whose guard is false will not. */
static Status partial_warp(Warp *warp, const Instr *in, uint32_t active, uint32_t mask) {
    if (active != mask)
        return fail(warp, in, FINDING_DIVERGENCE, "%s needs all lanes of its warp, but its guard holds only in %08x "
                    "of %08x", in->name, active, mask);
    return block_on(warp, (Wait){.kind = WAIT_LANES, .what = "all lanes of the warp"});
}

/* ---------------------------------------------------------------- timeline */
static void trace_block(Machine *machine, Warp *warp, uint32_t pc) {
    if (warp->now > warp->run_start)
        trace_event(machine, warp->cta, (Event){.start = warp->run_start, .finish = warp->now, .lane = warp->index,
                                                .pc = warp->run_pc, .kind = 0});
    warp->wait_start = warp->now;
    warp->run_start = warp->now;
    warp->run_pc = pc;
}

static void trace_resume(Machine *machine, Warp *warp, uint32_t pc) {
    uint32_t barrier = warp->wait.kind == WAIT_MBARRIER && warp->wait.mbarrier ? warp->wait.mbarrier->offset : 0;
    trace_event(machine, warp->cta, (Event){.start = warp->wait_start, .finish = warp->now, .lane = warp->index,
                                            .pc = pc, .kind = 1, .barrier = barrier});
    warp->run_start = warp->now;
    warp->run_pc = pc;
}

/* An instruction that did not block, but is over later in modelled time: what it waits for has happened. */
static void trace_passed(Machine *machine, Warp *warp, uint32_t pc, double before) {
    if (before > warp->run_start)
        trace_event(machine, warp->cta, (Event){.start = warp->run_start, .finish = before, .lane = warp->index,
                                                .pc = warp->run_pc, .kind = 0});
    trace_event(machine, warp->cta, (Event){.start = before, .finish = warp->now, .lane = warp->index, .pc = pc,
                                            .kind = 1});
    warp->run_start = warp->now;
    warp->run_pc = pc;
}

void trace_event(Machine *machine, const Cta *cta, Event event) {
    if (cta->id != machine->config.trace_cta) return;
    if (machine->n_events == machine->c_events) {
        machine->c_events = machine->c_events ? 2 * machine->c_events : 1024;
        machine->events = realloc(machine->events, (size_t)machine->c_events * sizeof *machine->events);
        if (!machine->events) abort();
    }
    machine->events[machine->n_events++] = event;
}

/* ---------------------------------------------------------------- one time slice */
static void blocked_at(Machine *machine, Warp *warp, uint32_t pc, uint32_t active) {
    Fragment *f = &warp->fragment[warp->current];
    f->pc = pc;
    if (warp->wait.kind == WAIT_NONE) warp->wait = (Wait){.kind = WAIT_OTHER}; /* tried again every time */
    warp->waits[warp->current] = warp->wait;
    if (warp->wait.kind == WAIT_LANES && active != f->mask) { /* the others do not wait here */
        uint32_t others = f->mask & ~active;
        f->mask = active;
        fragment_add(warp, pc + 1, others);
    }
    if (warp->cta->id == machine->config.trace_cta && warp->wait_start < warp->now) trace_block(machine, warp, pc);
}

static void resumed(Machine *machine, Warp *warp, uint32_t pc) {
    if (warp->cta->id == machine->config.trace_cta) trace_resume(machine, warp, pc);
    warp->wait = (Wait){0};
    warp->waits[warp->current] = (Wait){0};
    warp->fragment[warp->current].arrived = false;
}

static uint32_t run_slice(Machine *machine, Warp *warp, uint32_t budget) {
    const Instr *instrs = warp->program->instrs;
    uint64_t *executed = machine->executed + (size_t)warp->index * (size_t)warp->program->n;
    const bool traced = warp->cta->id == machine->config.trace_cta;
    uint32_t done = 0, limit;
    machine->yielded = false;
    while (done < budget && warp->live && !machine->yielded && choose_fragment(machine, warp, &limit)) {
        Fragment *f = &warp->fragment[warp->current];
        const uint32_t mask = f->mask;
        uint32_t pc = f->pc, active = mask;
        Status status = NEXT;
        do {
            const Instr *in = &instrs[pc];
            active = mask;
            if (in->guard >= 0) {
                uint32_t guard = *(const uint32_t *)(warp->registers + in->guard);
                uint32_t undefined = ~warp->defined[in->guard_index] & mask;
                if (__builtin_expect(undefined != 0, 0)) {
                    Operand operand = {.kind = OPERAND_REGISTER, .index = in->guard_index};
                    report_undefined(warp, in, &operand, undefined);
                }
                active &= in->guard_negate ? ~guard : guard;
            }
            executed[pc]++;
            warp->now += issue_cycles[in->class_];
            const double issued = warp->now;
            if (active || in->flags & ALWAYS) {
                f->pc = pc;
                if (__builtin_expect(in->flags & ALIGNED && active != warp->live && active, 0))
                    status = partial_warp(warp, in, active, mask);
                else
                    status = in->exec(warp, in, active);
                if (status == BLOCKED) {
                    executed[pc]--;
                    warp->now -= issue_cycles[in->class_];
                    break;
                }
                if (__builtin_expect(warp->wait.kind != WAIT_NONE, 0)) resumed(machine, warp, pc);
                else if (__builtin_expect(traced && warp->now > issued, 0)) trace_passed(machine, warp, pc, issued);
                if (status != NEXT) break;
            }
            pc++;
        } while (++done < budget && pc != limit);
        if (status == NEXT) f->pc = pc;
        else if (status == JUMPED) done++;
        else if (status == FATAL) {
            machine->fatal = true;
            break;
        } else {
            blocked_at(machine, warp, pc, active);
            if (warp->wait.kind != WAIT_LANES && !(machine->forcing && warp->fragments > 1)) break;
        }
        if (machine->fatal) break;
    }
    warp->steps += done;
    return done;
}

/* ---------------------------------------------------------------- when nothing can run */
typedef enum { RUNNING, TIMED_OUT, FORCED } Stage;

static bool force_timeouts(Machine *machine) {
    bool any = false;
    for (int c = 0; c < machine->n_clusters; c++)
        for (int r = 0; r < machine->clusters[c]->n; r++) {
            Cta *cta = machine->clusters[c]->cta[r];
            for (int w = 0; w < cta->n_warps; w++) {
                Warp *warp = &cta->warps[w];
                if (!warp->live) continue;
                for (int i = 0; i < warp->fragments; i++)
                    if (warp->waits[i].kind == WAIT_MBARRIER) warp->waits[i].timed_out = any = true;
                if (warp->wait.kind == WAIT_MBARRIER) warp->wait.timed_out = true;
            }
        }
    return any;
}

static bool any_split_warp(const Machine *machine) {
    for (int c = 0; c < machine->n_clusters; c++)
        for (int r = 0; r < machine->clusters[c]->n; r++) {
            const Cta *cta = machine->clusters[c]->cta[r];
            for (int w = 0; w < cta->n_warps; w++)
                if (cta->warps[w].live && cta->warps[w].fragments > 1) return true;
        }
    return false;
}

/* No warp can run. Complete an asynchronous operation; else let try_wait time out once; else let lanes
 * overtake blocked lanes of their warp; else this is a deadlock. */
static bool unblock(Machine *machine, Stage *stage) {
    if (async_run_oldest(machine)) return true;
    if (machine->progress) *stage = RUNNING;
    machine->progress = false;
    if (*stage == RUNNING) {
        *stage = TIMED_OUT;
        machine->forcing = false;
        if (force_timeouts(machine)) return true;
    }
    if (*stage == TIMED_OUT) {
        *stage = FORCED;
        machine->forcing = true;
        if (any_split_warp(machine)) return true;
    }
    report_deadlock(machine);
    return false;
}

/* ---------------------------------------------------------------- all time slices */
typedef struct { Warp **warp; int n, capacity; } Turns;

static void collect_turns(Machine *machine, Turns *turns) {
    turns->n = 0;
    for (int c = 0; c < machine->n_clusters; c++)
        for (int r = 0; r < machine->clusters[c]->n; r++) {
            Cta *cta = machine->clusters[c]->cta[r];
            for (int w = 0; w < cta->n_warps; w++) {
                if (!cta->warps[w].live) continue;
                if (turns->n == turns->capacity) {
                    turns->capacity = turns->capacity ? 2 * turns->capacity : 64;
                    turns->warp = realloc(turns->warp, (size_t)turns->capacity * sizeof *turns->warp);
                    if (!turns->warp) abort();
                }
                turns->warp[turns->n++] = &cta->warps[w];
            }
        }
}

static void shuffle_turns(Machine *machine, Turns *turns) {
    for (int i = turns->n - 1; i > 0; i--) {
        int j = (int)(next_random(machine) % (uint64_t)(i + 1));
        Warp *warp = turns->warp[i];
        turns->warp[i] = turns->warp[j];
        turns->warp[j] = warp;
    }
}

static bool over_limit(Machine *machine, uint64_t *next_tick) {
    Counters *counters = &machine->counters;
    if (machine->config.max_steps && counters->steps > machine->config.max_steps) {
        report(machine, FINDING_OTHER, NULL, NULL, true, "stopped after %llu warp instructions",
               (unsigned long long)counters->steps);
        return true;
    }
    if (counters->steps < *next_tick) return false;
    *next_tick = counters->steps + (1u << 20);
    return machine->tick && machine->tick(counters->steps, machine->done_ctas,
                                          machine->total_clusters * (uint64_t)machine->launch.cluster[0] *
                                              machine->launch.cluster[1] * machine->launch.cluster[2]);
}

enum { SPIN_ROUNDS = 512 }; /* rounds without progress after which an operation completes: warps may spin on it */

void run_grid(Machine *machine) {
    Turns turns = {0};
    Stage stage = RUNNING;
    uint64_t next_tick = 1u << 20;
    uint32_t spinning = 0;
    bool changed = true, idle = false; /* idle: nobody ran in the last round, so nobody sits this one out */
    const bool random = machine->config.random_order;
    const uint32_t slice = machine->config.slice ? machine->config.slice : 1;
    while (launch_next_cluster(machine)) {}
    while (!machine->fatal) {
        if (changed) collect_turns(machine, &turns);
        changed = false;
        if (!turns.n) break;
        if (random) shuffle_turns(machine, &turns);
        bool ran = false, skipped = false, busy = false; /* busy: somebody did more than to sleep */
        for (int i = 0; i < turns.n && !machine->fatal; i++) {
            Warp *warp = turns.warp[i];
            uint32_t budget = slice;
            if (random) {
                uint64_t dice = next_random(machine);
                if ((dice & 7) == 0 && !idle) {
                    skipped = true;
                    continue;
                }
                budget = 1 + (uint32_t)((dice >> 8) % slice);
            }
            uint32_t done = run_slice(machine, warp, budget);
            if (!warp->live) changed = true;
            if (!done) continue;
            ran = true;
            if (!machine->yielded) busy = true;
            machine->counters.steps += done;
            async_policy_step(machine);
        }
        idle = !ran;
        if (machine->fatal || over_limit(machine, &next_tick)) break;
        if (changed && retire_clusters(machine))
            while (launch_next_cluster(machine)) {}
        if (ran) {
            if (machine->progress) {
                stage = RUNNING;
                machine->progress = machine->forcing = false;
                spinning = 0;
            } else if ((spinning += busy ? 1 : SPIN_ROUNDS / 8) >= SPIN_ROUNDS) {
                spinning = 0;
                async_run_oldest(machine);
            }
        } else if (!skipped && !changed && !unblock(machine, &stage)) {
            break;
        }
    }
    free(turns.warp);
}
