/* The machine: what every instruction family sees.
 *
 * A launch is a grid of clusters of CTAs of warps. A warp is 32 lanes that share a program; lanes
 * may diverge. Registers are arrays of 32 lanes. One host thread runs everything, one instruction
 * of one warp at a time; what hardware does asynchronously (TMA, tensor core, TMEM stores ...) is an
 * AsyncOp whose effect lands when the timing policy says so, and not before.
 *
 * Files:  run.c       scheduler, divergence, waits                      (this header's implementation)
 *         launch.c    machines, clusters, CTAs, special registers, memory bounds, checks at exit
 *         program.c   programs from the assembler's records, decoding
 *         report.c    findings, the table of a deadlock
 *         clocks.c    vector clocks: what every agent knows of the others
 *         shadow.c rules.c   who accessed what last: data races, missing fences, uninitialised reads
 *         async.c     asynchronous operations and the policies that complete them
 *         families.h  the table of instruction families; a family is one file:
 *         alu.c convert.c control.c memory.c barrier.c copy.c tma.c tmem.c mma.c
 *
 * Errors in the emulated kernel never stop the host: report() records a finding; a fatal one ends the
 * launch. An instruction that is not modelled is refused when the program is decoded.
 */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct Machine Machine;
typedef struct Program Program;
typedef struct Cluster Cluster;
typedef struct Cta Cta;
typedef struct Warp Warp;
typedef struct Instr Instr;
typedef struct AsyncOp AsyncOp;

enum { LANES = 32, MAX_WARPS = 32, MAX_CLUSTER = 16, TMEM_LANES = 128, TMEM_COLUMNS = 512 };
#define FULL_MASK 0xffffffffu

/* ---------------------------------------------------------------- addresses
 * Global and param addresses are addresses of this process. A shared address is 32 bits:
 * rank of the CTA in its cluster << 24 | offset; dynamic shared memory starts at 1024. Generic
 * addresses of shared and local memory are windows that no process maps. */
#define SHARED_WINDOW (1ull << 60)
#define LOCAL_WINDOW (1ull << 61)
#define SHARED_RANK_SHIFT 24
#define SHARED_OFFSET_MASK 0xffffffu
#define DYNAMIC_SHARED_START 1024u
#define SHARED_CAPACITY (228u << 10)

typedef enum { SPACE_GENERIC, SPACE_GLOBAL, SPACE_SHARED, SPACE_SHARED_CLUSTER, SPACE_PARAM, SPACE_LOCAL,
               SPACE_CONST, SPACE_TMEM } Space;

/* ---------------------------------------------------------------- program */
typedef enum { OPERAND_NONE, OPERAND_REGISTER, OPERAND_IMMEDIATE, OPERAND_ADDRESS, OPERAND_VECTOR,
               OPERAND_LABEL, OPERAND_SINK } OperandKind;
/* SINK is `_`. ADDRESS is [base + offset]: base is one more operand (register or immediate), offset
 * the immediate. VECTOR is {a, b, ...} (also the parts of a|b destinations): parts[0 .. count). Special
 * registers (%tid.x) and symbols (shared variables, params) are registers filled when a warp starts.
 * A negated predicate source (!%p) has `negate`. */
typedef struct Operand {
    uint8_t kind;
    uint8_t width;         /* of a register: 0 predicate, 1 and 2 (kept as 4), 4, 8, 16 bytes */
    uint8_t negate;
    uint16_t count;        /* VECTOR: number of parts */
    uint32_t index;        /* REGISTER: index into Warp.defined */
    uint32_t offset;       /* REGISTER: byte offset into Warp.registers (128-byte aligned; predicates 4) */
    int64_t immediate;     /* IMMEDIATE: bits (f32 and f64 as bit patterns); ADDRESS: offset; LABEL: pc */
    struct Operand *parts; /* ADDRESS: its base; VECTOR: its parts */
    uint32_t *broadcast32; /* IMMEDIATE: the low 32 bits in 32 lanes */
    uint64_t *broadcast64; /* IMMEDIATE: all bits in 32 lanes */
} Operand;

typedef enum {
    NEXT,    /* go on with the next instruction */
    JUMPED,  /* the family changed the fragments itself (branch, exit) */
    BLOCKED, /* nothing happened: try the same instruction again when Warp.wait is over */
    FATAL    /* a fatal finding was reported */
} Status;

/* Execute for the lanes in `mask` (active and guarded, never 0 unless ALWAYS is set). */
typedef Status (*Exec)(Warp *warp, const Instr *in, uint32_t mask);

enum { /* Instr.flags */
    ALIGNED = 1,   /* needs all live lanes of the warp, else a finding */
    ALWAYS = 2,    /* executed even when the guard leaves no lane */
};
typedef enum { CLASS_MOVE, CLASS_INTEGER, CLASS_FLOAT, CLASS_FMA, CLASS_MUFU, CLASS_MAX, CLASS_CONVERT,
               CLASS_PREDICATE, CLASS_BRANCH, CLASS_SHUFFLE, CLASS_SHARED, CLASS_GLOBAL, CLASS_LOCAL, CLASS_ATOMIC,
               CLASS_BARRIER, CLASS_WAIT, CLASS_TMA, CLASS_TMEM_LOAD, CLASS_TMEM_STORE, CLASS_MMA,
               CLASS_FENCE, CLASS_OTHER, CLASSES } InstrClass;

struct Instr {
    Exec exec;
    uint8_t flags, class_, guard_negate, n;
    int32_t guard;             /* byte offset of the guard predicate in Warp.registers, -1: none */
    uint32_t guard_index;      /* its index into Warp.defined */
    Operand *args;             /* n operands in PTX order */
    uint64_t u[4];             /* whatever the family's decode wants to remember */
    void *data;                /* the same, allocated with arena() */
    uint32_t pc, line;         /* index in the program; line in the PTX text, from 1 */
    uint32_t source_line;      /* Python line from .loc, 0: unknown */
    uint8_t scope;             /* Scope of an atomic, an acquire or release, or a fence */
    const char *name;          /* full mnemonic */
    Program *program;
};

/* Narrower is larger. .sys is .gpu here: there is one. */
typedef enum { SCOPE_GPU, SCOPE_CLUSTER, SCOPE_CTA, SCOPES } Scope;

/* A mnemonic cut at its dots; modifiers with :: stay whole ("mbarrier::arrive::one"). */
typedef struct { const char *text; const char *part[24]; int n; Instr *in; Program *program; } Decode;
typedef enum { NOT_MINE, DECODED, REFUSED } Decoded;
/* A family claims an instruction: sets in->exec, class_, flags, u. REFUSED: say why in `why`. */
typedef Decoded (*DecodeFamily)(Decode *d, char *why, size_t why_size);
static inline bool has(const Decode *d, const char *modifier) {
    for (int i = 0; i < d->n; i++) if (!strcmp(d->part[i], modifier)) return true;
    return false;
}
static inline bool is(const Decode *d, int i, const char *s) { return i < d->n && !strcmp(d->part[i], s); }
/* Size and kind of a PTX type name ("f32", "b16x2" gives false). kind: 'b' 'u' 's' 'f', or 'h' for bf16. */
bool ptx_type(const char *name, int *bytes, char *kind);

typedef struct { char *name; uint8_t kind; /* 0 shared, 1 param, 2 global/const, 3 special, 4 local */
                 uint64_t value; uint32_t offset; uint8_t width; uint32_t index; } Symbol;

struct Program {
    char *kernel;
    Instr *instrs; int n, capacity;
    uint32_t register_bytes, register_count;
    Symbol *symbols; int n_symbols;
    uint32_t static_shared, param_bytes, local_bytes; /* static_shared: where dynamic memory starts, >= 1024 */
    void *arena;
    char error[512];
    const char **register_names; /* by Operand.index, for messages */
    uint32_t launch_registers;   /* a thread's registers before any setmaxnreg, 0: unknown */
    bool narrow_scopes;          /* some instruction's scope is smaller than .gpu */
    bool narrow_barriers;        /* some mbarrier operation names .cta */
    bool relaxed_barriers;       /* some mbarrier operation is relaxed */
    bool relaxed_memory, tensor_fences; /* some access is relaxed or volatile; there is a tcgen05.fence */
};
/* Scope of a memory operation or fence; a narrow one is remembered for the program. */
static inline Scope scope_of(Decode *d) {
    Scope scope = has(d, "cta") ? SCOPE_CTA : has(d, "cluster") ? SCOPE_CLUSTER : SCOPE_GPU;
    if (scope != SCOPE_GPU) d->program->narrow_scopes = true;
    return scope;
}
void *arena(Program *program, size_t bytes); /* zeroed, freed with the program */

/* ---------------------------------------------------------------- vector clocks (clocks.c)
 * Agents of a CTA: its warps, its tensor pipe, and slots for asynchronous operations in flight. A part
 * holds what is known of one CTA's agents: `seen[a]`: everything agent a did up to that time happened
 * before; `fenced[a]`: its generic-proxy writes up to that time were made visible to the async proxy.
 * The rest is kept in wide clocks only, where it can differ. `order[a]`, if later than seen: what a did
 * came before in execution, which says nothing of memory (relaxed operations, scopes that are too narrow).
 * `tensor[a]`: its tcgen05 accesses are before everything that a tcgen05.fence::after_thread_sync follows;
 * `view[a]`: they are before the next tcgen05 access of the agent whose clock it is, and of no other. */
enum { AGENT_TENSOR = MAX_WARPS, AGENT_ASYNC = MAX_WARPS + 1, AGENTS = 96 };
typedef struct { uint32_t cta; uint32_t seen[AGENTS], fenced[AGENTS], order[AGENTS], tensor[AGENTS], view[AGENTS]; }
    ClockPart;
extern bool wide_clocks; /* of the launch under way */
typedef struct { int n, capacity; ClockPart *part; } Clock;
typedef struct { Cta *cta; int index; Clock *clock; } Agent; /* who: its own time is clock[cta].seen[index] */

void clock_join(Clock *into, const Clock *from);       /* all but view, which is not passed on */
void clock_join_order(Clock *into, const Clock *from); /* what goes without saying anything of memory */
void clock_join_view(Clock *into, const Clock *from);  /* between a thread and its tcgen05 operations */
void clock_copy(Clock *into, const Clock *from);
void clock_clear(Clock *clock); /* keeps the memory */
void clock_free(Clock *clock);
void agent_tick(Agent *agent);  /* after every release: later actions are newer than what was released */
static inline void release_to(Clock *sync, Agent *agent) { clock_join(sync, agent->clock); agent_tick(agent); }
static inline void acquire_from(Agent *agent, const Clock *sync) { clock_join(agent->clock, sync); }
void fence_proxy(Agent *agent); /* fence.proxy.async: fenced := seen */
/* tcgen05.fence::before_thread_sync (a commit has one), ::after_thread_sync; what is issued now is its own. */
void tensor_fence_before(Agent *agent);
void tensor_fence_after(Agent *agent);
void tensor_view_own(Agent *agent);

typedef enum { GENERIC_PROXY, ASYNC_PROXY } Proxy;
/* Record an access, check it against earlier ones (data race, missing proxy fence) and, for reads,
 * that the bytes were written. `offset` is a shared offset (of cta) or a global address. */
void access_shared(Agent *agent, Cta *cta, uint32_t offset, uint32_t bytes, bool write, Proxy proxy, const Instr *in);
void access_global(Agent *agent, uint64_t address, uint32_t bytes, bool write, Proxy proxy, const Instr *in);
/* The same for atomics and for acquire/release/relaxed/volatile accesses: no race among themselves.
 * `acquire`/`release`: joins the clock kept at the address. */
void access_atomic(Agent *agent, Space space, Cta *cta, uint64_t address, uint32_t bytes, bool write,
                   bool acquire, bool release, const Instr *in);
/* TMEM cells [lane, lane + lanes) x [column, column + columns) of a CTA. */
void access_tmem(Agent *agent, Cta *cta, int lane, int lanes, int column, int columns, bool write, const Instr *in);
void tmem_free_warp(Warp *warp); /* frees Warp.tmem_traffic */
void shadow_forget_shared(Cta *cta, uint32_t offset, uint32_t bytes); /* storage reused as something else */
void shadow_new_cta(Cta *cta);
void shadow_free_cta(Cta *cta);         /* also frees the CTA's mbarrier objects and the clocks of its named barriers */
void shadow_free_machine(Machine *machine); /* at the end of a launch: global shadow and clocks of atomics */
void fence_memory(Agent *agent, Scope scope); /* fence.acq_rel, fence.sc, membar: see clocks.c */
/* Release and acquire through an object (mbarrier ...) with .relaxed operations: only fences give them effect,
 * those whose scope is no narrower than `reach`. */
void release_relaxed(Clock *sync, Agent *agent, Scope reach);
void acquire_relaxed(Agent *agent, const Clock *sync, Scope reach);

/* ---------------------------------------------------------------- asynchronous operations (async.c)
 * An operation is created by its instruction, submitted, and run once by the policy. Operations that
 * share a `queue` run in order. run() may do a part and return false: it is then run again later. */
typedef struct Queue { AsyncOp *head, *tail; } Queue;
struct AsyncOp {
    bool (*run)(Machine *machine, AsyncOp *op); /* true: done */
    Agent agent;              /* its own agent and clock (the issuer's at issue) */
    Clock clock;
    Cta *cta;                 /* of the issuer */
    Warp *warp;
    const Instr *in;
    int stage;                /* for run() */
    Queue *queue;
    void *payload;            /* freed after run() */
    int *pending;             /* decremented when done (groups, wait counts), may be NULL */
    void (*done)(Machine *machine, AsyncOp *op); /* called when done, may be NULL */
    AsyncOp *next, *previous, *next_in_queue;
    uint64_t id;              /* in order of submission */
    double start, finish;     /* modelled cycles, see Warp.now. Before submission finish - start is the duration
                                 (0: a default by lane_class); submission moves both behind the queue's last one */
    uint8_t lane_class;       /* for the timeline: 0 TMA load, 1 TMA store, 2 tensor, 3 other */
};
AsyncOp *async_new(Warp *warp, const Instr *in, bool (*run)(Machine *, AsyncOp *), size_t payload_bytes, bool tensor);
void async_submit(Machine *machine, AsyncOp *op);
bool async_run_oldest(Machine *machine);      /* one that can run; false: there is none */
void async_policy_step(Machine *machine);     /* called between time slices */
bool async_flush_queue(Machine *machine, Queue *queue);

/* ---------------------------------------------------------------- barriers (barrier.c) */
/* Who arrived where: the last phase that an instruction arrived in. */
typedef struct { uint32_t pc, cta, phase, offset; int16_t warp; uint8_t lane_class; /* AsyncOp's; 4: the warp */ } Arrival;
enum { ARRIVALS_KEPT = 16 };
typedef struct MBarrier {
    Cta *cta; uint32_t offset;
    uint32_t expected;        /* arrivals a phase */
    int32_t pending;          /* arrivals still missing */
    int64_t tx;               /* bytes expected minus bytes arrived */
    uint32_t phase;           /* completed phases */
    Clock arriving, complete; /* of the phase under way, of the last completed one */
    Clock far_arriving, far_complete; /* in wide clocks: released by other CTAs, for waits of .cluster scope */
    double arriving_at, complete_at;
    bool valid;
    const Instr *initialised_by;
    Arrival arrivals[ARRIVALS_KEPT]; int n_arrivals; /* for the table of a deadlock */
} MBarrier;
MBarrier *mbarrier_at(Warp *warp, const Instr *in, Cta *cta, uint32_t offset); /* reports and NULL if there is none */
/* Arrivals and bytes; `agent` releases. Complete the phase when both are 0. */
void mbarrier_arrive(Machine *machine, MBarrier *bar, uint32_t count, Agent *agent, double now, const Instr *in);
void mbarrier_expect(Machine *machine, MBarrier *bar, int64_t bytes, const Instr *in);
void mbarrier_complete_tx(Machine *machine, MBarrier *bar, int64_t bytes, Agent *agent, double now, const Instr *in);

typedef struct { uint32_t expected, arrived; uint32_t phase; Clock arriving, complete; double at;
                 uint64_t warps; uint32_t votes[3], result[3]; /* bar.red: popc, and, or */
                 bool everyone; /* no thread count was given */ } NamedBarrier;
typedef struct { uint32_t arrived[MAX_CLUSTER * MAX_WARPS]; uint32_t waited[MAX_CLUSTER * MAX_WARPS];
                 uint32_t phase; Clock arriving, complete; double at, arriving_at;
                 Clock near[MAX_CLUSTER]; /* what fences of .cta scope released: for the CTA's own warps */
                 uint32_t arrived_lanes[MAX_CLUSTER * MAX_WARPS], waited_lanes[MAX_CLUSTER * MAX_WARPS]; } ClusterBarrier;
/* A warp has exited: the barriers that waited for it alone complete. */
void barrier_warp_exited(Warp *warp);
void barrier_cta_exited(Cta *cta, const Warp *last); /* the last one of its warps has */

/* ---------------------------------------------------------------- state */
typedef enum { WAIT_NONE, WAIT_MBARRIER, WAIT_NAMED, WAIT_CLUSTER, WAIT_PENDING, WAIT_LANES, WAIT_OTHER } WaitKind;
typedef struct {
    WaitKind kind;
    MBarrier *mbarrier; uint32_t parity;   /* over when the phase of that parity completed */
    NamedBarrier *named; uint32_t phase;   /* over when ->phase != phase */
    ClusterBarrier *cluster;
    int *pending; int limit;               /* over when *pending <= limit */
    bool timed_out;                        /* the scheduler gave up on a try_wait: let it fail once */
    bool (*over)(Warp *warp);              /* WAIT_OTHER */
    const char *what;                      /* for the deadlock table */
} Wait;

typedef struct { uint32_t pc, mask; bool arrived; /* at a barrier that it waits for */ } Fragment;

struct Warp {
    Cta *cta; Machine *machine; Program *program;
    int index;                   /* in the CTA */
    uint8_t *registers;          /* 64-byte aligned */
    uint32_t *defined;           /* lanes of every register that were written */
    uint32_t live;               /* lanes that exist and have not exited */
    Fragment fragment[LANES]; int fragments; int current; /* sorted by pc */
    Wait wait;
    Agent agent; Clock clock;
    /* tcgen05.ld results not yet waited for: `undefined until wait::ld` if strict */
    uint32_t *tmem_loads; int n_tmem_loads, c_tmem_loads;
    int tmem_stores;             /* tcgen05.st in flight */
    uint32_t tensor_loaded;      /* the warp's time at its last tcgen05.ld */
    AsyncOp *last_tmem_store;
    void *tmem_traffic;          /* its tcgen05.ld and st under way (tmem.c) */
    void *groups;                /* cp.async and bulk groups by lane (copy.c) */
    uint8_t *local;              /* local memory, [LANES][local_bytes] */
    double now;                  /* modelled cycles, see model.py: a lower bound, never a measurement */
    uint64_t steps;
    Wait waits[LANES];           /* of the fragments; `wait` is the current one's (run.c) */
    double run_start, wait_start; uint32_t run_pc; /* of the timeline's current block (run.c) */
    uint32_t registers_held;     /* a lane's, see setmaxnreg (control.c) */
    uint32_t carry;              /* CC.CF of the lanes (alu_bits.c) */
};

typedef struct {
    bool allocated[TMEM_COLUMNS]; uint16_t owner[TMEM_COLUMNS]; bool relinquished;
    uint16_t last_size;          /* of the last allocation: they must not grow */
    /* cta_group::2: collective steps begun and done, 1 + the warp in one, and what it asks for */
    uint32_t pair_ops, pair_done; int pair_waiting;
    uint8_t pair_kind; uint16_t pair_size; int pair_start; double pair_at;
} TmemColumns;

struct Cta {
    Machine *machine; Cluster *cluster;
    uint32_t id;                 /* linear in the grid */
    uint32_t index[3];           /* %ctaid */
    int rank;                    /* in the cluster */
    uint8_t *shared; uint32_t shared_bytes; /* static + dynamic, from offset 0 */
    uint32_t *tmem;              /* [TMEM_COLUMNS][TMEM_LANES] 32-bit cells, column-major */
    TmemColumns columns;
    MBarrier **mbarriers;        /* [shared_bytes / 8] */
    NamedBarrier named[16];
    Warp *warps; int n_warps, live_warps, live_threads;
    Queue tensor;                /* the tensor pipe; a pair of CTAs uses the even one's */
    double tensor_free;          /* modelled cycles */
    Agent tensor_agent; Clock tensor_clock;
    Clock async_clock[AGENTS - AGENT_ASYNC]; int next_async;
    void *shadow_shared, *shadow_tmem;
    void *sync;                  /* clocks.c: fences of the warps, times of the asynchronous slots */
    int async_ops;               /* in flight, issued by this CTA */
    bool done;
};
struct Cluster { Cta *cta[MAX_CLUSTER]; int n; uint32_t index[3]; ClusterBarrier barrier; bool done; };

typedef struct { uint64_t address, bytes; const char *name; bool writable; void *shadow; } Region;

typedef enum { FINDING_RACE, FINDING_PROXY, FINDING_UNINITIALISED, FINDING_BOUNDS, FINDING_ALIGNMENT,
               FINDING_DESCRIPTOR, FINDING_TRANSACTION, FINDING_PARITY, FINDING_BARRIER, FINDING_TMEM,
               FINDING_DIVERGENCE, FINDING_DEADLOCK, FINDING_UNMODELLED, FINDING_PENDING_LOAD, FINDING_OTHER,
               FINDING_TENSOR_FENCE, FINDING_BENIGN_RACE, FINDINGS } FindingKind;
typedef struct { int kind; uint32_t pc, other_pc; int cta, warp; uint32_t count; bool fatal; char text[480]; } Finding;

typedef enum { POLICY_EAGER, POLICY_LAZY, POLICY_RANDOM } Policy;
typedef struct {
    int policy; uint64_t seed; uint32_t slice;   /* instructions a warp runs before another gets a turn */
    uint32_t random_order;                        /* CTAs and warps take turns in random order */
    uint32_t resident;                            /* CTAs on the modelled GPU at a time */
    uint32_t strict_tmem_load;                    /* tcgen05.ld results are undefined before wait::ld */
    uint32_t races;                               /* 0: no race detection (faster) */
    uint32_t trace_cta;                           /* which CTA's timeline; UINT32_MAX: none */
    uint32_t stop_at_finding;                     /* the launch ends with the first finding */
    uint64_t max_steps;                           /* 0: unlimited */
    uint32_t strict_cp_async;                     /* cp.async's data: tcgen05 needs a fence to read, TMA to overwrite */
    uint32_t strict_tcgen05_fence;                /* tcgen05 accesses of several threads need tcgen05.fence */
    uint32_t strict_scopes;                       /* mbarrier operations without a scope have .cta */
} Config;
typedef struct { uint32_t grid[3], block[3], cluster[3], dynamic_shared; } Launch;

typedef struct { double start, finish; int32_t lane; /* warp; -1 TMA load, -2 TMA store, -3 tensor, -4 other */
                 uint32_t pc; uint32_t kind; /* 0 instruction, 1 wait, 2 asynchronous operation */
                 uint32_t barrier; /* shared offset of the mbarrier waited for */ uint32_t pad; } Event;

typedef struct {
    uint64_t steps, executed_by_class[CLASSES];
    uint64_t mma_flops, tma_load_bytes, tma_store_bytes, tma_multicast_bytes, global_read_bytes, global_write_bytes,
             shared_read_bytes, shared_write_bytes, tmem_read_bytes, tmem_write_bytes, mma_shared_bytes,
             mufu_ops, fma_ops, wait_failures, async_operations;
    double tensor_cycles, cycles; /* modelled */
} Counters;

struct Machine {
    Config config; Launch launch; Program *program;
    uint8_t *params;
    Region *regions; int n_regions;
    Cluster **clusters; int n_clusters;           /* resident */
    uint64_t next_cluster, total_clusters;
    AsyncOp *pending_head, *pending_tail; int n_pending; uint64_t next_op;
    uint64_t random;                              /* state of next_random */
    Finding *findings; int n_findings, c_findings; bool fatal;
    Counters counters;
    uint64_t *executed;                           /* [MAX_WARPS][program->n], over all CTAs */
    Event *events; int n_events, c_events;
    bool yielded;                                 /* the running warp gives up the rest of its slice */
    bool progress;                                /* set by anything that can unblock a warp */
    bool forcing;                                 /* last resort: blocked fragments may be overtaken */
    bool (*tick)(uint64_t steps, uint64_t done_ctas, uint64_t ctas); /* progress callback; true stops */
    uint64_t done_ctas;
    void *atomic_clocks, *shadow_global;          /* clocks.c */
    char *deadlock; size_t deadlock_bytes;        /* the table of a deadlock, as text */
    Region *last_region;                          /* the last one hit */
    Arrival *arrivals; int n_arrivals, c_arrivals; /* every place that arrived at an mbarrier, once */
};

uint64_t next_random(Machine *machine);           /* xorshift: everything random comes from it */
/* Record a finding (equal ones, by kind and pc, are counted once). */
void report(Machine *machine, FindingKind kind, const Warp *warp, const Instr *in, bool fatal, const char *format, ...)
    __attribute__((format(printf, 6, 7)));
Status fail(Warp *warp, const Instr *in, FindingKind kind, const char *format, ...)  /* report, fatal */
    __attribute__((format(printf, 4, 5)));
/* The CTA a shared address names (its own, or a peer in the cluster) and the offset in it. Reports. */
Cta *shared_target(Warp *warp, const Instr *in, uint32_t address, uint32_t bytes, uint32_t *offset);
/* Host memory behind a global address range; reports bounds and returns NULL outside of all regions. */
uint8_t *global_target(Machine *machine, const Warp *warp, const Instr *in, uint64_t address, uint64_t bytes, bool write);
Status block_on(Warp *warp, Wait wait);           /* sets Warp.wait, returns BLOCKED */
bool wait_is_over(Warp *warp);
void trace_event(Machine *machine, const Cta *cta, Event event);

/* ---------------------------------------------------------------- lanes and operands */
#define FOR_LANES(mask, lane) \
    for (uint32_t lane##_left = (mask), lane; lane##_left && (lane = (uint32_t)__builtin_ctz(lane##_left), 1); \
         lane##_left &= lane##_left - 1)
void report_undefined(Warp *warp, const Instr *in, const Operand *operand, uint32_t lanes);
/* A register that a tcgen05.ld under way loads is undefined; its use completes the load (true), unless strict. */
bool tmem_load_arrives(Warp *warp, uint32_t register_index);
static inline void need(Warp *w, const Instr *in, const Operand *o, uint32_t mask) {
    if (o->kind == OPERAND_REGISTER && (~w->defined[o->index] & mask) && !tmem_load_arrives(w, o->index))
        report_undefined(w, in, o, ~w->defined[o->index] & mask);
}
/* Moves take undefinedness along: the lanes of mask in which a source is defined. A register that an unfinished
 * load writes counts as used. */
uint32_t undefined_source(Warp *warp, const Instr *in, const Operand *operand, uint32_t mask);
static inline uint32_t defined_lanes(Warp *w, const Instr *in, const Operand *o, uint32_t mask) {
    if (o->kind != OPERAND_REGISTER || !(~w->defined[o->index] & mask)) return mask;
    return undefined_source(w, in, o, mask);
}
static inline void set_defined(Warp *w, const Operand *o, uint32_t mask, uint32_t defined) {
    if (o->kind == OPERAND_REGISTER) w->defined[o->index] = (w->defined[o->index] & ~mask) | (defined & mask);
}
/* A source's lanes without the check. */
static inline const void *lanes_of_source(const Warp *w, const Operand *o, bool wide) {
    if (o->kind != OPERAND_IMMEDIATE) return w->registers + o->offset;
    return wide ? (const void *)o->broadcast64 : (const void *)o->broadcast32;
}
/* Sources: 32 lanes of values. 16-bit registers are kept in 32-bit lanes, upper half zero. */
static inline const uint32_t *src32(Warp *w, const Instr *in, const Operand *o, uint32_t mask) {
    if (o->kind == OPERAND_IMMEDIATE) return o->broadcast32;
    need(w, in, o, mask);
    return (const uint32_t *)(w->registers + o->offset);
}
static inline const uint64_t *src64(Warp *w, const Instr *in, const Operand *o, uint32_t mask) {
    if (o->kind == OPERAND_IMMEDIATE) return o->broadcast64;
    need(w, in, o, mask);
    return (const uint64_t *)(w->registers + o->offset);
}
/* Either width, widened without sign. */
static inline uint64_t lane_value(Warp *w, const Instr *in, const Operand *o, int lane) {
    if (o->kind == OPERAND_IMMEDIATE) return (uint64_t)o->immediate;
    need(w, in, o, 1u << lane);
    return o->width == 8 ? ((const uint64_t *)(w->registers + o->offset))[lane]
                         : ((const uint32_t *)(w->registers + o->offset))[lane];
}
/* A predicate source as a lane mask (an immediate counts as all or nothing). */
static inline uint32_t src_pred(Warp *w, const Instr *in, const Operand *o, uint32_t mask) {
    uint32_t p;
    if (o->kind == OPERAND_IMMEDIATE) p = o->immediate ? FULL_MASK : 0;
    else { need(w, in, o, mask); p = *(const uint32_t *)(w->registers + o->offset); }
    return o->negate ? ~p : p;
}
/* Destinations: write only the lanes of mask, then mark them. A SINK gives a scratch place. */
uint8_t *scratch_register(void);
static inline uint32_t *dst32(Warp *w, const Operand *o, uint32_t mask) {
    if (o->kind != OPERAND_REGISTER) return (uint32_t *)scratch_register();
    w->defined[o->index] |= mask;
    return (uint32_t *)(w->registers + o->offset);
}
static inline uint64_t *dst64(Warp *w, const Operand *o, uint32_t mask) {
    if (o->kind != OPERAND_REGISTER) return (uint64_t *)scratch_register();
    w->defined[o->index] |= mask;
    return (uint64_t *)(w->registers + o->offset);
}
static inline void set_lane(Warp *w, const Operand *o, int lane, uint64_t value) {
    if (o->kind != OPERAND_REGISTER) return;
    w->defined[o->index] |= 1u << lane;
    if (o->width == 8) ((uint64_t *)(w->registers + o->offset))[lane] = value;
    else ((uint32_t *)(w->registers + o->offset))[lane] = o->width == 2 ? (uint16_t)value : (uint32_t)value;
}
static inline void set_pred(Warp *w, const Operand *o, uint32_t mask, uint32_t value) {
    if (o->kind != OPERAND_REGISTER) return;
    uint32_t *p = (uint32_t *)(w->registers + o->offset);
    *p = (*p & ~mask) | (value & mask);
    w->defined[o->index] |= mask;
}
/* Address of lane: base + offset. 32-bit bases (shared, tmem) wrap at 32 bits. */
static inline uint64_t lane_address(Warp *w, const Instr *in, const Operand *o, int lane) {
    const Operand *base = &o->parts[0];
    uint64_t a = lane_value(w, in, base, lane) + (uint64_t)o->immediate;
    return base->kind == OPERAND_REGISTER && base->width == 4 ? (uint32_t)a : a;
}
static inline float as_float(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
static inline uint32_t as_bits(float f) { uint32_t b; memcpy(&b, &f, 4); return b; }
static inline double as_double(uint64_t bits) { double f; memcpy(&f, &bits, 8); return f; }
static inline uint64_t as_bits64(double f) { uint64_t b; memcpy(&b, &f, 8); return b; }

/* TMEM address: lane << 16 | column. Cell of a CTA: */
static inline uint32_t *tmem_cell(Cta *cta, int lane, int column) {
    return &cta->tmem[(size_t)column * TMEM_LANES + lane];
}

/* Number formats (convert.c), bit patterns in, exact values out; encodings round to nearest even. */
float half_to_float(uint16_t bits);
uint16_t float_to_half(float value);
static inline float bfloat_to_float(uint16_t bits) { return as_float((uint32_t)bits << 16); }
uint16_t float_to_bfloat(float value);
float e4m3_to_float(uint8_t bits);
float e5m2_to_float(uint8_t bits);
float e2m1_to_float(uint8_t bits);
float e2m3_to_float(uint8_t bits);
float e3m2_to_float(uint8_t bits);
