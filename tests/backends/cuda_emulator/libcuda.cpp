// The part of the CUDA driver that runtime_stubs/gpu/cuda.c uses, on the CPU: a device whose memory is the host's and
// whose modules are shared libraries of kernels compiled as C++. "Code" to load is the path of such a library.
//
// The threads of a block are coroutines that run in turn up to the next barrier.
#include <dlfcn.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "cuda.h"

extern "C" {
Index3 threadIdx, blockIdx;
}

namespace {

constexpr std::size_t STACK = 256 * 1024;
constexpr int MOST_ARGUMENTS = 16;
using Kernel = void (*)(void *, void *, void *, void *, void *, void *, void *, void *, void *, void *, void *, void *,
                        void *, void *, void *, void *);

struct Thread {
    ucontext_t context;
    std::vector<char> stack;
    Index3 index;
    bool done;
};

struct Launch {
    Kernel kernel;
    Index3 grid, block;
    void *arguments[MOST_ARGUMENTS];
};

std::vector<Thread> threads;
ucontext_t scheduler;
Thread *running;
const Launch *current;
std::vector<Launch> *recording;

void body() {
    void *const *a = current->arguments;
    current->kernel(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14],
                    a[15]);
    running->done = true;
}

void run_block(const Launch &launch) {
    std::size_t count = std::size_t(launch.block.x) * launch.block.y * launch.block.z;
    threads.resize(count);
    current = &launch;
    for (std::size_t i = 0; i < count; ++i) {
        Thread &thread = threads[i];
        thread.index = {unsigned(i % launch.block.x), unsigned(i / launch.block.x % launch.block.y),
                        unsigned(i / launch.block.x / launch.block.y)};
        thread.stack.resize(STACK);
        thread.done = false;
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = STACK;
        thread.context.uc_link = &scheduler;
        makecontext(&thread.context, body, 0);
    }
    // Forwards up to one barrier and backwards up to the next: what depends on the order is seen.
    bool forwards = true;
    for (std::size_t left = count; left > 0; forwards = !forwards) {
        std::size_t finished = 0;
        for (std::size_t i = 0; i < count; ++i) {
            Thread &thread = threads[forwards ? i : count - 1 - i];
            running = &thread;
            threadIdx = thread.index;
            if (!thread.done) swapcontext(&scheduler, &thread.context);
            if (thread.done) ++finished;
        }
        left = count - finished;
        if (left != 0 && left != count) {
            std::fprintf(stderr, "some threads of a block wait at a barrier that others never reach\n");
            std::abort();
        }
    }
}

void run(const Launch &launch) {
    for (unsigned z = 0; z < launch.grid.z; ++z)
        for (unsigned y = 0; y < launch.grid.y; ++y)
            for (unsigned x = 0; x < launch.grid.x; ++x) {
                blockIdx = {x, y, z};
                run_block(launch);
            }
}

}  // namespace

extern "C" {

void emulator_barrier() { swapcontext(&running->context, &scheduler); }

int cuInit(unsigned) { return 0; }
int cuGetErrorString(int, const char **text) { return *text = "emulated", 0; }
int cuDeviceGetCount(int *count) { return *count = 1, 0; }
int cuDeviceGet(int *device, int) { return *device = 0, 0; }
int cuDeviceGetName(char *name, int size, int) { return std::snprintf(name, std::size_t(size), "CUDA emulator"), 0; }
int cuDeviceGetAttribute(int *value, int, int) { return *value = 8, 0; }
int cuDevicePrimaryCtxRetain(void **context, int) { return *context = &scheduler, 0; }
int cuCtxSetCurrent(void *) { return 0; }
int cuStreamCreate(void **stream, unsigned) { return *stream = &scheduler, 0; }
int cuStreamSynchronize(void *) { return 0; }
int cuModuleLoadData(void **module, const void *path) {
    *module = dlopen(static_cast<const char *>(path), RTLD_NOW | RTLD_LOCAL);
    if (*module == nullptr) std::fprintf(stderr, "%s\n", dlerror());
    return *module == nullptr ? 209 : 0;
}
int cuModuleUnload(void *module) { return dlclose(module); }
int cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = dlsym(module, name);
    return *function == nullptr;
}
int cuMemAlloc_v2(std::uint64_t *pointer, std::size_t bytes) {
    void *memory = std::aligned_alloc(512, (bytes + 511) / 512 * 512);
    std::memset(memory, 0xA5, bytes);
    *pointer = reinterpret_cast<std::uint64_t>(memory);
    return 0;
}
int cuMemFree_v2(std::uint64_t pointer) { return std::free(reinterpret_cast<void *>(pointer)), 0; }
int cuMemcpyHtoDAsync_v2(std::uint64_t to, const void *from, std::size_t bytes, void *) {
    return std::memcpy(reinterpret_cast<void *>(to), from, bytes), 0;
}
int cuMemcpyDtoHAsync_v2(void *to, std::uint64_t from, std::size_t bytes, void *) {
    return std::memcpy(to, reinterpret_cast<void *>(from), bytes), 0;
}
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned, void *, void **arguments, void **) {
    Launch launch{reinterpret_cast<Kernel>(function), {gx, gy, gz}, {bx, by, bz}, {}};
    Dl_info info;
    if (dladdr(function, &info) == 0 || recording == nullptr) return 1;
    // The number of arguments is not told; what lies behind them is read and not used.
    for (int i = 0; i < MOST_ARGUMENTS; ++i) {
        if (arguments[i] == nullptr) break;
        std::memcpy(&launch.arguments[i], arguments[i], sizeof(void *));
    }
    recording->push_back(launch);
    return 0;
}
int cuStreamBeginCapture_v2(void *, int) { return recording = new std::vector<Launch>, 0; }
int cuStreamEndCapture(void *, void **graph) {
    *graph = recording;
    recording = nullptr;
    return 0;
}
int cuGraphInstantiateWithFlags(void **instance, void *graph, unsigned long long) {
    *instance = new std::vector<Launch>(*static_cast<std::vector<Launch> *>(graph));
    return 0;
}
int cuGraphDestroy(void *graph) { return delete static_cast<std::vector<Launch> *>(graph), 0; }
int cuGraphExecDestroy(void *graph) { return delete static_cast<std::vector<Launch> *>(graph), 0; }
int cuGraphLaunch(void *graph, void *) {
    for (const Launch &launch : *static_cast<std::vector<Launch> *>(graph)) run(launch);
    return 0;
}
}
