/* Runs GPU programs through OpenCL 1.2 or newer. libOpenCL is looked for when a region runs. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "qgpu_device.h"

/* --- the part of CL/cl.h that is used here (Khronos OpenCL 1.2) --- */

typedef int32_t cl_int;
typedef uint32_t cl_uint;
typedef uint64_t cl_bits;
typedef struct _cl_platform *cl_platform_id;
typedef struct _cl_device *cl_device_id;
typedef struct _cl_context *cl_context;
typedef struct _cl_queue *cl_command_queue;
typedef struct _cl_mem *cl_mem;
typedef struct _cl_program *cl_program;
typedef struct _cl_kernel *cl_kernel;
typedef struct {
    size_t origin, size;
} cl_buffer_region;

enum {
    CL_DEVICE_TYPE_GPU = 1 << 2,
    CL_DEVICE_TYPE_ACCELERATOR = 1 << 3,
    CL_DEVICE_NAME = 0x102B,
    CL_MEM_READ_WRITE = 1 << 0,
    CL_MEM_READ_ONLY = 1 << 2,
    CL_MEM_COPY_HOST_PTR = 1 << 5,
    CL_BUFFER_CREATE_TYPE_REGION = 0x1220,
    CL_PROGRAM_BUILD_LOG = 0x1183
};
#define CL_DEVICE_TYPE_ALL 0xFFFFFFFFu

#define FUNCTIONS(F)                                                                                                   \
    F(cl_int, clGetPlatformIDs, (cl_uint, cl_platform_id *, cl_uint *))                                                \
    F(cl_int, clGetDeviceIDs, (cl_platform_id, cl_bits, cl_uint, cl_device_id *, cl_uint *))                           \
    F(cl_int, clGetDeviceInfo, (cl_device_id, cl_uint, size_t, void *, size_t *))                                      \
    F(cl_context, clCreateContext, (const intptr_t *, cl_uint, const cl_device_id *, void *, void *, cl_int *))        \
    F(cl_command_queue, clCreateCommandQueue, (cl_context, cl_device_id, cl_bits, cl_int *))                           \
    F(cl_mem, clCreateBuffer, (cl_context, cl_bits, size_t, void *, cl_int *))                                         \
    F(cl_mem, clCreateSubBuffer, (cl_mem, cl_bits, cl_uint, const void *, cl_int *))                                   \
    F(cl_int, clReleaseMemObject, (cl_mem))                                                                            \
    F(cl_program, clCreateProgramWithSource, (cl_context, cl_uint, const char **, const size_t *, cl_int *))           \
    F(cl_int, clBuildProgram, (cl_program, cl_uint, const cl_device_id *, const char *, void *, void *))               \
    F(cl_int, clGetProgramBuildInfo, (cl_program, cl_device_id, cl_uint, size_t, void *, size_t *))                    \
    F(cl_int, clReleaseProgram, (cl_program))                                                                          \
    F(cl_kernel, clCreateKernel, (cl_program, const char *, cl_int *))                                                 \
    F(cl_int, clSetKernelArg, (cl_kernel, cl_uint, size_t, const void *))                                              \
    F(cl_int, clReleaseKernel, (cl_kernel))                                                                            \
    F(cl_int, clEnqueueNDRangeKernel,                                                                                  \
      (cl_command_queue, cl_kernel, cl_uint, const size_t *, const size_t *, const size_t *, cl_uint, const void *,    \
       void *))                                                                                                        \
    F(cl_int, clEnqueueFillBuffer,                                                                                     \
      (cl_command_queue, cl_mem, const void *, size_t, size_t, size_t, cl_uint, const void *, void *))                 \
    F(cl_int, clEnqueueWriteBuffer,                                                                                    \
      (cl_command_queue, cl_mem, cl_uint, size_t, size_t, const void *, cl_uint, const void *, void *))                \
    F(cl_int, clEnqueueReadBuffer,                                                                                     \
      (cl_command_queue, cl_mem, cl_uint, size_t, size_t, void *, cl_uint, const void *, void *))

#define DECLARE(result, name, arguments) static result(*name) arguments;
FUNCTIONS(DECLARE)

/* --- the device --- */

enum { MAX_PLATFORMS = 16, MAX_DEVICES = 32, DIMENSIONS = 3 };

static cl_device_id device;
static cl_context context;
static cl_command_queue queue;
static char name[256];

#define LIBRARY "libOpenCL.so.1"
#define PACKAGES "install ocl-icd-libopencl1 and your device's OpenCL driver (pocl-opencl-icd runs on any CPU)"

static int find_functions(void) {
    void *library = dlopen(LIBRARY, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) return qgpu_fail("OpenCL is not on this machine (no " LIBRARY "); " PACKAGES);
#define FIND(result, function, arguments)                                                                              \
    *(void **)&function = dlsym(library, #function);                                                                   \
    if (function == NULL) return qgpu_fail(LIBRARY " lacks " #function "; OpenCL 1.2 or newer is needed");
    FUNCTIONS(FIND)
    return 0;
}

/* The first GPU of any platform, else the first accelerator, else anything. */
static int find_device(void) {
    static const cl_bits kinds[] = {CL_DEVICE_TYPE_GPU, CL_DEVICE_TYPE_ACCELERATOR, CL_DEVICE_TYPE_ALL};
    cl_platform_id platforms[MAX_PLATFORMS];
    cl_uint count = 0, found = 0;
    if (clGetPlatformIDs(MAX_PLATFORMS, platforms, &count) != 0) count = 0;
    if (count > MAX_PLATFORMS) count = MAX_PLATFORMS;
    for (size_t kind = 0; kind < sizeof kinds / sizeof *kinds; ++kind)
        for (cl_uint i = 0; i < count; ++i)
            if (clGetDeviceIDs(platforms[i], kinds[kind], 1, &device, &found) == 0 && found > 0) return 0;
    return qgpu_fail("no OpenCL device on this machine; " PACKAGES);
}

int qgpu_device_open(void) {
    cl_int status;
    if (queue != NULL) return 0;
    if (find_functions() || find_device()) return 1;
    clGetDeviceInfo(device, CL_DEVICE_NAME, sizeof name - 1, name, NULL);
    context = clCreateContext(NULL, 1, &device, NULL, NULL, &status);
    if (context == NULL) return qgpu_fail("the OpenCL device %s gives no context (error %d)", name, (int)status);
    queue = clCreateCommandQueue(context, device, 0, &status);
    if (queue == NULL) return qgpu_fail("the OpenCL device %s gives no queue (error %d)", name, (int)status);
    return 0;
}

const char *qgpu_device_name(void) { return name; }

/* --- programs --- */

typedef struct {
    cl_kernel kernel;
    size_t global[DIMENSIONS], local[DIMENSIONS];
} step;

struct qgpu_program {
    cl_program code;
    cl_mem arena, constants;
    int64_t inputs;
    const qgpu_port *ports;
    int64_t launches, views;
    step *steps;
    cl_mem *view; /* every kernel argument is a part of the arena or the constants */
};

static int build(qgpu_program *program, const char *code, size_t bytes) {
    cl_int status;
    char log[700] = "";
    program->code = clCreateProgramWithSource(context, 1, &code, &bytes, &status);
    if (program->code == NULL) return qgpu_fail("%s takes no program (OpenCL error %d)", name, (int)status);
    /* No relaxed arithmetic: results are the same bits everywhere. */
    status = clBuildProgram(program->code, 1, &device, "", NULL, NULL);
    if (status == 0) return 0;
    clGetProgramBuildInfo(program->code, device, CL_PROGRAM_BUILD_LOG, sizeof log - 1, log, NULL);
    return qgpu_fail("%s cannot build the kernels (OpenCL error %d): %s", name, (int)status, log);
}

static int prepare(qgpu_program *program, step *step, const qgpu_launch *launch) {
    cl_int status;
    step->kernel = clCreateKernel(program->code, launch->kernel, &status);
    if (step->kernel == NULL) return qgpu_fail("no kernel %s (OpenCL error %d)", launch->kernel, (int)status);
    for (int axis = 0; axis < DIMENSIONS; ++axis) {
        step->local[axis] = (size_t)launch->block[axis];
        step->global[axis] = (size_t)(launch->grid[axis] * launch->block[axis]);
    }
    for (int64_t i = 0; i < launch->count; ++i) {
        const qgpu_argument *argument = &launch->arguments[i];
        cl_buffer_region part = {(size_t)argument->offset, (size_t)argument->bytes};
        cl_mem whole = argument->is_constant ? program->constants : program->arena;
        cl_mem view = clCreateSubBuffer(whole, argument->is_constant ? CL_MEM_READ_ONLY : CL_MEM_READ_WRITE,
                                        CL_BUFFER_CREATE_TYPE_REGION, &part, &status);
        if (view == NULL) return qgpu_fail("%s refuses a part of a buffer (OpenCL error %d)", name, (int)status);
        program->view[program->views++] = view;
        status = clSetKernelArg(step->kernel, (cl_uint)i, sizeof view, &view);
        if (status != 0) return qgpu_fail("%s, argument %d: OpenCL error %d", launch->kernel, (int)i, (int)status);
    }
    return 0;
}

static int fill(qgpu_program *program, const qgpu_source *source) {
    cl_int status;
    const char zero = 0;
    if (build(program, source->code, (size_t)source->code_bytes)) return 1;
    program->arena = clCreateBuffer(context, CL_MEM_READ_WRITE, (size_t)source->arena_bytes, NULL, &status);
    if (program->arena == NULL) return qgpu_fail("%s has no %lld bytes left", name, (long long)source->arena_bytes);
    status = clEnqueueFillBuffer(queue, program->arena, &zero, sizeof zero, 0, (size_t)source->arena_bytes, 0, NULL, NULL);
    if (status != 0) return qgpu_fail("clearing memory of %s failed (OpenCL error %d)", name, (int)status);
    program->constants = clCreateBuffer(context, CL_MEM_READ_ONLY | CL_MEM_COPY_HOST_PTR,
                                        (size_t)source->constants_bytes, (void *)(uintptr_t)source->constants, &status);
    if (program->constants == NULL)
        return qgpu_fail("%s has no %lld bytes left", name, (long long)source->constants_bytes);
    for (int64_t i = 0; i < program->launches; ++i)
        if (prepare(program, &program->steps[i], &source->launch[i])) return 1;
    return 0;
}

qgpu_program *qgpu_device_load(const qgpu_source *source) {
    qgpu_program *program = calloc(1, sizeof *program);
    size_t arguments = 0;
    for (int64_t i = 0; i < source->launches; ++i) arguments += (size_t)source->launch[i].count;
    if (program != NULL) {
        program->launches = source->launches;
        program->inputs = source->inputs;
        program->ports = source->ports;
        program->steps = calloc((size_t)source->launches + 1, sizeof *program->steps);
        program->view = calloc(arguments + 1, sizeof *program->view);
    }
    if (program == NULL || program->steps == NULL || program->view == NULL) {
        qgpu_fail("out of memory");
    } else if (fill(program, source) == 0) {
        return program;
    }
    qgpu_device_free(program);
    return NULL;
}

void qgpu_device_free(qgpu_program *program) {
    if (program == NULL) return;
    for (int64_t i = 0; program->steps != NULL && i < program->launches; ++i)
        if (program->steps[i].kernel != NULL) clReleaseKernel(program->steps[i].kernel);
    for (int64_t i = 0; i < program->views; ++i) clReleaseMemObject(program->view[i]);
    if (program->arena != NULL) clReleaseMemObject(program->arena);
    if (program->constants != NULL) clReleaseMemObject(program->constants);
    if (program->code != NULL) clReleaseProgram(program->code);
    free(program->steps);
    free(program->view);
    free(program);
}

int qgpu_device_write(qgpu_program *program, int64_t input, const void *data) {
    const qgpu_port *port = &program->ports[input];
    cl_int status = clEnqueueWriteBuffer(queue, program->arena, 1, (size_t)port->offset, (size_t)port->bytes, data, 0,
                                         NULL, NULL);
    return status == 0 ? 0 : qgpu_fail("copying to %s failed (OpenCL error %d)", name, (int)status);
}

int qgpu_device_run(qgpu_program *program) {
    for (int64_t i = 0; i < program->launches; ++i) {
        step *step = &program->steps[i];
        cl_int status =
            clEnqueueNDRangeKernel(queue, step->kernel, DIMENSIONS, NULL, step->global, step->local, 0, NULL, NULL);
        if (status != 0) return qgpu_fail("%s cannot run kernel %d (OpenCL error %d)", name, (int)i, (int)status);
    }
    return 0;
}

int qgpu_device_read(qgpu_program *program, int64_t output, void *data) {
    const qgpu_port *port = &program->ports[program->inputs + output];
    /* Blocking, in a queue that keeps its order: all launches before it are complete. */
    cl_int status = clEnqueueReadBuffer(queue, program->arena, 1, (size_t)port->offset, (size_t)port->bytes, data, 0,
                                        NULL, NULL);
    return status == 0 ? 0 : qgpu_fail("copying from %s failed (OpenCL error %d)", name, (int)status);
}

int qgpu_device_measure(qgpu_program *program, int32_t repeat, float *each, float *all) {
    (void)program, (void)repeat, (void)each, (void)all;
    return qgpu_fail("launches are not measured through OpenCL");
}
