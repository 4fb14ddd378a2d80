/* The C ABI of a GPU region: what its driver, which TVM compiles, calls.
 *
 *     qgpu_open(region, program)      once: load the kernels, upload the weights; later only select the region
 *     qgpu_write(input, data)         for each input: copy it to the device
 *     qgpu_run()                      all launches, in order
 *     qgpu_read(output, data)         for each output: wait, and copy it back
 *     qgpu_close()                    0 if all of that went well
 *
 * After a failure the calls that follow do nothing; `qgpu_error` says what it was. A program is data, described in
 * qgpu.c. qgpu.c with opencl.c or cuda.c implements this header; both find the driver when they run, so that
 * neither its headers nor its library is needed to build. Not thread-safe: one region runs at a time.
 */
#ifndef QGPU_H
#define QGPU_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

int32_t qgpu_open(int32_t region, const void *program);
int32_t qgpu_write(int32_t input, const void *data);
int32_t qgpu_run(void);
int32_t qgpu_read(int32_t output, void *data);
int32_t qgpu_close(void);

/* For the region opened last, when it has run: microseconds of each launch by itself, repeated, and of all of them
 * together, without copies. `each` has room for as many as there are launches. 0 if that could be measured. */
int32_t qgpu_measure(int32_t repeat, float *each, float *all);

/* Why no region can run on this machine, naming the package that is missing; NULL if one can. */
const char *qgpu_problem(void);
/* The device that regions run on, for people to read; empty if there is none. */
const char *qgpu_device(void);
/* What went wrong last; empty if nothing did. */
const char *qgpu_error(void);

#ifdef __cplusplus
}
#endif

#endif
