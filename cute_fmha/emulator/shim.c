/* A CUDA runtime that records launches.
 *
 * The host functions that CuTe DSL compiles call the runtime through a small set of C symbols, such as
 * _cudaLaunchKernelEx. capture.py links a copy of the host function against the symbols here, which have
 * the prefix `shim` and so never meet the real ones in one process. Kernel handles are names, device
 * attributes come from a table that Python fills, and a launch is copied (configuration, attributes,
 * parameter bytes) into a list that Python reads once the host function has returned. A runtime symbol
 * that is missing here is an error before the host function runs; an attribute that is not modelled
 * fails with a message. One host thread at a time: the caller holds a lock.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, NOT_SUPPORTED = 801 }; /* cudaError_t */
enum { ATTRIBUTES_MAX = 32, DEVICE_ATTRIBUTES = 256 };

/* cudaLaunchConfig_t and cudaLaunchAttribute as the runtime's headers lay them out. */
typedef struct { uint32_t id; uint8_t pad[4]; uint8_t value[64]; } Attribute;
typedef struct {
    uint32_t grid[3], block[3];
    uint64_t dynamic_shared;
    uint64_t stream;
    const Attribute *attributes;
    uint32_t n_attributes;
} Config;

typedef struct { /* what Python reads, see capture.py */
    const char *kernel;
    uint32_t grid[3], block[3];
    uint64_t dynamic_shared, stream;
    uint32_t n_attributes;
    Attribute attributes[ATTRIBUTES_MAX];
    uint32_t n_params, param_bytes;
    uint8_t *params; /* one after the other, sizes as declared */
} Record;

typedef struct Kernel {
    struct Kernel *next;
    char *name;
    bool declared;          /* in the PTX of the function that runs now */
    uint32_t n_params, *sizes;
    uint32_t static_shared, local_bytes, max_threads, max_dynamic_shared;
} Kernel;

static Kernel *kernels;
static Record *records;
static uint32_t n_records, c_records;
static int32_t device_attributes[DEVICE_ATTRIBUTES];
static bool device_known[DEVICE_ATTRIBUTES];
static uintptr_t next_library;
static char error[512];

static int32_t refuse(int32_t code, const char *call, const char *why) {
    if (!error[0]) snprintf(error, sizeof error, "%s: %s", call, why);
    return code;
}
static Kernel *kernel_named(const char *name) {
    for (Kernel *k = kernels; k; k = k->next)
        if (!strcmp(k->name, name)) return k;
    Kernel *k = calloc(1, sizeof *k);
    k->name = strdup(name);
    k->next = kernels;
    return kernels = k;
}

/* ---------------------------------------------------------------- for Python */
void shim_begin(void) {
    for (uint32_t i = 0; i < n_records; i++) free(records[i].params);
    n_records = 0;
    error[0] = 0;
    for (Kernel *k = kernels; k; k = k->next) k->declared = false;
}
void shim_device_attribute(int32_t id, int32_t value) {
    if (id < 0 || id >= DEVICE_ATTRIBUTES) return;
    device_attributes[id] = value;
    device_known[id] = true;
}
void shim_declare(const char *name, uint32_t n_params, const uint32_t *sizes, uint32_t static_shared,
                  uint32_t local_bytes, uint32_t max_threads) {
    Kernel *k = kernel_named(name);
    free(k->sizes);
    k->declared = true;
    k->n_params = n_params;
    k->sizes = malloc((n_params + 1) * sizeof *k->sizes);
    memcpy(k->sizes, sizes, n_params * sizeof *sizes);
    k->static_shared = static_shared;
    k->local_bytes = local_bytes;
    k->max_threads = max_threads;
}
uint32_t shim_launches(void) { return n_records; }
const Record *shim_launch(uint32_t i) { return i < n_records ? &records[i] : NULL; }
const char *shim_error(void) { return error; }

/* ---------------------------------------------------------------- libraries and kernels */
int32_t shim_cudaLibraryLoadData(void **library, const void *code, void *a, void *b, uint32_t c, void *d, void *e,
                             uint32_t f) {
    (void)code, (void)a, (void)b, (void)c, (void)d, (void)e, (void)f;
    *library = (void *)(0x5a5a0000 + ++next_library * 16);
    return SUCCESS;
}
int32_t shim_cudaLibraryUnload(void *library) { (void)library; return SUCCESS; }
int32_t shim_cudaLibraryGetKernel(void **kernel, void *library, const char *name) {
    (void)library;
    *kernel = kernel_named(name);
    return SUCCESS;
}
int32_t shim_cuKernelGetAttribute(int32_t *value, int32_t id, Kernel *kernel, int32_t device) {
    (void)device;
    switch (id) { /* CUfunction_attribute */
    case 0: *value = (int32_t)kernel->max_threads; return SUCCESS;
    case 1: *value = (int32_t)kernel->static_shared; return SUCCESS;
    case 2: *value = 0; return SUCCESS; /* constant memory of its own */
    case 3: *value = (int32_t)kernel->local_bytes; return SUCCESS;
    case 8: *value = (int32_t)kernel->max_dynamic_shared; return SUCCESS;
    default: return refuse(NOT_SUPPORTED, "cuKernelGetAttribute", "this attribute is not modelled");
    }
}
static int32_t set_attribute(Kernel *kernel, int32_t id, int32_t value) {
    if (id == 8) kernel->max_dynamic_shared = (uint32_t)value;
    return SUCCESS; /* carve-out and non-portable cluster size ask for nothing here */
}
int32_t shim_cudaFuncSetAttribute(Kernel *kernel, int32_t id, int32_t value) { return set_attribute(kernel, id, value); }
int32_t shim_cudaKernelSetAttributeForDevice(Kernel *kernel, int32_t id, int32_t value, int32_t device) {
    (void)device;
    return set_attribute(kernel, id, value);
}

/* What a compiled function does once: load its library and its kernels. State 0 means not yet. */
int32_t shim_cuda_dialect_init_library_once(uint64_t *state, int32_t (*init)(void **), int32_t (*load)(void **, int32_t),
                                       void (*set_error)(const char *, const char *)) {
    if (*state) return SUCCESS;
    void *library = NULL;
    int32_t code = init(&library);
    if (!code) code = load(&library, 0);
    if (code) {
        set_error("RuntimeError", error[0] ? error : "loading kernels into the emulated device failed");
        return code;
    }
    *state = (uint64_t)(uintptr_t)library;
    return SUCCESS;
}
void shim_cuda_dialect_unload_library_once(uint64_t *state) { *state = 0; }
const char *shim_cuda_dialect_get_error_name(int32_t code) {
    return code == SUCCESS ? "cudaSuccess" : code == NOT_SUPPORTED ? "cudaErrorNotSupported" : "cudaErrorInvalidValue";
}
void shim_CuteDSLRT_TVMFFISetRaisedCudaError(void (*raise)(const char *, const char **, int32_t), int32_t code) {
    char number[32];
    snprintf(number, sizeof number, " (CUDA error %d)", code);
    const char *parts[] = {"emulated device: ", error[0] ? error : "a CUDA call failed", number};
    raise("RuntimeError", parts, 3);
}

/* ---------------------------------------------------------------- the device */
int32_t shim_cudaGetDevice(int32_t *device) { *device = 0; return SUCCESS; }
int32_t shim_cuDeviceGet(int32_t *device, int32_t ordinal) { *device = ordinal; return SUCCESS; }
int32_t shim_cudaGetDeviceCount(int32_t *count) { *count = 1; return SUCCESS; }
int32_t shim_cudaSetDevice(int32_t device) {
    return device == 0 ? SUCCESS : refuse(INVALID_VALUE, "cudaSetDevice", "there is one device, 0");
}
int32_t shim_cudaDeviceGetAttribute(int32_t *value, int32_t id, int32_t device) {
    (void)device;
    if (id < 0 || id >= DEVICE_ATTRIBUTES || !device_known[id])
        return refuse(NOT_SUPPORTED, "cudaDeviceGetAttribute", "this attribute is not modelled");
    *value = device_attributes[id];
    return SUCCESS;
}
int32_t shim_cudaOccupancyMaxActiveBlocksPerMultiprocessor(int32_t *blocks, Kernel *kernel, int32_t threads,
                                                       uint64_t dynamic_shared) {
    /* By threads and shared memory (1 KiB of each block is the system's); registers are not known. */
    uint64_t shared = dynamic_shared + kernel->static_shared + 1024;
    uint64_t by_shared = (228u << 10) / shared, by_threads = threads > 0 ? 2048 / (uint32_t)threads : 0;
    uint64_t n = by_shared < by_threads ? by_shared : by_threads;
    *blocks = (int32_t)(n < 32 ? n : 32);
    return SUCCESS;
}
/* Everything runs in the order it was issued, so there is nothing to wait for. */
int32_t shim_cudaDeviceSynchronize(void) { return SUCCESS; }
int32_t shim_cudaStreamSynchronize(void *stream) { (void)stream; return SUCCESS; }

/* ---------------------------------------------------------------- launches */
static int32_t record(Kernel *kernel, const Config *config, void **params) {
    if (!kernel || !kernel->declared)
        return refuse(INVALID_VALUE, "cudaLaunchKernelEx", "the kernel is not in the PTX of this function");
    if (config->n_attributes > ATTRIBUTES_MAX)
        return refuse(INVALID_VALUE, "cudaLaunchKernelEx", "too many launch attributes");
    if (n_records == c_records) {
        c_records = c_records ? 2 * c_records : 16;
        records = realloc(records, c_records * sizeof *records);
    }
    Record *r = &records[n_records++];
    memset(r, 0, sizeof *r);
    r->kernel = kernel->name;
    memcpy(r->grid, config->grid, sizeof r->grid);
    memcpy(r->block, config->block, sizeof r->block);
    r->dynamic_shared = config->dynamic_shared;
    r->stream = config->stream;
    r->n_attributes = config->n_attributes;
    if (config->n_attributes)
        memcpy(r->attributes, config->attributes, config->n_attributes * sizeof *config->attributes);
    r->n_params = kernel->n_params;
    for (uint32_t i = 0; i < kernel->n_params; i++) r->param_bytes += kernel->sizes[i];
    r->params = malloc(r->param_bytes + 1);
    uint8_t *to = r->params;
    for (uint32_t i = 0; i < kernel->n_params; to += kernel->sizes[i++]) memcpy(to, params[i], kernel->sizes[i]);
    return SUCCESS;
}
int32_t shim_cudaLaunchKernelEx(const Config *config, Kernel *kernel, void **params) {
    return record(kernel, config, params);
}
int32_t shim_cudaLaunchKernel(Kernel *kernel, uint32_t gx, uint32_t gy, uint32_t gz, uint32_t bx, uint32_t by, uint32_t bz,
                          void **params, uint64_t dynamic_shared, uint64_t stream) {
    Config config = {{gx, gy, gz}, {bx, by, bz}, dynamic_shared, stream, NULL, 0};
    return record(kernel, &config, params);
}
