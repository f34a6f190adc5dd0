/* Findings: what is wrong with the emulated kernel, counted once per place. */
#include "core.h"
#include <stdarg.h>

enum { MOST_FINDINGS = 4096 };

static Finding *find(Machine *machine, FindingKind kind, uint32_t pc) {
    for (int i = 0; i < machine->n_findings; i++)
        if (machine->findings[i].kind == (int)kind && machine->findings[i].pc == pc) return &machine->findings[i];
    return NULL;
}

static void record(Machine *machine, FindingKind kind, const Warp *warp, const Instr *in, bool fatal,
                   const char *format, va_list arguments) {
    uint32_t pc = in ? in->pc : UINT32_MAX;
    if (fatal || machine->config.stop_at_finding) machine->fatal = true;
    Finding *finding = find(machine, kind, pc);
    if (finding) {
        finding->count++;
        finding->fatal |= fatal;
        return;
    }
    if (machine->n_findings >= MOST_FINDINGS) return;
    if (machine->n_findings == machine->c_findings) {
        machine->c_findings = machine->c_findings ? 2 * machine->c_findings : 16;
        machine->findings = realloc(machine->findings, (size_t)machine->c_findings * sizeof *machine->findings);
        if (!machine->findings) abort();
    }
    finding = &machine->findings[machine->n_findings++];
    *finding = (Finding){.kind = (int)kind, .pc = pc, .other_pc = UINT32_MAX, .cta = -1, .warp = -1, .count = 1,
                         .fatal = fatal};
    if (warp) {
        finding->cta = (int)warp->cta->id;
        finding->warp = warp->index;
    }
    vsnprintf(finding->text, sizeof finding->text, format, arguments);
}

void report(Machine *machine, FindingKind kind, const Warp *warp, const Instr *in, bool fatal, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    record(machine, kind, warp, in, fatal, format, arguments);
    va_end(arguments);
}

Status fail(Warp *warp, const Instr *in, FindingKind kind, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    record(warp->machine, kind, warp, in, true, format, arguments);
    va_end(arguments);
    return FATAL;
}

void report_undefined(Warp *warp, const Instr *in, const Operand *operand, uint32_t lanes) {
    const char *name = warp->program->register_names[operand->index];
    bool loading = false;
    for (int i = 0; i < warp->n_tmem_loads; i++) loading |= warp->tmem_loads[i] == operand->index;
    if (loading)
        report(warp->machine, FINDING_PENDING_LOAD, warp, in, false,
               "%s is read before tcgen05.wait::ld completed its load (lanes %08x)", name, lanes);
    else
        report(warp->machine, FINDING_UNINITIALISED, warp, in, false,
               "%s is read in lanes %08x that never wrote it", name, lanes);
    warp->defined[operand->index] |= lanes; /* one fault, one finding: not again at every later use */
}

uint32_t undefined_source(Warp *warp, const Instr *in, const Operand *operand, uint32_t mask) {
    if (tmem_load_arrives(warp, operand->index)) return mask;
    for (int i = 0; i < warp->n_tmem_loads; i++)
        if (warp->tmem_loads[i] == operand->index) {
            report_undefined(warp, in, operand, ~warp->defined[operand->index] & mask);
            return mask;
        }
    return warp->defined[operand->index] & mask;
}

/* ---------------------------------------------------------------- who waits for what
 * Of a barrier: who arrived in the phase under way, who did in earlier ones but not in this (who is missing
 * is most likely among them), and who arrived at the same place of other CTAs only. */
static size_t add_arrival(char *text, size_t size, const Arrival *arrival, const Cta *at, const char *before) {
    static const char *const actors[] = {"TMA load of ", "TMA store of ", "tensor pipe for ", "copy of ", ""};
    const Instr *in = &at->machine->program->instrs[arrival->pc];
    char cta[24] = "";
    if (arrival->cta != at->id) snprintf(cta, sizeof cta, " of CTA %u", arrival->cta);
    int n = snprintf(text, size, "%s%swarp %d%s (PTX line %u)", before, actors[arrival->lane_class],
                     arrival->warp, cta, in->line);
    return n < 0 ? 0 : (size_t)n < size ? (size_t)n : size - 1;
}

static bool arrived_here(const MBarrier *bar, const Arrival *arrival) {
    for (int i = 0; i < bar->n_arrivals; i++)
        if (bar->arrivals[i].pc == arrival->pc && bar->arrivals[i].warp == arrival->warp) return true;
    return false;
}

static int describe_arrivals(char *text, size_t size, const MBarrier *bar) {
    static const char *const titles[] = {"; arrived in this phase: ", "; in earlier phases, but not in this: ",
                                         "; in other CTAs: "};
    const Machine *machine = bar->cta->machine;
    size_t used = 0;
    for (int part = 0; part < 3; part++) {
        const Arrival *list = part < 2 ? bar->arrivals : machine->arrivals;
        int n = part < 2 ? bar->n_arrivals : machine->n_arrivals;
        bool any = false;
        for (int i = 0; i < n; i++) {
            bool wanted = part < 2 ? (list[i].phase == bar->phase) == !part
                                   : list[i].offset == bar->offset && !arrived_here(bar, &list[i]);
            if (!wanted) continue;
            used += add_arrival(text + used, size - used, &list[i], bar->cta, any ? ", " : titles[part]);
            any = true;
        }
    }
    return (int)used;
}

static int describe_wait(char *text, size_t size, const Warp *warp, const Wait *wait) {
    const char *what = wait->what ? wait->what : "";
    switch (wait->kind) {
    case WAIT_NONE: return snprintf(text, size, "can run");
    case WAIT_MBARRIER: {
        const MBarrier *bar = wait->mbarrier;
        if (!bar) return snprintf(text, size, "an mbarrier %s", what);
        char where[40] = "";
        if (bar->cta != warp->cta) snprintf(where, sizeof where, " of CTA %u", bar->cta->id);
        int n = snprintf(text, size, "mbarrier at shared+%u%s, parity %u: %u phases completed, missing %d of %u "
                         "arrivals and %lld bytes", bar->offset, where, wait->parity, bar->phase, bar->pending,
                         bar->expected, (long long)bar->tx);
        if (n > 0 && (size_t)n < size) n += describe_arrivals(text + n, size - (size_t)n, bar);
        return n;
    }
    case WAIT_NAMED:
        if (!wait->named) return snprintf(text, size, "a named barrier %s", what);
        return snprintf(text, size, "barrier %d: %u of %u threads arrived, phase %u",
                        (int)(wait->named - warp->cta->named), wait->named->arrived, wait->named->expected,
                        wait->named->phase);
    case WAIT_CLUSTER:
        return snprintf(text, size, "the cluster barrier, phase %u", warp->cta->cluster->barrier.phase);
    case WAIT_PENDING:
        return snprintf(text, size, "%s: %d operations in flight, at most %d wanted", *what ? what : "operations",
                        wait->pending ? *wait->pending : 0, wait->limit);
    case WAIT_LANES: return snprintf(text, size, "other lanes of the warp");
    case WAIT_OTHER: return snprintf(text, size, "%s", *what ? what : "something");
    }
    return 0;
}

void describe_fragment(char *text, size_t size, const Warp *warp, int fragment) {
    const Fragment *f = &warp->fragment[fragment];
    const Instr *in = &warp->program->instrs[f->pc];
    int n = snprintf(text, size, "lanes %08x at PTX line %u, %s: ", f->mask, in->line, in->name);
    if (n > 0 && (size_t)n < size) describe_wait(text + n, size - (size_t)n, warp, &warp->waits[fragment]);
}

void report_split_warp(Warp *warp) {
    char text[460];
    size_t used = 0;
    const Instr *first = &warp->program->instrs[warp->fragment[0].pc];
    for (int i = 0; i < warp->fragments && used < sizeof text - 1; i++) {
        const Fragment *f = &warp->fragment[i];
        const Instr *in = &warp->program->instrs[f->pc];
        used += (size_t)snprintf(text + used, sizeof text - used, "%s%08x at line %u (%s)", i ? ", " : "", f->mask,
                                 in->line, in->name);
    }
    report(warp->machine, FINDING_DIVERGENCE, warp, first, true,
           "lanes of one warp wait for each other at different instructions: %s; live: %08x", text, warp->live);
}

static void table_line(Machine *machine, const char *line) {
    size_t n = strlen(line);
    char *grown = realloc(machine->deadlock, machine->deadlock_bytes + n + 2);
    if (!grown) abort();
    machine->deadlock = grown;
    memcpy(grown + machine->deadlock_bytes, line, n);
    machine->deadlock_bytes += n;
    grown[machine->deadlock_bytes++] = '\n';
    grown[machine->deadlock_bytes] = 0;
}

void report_deadlock(Machine *machine) {
    const Instr *first = NULL;
    const Warp *of = NULL;
    int waiting = 0, exited = 0;
    for (int c = 0; c < machine->n_clusters; c++)
        for (int r = 0; r < machine->clusters[c]->n; r++) {
            Cta *cta = machine->clusters[c]->cta[r];
            for (int w = 0; w < cta->n_warps; w++) {
                Warp *warp = &cta->warps[w];
                char line[2048], text[2000];
                if (!warp->live) {
                    exited++;
                    continue;
                }
                waiting++;
                for (int i = 0; i < warp->fragments; i++) {
                    describe_fragment(text, sizeof text, warp, i);
                    snprintf(line, sizeof line, "CTA %u warp %2d  %s", cta->id, w, text);
                    table_line(machine, line);
                    if (!first) first = &warp->program->instrs[warp->fragment[i].pc], of = warp;
                }
            }
        }
    char text[420] = "";
    if (of) describe_fragment(text, sizeof text, of, 0);
    report(machine, FINDING_DEADLOCK, of, first, true,
           "deadlock: %d warps wait, %d have exited, no asynchronous operation is left; the first: %s", waiting,
           exited, text);
}
