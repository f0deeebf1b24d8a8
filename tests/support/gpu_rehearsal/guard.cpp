// A CUDA device that is not there, for a CPU build of torch: a device guard that does nothing, and
// hooks that say CUDA is present. Both must be registered before torch is imported. With them, fake
// tensors live on "cuda", and autograd runs their backward on a device thread of its own as it does
// on a GPU. Nothing here computes anything.
//
// The signatures are those of torch 2.11 to 2.13.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

const c10::Device kDevice(c10::DeviceType::CUDA, 0);

c10::Stream default_stream() {
  return c10::Stream(c10::Stream::DEFAULT, kDevice);
}

struct AbsentDeviceGuard : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override { return default_stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return default_stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return default_stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag)
      const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};

AbsentDeviceGuard guard;

struct Registration {
  Registration() {
    const auto cuda = static_cast<size_t>(c10::DeviceType::CUDA);
    c10::impl::device_guard_impl_registry[cuda].store(&guard);
  }
} registration;

}  // namespace

namespace at {

struct AbsentCudaHooks : CUDAHooksInterface {
  explicit AbsentCudaHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
};

// torch asks the registry for hooks of this name.
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, AbsentCudaHooks)

}  // namespace at
