// The pretend driver's API (libcuda.so.1) and the state that both libraries share.
#define _GNU_SOURCE
#include "pretend.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char problems[1 << 16];
static int n_problems;

static int setting(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text && *text ? atoi(text) : otherwise;
}

int device_cc(void) { return setting("PRETEND_CC", 90); }
int driver_version(void) { return setting("PRETEND_DRIVER", 13000); }
int device_count(void) { return setting("PRETEND_DEVICES", 1); }

// Keeps the message and hands the error on.
int problem(int error, const char *format, ...) {
    char line[1024];
    va_list values;
    va_start(values, format);
    vsnprintf(line, sizeof line, format, values);
    va_end(values);
    pthread_mutex_lock(&lock);
    n_problems++;
    size_t used = strlen(problems);
    snprintf(problems + used, sizeof problems - used, "%s\n", line);
    pthread_mutex_unlock(&lock);
    return error;
}

// Verifies the guard zones; the number of problems since the last pretend_forget().
EXPORT int pretend_check(void) {
    guards_check("at a check");
    return n_problems;
}
EXPORT const char *pretend_problems(void) { return problems; }
EXPORT void pretend_forget(void) { problems[0] = 0, n_problems = 0; }

// The most shared memory a block may ask for, by the compute capability.
static int most_shared(int cc) {
    switch (cc) {
    case 70: case 72: return 98304;
    case 75: return 65536;
    case 80: case 87: return 166912;
    case 86: case 89: case 120: case 121: return 101376;
    default: return 232448;
    }
}

int device_attribute(int attribute) {
    int cc = device_cc();
    switch (attribute) {
    case 1: case 2: case 3: return 1024;  // threads in a block, and along x and y
    case 4: return 64;
    case 5: return 0x7FFFFFFF;  // blocks along x
    case 6: case 7: return 65535;
    case 8: return 49152;  // shared memory without asking
    case 10: return 32;
    case 12: case 82: return 65536;  // registers
    case 13: return 1980000;
    case 16: return setting("PRETEND_MULTIPROCESSORS", 132);
    case 31: case 41: case 78: case 83: case 95: return 1;
    case 38: return 50 << 20;  // L2 cache
    case 39: return 2048;
    case 75: return cc / 10;
    case 76: return cc % 10;
    case 81: return most_shared(cc) + 1024;
    case 97: return most_shared(cc);
    case 106: return 32;
    case 111: return 1024;
    case 120: return cc >= 90;
    default: return 0;
    }
}

int usable(void) {
    if (driver_version() < 13000) return INSUFFICIENT_DRIVER;
    return device_count() ? OK : NO_DEVICE;
}

const char *error_name(int error) {
    switch (error) {
    case OK: return "SUCCESS";
    case INVALID_VALUE: return "INVALID_VALUE";
    case OUT_OF_MEMORY: return "OUT_OF_MEMORY";
    case INVALID_COPY_DIRECTION: return "INVALID_MEMCPY_DIRECTION";
    case INSUFFICIENT_DRIVER: return "INSUFFICIENT_DRIVER";
    case NO_DEVICE: return "NO_DEVICE";
    case INVALID_DEVICE: return "INVALID_DEVICE";
    case INVALID_IMAGE: return "INVALID_IMAGE";
    case NO_BINARY: return "NO_BINARY_FOR_GPU";
    case INVALID_HANDLE: return "INVALID_HANDLE";
    case NOT_FOUND: return "NOT_FOUND";
    case ILLEGAL_ADDRESS: return "ILLEGAL_ADDRESS";
    case OUT_OF_RESOURCES: return "LAUNCH_OUT_OF_RESOURCES";
    case LAUNCH_FAILED: return "LAUNCH_FAILED";
    case CAPTURE_UNSUPPORTED: return "STREAM_CAPTURE_UNSUPPORTED";
    case CAPTURE_INVALIDATED: return "STREAM_CAPTURE_INVALIDATED";
    case CAPTURE_UNMATCHED: return "STREAM_CAPTURE_UNMATCHED";
    case CAPTURE_IMPLICIT: return "STREAM_CAPTURE_IMPLICIT";
    default: return "UNKNOWN";
    }
}

// ---- the device
EXPORT int cuInit(unsigned flags) { return flags ? INVALID_VALUE : device_count() ? OK : NO_DEVICE; }
EXPORT int cuDriverGetVersion(int *out) { return *out = driver_version(), OK; }
EXPORT int cuDeviceGetCount(int *out) { return *out = device_count(), OK; }
EXPORT int cuDeviceGet(int *out, int device) { return *out = device, device < device_count() ? OK : INVALID_DEVICE; }
EXPORT int cuDeviceGetAttribute(int *out, int attribute, int device) {
    return *out = device_attribute(attribute), device < device_count() ? OK : INVALID_DEVICE;
}
EXPORT int cuDeviceGetName(char *out, int size, int device) {
    snprintf(out, size, "Pretend sm_%d", device_cc());
    return device < device_count() ? OK : INVALID_DEVICE;
}
EXPORT int cuMemGetInfo_v2(size_t *available, size_t *total) { return memory_info(available, total), OK; }
EXPORT int cuDeviceTotalMem_v2(size_t *total, int device) {
    size_t available;
    memory_info(&available, total);
    return device < device_count() ? OK : INVALID_DEVICE;
}
EXPORT int cuGetErrorName(int error, const char **out) {
    static __thread char text[64];
    snprintf(text, sizeof text, error ? "CUDA_ERROR_%s" : "CUDA_%s", error_name(error));
    return *out = text, OK;
}
EXPORT int cuGetErrorString(int error, const char **out) { return cuGetErrorName(error, out); }

// ---- modules and launches
EXPORT int cuModuleLoadData(Module **out, const void *image) {
    int error = work_unsafe("a module is loaded");
    return error ? error : (*out = module_load(image, &error), error);
}
EXPORT int cuModuleUnload(Module *module) { return module_unload(module), OK; }
EXPORT int cuModuleGetFunction(Function **out, Module *module, const char *name) {
    return module_function(module, name, out);
}
EXPORT int cuFuncGetAttribute(int *out, int attribute, Function *function) {
    const Facts *facts = &function->facts;
    switch (attribute) {
    case 0: return *out = facts->max_threads ? (int)facts->max_threads : 1024, OK;
    case 1: return *out = facts->static_shared, OK;
    case 4: return *out = facts->registers, OK;
    case 8: return *out = function->max_dynamic, OK;
    default: return *out = 0, INVALID_VALUE;
    }
}
EXPORT int cuFuncSetAttribute(Function *function, int attribute, int value) {
    if (attribute != 8) return OK;
    long most = (long)most_shared(device_cc()) - function->facts.static_shared;
    if (value < 0 || value > most)
        return problem(INVALID_VALUE, "%s: %d bytes of dynamic shared memory, the device has %ld", function->name,
                       value, most);
    function->max_dynamic = value;
    return OK;
}
EXPORT int cuLaunchKernelEx(const Launch *launch, Function *function, void **params, void **extra) {
    if (extra) return problem(INVALID_VALUE, "%s: launched with packed parameters", function->name);
    return work_launch(function, launch, params);
}
EXPORT int cuLaunchKernel(Function *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                          unsigned bz, unsigned shared, void *stream, void **params, void **extra) {
    Launch launch = {{gx, gy, gz}, {bx, by, bz}, shared, stream, NULL, 0};
    return cuLaunchKernelEx(&launch, function, params, extra);
}

// ---- tensor maps
// The 128 bytes of a tensor map as this driver writes them; launches.py reads them back.
typedef struct {
    char magic[4];
    uint8_t type, rank, interleave, swizzle, promotion, fill, steps[5];
    uint16_t box[5];
    uint64_t base, sizes[5], strides[4];
} Map;
_Static_assert(sizeof(Map) <= 128, "a tensor map has 128 bytes");

EXPORT int cuTensorMapEncodeTiled(void *out, int type, unsigned rank, void *base, const uint64_t *sizes,
                                  const uint64_t *strides, const uint32_t *box, const uint32_t *steps,
                                  int interleave, int swizzle, int promotion, int fill) {
    static const int widths[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};  // of CUtensorMapDataType
    static const unsigned spans[] = {0, 32, 64, 128};                    // of CUtensorMapSwizzle
    if (type < 0 || type > 12 || rank < 1 || rank > 5 || swizzle < 0 || swizzle > 3)
        return problem(INVALID_VALUE, "a tensor map of type %d, rank %u, swizzle %d", type, rank, swizzle);
    if ((uintptr_t)base % 16 || block_here(base) != DEVICE)
        return problem(INVALID_VALUE, "a tensor map's base %p isn't device memory aligned to 16 bytes", base);
    Map map = {"TMAP", type, rank, interleave, swizzle, promotion, fill, {0}, {0}, (uint64_t)base, {0}, {0}};
    unsigned inner = box[0] * widths[type];
    if (inner % 16 || (spans[swizzle] && inner > spans[swizzle]))
        return problem(INVALID_VALUE, "a tensor map's box is %u bytes wide, its swizzle %u", inner, spans[swizzle]);
    for (unsigned i = 0; i < rank; i++) {
        if (!sizes[i] || sizes[i] > 1ull << 32 || !box[i] || box[i] > 256 || !steps[i] || steps[i] > 8)
            return problem(INVALID_VALUE, "a tensor map's axis %u: size %zu, box %u, step %u", i, (size_t)sizes[i],
                           box[i], steps[i]);
        if (i + 1 < rank && (strides[i] % 16 || strides[i] >= 1ull << 40))
            return problem(INVALID_VALUE, "a tensor map's stride %u of %zu bytes", i, (size_t)strides[i]);
        map.sizes[i] = sizes[i];
        map.box[i] = box[i];
        map.steps[i] = steps[i];
        if (i + 1 < rank) map.strides[i] = strides[i];
    }
    memset(out, 0, 128);
    memcpy(out, &map, sizeof map);
    return OK;
}
