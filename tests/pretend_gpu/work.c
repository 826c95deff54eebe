// Launches and copies: run at once, put off until the host waits, or recorded in a graph.
#define _GNU_SOURCE
#include "pretend.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int (*Callback)(const char *name, const Launch *launch, void **params);

typedef struct {
    Function *function;  // NULL for a copy
    Launch launch;
    int n_params;
    void **params;
    void *to;
    const void *from;  // NULL: set to `value`
    char *staged;      // pageable memory of the host is read when the copy is issued
    size_t size;
    int value;
} Work;

struct Graph {
    int n, room;
    Work *work;
};

typedef struct {
    char name[256];
    int n, sizes[MAX_PARAMS];
} Declared;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Callback callback;
static Declared *declared;
static int n_declared, deferring, capturing;
static Graph queue;
static long launches, graph_launches, copies[4];
static size_t copied[4];

EXPORT void pretend_on_launch(Callback call) { callback = call; }
EXPORT void pretend_defer(int on) { work_flush(), deferring = on; }
EXPORT long pretend_launches(void) { return launches; }
EXPORT long pretend_graph_launches(void) { return graph_launches; }
EXPORT long pretend_copies(int kind) { return copies[kind]; }
EXPORT size_t pretend_copied(int kind) { return copied[kind]; }

EXPORT void pretend_declare(const char *name, int n, const int *sizes) {
    pthread_mutex_lock(&lock);
    int i = 0;
    while (i < n_declared && strcmp(declared[i].name, name)) i++;
    if (i == n_declared) declared = realloc(declared, ++n_declared * sizeof *declared);
    snprintf(declared[i].name, sizeof declared[i].name, "%s", name);
    declared[i].n = n;
    memcpy(declared[i].sizes, sizes, n * sizeof *sizes);
    pthread_mutex_unlock(&lock);
}

// The sizes of the parameters, from the cubin or from who declared the kernel; -1 where nobody knows.
static int parameters(const Function *function, const int **sizes) {
    const Facts *facts = &function->facts;
    for (int i = 0; i < n_declared; i++) {
        if (strcmp(declared[i].name, function->name)) continue;
        int same = !facts->known ||
                   (facts->n_params == declared[i].n &&
                    !memcmp(facts->sizes, declared[i].sizes, declared[i].n * sizeof *declared[i].sizes));
        if (!same) {
            problem(0, "%s: declared with %d parameters that are not the %d of its binary", function->name,
                    declared[i].n, facts->n_params);
            return -2;
        }
        *sizes = declared[i].sizes;
        return declared[i].n;
    }
    *sizes = facts->sizes;
    return facts->known ? facts->n_params : -1;
}

static int fitting(const Function *function, const Launch *launch) {
    const Facts *facts = &function->facts;
    const unsigned *grid = launch->grid, *block = launch->block, *required = facts->required;
    const char *name = function->name;
    size_t threads = (size_t)block[0] * block[1] * block[2];
    if (!threads || threads > 1024 || block[0] > 1024 || block[1] > 1024 || block[2] > 64)
        return problem(INVALID_VALUE, "%s: a block of %u x %u x %u threads", name, block[0], block[1], block[2]);
    if (!grid[0] || !grid[1] || !grid[2] || grid[0] > 0x7FFFFFFF || grid[1] > 65535 || grid[2] > 65535)
        return problem(INVALID_VALUE, "%s: a grid of %u x %u x %u blocks", name, grid[0], grid[1], grid[2]);
    if (launch->shared > function->max_dynamic)
        return problem(INVALID_VALUE, "%s: %u bytes of dynamic shared memory, %u allowed", name, launch->shared,
                       function->max_dynamic);
    if (facts->max_threads && threads > facts->max_threads)
        return problem(INVALID_VALUE, "%s: %zu threads, compiled for %u", name, threads, facts->max_threads);
    if (required[0] && memcmp(required, block, 12))
        return problem(INVALID_VALUE, "%s: a block of %u x %u x %u threads, compiled for %u x %u x %u", name,
                       block[0], block[1], block[2], required[0], required[1], required[2]);
    size_t registers = (facts->registers + 7) / 8 * 8 * ((threads + 31) / 32 * 32);
    if (registers > 65536)
        return problem(OUT_OF_RESOURCES, "%s: %zu threads need %zu registers", name, threads, registers);
    return OK;
}

static int run(Work *work) {
    if (!work->function) {
        if (work->from || work->staged) memmove(work->to, work->staged ? work->staged : work->from, work->size);
        else memset(work->to, work->value, work->size);
        return OK;
    }
    launches++;
    if (!callback) return problem(LAUNCH_FAILED, "%s: nobody runs launches", work->function->name);
    if (callback(work->function->name, &work->launch, work->params))
        return problem(LAUNCH_FAILED, "%s: failed in the callback", work->function->name);
    return guards_check(work->function->name);
}

static void work_free(Work *work) {
    if (work->params)
        for (int i = 0; i < work->n_params; i++) free(work->params[i]);
    free(work->params);
    free(work->staged);
}

static void *duplicate(const void *from, size_t size) {
    void *copy = NULL;
    if (posix_memalign(&copy, 64, size ? size : 1)) abort();  // a tensor map is aligned to 64 bytes
    return memcpy(copy, from, size);
}

// Makes the work independent of the caller's memory.
static int keep(Work *work, Graph *graph) {
    if (work->function) {
        const int *sizes;
        work->n_params = parameters(work->function, &sizes);
        if (work->n_params < 0)
            return problem(INVALID_VALUE, "%s: the sizes of its parameters are unknown", work->function->name);
        void **params = calloc(work->n_params + 1, sizeof *params);
        for (int i = 0; i < work->n_params; i++) params[i] = duplicate(work->params[i], sizes[i]);
        work->params = params;
    }
    if (graph->n == graph->room) {
        graph->room = graph->room ? 2 * graph->room : 64;
        graph->work = realloc(graph->work, graph->room * sizeof *graph->work);
    }
    graph->work[graph->n++] = *work;
    return OK;
}

static int submit(Work *work, Stream *stream) {
    if (stream && stream->graph) {
        if (stream->invalid) return CAPTURE_INVALIDATED;
        int error = keep(work, stream->graph);
        stream->invalid |= error != OK;
        return error;
    }
    if (!stream && capturing) return problem(CAPTURE_IMPLICIT, "work on the default stream during a capture");
    return deferring ? keep(work, &queue) : run(work);
}

int work_flush(void) {
    int error = OK;
    for (int i = 0; i < queue.n; i++) {
        if (!error) error = run(&queue.work[i]);
        work_free(&queue.work[i]);
    }
    queue.n = 0;
    return error;
}

int work_launch(Function *function, const Launch *launch, void **params) {
    const int *sizes;
    int error = fitting(function, launch);
    if (!error && parameters(function, &sizes) == -2) error = INVALID_VALUE;
    if (error) return error;
    return submit(&(Work){.function = function, .launch = *launch, .params = params}, launch->stream);
}

int work_copy(void *to, const void *from, size_t size, int kind, Stream *stream) {
    if (!size) return OK;
    int to_device = block_here(to) == DEVICE, from_device = block_here(from) == DEVICE;
    int actual = from_device ? (to_device ? DEVICE_TO_DEVICE : DEVICE_TO_HOST)
                             : (to_device ? HOST_TO_DEVICE : HOST_TO_HOST);
    if (kind != BY_ADDRESS && kind != actual)
        return problem(INVALID_COPY_DIRECTION, "a copy of kind %d between memory of kind %d", kind, actual);
    if ((block_here(to) && block_extent(to, ANY) < size) || (block_here(from) && block_extent(from, ANY) < size))
        return problem(INVALID_VALUE, "a copy of %zu bytes leaves its block", size);
    int pageable = (!to_device && block_here(to) != PINNED) || (!from_device && block_here(from) != PINNED);
    Work work = {.to = to, .from = from, .size = size};
    if (stream && stream->graph && pageable)
        return stream->invalid = 1, problem(CAPTURE_UNSUPPORTED, "a copy of pageable memory during a capture");
    copies[actual]++;
    copied[actual] += size;
    if (deferring && !(stream && stream->graph) && pageable && !from_device)
        work.staged = duplicate(from, size), work.from = NULL;
    int error = submit(&work, stream);
    // A copy into pageable memory returns when it is done.
    return !error && pageable && from_device ? work_flush() : error;
}

int work_set(void *to, int value, size_t size, Stream *stream) {
    if (size && block_extent(to, DEVICE) < size) return problem(INVALID_VALUE, "a memset leaves its block");
    return submit(&(Work){.to = to, .value = value, .size = size}, stream);
}

// A capture in global mode forbids calls that wait or that may wait, and is spoilt by them.
static Stream *captured;
int work_unsafe(const char *what) {
    if (!capturing) return OK;
    if (captured) captured->invalid = 1;
    return problem(CAPTURE_UNSUPPORTED, "%s during a capture", what);
}

int capture_begin(Stream *stream) {
    if (!stream || stream->graph || capturing) return problem(CAPTURE_UNSUPPORTED, "this stream can't be captured");
    stream->graph = calloc(1, sizeof *stream->graph);
    stream->invalid = 0;
    captured = stream;
    capturing = 1;
    return OK;
}

int capture_end(Stream *stream, Graph **out) {
    *out = NULL;
    if (!stream || stream != captured) return problem(CAPTURE_UNMATCHED, "no capture began on this stream");
    Graph *graph = stream->graph;
    int invalid = stream->invalid;
    captured = NULL;
    capturing = 0;
    stream->graph = NULL;
    stream->invalid = 0;
    if (invalid) {
        graph_free(graph);
        return problem(CAPTURE_INVALIDATED, "the capture was spoilt");
    }
    *out = graph;
    return OK;
}

Graph *graph_copy(const Graph *graph) {
    Graph *copy = calloc(1, sizeof *copy);
    for (int i = 0; i < graph->n; i++) {
        Work work = graph->work[i];
        keep(&work, copy);
    }
    return copy;
}

void graph_free(Graph *graph) {
    for (int i = 0; i < graph->n; i++) work_free(&graph->work[i]);
    free(graph->work);
    free(graph);
}

int graph_launch(Graph *graph, Stream *stream) {
    graph_launches++;
    for (int i = 0; i < graph->n; i++) {
        Work work = graph->work[i];
        int error = submit(&work, stream);
        if (error) return error;
    }
    return OK;
}
