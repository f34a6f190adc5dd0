/* Tensor memory: its allocation, and what the tcgen05 files share.
 *
 * Columns are handed out first fit. With cta_group::2 a warp of each CTA of the pair takes part in an
 * allocation, a deallocation or the giving up of the permit: the ISA lets the first of them block until the
 * second has come. Nothing orders the memory accesses of the two CTAs by that.
 */
#include "tensor.h"
#include <stdarg.h>

/* ---------------------------------------------------------------- decoding */
Decoded tensor_refuse(char *why, size_t size, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(why, size, format, arguments);
    va_end(arguments);
    return REFUSED;
}

const char *unknown_modifier(const Decode *d, int from, const char *const *known) {
    for (int i = from; i < d->n; i++) {
        bool found = false;
        for (int j = 0; known[j] && !found; j++) found = !strcmp(d->part[i], known[j]);
        if (!found) return d->part[i];
    }
    return NULL;
}

static int group_of_name(const char *name) {
    if (!name || strncmp(name, "tcgen05.", 8)) return 0;
    const char *found = strstr(name, ".cta_group::");
    return found ? found[12] - '0' : 0;
}

int cta_group(const Decode *d, char *why, size_t size) {
    int group = has(d, "cta_group::1") ? 1 : has(d, "cta_group::2") ? 2 : 0;
    if (!group) return tensor_refuse(why, size, "%s needs .cta_group::1 or ::2", d->text), 0;
    for (int i = d->program->n; i-- > 0;) {
        const Instr *other = &d->program->instrs[i];
        int its = other == d->in || other->line > d->in->line ? 0 : group_of_name(other->name);
        if (its && its != group) {
            tensor_refuse(why, size, "all tcgen05 instructions of a kernel must have the same cta_group, "
                          "but line %u has %d", other->line, its);
            return 0;
        }
        if (its) break;
    }
    return group;
}

bool cta_pair(Warp *warp, const Instr *in, Cta *pair[2]) {
    Cluster *cluster = warp->cta->cluster;
    int even = warp->cta->rank & ~1;
    if (even + 1 >= cluster->n) {
        fail(warp, in, FINDING_TMEM, "cta_group::2 needs a peer CTA, but the cluster has %d", cluster->n);
        return false;
    }
    pair[0] = cluster->cta[even];
    pair[1] = cluster->cta[even + 1];
    Cta *peer = pair[~warp->cta->rank & 1];
    if (peer->live_warps > 0) return true;
    fail(warp, in, FINDING_TMEM, "the peer CTA %u has exited", peer->id);
    return false;
}

Status whole_warp(Warp *warp, const Instr *in, uint32_t mask) {
    if (mask == FULL_MASK) return NEXT;
    return fail(warp, in, FINDING_DIVERGENCE, "%s by lanes %08x only: it needs a whole warp", in->name, mask);
}

/* ---------------------------------------------------------------- allocation */
bool tmem_allocated(Machine *machine, const Warp *warp, const Instr *in, const Cta *cta, int column,
                    int columns) {
    if (column + columns <= TMEM_COLUMNS && !memchr(&cta->columns.allocated[column], 0, (size_t)columns))
        return true;
    int missing = column;
    while (missing < TMEM_COLUMNS && cta->columns.allocated[missing]) missing++;
    report(machine, FINDING_TMEM, warp, in, true,
           "columns %d..%d of CTA %u are used, but column %d is not allocated",
           column, column + columns - 1, cta->id, missing);
    return false;
}

static int first_fit(const TmemColumns *columns, int size) {
    for (int start = 0; start + size <= TMEM_COLUMNS; start += 32)
        if (!memchr(&columns->allocated[start], 1, (size_t)size)) return start;
    return -1;
}

static bool size_exists(uint32_t size) { return size >= 32 && size <= 512 && !(size & (size - 1)); }

static Status bad_size(Warp *warp, const Instr *in, uint32_t size) {
    return fail(warp, in, FINDING_TMEM, "%u columns cannot be allocated: a power of two in 32..512 can", size);
}

static void reserve(Cta *cta, int start, uint32_t size) {
    TmemColumns *columns = &cta->columns;
    columns->last_size = (uint16_t)size;
    columns->pair_start = start;
    memset(&columns->allocated[start], 1, size);
    for (uint32_t i = 0; i < size; i++) columns->owner[start + i] = (uint16_t)(start | size / 32 << 9);
    memset(tmem_cell(cta, 0, start), 0xff, size * TMEM_LANES * sizeof(uint32_t));
    cta->machine->progress = true;
}

static void release(Cta *cta, int start, uint32_t size) {
    memset(&cta->columns.allocated[start], 0, size);
    cta->machine->progress = true;
}

static bool allocation_fits(Warp *warp) { return first_fit(&warp->cta->columns, warp->wait.limit) >= 0; }

/* ---------------------------------------------------------------- steps of a pair of CTAs */
typedef enum { PAIR_ALLOCATES, PAIR_FREES, PAIR_RELINQUISHES } PairKind;

static Cta *peer_of(const Cta *cta) {
    int rank = cta->rank ^ 1;
    return rank < cta->cluster->n ? cta->cluster->cta[rank] : NULL;
}

static bool pair_met(const TmemColumns *mine, const TmemColumns *peer) {
    return peer->pair_ops == mine->pair_ops && peer->pair_waiting;
}

/* Over: the pair has taken the step, or this warp can take it for both. */
static bool pair_can_go_on(Warp *warp) {
    const TmemColumns *mine = &warp->cta->columns, *peer = &peer_of(warp->cta)->columns;
    if (mine->pair_done == mine->pair_ops) return true;
    if (!pair_met(mine, peer)) return false;
    return mine->pair_kind != PAIR_ALLOCATES ||
           (first_fit(mine, mine->pair_size) >= 0 && first_fit(peer, peer->pair_size) >= 0);
}

static void take_step(Cta *cta) {
    TmemColumns *columns = &cta->columns;
    if (columns->pair_kind == PAIR_ALLOCATES)
        reserve(cta, first_fit(columns, columns->pair_size), columns->pair_size);
    else if (columns->pair_kind == PAIR_FREES) release(cta, columns->pair_start, columns->pair_size);
    else columns->relinquished = true;
    columns->pair_done = columns->pair_ops;
    cta->machine->progress = true;
}

static Status begin_step(Warp *warp, const Instr *in, PairKind kind, uint32_t size, int start) {
    TmemColumns *mine = &warp->cta->columns;
    Cta *pair[2], *peer = peer_of(warp->cta);
    if (mine->pair_waiting)
        return fail(warp, in, FINDING_TMEM,
                    "two warps of a CTA are in collective tensor memory operations at once");
    if (!cta_pair(warp, in, pair)) return FATAL;
    mine->pair_ops++;
    mine->pair_kind = (uint8_t)kind;
    mine->pair_size = (uint16_t)size;
    mine->pair_start = start;
    mine->pair_at = warp->now;
    mine->pair_waiting = warp->index + 1;
    warp->machine->progress = true;
    const TmemColumns *other = &peer->columns;
    if (pair_met(mine, other) && (mine->pair_kind != other->pair_kind || mine->pair_size != other->pair_size))
        return fail(warp, in, FINDING_TMEM, "%s of %u columns meets another operation (or %u columns) of the "
                    "peer CTA %u: a pair performs them collectively", in->name, size, other->pair_size, peer->id);
    return NEXT;
}

/* One step of both CTAs of a pair. Whoever comes second takes it for both; neither goes on before. */
static Status with_peer(Warp *warp, const Instr *in, PairKind kind, uint32_t size, int start) {
    TmemColumns *mine = &warp->cta->columns;
    if (mine->pair_waiting != warp->index + 1) {
        Status status = begin_step(warp, in, kind, size, start);
        if (status != NEXT) return status;
    }
    Cta *peer = peer_of(warp->cta);
    if (!pair_can_go_on(warp))
        return block_on(warp, (Wait){.kind = WAIT_OTHER, .over = pair_can_go_on,
                                     .what = pair_met(mine, &peer->columns) ? "free tensor memory columns"
                                             : "the peer CTA's collective tensor memory operation"});
    if (mine->pair_done != mine->pair_ops) {
        double latest = mine->pair_at > peer->columns.pair_at ? mine->pair_at : peer->columns.pair_at;
        mine->pair_at = peer->columns.pair_at = latest;
        take_step(warp->cta);
        take_step(peer);
    }
    if (mine->pair_at > warp->now) warp->now = mine->pair_at;
    mine->pair_waiting = 0;
    return NEXT;
}

/* ---------------------------------------------------------------- instructions */
static bool store_address(Warp *warp, const Instr *in, int start) {
    uint64_t address = lane_address(warp, in, &in->args[0], __builtin_ctz(warp->live));
    uint32_t offset, value = (uint32_t)start;
    if (address >> 32 && address >> 60 != SHARED_WINDOW >> 60)
        return fail(warp, in, FINDING_BOUNDS, "0x%llx is no shared memory address",
                    (unsigned long long)address), false;
    Cta *cta = shared_target(warp, in, (uint32_t)address, 4, &offset);
    if (!cta) return false;
    if (cta != warp->cta)
        return fail(warp, in, FINDING_TMEM, "tcgen05.alloc writes to another CTA's shared memory"), false;
    access_shared(&warp->agent, cta, offset, 4, true, GENERIC_PROXY, in);
    memcpy(cta->shared + offset, &value, 4);
    return true;
}

static Status exec_alloc(Warp *warp, const Instr *in, uint32_t mask) {
    TmemColumns *columns = &warp->cta->columns;
    Status status = whole_warp(warp, in, mask);
    if (status != NEXT) return status;
    uint32_t size = (uint32_t)lane_value(warp, in, &in->args[1], 0);
    if (!size_exists(size)) return bad_size(warp, in, size);
    if (columns->relinquished)
        return fail(warp, in, FINDING_TMEM, "tcgen05.alloc after the CTA relinquished its permit");
    if (columns->last_size && size > columns->last_size && warp->wait.kind == WAIT_NONE) /* the first try */
        report(warp->machine, FINDING_TMEM, warp, in, false,
               "an allocation of %u columns follows one of %u: they must not grow", size, columns->last_size);
    if (in->u[0] == 2) {
        status = with_peer(warp, in, PAIR_ALLOCATES, size, 0);
        if (status != NEXT) return status;
    } else {
        int start = first_fit(columns, (int)size);
        if (start < 0)
            return block_on(warp, (Wait){.kind = WAIT_OTHER, .over = allocation_fits, .limit = (int)size,
                                         .what = "free tensor memory columns"});
        reserve(warp->cta, start, size);
    }
    return store_address(warp, in, columns->pair_start) ? NEXT : FATAL;
}

static Status exec_dealloc(Warp *warp, const Instr *in, uint32_t mask) {
    TmemColumns *columns = &warp->cta->columns;
    Status status = whole_warp(warp, in, mask);
    if (status != NEXT) return status;
    uint32_t address = (uint32_t)lane_value(warp, in, &in->args[0], 0);
    uint32_t size = (uint32_t)lane_value(warp, in, &in->args[1], 0), start = address & 0xffff;
    if (!size_exists(size))
        return fail(warp, in, FINDING_TMEM, "%u columns cannot be a tensor memory allocation", size);
    if (columns->pair_waiting == warp->index + 1) return with_peer(warp, in, PAIR_FREES, size, (int)start);
    if (address >> 16 || start >= TMEM_COLUMNS || !columns->allocated[start])
        return fail(warp, in, FINDING_TMEM, "0x%08x is freed, but not allocated", address);
    if (columns->owner[start] != (uint16_t)(start | size / 32 << 9))
        return fail(warp, in, FINDING_TMEM,
                    "%u columns at %u are freed, but the allocation there is of %u columns at %u",
                    size, start, (columns->owner[start] >> 9) * 32u, columns->owner[start] & 511u);
    if (in->u[0] == 2) return with_peer(warp, in, PAIR_FREES, size, (int)start);
    release(warp->cta, (int)start, size);
    return NEXT;
}

static Status exec_relinquish(Warp *warp, const Instr *in, uint32_t mask) {
    Status status = whole_warp(warp, in, mask);
    if (status != NEXT) return status;
    if (in->u[0] == 2) return with_peer(warp, in, PAIR_RELINQUISHES, 0, 0);
    warp->cta->columns.relinquished = true;
    return NEXT;
}

Decoded decode_tmem_alloc(Decode *d, char *why, size_t size) {
    static const char *const known[] =
        {"cta_group::1", "cta_group::2", "sync", "aligned", "shared::cta", "b32", NULL};
    Instr *in = d->in;
    bool alloc = is(d, 1, "alloc"), dealloc = is(d, 1, "dealloc");
    const char *bad = unknown_modifier(d, 2, known);
    if (bad) return tensor_refuse(why, size, "modifier .%s of tcgen05.%s is not modelled", bad, d->part[1]);
    int group = cta_group(d, why, size);
    if (!group) return REFUSED;
    if (in->n != (alloc || dealloc ? 2 : 0) || (alloc && in->args[0].kind != OPERAND_ADDRESS))
        return tensor_refuse(why, size, "wrong operands");
    in->u[0] = (uint64_t)group;
    in->exec = alloc ? exec_alloc : dealloc ? exec_dealloc : exec_relinquish;
    in->flags |= ALIGNED;
    in->class_ = CLASS_OTHER;
    return DECODED;
}
