/* Tensors of the CPU that TVM-FFI takes for tensors of CUDA device 0.
 *
 * PyTorch hands tensors to TVM-FFI through a table of C functions (DLPackExchangeAPI). The functions here
 * stand in front of PyTorch's and change the device; the stream is the default one. Host code that was
 * compiled for a GPU is then called with ordinary tensors, at its ordinary cost: cute_fmha.bench.host.
 */
#include <stdint.h>

typedef struct { /* as dlpack.h has them */
    void *data;
    int32_t device_type, device_id;
} Tensor;
typedef struct {
    uint64_t version;
    void *context, *deleter;
    uint64_t flags;
    Tensor tensor;
} Managed;
typedef struct {
    uint64_t version;
    void *previous, *allocate;
    int (*managed)(void *object, Managed **out);
    void *to_object;
    int (*view)(void *object, Tensor *out);
    int (*stream)(int32_t type, int32_t id, void **out);
} Exchange;

static Exchange original, changed;

static void on_cuda(Tensor *tensor) {
    tensor->device_type = 2; /* kDLCUDA */
    tensor->device_id = 0;
}
static int managed(void *object, Managed **out) {
    int code = original.managed(object, out);
    if (!code) on_cuda(&(*out)->tensor);
    return code;
}
static int view(void *object, Tensor *out) {
    int code = original.view(object, out);
    if (!code) on_cuda(out);
    return code;
}
static int stream(int32_t type, int32_t id, void **out) {
    (void)type, (void)id;
    *out = 0;
    return 0;
}
const void *exchange_on_cuda(const Exchange *theirs) {
    original = changed = *theirs;
    changed.managed = managed;
    if (original.view) changed.view = view;
    changed.stream = stream;
    return &changed;
}
