"""Chips: their published figures, and what a compiler must know of a GPU that is not there."""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Processor:
    """What the compiler must know of an NVIDIA GPU, beside its memory.

    Attributes:
      name: as the driver reports it.
      capability: compute capability, (major, minor).
      cores: streaming multiprocessors.
      fpus: float32 units of a core.
      threads: largest number of threads on a core.
      shared_memory: bytes of shared memory of a core; a block gets 1,024 less, if it asks for it.
      cache: bytes of L2 cache.
      clock: GHz.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    fpus: int
    threads: int
    shared_memory: int
    cache: int
    clock: float


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of a TPU chip or GPU and of its host machine.

    Attributes:
      flops: operations per second in bfloat16, without sparsity. A TPU's float32 matrix products
        consist of these, too. A GPU's are slower, by half in TF32.
      hbm_bytes: bytes of memory traffic per second.
      link_bytes: bytes per second that a chip sends through all its links to other chips of the
        slice or host; half of the "bidirectional" figure.
      memory: bytes.
      host_chips: chips per host machine; for TPUs, in slices of more than one host.
      host_cores: virtual CPU cores of such a host.
      processor: of a GPU, what the compiler must know.
      network_bytes: of a GPU, bytes per second that its share of the host's network cards sends to
        other hosts. The links of TPUs also join hosts.
    """

    flops: float
    hbm_bytes: float
    link_bytes: float
    memory: float
    host_chips: int
    host_cores: int
    processor: Processor | None = None
    network_bytes: float = 0.0

    @property
    def is_gpu(self) -> bool:
        """Whether it is a GPU."""
        return self.processor is not None


# From cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. The hosts are the machine types ct4p-hightpu-4t,
# ct5lp-hightpu-4t, ct5p-hightpu-4t and ct6e-standard-4t.
TPUS = {
    "v4": Chip(275e12, 1228e9, 300e9, 32 * GIB, 4, 240),
    "v5e": Chip(197e12, 819e9, 200e9, 16 * GIB, 4, 112),
    "v5p": Chip(459e12, 2765e9, 600e9, 95 * GIB, 4, 208),
    "v6e": Chip(918e12, 1640e9, 400e9, 32 * GIB, 4, 180),
}

# Rates: NVIDIA's data sheets "H100 Tensor Core GPU" (SXM), "H200 Tensor Core GPU" (SXM), "A100
# Tensor Core GPU" (80 GB, SXM) and "L40S"; the L40S has PCIe 4.0 x16 in place of NVLink. Memory: as
# the driver reports it, in XLA's descriptions of these GPUs (xla/backends/gpu/target_config/specs);
# of the L40S, for which there is none, the data sheet's. Hosts: DGX H100, DGX H200, DGX A100, in
# threads; for the L40S, Amazon's g6e.48xlarge. Networks, one card a GPU: 400 Gb/s in DGX H100 and
# H200, 200 Gb/s in DGX A100 and in NVIDIA's reference design 2-8-5-200 for the L40S.
# Processors: the same descriptions; of the L40S, "NVIDIA Ada GPU architecture" and the CUDA
# programming guide's table of compute capabilities.
GPUS = {
    "a100": Chip(
        312e12,
        2039e9,
        300e9,
        85_100_068_864,
        8,
        256,
        Processor("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 2048, 167_936, 40 * 2**20, 1.41),
        25e9,
    ),
    "h100": Chip(
        989e12,
        3352e9,
        450e9,
        84_942_979_072,
        8,
        224,
        Processor("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 2048, 233_472, 50 * 2**20, 1.98),
        50e9,
    ),
    "h200": Chip(
        989e12,
        4800e9,
        450e9,
        151_397_597_184,
        8,
        224,
        Processor("NVIDIA H200 141GB HBM3e", (9, 0), 132, 128, 2048, 233_472, 50 * 2**20, 1.98),
        50e9,
    ),
    "l40s": Chip(
        362e12,
        864e9,
        32e9,
        48_000_000_000,
        8,
        192,
        Processor("NVIDIA L40S", (8, 9), 142, 128, 1536, 102_400, 96 * 2**20, 2.52),
        25e9,
    ),
}

CHIPS = TPUS | GPUS


def target_config(gpu: Chip) -> str:
    """XLA's description of a GPU that need not be there, a `GpuTargetConfigProto` as text."""
    processor = gpu.processor
    major, minor = processor.capability
    # The limits without a field are those of all compute capabilities from 8.0 to 9.0.
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {processor.shared_memory - 1024}
  shared_memory_per_core: {processor.shared_memory}
  threads_per_core_limit: {processor.threads}
  core_count: {processor.cores}
  fpus_per_core: {processor.fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {gpu.hbm_bytes:.0f}
  l2_cache_size: {processor.cache}
  clock_rate_ghz: {processor.clock}
  device_memory_size: {gpu.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  driver_version: "13.0.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 28 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{processor.name}"
"""
