// Threads as fibers: who runs next, barriers, launches.
#include <cstdio>
#include <cstring>
#include <map>

#include "emulator/machine.h"

namespace emulator {

Settings settings;
Context context;
Grid grid;
Thread* current = nullptr;
Time now = 2;

namespace {

constexpr uint64_t kSpins = 200000;  // without anybody getting on: a livelock

Thread caller;  // stands for the thread that called launch
std::vector<std::unique_ptr<Block>> idle_blocks;
std::string failure;
uint64_t random_state;

void run_until_back(Thread& to) {
  Thread* from = current;
  current = &to;
  if (to.block != nullptr) {
    context.thread = to.place;
    context.block = to.block->place;
  }
  switch_to(from->fiber, to.fiber);
}

Thread* take(Block& block) {
  auto& ready = block.ready;
  const size_t count = ready.size() - block.next;
  if (count == 0) return nullptr;
  Thread* thread;
  if (settings.order == Order::reverse) {
    thread = ready.back();
    ready.pop_back();
  } else {
    if (settings.order == Order::random) std::swap(ready[block.next], ready[block.next + random_number() % count]);
    thread = ready[block.next++];
  }
  if (block.next == ready.size() || block.next > 4096) {  // or it would grow as long as somebody spins
    ready.erase(ready.begin(), ready.begin() + static_cast<ptrdiff_t>(block.next));
    block.next = 0;
  }
  return thread;
}

[[noreturn]] void stop(std::string message) {
  failure = std::move(message);
  if (current != nullptr && current->block != nullptr) run_until_back(caller);  // this fiber never runs again
  throw Error(failure);
}

void release_block(Block& block) {
  block.counted = block.votes;
  block.votes = 0;
  block.synced = ++now;
  grid.spins = 0;
  if (kChecked) {
    for (Thread* thread : block.at_barrier) {
      block.acquired.learn(thread->acquired);
      thread->acquired.clear();
    }
  }
  for (Thread* thread : block.at_barrier) wake(thread);
  block.at_barrier.clear();
}

void release_grid() {
  grid.synced = ++now;
  grid.at_barrier = 0;
  grid.spins = 0;
  for (auto& block : grid.blocks) {
    for (Thread* thread : block->at_grid_barrier) wake(thread);
    block->at_grid_barrier.clear();
  }
}

void arrive(const char* name, Location at) {
  Block& block = *current->block;
  if (block.at_barrier.empty()) {
    block.barrier = name;
    block.barrier_at = at;
  } else if (!(block.barrier_at == at)) {
    fail("divergent barrier: %s at %s, while others wait in %s at %s", name, text_of(at).c_str(), block.barrier,
         text_of(block.barrier_at).c_str());
  }
  if (block.live != block.size) {
    fail("barrier after return: %s at %s, and %u threads of the block have returned", name, text_of(at).c_str(),
         block.size - block.live);
  }
  block.at_barrier.push_back(current);
  if (block.at_barrier.size() == block.live) release_block(block);
  wait(name, at);
}

// The first function of every fiber.
void run_thread() {
  grid.launch.run(grid.launch.call);
  Block& block = *current->block;
  current->done = true;
  --block.live;
  --grid.live;
  grid.spins = 0;
  block.warps[current->index / 32].exited |= 1u << current->index % 32;
  if (!block.at_barrier.empty()) {
    fail("barrier after return: this thread returned, and %zu of its block wait in %s at %s", block.at_barrier.size(),
         block.barrier, text_of(block.barrier_at).c_str());
  }
  if (grid.at_barrier != 0) {
    fail("barrier after return: this thread returned, and %llu of the grid wait in the grid barrier at %s",
         static_cast<unsigned long long>(grid.at_barrier), text_of(grid.barrier_at).c_str());
  }
  Thread* next = take(block);
  run_until_back(next != nullptr ? *next : caller);
  __builtin_unreachable();
}

std::unique_ptr<Block> start_block(uint32_t linear) {
  std::unique_ptr<Block> block;
  if (idle_blocks.empty()) {
    block = std::make_unique<Block>();
  } else {
    block = std::move(idle_blocks.back());
    idle_blocks.pop_back();
  }
  const dim3 size = grid.launch.block, blocks = grid.launch.grid;
  const uint32_t count = size.x * size.y * size.z;
  block->linear = linear;
  block->place = {linear % blocks.x, linear / blocks.x % blocks.y, linear / blocks.x / blocks.y};
  block->size = block->live = count;
  block->warps.assign((count + 31) / 32, Warp{});
  block->ready.clear();
  block->next = 0;
  block->at_barrier.clear();
  block->at_grid_barrier.clear();
  block->votes = 0;
  block->synced = ++now;
  block->acquired.clear();
  for (size_t i = count; i < block->threads.size(); ++i) return_stack(block->threads[i].fiber.stack);
  block->threads.resize(count);
  for (uint32_t i = 0; i < count; ++i) {
    Thread& thread = block->threads[i];
    unsigned char* stack = thread.fiber.stack != nullptr ? thread.fiber.stack : take_stack();
    if (stack == nullptr) fail("too many threads are resident");
    thread.fiber.stack = stack;
    prepare(thread.fiber, run_thread);
    thread.block = block.get();
    thread.index = i;
    thread.id = linear << 10 | i;
    thread.place = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    thread.done = false;
    thread.copies.clear();
    thread.groups.clear();
    if (kChecked) {
      thread.acquired.clear();
      thread.offered.clear();
      thread.released.clear();
      thread.last_flag = nullptr;
    }
    block->warps[i / 32].exist |= 1u << i % 32;
    wake(&thread);
  }
  begin_shared(*block, grid.launch.shared);
  grid.live += count;
  return block;
}

[[noreturn]] void deadlock() {
  std::map<std::string, int> waiting;
  for (const auto& block : grid.blocks) {
    for (const Thread& thread : block->threads) {
      if (!thread.done) ++waiting[std::string(thread.waits_in) + " at " + text_of(thread.where)];
    }
  }
  std::string message = "deadlock:";
  for (const auto& [where, count] : waiting) message += " " + std::to_string(count) + " threads wait in " + where + ",";
  message.back() = ';';
  stop(message + " " + kernel_text());
}

// Until all threads of the resident blocks have returned.
void run_blocks() {
  for (;;) {
    bool anybody = false;
    const size_t count = grid.blocks.size(), first = settings.order == Order::random ? random_number() % count : 0;
    for (size_t i = 0; i < count; ++i) {
      Block& block = *grid.blocks[settings.order == Order::reverse ? count - 1 - i : (i + first) % count];
      if (Thread* thread = take(block)) {
        anybody = true;
        run_until_back(*thread);
        if (!failure.empty()) throw Error(failure);
      }
    }
    if (anybody) continue;
    if (grid.live != 0) deadlock();
    return;
  }
}

void run_grid(uint32_t blocks) {
  if (grid.launch.cooperative) {
    for (uint32_t i = 0; i < blocks; ++i) grid.blocks.push_back(start_block(i));
    run_blocks();
    return;
  }
  std::vector<uint32_t> order(blocks);
  for (uint32_t i = 0; i < blocks; ++i) order[i] = settings.order == Order::reverse ? blocks - 1 - i : i;
  if (settings.order == Order::random) {
    for (uint32_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[random_number() % i]);
  }
  for (const uint32_t linear : order) {
    grid.blocks.push_back(start_block(linear));
    run_blocks();
    idle_blocks.push_back(std::move(grid.blocks.back()));
    grid.blocks.pop_back();
  }
}

// The status that CUDA would refuse the launch with.
cudaError_t refusal(const Launch& launch) {
  const uint64_t threads = uint64_t{launch.block.x} * launch.block.y * launch.block.z;
  const uint64_t blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  if (threads == 0 || threads > 1024 || launch.block.z > 64 || blocks == 0 || launch.grid.y > 65535 ||
      launch.grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  if (launch.shared > kSharedLimit) return cudaErrorInvalidValue;
  if (launch.cooperative) {
    const uint64_t fit = (kSharedLimit + 1024) / (launch.shared + 1024);
    if (blocks > kMultiprocessors * std::min(2048 / threads, fit)) return cudaErrorCooperativeLaunchTooLarge;
  }
  return cudaSuccess;
}

}  // namespace

bool Location::operator==(const Location& other) const {
  return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
}

uint64_t random_number() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

void fail(const std::string& what) {
  std::string message = what;
  if (current != nullptr && current->block != nullptr) message += "; thread " + thread_text(current->id);
  if (current != nullptr) message += "; " + kernel_text();
  stop(message);
}

void fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  fail(std::string(text));
}

void wake(Thread* thread) { thread->block->ready.push_back(thread); }

void wait(const char* in, Location at) {
  current->waits_in = in;
  current->where = at;
  Thread* next = take(*current->block);
  if (next == current) return;
  run_until_back(next != nullptr ? *next : caller);
}

void spin(Location at) {
  if (++grid.spins > kSpins) fail("livelock: spinning at %s, and no thread gets on", text_of(at).c_str());
  Block& block = *current->block;
  if (settings.order == Order::reverse) {
    block.ready.insert(block.ready.begin() + static_cast<ptrdiff_t>(block.next), current);
  } else {
    block.ready.push_back(current);
  }
  // To the caller, so that other blocks run too: two threads of one block must not hand over to each other for ever.
  run_until_back(caller);
}

void block_barrier(Location at) { arrive("__syncthreads", at); }

int block_vote(Vote vote, bool predicate, Location at) {
  static constexpr const char* kNames[] = {"__syncthreads_and", "__syncthreads_or", "__syncthreads_count"};
  Block& block = *current->block;
  block.votes += predicate;
  arrive(kNames[static_cast<int>(vote)], at);
  if (vote == Vote::count) return block.counted;
  return vote == Vote::any ? block.counted != 0 : block.counted == static_cast<int>(block.size);
}

void grid_barrier(Location at) {
  if (!grid.launch.cooperative) fail("grid barrier at %s in a launch that is not cooperative", text_of(at).c_str());
  if (grid.at_barrier == 0) {
    grid.barrier_at = at;
  } else if (!(grid.barrier_at == at)) {
    fail("divergent barrier: grid barriers at %s and %s", text_of(grid.barrier_at).c_str(), text_of(at).c_str());
  }
  if (grid.live != grid.total) {
    fail("barrier after return: grid barrier at %s, and %llu threads of the grid have returned", text_of(at).c_str(),
         static_cast<unsigned long long>(grid.total - grid.live));
  }
  current->block->at_grid_barrier.push_back(current);
  if (++grid.at_barrier == grid.live) release_grid();
  wait("a grid barrier", at);
}

cudaError_t launch(const Launch& launch) {
  const cudaError_t refused = refusal(launch);
  if (refused != cudaSuccess) return refused;
  if (now > 0xf0000000u) throw Error("the emulator's clock ends here: start the process anew");
  const uint32_t blocks = launch.grid.x * launch.grid.y * launch.grid.z;
  grid.launch = launch;
  grid.total = uint64_t{blocks} * launch.block.x * launch.block.y * launch.block.z;
  grid.live = grid.at_barrier = grid.spins = 0;
  grid.flags.clear();
  grid.launched = grid.synced = ++now;
  context.block_size = launch.block;
  context.grid_size = launch.grid;
  failure.clear();
  random_state = (settings.seed + 1) * 0x9E3779B97F4A7C15u;
  current = &caller;
  const auto finish = [] {
    for (auto& block : grid.blocks) idle_blocks.push_back(std::move(block));
    grid.blocks.clear();
    current = nullptr;
  };
  try {
    if (blocks >= 1u << 19) fail("grid of %u blocks: the emulator takes fewer than 2^19", blocks);
    run_grid(blocks);
  } catch (...) {
    finish();
    throw;
  }
  finish();
  return cudaSuccess;
}

}  // namespace emulator

extern "C" void emulator_configure(int order, uint64_t seed, int copy_async) {
  emulator::settings = {static_cast<emulator::Order>(order), seed, static_cast<emulator::CopyAsync>(copy_async)};
}
