// The pretend runtime's API (libcudart.so.13), over what the pretend driver keeps.
#define _GNU_SOURCE
#include "pretend.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { PROPERTIES_SIZE = 1008, TOTAL_MEMORY = 288, MAJOR = 360 };  // cudaDeviceProp of CUDA 13
static __thread int last_error;

static int give(int error) {
    if (error) last_error = error;
    return error;
}

static int at(int device) {
    int error = usable();
    return error ? error : device >= 0 && device < device_count() ? OK : INVALID_DEVICE;
}

// ---- errors
EXPORT int cudaGetLastError(void) {
    int error = last_error;
    last_error = OK;
    return error;
}
EXPORT int cudaPeekAtLastError(void) { return last_error; }
EXPORT const char *cudaGetErrorName(int error) {
    static __thread char text[64];
    snprintf(text, sizeof text, error ? "cudaError %s" : "cuda %s", error_name(error));
    return text;
}
EXPORT const char *cudaGetErrorString(int error) { return cudaGetErrorName(error); }

// ---- the device
EXPORT int cudaDriverGetVersion(int *out) { return *out = device_count() ? driver_version() : 0, OK; }
EXPORT int cudaRuntimeGetVersion(int *out) { return *out = 13000, OK; }
EXPORT int cudaGetDeviceCount(int *out) { return *out = usable() ? 0 : device_count(), give(usable()); }
EXPORT int cudaGetDevice(int *out) { return *out = 0, give(usable()); }
EXPORT int cudaSetDevice(int device) { return give(at(device)); }
EXPORT int cudaDeviceGetAttribute(int *out, int attribute, int device) {
    return *out = device_attribute(attribute), give(at(device));
}
EXPORT int cudaGetDeviceProperties(char *out, int device) {
    size_t available, total;
    int cc[2] = {device_cc() / 10, device_cc() % 10};
    memory_info(&available, &total);
    memset(out, 0, PROPERTIES_SIZE);
    snprintf(out, 256, "Pretend sm_%d", device_cc());
    memcpy(out + TOTAL_MEMORY, &total, sizeof total);
    memcpy(out + MAJOR, cc, sizeof cc);
    return give(at(device));
}

// ---- memory
static int new(void **out, size_t size, int place, const char *what) {
    int error = usable();
    *out = NULL;
    if (!error) error = work_unsafe(what);
    return give(error || !size ? error : block_new(out, size, place));
}

// A free waits for the work that was issued before it.
static int drop(void *p, int place, const char *what) {
    int error = work_unsafe(what), late = error ? OK : work_flush();
    if (!error) error = block_free(p, place);
    return give(error ? error : late);
}
EXPORT int cudaMalloc(void **out, size_t size) { return new(out, size, DEVICE, "cudaMalloc"); }
EXPORT int cudaFree(void *p) { return drop(p, DEVICE, "cudaFree"); }
EXPORT int cudaMallocHost(void **out, size_t size) { return new(out, size, PINNED, "cudaMallocHost"); }
EXPORT int cudaHostAlloc(void **out, size_t size, unsigned flags) {
    return (void)flags, new(out, size, PINNED, "cudaHostAlloc");
}
EXPORT int cudaFreeHost(void *p) { return drop(p, PINNED, "cudaFreeHost"); }
EXPORT int cudaMemGetInfo(size_t *available, size_t *total) {
    return memory_info(available, total), give(usable());
}
EXPORT int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, Stream *stream) {
    return give(work_copy(to, from, size, kind, stream));
}
EXPORT int cudaMemcpy(void *to, const void *from, size_t size, int kind) {
    int error = work_unsafe("cudaMemcpy");
    if (!error) error = work_copy(to, from, size, kind, NULL);
    return give(error ? error : work_flush());
}
EXPORT int cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t size, Stream *stream) {
    int error = at(a) ? at(a) : at(b);
    return give(error ? error : work_copy(to, from, size, BY_ADDRESS, stream));
}
EXPORT int cudaMemsetAsync(void *to, int value, size_t size, Stream *stream) {
    return give(work_set(to, value, size, stream));
}
EXPORT int cudaMemset(void *to, int value, size_t size) { return cudaMemsetAsync(to, value, size, NULL); }

// ---- streams and events
EXPORT int cudaStreamCreate(Stream **out) { return *out = calloc(1, sizeof **out), give(usable()); }
EXPORT int cudaStreamCreateWithFlags(Stream **out, unsigned flags) { return (void)flags, cudaStreamCreate(out); }
EXPORT int cudaStreamDestroy(Stream *stream) {
    int error = stream && stream->graph ? work_unsafe("cudaStreamDestroy") : work_flush();
    if (!error) free(stream);
    return give(error);
}
EXPORT int cudaStreamSynchronize(Stream *stream) {
    // Only the captured stream itself, and the default one, may not wait.
    int error = !stream || stream->graph ? work_unsafe("cudaStreamSynchronize") : OK;
    return give(error ? error : work_flush());
}
EXPORT int cudaDeviceSynchronize(void) {
    int error = work_unsafe("cudaDeviceSynchronize");
    return give(error ? error : work_flush());
}

typedef struct {
    struct timespec time;
    int captured;
} Event;
EXPORT int cudaEventCreate(Event **out) { return *out = calloc(1, sizeof **out), give(usable()); }
EXPORT int cudaEventCreateWithFlags(Event **out, unsigned flags) { return (void)flags, cudaEventCreate(out); }
EXPORT int cudaEventDestroy(Event *event) { return free(event), OK; }
EXPORT int cudaEventRecord(Event *event, Stream *stream) {
    event->captured = stream && stream->graph;
    return clock_gettime(CLOCK_MONOTONIC, &event->time), OK;
}
EXPORT int cudaEventSynchronize(Event *event) {
    if (event->captured) return give(work_unsafe("cudaEventSynchronize"));
    return give(work_flush());
}
EXPORT int cudaEventQuery(Event *event) { return cudaEventSynchronize(event); }
EXPORT int cudaEventElapsedTime(float *out, Event *from, Event *to) {
    double seconds = to->time.tv_sec - from->time.tv_sec;
    *out = (float)(seconds * 1e3 + (to->time.tv_nsec - from->time.tv_nsec) * 1e-6);
    return OK;
}
EXPORT int cudaStreamWaitEvent(Stream *stream, Event *event, unsigned flags) {
    // All work runs in the order of issue, so that there is nothing to wait for; a capture has one stream only.
    if (!flags && event->captured == (stream && stream->graph)) return OK;
    return give(work_unsafe("a second stream joins"));
}

// ---- graphs
EXPORT int cudaStreamBeginCapture(Stream *stream, int mode) { return (void)mode, give(capture_begin(stream)); }
EXPORT int cudaStreamEndCapture(Stream *stream, Graph **out) { return give(capture_end(stream, out)); }
EXPORT int cudaStreamIsCapturing(Stream *stream, int *out) {
    return *out = stream && stream->graph ? 1 + (stream->invalid != 0) : 0, OK;
}
EXPORT int cudaGraphInstantiate(Graph **out, Graph *graph, unsigned long long flags) {
    if (flags || !graph) return give(INVALID_VALUE);
    return *out = graph_copy(graph), OK;
}
EXPORT int cudaGraphLaunch(Graph *exec, Stream *stream) { return give(graph_launch(exec, stream)); }
EXPORT int cudaGraphDestroy(Graph *graph) { return graph_free(graph), OK; }
EXPORT int cudaGraphExecDestroy(Graph *exec) {
    int late = work_flush();
    return graph_free(exec), give(late);
}
