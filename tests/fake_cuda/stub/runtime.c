/* A CUDA runtime whose devices have neither memory nor kernels.

   torch's fake tensors never touch a device, but torch.cuda wants one to exist: to count devices, to make streams,
   events and generators, and to pin host memory. All of that succeeds here at once, in order of the calls. Allocating
   device memory fails, so that a tensor that is not fake is noticed. */
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define SUCCEED(name, ...) \
  cudaError_t name(__VA_ARGS__) { return cudaSuccess; }

/* Devices */

static __thread int current_device = 0;

cudaError_t cudaGetDeviceCount(int *count) {
  const char *given = getenv("FAKE_CUDA_DEVICES");
  *count = given ? atoi(given) : 8;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device) {
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
  memset(properties, 0, sizeof *properties);
  strcpy(properties->name, "stub of a GPU");
  properties->major = 9;
  properties->totalGlobalMem = (size_t)80 << 30;
  properties->multiProcessorCount = 132;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->sharedMemPerBlock = 48 << 10;
  properties->sharedMemPerBlockOptin = 227 << 10;
  properties->regsPerMultiprocessor = 64 << 10;
  properties->l2CacheSize = 50 << 20;
  properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
  properties->maxThreadsDim[2] = 64;
  properties->maxGridSize[0] = 2147483647;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  *value = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int device) {
  strncpy(text, "0000:00:00.0", length);
  return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
  *can = 0;
  return cudaSuccess;
}

SUCCEED(cudaDeviceEnablePeerAccess, int peer, unsigned flags)
SUCCEED(cudaDeviceSynchronize, void)
SUCCEED(cudaGetLastError, void)
SUCCEED(cudaPeekAtLastError, void)

const char *cudaGetErrorName(cudaError_t error) { return "cudaErrorOfStub"; }

const char *cudaGetErrorString(cudaError_t error) {
  return "a tensor that is not fake has reached the stub of the CUDA runtime, which cannot compute";
}

/* Streams and events: all work is done when it is asked for. */

static cudaError_t new_handle(void **handle) {
  *handle = calloc(1, sizeof(double));
  return cudaSuccess;
}

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec + 1e-9 * time.tv_nsec;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) { return new_handle((void **)stream); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { return new_handle((void **)stream); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  return new_handle((void **)stream);
}

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
  *priority = 0;
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes,
                                     const cudaGraphEdgeData **edges, size_t *count) {
  if (status) *status = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  return cudaSuccess;
}

SUCCEED(cudaStreamDestroy, cudaStream_t stream)
SUCCEED(cudaStreamQuery, cudaStream_t stream)
SUCCEED(cudaStreamSynchronize, cudaStream_t stream)
SUCCEED(cudaStreamWaitEvent, cudaStream_t stream, cudaEvent_t event, unsigned flags)
SUCCEED(cudaThreadExchangeStreamCaptureMode, enum cudaStreamCaptureMode *mode)

cudaError_t cudaEventCreate(cudaEvent_t *event) { return new_handle((void **)event); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return new_handle((void **)event); }

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  *(double *)event = now();
  return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  return cudaEventRecord(event, stream);
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
  *milliseconds = 1000 * (*(double *)end - *(double *)start);
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  free(event);
  return cudaSuccess;
}

SUCCEED(cudaEventQuery, cudaEvent_t event)
SUCCEED(cudaEventSynchronize, cudaEvent_t event)

/* Device memory: none. */

cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
  *available = *total = (size_t)80 << 30;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void **pointer, size_t size) { return cudaErrorNotSupported; }

SUCCEED(cudaFree, void *pointer)
SUCCEED(cudaLaunchKernel, const void *kernel, dim3 grid, dim3 block, void **arguments, size_t size, cudaStream_t stream)
SUCCEED(cudaLaunchKernelExC, const cudaLaunchConfig_t *config, const void *kernel, void **arguments)

/* Pinned host memory: ordinary memory, of which it is known where it lies. */

#define RANGES 4096
static struct {
  const char *start;
  size_t size;
} pinned[RANGES];
static pthread_mutex_t pinned_lock = PTHREAD_MUTEX_INITIALIZER;

static cudaError_t remember(const void *pointer, size_t size) {
  cudaError_t result = cudaErrorMemoryAllocation;
  pthread_mutex_lock(&pinned_lock);
  for (int i = 0; pointer && i < RANGES; i++)
    if (!pinned[i].start) {
      pinned[i].start = pointer;
      pinned[i].size = size;
      result = cudaSuccess;
      break;
    }
  pthread_mutex_unlock(&pinned_lock);
  return result;
}

static cudaError_t forget(const void *pointer) {
  pthread_mutex_lock(&pinned_lock);
  for (int i = 0; i < RANGES; i++)
    if (pinned[i].start == pointer) pinned[i].start = NULL;
  pthread_mutex_unlock(&pinned_lock);
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
  memset(attributes, 0, sizeof *attributes);
  attributes->type = cudaMemoryTypeUnregistered;
  pthread_mutex_lock(&pinned_lock);
  for (int i = 0; i < RANGES; i++)
    if (pinned[i].start && (const char *)pointer >= pinned[i].start &&
        (const char *)pointer < pinned[i].start + pinned[i].size)
      attributes->type = cudaMemoryTypeHost;
  pthread_mutex_unlock(&pinned_lock);
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **pointer, size_t size, unsigned flags) {
  *pointer = malloc(size);
  return remember(*pointer, size);
}

cudaError_t cudaMallocHost(void **pointer, size_t size) { return cudaHostAlloc(pointer, size, 0); }

cudaError_t cudaFreeHost(void *pointer) {
  forget(pointer);
  free(pointer);
  return cudaSuccess;
}

cudaError_t cudaHostRegister(void *pointer, size_t size, unsigned flags) { return remember(pointer, size); }
cudaError_t cudaHostUnregister(void *pointer) { return forget(pointer); }

/* Functions of the driver that torch asks the runtime for. */

static int succeed(void) { return 0; }

static int primary_context_state(int device, unsigned *flags, int *active) {
  *flags = 0;
  *active = 1;
  return 0;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
  *function = strcmp(name, "cuDevicePrimaryCtxGetState") ? (void *)succeed : (void *)primary_context_state;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
