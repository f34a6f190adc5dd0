/* tcgen05.mma: D = A B + D, D in tensor memory, B in shared memory, A in either.
 *
 * An operation waits its turn in the tensor pipe of its CTA (of the even CTA for a pair). When it runs it
 * reads A and B through the async proxy, as arrays of floats: every input format is exact in float32, and
 * so is the product of two of them. The sum over the K of one instruction is taken in float32 in the
 * order of K, then added to the accumulator and rounded to its format. Hardware does not document its own
 * order or the width of its intermediate sums, so the last bits may differ from silicon.
 *
 * Where row m, column n of D lies (the layouts of the PTX ISA; rows are those of one CTA):
 *   D  M = 128, and A  M = 256 of a pair: lane m, column n
 *   F  M = 64: lane 32 (m / 16) + m % 16, plus 16 if the address says lane 16; column n
 *   E  M = 64 .ws, and B  M = 128 of a pair: lane m + 64 (n / (N / 2)), column n % (N / 2)
 *   G  M = 32 .ws: lane m + 32 (n / (N / 4)), column n % (N / 4)
 * The last two fold N over parts of the lanes; every part multiplies with the A of its own lanes if A is
 * in tensor memory. There A packs two 16-bit or four 8-bit values in a cell, low K in the low bits.
 */
#include "tensor.h"

enum { MOST_ROWS = 128, MOST_N = 256, MOST_K = 32 };
/* Multiply-adds a cycle and CTA with 16-bit inputs; 8-bit inputs double it (B200: 8192 FLOP a cycle). */
#define MACS_PER_CYCLE 4096.0

typedef struct { MmaKind kind; uint8_t group, ws, a_in_tmem, has_disable; int8_t scale_operand, zero_operand,
                 disable_operand, enable_operand; } Form;
typedef struct {
    const Form *form;
    MmaShape shape;
    uint32_t d, a_tmem, disable[8];
    SmemTile a, b;
    bool accumulate, masked;
    float scale;                /* of D: 2^-scale-input-d */
    bool zero[MOST_N];
} Mma;

/* How the rows and columns of one CTA lie in its lanes. */
typedef struct { int rows, folds, fold_lanes, block_rows, block_lanes, first_lane; } Lanes;

/* Where the rows of a block begin that starts at `row`. */
static int first_lane(const Lanes *lanes, int fold, int row) {
    return lanes->first_lane + fold * lanes->fold_lanes + row / lanes->block_rows * lanes->block_lanes;
}

/* ---------------------------------------------------------------- formats */
static void build_table(float *table, Element e) {
    for (int i = 0; i < 256; i++) {
        uint8_t b = (uint8_t)i;
        switch (e) {
        case ELEMENT_E4M3: table[i] = e4m3_to_float(b); break;
        case ELEMENT_E5M2: table[i] = e5m2_to_float(b); break;
        case ELEMENT_E2M3: table[i] = e2m3_to_float(b & 63); break;
        case ELEMENT_E3M2: table[i] = e3m2_to_float(b & 63); break;
        case ELEMENT_E2M1: table[i] = e2m1_to_float(b & 15); break;
        case ELEMENT_S8: table[i] = (float)(int8_t)b; break;
        default: table[i] = (float)b; break;
        }
    }
}

static const float *table_of(Element e) {
    static float tables[ELEMENT_S8 + 1][256];
    static bool built[ELEMENT_S8 + 1];
    if (!built[e]) build_table(tables[e], e);
    built[e] = true;
    return tables[e];
}

/* Half to float without branches: the exponent is moved by a multiplication, which is exact. */
static inline float widen_half(uint16_t h) {
    float magnitude = as_float((uint32_t)(h & 0x7fff) << 13) * 0x1p112f;
    uint32_t special = (h & 0x7c00) == 0x7c00 ? 0x7f800000u : 0;
    return as_float(as_bits(magnitude) | special | (uint32_t)(h & 0x8000) << 16);
}

/* One 16-byte chunk of shared memory: 8 or 16 elements. 4-bit and 6-bit elements lie packed at its low
 * end, 16 to a chunk (the padded formats that TMA writes). */
static inline void widen_chunk(const uint8_t *from, Element e, const float *table, float *to) {
    if (e <= ELEMENT_BF16) {
        uint16_t raw[8];
        memcpy(raw, from, 16);
        if (e == ELEMENT_F16) for (int i = 0; i < 8; i++) to[i] = widen_half(raw[i]);
        else for (int i = 0; i < 8; i++) to[i] = bfloat_to_float(raw[i]);
    } else if (e == ELEMENT_E2M1) {
        for (int i = 0; i < 16; i++) to[i] = table[from[i / 2] >> (i % 2 * 4) & 15];
    } else if (element_packed(e)) {
        for (int i = 0; i < 16; i++) {
            int bit = 6 * i;
            unsigned two = from[bit / 8] | (unsigned)from[bit / 8 + 1] << 8;
            to[i] = table[two >> (bit % 8) & 63];
        }
    } else {
        for (int i = 0; i < 16; i++) to[i] = table[from[i]];
    }
}

/* ---------------------------------------------------------------- gathering the operands */
/* The tile as floats: element (row, k) goes to to[row * row_step + k * k_step]. Inlined for every format. */
static inline __attribute__((always_inline)) void gather_as(const uint8_t *memory, const Geometry *g,
                                                            Element e,
                                                            float sign, float *to, int row_step, int k_step) {
    const float *table = e > ELEMENT_BF16 ? table_of(e) : NULL;
    const int per_chunk = 16 / element_bytes(e);
    const bool by_row = g->major == MAJOR_K;
    const int line_step = by_row ? row_step : k_step, step = by_row ? k_step : row_step;
    for (uint32_t l = 0; l < g->lines; l++)
        for (uint32_t c = 0; c < g->chunks; c++) {
            float value[16];
            widen_chunk(memory + g->chunk[l * g->chunks + c], e, table, value);
            float *at = to + (int)l * line_step + (int)c * per_chunk * step;
            if (step == 1) for (int i = 0; i < per_chunk; i++) at[i] = sign * value[i];
            else for (int i = 0; i < per_chunk; i++) at[i * step] = sign * value[i];
        }
}

static void gather(const uint8_t *memory, const Geometry *g, Element e, bool negate, float *to, int row_step,
                   int k_step) {
    const float sign = negate ? -1.0f : 1.0f;
    switch (e) {
    case ELEMENT_F16: gather_as(memory, g, ELEMENT_F16, sign, to, row_step, k_step); break;
    case ELEMENT_BF16: gather_as(memory, g, ELEMENT_BF16, sign, to, row_step, k_step); break;
    case ELEMENT_E2M1: gather_as(memory, g, ELEMENT_E2M1, sign, to, row_step, k_step); break;
    default: gather_as(memory, g, e, sign, to, row_step, k_step); break;
    }
}

static const Geometry *geometry_of(const SmemTile *tile, Major major, int rows, int k, Element e) {
    uint32_t bytes = (uint32_t)element_bytes(e);
    if (major == MAJOR_K) return tile_geometry(tile, major, (uint32_t)rows, (uint32_t)k * bytes / 16);
    return tile_geometry(tile, major, (uint32_t)k, (uint32_t)rows * bytes / 16);
}

/* `rows` rows of A or of B from the shared memory of a CTA; false: they reach out of it. */
static bool gather_shared(Machine *machine, AsyncOp *op, Cta *cta, const Mma *mma, bool is_a, int rows,
                          float *to, int row_step, int k_step) {
    const MmaShape *s = &mma->shape;
    const SmemTile *tile = is_a ? &mma->a : &mma->b;
    const Element e = is_a ? s->a : s->b;
    const Geometry *g = geometry_of(tile, is_a ? s->a_major : s->b_major, rows, s->k, e);
    const uint8_t *memory = tile_access(machine, op, cta, tile, g);
    if (!memory) return false;
    machine->counters.mma_shared_bytes += (uint64_t)(rows * s->k * element_bytes(e));
    gather(memory, g, e, is_a ? s->a_negate : s->b_negate, to, row_step, k_step);
    return true;
}

/* A of one fold, transposed: to[k][row]. */
static void gather_tmem(AsyncOp *op, Cta *cta, const Mma *mma, const Lanes *lanes, int fold, float *to) {
    const MmaShape *s = &mma->shape;
    const int column = tmem_column(mma->a_tmem), per_cell = 4 / element_bytes(s->a), cells = s->k / per_cell;
    const float sign = s->a_negate ? -1.0f : 1.0f;
    const float *table = s->a > ELEMENT_BF16 ? table_of(s->a) : NULL;
    for (int row = 0; row < lanes->rows; row += lanes->block_rows) {
        int lane = first_lane(lanes, fold, row);
        access_tmem(&op->agent, cta, lane, lanes->block_rows, column, cells, false, op->in);
        for (int c = 0; c < cells; c++) {
            const uint32_t *cell = tmem_cell(cta, lane, column + c);
            for (int part = 0; part < per_cell; part++) {
                float *out = to + (c * per_cell + part) * lanes->rows + row;
                if (s->a == ELEMENT_F16)
                    for (int i = 0; i < lanes->block_rows; i++)
                        out[i] = sign * widen_half((uint16_t)(cell[i] >> 16 * part));
                else if (s->a == ELEMENT_BF16)
                    for (int i = 0; i < lanes->block_rows; i++)
                        out[i] = sign * as_float(cell[i] >> 16 * part << 16);
                else
                    for (int i = 0; i < lanes->block_rows; i++)
                        out[i] = sign * table[cell[i] >> 8 * part & 255];
            }
        }
    }
}

/* ---------------------------------------------------------------- arithmetic */
typedef float Floats __attribute__((vector_size(32), aligned(4), may_alias));

/* out[n][row] = sum over k of a[k][row] b[n][k], for 16 rows and 2 columns at a time. */
static void multiply(float *restrict out, const float *restrict a, const float *restrict b, int rows, int n,
                     int k) {
    for (int row = 0; row < rows; row += 16)
        for (int j = 0; j < n; j += 2) {
            Floats s00 = {0}, s01 = {0}, s10 = {0}, s11 = {0};
            const float *b0 = b + j * k, *b1 = b0 + k, *at = a + row;
            for (int i = 0; i < k; i++, at += rows) {
                Floats a0 = *(const Floats *)at, a1 = *(const Floats *)(at + 8);
                s00 += a0 * b0[i];
                s01 += a1 * b0[i];
                s10 += a0 * b1[i];
                s11 += a1 * b1[i];
            }
            float *to = out + j * rows + row;
            *(Floats *)to = s00;
            *(Floats *)(to + 8) = s01;
            *(Floats *)(to + rows) = s10;
            *(Floats *)(to + rows + 8) = s11;
        }
}

static inline uint32_t saturated_sum(uint32_t a, uint32_t b) {
    int64_t sum = (int64_t)(int32_t)a + (int32_t)b;
    return (uint32_t)(int32_t)(sum > INT32_MAX ? INT32_MAX : sum < INT32_MIN ? INT32_MIN : sum);
}

/* Adds the products to a run of cells of one column. */
static void add_cells(const Mma *mma, uint32_t *restrict cell, const float *restrict sum, int n) {
    const MmaShape *s = &mma->shape;
    const float scale = mma->scale;
    if (s->d == ACCUMULATE_F32) {
        float *value = (float *)cell;
        if (!mma->accumulate) memcpy(value, sum, (size_t)n * sizeof *sum);
        else if (scale == 1.0f) for (int i = 0; i < n; i++) value[i] += sum[i];
        else for (int i = 0; i < n; i++) value[i] = value[i] * scale + sum[i];
    } else if (s->d == ACCUMULATE_F16) {
        for (int i = 0; i < n; i++) {
            float old = mma->accumulate ? widen_half((uint16_t)cell[i]) * scale : 0;
            cell[i] = float_to_half(mma->accumulate ? old + sum[i] : sum[i]);
        }
    } else { /* the sum of up to 32 products of bytes is an integer that a float holds exactly */
        for (int i = 0; i < n; i++) {
            uint32_t add = (uint32_t)(int32_t)sum[i], old = mma->accumulate ? cell[i] : 0;
            cell[i] = s->saturate ? saturated_sum(old, add) : old + add;
        }
    }
}

/* ---------------------------------------------------------------- one CTA's share */
static Lanes lanes_of(const Mma *mma) {
    const MmaShape *s = &mma->shape;
    int rows = s->m / mma->form->group, first = tmem_lane(mma->d);
    if (rows == 64 && mma->form->group == 1 && !mma->form->ws)
        return (Lanes){rows, 1, 128, 16, 32, first};
    int folds = 128 / rows;
    return (Lanes){rows, folds, rows, rows, rows, first};
}

static bool disabled(const Mma *mma, int rank, int lane) {
    return mma->masked && mma->disable[4 * rank + lane / 32] >> (lane % 32) & 1;
}

/* A run of lanes that hold consecutive rows of D in the same columns. */
static void write_block(AsyncOp *op, Cta *cta, const Mma *mma, int lane, int rows, int column, int n,
                        const float *sum, int sum_rows) {
    if (mma->accumulate) access_tmem(&op->agent, cta, lane, rows, column, n, false, op->in);
    access_tmem(&op->agent, cta, lane, rows, column, n, true, op->in);
    for (int j = 0; j < n; j++) add_cells(mma, tmem_cell(cta, lane, column + j), sum + j * sum_rows, rows);
}

static void write_fold(AsyncOp *op, Cta *cta, const Mma *mma, const Lanes *lanes, int rank, int fold,
                       const float *sum) {
    int n = mma->shape.n / lanes->folds, column = tmem_column(mma->d);
    for (int row = 0; row < lanes->rows; row += lanes->block_rows) {
        int lane = first_lane(lanes, fold, row);
        for (int i = 0; i < lanes->block_rows;) { /* the enabled lanes in runs */
            int end = i;
            while (end < lanes->block_rows && !disabled(mma, rank, lane + end)) end++;
            if (end > i)
                write_block(op, cta, mma, lane + i, end - i, column, n, sum + row + i, lanes->rows);
            i = end + 1;
        }
    }
}

static bool run_share(Machine *machine, AsyncOp *op, Cta *cta, int rank, const Mma *mma, const float *b) {
    static float a[MOST_K * MOST_ROWS] __attribute__((aligned(64))),
        sum[MOST_N * MOST_ROWS] __attribute__((aligned(64)));
    const MmaShape *s = &mma->shape;
    const Lanes lanes = lanes_of(mma);
    const int n = s->n / lanes.folds;
    if (!tmem_allocated(machine, op->warp, op->in, cta, tmem_column(mma->d), n)) return false;
    if (mma->form->a_in_tmem) {
        if (!tmem_allocated(machine, op->warp, op->in, cta, tmem_column(mma->a_tmem), 8)) return false;
    } else if (!gather_shared(machine, op, cta, mma, true, lanes.rows, a, 1, lanes.rows)) {
        return false;
    }
    for (int fold = 0; fold < lanes.folds; fold++) {
        if (mma->form->a_in_tmem) gather_tmem(op, cta, mma, &lanes, fold, a);
        multiply(sum, a, b + fold * n * s->k, lanes.rows, n, s->k);
        write_fold(op, cta, mma, &lanes, rank, fold, sum);
    }
    return true;
}

static double mma_cycles(const Mma *mma) {
    const MmaShape *s = &mma->shape;
    /* layout F uses half the lanes */
    int rows = mma->form->group == 1 && s->m == 64 && !mma->form->ws ? 128 : s->m;
    double macs = (double)rows * s->n * s->k / mma->form->group;
    return macs / (MACS_PER_CYCLE * (s->k == 16 ? 1 : 2));
}

static bool run_mma(Machine *machine, AsyncOp *op) {
    static float b[MOST_N * MOST_K] __attribute__((aligned(64)));
    const Mma *mma = op->payload;
    const MmaShape *s = &mma->shape;
    const int group = mma->form->group, share = s->n / group;
    Cta *ctas[2] = {op->cta, NULL};
    if (group == 2) /* the issuer made sure of its peer */
        for (int i = 0; i < 2; i++) ctas[i] = op->cta->cluster->cta[(op->cta->rank & ~1) + i];
    for (int i = 0; i < group; i++)
        if (!gather_shared(machine, op, ctas[i], mma, false, share, b + i * share * s->k, s->k, 1))
            return true;
    for (int j = 0; j < s->n; j++)
        if (mma->zero[j]) memset(b + j * s->k, 0, (size_t)s->k * sizeof *b);
    for (int i = 0; i < group; i++)
        if (!run_share(machine, op, ctas[i], i, mma, b)) return true;
    machine->counters.mma_flops += 2ull * (uint64_t)s->m * (uint64_t)s->n * (uint64_t)s->k;
    machine->counters.tensor_cycles += group * mma_cycles(mma); /* a pair keeps both SMs' tensor cores busy */
    return true;
}

/* ---------------------------------------------------------------- issue */
static Status bad_descriptor(Warp *warp, const Instr *in, bool unmodelled, const char *why) {
    return fail(warp, in, unmodelled ? FINDING_UNMODELLED : FINDING_DESCRIPTOR, "%s", why);
}

static Status check_tmem_address(Warp *warp, const Instr *in, const Mma *mma, uint32_t address,
                                 const char *name, int step) {
    bool half = mma->form->group == 1 && mma->shape.m == 64 && !mma->form->ws;
    int lane = tmem_lane(address);
    if (lane != 0 && !(half && lane == 16))
        return fail(warp, in, FINDING_DESCRIPTOR, "%s at lane %d: M = %d needs lane 0%s", name, lane,
                    mma->shape.m, half ? " or 16" : "");
    if (tmem_column(address) % step)
        return fail(warp, in, FINDING_ALIGNMENT, "%s at column %d: it must be a multiple of %d", name,
                    tmem_column(address), step);
    return NEXT;
}

static Status read_operands(Warp *warp, const Instr *in, const Form *form, int lane, Mma *mma) {
    char why[256];
    bool unmodelled = false;
    uint32_t idesc = (uint32_t)lane_value(warp, in, &in->args[3], lane);
    if (!instruction_descriptor(idesc, form->kind, form->group, form->ws, &mma->shape, &unmodelled, why,
                                sizeof why))
        return bad_descriptor(warp, in, unmodelled, why);
    if (!smem_descriptor(lane_value(warp, in, &in->args[2], lane), &mma->b, &unmodelled, why, sizeof why))
        return bad_descriptor(warp, in, unmodelled, why);
    mma->d = (uint32_t)lane_address(warp, in, &in->args[0], lane);
    Status status = check_tmem_address(warp, in, mma, mma->d, "D", 2);
    if (status != NEXT) return status;
    if (!form->a_in_tmem) {
        if (!smem_descriptor(lane_value(warp, in, &in->args[1], lane), &mma->a, &unmodelled, why, sizeof why))
            return bad_descriptor(warp, in, unmodelled, why);
        return NEXT;
    }
    mma->a_tmem = (uint32_t)lane_address(warp, in, &in->args[1], lane);
    status = check_tmem_address(warp, in, mma, mma->a_tmem, "A", 4);
    if (status != NEXT) return status;
    if (tmem_lane(mma->a_tmem) != tmem_lane(mma->d))
        return fail(warp, in, FINDING_DESCRIPTOR, "A at lane %d, D at lane %d: they must be equal",
                    tmem_lane(mma->a_tmem), tmem_lane(mma->d));
    if (mma->shape.a_major)
        return fail(warp, in, FINDING_DESCRIPTOR, "A in tensor memory cannot be transposed");
    if (element_packed(mma->shape.a))
        return fail(warp, in, FINDING_UNMODELLED, "4-bit and 6-bit A in tensor memory is not modelled");
    return NEXT;
}

static Status read_modifiers(Warp *warp, const Instr *in, const Form *form, int lane, Mma *mma) {
    mma->accumulate = src_pred(warp, in, &in->args[form->enable_operand], 1u << lane) >> lane & 1;
    mma->scale = 1.0f;
    if (form->scale_operand >= 0) mma->scale = 1.0f / (float)(1u << in->args[form->scale_operand].immediate);
    if (form->disable_operand >= 0) {
        const Operand *vector = &in->args[form->disable_operand];
        for (int i = 0; i < vector->count; i++) {
            mma->disable[i] = (uint32_t)lane_value(warp, in, &vector->parts[i], lane);
            mma->masked |= mma->disable[i] != 0;
        }
    }
    if (form->zero_operand >= 0) {
        char why[128];
        uint64_t mask = lane_value(warp, in, &in->args[form->zero_operand], lane);
        if (!zero_columns(mask, mma->shape.m, mma->shape.n, mma->zero, why, sizeof why))
            return bad_descriptor(warp, in, true, why);
    }
    return NEXT;
}

static Status exec_mma(Warp *warp, const Instr *in, uint32_t mask) {
    const Form *form = in->data;
    Cta *pair[2];
    if (form->group == 2 && !cta_pair(warp, in, pair)) return FATAL;
    FOR_LANES(mask, lane) {
        Mma mma = {.form = form};
        Status status = read_operands(warp, in, form, (int)lane, &mma);
        if (status == NEXT) status = read_modifiers(warp, in, form, (int)lane, &mma);
        if (status != NEXT) return status;
        AsyncOp *op = async_new(warp, in, run_mma, sizeof mma, true);
        memcpy(op->payload, &mma, sizeof mma);
        op->start = 0;
        op->finish = mma_cycles(&mma);
        async_submit(warp->machine, op);
    }
    return warp->machine->fatal ? FATAL : NEXT;
}

/* ---------------------------------------------------------------- decoding */
static bool find_kind(const Decode *d, Form *form, char *why, size_t size) {
    static const char *const refused[] = {"kind::tf32", "kind::mxf8f6f4", "kind::mxf4", "kind::mxf4nvf4"};
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++)
        if (has(d, refused[i]))
            return tensor_refuse(why, size, "tcgen05.mma of .%s is not modelled", refused[i]), false;
    if (has(d, "sp")) return tensor_refuse(why, size, "sparse tcgen05.mma is not modelled"), false;
    if (has(d, "ashift"))
        return tensor_refuse(why, size, "tcgen05.mma with .ashift is not modelled: the ISA does not say whether the "
                             "product has A before or after the shift, and which lanes it crosses"), false;
    if (has(d, "kind::f16")) form->kind = KIND_F16;
    else if (has(d, "kind::f8f6f4")) form->kind = KIND_F8F6F4;
    else if (has(d, "kind::i8")) form->kind = KIND_I8;
    else return tensor_refuse(why, size, "tcgen05.mma without a known .kind"), false;
    return true;
}

static const char *bad_collector(const Decode *d, bool ws) {
    static const char *const ops[] = {"fill", "use", "lastuse", "discard"};
    for (int i = 2; i < d->n; i++) {
        if (strncmp(d->part[i], "collector::", 11)) continue;
        const char *rest = d->part[i] + 11;
        bool buffer = ws ? rest[0] == 'b' && rest[1] >= '0' && rest[1] <= '3' : rest[0] == 'a';
        rest += ws ? 2 : 1;
        bool known = false;
        for (int j = 0; buffer && j < 4 && !strncmp(rest, "::", 2); j++) known |= !strcmp(rest + 2, ops[j]);
        if (!known) return d->part[i];
    }
    return NULL;
}

/* [d], a, b, idesc, {disabled lanes}?, enable-input-d, (scale-input-d or zero-column mask)? */
static bool find_operands(const Instr *in, Form *form, char *why, size_t size) {
    int at = 4;
    form->scale_operand = form->zero_operand = form->disable_operand = -1;
    if (in->n < 5 || in->args[0].kind != OPERAND_ADDRESS)
        return tensor_refuse(why, size, "too few operands"), false;
    form->a_in_tmem = in->args[1].kind == OPERAND_ADDRESS;
    if (in->args[at].kind == OPERAND_VECTOR) {
        if (form->ws || in->args[at].count != 4 * form->group)
            return tensor_refuse(why, size, "a disable-output-lane vector has %d registers and no .ws",
                                 4 * form->group), false;
        form->disable_operand = (int8_t)at++;
    }
    if (at >= in->n) return tensor_refuse(why, size, "enable-input-d is missing"), false;
    form->enable_operand = (int8_t)at++;
    if (at < in->n) {
        if (form->ws) form->zero_operand = (int8_t)at++;
        else form->scale_operand = (int8_t)at++;
    }
    if (at != in->n) return tensor_refuse(why, size, "too many operands"), false;
    if (form->scale_operand < 0) return true;
    const Operand *scale = &in->args[form->scale_operand];
    if (form->kind != KIND_F16)
        return tensor_refuse(why, size, "scale-input-d is for kind::f16 and kind::tf32"), false;
    if (scale->kind != OPERAND_IMMEDIATE || scale->immediate < 0 || scale->immediate > 15)
        return tensor_refuse(why, size, "scale-input-d must be an immediate in 0..15"), false;
    return true;
}

Decoded decode_mma(Decode *d, char *why, size_t size) {
    static const char *const known[] =
        {"ws", "cta_group::1", "cta_group::2", "kind::f16", "kind::f8f6f4", "kind::i8", NULL};
    if (!is(d, 0, "tcgen05") || !is(d, 1, "mma")) return NOT_MINE;
    Form *form = arena(d->program, sizeof *form);
    form->ws = has(d, "ws");
    if (!find_kind(d, form, why, size)) return REFUSED;
    const char *bad = bad_collector(d, form->ws);
    for (int i = 2; i < d->n && !bad; i++) {
        bool found = !strncmp(d->part[i], "collector::", 11);
        for (int j = 0; known[j] && !found; j++) found = !strcmp(d->part[i], known[j]);
        if (!found) bad = d->part[i];
    }
    if (bad) return tensor_refuse(why, size, "modifier .%s of tcgen05.mma is not modelled", bad);
    form->group = (uint8_t)cta_group(d, why, size);
    if (!form->group) return REFUSED;
    if (form->ws && form->group == 2)
        return tensor_refuse(why, size, "tcgen05.mma.ws exists for cta_group::1 only");
    if (!find_operands(d->in, form, why, size)) return REFUSED;
    d->in->exec = exec_mma;
    d->in->class_ = CLASS_MMA;
    d->in->data = form;
    return DECODED;
}
