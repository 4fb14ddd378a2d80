/* A functional simulator of the NPU behind qrt.h: bit-exact, with bounded memories and a command log.
 *
 * Commands execute at once, in order; what the asynchronous hardware would forbid is checked instead. Every byte
 * a command may touch must lie inside the buffer bound to its base and, in the scratchpad, inside one live
 * reservation; and between two barriers no two commands may touch the same byte if one of them writes. A violation
 * prints the command's index in the log and aborts: it is a bug in the driver, and running on would hide it.
 *
 * Timing is not simulated here: qcompiler.simulator.cost prices the log.
 */
#include "qrt.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "qarith.h"

/* Codes of qcompiler/simulator/isa.py. */
enum {
    LAYER = 1, ALLOC = 2, FREE = 3, DMA = 4, FILL = 5, BARRIER = 6,
    IFM = 10, OFM = 11, KERNEL = 12, WEIGHTS = 13, SCALES = 14, WRAP = 15,
    CONV = 20, CONV_TRANSPOSE = 21, MAX_POOL = 22, AVERAGE_POOL = 23, ADD = 24, MUL = 25, REQUANTIZE = 26,
    LOOKUP = 27, SOFTMAX = 28, RESIZE_NEAREST = 29, RESIZE_LINEAR = 30
};
enum { INT8 = 0, UINT8 = 1, INT16 = 2, INT4 = 4, INT2 = 5, INT1 = 6, INT8_2OF4 = 7 };
enum { SCRATCHPAD = 0 };
enum { RECORD_BYTES = 12, POISON = 0xA5 };

typedef struct { uint8_t *data; int64_t bytes; } memory;
typedef struct { int64_t offset, bytes; } reservation;

/* `planes` times `rows` runs of `row_bytes`: the shape of everything a command touches. */
typedef struct {
    int32_t base;
    int64_t offset, plane_stride, row_stride;
    int64_t planes, rows, row_bytes;
} box;
typedef struct { box where; int write; int64_t command; } access;

typedef struct {
    int32_t base, offset, height, width, depth, stride_y, stride_x, stride_c, dtype, zero_point;
    int32_t first_rows, wrapped; /* rows from first_rows on begin at the offset `wrapped` */
    uint8_t *data;               /* of its base, once touched */
} feature_map; /* an OFM's stride_c is its element's size */
typedef struct { int32_t height, width, stride_y, stride_x, dilation_y, dilation_x, pad_top, pad_left; } window;
typedef struct { int32_t base, offset, dtype, zero_point, group; } weight_block;
typedef struct { int32_t base, offset, variant; } scale_block;

/* A growable array: items, count, capacity. */
#define VECTOR(type) struct { type *items; int64_t count, capacity; }

static VECTOR(int32_t) words;
static VECTOR(int64_t) regions; /* region number, first word */
static VECTOR(memory) bases;
static VECTOR(reservation) reservations;
static VECTOR(access) accesses; /* since the last barrier */
static int64_t command_count, command_index, scratchpad_peak;
static const char *command_name = "none";
static int is_open;

static feature_map ifm[2], ofm;
static int32_t clamp_min, clamp_max;
static window kernel;
static weight_block weights;
static scale_block scales;

static void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fflush(stdout);
    fprintf(stderr, "npu_sim: command %lld (%s): ", (long long)command_index, command_name);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    fflush(stderr);
    va_end(arguments);
    abort();
}

static void *grow(void *items, int64_t *capacity, int64_t needed, size_t size) {
    if (needed <= *capacity) return items;
    *capacity = needed > 2 * *capacity ? needed : 2 * *capacity;
    items = realloc(items, (size_t)*capacity * size);
    if (items == NULL) fail("the host is out of memory");
    return items;
}

#define RESERVE(vector, needed) \
    ((vector).items = grow((vector).items, &(vector).capacity, (needed), sizeof *(vector).items))
#define PUSH(vector, item) (RESERVE(vector, (vector).count + 1), (vector).items[(vector).count++] = (item))

/* Reused working memory of the kernels, by purpose. */
enum { PADDED, FILTERS, PATCH, SUMS, RECORDS, ARENAS };

static void *arena(int purpose, int64_t bytes) {
    static void *blocks[ARENAS];
    static int64_t capacities[ARENAS];
    blocks[purpose] = grow(blocks[purpose], &capacities[purpose], bytes > 0 ? bytes : 1, 1);
    return blocks[purpose];
}

static void begin(int32_t code, const char *name, const int32_t *arguments, int32_t count) {
    command_name = name;
    command_index = command_count++;
    if (!is_open) fail("no region is open");
    PUSH(words, code);
    for (int32_t i = 0; i < count; ++i) PUSH(words, arguments[i]);
}

/* A compound literal rather than an initialised array keeps each command to one line. */
#define BEGIN(code, name, ...) \
    begin(code, name, (const int32_t[]){__VA_ARGS__}, (int32_t)(sizeof((const int32_t[]){__VA_ARGS__}) / sizeof(int32_t)))

/* --- memory --- */

static memory *memory_of(int32_t base) {
    if (base < 0 || base >= bases.count || bases.items[base].data == NULL) fail("base %d is not bound", base);
    return &bases.items[base];
}

static int is_empty(const box *b) { return b->planes == 0 || b->rows == 0 || b->row_bytes == 0; }
static int64_t end_of(const box *b) {
    return b->offset + (b->planes - 1) * b->plane_stride + (b->rows - 1) * b->row_stride + b->row_bytes;
}

/* Does some run of `b` meet the bytes [start, end)? */
static int meets(const box *b, int64_t start, int64_t end) {
    for (int64_t plane = 0; plane < b->planes; ++plane) {
        int64_t from = start - (b->offset + plane * b->plane_stride) - b->row_bytes + 1;
        int64_t to = end - 1 - (b->offset + plane * b->plane_stride);
        if (to < 0) continue;
        int64_t first = b->row_stride == 0 || from <= 0 ? 0 : (from + b->row_stride - 1) / b->row_stride;
        if (b->row_stride == 0 && from > 0) continue;
        int64_t last = b->row_stride == 0 ? 0 : to / b->row_stride;
        if (first <= last && first < b->rows) return 1;
    }
    return 0;
}

static int overlap(const box *a, const box *b) {
    if (a->base != b->base || a->offset >= end_of(b) || b->offset >= end_of(a)) return 0;
    if (a->planes * a->rows > b->planes * b->rows) {
        const box *other = a;
        a = b;
        b = other;
    }
    for (int64_t plane = 0; plane < a->planes; ++plane)
        for (int64_t row = 0; row < a->rows; ++row) {
            int64_t start = a->offset + plane * a->plane_stride + row * a->row_stride;
            if (meets(b, start, start + a->row_bytes)) return 1;
        }
    return 0;
}

/* Check one operand of the current command and remember it until the next barrier. Returns its first byte. */
static uint8_t *touch(const char *what, box b, int write) {
    const memory *m = memory_of(b.base);
    if (b.planes < 0 || b.rows < 0 || b.row_bytes < 0) fail("%s has a negative size", what);
    if (b.plane_stride < 0 || b.row_stride < 0) fail("%s has a negative stride", what);
    if (is_empty(&b)) return m->data;
    /* A stride of 0 repeats the same bytes; joined runs make the overlap test short. */
    if (b.row_stride == 0) b.rows = 1;
    if (b.plane_stride == 0) b.planes = 1;
    if (b.row_stride == b.row_bytes) b.row_bytes *= b.rows, b.rows = 1;
    if (b.rows == 1 && b.plane_stride == b.row_bytes) b.row_bytes *= b.planes, b.planes = 1;
    int64_t start = b.offset, end = end_of(&b);
    if (start < 0 || end > m->bytes)
        fail("%s is bytes %lld to %lld of base %d, which has %lld", what, (long long)start, (long long)end, b.base,
             (long long)m->bytes);
    if (b.base == SCRATCHPAD) {
        int64_t i = 0;
        while (i < reservations.count && (start < reservations.items[i].offset ||
                                          end > reservations.items[i].offset + reservations.items[i].bytes))
            ++i;
        if (i == reservations.count)
            fail("%s is scratchpad bytes %lld to %lld, inside no reservation", what, (long long)start, (long long)end);
    }
    for (int64_t i = 0; i < accesses.count; ++i) {
        const access *other = &accesses.items[i];
        if ((write || other->write) && other->command != command_index && overlap(&b, &other->where))
            fail("%s (bytes %lld to %lld of base %d) races with command %lld; a barrier is missing", what,
                 (long long)start, (long long)end, b.base, (long long)other->command);
    }
    PUSH(accesses, ((access){b, write, command_index}));
    return m->data + start;
}

static uint8_t *touch_run(const char *what, int32_t base, int64_t offset, int64_t bytes) {
    return touch(what, (box){base, offset, 0, 0, 1, 1, bytes}, 0);
}

static int32_t element_bytes(int32_t dtype) { return dtype == INT16 ? 2 : 1; }

static void touch_map(const char *what, feature_map *m, int write) {
    int32_t element = element_bytes(m->dtype);
    if (m->dtype < INT8 || m->dtype > INT16) fail("%s has dtype %d; maps have 8 or 16 bits", what, m->dtype);
    if (m->dtype == INT16 && m->zero_point) fail("%s has the zero point %d; 16-bit maps have 0", what, m->zero_point);
    if (m->stride_c != 0 && m->stride_c != element) fail("%s has a depth stride of %d", what, m->stride_c);
    int64_t depth = element * (int64_t)(m->stride_c == 0 && m->depth > 0 ? 1 : m->depth);
    int64_t first = m->first_rows < m->height ? m->first_rows : m->height;
    m->data = memory_of(m->base)->data;
    touch(what, (box){m->base, m->offset, m->stride_y, m->stride_x, first, m->width, depth}, write);
    touch(what, (box){m->base, m->wrapped, m->stride_y, m->stride_x, m->height - first, m->width, depth}, write);
}

/* Pixel (y, x) of a map; a stride of 0 repeats it. */
static uint8_t *pixel_of(const feature_map *m, int32_t y, int32_t x) {
    int64_t row = y < m->first_rows ? m->offset + (int64_t)y * m->stride_y
                                    : m->wrapped + (int64_t)(y - m->first_rows) * m->stride_y;
    return m->data + row + (int64_t)x * m->stride_x;
}

/* --- host side --- */

int32_t qrt_open(int32_t region, int32_t scratchpad_bytes) {
    command_name = "open";
    command_index = command_count;
    if (is_open) fail("a region is open already");
    for (int64_t i = 1; i < bases.count; ++i) bases.items[i] = (memory){NULL, 0};
    RESERVE(bases, 1);
    if (bases.count == 0) bases.items[bases.count++] = (memory){NULL, 0};
    memory *scratchpad = &bases.items[SCRATCHPAD];
    if (scratchpad->bytes != scratchpad_bytes || scratchpad->data == NULL) {
        free(scratchpad->data);
        *scratchpad = (memory){malloc((size_t)(scratchpad_bytes > 0 ? scratchpad_bytes : 1)), scratchpad_bytes};
        if (scratchpad->data == NULL) fail("the host is out of memory");
    }
    reservations.count = accesses.count = 0;
    is_open = 1;
    PUSH(regions, region);
    PUSH(regions, words.count);
    return 0;
}

int32_t qrt_bind(int32_t base, void *pointer, int64_t bytes) {
    command_name = "bind";
    command_index = command_count;
    if (!is_open) fail("no region is open");
    if (base <= SCRATCHPAD || pointer == NULL || bytes < 0) fail("base %d cannot be bound like this", base);
    RESERVE(bases, (int64_t)base + 1);
    while (bases.count <= base) bases.items[bases.count++] = (memory){NULL, 0};
    bases.items[base] = (memory){pointer, bytes};
    return 0;
}

int32_t qrt_close(void) {
    command_name = "close";
    command_index = command_count;
    if (!is_open) fail("no region is open");
    if (accesses.count > 0) fail("commands are outstanding; a barrier is missing");
    if (reservations.count > 0) fail("%lld reservations were not freed", (long long)reservations.count);
    is_open = 0;
    return 0;
}

const int32_t *qrt_log_data(void) { return words.items; }
int64_t qrt_log_size(void) { return words.count; }
const int64_t *qrt_log_regions(void) { return regions.items; }
int64_t qrt_log_region_count(void) { return regions.count / 2; }
int64_t qrt_log_scratchpad_peak(void) { return scratchpad_peak; }
void qrt_log_reset(void) { words.count = regions.count = command_count = scratchpad_peak = 0; }

/* --- data movement --- */

int32_t qrt_layer(int32_t index) {
    BEGIN(LAYER, "layer", index);
    return 0;
}

int32_t qrt_alloc(int32_t offset, int32_t bytes) {
    BEGIN(ALLOC, "alloc", offset, bytes);
    const memory *m = memory_of(SCRATCHPAD);
    if (offset < 0 || bytes <= 0 || (int64_t)offset + bytes > m->bytes)
        fail("%d bytes at %d do not fit the scratchpad of %lld", bytes, offset, (long long)m->bytes);
    for (int64_t i = 0; i < reservations.count; ++i) {
        const reservation *r = &reservations.items[i];
        if (offset < r->offset + r->bytes && r->offset < (int64_t)offset + bytes)
            fail("%d bytes at %d overlap the reservation of %lld at %lld", bytes, offset, (long long)r->bytes,
                 (long long)r->offset);
    }
    PUSH(reservations, ((reservation){offset, bytes}));
    if ((int64_t)offset + bytes > scratchpad_peak) scratchpad_peak = (int64_t)offset + bytes;
    /* Nobody may count on what was there before. */
    memset(m->data + offset, POISON, (size_t)bytes);
    return 0;
}

int32_t qrt_free(int32_t offset, int32_t bytes) {
    BEGIN(FREE, "free", offset, bytes);
    for (int64_t i = 0; i < reservations.count; ++i)
        if (reservations.items[i].offset == offset && reservations.items[i].bytes == bytes) {
            reservations.items[i] = reservations.items[--reservations.count];
            return 0;
        }
    fail("%d bytes at %d are not reserved", bytes, offset);
    return 0;
}

int32_t qrt_dma(int32_t dst_base, int32_t dst_offset, int32_t dst_plane_stride, int32_t dst_row_stride,
                int32_t src_base, int32_t src_offset, int32_t src_plane_stride, int32_t src_row_stride,
                int32_t planes, int32_t rows, int32_t row_bytes) {
    BEGIN(DMA, "dma", dst_base, dst_offset, dst_plane_stride, dst_row_stride, src_base, src_offset, src_plane_stride,
          src_row_stride, planes, rows, row_bytes);
    box source = {src_base, src_offset, src_plane_stride, src_row_stride, planes, rows, row_bytes};
    box destination = {dst_base, dst_offset, dst_plane_stride, dst_row_stride, planes, rows, row_bytes};
    const uint8_t *src = touch("the source", source, 0);
    uint8_t *dst = touch("the destination", destination, 1);
    if (is_empty(&source)) return 0;
    if (overlap(&source, &destination)) fail("the source overlaps the destination");
    for (int64_t plane = 0; plane < planes; ++plane) {
        const uint8_t *from = src + plane * src_plane_stride;
        uint8_t *to = dst + plane * dst_plane_stride;
        if (row_bytes == 1)
            for (int64_t row = 0; row < rows; ++row) to[row * dst_row_stride] = from[row * src_row_stride];
        else
            for (int64_t row = 0; row < rows; ++row)
                memcpy(to + row * dst_row_stride, from + row * src_row_stride, (size_t)row_bytes);
    }
    return 0;
}

int32_t qrt_fill(int32_t base, int32_t offset, int32_t plane_stride, int32_t row_stride, int32_t planes, int32_t rows,
                 int32_t row_bytes, int32_t value) {
    BEGIN(FILL, "fill", base, offset, plane_stride, row_stride, planes, rows, row_bytes, value);
    box destination = {base, offset, plane_stride, row_stride, planes, rows, row_bytes};
    uint8_t *dst = touch("the destination", destination, 1);
    if (is_empty(&destination)) return 0;
    for (int64_t plane = 0; plane < planes; ++plane)
        for (int64_t row = 0; row < rows; ++row)
            memset(dst + plane * plane_stride + row * row_stride, (uint8_t)value, (size_t)row_bytes);
    return 0;
}

int32_t qrt_barrier(void) {
    begin(BARRIER, "barrier", NULL, 0);
    accesses.count = 0;
    return 0;
}

/* --- registers --- */

int32_t qrt_ifm(int32_t slot, int32_t base, int32_t offset, int32_t height, int32_t width, int32_t depth,
                int32_t stride_y, int32_t stride_x, int32_t stride_c, int32_t dtype, int32_t zero_point) {
    BEGIN(IFM, "ifm", slot, base, offset, height, width, depth, stride_y, stride_x, stride_c, dtype, zero_point);
    if (slot < 0 || slot > 1) fail("there is no slot %d", slot);
    ifm[slot] = (feature_map){base, offset, height, width, depth, stride_y, stride_x, stride_c, dtype, zero_point,
                              INT32_MAX, 0, NULL};
    return 0;
}

int32_t qrt_ofm(int32_t base, int32_t offset, int32_t height, int32_t width, int32_t depth, int32_t stride_y,
                int32_t stride_x, int32_t dtype, int32_t zero_point, int32_t low, int32_t high) {
    BEGIN(OFM, "ofm", base, offset, height, width, depth, stride_y, stride_x, dtype, zero_point, low, high);
    ofm = (feature_map){base, offset, height, width, depth, stride_y, stride_x, element_bytes(dtype), dtype, zero_point,
                        INT32_MAX, 0, NULL};
    clamp_min = low;
    clamp_max = high;
    return 0;
}

int32_t qrt_wrap(int32_t map, int32_t height, int32_t offset) {
    BEGIN(WRAP, "wrap", map, height, offset);
    if (map < 0 || map > 2) fail("there is no map %d", map);
    if (height < 0) fail("%d rows cannot come before the wrap", height);
    feature_map *m = map == 2 ? &ofm : &ifm[map];
    m->first_rows = height;
    m->wrapped = offset;
    return 0;
}

int32_t qrt_kernel(int32_t height, int32_t width, int32_t stride_y, int32_t stride_x, int32_t dilation_y,
                   int32_t dilation_x, int32_t pad_top, int32_t pad_left) {
    BEGIN(KERNEL, "kernel", height, width, stride_y, stride_x, dilation_y, dilation_x, pad_top, pad_left);
    if (height < 1 || width < 1 || stride_y < 1 || stride_x < 1 || dilation_y < 1 || dilation_x < 1)
        fail("sizes, strides and dilations start at 1");
    kernel = (window){height, width, stride_y, stride_x, dilation_y, dilation_x, pad_top, pad_left};
    return 0;
}

int32_t qrt_weights(int32_t base, int32_t offset, int32_t dtype, int32_t zero_point, int32_t group) {
    BEGIN(WEIGHTS, "weights", base, offset, dtype, zero_point, group);
    if (dtype != INT8 && dtype != UINT8 && (dtype < INT4 || dtype > INT8_2OF4))
        fail("dtype %d is not implemented for weights", dtype);
    if (group < 0 || (group > 0 && (dtype < INT4 || dtype == INT8_2OF4 || zero_point)))
        fail("groups are of int4, int2 or int1 weights without a zero point");
    weights = (weight_block){base, offset, dtype, zero_point, group};
    return 0;
}

int32_t qrt_scales(int32_t base, int32_t offset, int32_t variant) {
    BEGIN(SCALES, "scales", base, offset, variant);
    if (variant < QARITH_FLOAT32 || variant > QARITH_SHIFT) fail("there is no requantize variant %d", variant);
    scales = (scale_block){base, offset, variant};
    return 0;
}

/* --- what the kernels share --- */

typedef struct { int32_t bias, multiplier, shift; } record;

static const record *read_records(int32_t count) {
    const uint8_t *bytes = touch_run("the scale records", scales.base, scales.offset, (int64_t)count * RECORD_BYTES);
    record *copy = arena(RECORDS, (int64_t)count * (int64_t)sizeof(record));
    memcpy(copy, bytes, (size_t)count * RECORD_BYTES); /* the bytes need not be aligned */
    return copy;
}

static int32_t load(const uint8_t *address, int32_t dtype) {
    int16_t wide;
    if (dtype != INT16) return dtype == INT8 ? (int8_t)*address : *address;
    memcpy(&wide, address, sizeof wide);
    return wide;
}

/* out[i] of the OFM's type. */
static void put(uint8_t *out, int32_t i, int32_t value) {
    int16_t wide = (int16_t)value;
    if (ofm.dtype == INT16)
        memcpy(out + 2 * (int64_t)i, &wide, sizeof wide);
    else
        out[i] = (uint8_t)value;
}

/* out[i] = in[i] - zero_point */
static void widen(const uint8_t *in, int16_t *out, int64_t count, int32_t dtype, int32_t zero_point) {
    int16_t zero = (int16_t)zero_point;
    if (dtype == INT16) {
        memcpy(out, in, (size_t)count * sizeof *out);
    } else if (dtype == INT8) {
        const int8_t *narrow = (const int8_t *)in;
        for (int64_t i = 0; i < count; ++i) out[i] = (int16_t)(narrow[i] - zero);
    } else {
        for (int64_t i = 0; i < count; ++i) out[i] = (int16_t)(in[i] - zero);
    }
}

/* The IFM as int16 without its zero point, [height, width, depth], its pixel (0, 0) at (top, left), zeros around. */
static int16_t *padded_ifm(int32_t height, int32_t width, int32_t top, int32_t left) {
    const feature_map *m = &ifm[0];
    if (m->stride_c == 0) fail("this operation needs an IFM with depth");
    int64_t row = (int64_t)width * m->depth;
    int16_t *padded = arena(PADDED, height * row * (int64_t)sizeof(int16_t));
    for (int32_t y = 0; y < height; ++y) {
        int16_t *out = padded + y * row;
        int32_t in_y = y - top;
        int32_t first = left > 0 ? left : 0;
        int32_t last = left + m->width < width ? left + m->width : width; /* exclusive */
        if (in_y < 0 || in_y >= m->height || first >= last) {
            memset(out, 0, (size_t)row * sizeof *out);
            continue;
        }
        memset(out, 0, (size_t)first * m->depth * sizeof *out);
        memset(out + (int64_t)last * m->depth, 0, (size_t)(width - last) * m->depth * sizeof *out);
        const uint8_t *in = pixel_of(m, in_y, first - left);
        if (m->stride_x == m->depth * m->stride_c)
            widen(in, out + (int64_t)first * m->depth, (int64_t)(last - first) * m->depth, m->dtype, m->zero_point);
        else
            for (int32_t x = first; x < last; ++x, in += m->stride_x)
                widen(in, out + (int64_t)x * m->depth, m->depth, m->dtype, m->zero_point);
    }
    return padded;
}

/* Filters of which two weights in four are kept, first all kept ones, then a nibble for each four that says where. */
static int16_t *sparse_weights(int64_t outputs, int64_t taps) {
    int64_t blocks = taps / 4, filter_bytes = 2 * blocks + (blocks + 1) / 2;
    if (taps % 4 || weights.zero_point) fail("2:4 weights need depths that are multiples of 4, and no zero point");
    const uint8_t *bytes = touch_run("the weights", weights.base, weights.offset, outputs * filter_bytes);
    int16_t *wide = arena(FILTERS, outputs * taps * (int64_t)sizeof(int16_t));
    memset(wide, 0, (size_t)(outputs * taps) * sizeof *wide);
    for (int64_t o = 0; o < outputs; ++o, bytes += filter_bytes)
        for (int64_t block = 0; block < blocks; ++block) {
            int32_t places = bytes[2 * blocks + block / 2] >> (block % 2 ? 4 : 0) & 15;
            int16_t *four = wide + o * taps + 4 * block;
            four[places & 3] = (int8_t)bytes[2 * block];
            four[places >> 2] = (int8_t)bytes[2 * block + 1];
        }
    return wide;
}

/* The weights as int16 without their zero point: `outputs` filters of `taps`, `depth` of them side by side. */
static int16_t *wide_weights(int64_t outputs, int64_t taps, int32_t depth) {
    if (weights.dtype == INT8_2OF4) return sparse_weights(outputs, taps);
    int32_t bits = weights.dtype == INT4 ? 4 : weights.dtype == INT2 ? 2 : weights.dtype == INT1 ? 1 : 8;
    int32_t factor_bits = bits == 4 ? 4 : 8, in_run = weights.group ? (depth + weights.group - 1) / weights.group : 0;
    int64_t code_bytes = (taps * bits + 7) / 8;
    int64_t filter_bytes = code_bytes + (taps / depth * in_run * factor_bits + 7) / 8;
    const uint8_t *bytes = touch_run("the weights", weights.base, weights.offset, outputs * filter_bytes);
    int16_t *wide = arena(FILTERS, outputs * taps * (int64_t)sizeof(int16_t));
    if (bits == 8) {
        widen(bytes, wide, outputs * taps, weights.dtype, weights.zero_point);
        return wide;
    }
    int32_t sign = 1 << (bits - 1);
    for (int64_t o = 0; o < outputs; ++o)
        for (int64_t tap = 0; tap < taps; ++tap) {
            int32_t code = bytes[o * filter_bytes + tap * bits / 8] >> (tap * bits % 8) & (2 * sign - 1);
            int32_t value = bits == 1 ? 2 * code - 1 : (code ^ sign) - sign;
            if (weights.group) {
                int64_t at = (tap / depth * in_run + tap % depth / weights.group) * factor_bits;
                const uint8_t *factors = bytes + o * filter_bytes + code_bytes;
                value *= (factors[at / 8] >> (at % 8) & ((1 << factor_bits) - 1)) + 1;
            }
            wide[o * taps + tap] = (int16_t)(value - weights.zero_point);
        }
    return wide;
}

static int32_t finish(int64_t rescaled) { return qarith_clamp(rescaled + ofm.zero_point, clamp_min, clamp_max); }

/* One pixel of the output stage, of sums that wrap to 32 bits; `step` 1: a record a channel, 0: one record for all. */
static void write_pixel(uint8_t *out, const int64_t *sums, int32_t depth, const record *records, int32_t step) {
    float real;
    switch (scales.variant) {
    case QARITH_FLOAT32:
        for (int32_t c = 0; c < depth; ++c) {
            memcpy(&real, &records[c * step].multiplier, sizeof real);
            put(out, c, finish(qarith_rescale_float32(qarith_wrap_int32(sums[c]), real)));
        }
        break;
    case QARITH_TFLITE:
        for (int32_t c = 0; c < depth; ++c)
            put(out, c, finish(qarith_rescale_tflite(qarith_wrap_int32(sums[c]), records[c * step].multiplier,
                                                     records[c * step].shift)));
        break;
    case QARITH_TOSA:
        for (int32_t c = 0; c < depth; ++c)
            put(out, c, finish(qarith_rescale_tosa(qarith_wrap_int32(sums[c]), records[c * step].multiplier,
                                                   records[c * step].shift)));
        break;
    default:
        for (int32_t c = 0; c < depth; ++c)
            put(out, c, finish(qarith_rescale_shift(qarith_wrap_int32(sums[c]), records[c * step].shift)));
    }
}

/* The output stage of sums over a window, which have 48 bits if the IFM has 16. */
static void write_sums(uint8_t *out, const int64_t *sums, const record *records, int32_t step) {
    if (ifm[0].dtype != INT16) {
        write_pixel(out, sums, ofm.depth, records, step);
        return;
    }
    for (int32_t c = 0; c < ofm.depth; ++c) {
        const record *r = &records[c * step];
        put(out, c, finish(qarith_rescale_wide(sums[c], r->multiplier, r->shift, scales.variant)));
    }
}

static int is_nothing(const feature_map *m) { return m->height == 0 || m->width == 0 || m->depth == 0; }

/* Positions of the padded IFM along an axis that the windows of `outputs` need. */
static int32_t covered(int32_t outputs, int32_t stride, int32_t taps, int32_t dilation) {
    return (outputs - 1) * stride + (taps - 1) * dilation + 1;
}

/* --- convolution --- */

enum { EXACT_PRODUCTS = 256 }; /* so many of 16 by 9 bits, signed, add up in 32 */

static int64_t dot(const int16_t *a, const int16_t *b, int64_t count) {
    int64_t total = 0;
    for (int64_t first = 0; first < count; first += EXACT_PRODUCTS) {
        int64_t last = first + EXACT_PRODUCTS < count ? first + EXACT_PRODUCTS : count;
        int32_t sum = 0;
        for (int64_t i = first; i < last; ++i) sum += (int32_t)a[i] * b[i];
        total += sum;
    }
    return total;
}

/* sums[k] += a · filter k for four filters `stride` apart; at most EXACT_PRODUCTS products each. */
static void dot4(const int16_t *a, const int16_t *b, int64_t stride, int64_t count, int64_t *sums) {
    int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    const int16_t *b1 = b + stride, *b2 = b1 + stride, *b3 = b2 + stride;
    for (int64_t i = 0; i < count; ++i) {
        s0 += (int32_t)a[i] * b[i];
        s1 += (int32_t)a[i] * b1[i];
        s2 += (int32_t)a[i] * b2[i];
        s3 += (int32_t)a[i] * b3[i];
    }
    sums[0] += s0;
    sums[1] += s1;
    sums[2] += s2;
    sums[3] += s3;
}

/* sums[o] += patch · filters[o] for `outputs` filters of `count` taps. */
static void multiply(const int16_t *patch, const int16_t *filters, int64_t count, int32_t outputs, int64_t *sums) {
    int32_t o = 0;
    for (; o + 4 <= outputs; o += 4)
        for (int64_t first = 0; first < count; first += EXACT_PRODUCTS)
            dot4(patch + first, filters + o * count + first, count,
                 first + EXACT_PRODUCTS < count ? EXACT_PRODUCTS : count - first, sums + o);
    for (; o < outputs; ++o) sums[o] += dot(patch, filters + o * count, count);
}

/* Checks a convolution's groups; returns their number. */
static int32_t group_count(int32_t ifm_group_depth, int32_t ofm_group_depth) {
    if (ifm_group_depth < 1 || ofm_group_depth < 1 || ofm.depth % ofm_group_depth != 0 ||
        ifm[0].depth != ofm.depth / ofm_group_depth * ifm_group_depth)
        fail("groups of %d and %d channels do not divide an IFM of %d and an OFM of %d", ifm_group_depth,
             ofm_group_depth, ifm[0].depth, ofm.depth);
    return ofm.depth / ofm_group_depth;
}

static void depthwise_pixel(const int16_t *padded, int64_t row, const int16_t *by_tap, int64_t *sums) {
    int32_t depth = ofm.depth;
    for (int32_t ky = 0; ky < kernel.height; ++ky)
        for (int32_t kx = 0; kx < kernel.width; ++kx) {
            const int16_t *in = padded + ky * kernel.dilation_y * row + (int64_t)kx * kernel.dilation_x * depth;
            const int16_t *taps = by_tap + (int64_t)(ky * kernel.width + kx) * depth;
            for (int32_t c = 0; c < depth; ++c) sums[c] += (int32_t)in[c] * taps[c];
        }
}

static void grouped_pixel(const int16_t *padded, int64_t row, const int16_t *filters, int32_t groups, int32_t in_depth,
                          int32_t out_depth, int16_t *patch, int64_t *sums) {
    int64_t taps = (int64_t)kernel.height * kernel.width * in_depth;
    for (int32_t group = 0; group < groups; ++group) {
        const int16_t *source = padded + (int64_t)group * in_depth;
        if (kernel.height * kernel.width > 1) {
            int16_t *out = patch;
            int32_t runs = groups == 1 && kernel.dilation_x == 1 ? 1 : kernel.width; /* joined along x */
            int64_t run = (int64_t)kernel.width * in_depth / runs;
            for (int32_t ky = 0; ky < kernel.height; ++ky)
                for (int32_t kx = 0; kx < runs; ++kx, out += run)
                    memcpy(out, source + ky * kernel.dilation_y * row + (int64_t)kx * kernel.dilation_x * ifm[0].depth,
                           (size_t)run * sizeof *out);
            source = patch;
        }
        multiply(source, filters + group * out_depth * taps, taps, out_depth, sums + group * out_depth);
    }
}

int32_t qrt_conv(int32_t ifm_group_depth, int32_t ofm_group_depth) {
    BEGIN(CONV, "conv", ifm_group_depth, ofm_group_depth);
    touch_map("the IFM", &ifm[0], 0);
    touch_map("the OFM", &ofm, 1);
    if (is_nothing(&ofm)) return 0;
    int32_t groups = group_count(ifm_group_depth, ofm_group_depth);
    int64_t taps = (int64_t)kernel.height * kernel.width * ifm_group_depth;
    const record *records = read_records(ofm.depth);
    int16_t *filters = wide_weights(ofm.depth, taps, ifm_group_depth);
    int32_t width = covered(ofm.width, kernel.stride_x, kernel.width, kernel.dilation_x);
    int64_t row = (int64_t)width * ifm[0].depth;
    const int16_t *padded = padded_ifm(covered(ofm.height, kernel.stride_y, kernel.height, kernel.dilation_y),
                                       width, kernel.pad_top, kernel.pad_left);
    int depthwise = ifm_group_depth == 1 && ofm_group_depth == 1;
    int16_t *patch = arena(PATCH, (depthwise ? ofm.depth * taps : taps) * (int64_t)sizeof(int16_t));
    if (depthwise) /* one row of channels per tap */
        for (int32_t c = 0; c < ofm.depth; ++c)
            for (int64_t tap = 0; tap < taps; ++tap) patch[tap * ofm.depth + c] = filters[c * taps + tap];
    int64_t *sums = arena(SUMS, ofm.depth * (int64_t)sizeof *sums);
    for (int32_t y = 0; y < ofm.height; ++y)
        for (int32_t x = 0; x < ofm.width; ++x) {
            const int16_t *corner = padded + y * kernel.stride_y * row + (int64_t)x * kernel.stride_x * ifm[0].depth;
            for (int32_t c = 0; c < ofm.depth; ++c) sums[c] = records[c].bias;
            if (depthwise)
                depthwise_pixel(corner, row, patch, sums);
            else
                grouped_pixel(corner, row, filters, groups, ifm_group_depth, ofm_group_depth, patch, sums);
            write_sums(pixel_of(&ofm, y, x), sums, records, 1);
        }
    return 0;
}

int32_t qrt_conv_transpose(int32_t ifm_group_depth, int32_t ofm_group_depth) {
    BEGIN(CONV_TRANSPOSE, "conv_transpose", ifm_group_depth, ofm_group_depth);
    touch_map("the IFM", &ifm[0], 0);
    touch_map("the OFM", &ofm, 1);
    if (is_nothing(&ofm)) return 0;
    int32_t groups = group_count(ifm_group_depth, ofm_group_depth);
    int64_t taps = (int64_t)kernel.height * kernel.width * ifm_group_depth;
    const record *records = read_records(ofm.depth);
    const int16_t *filters = wide_weights(ofm.depth, taps, ifm_group_depth);
    const int16_t *wide = padded_ifm(ifm[0].height, ifm[0].width, 0, 0);
    int64_t *sums = arena(SUMS, (int64_t)ofm.height * ofm.width * ofm.depth * (int64_t)sizeof *sums);
    for (int64_t pixel = 0; pixel < (int64_t)ofm.height * ofm.width; ++pixel)
        for (int32_t c = 0; c < ofm.depth; ++c) sums[pixel * ofm.depth + c] = records[c].bias;
    for (int32_t y = 0; y < ifm[0].height; ++y)
        for (int32_t x = 0; x < ifm[0].width; ++x)
            for (int32_t ky = 0; ky < kernel.height; ++ky)
                for (int32_t kx = 0; kx < kernel.width; ++kx) {
                    int32_t oy = y * kernel.stride_y + ky * kernel.dilation_y - kernel.pad_top;
                    int32_t ox = x * kernel.stride_x + kx * kernel.dilation_x - kernel.pad_left;
                    if (oy < 0 || oy >= ofm.height || ox < 0 || ox >= ofm.width) continue;
                    const int16_t *pixel = wide + ((int64_t)y * ifm[0].width + x) * ifm[0].depth;
                    int64_t *sum = sums + ((int64_t)oy * ofm.width + ox) * ofm.depth;
                    const int16_t *tap = filters + (int64_t)(ky * kernel.width + kx) * ifm_group_depth;
                    for (int32_t group = 0; group < groups; ++group)
                        for (int32_t o = group * ofm_group_depth; o < (group + 1) * ofm_group_depth; ++o)
                            sum[o] += dot(pixel + group * ifm_group_depth, tap + o * taps, ifm_group_depth);
                }
    for (int32_t y = 0; y < ofm.height; ++y)
        for (int32_t x = 0; x < ofm.width; ++x)
            write_sums(pixel_of(&ofm, y, x), sums + ((int64_t)y * ofm.width + x) * ofm.depth, records, 1);
    return 0;
}

/* --- pools --- */

static void check_same_depth(void) {
    if (ifm[0].depth != ofm.depth) fail("the IFM has %d channels and the OFM %d", ifm[0].depth, ofm.depth);
}

int32_t qrt_max_pool(void) {
    begin(MAX_POOL, "max_pool", NULL, 0);
    touch_map("the IFM", &ifm[0], 0);
    touch_map("the OFM", &ofm, 1);
    if (is_nothing(&ofm)) return 0;
    check_same_depth();
    int32_t zero_point = ifm[0].zero_point;
    ifm[0].zero_point = 0; /* values are compared as they are */
    const int16_t *wide = padded_ifm(ifm[0].height, ifm[0].width, 0, 0);
    ifm[0].zero_point = zero_point;
    int16_t *best = arena(PATCH, ofm.depth * (int64_t)sizeof(int16_t));
    for (int32_t y = 0; y < ofm.height; ++y)
        for (int32_t x = 0; x < ofm.width; ++x) {
            for (int32_t c = 0; c < ofm.depth; ++c) best[c] = INT16_MIN;
            for (int32_t ky = 0; ky < kernel.height; ++ky)
                for (int32_t kx = 0; kx < kernel.width; ++kx) {
                    int32_t iy = y * kernel.stride_y + ky * kernel.dilation_y - kernel.pad_top;
                    int32_t ix = x * kernel.stride_x + kx * kernel.dilation_x - kernel.pad_left;
                    if (iy < 0 || iy >= ifm[0].height || ix < 0 || ix >= ifm[0].width) continue;
                    const int16_t *pixel = wide + ((int64_t)iy * ifm[0].width + ix) * ofm.depth;
                    for (int32_t c = 0; c < ofm.depth; ++c) best[c] = pixel[c] > best[c] ? pixel[c] : best[c];
                }
            uint8_t *to = pixel_of(&ofm, y, x);
            for (int32_t c = 0; c < ofm.depth; ++c) put(to, c, qarith_clamp(best[c], clamp_min, clamp_max));
        }
    return 0;
}

int32_t qrt_average_pool(int32_t count_include_pad) {
    BEGIN(AVERAGE_POOL, "average_pool", count_include_pad);
    touch_map("the IFM", &ifm[0], 0);
    touch_map("the OFM", &ofm, 1);
    if (is_nothing(&ofm)) return 0;
    check_same_depth();
    const record *records = read_records(count_include_pad ? 1 : kernel.height * kernel.width);
    const int16_t *wide = padded_ifm(ifm[0].height, ifm[0].width, 0, 0);
    int64_t *sums = arena(SUMS, ofm.depth * (int64_t)sizeof *sums);
    for (int32_t y = 0; y < ofm.height; ++y)
        for (int32_t x = 0; x < ofm.width; ++x) {
            int32_t count = 0;
            memset(sums, 0, (size_t)ofm.depth * sizeof *sums);
            for (int32_t ky = 0; ky < kernel.height; ++ky)
                for (int32_t kx = 0; kx < kernel.width; ++kx) {
                    int32_t iy = y * kernel.stride_y + ky * kernel.dilation_y - kernel.pad_top;
                    int32_t ix = x * kernel.stride_x + kx * kernel.dilation_x - kernel.pad_left;
                    if (iy < 0 || iy >= ifm[0].height || ix < 0 || ix >= ifm[0].width) continue;
                    const int16_t *pixel = wide + ((int64_t)iy * ifm[0].width + ix) * ofm.depth;
                    for (int32_t c = 0; c < ofm.depth; ++c) sums[c] += pixel[c];
                    ++count;
                }
            if (count == 0 && !count_include_pad) fail("the window of output (%d, %d) holds no element", y, x);
            write_sums(pixel_of(&ofm, y, x), sums, records + (count_include_pad ? 0 : count - 1), 0);
        }
    return 0;
}

/* --- elementwise --- */

static void check_same_size(int32_t slot) {
    const feature_map *m = &ifm[slot];
    if (m->height != ofm.height || m->width != ofm.width || m->depth != ofm.depth)
        fail("IFM %d is %d x %d x %d and the OFM %d x %d x %d", slot, m->height, m->width, m->depth, ofm.height,
             ofm.width, ofm.depth);
}

int32_t qrt_add(int32_t subtract, int32_t multiplier_a, int32_t shift_a, int32_t multiplier_b, int32_t shift_b,
                int32_t multiplier_y, int32_t shift_y, int32_t variant) {
    BEGIN(ADD, "add", subtract, multiplier_a, shift_a, multiplier_b, shift_b, multiplier_y, shift_y, variant);
    touch_map("IFM 0", &ifm[0], 0);
    touch_map("IFM 1", &ifm[1], 0);
    touch_map("the OFM", &ofm, 1);
    check_same_size(0);
    check_same_size(1);
    int32_t bits = 8 * element_bytes(ifm[0].dtype);
    if (element_bytes(ifm[1].dtype) * 8 != bits) fail("the operands have different widths");
    const qarith_add_factors factors = {multiplier_a, shift_a, multiplier_b, shift_b, multiplier_y, shift_y};
    for (int32_t y = 0; y < ofm.height; ++y)
        for (int32_t x = 0; x < ofm.width; ++x) {
            const uint8_t *pa = pixel_of(&ifm[0], y, x), *pb = pixel_of(&ifm[1], y, x);
            uint8_t *to = pixel_of(&ofm, y, x);
            for (int32_t c = 0; c < ofm.depth; ++c) {
                int32_t va = load(pa + (int64_t)c * ifm[0].stride_c, ifm[0].dtype) - ifm[0].zero_point;
                int32_t vb = load(pb + (int64_t)c * ifm[1].stride_c, ifm[1].dtype) - ifm[1].zero_point;
                put(to, c, finish(qarith_add(va, vb, bits, &factors, variant, subtract)));
            }
        }
    return 0;
}

int32_t qrt_mul(void) {
    begin(MUL, "mul", NULL, 0);
    touch_map("IFM 0", &ifm[0], 0);
    touch_map("IFM 1", &ifm[1], 0);
    touch_map("the OFM", &ofm, 1);
    check_same_size(0);
    check_same_size(1);
    const record *records = read_records(1);
    int64_t *products = arena(SUMS, ofm.depth * (int64_t)sizeof *products);
    for (int32_t y = 0; y < ofm.height; ++y)
        for (int32_t x = 0; x < ofm.width; ++x) {
            const uint8_t *pa = pixel_of(&ifm[0], y, x), *pb = pixel_of(&ifm[1], y, x);
            for (int32_t c = 0; c < ofm.depth; ++c)
                products[c] = (int64_t)(load(pa + (int64_t)c * ifm[0].stride_c, ifm[0].dtype) - ifm[0].zero_point) *
                              (load(pb + (int64_t)c * ifm[1].stride_c, ifm[1].dtype) - ifm[1].zero_point);
            write_pixel(pixel_of(&ofm, y, x), products, ofm.depth, records, 0);
        }
    return 0;
}

/* OFM = table[IFM's byte] */
static void map_bytes(const int32_t *table) {
    check_same_size(0);
    for (int32_t y = 0; y < ofm.height; ++y)
        for (int32_t x = 0; x < ofm.width; ++x) {
            const uint8_t *from = pixel_of(&ifm[0], y, x);
            uint8_t *to = pixel_of(&ofm, y, x);
            for (int32_t c = 0; c < ofm.depth; ++c) put(to, c, table[from[(int64_t)c * ifm[0].stride_c]]);
        }
}

int32_t qrt_requantize(void) {
    begin(REQUANTIZE, "requantize", NULL, 0);
    touch_map("the IFM", &ifm[0], 0);
    touch_map("the OFM", &ofm, 1);
    const record *first = read_records(1);
    if (ifm[0].dtype != INT16) {
        int32_t table[256];
        for (int32_t byte = 0; byte < 256; ++byte) {
            uint8_t bits = (uint8_t)byte;
            int32_t value = load(&bits, ifm[0].dtype) - ifm[0].zero_point;
            table[byte] = finish(qarith_rescale(value, first->multiplier, first->shift, scales.variant));
        }
        map_bytes(table);
        return 0;
    }
    check_same_size(0);
    for (int32_t y = 0; y < ofm.height; ++y)
        for (int32_t x = 0; x < ofm.width; ++x) {
            const uint8_t *from = pixel_of(&ifm[0], y, x);
            uint8_t *to = pixel_of(&ofm, y, x);
            for (int32_t c = 0; c < ofm.depth; ++c) {
                int32_t value = load(from + (int64_t)c * ifm[0].stride_c, INT16);
                put(to, c, finish(qarith_rescale(value, first->multiplier, first->shift, scales.variant)));
            }
        }
    return 0;
}

/* OFM = straight lines of a table at the IFM, both of 16 bits. */
static void interpolate(int32_t base, int32_t offset) {
    const uint8_t *bytes = touch_run("the table", base, offset, 2 * QARITH_ENTRIES);
    int32_t table[QARITH_ENTRIES];
    for (int32_t i = 0; i < QARITH_ENTRIES; ++i) table[i] = load(bytes + 2 * i, INT16);
    check_same_size(0);
    for (int32_t y = 0; y < ofm.height; ++y)
        for (int32_t x = 0; x < ofm.width; ++x) {
            const uint8_t *from = pixel_of(&ifm[0], y, x);
            uint8_t *to = pixel_of(&ofm, y, x);
            for (int32_t c = 0; c < ofm.depth; ++c)
                put(to, c, qarith_interpolate(load(from + (int64_t)c * ifm[0].stride_c, INT16), table));
        }
}

int32_t qrt_lookup(int32_t base, int32_t offset) {
    BEGIN(LOOKUP, "lookup", base, offset);
    touch_map("the IFM", &ifm[0], 0);
    touch_map("the OFM", &ofm, 1);
    if (ifm[0].dtype == INT16 || ofm.dtype == INT16) {
        if (ifm[0].dtype != ofm.dtype) fail("the IFM and the OFM are of different widths");
        interpolate(base, offset);
        return 0;
    }
    const uint8_t *bytes = touch_run("the table", base, offset, 256);
    /* Entry 0 answers the lowest value, which is -128 for int8. */
    int32_t table[256];
    for (int32_t byte = 0; byte < 256; ++byte) table[byte] = bytes[ifm[0].dtype == INT8 ? byte ^ 128 : byte];
    map_bytes(table);
    return 0;
}

static void softmax16_row(const uint8_t *from, uint8_t *to, int32_t largest, const int32_t *table) {
    int32_t *terms = arena(SUMS, ofm.depth * (int64_t)sizeof *terms), shift = 0;
    int64_t total = 0;
    for (int32_t c = 0; c < ofm.depth; ++c)
        total += terms[c] = qarith_softmax16_term(load(from + (int64_t)c * ifm[0].stride_c, INT16) - largest, table);
    if (total <= 0 || total > INT32_MAX) fail("a row's exponentials add to %lld", (long long)total);
    int32_t reciprocal = qarith_softmax16_reciprocal(total, table, &shift);
    for (int32_t c = 0; c < ofm.depth; ++c)
        put(to, c, qarith_clamp(qarith_softmax16(terms[c], reciprocal, shift), clamp_min, clamp_max));
}

int32_t qrt_softmax(int32_t base, int32_t offset, int32_t inverse_scale) {
    BEGIN(SOFTMAX, "softmax", base, offset, inverse_scale);
    touch_map("the IFM", &ifm[0], 0);
    touch_map("the OFM", &ofm, 1);
    const int wide = ifm[0].dtype == INT16;
    const int64_t entries = wide ? QARITH_SOFTMAX_ENTRIES : 256;
    const uint8_t *bytes = touch_run("the table", base, offset, entries * (int64_t)sizeof(int32_t));
    check_same_size(0);
    int32_t table[QARITH_SOFTMAX_ENTRIES];
    memcpy(table, bytes, (size_t)entries * sizeof *table);
    const int tflite = inverse_scale == 0; /* qcompiler.integer.ops.TFLITE_SOFTMAX */
    int32_t reciprocal = 0, shift = 0;
    for (int32_t y = 0; y < ofm.height; ++y)
        for (int32_t x = 0; x < ofm.width; ++x) {
            const uint8_t *from = pixel_of(&ifm[0], y, x);
            uint8_t *to = pixel_of(&ofm, y, x);
            int32_t largest = INT32_MIN;
            for (int32_t c = 0; c < ofm.depth; ++c) {
                int32_t value = load(from + (int64_t)c * ifm[0].stride_c, ifm[0].dtype);
                largest = value > largest ? value : largest;
            }
            int64_t total = 0;
            if (wide) {
                softmax16_row(from, to, largest, table);
                continue;
            }
            for (int32_t c = 0; c < ofm.depth; ++c) {
                int32_t exponential = table[largest - load(from + (int64_t)c * ifm[0].stride_c, ifm[0].dtype)];
                total += tflite ? qarith_tflite_softmax_term(exponential) : exponential;
            }
            if (tflite) reciprocal = qarith_tflite_softmax_reciprocal(total, &shift);
            for (int32_t c = 0; c < ofm.depth; ++c) {
                int32_t exponential = table[largest - load(from + (int64_t)c * ifm[0].stride_c, ifm[0].dtype)];
                int64_t value = tflite ? qarith_tflite_softmax(exponential, reciprocal, shift, ofm.zero_point)
                                       : qarith_softmax(exponential, total, inverse_scale, ofm.zero_point);
                put(to, c, qarith_clamp(value, clamp_min, clamp_max));
            }
        }
    return 0;
}

/* --- resize --- */

static int32_t table_entry(const uint8_t *table, int64_t index) {
    int32_t value;
    memcpy(&value, table + index * (int64_t)sizeof value, sizeof value);
    return value;
}

/* Entry `index` of a table of rows or columns, as a position inside the IFM tile. */
static int32_t position(const uint8_t *table, int64_t index, int32_t origin, int32_t size) {
    int32_t value = table_entry(table, index) - origin;
    if (value < 0 || value >= size) fail("table entry %lld points outside the IFM", (long long)index);
    return value;
}

int32_t qrt_resize_nearest(int32_t base, int32_t y_index, int32_t x_index, int32_t y_origin) {
    BEGIN(RESIZE_NEAREST, "resize_nearest", base, y_index, x_index, y_origin);
    touch_map("the IFM", &ifm[0], 0);
    touch_map("the OFM", &ofm, 1);
    if (is_nothing(&ofm)) return 0;
    check_same_depth();
    if (ifm[0].dtype != ofm.dtype) fail("the IFM and the OFM are of different types");
    const uint8_t *ys = touch_run("the table of rows", base, y_index, 4 * (int64_t)ofm.height);
    const uint8_t *xs = touch_run("the table of columns", base, x_index, 4 * (int64_t)ofm.width);
    for (int32_t y = 0; y < ofm.height; ++y)
        for (int32_t x = 0; x < ofm.width; ++x)
            memcpy(pixel_of(&ofm, y, x),
                   pixel_of(&ifm[0], position(ys, y, y_origin, ifm[0].height), position(xs, x, 0, ifm[0].width)),
                   (size_t)(ofm.depth * ofm.stride_c));
    return 0;
}

int32_t qrt_resize_linear(int32_t base, int32_t y_index, int32_t y_weight, int32_t x_index, int32_t x_weight,
                          int32_t y_origin) {
    BEGIN(RESIZE_LINEAR, "resize_linear", base, y_index, y_weight, x_index, x_weight, y_origin);
    touch_map("the IFM", &ifm[0], 0);
    touch_map("the OFM", &ofm, 1);
    if (is_nothing(&ofm)) return 0;
    check_same_depth();
    const uint8_t *ys = touch_run("the table of rows", base, y_index, 8 * (int64_t)ofm.height);
    const uint8_t *yw = touch_run("the table of row weights", base, y_weight, 8 * (int64_t)ofm.height);
    const uint8_t *xs = touch_run("the table of columns", base, x_index, 8 * (int64_t)ofm.width);
    const uint8_t *xw = touch_run("the table of column weights", base, x_weight, 8 * (int64_t)ofm.width);
    for (int32_t y = 0; y < ofm.height; ++y)
        for (int32_t x = 0; x < ofm.width; ++x) {
            const uint8_t *corner[4];
            int64_t weight[4];
            for (int32_t i = 0; i < 4; ++i) {
                int64_t row = 2 * (int64_t)y + i / 2, column = 2 * (int64_t)x + i % 2;
                corner[i] = pixel_of(&ifm[0], position(ys, row, y_origin, ifm[0].height),
                                     position(xs, column, 0, ifm[0].width));
                weight[i] = (int64_t)table_entry(yw, row) * table_entry(xw, column);
            }
            uint8_t *to = pixel_of(&ofm, y, x);
            for (int32_t c = 0; c < ofm.depth; ++c) {
                int64_t sum = (int64_t)1 << 21;
                for (int32_t i = 0; i < 4; ++i)
                    sum += weight[i] * load(corner[i] + (int64_t)c * ifm[0].stride_c, ifm[0].dtype);
                put(to, c, qarith_clamp(sum >> 22, clamp_min, clamp_max));
            }
        }
    return 0;
}
