// Kernels that do next to nothing but read R and write W <= R streams of floats: the first W become the sums of
// themselves and of those that are only read. benchmarks/streams.py compiles, checks and times them.
using Address = unsigned;  // in shared memory

constexpr int kThreads = 256;

// Aligned to 128 bytes; so many elements of each.
struct Arrays {
  float* of[4];
  long long elements;
};

// What every kernel computes, 4 elements of each stream at a time.
template <int R, int W>
__device__ __forceinline__ void add_unwritten(float4 (&v)[R]) {
#pragma unroll
  for (int k = 0; k < W; ++k) {
#pragma unroll
    for (int m = W; m < R; ++m) {
      v[k].x += v[m].x;
      v[k].y += v[m].y;
      v[k].z += v[m].z;
      v[k].w += v[m].w;
    }
  }
}

// Elements of each stream that a block loads before it stores.
constexpr int kVectors = 4, kRound = kThreads * kVectors * 4;

// A block does ROUNDS rounds. GROUP neighbouring blocks share theirs out: in each round, the group's rounds lie side by
// side. With a GROUP of 1 a block's own rounds do.
template <int R, int W, int ROUNDS, int GROUP>
__device__ __forceinline__ void blocks(const Arrays& a) {
  const long long block = blockIdx.x, first = block / GROUP * GROUP * ROUNDS + block % GROUP;
  for (int round = 0; round < ROUNDS; ++round) {
    const long long at = (first + round * GROUP) * kRound + threadIdx.x * 4;
    float4 v[kVectors][R];
#pragma unroll
    for (int j = 0; j < kVectors; ++j)
#pragma unroll
      for (int k = 0; k < R; ++k) v[j][k] = *reinterpret_cast<const float4*>(a.of[k] + at + j * kThreads * 4);
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      add_unwritten<R, W>(v[j]);
#pragma unroll
      for (int k = 0; k < W; ++k) *reinterpret_cast<float4*>(a.of[k] + at + j * kThreads * 4) = v[j][k];
    }
  }
}

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ Address shared(const void* p) { return static_cast<Address>(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ void wait(Address barrier, unsigned parity) {
  unsigned done = 0;
  while (!done)
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
}

// As many blocks as fit; each takes every gridDim.x-th tile. STAGES tiles of each stream lie in shared memory, on their
// way in or out; the first thread moves them.
template <int R, int W, int TILE, int STAGES>
__device__ __forceinline__ void bulk(const Arrays& a) {
  extern __shared__ __align__(128) float buffer[];  // [STAGES][R][TILE]
  __shared__ __align__(8) unsigned long long full[STAGES];
  constexpr int kBytes = TILE * sizeof(float);
  const bool moves = threadIdx.x == 0;
  const long long tiles = a.elements / TILE, step = gridDim.x;
  if (moves) {
    for (int stage = 0; stage < STAGES; ++stage)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared(&full[stage])) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  auto load = [&](long long tile, int stage) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared(&full[stage])), "r"(R * kBytes)
                 : "memory");
#pragma unroll
    for (int k = 0; k < R; ++k)
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                       shared(buffer + (stage * R + k) * TILE)),
                   "l"(a.of[k] + tile * TILE), "r"(kBytes), "r"(shared(&full[stage]))
                   : "memory");
  };
  if (moves)
    for (int n = 0; n < STAGES - 1; ++n)
      if (blockIdx.x + n * step < tiles) load(blockIdx.x + n * step, n);
  int n = 0;
  for (long long tile = blockIdx.x; tile < tiles; tile += step, ++n) {
    float* streams = buffer + n % STAGES * R * TILE;
    wait(shared(&full[n % STAGES]), n / STAGES % 2);
    for (int i = threadIdx.x * 4; i < TILE; i += kThreads * 4) {
      float4 v[R];
#pragma unroll
      for (int k = 0; k < R; ++k) v[k] = *reinterpret_cast<float4*>(streams + k * TILE + i);
      add_unwritten<R, W>(v);
#pragma unroll
      for (int k = 0; k < W; ++k) *reinterpret_cast<float4*>(streams + k * TILE + i) = v[k];
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // copies are to see what was just written
    __syncthreads();
    if (moves) {
#pragma unroll
      for (int k = 0; k < W; ++k)
        asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(a.of[k] + tile * TILE),
                     "r"(shared(streams + k * TILE)), "r"(kBytes)
                     : "memory");
      asm volatile("cp.async.bulk.commit_group;" ::: "memory");
      if (tile + (STAGES - 1) * step < tiles) {
        // Into the stage that was stored from one tile ago: all but the newest copies must have read theirs.
        asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
        load(tile + (STAGES - 1) * step, (n + STAGES - 1) % STAGES);
      }
    }
  }
  if (moves) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");  // shared memory goes with the block
}
#endif
