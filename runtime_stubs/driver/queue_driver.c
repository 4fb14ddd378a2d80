/* An example driver: qrt.h over a command queue.
 *
 * Commands are written as words into a block, code first, which goes to the device whenever it is full and when the
 * region ends. What differs between chips is in device.h. Registers (ifm, ofm, kernel, weights, scales) hold from one
 * block to the next, as they do from one command to the next. A chip with its own command format translates in
 * `command` instead of copying; qcompiler/simulator/isa.py says what every word means.
 */
#include "qrt.h"

#include "device.h"

enum { BLOCK_WORDS = 256, MOST_BUFFERS = 256 };

/* Codes of qcompiler/simulator/isa.py. */
enum {
    LAYER = 1, ALLOC = 2, FREE = 3, DMA = 4, FILL = 5, BARRIER = 6,
    IFM = 10, OFM = 11, KERNEL = 12, WEIGHTS = 13, SCALES = 14, WRAP = 15,
    CONV = 20, CONV_TRANSPOSE = 21, MAX_POOL = 22, AVERAGE_POOL = 23, ADD = 24, MUL = 25, REQUANTIZE = 26,
    LOOKUP = 27, SOFTMAX = 28, RESIZE_NEAREST = 29, RESIZE_LINEAR = 30
};

static int32_t block[BLOCK_WORDS];
static int32_t used;
static device_buffer buffers[MOST_BUFFERS];
static int32_t buffer_count;

static void flush(void) {
    if (used > 0) device_submit(block, used, buffers, buffer_count);
    used = 0;
}

static int32_t command(int32_t code, const int32_t *arguments, int32_t count) {
    if (used + 1 + count > BLOCK_WORDS) flush();
    block[used++] = code;
    for (int32_t i = 0; i < count; ++i) block[used++] = arguments[i];
    return 0;
}

#define COMMAND(code, ...) \
    command(code, (const int32_t[]){__VA_ARGS__}, (int32_t)(sizeof((const int32_t[]){__VA_ARGS__}) / sizeof(int32_t)))

/* --- host side --- */

int32_t qrt_open(int32_t region, int32_t scratchpad_bytes) {
    used = buffer_count = 0;
    device_begin(region, scratchpad_bytes);
    return 0;
}

int32_t qrt_bind(int32_t base, void *pointer, int64_t bytes) {
    if (base < 1 || base > MOST_BUFFERS) device_fail("the region has more buffers than the driver's table");
    for (; buffer_count < base; ++buffer_count) buffers[buffer_count] = (device_buffer){0, 0};
    buffers[base - 1] = (device_buffer){device_map(pointer, bytes), bytes};
    return 0;
}

int32_t qrt_close(void) {
    flush();
    device_wait();
    device_end();
    return 0;
}

/* --- commands --- */

int32_t qrt_layer(int32_t index) { return COMMAND(LAYER, index); } /* for logs and profilers; the device may skip it */
int32_t qrt_alloc(int32_t offset, int32_t bytes) { return COMMAND(ALLOC, offset, bytes); } /* likewise: checked only */
int32_t qrt_free(int32_t offset, int32_t bytes) { return COMMAND(FREE, offset, bytes); }
int32_t qrt_barrier(void) { return command(BARRIER, 0, 0); }

int32_t qrt_dma(int32_t dst_base, int32_t dst_offset, int32_t dst_plane_stride, int32_t dst_row_stride,
                int32_t src_base, int32_t src_offset, int32_t src_plane_stride, int32_t src_row_stride,
                int32_t planes, int32_t rows, int32_t row_bytes) {
    return COMMAND(DMA, dst_base, dst_offset, dst_plane_stride, dst_row_stride, src_base, src_offset, src_plane_stride,
                   src_row_stride, planes, rows, row_bytes);
}

int32_t qrt_fill(int32_t base, int32_t offset, int32_t plane_stride, int32_t row_stride, int32_t planes, int32_t rows,
                 int32_t row_bytes, int32_t value) {
    return COMMAND(FILL, base, offset, plane_stride, row_stride, planes, rows, row_bytes, value);
}

int32_t qrt_ifm(int32_t slot, int32_t base, int32_t offset, int32_t height, int32_t width, int32_t depth,
                int32_t stride_y, int32_t stride_x, int32_t stride_c, int32_t dtype, int32_t zero_point) {
    return COMMAND(IFM, slot, base, offset, height, width, depth, stride_y, stride_x, stride_c, dtype, zero_point);
}

int32_t qrt_ofm(int32_t base, int32_t offset, int32_t height, int32_t width, int32_t depth, int32_t stride_y,
                int32_t stride_x, int32_t dtype, int32_t zero_point, int32_t clamp_min, int32_t clamp_max) {
    return COMMAND(OFM, base, offset, height, width, depth, stride_y, stride_x, dtype, zero_point, clamp_min, clamp_max);
}

int32_t qrt_wrap(int32_t map, int32_t height, int32_t offset) { return COMMAND(WRAP, map, height, offset); }

int32_t qrt_kernel(int32_t height, int32_t width, int32_t stride_y, int32_t stride_x, int32_t dilation_y,
                   int32_t dilation_x, int32_t pad_top, int32_t pad_left) {
    return COMMAND(KERNEL, height, width, stride_y, stride_x, dilation_y, dilation_x, pad_top, pad_left);
}

int32_t qrt_weights(int32_t base, int32_t offset, int32_t dtype, int32_t zero_point, int32_t group) {
    return COMMAND(WEIGHTS, base, offset, dtype, zero_point, group);
}

int32_t qrt_scales(int32_t base, int32_t offset, int32_t variant) { return COMMAND(SCALES, base, offset, variant); }

int32_t qrt_conv(int32_t ifm_group_depth, int32_t ofm_group_depth) {
    return COMMAND(CONV, ifm_group_depth, ofm_group_depth);
}

int32_t qrt_conv_transpose(int32_t ifm_group_depth, int32_t ofm_group_depth) {
    return COMMAND(CONV_TRANSPOSE, ifm_group_depth, ofm_group_depth);
}

int32_t qrt_max_pool(void) { return command(MAX_POOL, 0, 0); }
int32_t qrt_average_pool(int32_t count_include_pad) { return COMMAND(AVERAGE_POOL, count_include_pad); }

int32_t qrt_add(int32_t subtract, int32_t multiplier_a, int32_t shift_a, int32_t multiplier_b, int32_t shift_b,
                int32_t multiplier_y, int32_t shift_y, int32_t variant) {
    return COMMAND(ADD, subtract, multiplier_a, shift_a, multiplier_b, shift_b, multiplier_y, shift_y, variant);
}

int32_t qrt_mul(void) { return command(MUL, 0, 0); }
int32_t qrt_requantize(void) { return command(REQUANTIZE, 0, 0); }
int32_t qrt_lookup(int32_t base, int32_t offset) { return COMMAND(LOOKUP, base, offset); }

int32_t qrt_softmax(int32_t base, int32_t offset, int32_t inverse_scale) {
    return COMMAND(SOFTMAX, base, offset, inverse_scale);
}

int32_t qrt_resize_nearest(int32_t base, int32_t y_index, int32_t x_index, int32_t y_origin) {
    return COMMAND(RESIZE_NEAREST, base, y_index, x_index, y_origin);
}

int32_t qrt_resize_linear(int32_t base, int32_t y_index, int32_t y_weight, int32_t x_index, int32_t x_weight,
                          int32_t y_origin) {
    return COMMAND(RESIZE_LINEAR, base, y_index, y_weight, x_index, x_weight, y_origin);
}
