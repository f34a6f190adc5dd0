/* The rules of shadow memory: whether two accesses to the same place are in order, and what is wrong if not. */
#include "shadow.h"

/* ---------------------------------------------------------------- reports */
static const char *agent_name(char *text, size_t size, uint32_t who) {
    uint32_t cta = who >> AGENT_BITS;
    int agent = (int)(who & ((1u << AGENT_BITS) - 1));
    if (agent < MAX_WARPS) snprintf(text, size, "warp %d of CTA %u", agent, cta);
    else if (agent == AGENT_TENSOR) snprintf(text, size, "the tensor pipe of CTA %u", cta);
    else snprintf(text, size, "an asynchronous operation of CTA %u", cta);
    return text;
}

static const char *place_name(const Shadow *s, char *text, size_t size, const uint64_t *cell, unsigned mask) {
    unsigned first = mask ? (unsigned)__builtin_ctz(mask) : 0;
    unsigned last = mask ? 31u - (unsigned)__builtin_clz(mask) : 0;
    size_t at = (size_t)(cell - s->base);
    if (s->flags & ACCESS_TMEM) {
        snprintf(text, size, "TMEM of CTA %u at column %zu, lanes %zu..%zu", s->cta->id, at % TMEM_COLUMNS,
                 at / TMEM_COLUMNS * PARTS + first, at / TMEM_COLUMNS * PARTS + last);
    } else if (s->flags & ACCESS_SHARED) {
        snprintf(text, size, "shared memory of CTA %u at offsets %zu..%zu", s->cta->id, at * PARTS + first,
                 at * PARTS + last);
    } else {
        uint64_t address = s->base_address + at * PARTS + first;
        for (int i = 0; i < s->machine->n_regions; i++) {
            const Region *region = &s->machine->regions[i];
            if (address - region->address < region->bytes) {
                snprintf(text, size, "global memory, %s + %llu", region->name ? region->name : "region",
                         (unsigned long long)(address - region->address));
                return text;
            }
        }
        snprintf(text, size, "global memory at 0x%llx", (unsigned long long)address);
    }
    return text;
}

static const Instr *instr_at(const Machine *machine, uint32_t pc) {
    return pc < (uint32_t)machine->program->n ? &machine->program->instrs[pc] : NULL;
}

static const Warp *reporting_warp(const Agent *agent) {
    if (agent->index < MAX_WARPS && agent->index < agent->cta->n_warps)
        return &agent->cta->warps[agent->index];
    return async_running ? async_running->warp : NULL;
}

static bool first_in_access(Shadow *s, FindingKind kind) {
    bool first = !(s->reported >> kind & 1);
    s->reported |= 1u << kind;
    return first;
}

static const char *line_of(char *text, size_t size, const Instr *in) {
    if (!in) snprintf(text, size, "unknown instruction");
    else if (in->source_line)
        snprintf(text, size, "%.60s, line %u, source line %u", in->name, in->line, in->source_line);
    else snprintf(text, size, "%.60s, line %u", in->name, in->line);
    return text;
}

/* Whether the plain store under way leaves the conflicting bytes as they are. */
static bool stores_equal_bytes(const Shadow *s, const uint64_t *cell, unsigned mask) {
    if (!store_under_way || s->flags & (ACCESS_TMEM | NODE_FLAGS)) return false;
    uint64_t at = (uint64_t)(cell - s->base) * PARTS;
    if (s->flags & ACCESS_SHARED) return store_keeps_bytes(s->cta, at, mask);
    return store_keeps_bytes(NULL, s->base_address + at, mask);
}

/* A finding about this access and an earlier one, `other`. */
static void report_pair(Shadow *s, FindingKind kind, const uint64_t *cell, Node other, bool other_write,
                        const char *what, const char *relation) {
    bool both_write = other_write && s->flags & ACCESS_WRITE;
    if (kind == FINDING_RACE && both_write && stores_equal_bytes(s, cell, other.mask)) {
        kind = FINDING_BENIGN_RACE;
        what = "two unordered writes of equal bytes";
    }
    if (!first_in_access(s, kind)) return;
    char place[128], me[64], him[64], my_line[128], his_line[128];
    int before = s->machine->n_findings;
    report(s->machine, kind, reporting_warp(s->agent), s->in, false,
           "%s: %s: %s by %s (%s) %s %s by %s (%s)", what,
           place_name(s, place, sizeof place, cell, other.mask), s->flags & ACCESS_WRITE ? "write" : "read",
           agent_name(me, sizeof me, s->who), line_of(my_line, sizeof my_line, s->in), relation,
           other_write ? "the write" : "the read", agent_name(him, sizeof him, other.who),
           line_of(his_line, sizeof his_line, instr_at(s->machine, other.pc)));
    if (s->machine->n_findings > before) s->machine->findings[before].other_pc = other.pc;
}

void shadow_report_unwritten(Shadow *s, const uint64_t *cell, unsigned mask) {
    if (!first_in_access(s, FINDING_UNINITIALISED)) return;
    char place[128], me[64];
    report(s->machine, FINDING_UNINITIALISED, reporting_warp(s->agent), s->in, false,
           "%s reads what was never written: %s", agent_name(me, sizeof me, s->who),
           place_name(s, place, sizeof place, cell, mask));
}

/* ---------------------------------------------------------------- checks */
static uint32_t known(const Clock *clock, uint32_t who, bool fenced) {
    ClockPart *part = clock_part((Clock *)clock, who >> AGENT_BITS);
    int agent = (int)(who & ((1u << AGENT_BITS) - 1));
    return !part ? 0 : fenced ? part->fenced[agent] : part->seen[agent];
}

/* Whether an access to tensor memory is in the agent's view; its own always are. */
static bool in_view(const Shadow *s, Node other) {
    ClockPart *part = wide_clocks ? clock_part(s->agent->clock, other.who >> AGENT_BITS) : NULL;
    return other.who == s->who || (part && part->view[other.who & ((1u << AGENT_BITS) - 1)] >= other.time);
}

/* Earlier accesses to tensor memory: synchronisation orders them, or fences do; strictly, fences must. */
bool shadow_ordered(const Shadow *s, Node other) {
    bool seen = known(s->agent->clock, other.who, false) >= other.time;
    if (!(s->flags & ACCESS_TMEM) || !wide_clocks) return seen;
    return s->machine->config.strict_tcgen05_fence ? in_view(s, other) : seen || in_view(s, other);
}

static bool report_unfenced(Shadow *s, const uint64_t *cell, Node other, bool write) {
    if (!(s->flags & ACCESS_TMEM) || known(s->agent->clock, other.who, false) < other.time) return false;
    ClockPart *part = clock_part(s->agent->clock, other.who >> AGENT_BITS);
    bool released = part->tensor[other.who & ((1u << AGENT_BITS) - 1)] >= other.time;
    report_pair(s, FINDING_TENSOR_FENCE, cell, other, write,
                released ? "missing tcgen05.fence::after_thread_sync" : "missing tcgen05.fence::before_thread_sync",
                "follows");
    return true;
}

/* Scopes of two atomics that include each other's thread. */
static bool morally_strong(const Shadow *s, Node other) {
    const Instr *in = instr_at(s->machine, other.pc);
    if (!s->machine->program->narrow_scopes || !in || !s->in) return true;
    const Cta *cta = s->agent->cta;
    uint32_t id = other.who >> AGENT_BITS;
    Scope needed = id == cta->id ? SCOPE_CTA : SCOPE_GPU;
    for (int i = 0; i < cta->cluster->n && needed == SCOPE_GPU; i++)
        if (cta->cluster->cta[i]->id == id) needed = SCOPE_CLUSTER;
    return in->scope <= needed && s->in->scope <= needed;
}

/* Two atomics do not race, if their scopes allow it. */
static bool atomics(Shadow *s, const uint64_t *cell, Node other, bool write) {
    if (!(s->flags & other.flags & NODE_ATOMIC)) return false;
    if (!morally_strong(s, other))
        report_pair(s, FINDING_RACE, cell, other, write, "atomics whose scopes do not include each other",
                    "is not ordered after");
    return true;
}

static bool fenced_mbarrier(const Shadow *s, Node init) {
    const CtaSync *sync = s->cta->sync;
    return sync && known(&sync->mbarrier_fence, init.who, false) >= init.time;
}

/* A write before this access: false if it was reported. */
bool shadow_check_write(Shadow *s, const uint64_t *cell, Node other) {
    if ((other.flags & NODE_MBARRIER) && !(s->flags & NODE_MBARRIER)) {
        report_pair(s, FINDING_BARRIER, cell, other, true, "ordinary access to a live mbarrier", "after");
        return false;
    }
    if (!shadow_ordered(s, other)) {
        if (atomics(s, cell, other, true)) return morally_strong(s, other);
        if (report_unfenced(s, cell, other, true)) return false;
        if (other.flags & NODE_MBARRIER)
            report_pair(s, FINDING_RACE, cell, other, true, "mbarrier used or initialised without order",
                        "is not ordered after");
        else
            report_pair(s, FINDING_RACE, cell, other, true, "data race", "is not ordered after");
        return false;
    }
    if ((s->flags & NODE_ASYNC) && !(other.flags & NODE_ASYNC) &&
        known(s->agent->clock, other.who, true) < other.time) {
        if ((other.flags & NODE_MBARRIER) && fenced_mbarrier(s, other)) return true;
        const Instr *writer = instr_at(s->machine, other.pc);
        bool copied = writer && !strncmp(writer->name, "cp.async.", 9);
        bool lenient = s->flags & ACCESS_WRITE || (s->in && !strncmp(s->in->name, "tcgen05.", 8));
        if (copied && lenient && !s->machine->config.strict_cp_async) return true;
        const char *what = "missing fence.proxy.async";
        if (other.flags & NODE_MBARRIER) what = "mbarrier initialisation not fenced for the async proxy";
        else if (copied) what = "missing fence.proxy.async after cp.async";
        report_pair(s, FINDING_PROXY, cell, other, true, what, "through the async proxy follows");
        return false;
    }
    return true;
}

/* What was read before the async proxy overwrites it. The ISA's examples fence a response of cluster launch
 * control before the next request; nobody fences what TMA overwrites after an mbarrier. */
static bool check_reuse(Shadow *s, const uint64_t *cell, Node other) {
    if (!(s->flags & NODE_ASYNC) || other.flags & NODE_ASYNC || !s->in ||
        strncmp(s->in->name, "clusterlaunchcontrol.", 21) || known(s->agent->clock, other.who, true) >= other.time)
        return true;
    report_pair(s, FINDING_PROXY, cell, other, false, "missing fence.proxy.async",
                "through the async proxy follows");
    return false;
}

bool shadow_check_read(Shadow *s, const uint64_t *cell, Node other) {
    if (shadow_ordered(s, other)) return check_reuse(s, cell, other);
    if (atomics(s, cell, other, false)) return morally_strong(s, other);
    if (report_unfenced(s, cell, other, false)) return false;
    report_pair(s, FINDING_RACE, cell, other, false, "data race", "is not ordered after");
    return false;
}
