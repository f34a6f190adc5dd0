/* Shadow memory: who wrote and who read what last, for data races, proxy fences and uninitialised reads.
 *
 * Memory is cut into cells of 16 parts: 16 bytes of shared or global memory, or 16 lanes of one TMEM
 * column. A cell's state is one 64-bit word: a chain of nodes with the last writes (low half) and one
 * with the reads since (high half). A node is an access (agent, time, instruction) and the parts that it
 * covers; equal nodes and chains are made once and shared. Most cells that an instruction touches have
 * the same state before, hence the same state after: while that holds, a cell costs one comparison and
 * one store, and the clocks are looked at once. Nodes that no cell holds any more are collected.
 *
 * As in FastTrack, a write replaces the reads before it, and a read replaces the reads it is ordered
 * after. At most MAX_READERS unordered readers of a part are remembered.
 */
#include "shadow.h"

static Shadow *shadow_of(Machine *machine) {
    if (machine->shadow_global) return machine->shadow_global;
    Shadow *s = calloc(1, sizeof *s);
    if (!s) abort();
    s->machine = machine;
    s->capacity = 1 << 12;
    s->node = calloc(s->capacity, sizeof *s->node);
    if (!s->node) abort();
    s->n = 1; /* node 0 ends every chain */
    s->collect_at = 1 << 20;
    s->access = 1;
    return machine->shadow_global = s;
}

/* ---------------------------------------------------------------- nodes */
static uint32_t make_node(Shadow *s, Node wanted) {
    uint32_t hash = (wanted.who * 0x9e3779b1u) ^ (wanted.time * 0x85ebca6bu) ^ (wanted.pc * 0xc2b2ae35u) ^
                    (wanted.next * 0x27d4eb2fu) ^ ((uint32_t)wanted.mask << 8 | wanted.flags) * 0x165667b1u;
    uint32_t *cached = &s->cache[(hash ^ hash >> 15) % NODE_CACHE];
    if (*cached && !memcmp(&s->node[*cached], &wanted, sizeof wanted)) return *cached;
    uint32_t at = s->unused;
    if (at) {
        s->unused = s->node[at].next;
        s->n_unused--;
    } else {
        if (s->n == s->capacity) {
            s->capacity *= 2;
            s->node = realloc(s->node, s->capacity * sizeof *s->node);
            if (!s->node) abort();
        }
        at = s->n++;
    }
    s->node[at] = wanted;
    return *cached = at;
}

static void mark_chain(const Shadow *s, uint8_t *marked, uint32_t at) {
    for (; at && !marked[at]; at = s->node[at].next) marked[at] = 1;
}

static void mark_cells(const Shadow *s, uint8_t *marked, const uint64_t *cells, size_t n) {
    uint64_t last = 0;
    for (size_t i = 0; cells && i < n; i++) {
        if (cells[i] == last) continue;
        last = cells[i];
        mark_chain(s, marked, (uint32_t)last);
        mark_chain(s, marked, (uint32_t)(last >> 32));
    }
}

static size_t shared_cells(const Cta *cta) { return cta->shared_bytes / PARTS + 1; }

static void collect_nodes(Shadow *s) {
    uint8_t *marked = calloc(s->n, 1);
    if (!marked) abort();
    for (int c = 0; c < s->machine->n_clusters; c++) {
        Cluster *cluster = s->machine->clusters[c];
        for (int i = 0; cluster && i < cluster->n; i++) {
            Cta *cta = cluster->cta[i];
            if (!cta) continue;
            mark_cells(s, marked, cta->shadow_shared, shared_cells(cta));
            mark_cells(s, marked, cta->shadow_tmem, TMEM_GROUPS * TMEM_COLUMNS);
        }
    }
    for (size_t i = 0; i < s->page_capacity; i++) mark_cells(s, marked, s->pages[i].cells, PAGE_CELLS);
    s->unused = s->n_unused = 0;
    for (uint32_t i = s->n - 1; i > 0; i--)
        if (!marked[i]) {
            s->node[i] = (Node){.next = s->unused, .who = UINT32_MAX};
            s->unused = i;
            s->n_unused++;
        }
    free(marked);
    memset(s->cache, 0, sizeof s->cache);
    s->access++;
    uint32_t live = s->n - s->n_unused;
    s->collect_at = live < (1 << 19) ? 1 << 20 : 2 * live;
}

/* ---------------------------------------------------------------- the state of a cell after an access */
static uint32_t chain_of(Shadow *s, const Node *nodes, int n) {
    uint32_t chain = 0;
    while (n--) {
        Node node = nodes[n];
        node.next = chain;
        chain = make_node(s, node);
    }
    return chain;
}

static bool same_access(Node a, Node b) {
    return a.who == b.who && a.time == b.time && a.pc == b.pc && a.flags == b.flags;
}

/* The parts of a chain outside of mask, after `me` if it is given; an equal access is merged with it. */
static uint32_t chain_without(Shadow *s, uint32_t chain, unsigned mask, const Node *me) {
    Node nodes[MAX_CHAIN + 1];
    int n = 0;
    if (me) nodes[n++] = *me;
    for (; chain && n < MAX_CHAIN; chain = s->node[chain].next) {
        Node node = s->node[chain];
        node.mask &= (uint16_t)~mask;
        if (!node.mask) continue;
        if (me && same_access(node, *me)) nodes[0].mask |= node.mask;
        else nodes[n++] = node;
    }
    return chain_of(s, nodes, n);
}

/* Adds a read; those of the same parts that it is ordered after are not needed any more. */
static uint32_t chain_with_read(Shadow *s, uint32_t chain, Node me) {
    Node nodes[MAX_READERS + 1];
    int n = 1;
    nodes[0] = me;
    for (; chain && n < MAX_READERS; chain = s->node[chain].next) {
        Node node = s->node[chain];
        if (same_access(node, me)) {
            nodes[0].mask |= node.mask;
            continue;
        }
        bool replaced = !((me.flags & ~node.flags) & NODE_ATOMIC) && shadow_ordered(s, node);
        if (replaced) node.mask &= (uint16_t)~me.mask;
        if (node.mask) nodes[n++] = node;
    }
    return chain_of(s, nodes, n);
}

static uint64_t next_state(Shadow *s, const uint64_t *cell, unsigned mask) {
    uint64_t state = *cell;
    uint32_t writes = (uint32_t)state, reads = (uint32_t)(state >> 32);
    bool clean = true;
    unsigned written = 0;
    for (uint32_t at = writes; at; at = s->node[at].next) {
        Node other = s->node[at];
        written |= other.mask;
        other.mask &= (uint16_t)mask;
        if (other.mask) clean &= shadow_check_write(s, cell, other);
    }
    Node me = {s->who, s->time, s->pc, 0, (uint16_t)mask, (uint16_t)(s->flags & NODE_FLAGS)};
    if (s->flags & ACCESS_WRITE) {
        for (uint32_t at = reads; at; at = s->node[at].next) {
            Node other = s->node[at];
            other.mask &= (uint16_t)mask;
            if (other.mask) clean &= shadow_check_read(s, cell, other);
        }
        writes = chain_without(s, writes, mask, &me);
        reads = chain_without(s, reads, mask, NULL);
    } else {
        if ((mask & ~written) && !(s->flags & ACCESS_GLOBAL)) {
            shadow_report_unwritten(s, cell, mask & ~written);
            clean = false;
        }
        reads = chain_with_read(s, reads, me);
    }
    uint64_t after = (uint64_t)reads << 32 | writes;
    if (clean) /* a state that leads to a finding is looked at again every time */
        s->memo[__builtin_ctz(mask)] = (Memo){state, after, s->access, mask};
    return after;
}

/* n cells in a row, the same parts of each. */
static inline void touch(Shadow *s, uint64_t *cell, size_t n, unsigned mask) {
    const Memo *memo = &s->memo[__builtin_ctz(mask)];
    uint64_t before = memo->access == s->access && memo->mask == mask ? memo->before : NO_STATE;
    uint64_t after = memo->after;
    for (size_t i = 0; i < n; i++) {
        if (cell[i] == before) {
            cell[i] = after;
        } else {
            cell[i] = next_state(s, &cell[i], mask);
            if (memo->access == s->access && memo->mask == mask) before = memo->before, after = memo->after;
        }
    }
}

static Shadow *begin(Agent *agent, Cta *cta, const Instr *in, uint32_t flags) {
    Machine *machine = agent->cta->machine;
    Shadow *s = machine->shadow_global ? machine->shadow_global : shadow_of(machine);
    uint32_t who = agent->cta->id << AGENT_BITS | (uint32_t)agent->index, time = agent_time(agent);
    uint32_t pc = in ? in->pc : UINT32_MAX;
    /* what was found clean stays clean while the agent's time is the same: its clock only grows */
    if (who != s->who || time != s->time || pc != s->pc || flags != s->flags) {
        if (s->n - s->n_unused > s->collect_at) collect_nodes(s);
        s->who = who;
        s->time = time;
        s->pc = pc;
        s->flags = flags;
        s->access++;
    }
    s->agent = agent;
    s->in = in;
    s->cta = cta;
    s->reported = 0;
    return s;
}

/* Bytes [offset, offset + bytes) of a row of cells: a ragged head and tail, and full cells between. */
static inline void touch_bytes(Shadow *s, uint64_t *cells, uint64_t offset, uint64_t bytes) {
    uint64_t first = offset / PARTS, last = (offset + bytes - 1) / PARTS;
    unsigned head = (unsigned)ALL_PARTS << (offset % PARTS) & ALL_PARTS;
    unsigned tail = ALL_PARTS >> (PARTS - 1 - (offset + bytes - 1) % PARTS);
    if (first == last) {
        touch(s, &cells[first], 1, head & tail);
        return;
    }
    if (head != ALL_PARTS) touch(s, &cells[first++], 1, head);
    size_t full = (size_t)(last - first) + (tail == ALL_PARTS);
    touch(s, &cells[first], full, ALL_PARTS);
    if (tail != ALL_PARTS) touch(s, &cells[last], 1, tail);
}

/* ---------------------------------------------------------------- shared memory and TMEM */
static void touch_shared(Agent *agent, Cta *cta, uint32_t offset, uint32_t bytes, uint32_t flags,
                         const Instr *in) {
    if (offset >= cta->shared_bytes || !bytes || !cta->shadow_shared) return;
    if (bytes > cta->shared_bytes - offset) bytes = cta->shared_bytes - offset;
    Shadow *s = begin(agent, cta, in, flags | ACCESS_SHARED);
    s->base = cta->shadow_shared;
    touch_bytes(s, cta->shadow_shared, offset, bytes);
}

void access_shared(Agent *agent, Cta *cta, uint32_t offset, uint32_t bytes, bool write, Proxy proxy,
                   const Instr *in) {
    if (!cta->machine->config.races) return;
    touch_shared(agent, cta, offset, bytes, (write ? ACCESS_WRITE : 0) |
                 (proxy == ASYNC_PROXY ? NODE_ASYNC : 0), in);
}

void access_mbarrier(Agent *agent, Cta *cta, uint32_t offset, MBarrierAccess kind, Proxy proxy,
                     const Instr *in) {
    if (!cta->machine->config.races) return;
    touch_shared(agent, cta, offset, 8, NODE_MBARRIER | (kind == MBARRIER_INIT ? ACCESS_WRITE : 0) |
                 (proxy == ASYNC_PROXY ? NODE_ASYNC : 0), in);
}

void access_tmem(Agent *agent, Cta *cta, int lane, int lanes, int column, int columns, bool write,
                 const Instr *in) {
    if (!cta->machine->config.races || lanes <= 0 || columns <= 0) return;
    if (lane < 0 || column < 0 || column >= TMEM_COLUMNS || lane >= TMEM_LANES) return;
    if (column + columns > TMEM_COLUMNS) columns = TMEM_COLUMNS - column;
    if (lane + lanes > TMEM_LANES) lanes = TMEM_LANES - lane;
    if (!cta->shadow_tmem && !(cta->shadow_tmem = calloc(TMEM_GROUPS * TMEM_COLUMNS, sizeof(uint64_t))))
        abort();
    uint64_t *cells = cta->shadow_tmem;
    Shadow *s = begin(agent, cta, in, (write ? ACCESS_WRITE : 0) | ACCESS_TMEM);
    s->base = cells;
    while (lanes > 0) {
        int group = lane / PARTS, within = lane % PARTS, n = lanes < PARTS - within ? lanes : PARTS - within;
        touch(s, &cells[group * TMEM_COLUMNS + column], (size_t)columns, ((1u << n) - 1) << within);
        lane += n;
        lanes -= n;
    }
}

void shadow_forget_shared(Cta *cta, uint32_t offset, uint32_t bytes) {
    uint64_t *cells = cta->shadow_shared;
    if (!cells || offset >= cta->shared_bytes) return;
    if (bytes > cta->shared_bytes - offset) bytes = cta->shared_bytes - offset;
    Shadow *s = shadow_of(cta->machine);
    for (uint32_t i = 0; i < bytes; i++) {
        uint64_t *cell = &cells[(offset + i) / PARTS];
        if (!*cell) continue;
        unsigned mask = 1u << (offset + i) % PARTS;
        uint32_t writes = chain_without(s, (uint32_t)*cell, mask, NULL);
        *cell = (uint64_t)chain_without(s, (uint32_t)(*cell >> 32), mask, NULL) << 32 | writes;
    }
}

void shadow_new_cta(Cta *cta) {
    if (!cta->machine->config.races) return;
    free(cta->shadow_shared);
    free(cta->shadow_tmem);
    cta->shadow_tmem = NULL;
    cta->shadow_shared = calloc(shared_cells(cta), sizeof(uint64_t));
    if (!cta->shadow_shared) abort();
}

void shadow_free_cta(Cta *cta) {
    barrier_free_cta(cta);
    free(cta->shadow_shared);
    free(cta->shadow_tmem);
    cta->shadow_shared = cta->shadow_tmem = NULL;
    CtaSync *sync = cta->sync;
    if (!sync) return;
    for (int i = 0; i < MAX_WARPS; i++) {
        for (int scope = 0; scope < SCOPES; scope++) {
            clock_free(&sync->warp[i].released[scope]);
            clock_free(&sync->warp[i].pending[scope]);
        }
    }
    clock_free(&sync->mbarrier_fence);
    free(sync);
    cta->sync = NULL;
}

/* ---------------------------------------------------------------- global memory */
static size_t page_slot(const Shadow *s, uint64_t number) {
    size_t at = (size_t)(number * 0x9e3779b97f4a7c15ull >> 24) & (s->page_capacity - 1);
    while (s->pages[at].cells && s->pages[at].number != number) at = (at + 1) & (s->page_capacity - 1);
    return at;
}

static void grow_pages(Shadow *s) {
    Page *old = s->pages;
    size_t n = s->page_capacity;
    s->page_capacity = n ? 2 * n : 1024;
    s->pages = calloc(s->page_capacity, sizeof *s->pages);
    if (!s->pages) abort();
    for (size_t i = 0; i < n; i++)
        if (old[i].cells) s->pages[page_slot(s, old[i].number)] = old[i];
    free(old);
}

static uint64_t *page_cells(Shadow *s, uint64_t number) {
    Page *recent = &s->recent[number % PAGE_CACHE];
    if (recent->cells && recent->number == number) return recent->cells;
    if (2 * s->n_pages >= s->page_capacity) grow_pages(s);
    Page *page = &s->pages[page_slot(s, number)];
    if (!page->cells) {
        page->number = number;
        page->cells = calloc(PAGE_CELLS, sizeof(uint64_t));
        if (!page->cells) abort();
        s->n_pages++;
    }
    *recent = *page;
    return page->cells;
}

static void touch_global(Agent *agent, uint64_t address, uint64_t bytes, uint32_t flags, const Instr *in) {
    if (!bytes) return;
    Shadow *s = begin(agent, agent->cta, in, flags | ACCESS_GLOBAL);
    while (bytes) {
        uint64_t within = address & ((1u << PAGE_SHIFT) - 1), n = (1u << PAGE_SHIFT) - within;
        if (n > bytes) n = bytes;
        uint64_t *cells = page_cells(s, address >> PAGE_SHIFT);
        s->base = cells;
        s->base_address = address - within;
        touch_bytes(s, cells, within, n);
        address += n;
        bytes -= n;
    }
}

void access_global(Agent *agent, uint64_t address, uint32_t bytes, bool write, Proxy proxy, const Instr *in) {
    if (!agent->cta->machine->config.races) return;
    touch_global(agent, address, bytes, (write ? ACCESS_WRITE : 0) | (proxy == ASYNC_PROXY ? NODE_ASYNC : 0),
                 in);
}

void access_atomic(Agent *agent, Space space, Cta *cta, uint64_t address, uint32_t bytes, bool write,
                   bool acquire, bool release, const Instr *in) {
    if (!agent->cta->machine->config.races) return;
    bool shared = space == SPACE_SHARED || space == SPACE_SHARED_CLUSTER;
    uint32_t flags = NODE_ATOMIC | (write ? ACCESS_WRITE : 0);
    if (in && !strncmp(in->name, "cp.reduce.async.bulk", 20))
        flags |= NODE_ASYNC; /* reductions of the TMA unit */
    bool single = bytes <= 16;
    Scope scope = in ? (Scope)in->scope : SCOPE_GPU;
    if (single) atomic_acquire(agent, space, cta, address, scope, acquire);
    if (shared) touch_shared(agent, cta, (uint32_t)address, bytes, flags, in);
    else touch_global(agent, address, bytes, flags, in);
    if (write && single) atomic_release(agent, space, cta, address, scope, release);
}

void shadow_free_machine(Machine *machine) {
    atomic_clocks_free(machine);
    Shadow *s = machine->shadow_global;
    if (!s) return;
    for (size_t i = 0; i < s->page_capacity; i++) free(s->pages[i].cells);
    free(s->pages);
    free(s->node);
    free(s);
    machine->shadow_global = NULL;
}
