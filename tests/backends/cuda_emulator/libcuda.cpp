// The part of the CUDA driver that runtime_stubs/gpu/cuda.c uses, on the CPU: a device whose memory is the host's and
// whose modules are shared libraries of kernels compiled as C++. "Code" to load is the path of such a library.
//
// The threads of a block are coroutines that run in turn up to the next barrier, or to what a warp does together.
#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <vector>

#include "cuda.h"

extern "C" {
Index3 threadIdx, blockIdx, gridDim;
}

namespace {

constexpr std::size_t STACK = 256 * 1024;
constexpr int MOST_ARGUMENTS = 16;
using Kernel = void (*)(void *, void *, void *, void *, void *, void *, void *, void *, void *, void *, void *, void *,
                        void *, void *, void *, void *);

enum class State { Ready, AtBarrier, InWarp, Done };

struct Copy {
    void *to;
    const void *from;
    unsigned bytes, batch;
};

struct Thread {
    ucontext_t context;
    std::vector<char> stack;
    Index3 index;
    unsigned number;
    State state;
    unsigned exchanges, batches, copies;
    std::vector<Copy> pending;
    bool may_read;
};

// What the lanes of a warp show each other. Two, since one may be at the next exchange while another reads the last.
struct Exchange {
    Registers shown[2][LANES];
    unsigned arrived[2], number[2];
};

struct Launch {
    Kernel kernel;
    Index3 grid, block;
    bool overlaps;
    void *arguments[MOST_ARGUMENTS];
};

using Graph = std::vector<std::function<void()>>;

constexpr std::size_t PAGE = 4096;
struct Memory {
    std::size_t bytes;
    bool changes; // what has been cleared is what kernels write; constants are not
};

std::map<std::uint64_t, Memory> memories;
bool readable = true;
std::vector<Thread> threads;
std::vector<Exchange> warps;
ucontext_t scheduler;
Thread *running;
const Launch *current;
Graph *recording;

void body() {
    void *const *a = current->arguments;
    current->kernel(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14],
                    a[15]);
    running->state = State::Done;
}

// A kernel that starts before the one before it is done finds what that one writes out of reach until it has waited.
void reach(bool may_read) {
    if (may_read == readable) return;
    readable = may_read;
    for (const auto &[address, memory] : memories)
        if (memory.changes)
            mprotect(reinterpret_cast<void *>(address), memory.bytes, may_read ? PROT_READ | PROT_WRITE : PROT_NONE);
}

int enqueue(std::function<void()> work) {
    if (recording == nullptr)
        work();
    else
        recording->push_back(work);
    return 0;
}

void leave(State state) {
    Thread *thread = running;
    thread->state = state;
    swapcontext(&thread->context, &scheduler);
}

bool can_go_on(const Thread &thread) {
    if (thread.state != State::InWarp) return thread.state == State::Ready;
    return warps[thread.number / LANES].arrived[thread.exchanges % 2] == LANES;
}

void run_block(const Launch &launch) {
    std::size_t count = std::size_t(launch.block.x) * launch.block.y * launch.block.z;
    if (threads.size() < count) threads.resize(count);
    warps.assign((count + LANES - 1) / LANES, Exchange{});
    current = &launch;
    for (std::size_t i = 0; i < count; ++i) {
        Thread &thread = threads[i];
        thread.index = {unsigned(i % launch.block.x), unsigned(i / launch.block.x % launch.block.y),
                        unsigned(i / launch.block.x / launch.block.y)};
        thread.number = unsigned(i);
        thread.exchanges = thread.batches = thread.copies = 0;
        thread.pending.clear();
        thread.may_read = !launch.overlaps;
        thread.stack.resize(STACK);
        thread.state = State::Ready;
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = STACK;
        thread.context.uc_link = &scheduler;
        makecontext(&thread.context, body, 0);
    }
    // Forwards and backwards in turn: what depends on the order is seen.
    bool forwards = true;
    for (std::size_t done = 0; done < count; forwards = !forwards) {
        bool moved = false;
        std::size_t waiting = 0;
        done = 0;
        for (std::size_t i = 0; i < count; ++i) {
            Thread &thread = threads[forwards ? i : count - 1 - i];
            running = &thread;
            threadIdx = thread.index;
            if (can_go_on(thread)) {
                moved = true;
                reach(thread.may_read);
                swapcontext(&scheduler, &thread.context);
            }
            done += thread.state == State::Done;
            waiting += thread.state == State::AtBarrier;
        }
        if (waiting == count)
            for (std::size_t i = 0; i < count; ++i) threads[i].state = State::Ready;
        else if (!moved && done < count) {
            std::fprintf(stderr, "some threads of a block wait for others that never come\n");
            std::abort();
        }
    }
}

void run(const Launch &launch) {
    for (unsigned z = 0; z < launch.grid.z; ++z)
        for (unsigned y = 0; y < launch.grid.y; ++y)
            for (unsigned x = 0; x < launch.grid.x; ++x) {
                gridDim = launch.grid;
                blockIdx = {x, y, z};
                run_block(launch);
            }
    reach(true);
}

int launch(void *function, const unsigned *grid, const unsigned *block, bool overlaps, void **arguments) {
    Launch made{reinterpret_cast<Kernel>(function), {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]},
                overlaps, {}};
    // The number of arguments is not told; a null pointer comes after the last.
    for (int i = 0; i < MOST_ARGUMENTS; ++i) {
        if (arguments[i] == nullptr) break;
        std::memcpy(&made.arguments[i], arguments[i], sizeof(void *));
    }
    return enqueue([made] { run(made); });
}

}  // namespace

extern "C" {

void emulator_barrier() { leave(State::AtBarrier); }

const Registers *emulator_exchange(const Registers *own) {
    Thread *thread = running;
    Exchange &warp = warps[thread->number / LANES];
    unsigned slot = thread->exchanges % 2;
    if (warp.number[slot] != thread->exchanges) {
        warp.number[slot] = thread->exchanges;
        warp.arrived[slot] = 0;
    }
    warp.shown[slot][thread->number % LANES] = *own;
    if (++warp.arrived[slot] < LANES) leave(State::InWarp);
    ++thread->exchanges;
    return warp.shown[slot];
}

void emulator_wait() { reach(running->may_read = true); }

void emulator_copy(void *to, const void *from, unsigned bytes) {
    if ((running->number + running->copies++) % 2 == 0)
        std::memcpy(to, from, bytes);
    else
        running->pending.push_back({to, from, bytes, running->batches});
}

void emulator_batch() { ++running->batches; }

void emulator_arrive(unsigned left) {
    std::vector<Copy> later;
    for (const Copy &copy : running->pending)
        if (copy.batch + left < running->batches)
            std::memcpy(copy.to, copy.from, copy.bytes);
        else
            later.push_back(copy);
    running->pending = later;
}

int cuInit(unsigned) { return 0; }
int cuGetErrorString(int, const char **text) { return *text = "emulated", 0; }
int cuDeviceGetCount(int *count) { return *count = 1, 0; }
int cuDeviceGet(int *device, int) { return *device = 0, 0; }
int cuDeviceGetName(char *name, int size, int) { return std::snprintf(name, std::size_t(size), "CUDA emulator"), 0; }
// sm_90, where kernels may overlap.
int cuDeviceGetAttribute(int *value, int attribute, int) { return *value = attribute == 75 ? 9 : 0, 0; }
int cuDevicePrimaryCtxRetain(void **context, int) { return *context = &scheduler, 0; }
int cuCtxSetCurrent(void *) { return 0; }
int cuStreamCreate(void **stream, unsigned) { return *stream = &scheduler, 0; }
int cuStreamSynchronize(void *) { return 0; }
int cuModuleLoadData(void **module, const void *path) {
    // Kernels find threadIdx and the like here.
    Dl_info own;
    dladdr(reinterpret_cast<void *>(&cuModuleLoadData), &own);
    dlopen(own.dli_fname, RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD);
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
    std::size_t whole = (bytes + PAGE - 1) / PAGE * PAGE;
    void *memory = std::aligned_alloc(PAGE, whole);
    std::memset(memory, 0xA5, whole);
    *pointer = reinterpret_cast<std::uint64_t>(memory);
    memories[*pointer] = {whole, false};
    return 0;
}
int cuMemFree_v2(std::uint64_t pointer) {
    memories.erase(pointer);
    return std::free(reinterpret_cast<void *>(pointer)), 0;
}
int cuMemHostAlloc(void **pointer, std::size_t bytes, unsigned) { return *pointer = std::malloc(bytes), 0; }
int cuMemFreeHost(void *pointer) { return std::free(pointer), 0; }
int cuEventCreate(void **event, unsigned) { return *event = &scheduler, 0; }
int cuEventDestroy_v2(void *) { return 0; }
int cuEventRecord(void *, void *) { return 0; }
int cuEventElapsedTime(float *milliseconds, void *, void *) { return *milliseconds = 1, 0; }
int cuMemsetD8Async(std::uint64_t pointer, unsigned char byte, std::size_t bytes, void *) {
    memories.at(pointer).changes = true;
    return enqueue([=] { std::memset(reinterpret_cast<void *>(pointer), byte, bytes); });
}
int cuMemcpyHtoDAsync_v2(std::uint64_t to, const void *from, std::size_t bytes, void *) {
    return enqueue([=] { std::memcpy(reinterpret_cast<void *>(to), from, bytes); });
}
int cuMemcpyDtoHAsync_v2(void *to, std::uint64_t from, std::size_t bytes, void *) {
    return enqueue([=] { std::memcpy(to, reinterpret_cast<void *>(from), bytes); });
}
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned, void *, void **arguments, void **) {
    unsigned grid[] = {gx, gy, gz}, block[] = {bx, by, bz};
    return launch(function, grid, block, false, arguments);
}
struct LaunchAttribute {
    int id, pad, number, room[15];
};
struct LaunchConfig {
    unsigned grid[3], block[3], shared_bytes;
    void *stream;
    const LaunchAttribute *attributes;
    unsigned count;
};
int cuLaunchKernelEx(const LaunchConfig *config, void *function, void **arguments, void **) {
    bool overlaps = config->count == 1 && config->attributes->id == 6 && config->attributes->number == 1;
    return launch(function, config->grid, config->block, overlaps, arguments);
}
int cuStreamBeginCapture_v2(void *, int) { return recording = new Graph, 0; }
int cuStreamEndCapture(void *, void **graph) {
    *graph = recording;
    recording = nullptr;
    return 0;
}
int cuGraphInstantiateWithFlags(void **instance, void *graph, unsigned long long) {
    *instance = new Graph(*static_cast<Graph *>(graph));
    return 0;
}
int cuGraphDestroy(void *graph) { return delete static_cast<Graph *>(graph), 0; }
int cuGraphExecDestroy(void *graph) { return delete static_cast<Graph *>(graph), 0; }
int cuGraphLaunch(void *graph, void *) {
    for (const auto &work : *static_cast<Graph *>(graph)) work();
    return 0;
}
}
