// SPDX-License-Identifier: Apache-2.0
#include "cuda_on_cpu.h"

#include <ucontext.h>

#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <memory>
#include <vector>

#include "guarded.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_cpu {
namespace {

constexpr size_t kStackBytes = 128 << 10;

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  int group;
};

struct Fibre {
  ucontext_t context;  // where it begins
  bool begun;
  jmp_buf place;  // where it goes on: unlike swapcontext, a jump is no call of the system
  uint3 index;
  State state;
  std::vector<Copy> copies;
  int group;
};

jmp_buf scheduler;
std::vector<Fibre> fibres;
std::vector<std::unique_ptr<char[]>> stacks;  // kept from grid to grid
std::vector<char> lanes;                      // a place for each thread
const std::function<void()>* body;
char* shared = nullptr;
int current = 0;
volatile sig_atomic_t fault = 0;

void leave(State state) {
  Fibre& fibre = fibres[current];
  fibre.state = state;
  if (_setjmp(fibre.place) == 0) _longjmp(scheduler, 1);
}

// A fibre is a thread of one block after the other.
void live() {
  for (;;) {
    (*body)();
    leave(State::done);
  }
}

void go_on(Fibre& fibre) {
  if (_setjmp(scheduler) != 0) return;
  if (fibre.begun) _longjmp(fibre.place, 1);
  fibre.begun = true;
  setcontext(&fibre.context);
}

void on_fault(int, siginfo_t*, void*) {
  fault = 1;
  _longjmp(scheduler, 1);
}

// Lets those go on that have waited for each other; whether there were any.
bool open_barriers() {
  const int count = static_cast<int>(fibres.size());
  bool opened = false;
  for (int first = 0; first < count; first += kWarp) {
    const int last = std::min(first + kWarp, count);
    int waiting = 0, live = 0;
    for (int i = first; i < last; ++i) {
      live += fibres[i].state != State::done;
      waiting += fibres[i].state == State::at_warp_barrier;
    }
    if (waiting == 0 || waiting < live) continue;
    for (int i = first; i < last; ++i)
      if (fibres[i].state != State::done) fibres[i].state = State::ready;
    opened = true;
  }
  if (opened) return true;
  int waiting = 0;
  for (const Fibre& fibre : fibres) waiting += fibre.state == State::at_block_barrier;
  if (waiting < count) return false;  // a thread that has returned never comes
  for (Fibre& fibre : fibres) fibre.state = State::ready;
  return true;
}

std::string where(const char* what) {
  const auto triple = [](unsigned x, unsigned y, unsigned z) {
    return "(" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
  };
  const uint3 t = fibres[current].index;
  return std::string(what) + " in block " + triple(blockIdx.x, blockIdx.y, blockIdx.z) +
         ", thread " + triple(t.x, t.y, t.z);
}

std::string run_block(bool falling) {
  const int count = static_cast<int>(fibres.size());
  for (int i = 0; i < count; ++i) {
    fibres[i].state = State::ready;
    fibres[i].copies.clear();
    fibres[i].group = 0;
  }
  for (;;) {
    for (int n = 0; n < count; ++n) {
      current = falling ? count - 1 - n : n;
      Fibre& fibre = fibres[current];
      if (fibre.state != State::ready) continue;
      threadIdx = fibre.index;
      go_on(fibre);
      if (fault) return where("access outside of the tensors and of shared memory");
      if (fibre.state == State::done && !fibre.copies.empty())
        return where("copies that nobody waits for");
    }
    int done = 0, ready = 0;
    for (const Fibre& fibre : fibres) {
      done += fibre.state == State::done;
      ready += fibre.state == State::ready;
    }
    if (done == count) return "";
    if (ready == 0 && !open_barriers()) return where("a barrier that not all threads reach");
  }
}

}  // namespace

void wait_for_block() { leave(State::at_block_barrier); }
void wait_for_warp() { leave(State::at_warp_barrier); }
void* shared_memory() { return shared; }
int lane() { return current % kWarp; }
char* lane_place(int lane) { return &lanes[(current / kWarp * kWarp + lane) * kLaneBytes]; }

void load_pieces(const void* row, uint32_t (&to)[2]) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) raise(SIGBUS);
  leave_for_lanes(row);
  for (int i = 0; i < 2; ++i)
    std::memcpy(&to[i], left_by<const char*>(8 * i + lane() / 4) + lane() % 4 * 4, 4);
  wait_for_warp();
}

void copy_later(void* to, const void* from, size_t bytes) {
  fibres[current].copies.push_back({to, from, bytes, fibres[current].group});
}
void commit_copies() { ++fibres[current].group; }
void wait_for_copies(int groups) {
  Fibre& fibre = fibres[current];
  size_t kept = 0;
  for (const Copy& copy : fibre.copies)
    if (copy.group < fibre.group - groups)
      std::memcpy(copy.to, copy.from, copy.bytes);
    else
      fibre.copies[kept++] = copy;
  fibre.copies.resize(kept);
}

std::string run_grid(dim3 grid, dim3 block, size_t shared_bytes, bool falling,
                     const std::function<void()>& thread) {
  const Guarded memory(nullptr, shared_bytes);
  shared = memory.as<char>();
  body = &thread;
  gridDim = grid;
  blockDim = block;
  const int count = static_cast<int>(block.x * block.y * block.z);
  fibres = std::vector<Fibre>(count);
  while (stacks.size() < fibres.size()) stacks.emplace_back(new char[kStackBytes]);
  lanes.assign((count + kWarp - 1) / kWarp * kWarp * kLaneBytes, 0);
  for (int i = 0; i < count; ++i) {
    const unsigned n = i;
    Fibre& fibre = fibres[i];
    fibre.index = {n % block.x, n / block.x % block.y, n / block.x / block.y};
    fibre.begun = false;
    getcontext(&fibre.context);
    fibre.context.uc_stack = {stacks[i].get(), 0, kStackBytes};
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, live, 0);
  }
  struct sigaction action = {}, before[2];
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, &before[0]);
  sigaction(SIGBUS, &action, &before[1]);
  fault = 0;
  std::string error;
  for (unsigned z = 0; z < grid.z && error.empty(); ++z)
    for (unsigned y = 0; y < grid.y && error.empty(); ++y)
      for (unsigned x = 0; x < grid.x && error.empty(); ++x) {
        blockIdx = {x, y, z};
        std::memset(shared, falling ? kLarge : kNan, shared_bytes);
        error = run_block(falling);
      }
  sigaction(SIGSEGV, &before[0], nullptr);
  sigaction(SIGBUS, &before[1], nullptr);
  return error;
}

}  // namespace cuda_on_cpu
