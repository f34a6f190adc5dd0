/* Launches: machines, clusters, CTAs, and what is checked when a CTA ends. */
#include "core.h"
#include "memory.h"

/* ---------------------------------------------------------------- special registers */
static uint64_t linear(const uint32_t index[3], const uint32_t size[3]) {
    return index[0] + (uint64_t)size[0] * (index[1] + (uint64_t)size[1] * index[2]);
}

static void thread_index(const Warp *w, int lane, uint32_t index[3]) {
    const uint32_t *block = w->machine->launch.block;
    uint32_t thread = (uint32_t)(w->index * LANES + lane);
    index[0] = thread % block[0];
    index[1] = thread / block[0] % block[1];
    index[2] = thread / block[0] / block[1];
}

#define AXES(macro) macro(x, 0) macro(y, 1) macro(z, 2)
#define SPECIAL(name) static uint64_t special_##name(const Warp *w, int lane)
#define UNUSED (void)w, (void)lane
#define AXIS(axis, i) \
    SPECIAL(tid_##axis) { uint32_t index[3]; thread_index(w, lane, index); return index[i]; } \
    SPECIAL(ntid_##axis) { UNUSED; return w->machine->launch.block[i]; } \
    SPECIAL(ctaid_##axis) { UNUSED; return w->cta->index[i]; } \
    SPECIAL(nctaid_##axis) { UNUSED; return w->machine->launch.grid[i]; } \
    SPECIAL(clusterid_##axis) { UNUSED; return w->cta->cluster->index[i]; } \
    SPECIAL(nclusterid_##axis) { UNUSED; return w->machine->launch.grid[i] / w->machine->launch.cluster[i]; } \
    SPECIAL(cluster_ctaid_##axis) { UNUSED; return w->cta->index[i] % w->machine->launch.cluster[i]; } \
    SPECIAL(cluster_nctaid_##axis) { UNUSED; return w->machine->launch.cluster[i]; }
AXES(AXIS)
SPECIAL(cluster_ctarank) { UNUSED; return (uint64_t)w->cta->rank; }
SPECIAL(cluster_nctarank) { UNUSED; return (uint64_t)w->cta->cluster->n; }
SPECIAL(is_explicit_cluster) { UNUSED; return w->cta->cluster->n > 1; }
SPECIAL(laneid) { UNUSED; return (uint64_t)lane; }
SPECIAL(warpid) { UNUSED; return (uint64_t)w->index; }
SPECIAL(nwarpid) { UNUSED; return 64; }
SPECIAL(smid) { UNUSED; return w->cta->id % 148; } /* a B200 has 148 */
SPECIAL(nsmid) { UNUSED; return 148; }
SPECIAL(gridid) { UNUSED; return 1; }
SPECIAL(lanemask_eq) { UNUSED; return 1u << lane; }
SPECIAL(lanemask_lt) { UNUSED; return (1u << lane) - 1; }
SPECIAL(lanemask_le) { UNUSED; return (2u << lane) - 1; }
SPECIAL(lanemask_gt) { UNUSED; return (uint32_t)~((2u << lane) - 1); }
SPECIAL(lanemask_ge) { UNUSED; return (uint32_t)~((1u << lane) - 1); }
SPECIAL(dynamic_smem_size) { UNUSED; return w->machine->launch.dynamic_shared; }
SPECIAL(total_smem_size) { UNUSED; return w->cta->shared_bytes - DYNAMIC_SHARED_START; }
SPECIAL(aggr_smem_size) { UNUSED; return w->cta->shared_bytes; }
SPECIAL(reserved_smem_offset_begin) { UNUSED; return 0; }
SPECIAL(reserved_smem_offset_end) { UNUSED; return DYNAMIC_SHARED_START; }
SPECIAL(reserved_smem_offset_cap) { UNUSED; return DYNAMIC_SHARED_START; }

typedef uint64_t (*SpecialValue)(const Warp *w, int lane);
static const struct { const char *name; SpecialValue value; } specials[] = {
#define ROW(axis, i) \
    {"%tid." #axis, special_tid_##axis}, {"%ntid." #axis, special_ntid_##axis}, \
    {"%ctaid." #axis, special_ctaid_##axis}, {"%nctaid." #axis, special_nctaid_##axis}, \
    {"%clusterid." #axis, special_clusterid_##axis}, {"%nclusterid." #axis, special_nclusterid_##axis}, \
    {"%cluster_ctaid." #axis, special_cluster_ctaid_##axis}, \
    {"%cluster_nctaid." #axis, special_cluster_nctaid_##axis},
    AXES(ROW)
#define NAMED(name) {"%" #name, special_##name},
    NAMED(cluster_ctarank) NAMED(cluster_nctarank) NAMED(is_explicit_cluster) NAMED(laneid) NAMED(warpid)
    NAMED(nwarpid) NAMED(smid) NAMED(nsmid) NAMED(gridid) NAMED(lanemask_eq) NAMED(lanemask_lt) NAMED(lanemask_le)
    NAMED(lanemask_gt) NAMED(lanemask_ge) NAMED(dynamic_smem_size) NAMED(total_smem_size) NAMED(aggr_smem_size)
    NAMED(reserved_smem_offset_begin) NAMED(reserved_smem_offset_end) NAMED(reserved_smem_offset_cap)
};

int special_by_name(const char *name) {
    for (size_t i = 0; i < sizeof specials / sizeof *specials; i++)
        if (!strcmp(specials[i].name, name)) return (int)i;
    return -1;
}

static uint64_t symbol_value(const Warp *w, const Symbol *symbol, int lane) {
    switch (symbol->kind) {
    case 0: return (uint64_t)w->cta->rank << SHARED_RANK_SHIFT | symbol->value;
    case 1: return (uint64_t)(uintptr_t)w->machine->params + symbol->value;
    case 3: return specials[symbol->value].value(w, lane);
    default: return symbol->value;
    }
}

void fill_symbols(Warp *warp) {
    const Program *program = warp->program;
    for (int i = 0; i < program->n_symbols; i++) {
        const Symbol *symbol = &program->symbols[i];
        Operand operand = {.kind = OPERAND_REGISTER, .width = symbol->width, .index = symbol->index,
                           .offset = symbol->offset};
        for (int lane = 0; lane < LANES; lane++)
            if (symbol->width) set_lane(warp, &operand, lane, symbol_value(warp, symbol, lane));
            else set_pred(warp, &operand, 1u << lane, symbol_value(warp, symbol, lane) ? FULL_MASK : 0);
    }
}

/* ---------------------------------------------------------------- CTAs */
static void *aligned(size_t bytes, int fill) {
    void *place = NULL;
    if (posix_memalign(&place, 128, bytes ? bytes : 128)) abort();
    memset(place, fill, bytes ? bytes : 128);
    return place;
}

static void *zeroed(size_t n, size_t size) {
    void *place = calloc(n ? n : 1, size);
    if (!place) abort();
    return place;
}

static void start_warp(Cta *cta, int index, int threads) {
    Warp *warp = &cta->warps[index];
    Program *program = cta->machine->program;
    int lanes = threads - index * LANES;
    warp->cta = cta;
    warp->machine = cta->machine;
    warp->program = program;
    warp->index = index;
    warp->registers = aligned(program->register_bytes, 0);
    warp->defined = zeroed(program->register_count, sizeof *warp->defined);
    warp->live = lanes >= LANES ? FULL_MASK : (1u << lanes) - 1;
    warp->fragments = 1;
    warp->fragment[0] = (Fragment){.pc = 0, .mask = warp->live};
    warp->agent = (Agent){cta, index, &warp->clock};
    if (program->local_bytes) warp->local = aligned((size_t)program->local_bytes * LANES, 0xff);
    warp->registers_held = program->launch_registers;
    agent_tick(&warp->agent);
    fill_symbols(warp);
}

static Cta *start_cta(Machine *machine, Cluster *cluster, int rank) {
    const Launch *launch = &machine->launch;
    const uint32_t *size = launch->cluster;
    Cta *cta = zeroed(1, sizeof *cta);
    uint32_t within[3] = {(uint32_t)rank % size[0], (uint32_t)rank / size[0] % size[1],
                          (uint32_t)rank / size[0] / size[1]};
    cta->machine = machine;
    cta->cluster = cluster;
    cta->rank = rank;
    cluster->cta[rank] = cta;
    for (int i = 0; i < 3; i++) cta->index[i] = cluster->index[i] * size[i] + within[i];
    cta->id = (uint32_t)linear(cta->index, launch->grid);
    /* Memory that nobody wrote holds NaN in every format. */
    cta->shared_bytes = machine->program->static_shared + launch->dynamic_shared;
    cta->shared = aligned(cta->shared_bytes, 0xff);
    cta->tmem = aligned((size_t)TMEM_COLUMNS * TMEM_LANES * sizeof *cta->tmem, 0xff);
    cta->mbarriers = zeroed(cta->shared_bytes / 8 + 1, sizeof *cta->mbarriers);
    cta->tensor_agent = (Agent){cta, AGENT_TENSOR, &cta->tensor_clock};
    agent_tick(&cta->tensor_agent);
    shadow_new_cta(cta);
    cta->live_threads = (int)(launch->block[0] * launch->block[1] * launch->block[2]);
    cta->n_warps = cta->live_warps = (cta->live_threads + LANES - 1) / LANES;
    cta->warps = zeroed((size_t)cta->n_warps, sizeof *cta->warps);
    return cta;
}

static uint32_t cluster_size(const Launch *launch) {
    return launch->cluster[0] * launch->cluster[1] * launch->cluster[2];
}

bool launch_next_cluster(Machine *machine) {
    const Launch *launch = &machine->launch;
    uint32_t size = cluster_size(launch);
    uint32_t most = machine->config.resident / size ? machine->config.resident / size : 1;
    if (machine->fatal || machine->next_cluster >= machine->total_clusters || (uint32_t)machine->n_clusters >= most)
        return false;
    uint64_t id = machine->next_cluster++;
    uint32_t grid[3];
    for (int i = 0; i < 3; i++) grid[i] = launch->grid[i] / launch->cluster[i];
    Cluster *cluster = zeroed(1, sizeof *cluster);
    cluster->n = (int)size;
    cluster->index[0] = (uint32_t)(id % grid[0]);
    cluster->index[1] = (uint32_t)(id / grid[0] % grid[1]);
    cluster->index[2] = (uint32_t)(id / grid[0] / grid[1]);
    for (int rank = 0; rank < cluster->n; rank++) {
        Cta *cta = start_cta(machine, cluster, rank);
        for (int w = 0; w < cta->n_warps; w++) start_warp(cta, w, cta->live_threads);
    }
    machine->clusters = realloc(machine->clusters, (size_t)(machine->n_clusters + 1) * sizeof *machine->clusters);
    if (!machine->clusters) abort();
    machine->clusters[machine->n_clusters++] = cluster;
    return true;
}

/* ---------------------------------------------------------------- the end of a CTA */
static void check_in_flight(Cta *cta, const Warp *last) {
    static const char *const kinds[] = {"TMA load", "TMA store", "tensor core operation"};
    Machine *machine = cta->machine;
    for (AsyncOp *op = machine->pending_head; op; op = op->next)
        if (op->cta == cta && op->lane_class < 3 && !(op->lane_class == 1 && op->stage))
            report(machine, FINDING_OTHER, op->warp ? op->warp : last, op->in, false,
                   "CTA %u has exited while this %s is in flight", cta->id, kinds[op->lane_class]);
}

static void check_cta_end(Cta *cta, const Warp *last) {
    Machine *machine = cta->machine;
    check_in_flight(cta, last);
    barrier_cta_exited(cta, last);
    int columns = 0;
    for (int i = 0; i < TMEM_COLUMNS; i++) columns += cta->columns.allocated[i];
    if (columns)
        report(machine, FINDING_TMEM, last, NULL, false, "CTA %u exits with %d TMEM columns allocated", cta->id, columns);
    /* Bytes still expected are harmless if none are on their way: producers may announce a last tile that
     * never comes. More bytes than were expected are a fault. */
    for (uint32_t i = 0; i < cta->shared_bytes / 8; i++) {
        const MBarrier *bar = cta->mbarriers[i];
        if (bar && bar->valid && bar->tx < 0)
            report(machine, FINDING_TRANSACTION, last, bar->initialised_by, false,
                   "CTA %u exits while the mbarrier at shared+%u got %lld bytes more than expected", cta->id,
                   bar->offset, -(long long)bar->tx);
    }
}

void warp_exited(Warp *warp) {
    Cta *cta = warp->cta;
    Machine *machine = warp->machine;
    if (warp->now > machine->counters.cycles) machine->counters.cycles = warp->now;
    if (cta->id == machine->config.trace_cta && warp->now > warp->run_start)
        trace_event(machine, cta, (Event){.start = warp->run_start, .finish = warp->now, .lane = warp->index,
                                          .pc = warp->run_pc, .kind = 0});
    barrier_warp_exited(warp);
    if (--cta->live_warps) return;
    check_cta_end(cta, warp);
    cta->done = true;
    machine->done_ctas++;
}

static void free_warp(Warp *warp) {
    free(warp->registers);
    free(warp->defined);
    free(warp->local);
    free(warp->tmem_loads);
    tmem_free_warp(warp);
    copy_free_groups(warp);
    clock_free(&warp->clock);
}

static void free_cta(Cta *cta) {
    for (int w = 0; w < cta->n_warps; w++) free_warp(&cta->warps[w]);
    shadow_free_cta(cta);
    for (size_t i = 0; i < sizeof cta->async_clock / sizeof *cta->async_clock; i++) clock_free(&cta->async_clock[i]);
    clock_free(&cta->tensor_clock);
    free(cta->mbarriers);
    free(cta->warps);
    free(cta->shared);
    free(cta->tmem);
    free(cta);
}

static bool has_pending(const Machine *machine, const Cluster *cluster) {
    for (const AsyncOp *op = machine->pending_head; op; op = op->next)
        if (op->cta->cluster == cluster) return true;
    return false;
}

static void free_cluster(Cluster *cluster) {
    clock_free(&cluster->barrier.arriving);
    clock_free(&cluster->barrier.complete);
    for (int rank = 0; rank < cluster->n; rank++) clock_free(&cluster->barrier.near[rank]);
    for (int rank = 0; rank < cluster->n; rank++) free_cta(cluster->cta[rank]);
    free(cluster);
}

bool retire_clusters(Machine *machine) {
    int kept = 0, before = machine->n_clusters;
    for (int c = 0; c < before; c++) {
        Cluster *cluster = machine->clusters[c];
        bool done = true;
        for (int rank = 0; rank < cluster->n; rank++) done &= cluster->cta[rank]->done;
        cluster->done = done;
        while (done && has_pending(machine, cluster) && async_run_oldest(machine)) {}
        if (done) free_cluster(cluster);
        else machine->clusters[kept++] = cluster;
    }
    machine->n_clusters = kept;
    return kept != before;
}

void free_clusters(Machine *machine) {
    for (int c = 0; c < machine->n_clusters; c++) free_cluster(machine->clusters[c]);
    machine->n_clusters = 0;
}

/* ---------------------------------------------------------------- memory */
static int by_address(const void *a, const void *b) {
    const Region *x = a, *y = b;
    return (x->address > y->address) - (x->address < y->address);
}

static Region *region_at(Machine *machine, uint64_t address) {
    Region *last = machine->last_region;
    if (last && address - last->address < last->bytes) return last;
    int low = 0, high = machine->n_regions; /* the first one above the address */
    while (low < high) {
        int middle = (low + high) / 2;
        if (machine->regions[middle].address <= address) low = middle + 1;
        else high = middle;
    }
    return low ? machine->last_region = &machine->regions[low - 1] : NULL;
}

uint8_t *global_target(Machine *machine, const Warp *warp, const Instr *in, uint64_t address, uint64_t bytes,
                       bool write) {
    Region *region = region_at(machine, address);
    if (region && address - region->address < region->bytes && bytes <= region->bytes - (address - region->address)) {
        if (write && !region->writable) {
            report(machine, FINDING_BOUNDS, warp, in, true, "%llu bytes written at offset %lld of %s, which is read only",
                   (unsigned long long)bytes, (long long)(address - region->address), region->name);
            return NULL;
        }
        return (uint8_t *)(uintptr_t)address;
    }
    const char *verb = write ? "written" : "read";
    if (!region && machine->n_regions) region = &machine->regions[0];
    if (region && region + 1 < machine->regions + machine->n_regions && address > region->address + region->bytes &&
        region[1].address - address < address - (region->address + region->bytes))
        region++;
    if (!region) {
        report(machine, FINDING_BOUNDS, warp, in, true, "%llu bytes %s at %#llx: no memory was given",
               (unsigned long long)bytes, verb, (unsigned long long)address);
        return NULL;
    }
    int64_t offset = (int64_t)(address - region->address), size = (int64_t)region->bytes;
    char distance[80];
    if (offset < 0) snprintf(distance, sizeof distance, "%lld bytes before its start", -(long long)offset);
    else if (offset >= size) snprintf(distance, sizeof distance, "%lld bytes past its end", (long long)(offset - size));
    else snprintf(distance, sizeof distance, "the last %lld of them past its end",
                  (long long)(offset + (int64_t)bytes - size));
    report(machine, FINDING_BOUNDS, warp, in, true,
           "%llu bytes %s at %#llx, outside of all memory given; nearest: offset %lld of %s, which has %lld bytes: %s",
           (unsigned long long)bytes, verb, (unsigned long long)address, (long long)offset, region->name,
           (long long)size, distance);
    return NULL;
}

Cta *shared_target(Warp *warp, const Instr *in, uint32_t address, uint32_t bytes, uint32_t *offset) {
    Cluster *cluster = warp->cta->cluster;
    uint32_t rank = address >> SHARED_RANK_SHIFT, place = address & SHARED_OFFSET_MASK;
    if (rank >= (uint32_t)cluster->n) {
        report(warp->machine, FINDING_BOUNDS, warp, in, true,
               "shared address %#x names rank %u of a cluster of %d", address, rank, cluster->n);
        return NULL;
    }
    Cta *cta = cluster->cta[rank];
    if (place < DYNAMIC_SHARED_START || place + bytes > cta->shared_bytes) {
        report(warp->machine, FINDING_BOUNDS, warp, in, true,
               "%u bytes at shared+%u: the CTA's shared memory is %u .. %u", bytes, place, DYNAMIC_SHARED_START,
               cta->shared_bytes);
        return NULL;
    }
    if (cta->done && cta != warp->cta)
        report(warp->machine, FINDING_OTHER, warp, in, false, "shared memory of CTA %u, which has exited", cta->id);
    *offset = place;
    return cta;
}

/* ---------------------------------------------------------------- interface for machine.py */
Machine *machine_new(const Config *config) {
    Machine *machine = zeroed(1, sizeof *machine);
    machine->config = *config;
    machine->random = config->seed * 0x9e3779b97f4a7c15ull + 0x1234567;
    if (!machine->random) machine->random = 1;
    for (int i = 0; i < 8; i++) next_random(machine);
    return machine;
}

void machine_region(Machine *machine, uint64_t address, uint64_t bytes, const char *name, int writable) {
    machine->regions = realloc(machine->regions, (size_t)(machine->n_regions + 1) * sizeof *machine->regions);
    if (!machine->regions) abort();
    machine->regions[machine->n_regions++] = (Region){.address = address, .bytes = bytes, .name = strdup(name),
                                                      .writable = writable != 0};
    machine->last_region = NULL;
}

void machine_tick(Machine *machine, bool (*tick)(uint64_t, uint64_t, uint64_t)) { machine->tick = tick; }

void run_grid(Machine *machine);

/* Whether order and memory may part ways, or tcgen05.fence tells more than what orders memory. */
static bool clocks_may_differ(const Machine *machine) {
    const Program *program = machine->program;
    if (machine->config.strict_tcgen05_fence || machine->config.strict_scopes) return true;
    if (program->relaxed_barriers || (program->tensor_fences && program->relaxed_memory)) return true;
    return program->narrow_barriers && cluster_size(&machine->launch) > 1;
}

void machine_launch(Machine *machine, Program *program, const Launch *launch, const uint8_t *params) {
    machine->program = program;
    machine->launch = *launch;
    machine->params = aligned(program->param_bytes + 64, 0);
    memcpy(machine->params, params, program->param_bytes);
    if (program->param_bytes)
        machine_region(machine, (uint64_t)(uintptr_t)machine->params, program->param_bytes, "the parameters", 0);
    qsort(machine->regions, (size_t)machine->n_regions, sizeof *machine->regions, by_address);
    wide_clocks = machine->config.races && clocks_may_differ(machine);
    machine->total_clusters = (uint64_t)launch->grid[0] * launch->grid[1] * launch->grid[2] / cluster_size(launch);
    machine->executed = zeroed((size_t)MAX_WARPS * (size_t)program->n, sizeof *machine->executed);
    run_grid(machine);
    while (!machine->fatal && async_run_oldest(machine)) {}
    for (int w = 0; w < MAX_WARPS; w++)
        for (int i = 0; i < program->n; i++)
            machine->counters.executed_by_class[program->instrs[i].class_] +=
                machine->executed[(size_t)w * (size_t)program->n + (size_t)i];
}

void machine_free(Machine *machine) {
    for (AsyncOp *op = machine->pending_head, *next; op; op = next) {
        next = op->next;
        clock_free(&op->clock);
        free(op->payload);
        free(op);
    }
    free_clusters(machine);
    shadow_free_machine(machine);
    for (int i = 0; i < machine->n_regions; i++) free((char *)machine->regions[i].name);
    free(machine->regions);
    free(machine->clusters);
    free(machine->findings);
    free(machine->events);
    free(machine->executed);
    free(machine->deadlock);
    free(machine->arrivals);
    free(machine->params);
    free(machine);
}

const Finding *machine_findings(const Machine *machine, int *n) { return *n = machine->n_findings, machine->findings; }
const Event *machine_events(const Machine *machine, int *n) { return *n = machine->n_events, machine->events; }
const Counters *machine_counters(const Machine *machine) { return &machine->counters; }
const uint64_t *machine_executed(const Machine *machine) { return machine->executed; }
const char *machine_deadlock(const Machine *machine) { return machine->deadlock ? machine->deadlock : ""; }
/* Structures that binding.py declares again: their sizes, to notice a difference. */
void machine_sizes(uint32_t *sizes) {
    sizes[0] = sizeof(Config);
    sizes[1] = sizeof(Launch);
    sizes[2] = sizeof(Finding);
    sizes[3] = sizeof(Event);
    sizes[4] = sizeof(Counters);
    sizes[5] = CLASSES;
    sizes[6] = FINDINGS;
}
