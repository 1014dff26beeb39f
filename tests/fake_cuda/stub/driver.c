/* libcuda.so.1: the symbols that torch's and Triton's libraries link against. None is called with work to do. */
#define SUCCEED(name) \
  int name(void) { return 0; }

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  *flags = 0;
  *active = 1;
  return 0;
}

int cuGetErrorString(int error, const char **text) {
  *text = "an error of the stub of CUDA's driver";
  return 0;
}

SUCCEED(cuCtxGetCurrent)
SUCCEED(cuCtxSetCurrent)
SUCCEED(cuDeviceGet)
SUCCEED(cuDeviceGetAttribute)
SUCCEED(cuDevicePrimaryCtxRetain)
SUCCEED(cuFuncGetAttribute)
SUCCEED(cuFuncSetAttribute)
SUCCEED(cuFuncSetCacheConfig)
SUCCEED(cuLaunchCooperativeKernel)
SUCCEED(cuLaunchKernel)
SUCCEED(cuLinkAddData_v2)
SUCCEED(cuLinkComplete)
SUCCEED(cuLinkCreate_v2)
SUCCEED(cuModuleGetFunction)
SUCCEED(cuModuleLoad)
SUCCEED(cuModuleLoadData)
SUCCEED(cuModuleLoadDataEx)
SUCCEED(cuModuleUnload)
SUCCEED(cuOccupancyMaxActiveBlocksPerMultiprocessor)
SUCCEED(cuPointerGetAttribute)
SUCCEED(cuTensorMapEncodeTiled)
