// Places by name: source lines of code addresses (through addr2line), threads, kernels.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>

#include "emulator/machine.h"

namespace emulator {
namespace {

std::string base_name(const std::string& path) { return path.substr(path.rfind('/') + 1); }

struct Frame {
  std::string function, source;
};

// The function at `address`, innermost of inlined ones first; empty if addr2line is missing.
std::vector<Frame> frames_at(const char* address) {
  Dl_info info{};
  std::vector<Frame> frames;
  if (dladdr(address, &info) == 0) return frames;
  char command[1200];
  snprintf(command, sizeof(command), "addr2line -fiC -e '%s' 0x%tx 2>/dev/null", info.dli_fname,
           address - static_cast<const char*>(info.dli_fbase));
  FILE* pipe = popen(command, "r");
  if (pipe == nullptr) return frames;
  char function[2000], source[2000];
  while (fgets(function, sizeof(function), pipe) && fgets(source, sizeof(source), pipe)) {
    function[std::strcspn(function, "\n")] = source[std::strcspn(source, " \n")] = 0;
    frames.push_back({function, base_name(source)});
  }
  pclose(pipe);
  return frames;
}

}  // namespace

std::string source_of(const void* pc) {
  std::string text, last;
  for (const Frame& frame : frames_at(static_cast<const char*>(pc) - 1)) {  // pc is where the hook returns to
    if (frame.source == last) continue;
    last = frame.source;
    text += (text.empty() ? "" : " < ") + frame.source;
  }
  return text.empty() ? "an unknown place" : text;
}

std::string kernel_text() {
  if (grid.launch.kernel == nullptr) return "no kernel";
  const auto frames = frames_at(static_cast<const char*>(grid.launch.kernel));
  return "kernel " + (frames.empty() ? "of unknown name" : frames.back().function);
}

std::string text_of(Location at) { return base_name(at.file) + ":" + std::to_string(at.line); }

std::string thread_text(ThreadId id) {
  const dim3 blocks = grid.launch.grid, size = grid.launch.block;
  const uint32_t b = block_of(id), t = index_of(id);
  char text[160];
  snprintf(text, sizeof(text), "(%u,%u,%u) of block (%u,%u,%u)", t % size.x, t / size.x % size.y, t / size.x / size.y,
           b % blocks.x, b / blocks.x % blocks.y, b / blocks.x / blocks.y);
  return text;
}

}  // namespace emulator
