/* The C ABI of an NPU program.
 *
 * A region's driver, compiled by TVM, is ordinary host code: loops over tiles that call these functions. The
 * commands and their arguments are those of qcompiler/simulator/isa.py, which explains each; all arguments are
 * int32 and every command returns 0. `../simulator/npu_sim.c` implements this header as a functional simulator. To run
 * the same programs on silicon, implement it with code that writes your command stream, as in `../driver`, and link that.
 *
 * Not thread-safe: one region runs at a time, as on the device.
 */
#ifndef QRT_H
#define QRT_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* --- host side: not commands, not logged --- */

/* Start region `region` (its number in the partition); the scratchpad has this many bytes and nothing in it. */
int32_t qrt_open(int32_t region, int32_t scratchpad_bytes);
/* Give commands the external buffer behind `base` (1, 2…). It stays the caller's. */
int32_t qrt_bind(int32_t base, void *pointer, int64_t bytes);
/* End the region: everything is complete and the bindings are gone. */
int32_t qrt_close(void);

/* --- commands --- */

int32_t qrt_layer(int32_t index);
int32_t qrt_alloc(int32_t offset, int32_t bytes);
int32_t qrt_free(int32_t offset, int32_t bytes);
int32_t qrt_dma(int32_t dst_base, int32_t dst_offset, int32_t dst_plane_stride, int32_t dst_row_stride,
                int32_t src_base, int32_t src_offset, int32_t src_plane_stride, int32_t src_row_stride,
                int32_t planes, int32_t rows, int32_t row_bytes);
int32_t qrt_fill(int32_t base, int32_t offset, int32_t plane_stride, int32_t row_stride, int32_t planes, int32_t rows,
                 int32_t row_bytes, int32_t value);
int32_t qrt_barrier(void);

int32_t qrt_ifm(int32_t slot, int32_t base, int32_t offset, int32_t height, int32_t width, int32_t depth,
                int32_t stride_y, int32_t stride_x, int32_t stride_c, int32_t dtype, int32_t zero_point);
int32_t qrt_ofm(int32_t base, int32_t offset, int32_t height, int32_t width, int32_t depth, int32_t stride_y,
                int32_t stride_x, int32_t dtype, int32_t zero_point, int32_t clamp_min, int32_t clamp_max);
int32_t qrt_wrap(int32_t map, int32_t height, int32_t offset);
int32_t qrt_kernel(int32_t height, int32_t width, int32_t stride_y, int32_t stride_x, int32_t dilation_y,
                   int32_t dilation_x, int32_t pad_top, int32_t pad_left);
int32_t qrt_weights(int32_t base, int32_t offset, int32_t dtype, int32_t zero_point, int32_t group);
int32_t qrt_scales(int32_t base, int32_t offset, int32_t variant);

int32_t qrt_conv(int32_t ifm_group_depth, int32_t ofm_group_depth);
int32_t qrt_conv_transpose(int32_t ifm_group_depth, int32_t ofm_group_depth);
int32_t qrt_max_pool(void);
int32_t qrt_average_pool(int32_t count_include_pad);
int32_t qrt_add(int32_t subtract, int32_t multiplier_a, int32_t shift_a, int32_t multiplier_b, int32_t shift_b,
                int32_t multiplier_y, int32_t shift_y, int32_t variant);
int32_t qrt_mul(void);
int32_t qrt_requantize(void);
int32_t qrt_lookup(int32_t base, int32_t offset);
int32_t qrt_softmax(int32_t base, int32_t offset, int32_t inverse_scale);
int32_t qrt_resize_nearest(int32_t base, int32_t y_index, int32_t x_index, int32_t y_origin);
int32_t qrt_resize_linear(int32_t base, int32_t y_index, int32_t y_weight, int32_t x_index, int32_t x_weight,
                          int32_t y_origin);

/* --- the simulator's log; a silicon implementation does without --- */

/* The command words since the last reset, code first: what qcompiler.simulator.isa.decode reads. */
const int32_t *qrt_log_data(void);
int64_t qrt_log_size(void);
/* Where each opened region begins in the log: pairs of region number and first word. */
const int64_t *qrt_log_regions(void);
int64_t qrt_log_region_count(void);
/* Most scratchpad bytes reserved at once since the last reset: the highest end of a reservation. */
int64_t qrt_log_scratchpad_peak(void);
void qrt_log_reset(void);

#ifdef __cplusplus
}
#endif

#endif
