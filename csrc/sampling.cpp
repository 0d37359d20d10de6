#include "sampling.hpp"

#include <memory>

namespace fastppo {

void* thread_scratch(std::size_t bytes) {
  constexpr std::size_t alignment = 64;
  thread_local std::unique_ptr<unsigned char[]> memory;
  thread_local std::size_t capacity = 0;
  if (capacity < bytes + alignment) {
    capacity = bytes + alignment;
    memory.reset(new unsigned char[capacity]);
  }
  const auto address = reinterpret_cast<std::uintptr_t>(memory.get());
  return memory.get() + (alignment - address % alignment) % alignment;
}

}  // namespace fastppo
