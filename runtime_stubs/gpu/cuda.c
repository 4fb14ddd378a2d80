/* Runs GPU programs through the CUDA driver API. libcuda, which the NVIDIA driver brings, is looked for when a region
 * runs. The launches of a program are captured once into a graph, which is then one call. */
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

enum {
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209,
    CU_STREAM_NON_BLOCKING = 1,
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76
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

struct qgpu_program {
    CUmodule module;
    CUdeviceptr arena, constants;
    CUgraphExec graph;
};

static int launch_one(const qgpu_program *program, CUfunction function, const qgpu_launch *launch) {
    enum { MOST = 64 };
    CUdeviceptr pointers[MOST];
    void *arguments[MOST + 1] = {NULL}; /* ends in NULL */
    if (launch->count > MOST) return qgpu_fail("%s takes %d arguments", launch->kernel, (int)launch->count);
    for (int64_t i = 0; i < launch->count; ++i) {
        const qgpu_argument *argument = &launch->arguments[i];
        pointers[i] = (argument->is_constant ? program->constants : program->arena) + (CUdeviceptr)argument->offset;
        arguments[i] = &pointers[i];
    }
    CHECK(launch->kernel,
          cuLaunchKernel(function, (unsigned)launch->grid[0], (unsigned)launch->grid[1], (unsigned)launch->grid[2],
                         (unsigned)launch->block[0], (unsigned)launch->block[1], (unsigned)launch->block[2], 0, stream,
                         arguments, NULL));
    return 0;
}

/* All launches, one after the other, as a graph. */
static int capture(qgpu_program *program, const CUfunction *function, int64_t launches, const qgpu_launch *launch) {
    CUgraph graph = NULL;
    int problem = 0;
    CUresult status;
    CHECK("recording the launches", cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
    for (int64_t i = 0; i < launches && !problem; ++i) problem = launch_one(program, function[i], &launch[i]);
    status = cuStreamEndCapture(stream, &graph);
    if (!problem && status != 0) problem = failure("recording the launches", status);
    if (!problem) {
        status = cuGraphInstantiate(&program->graph, graph, 0);
        if (status != 0) problem = failure("preparing the launches", status);
    }
    if (graph != NULL) cuGraphDestroy(graph);
    return problem;
}

/* The driver may load a kernel when it is first asked for, which it must not while a stream is recorded. */
static int prepare(qgpu_program *program, int64_t launches, const qgpu_launch *launch) {
    CUfunction *functions = calloc((size_t)launches + 1, sizeof *functions);
    int problem = functions == NULL ? qgpu_fail("out of memory") : 0;
    for (int64_t i = 0; i < launches && !problem; ++i) {
        CUresult status = cuModuleGetFunction(&functions[i], program->module, launch[i].kernel);
        if (status != 0) problem = failure(launch[i].kernel, status);
    }
    if (!problem) problem = capture(program, functions, launches, launch);
    free(functions);
    return problem;
}

static int fill(qgpu_program *program, const void *code, const void *constants, int64_t constants_bytes,
                int64_t arena_bytes, int64_t launches, const qgpu_launch *launch) {
    CUresult status = cuModuleLoadData(&program->module, code);
    if (status == CUDA_ERROR_NO_BINARY_FOR_GPU)
        return qgpu_fail("%s (sm_%d) is none of the architectures this was compiled for; compile again with its "
                         "architecture among the target's", name, compute_capability);
    CHECK("loading the kernels", status);
    CHECK("making the arena", cuMemAlloc(&program->arena, (size_t)arena_bytes));
    CHECK("making the constants", cuMemAlloc(&program->constants, (size_t)constants_bytes));
    CHECK("uploading the constants",
          cuMemcpyHtoDAsync(program->constants, constants, (size_t)constants_bytes, stream));
    CHECK("uploading the constants", cuStreamSynchronize(stream));
    return prepare(program, launches, launch);
}

qgpu_program *qgpu_device_load(const void *code, int64_t code_bytes, const void *constants, int64_t constants_bytes,
                               int64_t arena_bytes, int64_t launches, const qgpu_launch *launch) {
    qgpu_program *program = calloc(1, sizeof *program);
    (void)code_bytes; /* the driver reads the size off the code */
    if (program == NULL) {
        qgpu_fail("out of memory");
        return NULL;
    }
    if (fill(program, code, constants, constants_bytes, arena_bytes, launches, launch) == 0) return program;
    qgpu_device_free(program);
    return NULL;
}

void qgpu_device_free(qgpu_program *program) {
    if (program == NULL) return;
    if (program->graph != NULL) cuGraphExecDestroy(program->graph);
    if (program->arena != 0) cuMemFree(program->arena);
    if (program->constants != 0) cuMemFree(program->constants);
    if (program->module != NULL) cuModuleUnload(program->module);
    free(program);
}

int qgpu_device_write(qgpu_program *program, int64_t offset, const void *data, int64_t bytes) {
    CHECK("copying to the device",
          cuMemcpyHtoDAsync(program->arena + (CUdeviceptr)offset, data, (size_t)bytes, stream));
    return 0;
}

int qgpu_device_run(qgpu_program *program) {
    CHECK("running the kernels", cuGraphLaunch(program->graph, stream));
    return 0;
}

int qgpu_device_read(qgpu_program *program, int64_t offset, void *data, int64_t bytes) {
    CHECK("copying from the device",
          cuMemcpyDtoHAsync(data, program->arena + (CUdeviceptr)offset, (size_t)bytes, stream));
    CHECK("waiting for the device", cuStreamSynchronize(stream));
    return 0;
}
