// What the parts of the pretend GPU share. Device memory is host memory; kernels run in a callback.
#pragma once
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

// Error numbers are the same in the driver's and the runtime's API.
enum {
    OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_COPY_DIRECTION = 21, INSUFFICIENT_DRIVER = 35,
    NO_DEVICE = 100, INVALID_DEVICE = 101, INVALID_IMAGE = 200, NO_BINARY = 209, INVALID_HANDLE = 400,
    NOT_FOUND = 500, ILLEGAL_ADDRESS = 700, OUT_OF_RESOURCES = 701, LAUNCH_FAILED = 719,
    CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901, CAPTURE_UNMATCHED = 903, CAPTURE_IMPLICIT = 906,
};

enum { MAX_PARAMS = 512 };
enum { HOST_TO_HOST = 0, HOST_TO_DEVICE = 1, DEVICE_TO_HOST = 2, DEVICE_TO_DEVICE = 3, BY_ADDRESS = 4 };
enum { ANY, DEVICE, PINNED };  // where a block lies

// What a cubin says about one of its kernels; `known` is 0 where only a name is at hand (PTX, compressed).
typedef struct {
    int known, n_params, sizes[MAX_PARAMS];
    unsigned max_threads, required[3], registers, static_shared;
} Facts;

typedef struct {
    char name[256];
    Facts facts;
    unsigned max_dynamic;
} Function;

// The first fields of CUlaunchConfig.
typedef struct {
    unsigned grid[3], block[3], shared;
    void *stream;
    void *attributes;
    unsigned n_attributes;
} Launch;

typedef struct Graph Graph;
typedef struct {
    Graph *graph;  // set during capture
    int invalid;
} Stream;

// ---- state and limits
int device_cc(void);
int driver_version(void);
int device_count(void);
int device_attribute(int attribute);
const char *error_name(int error);
int usable(void);  // OK, or the error that every call of the runtime gives on such a machine
int problem(int error, const char *format, ...) __attribute__((format(printf, 2, 3)));

// ---- memory.c
int block_new(void **out, size_t size, int place);
int block_free(void *p, int place);
size_t block_extent(const void *p, int place);
int block_here(const void *p);  // DEVICE, PINNED, or ANY for memory that isn't ours
int guards_check(const char *when);
void memory_info(size_t *available, size_t *total);

// ---- cubin.c
typedef struct Module Module;
Module *module_load(const void *image, int *error);
int module_function(Module *module, const char *name, Function **out);
void module_unload(Module *module);

// ---- work.c
int work_launch(Function *function, const Launch *launch, void **params);
int work_copy(void *to, const void *from, size_t size, int kind, Stream *stream);
int work_set(void *to, int value, size_t size, Stream *stream);
int work_flush(void);
int work_unsafe(const char *what);  // refuses what a global capture forbids
int capture_begin(Stream *stream);
int capture_end(Stream *stream, Graph **out);
Graph *graph_copy(const Graph *graph);
void graph_free(Graph *graph);
int graph_launch(Graph *graph, Stream *stream);
