/* Runs GPU programs through the CUDA driver API. libcuda, which the NVIDIA driver brings, is looked for when a region
 * runs. Copies and launches of a program are captured once into a graph, which is then one call. Inputs and outputs pass
 * through memory of the host that the device copies from and to by itself. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "qgpu_device.h"

/* --- the part of cuda.h that is used here (CUDA 11.4 and newer) --- */

typedef int CUresult;
typedef int CUdevice;
typedef uint64_t CUdeviceptr;
typedef struct CUctx_st *CUcontext;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct CUstream_st *CUstream;
typedef struct CUgraph_st *CUgraph;
typedef struct CUgraphExec_st *CUgraphExec;
typedef struct CUevent_st *CUevent;
typedef struct {
    int id;
    char pad[8 - sizeof(int)];
    union {
        char room[64];
        int number;
    } value;
} CUlaunchAttribute;
typedef struct {
    unsigned grid[3], block[3], shared_bytes;
    CUstream stream;
    CUlaunchAttribute *attributes;
    unsigned attribute_count;
} CUlaunchConfig;

enum {
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209,
    CU_STREAM_NON_BLOCKING = 1,
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
    CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6
};

/* Name here, name in the library, arguments. All return a CUresult. */
#define FUNCTIONS(F)                                                                                                   \
    F(cuInit, "cuInit", (unsigned))                                                                                    \
    F(cuGetErrorString, "cuGetErrorString", (CUresult, const char **))                                                 \
    F(cuDeviceGetCount, "cuDeviceGetCount", (int *))                                                                   \
    F(cuDeviceGet, "cuDeviceGet", (CUdevice *, int))                                                                   \
    F(cuDeviceGetName, "cuDeviceGetName", (char *, int, CUdevice))                                                     \
    F(cuDeviceGetAttribute, "cuDeviceGetAttribute", (int *, int, CUdevice))                                            \
    F(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (CUcontext *, CUdevice))                                   \
    F(cuCtxSetCurrent, "cuCtxSetCurrent", (CUcontext))                                                                 \
    F(cuStreamCreate, "cuStreamCreate", (CUstream *, unsigned))                                                        \
    F(cuStreamSynchronize, "cuStreamSynchronize", (CUstream))                                                          \
    F(cuModuleLoadData, "cuModuleLoadData", (CUmodule *, const void *))                                                \
    F(cuModuleUnload, "cuModuleUnload", (CUmodule))                                                                    \
    F(cuModuleGetFunction, "cuModuleGetFunction", (CUfunction *, CUmodule, const char *))                              \
    F(cuMemAlloc, "cuMemAlloc_v2", (CUdeviceptr *, size_t))                                                            \
    F(cuMemFree, "cuMemFree_v2", (CUdeviceptr))                                                                        \
    F(cuMemHostAlloc, "cuMemHostAlloc", (void **, size_t, unsigned))                                                   \
    F(cuMemFreeHost, "cuMemFreeHost", (void *))                                                                        \
    F(cuEventCreate, "cuEventCreate", (CUevent *, unsigned))                                                           \
    F(cuEventRecord, "cuEventRecord", (CUevent, CUstream))                                                             \
    F(cuEventElapsedTime, "cuEventElapsedTime", (float *, CUevent, CUevent))                                           \
    F(cuEventDestroy, "cuEventDestroy_v2", (CUevent))                                                                  \
    F(cuMemsetD8Async, "cuMemsetD8Async", (CUdeviceptr, unsigned char, size_t, CUstream))                              \
    F(cuMemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2", (CUdeviceptr, const void *, size_t, CUstream))                        \
    F(cuMemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2", (void *, CUdeviceptr, size_t, CUstream))                              \
    F(cuLaunchKernel, "cuLaunchKernel",                                                                                \
      (CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void **, void **))  \
    F(cuStreamBeginCapture, "cuStreamBeginCapture_v2", (CUstream, int))                                                \
    F(cuStreamEndCapture, "cuStreamEndCapture", (CUstream, CUgraph *))                                                 \
    F(cuGraphInstantiate, "cuGraphInstantiateWithFlags", (CUgraphExec *, CUgraph, unsigned long long))                 \
    F(cuGraphDestroy, "cuGraphDestroy", (CUgraph))                                                                     \
    F(cuGraphExecDestroy, "cuGraphExecDestroy", (CUgraphExec))                                                         \
    F(cuGraphLaunch, "cuGraphLaunch", (CUgraphExec, CUstream))

#define DECLARE(name, symbol, arguments) static CUresult(*name) arguments;
FUNCTIONS(DECLARE)
/* Drivers for CUDA 12 have it. */
static CUresult (*cuLaunchKernelEx)(const CUlaunchConfig *, CUfunction, void **, void **);

/* --- the device --- */

static CUcontext context;
static CUstream stream;
static char name[256];
static int compute_capability;

#define LIBRARY "libcuda.so.1"
#define PACKAGES "install the NVIDIA driver (on Debian the package nvidia-driver or libcuda1)"

/* Keep what a call failed with; returns 1. */
static int failure(const char *what, CUresult status) {
    const char *text = NULL;
    cuGetErrorString(status, &text);
    return qgpu_fail("%s: %s failed: %s (CUDA error %d)", name, what, text != NULL ? text : "unknown error", status);
}

#define CHECK(what, call)                                                                                              \
    do {                                                                                                               \
        CUresult status_ = (call);                                                                                     \
        if (status_ != 0) return failure(what, status_);                                                               \
    } while (0)

static int find_functions(void) {
    void *library = dlopen(LIBRARY, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) return qgpu_fail("no NVIDIA driver on this machine (no " LIBRARY "); " PACKAGES);
#define FIND(function, symbol, arguments)                                                                              \
    *(void **)&function = dlsym(library, symbol);                                                                      \
    if (function == NULL) return qgpu_fail(LIBRARY " lacks " symbol "; a driver for CUDA 11.4 or newer is needed");
    FUNCTIONS(FIND)
    *(void **)&cuLaunchKernelEx = dlsym(library, "cuLaunchKernelEx");
    return 0;
}

int qgpu_device_open(void) {
    CUdevice device;
    int count = 0, major = 0, minor = 0;
    /* Current per thread, and callers may have changed it. */
    if (stream != NULL) return cuCtxSetCurrent(context) == 0 ? 0 : qgpu_fail("%s: the context is gone", name);
    if (find_functions()) return 1;
    if (cuInit(0) != 0 || cuDeviceGetCount(&count) != 0 || count == 0)
        return qgpu_fail("no NVIDIA GPU on this machine, or its driver does not run; " PACKAGES);
    CHECK("choosing the device", cuDeviceGet(&device, 0));
    CHECK("naming the device", cuDeviceGetName(name, sizeof name - 1, device));
    CHECK("asking its capability", cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device));
    CHECK("asking its capability", cuDeviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device));
    compute_capability = 10 * major + minor;
    CHECK("opening the context", cuDevicePrimaryCtxRetain(&context, device));
    CHECK("selecting the context", cuCtxSetCurrent(context));
    CHECK("making a stream", cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    return 0;
}

const char *qgpu_device_name(void) { return name; }

/* --- programs --- */

enum { MOST_ARGUMENTS = 64, ALIGNMENT = 512 };

typedef struct {
    CUfunction function;
    unsigned grid[3], block[3];
    CUdeviceptr pointers[MOST_ARGUMENTS];
    void *arguments[MOST_ARGUMENTS + 1]; /* ends in NULL */
    int may_overlap;
} step;

struct qgpu_program {
    CUmodule module;
    CUdeviceptr arena, constants;
    char *staging; /* inputs and outputs on the host, as in `places` */
    size_t *places;
    const qgpu_port *ports;
    int64_t inputs, outputs, launches;
    step *steps;
    CUgraphExec graph;
};

static int launch_one(step *step, int overlaps) {
    CUlaunchAttribute attribute = {CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, {0}, {{0}}};
    CUlaunchConfig config = {{step->grid[0], step->grid[1], step->grid[2]},
                             {step->block[0], step->block[1], step->block[2]},
                             0, stream, &attribute, 1};
    attribute.value.number = 1;
    return overlaps ? cuLaunchKernelEx(&config, step->function, step->arguments, NULL)
                    : cuLaunchKernel(step->function, step->grid[0], step->grid[1], step->grid[2], step->block[0],
                                     step->block[1], step->block[2], 0, stream, step->arguments, NULL);
}

/* Inputs in, all launches one after the other, outputs back. A kernel after a copy starts when that is done. */
static CUresult enqueue(qgpu_program *program, int overlaps, int with_copies) {
    CUresult status = 0;
    for (int64_t i = 0; i < program->inputs && with_copies && status == 0; ++i)
        status = cuMemcpyHtoDAsync(program->arena + (CUdeviceptr)program->ports[i].offset,
                                   program->staging + program->places[i], (size_t)program->ports[i].bytes, stream);
    for (int64_t i = 0; i < program->launches && status == 0; ++i)
        status = launch_one(&program->steps[i], overlaps && i > 0);
    for (int64_t i = program->inputs; i < program->inputs + program->outputs && with_copies && status == 0; ++i)
        status = cuMemcpyDtoHAsync(program->staging + program->places[i],
                                   program->arena + (CUdeviceptr)program->ports[i].offset,
                                   (size_t)program->ports[i].bytes, stream);
    return status;
}

/* What `enqueue` does as a graph; NULL in `graph` if the driver refuses. */
static CUresult capture(qgpu_program *program, int overlaps, int with_copies, CUgraphExec *graph) {
    CUgraph recorded = NULL;
    CUresult status = cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL), ended;
    *graph = NULL;
    if (status != 0) return status;
    status = enqueue(program, overlaps, with_copies);
    ended = cuStreamEndCapture(stream, &recorded);
    if (status == 0) status = ended;
    if (status == 0) status = cuGraphInstantiate(graph, recorded, 0);
    if (recorded != NULL) cuGraphDestroy(recorded);
    return status;
}

/* Launches that overlap if they may and the driver records them so, others if not. */
static int record(qgpu_program *program, int with_copies, CUgraphExec *graph) {
    int overlaps = program->launches > 0 && program->steps[0].may_overlap;
    if (overlaps && capture(program, 1, with_copies, graph) == 0) return 0;
    CHECK("recording the launches", capture(program, 0, with_copies, graph));
    return 0;
}

static int prepare(qgpu_program *program, const qgpu_source *source, int64_t number) {
    const qgpu_launch *launch = &source->launch[number];
    step *step = &program->steps[number];
    if (launch->count > MOST_ARGUMENTS) return qgpu_fail("%s takes %d arguments", launch->kernel, (int)launch->count);
    /* The driver may load a kernel when it is first asked for, which it must not while a stream is recorded. */
    CHECK(launch->kernel, cuModuleGetFunction(&step->function, program->module, launch->kernel));
    for (int axis = 0; axis < 3; ++axis) {
        step->grid[axis] = (unsigned)launch->grid[axis];
        step->block[axis] = (unsigned)launch->block[axis];
    }
    for (int64_t i = 0; i < launch->count; ++i) {
        const qgpu_argument *argument = &launch->arguments[i];
        step->pointers[i] = (argument->is_constant ? program->constants : program->arena) + (CUdeviceptr)argument->offset;
        step->arguments[i] = &step->pointers[i];
    }
    step->may_overlap = source->overlaps && compute_capability >= 90 && cuLaunchKernelEx != NULL;
    return 0;
}

static int fill(qgpu_program *program, const qgpu_source *source) {
    size_t staged = 0;
    CUresult status = cuModuleLoadData(&program->module, source->code);
    if (status == CUDA_ERROR_NO_BINARY_FOR_GPU)
        return qgpu_fail("%s (sm_%d) is none of the architectures this was compiled for; compile again with its "
                         "architecture among the target's", name, compute_capability);
    CHECK("loading the kernels", status);
    CHECK("making the arena", cuMemAlloc(&program->arena, (size_t)source->arena_bytes));
    CHECK("clearing the arena", cuMemsetD8Async(program->arena, 0, (size_t)source->arena_bytes, stream));
    CHECK("making the constants", cuMemAlloc(&program->constants, (size_t)source->constants_bytes));
    CHECK("uploading the constants",
          cuMemcpyHtoDAsync(program->constants, source->constants, (size_t)source->constants_bytes, stream));
    CHECK("uploading the constants", cuStreamSynchronize(stream));
    for (int64_t i = 0; i < source->inputs + source->outputs; ++i) {
        program->places[i] = staged;
        staged += ((size_t)source->ports[i].bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    }
    CHECK("making memory for inputs and outputs", cuMemHostAlloc((void **)&program->staging, staged + 1, 0));
    for (int64_t i = 0; i < source->launches; ++i)
        if (prepare(program, source, i)) return 1;
    return record(program, 1, &program->graph);
}

qgpu_program *qgpu_device_load(const qgpu_source *source) {
    qgpu_program *program = calloc(1, sizeof *program);
    if (program != NULL) {
        program->ports = source->ports;
        program->inputs = source->inputs;
        program->outputs = source->outputs;
        program->launches = source->launches;
        program->places = calloc((size_t)(source->inputs + source->outputs) + 1, sizeof *program->places);
        program->steps = calloc((size_t)source->launches + 1, sizeof *program->steps);
    }
    if (program == NULL || program->places == NULL || program->steps == NULL) {
        qgpu_fail("out of memory");
    } else if (fill(program, source) == 0) {
        return program;
    }
    qgpu_device_free(program);
    return NULL;
}

void qgpu_device_free(qgpu_program *program) {
    if (program == NULL) return;
    if (program->graph != NULL) cuGraphExecDestroy(program->graph);
    if (program->staging != NULL) cuMemFreeHost(program->staging);
    if (program->arena != 0) cuMemFree(program->arena);
    if (program->constants != 0) cuMemFree(program->constants);
    if (program->module != NULL) cuModuleUnload(program->module);
    free(program->places);
    free(program->steps);
    free(program);
}

int qgpu_device_write(qgpu_program *program, int64_t input, const void *data) {
    memcpy(program->staging + program->places[input], data, (size_t)program->ports[input].bytes);
    return 0;
}

int qgpu_device_run(qgpu_program *program) {
    CHECK("running the kernels", cuGraphLaunch(program->graph, stream));
    return 0;
}

int qgpu_device_read(qgpu_program *program, int64_t output, void *data) {
    int64_t port = program->inputs + output;
    CHECK("waiting for the device", cuStreamSynchronize(stream));
    memcpy(data, program->staging + program->places[port], (size_t)program->ports[port].bytes);
    return 0;
}

/* --- measuring --- */

/* Microseconds of one of `repeat` launches: of one kernel, or of a graph if `graph` is given. */
static CUresult measure(step *step, CUgraphExec graph, int32_t repeat, CUevent start, CUevent end, float *microseconds) {
    CUresult status = 0;
    float milliseconds = 0;
    for (int round = 0; round < 2 && status == 0; ++round) { /* the first warms up */
        status = cuEventRecord(start, stream);
        for (int32_t i = 0; i < repeat && status == 0; ++i)
            status = graph != NULL ? cuGraphLaunch(graph, stream) : launch_one(step, 0);
        if (status == 0) status = cuEventRecord(end, stream);
        if (status == 0) status = cuStreamSynchronize(stream);
    }
    if (status == 0) status = cuEventElapsedTime(&milliseconds, start, end);
    *microseconds = milliseconds * 1000 / (float)repeat;
    return status;
}

int qgpu_device_measure(qgpu_program *program, int32_t repeat, float *each, float *all) {
    CUgraphExec graph = NULL;
    CUevent start, end;
    CUresult status = 0;
    if (record(program, 0, &graph)) return 1;
    CHECK("measuring", cuEventCreate(&start, 0));
    CHECK("measuring", cuEventCreate(&end, 0));
    for (int64_t i = 0; i < program->launches && status == 0; ++i)
        status = measure(&program->steps[i], NULL, repeat, start, end, &each[i]);
    if (status == 0) status = measure(NULL, graph, repeat, start, end, all);
    cuEventDestroy(start);
    cuEventDestroy(end);
    cuGraphExecDestroy(graph);
    CHECK("measuring", status);
    return 0;
}
