// An imitated CUDA runtime, loaded in front of libcudart, cuBLAS and NCCL. See README.md.
// The runtime imitates; it never measures. No figure from it may appear as a GPU figure.
//
// Kernels compute nothing, and what is copied to a device is lost: device memory holds zeros, so that all values are
// the same in every run. A copy to the host brings zeros, FAKEGPU_LAG_MS after it was submitted or as soon as the host
// waits for it. Until then the bytes at its destination are 0xff, which is NaN in every floating-point format. All
// streams of a process are one queue.
#include <cublas_v2.h>
#include <cuda_runtime_api.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

namespace {

long setting(const char *name, long otherwise) {
  const char *value = getenv(name);
  return value ? atol(value) : otherwise;
}

std::atomic<long> lag_ms{setting("FAKEGPU_LAG_MS", 0)};
std::atomic<long> memory_mb{setting("FAKEGPU_MEM_MB", 80 << 10)};
std::atomic<long> nccl_hang_s{setting("FAKEGPU_NCCL_HANG", 0)};
const int devices = setting("FAKEGPU_COUNT", 2);
const int capability = setting("FAKEGPU_CAPABILITY", 90);

const int max_threads = 1024, max_block_z = 64;
const unsigned max_grid_x = 2147483647, max_grid_yz = 65535;
const int shared_block = 48 << 10, registers = 64 << 10;
const int shared_optin = capability == 80 ? 163 << 10 : 227 << 10;  // most shared memory a block can ask for
const int processors = capability == 80 ? 108 : capability == 90 ? 132 : 148;

std::atomic<long> used{0}, launches{0}, refused{0}, waits{0};
thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t failed(cudaError_t error) { return last_error = error; }

double now_ms() {
  using namespace std::chrono;
  return duration<double, std::milli>(steady_clock::now().time_since_epoch()).count();
}

// ---- memory: device memory is ordinary memory, whose untouched pages cost nothing

enum Kind { pinned, device };
struct Area {
  size_t bytes;
  Kind kind;
  int device;
};
std::recursive_mutex mutex;
using Guard = std::lock_guard<std::recursive_mutex>;
std::map<uintptr_t, Area> areas;  // by first address

const Area *area_of(const void *pointer) {
  auto next = areas.upper_bound((uintptr_t)pointer);
  if (next == areas.begin()) return nullptr;
  auto &[first, area] = *--next;
  return (uintptr_t)pointer < first + area.bytes ? &area : nullptr;
}

cudaError_t allocate(void **pointer, size_t bytes, Kind kind) {
  Guard guard(mutex);
  size_t size = (bytes + 4096) & ~size_t(4095);
  if (kind == device && used + (long)size > memory_mb << 20) return failed(cudaErrorMemoryAllocation);
  void *memory =
      mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return failed(cudaErrorMemoryAllocation);
  if (kind == device) used += size;
  areas[(uintptr_t)memory] = {size, kind, current_device};
  *pointer = memory;
  return cudaSuccess;
}

// ---- the queue of copies from a device to the host; those to a device have no effect

struct Copy {
  unsigned long number;
  double due_ms;
  void *to;
  std::vector<char> bytes;
};
std::deque<Copy> queue;
unsigned long submitted = 0, done = 0;

// DDP uploads its list of gradient buckets, broadcasts it and reads it back: what was uploaded to a buffer and then
// broadcast can be read once, unless a kernel was launched in between, which may have written to the buffer.
std::map<const void *, std::vector<char>> uploaded, broadcast;

// Do the copies up to `number`, and those that are due.
void advance(unsigned long number = 0) {
  Guard guard(mutex);
  double now = now_ms();
  while (!queue.empty() && (queue.front().number <= number || queue.front().due_ms <= now)) {
    memcpy(queue.front().to, queue.front().bytes.data(), queue.front().bytes.size());
    done = queue.front().number;
    queue.pop_front();
  }
}

cudaError_t wait() {
  waits++;
  advance(~0ul);
  return cudaSuccess;
}

cudaError_t copy(void *to, const void *from, size_t bytes, bool async) {
  Guard guard(mutex);
  advance();
  const Area *target = area_of(to), *source = area_of(from);
  if (source && source->kind == device && !(target && target->kind == device)) {
    if (async && target) memset(to, 0xff, bytes);
    std::vector<char> content(bytes);
    if (auto found = broadcast.find(from); found != broadcast.end() && found->second.size() >= bytes) {
      memcpy(content.data(), found->second.data(), bytes);
      broadcast.erase(found);
    }
    queue.push_back({++submitted, now_ms() + lag_ms, to, content});
    if (!target) return wait();  // a copy into pageable memory blocks the host
  } else if (!(target && target->kind == device)) {
    memmove(to, from, bytes);
  } else if (!source || source->kind == pinned) {
    if (bytes <= 64 << 10) uploaded[to].assign((const char *)from, (const char *)from + bytes);
  }
  return async ? cudaSuccess : wait();
}

cudaError_t release(void *pointer) {
  if (!pointer) return cudaSuccess;
  Guard guard(mutex);
  wait();
  auto found = areas.find((uintptr_t)pointer);
  if (found == areas.end()) return failed(cudaErrorInvalidValue);
  if (found->second.kind == device) used -= found->second.bytes;
  munmap(pointer, found->second.bytes);
  areas.erase(found);
  return cudaSuccess;
}

struct Event {
  unsigned long number = 0;  // the last copy submitted before it
};

// ---- launches

cudaError_t launch(dim3 grid, dim3 block, size_t shared) {
  Guard guard(mutex);
  advance();
  uploaded.clear();
  broadcast.clear();
  launches++;
  bool fits = grid.x && grid.y && grid.z && block.x && block.y && block.z && grid.x <= max_grid_x &&
              grid.y <= max_grid_yz && grid.z <= max_grid_yz && block.z <= (unsigned)max_block_z &&
              (size_t)block.x * block.y * block.z <= (size_t)max_threads && shared <= (size_t)shared_optin;
  if (fits) return cudaSuccess;
  refused++;
  fprintf(stderr, "FAKEGPU refused a launch: grid %u %u %u, block %u %u %u, shared memory %zu\n", grid.x, grid.y,
          grid.z, block.x, block.y, block.z, shared);
  return failed(cudaErrorInvalidConfiguration);
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void *stream;
};
thread_local std::vector<Configuration> configurations;

cudaStream_t new_stream() { return (cudaStream_t) new long; }
int nothing() { return 0; }

}  // namespace

// ---- for child.py
API void fakegpu_set(long lag, long memory, long hang) {  // negative values leave a setting as it is
  if (lag >= 0) lag_ms = lag;
  if (memory >= 0) memory_mb = memory;
  if (hang >= 0) nccl_hang_s = hang;
}
API long fakegpu_launches() { return launches; }
API long fakegpu_refused() { return refused; }
API long fakegpu_waits() { return waits; }
API long fakegpu_used() { return used; }

// ---- devices and errors
API cudaError_t cudaGetDeviceCount(int *count) { return *count = devices, cudaSuccess; }
API cudaError_t cudaGetDevice(int *number) { return *number = current_device, cudaSuccess; }
API cudaError_t cudaSetDevice(int number) {
  if (number < 0 || number >= devices) return failed(cudaErrorInvalidDevice);
  current_device = number;
  return cudaSuccess;
}
API cudaError_t cudaDriverGetVersion(int *version) { return *version = 13020, cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int *version) { return *version = 13020, cudaSuccess; }
API cudaError_t cudaPeekAtLastError() { return last_error; }
API cudaError_t cudaGetLastError() {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
API const char *cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess                     ? "no error"
         : error == cudaErrorMemoryAllocation     ? "out of memory"
         : error == cudaErrorInvalidConfiguration ? "invalid configuration argument"
                                                  : "an error of the imitated runtime";
}
API const char *cudaGetErrorName(cudaError_t error) { return error ? "cudaErrorImitated" : "cudaSuccess"; }
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int number) {
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "imitated GPU sm_%d", capability);
  p->uuid.bytes[0] = number;
  p->pciBusID = 10 + number;
  p->major = capability / 10;
  p->minor = capability % 10;
  p->totalGlobalMem = (size_t)memory_mb << 20;
  p->multiProcessorCount = processors;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = max_threads;
  p->maxThreadsDim[2] = max_block_z;
  p->warpSize = p->maxBlocksPerMultiProcessor = 32;
  p->maxGridSize[0] = max_grid_x;
  p->maxGridSize[1] = p->maxGridSize[2] = max_grid_yz;
  p->sharedMemPerBlock = shared_block;
  p->sharedMemPerBlockOptin = shared_optin;
  p->sharedMemPerMultiprocessor = shared_optin + 1024;
  p->regsPerBlock = p->regsPerMultiprocessor = registers;
  p->totalConstMem = 64 << 10;
  p->l2CacheSize = 50 << 20;
  p->memoryBusWidth = 5120;
  p->textureAlignment = 512;
  p->canMapHostMemory = p->concurrentKernels = p->unifiedAddressing = 1;
  p->asyncEngineCount = 3;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
  switch ((int)attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = max_threads; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMultiProcessorCount: *value = processors; break;
    case cudaDevAttrComputeCapabilityMajor: *value = capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = capability % 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = shared_block; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = shared_optin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = shared_optin + 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxGridDimX: *value = max_grid_x; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *value = max_grid_yz; break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = registers; break;
    case cudaDevAttrL2CacheSize: *value = 50 << 20; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = 32; break;
    default: *value = 1;
  }
  return cudaSuccess;
}
API cudaError_t cudaDeviceCanAccessPeer(int *value, int, int) { return *value = 1, cudaSuccess; }
API cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
API cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int number) {
  snprintf(text, size, "0000:%02x:00.0", 10 + number);
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}
API cudaError_t cudaDeviceSynchronize() { return wait(); }

// ---- memory
API cudaError_t cudaMalloc(void **p, size_t bytes) { return allocate(p, bytes, device); }
API cudaError_t cudaMallocHost(void **p, size_t bytes) { return allocate(p, bytes, pinned); }
API cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned) { return allocate(p, bytes, pinned); }
API cudaError_t cudaFree(void *p) { return release(p); }
API cudaError_t cudaFreeHost(void *p) { return release(p); }
API cudaError_t cudaHostRegister(void *p, size_t bytes, unsigned) {
  Guard guard(mutex);
  areas[(uintptr_t)p] = {bytes, pinned, 0};
  return cudaSuccess;
}
API cudaError_t cudaHostUnregister(void *p) {
  Guard guard(mutex);
  areas.erase((uintptr_t)p);
  return cudaSuccess;
}
API cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) {
  *total = (size_t)memory_mb << 20;
  *unused = *total > (size_t)used ? *total - used : 0;
  return cudaSuccess;
}
API cudaError_t cudaMemcpy(void *to, const void *from, size_t n, cudaMemcpyKind) { return copy(to, from, n, false); }
API cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, cudaMemcpyKind, cudaStream_t) {
  return copy(to, from, n, true);
}
API cudaError_t cudaMemcpyPeerAsync(void *to, int, const void *from, int, size_t n, cudaStream_t) {
  return copy(to, from, n, true);
}
API cudaError_t cudaMemset(void *, int, size_t) { return cudaSuccess; }
API cudaError_t cudaMemsetAsync(void *, int, size_t, cudaStream_t) { return cudaSuccess; }
API cudaError_t cudaMemcpyToSymbol(const void *, const void *, size_t, size_t, cudaMemcpyKind) {
  return cudaSuccess;
}
API cudaError_t cudaGetSymbolAddress(void **p, const void *) {
  static char room[1 << 20];
  return *p = room, cudaSuccess;
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *a, const void *p) {
  Guard guard(mutex);
  memset(a, 0, sizeof *a);
  const Area *area = area_of(p);
  a->type = !area ? cudaMemoryTypeUnregistered : area->kind == pinned ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
  a->device = area ? area->device : -2;
  a->devicePointer = area ? (void *)p : nullptr;
  a->hostPointer = area && area->kind == pinned ? (void *)p : nullptr;
  return cudaSuccess;
}

// ---- streams and events
API cudaError_t cudaStreamCreate(cudaStream_t *s) { return *s = new_stream(), cudaSuccess; }
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned) { return *s = new_stream(), cudaSuccess; }
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned, int) {
  return *s = new_stream(), cudaSuccess;
}
API cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
API cudaError_t cudaStreamSynchronize(cudaStream_t) { return wait(); }
API cudaError_t cudaStreamQuery(cudaStream_t) {
  Guard guard(mutex);
  advance();
  return queue.empty() ? cudaSuccess : cudaErrorNotReady;
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
API cudaError_t cudaStreamGetPriority(cudaStream_t, int *priority) { return *priority = 0, cudaSuccess; }
API cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus *status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus *status, unsigned long long *id,
                                         cudaGraph_t *, const cudaGraphNode_t **, const cudaGraphEdgeData **,
                                         size_t *) {
  if (id) *id = 0;
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *) { return cudaSuccess; }
API cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void *data) {
  function(data);
  return cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t *e) { return *e = (cudaEvent_t) new Event, cudaSuccess; }
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) { return cudaEventCreate(e); }
API cudaError_t cudaEventDestroy(cudaEvent_t e) {
  delete (Event *)e;
  return cudaSuccess;
}
API cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t) {
  Guard guard(mutex);
  ((Event *)e)->number = submitted;
  return cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned) { return cudaEventRecord(e, s); }
API cudaError_t cudaEventQuery(cudaEvent_t e) {
  Guard guard(mutex);
  advance();
  return done >= ((Event *)e)->number ? cudaSuccess : cudaErrorNotReady;
}
API cudaError_t cudaEventSynchronize(cudaEvent_t e) {
  waits++;
  advance(((Event *)e)->number);
  return cudaSuccess;
}
API cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t, cudaEvent_t) { return *ms = 1, cudaSuccess; }

// ---- kernels
API cudaError_t cudaLaunchKernel(const void *, dim3 g, dim3 b, void **, size_t s, cudaStream_t) {
  return launch(g, b, s);
}
API cudaError_t cudaLaunchCooperativeKernel(const void *, dim3 g, dim3 b, void **, size_t s, cudaStream_t) {
  return launch(g, b, s);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *, void **) {
  return launch(c->gridDim, c->blockDim, c->dynamicSmemBytes);
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3 g, dim3 b, void **, size_t s, cudaStream_t) {
  return launch(g, b, s);
}
API cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
  return *kernel = (cudaKernel_t)function, cudaSuccess;
}
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  Configuration c = configurations.back();
  configurations.pop_back();
  *grid = c.grid, *block = c.block, *shared = c.shared, *(void **)stream = c.stream;
  return cudaSuccess;
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *a, const void *) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = max_threads;
  a->numRegs = 32;
  a->binaryVersion = a->ptxVersion = capability;
  a->maxDynamicSharedSizeBytes = shared_optin;
  return cudaSuccess;
}
API cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int) { return cudaSuccess; }
API cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t, cudaFuncAttribute, int, int) { return cudaSuccess; }
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *, int, size_t) {
  return *blocks = 4, cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *, int, size_t,
                                                                       unsigned) {
  return *blocks = 4, cudaSuccess;
}
API void **__cudaRegisterFatBinary(void *) {
  static void *handle;
  return &handle;
}
API void __cudaRegisterFatBinaryEnd(void **) {}
API void __cudaUnregisterFatBinary(void **) {}
API void __cudaRegisterFunction(void **, const char *, char *, const char *, int, uint3 *, uint3 *, dim3 *, dim3 *,
                                int *) {}
API void __cudaRegisterVar(void **, char *, char *, const char *, int, size_t, int, int) {}
API cudaError_t cudaGetDriverEntryPoint(const char *, void **function, unsigned long long,
                                        cudaDriverEntryPointQueryResult *result) {
  if (result) *result = cudaDriverEntryPointSuccess;
  return *function = (void *)nothing, cudaSuccess;
}
API cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned,
                                                 unsigned long long flags, cudaDriverEntryPointQueryResult *result) {
  return cudaGetDriverEntryPoint(name, function, flags, result);
}
API cudaError_t cudaProfilerStart() { return cudaSuccess; }
API cudaError_t cudaProfilerStop() { return cudaSuccess; }

// ---- cuBLAS: handles, one algorithm; build.py adds the rest, which succeeds and does nothing
API cublasStatus_t cublasCreate_v2(cublasHandle_t *h) { return *h = (cublasHandle_t) new long, CUBLAS_STATUS_SUCCESS; }
API cublasStatus_t cublasDestroy_v2(cublasHandle_t) { return CUBLAS_STATUS_SUCCESS; }
API cublasStatus_t cublasGetMathMode(cublasHandle_t, cublasMath_t *mode) {
  return *mode = CUBLAS_DEFAULT_MATH, CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t, cublasPointerMode_t *mode) {
  return *mode = CUBLAS_POINTER_MODE_HOST, CUBLAS_STATUS_SUCCESS;
}
API int cublasLtMatmulAlgoGetHeuristic(void *, void *, void *, void *, void *, void *, void *, int, void *results,
                                       int *found) {
  memset(results, 0, 64);
  return *found = 1, 0;
}
API size_t cublasLtGetVersion() { return 130400; }
API int cublasLtMatmulDescCreate(void **h) { return *h = new long[64](), 0; }
API int cublasLtMatmulPreferenceCreate(void **h) { return *h = new long[64](), 0; }
API int cublasLtMatrixLayoutCreate(void **h) { return *h = new long[64](), 0; }

// ---- NCCL: collectives succeed and do nothing; ending a communicator may hang
namespace {
struct Communicator {
  int ranks, rank;
};
struct Id {
  char bytes[128];
};
int join(Communicator **c, int ranks, int rank) { return *c = new Communicator{ranks, rank}, 0; }
int leave() {
  sleep(nccl_hang_s);
  return 0;
}
}  // namespace
API int ncclGetVersion(int *version) { return *version = 23007, 0; }
API int ncclGetUniqueId(Id *id) { return memset(id, 7, sizeof *id), 0; }
API int ncclCommInitRank(Communicator **c, int ranks, Id, int rank) { return join(c, ranks, rank); }
API int ncclCommInitRankConfig(Communicator **c, int ranks, Id, int rank, void *) { return join(c, ranks, rank); }
API int ncclCommInitRankScalable(Communicator **c, int ranks, int rank, int, void *, void *) {
  return join(c, ranks, rank);
}
API int ncclCommGetAsyncError(Communicator *, int *error) { return *error = 0, 0; }
API int ncclCommCount(Communicator *c, int *ranks) { return *ranks = c->ranks, 0; }
API int ncclCommUserRank(Communicator *c, int *rank) { return *rank = c->rank, 0; }
API const char *ncclGetErrorString(int) { return "no error"; }
API const char *ncclGetLastError(Communicator *) { return ""; }
API int ncclBroadcast(const void *from, void *to, size_t, int, int, Communicator *, cudaStream_t) {
  Guard guard(mutex);
  if (auto found = uploaded.find(from); found != uploaded.end()) broadcast[to] = found->second;
  return 0;
}
API int ncclBcast(void *buffer, size_t n, int type, int root, Communicator *c, cudaStream_t stream) {
  return ncclBroadcast(buffer, buffer, n, type, root, c, stream);
}
API int ncclCommFinalize(Communicator *) { return leave(); }
API int ncclCommDestroy(Communicator *) { return leave(); }
API int ncclCommAbort(Communicator *) { return leave(); }
