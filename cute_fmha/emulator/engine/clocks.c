/* Vector clocks, and the clocks that atomics and fences pass on.
 *
 * A clock says, for every agent of every CTA it has heard of, up to which time that agent's actions
 * happened before. Parts are sorted by CTA; a launch without communication between clusters has as
 * many parts as a cluster has CTAs. With race detection off no agent ever ticks, all clocks stay empty
 * and everything here costs nothing. Clocks are wide only for launches in which that can tell anything.
 */
#include "sync.h"

bool wide_clocks;

static size_t part_bytes(void) { return wide_clocks ? sizeof(ClockPart) : offsetof(ClockPart, order); }

/* ---------------------------------------------------------------- clocks */
static int part_position(const Clock *clock, uint32_t cta) { /* the first part not below cta */
    int low = 0, high = clock->n;
    while (low < high) {
        int middle = (low + high) / 2;
        if (clock->part[middle].cta < cta) low = middle + 1;
        else high = middle;
    }
    return low;
}

ClockPart *clock_part(Clock *clock, uint32_t cta) {
    if (clock->n && clock->part[0].cta == cta) return clock->part;
    int at = part_position(clock, cta);
    return at < clock->n && clock->part[at].cta == cta ? &clock->part[at] : NULL;
}

static void reserve(Clock *clock, int n) {
    if (n <= clock->capacity) return;
    int capacity = clock->capacity ? 2 * clock->capacity : 1;
    if (capacity < n) capacity = n;
    clock->part = realloc(clock->part, (size_t)capacity * sizeof *clock->part);
    if (!clock->part) abort();
    clock->capacity = capacity;
}

ClockPart *clock_part_made(Clock *clock, uint32_t cta) {
    int at = part_position(clock, cta);
    if (at < clock->n && clock->part[at].cta == cta) return &clock->part[at];
    reserve(clock, clock->n + 1);
    memmove(&clock->part[at + 1], &clock->part[at], (size_t)(clock->n - at) * sizeof *clock->part);
    memset(&clock->part[at], 0, part_bytes());
    clock->part[at].cta = cta;
    clock->n++;
    return &clock->part[at];
}

static inline void latest(uint32_t *into, const uint32_t *from) {
    for (int i = 0; i < AGENTS; i++) into[i] = into[i] > from[i] ? into[i] : from[i];
}

static ClockPart *same_part(Clock *into, const Clock *from, int i) { /* most clocks have the same parts */
    uint32_t cta = from->part[i].cta;
    return i < into->n && into->part[i].cta == cta ? &into->part[i] : clock_part_made(into, cta);
}

void clock_join(Clock *into, const Clock *from) {
    if (into == from) return;
    for (int i = 0; i < from->n; i++) {
        const ClockPart *part = &from->part[i];
        ClockPart *mine = same_part(into, from, i);
        latest(mine->seen, part->seen);
        latest(mine->fenced, part->fenced);
        if (!wide_clocks) continue;
        latest(mine->order, part->order);
        latest(mine->tensor, part->tensor);
    }
}

void clock_join_order(Clock *into, const Clock *from) {
    for (int i = 0; wide_clocks && i < from->n; i++) {
        const ClockPart *part = &from->part[i];
        ClockPart *mine = same_part(into, from, i);
        latest(mine->order, part->order);
        latest(mine->order, part->seen);
        latest(mine->tensor, part->tensor);
    }
}

void clock_join_view(Clock *into, const Clock *from) {
    for (int i = 0; wide_clocks && i < from->n; i++)
        latest(same_part(into, from, i)->view, from->part[i].view);
}

void clock_copy(Clock *into, const Clock *from) {
    if (into == from) return;
    reserve(into, from->n);
    for (int i = 0; i < from->n; i++) memcpy(&into->part[i], &from->part[i], part_bytes());
    into->n = from->n;
}

void clock_clear(Clock *clock) { clock->n = 0; }

void clock_free(Clock *clock) {
    free(clock->part);
    *clock = (Clock){0};
}

static uint32_t ordered_until(const ClockPart *part, int agent) {
    if (!part) return 0;
    uint32_t seen = part->seen[agent], order = wide_clocks ? part->order[agent] : 0;
    return seen > order ? seen : order;
}

bool clock_covers(const Clock *clock, const Clock *other) {
    for (int i = 0; i < other->n; i++) {
        ClockPart *mine = clock_part((Clock *)clock, other->part[i].cta);
        for (int a = 0; a < AGENTS; a++)
            if (ordered_until(&other->part[i], a) > ordered_until(mine, a)) return false;
    }
    return true;
}

/* ---------------------------------------------------------------- agents */
uint32_t agent_time(Agent *agent) {
    uint32_t *time = &clock_part_made(agent->clock, agent->cta->id)->seen[agent->index];
    if (!*time) *time = 1; /* 0 is "never" */
    return *time;
}

void agent_tick(Agent *agent) {
    if (!agent->cta->machine->config.races) return;
    uint32_t time = agent_time(agent) + 1;
    /* the times of an asynchronous operation are its own: it must not reach those of the next one */
    if (agent->index >= AGENT_TENSOR && time % ASYNC_STRIDE == 0) return;
    clock_part(agent->clock, agent->cta->id)->seen[agent->index] = time;
}

void fence_proxy(Agent *agent) {
    if (!agent->cta->machine->config.races) return;
    agent_time(agent);
    for (int i = 0; i < agent->clock->n; i++) {
        ClockPart *part = &agent->clock->part[i]; /* fenced never exceeds seen */
        memcpy(part->fenced, part->seen, sizeof part->seen);
    }
    agent_tick(agent); /* writes after the fence are not covered by it */
}

/* ---------------------------------------------------------------- fences of tcgen05
 * An asynchronous tcgen05 instruction is ordered after an access of another thread if that thread executed
 * before_thread_sync (or committed) since, something orders the two threads, and this one executed
 * after_thread_sync since. What a thread has in view it may pass on: by then it has been waited for. */
void tensor_view_own(Agent *agent) {
    if (!wide_clocks) return;
    uint32_t now = agent_time(agent);
    clock_part(agent->clock, agent->cta->id)->view[agent->index] = now;
}

void tensor_fence_before(Agent *agent) {
    if (!wide_clocks) return;
    tensor_view_own(agent);
    for (int i = 0; i < agent->clock->n; i++)
        latest(agent->clock->part[i].tensor, agent->clock->part[i].view);
    agent_tick(agent); /* later accesses are not covered */
}

void tensor_fence_after(Agent *agent) {
    for (int i = 0; wide_clocks && i < agent->clock->n; i++)
        latest(agent->clock->part[i].view, agent->clock->part[i].tensor);
}

/* ---------------------------------------------------------------- fences and relaxed operations
 * fence.acq_rel lets later relaxed or volatile writes of the thread release what came before the
 * fence, and makes what earlier relaxed reads saw happen before what follows the fence. A fence by one
 * lane counts for its warp. Its scope limits whom that orders, as the scope of the access does. */
CtaSync *sync_of(Cta *cta) {
    if (!cta->sync && !(cta->sync = calloc(1, sizeof(CtaSync)))) abort();
    return cta->sync;
}

static Fences *fences_of(const Agent *agent) {
    return agent->index < MAX_WARPS ? &sync_of(agent->cta)->warp[agent->index] : NULL;
}

void fence_memory(Agent *agent, Scope scope) {
    Fences *fences = agent->cta->machine->config.races ? fences_of(agent) : NULL;
    if (!fences) return;
    agent_time(agent);
    for (int of = (int)scope; of < SCOPES; of++) {
        clock_join(agent->clock, &fences->pending[of]);
        clock_clear(&fences->pending[of]);
    }
    clock_copy(&fences->released[scope], agent->clock);
    agent_tick(agent);
}

void release_relaxed(Clock *sync, Agent *agent, Scope reach) {
    Fences *fences = agent->cta->machine->config.races ? fences_of(agent) : NULL;
    for (int scope = 0; fences && scope <= (int)reach; scope++) clock_join(sync, &fences->released[scope]);
    clock_join_order(sync, agent->clock);
}

void acquire_relaxed(Agent *agent, const Clock *sync, Scope reach) {
    Fences *fences = agent->cta->machine->config.races ? fences_of(agent) : NULL;
    if (fences) clock_join(&fences->pending[reach], sync);
    clock_join_order(agent->clock, sync);
}

/* ---------------------------------------------------------------- clocks of atomics
 * A release and an acquire synchronise if the scope of either includes the other's thread. An address that
 * a release wrote therefore has a clock for releases of .gpu scope, one for every cluster with what its
 * CTAs released at .cluster scope or wider, and one for every CTA; an acquire joins those that its own
 * scope reaches. Programs without narrow scopes need the first alone. Clocks only grow, which keeps
 * release sequences. */
typedef struct { uint64_t key, group; Clock *clock; } AtomicClock;
typedef struct { AtomicClock *slot; size_t n, capacity; } AtomicClocks;

static size_t find_slot(const AtomicClocks *table, uint64_t key, uint64_t group) {
    uint64_t hash = (key + group * 0xbf58476d1ce4e5b9ull) * 0x9e3779b97f4a7c15ull >> 20;
    size_t at = (size_t)hash & (table->capacity - 1);
    while (table->slot[at].clock && (table->slot[at].key != key || table->slot[at].group != group))
        at = (at + 1) & (table->capacity - 1);
    return at;
}

static void grow(AtomicClocks *table) {
    AtomicClocks larger = {NULL, table->n, table->capacity ? 2 * table->capacity : 256};
    larger.slot = calloc(larger.capacity, sizeof *larger.slot);
    if (!larger.slot) abort();
    for (size_t i = 0; i < table->capacity; i++) {
        const AtomicClock *old = &table->slot[i];
        if (old->clock) larger.slot[find_slot(&larger, old->key, old->group)] = *old;
    }
    free(table->slot);
    *table = larger;
}

/* The clock at an address for releases that reach `scope` around the agent. */
static Clock *atomic_clock(const Agent *agent, Space space, const Cta *cta, uint64_t address, Scope scope,
                           bool make) {
    Machine *machine = agent->cta->machine;
    AtomicClocks *table = machine->atomic_clocks;
    if (!table) {
        if (!make) return NULL;
        table = machine->atomic_clocks = calloc(1, sizeof *table);
        if (!table) abort();
    }
    bool shared = space == SPACE_SHARED || space == SPACE_SHARED_CLUSTER;
    uint64_t key = shared ? 1ull << 63 | (uint64_t)cta->id << 24 | address >> 2 : address >> 2;
    uint64_t group = scope == SCOPE_GPU ? 0 : scope == SCOPE_CTA ? 2ull << 32 | agent->cta->id
                                            : 1ull << 32 | agent->cta->cluster->cta[0]->id;
    if (2 * table->n >= table->capacity) {
        if (!make && !table->capacity) return NULL;
        grow(table);
    }
    AtomicClock *slot = &table->slot[find_slot(table, key, group)];
    if (!slot->clock && make) {
        slot->key = key;
        slot->group = group;
        slot->clock = calloc(1, sizeof *slot->clock);
        if (!slot->clock) abort();
        table->n++;
    }
    return slot->clock;
}

static int narrowest(const Agent *agent) {
    return agent->cta->machine->program->narrow_scopes ? SCOPE_CTA : SCOPE_GPU;
}

void atomic_acquire(Agent *agent, Space space, const Cta *cta, uint64_t address, Scope scope, bool acquire) {
    for (int of = (int)scope; of <= narrowest(agent); of++) {
        Clock *clock = atomic_clock(agent, space, cta, address, (Scope)of, false);
        if (!clock) continue;
        Fences *fences = fences_of(agent);
        if (acquire) acquire_from(agent, clock);
        else if (fences) clock_join(&fences->pending[of], clock);
        clock_join_order(agent->clock, clock);
    }
}

/* What is released at `scope` reaches everyone within narrower ones, too. */
static void release_within(Agent *agent, Space space, const Cta *cta, uint64_t address, Scope scope,
                           const Clock *what) {
    for (int of = (int)scope; of <= narrowest(agent); of++)
        clock_join(atomic_clock(agent, space, cta, address, (Scope)of, true), what);
}

void atomic_release(Agent *agent, Space space, const Cta *cta, uint64_t address, Scope scope, bool release) {
    Fences *fences = fences_of(agent);
    for (int fenced = 0; fences && fenced < SCOPES; fenced++) /* most relaxed atomics: nothing to pass on */
        if (fences->released[fenced].n)
            release_within(agent, space, cta, address, fenced > (int)scope ? (Scope)fenced : scope,
                           &fences->released[fenced]);
    for (int of = (int)scope; wide_clocks && of <= narrowest(agent); of++)
        clock_join_order(atomic_clock(agent, space, cta, address, (Scope)of, true), agent->clock);
    if (!release) return;
    release_within(agent, space, cta, address, scope, agent->clock);
    agent_tick(agent);
}

void atomic_clocks_free(Machine *machine) {
    AtomicClocks *table = machine->atomic_clocks;
    if (!table) return;
    for (size_t i = 0; i < table->capacity; i++)
        if (table->slot[i].clock) {
            clock_free(table->slot[i].clock);
            free(table->slot[i].clock);
        }
    free(table->slot);
    free(table);
    machine->atomic_clocks = NULL;
}
