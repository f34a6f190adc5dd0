/* ldmatrix, stmatrix and movmatrix: 8 x 8 matrices of 16-bit elements between rows in shared memory and
 * fragments (lane l holds row l / 4, columns 2 (l % 4) and the next). */
#include "memory.h"

/* The rows of one matrix: lane `first + r` holds the address of row r. */
static bool matrix_rows(Warp *w, const Instr *in, const uint64_t *address, int first, bool write, Run *run,
                        uint8_t **row) {
    for (int r = 0; r < 8; r++) {
        Place p;
        uint64_t a = address[first + r];
        if (!aligned_to(w, in, a, 16, "row address")) return false;
        if (!locate(w, in, (Space)in->u[2], a, 16, first + r, write, &p)) return false;
        if (p.space != SPACE_SHARED || p.cta != w->cta) {
            fail(w, in, FINDING_BOUNDS, "a row outside of the CTA's shared memory");
            return false;
        }
        run_add(run, p.space, p.cta, p.at, 16);
        row[r] = p.host;
    }
    return true;
}

static const Operand *matrix_part(const Operand *o, uint32_t i) {
    return o->kind == OPERAND_VECTOR ? &o->parts[i] : o;
}

/* Element e (0, 1) of lane l lies in row `r`, column `c`. */
static inline void fragment_place(uint32_t l, uint32_t e, bool transposed, uint32_t *r, uint32_t *c) {
    uint32_t outer = l / 4, inner = 2 * (l % 4) + e;
    *r = transposed ? inner : outer;
    *c = transposed ? outer : inner;
}

static Status exec_ldmatrix(Warp *w, const Instr *in, uint32_t mask) {
    uint32_t count = (uint32_t)in->u[0];
    uint64_t address[LANES];
    uint8_t *row[4][8];
    lane_addresses(w, in, &in->args[1], count == 4 ? mask : (1u << 8 * count) - 1, address);
    Run run = {.machine = w->machine, .agent = &w->agent, .in = in, .proxy = GENERIC_PROXY};
    for (uint32_t m = 0; m < count; m++)
        if (!matrix_rows(w, in, address, (int)m * 8, false, &run, row[m])) return FATAL;
    run_flush(&run);
    for (uint32_t m = 0; m < count; m++) {
        uint32_t *to = dst32(w, matrix_part(&in->args[0], m), mask);
        for (uint32_t l = 0; l < LANES; l++) {
            uint16_t pair[2];
            for (uint32_t e = 0; e < 2; e++) {
                uint32_t r, c;
                fragment_place(l, e, in->u[1], &r, &c);
                memcpy(&pair[e], row[m][r] + 2 * c, 2);
            }
            to[l] = pair[0] | (uint32_t)pair[1] << 16;
        }
    }
    return NEXT;
}

static Status exec_stmatrix(Warp *w, const Instr *in, uint32_t mask) {
    uint32_t count = (uint32_t)in->u[0];
    uint64_t address[LANES];
    uint8_t *row[4][8];
    lane_addresses(w, in, &in->args[0], count == 4 ? mask : (1u << 8 * count) - 1, address);
    Run run = {.machine = w->machine, .agent = &w->agent, .in = in, .proxy = GENERIC_PROXY, .write = true};
    for (uint32_t m = 0; m < count; m++)
        if (!matrix_rows(w, in, address, (int)m * 8, true, &run, row[m])) return FATAL;
    run_flush(&run);
    for (uint32_t m = 0; m < count; m++) {
        const uint32_t *from = src32(w, in, matrix_part(&in->args[1], m), mask);
        for (uint32_t l = 0; l < LANES; l++)
            for (uint32_t e = 0; e < 2; e++) {
                uint32_t r, c;
                uint16_t v = (uint16_t)(from[l] >> 16 * e);
                fragment_place(l, e, in->u[1], &r, &c);
                memcpy(row[m][r] + 2 * c, &v, 2);
            }
    }
    return NEXT;
}

static Status exec_movmatrix(Warp *w, const Instr *in, uint32_t mask) {
    uint32_t from[LANES];
    memcpy(from, src32(w, in, &in->args[1], mask), sizeof from);
    uint32_t *to = dst32(w, &in->args[0], mask);
    for (uint32_t l = 0; l < LANES; l++) {
        uint32_t v = 0;
        for (uint32_t e = 0; e < 2; e++) {
            uint32_t r, c;
            fragment_place(l, e, true, &r, &c);
            v |= (from[r * 4 + c / 2] >> 16 * (c & 1) & 0xffff) << 16 * e;
        }
        to[l] = v;
    }
    return NEXT;
}

static Decoded decode_fragments(Decode *d, bool load, char *why, size_t n) {
    Instr *in = d->in;
    Space space = SPACE_GENERIC;
    uint32_t count = 0;
    for (int i = 1; i < d->n; i++) {
        const char *p = d->part[i];
        if (!strcmp(p, "x1")) count = 1;
        else if (!strcmp(p, "x2")) count = 2;
        else if (!strcmp(p, "x4")) count = 4;
        else if (space_modifier(p, &space) && space == SPACE_SHARED) continue;
        else if (strcmp(p, "sync") && strcmp(p, "aligned") && strcmp(p, "m8n8") && strcmp(p, "b16")
                 && strcmp(p, "trans"))
            return deny(why, n, "the modifier .%s is not modelled", p);
    }
    if (!count || !has(d, "aligned") || !has(d, "b16") || !has(d, "m8n8") || in->n != 2
        || in->args[load].kind != OPERAND_ADDRESS
        || (in->args[!load].kind == OPERAND_VECTOR ? in->args[!load].count : 1) != count)
        return deny(why, n, "no such operation: %s", d->text);
    in->u[0] = count;
    in->u[1] = has(d, "trans");
    in->u[2] = space;
    in->flags |= ALIGNED;
    in->exec = load ? exec_ldmatrix : exec_stmatrix;
    in->class_ = CLASS_SHARED;
    return DECODED;
}

Decoded decode_matrix(Decode *d, char *why, size_t n) {
    if (is(d, 0, "ldmatrix")) return decode_fragments(d, true, why, n);
    if (is(d, 0, "stmatrix")) return decode_fragments(d, false, why, n);
    if (!is(d, 0, "movmatrix")) return NOT_MINE;
    if (strcmp(d->text, "movmatrix.sync.aligned.m8n8.trans.b16") || d->in->n != 2)
        return deny(why, n, "no such operation: %s", d->text);
    d->in->flags |= ALIGNED;
    d->in->exec = exec_movmatrix;
    d->in->class_ = CLASS_SHUFFLE;
    return DECODED;
}
