"""A closed form for each memory term of a sparse fine-tuning run outside the activations. Bytes.

What lies in memory all the time: the frozen base; for each trained entry a value, an index, the base entry it
replaced, a gradient, the optimizer's states. What comes and goes: activations (`activations.py`), dense gradients one
at a time, the write-back's temporaries, and what the selection reads.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec

from engine.targets import is_drawn_singly
from engine.units import MIB

FP32_BYTES = 4
INT64_BYTES = 8
INT32_LIMIT = 2**31  # positions from here on need 8 bytes
MOST_COLUMNS = 2**16  # that 2 bytes tell apart

# Measured on the CPU build of torch 2.13 with transformers 5.23, datasets 5.2 and peft 0.21 on Linux x86-64: resident
# memory of a worker that imported them, read the bundled dataset and loaded the bundled model, less that model.
# Where Triton is installed they import it.
HOST_PROCESS_BYTES = 512 * MIB + (76 * MIB if find_spec("triton") else 0)
# A CUDA context with its kernels takes 450 +- 150 MiB, by driver and card; measured only by starting one.
CUDA_CONTEXT_BYTES = 450 * MIB
# cuBLAS keeps one workspace a stream and a thread that calls it: the forward's and the backward's. 8.125 MiB each up to
# sm_89, 32 MiB on sm_90 and later (PyTorch, CUDABlas.cpp); where the card is not known, the larger is planned.
CUDA_WORKSPACE_BYTES = 2 * 32 * MIB
CUDA_SMALL_WORKSPACE_BYTES = 2 * (8 * MIB + MIB // 8)
# Buffers of oneDNN and OpenMP, small tensors, stacks of threads: 35 to 50 MiB beyond the closed forms in two steps of a
# model of 63 M parameters, with glibc's mmap threshold at 1 MiB (left alone it keeps freed blocks, 13 to 30 percent).
CPU_WORKSPACE_BYTES = 40 * MIB
# Adapters of PEFT on the CPU: their small tensors lie between the blocks of activations below 1 MiB on the C library's
# heap and keep these from being used again: 56 to 64 MiB beyond the plan of the demo's 2.9 M parameters, three runs.
CPU_ADAPTER_HEAP_BYTES = 55 * MIB
# What oneDNN keeps for products in bf16 on the CPU: 365 to 490 MiB beyond the plan of the demo in 40 steps, at two
# sizes of micro-batch and a cache of 64 kernels (`engine.processes`); with its own 1,024 it grew to 900.
CPU_BF16_BYTES = 430 * MIB
# What NCCL keeps on each card for a run on several: buffers of 4 MiB for each channel and neighbour, of which there are
# some tens. A first guess: no run on several cards was measured.
NCCL_BYTES = 256 * MIB
NF4_BLOCK = 64  # entries that share an absmax; bitsandbytes' default
NF4_NESTED_BLOCK = 256  # absmax values that share a scale under double quantisation
STATE_BLOCK = 256  # numbers that share a scale in 8-bit states (arXiv:2110.02861)
FEWEST_8_BIT = 4096  # smaller tensors keep fp32 states
# Of each optimizer: fp32 states an entry, fp32 numbers a tensor, and temporaries an entry in its update, in fp32; torch
# 2.13, of those by name with foreach off. Weight decay makes one temporary more where it is added to the gradient.
OPTIMIZERS: Mapping[str, tuple[int, int, int]] = {
    "adamw": (2, 1, 0),
    "sgd": (0, 0, 0),
    "adam": (2, 1, 2),
    "nadam": (2, 2, 2),
    "radam": (2, 1, 2),
    "adagrad": (1, 1, 1),
    "adadelta": (2, 1, 2),
    "adamax": (2, 1, 1),
    "rmsprop": (1, 1, 1),
    "rprop": (2, 1, 3),
    "asgd": (1, 3, 0),
}
FUSED = ("adamw", "sgd")
SAMPLED_NUMEL = 2**20  # numbers that sampled products hold at once; the plain form gathers as many, twice
SEGMENT_BYTES = 2 * MIB  # PyTorch, c10/cuda/CUDACachingAllocator.cpp


def parameters_bytes(num_parameters: int, element_bytes: int) -> int:
    """Return the size of the frozen base: every parameter once, in the dtype of the run."""
    return num_parameters * element_bytes


def quantised_bytes(numel: int) -> int:
    """Return the size of a linear weight in NF4 with double quantisation (arXiv:2305.14314): 4.127 bits an entry.

    Half a byte an entry; of each block of 64 its absmax in one byte, and of 256 of those an fp32 scale; per weight the
    code books of both quantisations (16 and 256 fp32 numbers) and their offset.
    """
    blocks = -(-numel // NF4_BLOCK)
    return -(-numel // 2) + blocks + FP32_BYTES * (-(-blocks // NF4_NESTED_BLOCK) + 16 + 256 + 1)


def dequantised_bytes(numel: int, element_bytes: int) -> int:
    """Return what using an NF4 weight takes beside it: the dense matrix and the absmax of its blocks in fp32 twice."""
    return element_bytes * numel + 2 * FP32_BYTES * -(-numel // NF4_BLOCK)


def values_bytes(num_active: int) -> int:
    """Return the size of the trained values: fp32 whatever the base is."""
    return FP32_BYTES * num_active


def replaced_bytes(num_active: int, element_bytes: int) -> int:
    """Return the size of the base entries kept so that a delta is removed bit for bit: dtype of the base."""
    return element_bytes * num_active


def split_values_bytes(num_active: int) -> int:
    """Return the size of split masters: the low half and the replaced base entry, 2 bytes each.

    The high half is the bf16 weight itself, where a value of 4 bytes would lie beside it.
    """
    return FP32_BYTES * num_active


def indices_bytes(
    numels: Mapping[str, int], num_active: Mapping[str, int], widths: Mapping[str, int] | None = None
) -> int:
    """Return the size of the flat positions: 4 bytes each, 8 in a tensor of 2**31 entries or more.

    Args:
        numels: entries of each target.
        num_active: trained entries of each target.
        widths: of the last dimension of each, where positions are kept by rows if that is less: columns of 2 bytes, of
            which there are up to 65,536, and 4 for where each row begins.
    """
    total = 0
    for name, count in num_active.items():
        flat = (4 if numels[name] < INT32_LIMIT else INT64_BYTES) * count
        width = MOST_COLUMNS + 1 if widths is None else widths[name]
        total += flat if width > MOST_COLUMNS else min(flat, 2 * count + 4 * (numels[name] // width + 1))
    return total


def gradients_bytes(num_active: int, element_bytes: int = FP32_BYTES) -> int:
    """Return the size of the values' gradient; fp32, so that micro-batches sum without rounding."""
    return element_bytes * num_active


def exchange_bytes(num_values: int) -> int:
    """Return what the processes of a run exchange at once, and copy for it: fp32 gradients, joined to one tensor."""
    return FP32_BYTES * num_values


def births_bytes(num_active: int) -> int:
    """Return the size of what SpIEL-MA knows of each entry's origin: the int16 number of a reselection."""
    return 2 * num_active


def pinned_bytes(num_bytes: int) -> int:
    """Return what a tensor takes in pinned main memory: PyTorch's allocator gives powers of two."""
    return 1 << (num_bytes - 1).bit_length() if num_bytes else 0


def optimizer_states_bytes(
    sizes: Iterable[int],
    optimizer: str,
    *,
    accumulators: int = 0,
    ages: bool = False,
    eight_bit: bool = False,
    pinned: bool = False,
) -> int:
    """Return the size of the optimizer's states over the values.

    Args:
        sizes: trained entries of each tensor.
        optimizer: sm3: its accumulators in fp32; else see `OPTIMIZERS`.
        accumulators: rows and columns of all targets.
        ages: whether AdamW also keeps the age of each entry, int32, beside 8-bit moments int16; else one a tensor.
        eight_bit: whether AdamW's moments are codes of 1 byte with an fp32 scale each 256.
        pinned: whether they lie in pinned main memory.
    """
    if optimizer == "sm3":
        return FP32_BYTES * accumulators
    states, numbers, _ = OPTIMIZERS[optimizer]
    taken: Callable[[int], int] = pinned_bytes if pinned else int
    number = 0 if ages else FP32_BYTES * numbers
    return sum(
        count * (sum(map(taken, _states_of(size, states, ages, eight_bit))) + number)
        for size, count in Counter(sizes).items()
    )


def _states_of(size: int, states: int, ages: bool, eight_bit: bool) -> list[int]:
    """Return the bytes of each state of a tensor of `size` entries; a number for all of them is none."""
    coded = eight_bit and size >= FEWEST_8_BIT
    moment = [size, FP32_BYTES * -(-size // STATE_BLOCK)] if coded else [FP32_BYTES * size]
    return moment * states + ([FP32_BYTES // (2 if coded else 1) * size] if ages else [])


def candidates_bytes(num_active: int) -> int:
    """Return the size of SpIEL-AG's growth candidates in an estimation phase, as many as there are trained entries.

    Of each its position and the sums; its gradient comes in each backward, as that of a trained entry.
    """
    return FP32_BYTES * num_active + candidate_sums_bytes(num_active)


def chosen_candidates_bytes(num_active: int) -> int:
    """Return what the choice of candidates leaves: their positions and gradient."""
    return 2 * FP32_BYTES * num_active


def candidate_sums_bytes(num_active: int) -> int:
    """Return the size of the sums of the candidates' gradients and of their squares: from a phase's second step on."""
    return 2 * FP32_BYTES * num_active


def dense_gradient_bytes(numel: int, element_bytes: int) -> int:
    """Return the one dense gradient that a backward holds: of one target, in the dtype of the base."""
    return element_bytes * numel


def gather_bytes(num_active: int, element_bytes: int, *, by_rows: bool = False) -> int:
    """Return what reading the trained entries out of a dense gradient takes: an entry and, in 16 bit, its fp32 copy.

    `by_rows`: positions are unpacked first, to 4 bytes each.
    """
    copy = FP32_BYTES if element_bytes != FP32_BYTES else 0
    return (element_bytes + copy + (FP32_BYTES if by_rows else 0)) * num_active


def sampling_bytes(num_active: int, tokens: int, element_bytes: int) -> int:
    """Return what the products of the trained entries alone take, a number a token, in as many parts as hold enough.

    Of each entry and token of a part both factors and their product, one factor and the product in fp32; in 16 bit the
    factors of the part before are still there while those of the next are made. A GPU's kernel takes less.
    """
    part = min(num_active, max(1, SAMPLED_NUMEL // tokens))
    again = element_bytes if element_bytes != FP32_BYTES and part < num_active else 0
    return (2 * FP32_BYTES + element_bytes + again) * part * tokens


def adding_bytes(num_active: int, element_bytes: int, *, by_rows: bool = False) -> int:
    """Return what adding the values to a dequantised weight takes: int64 positions, entries and sums, in fp32 and not.

    `by_rows`: positions are unpacked first, to 4 bytes each.
    """
    each = INT64_BYTES + 2 * FP32_BYTES + 2 * element_bytes
    return (each + (FP32_BYTES if by_rows else 0)) * num_active


def choosing_bytes(numel: int, num_active: int, element_bytes: int, *, squared: bool, left: int = 0) -> int:
    """Return what choosing entries by a dense gradient takes beside it, with what is `left` of it after the choice.

    The look for numbers that are not finite: magnitudes, and three comparison bytes an entry. Or the choice, see
    `topk_bytes`. `squared`: both over the squares in fp32, made of an fp32 copy.
    """
    each = FP32_BYTES if squared else element_bytes
    copies = FP32_BYTES * numel * (2 if element_bytes != FP32_BYTES else 1) if squared else 0
    return copies + max((each + 3) * numel, topk_bytes(numel, num_active, each) + left)


def probe_bytes(numel: int, element_bytes: int) -> int:
    """Return what measuring the gradient's sparsity takes beside a dense gradient of `numel` entries.

    An fp32 copy where it is in 16 bit, its squares in fp32, and one comparison byte an entry.
    """
    copy = FP32_BYTES if element_bytes != FP32_BYTES else 0
    return (max(copy, 1) + FP32_BYTES) * numel


def topk_bytes(numel: int, num_active: int, element_bytes: int) -> int:
    """Return what choosing the `num_active` largest of `numel` scores takes beside the scores.

    A copy of their magnitudes; of each chosen entry its score, its int64 position, and the same sorted.
    """
    return element_bytes * numel + (element_bytes + 2 * INT64_BYTES) * num_active


def draw_bytes(numel: int, num_active: int) -> int:
    """Return what drawing positions at random takes, in main memory.

    Drawn one by one: themselves, the same sorted, and int64 places of the sort. Else a permutation in int64 and its
    sorted part.
    """
    if is_drawn_singly(numel, num_active):
        index = INT64_BYTES if numel >= INT32_LIMIT else FP32_BYTES
        return (2 * index + INT64_BYTES) * num_active
    return INT64_BYTES * (numel + 2 * num_active)


def settled_bytes(num_active: int, target_numel: int, reselections: int, element_bytes: int) -> int:
    """Return the most that entries take which are no longer trained but keep their change (`reselection_period`).

    Of each its position, value and, over a dense base, base entry; every choice may leave all entries before it behind.

    Args:
        num_active: entries trained at once.
        target_numel: entries of all targets, trained or not.
        reselections: choices after the first.
        element_bytes: of the base; 0 over NF4.
    """
    return (2 * FP32_BYTES + element_bytes) * min(reselections * num_active, target_numel - num_active)


def accumulated_gradient_bytes(numels: Mapping[str, int]) -> int:
    """Return the dense gradient of all targets, fp32 in main memory, that a selection over micro-batches sums up."""
    return FP32_BYTES * sum(numels.values())


def write_back_bytes(num_active: int, element_bytes: int) -> int:
    """Return what writing `num_active` values of one tensor into its weight takes.

    Of each trained entry its int64 position, the sum in fp32 and, in 16 bit, the rounded sum.
    """
    rounded = element_bytes if element_bytes != FP32_BYTES else 0
    return (INT64_BYTES + FP32_BYTES + rounded) * num_active


def update_bytes(
    size: int,
    optimizer: str,
    *,
    ages: bool = False,
    eight_bit: bool = False,
    split: bool = False,
    decay: bool = False,
) -> int:
    """Return what the update of one tensor of `size` trained entries takes beside what stays; see `OPTIMIZERS`.

    SM3: of each entry its row and column in int64, both accumulators, their minimum, its square and the update.
    AdamW with ages: the age as a number, both bias corrections, root, denominator and update. With 8-bit states also
    both moments in fp32; quantising takes 14 bytes beside them: scaled numbers, codes and limits of 4 bytes, and masks.
    Of split masters also the values in fp32; writing them takes 16 beside: both halves, positions in int32 and int64.
    """
    if optimizer == "sm3":
        return (2 * INT64_BYTES + 6 * FP32_BYTES) * size
    temporaries = OPTIMIZERS[optimizer][2] + (decay and optimizer not in FUSED)
    each = FP32_BYTES * (6 if ages else temporaries)
    if not eight_bit:
        return each * size
    return (2 * FP32_BYTES + max(14, FP32_BYTES + max(each, 16) if split else each)) * size


def replacing_bytes(size: int) -> int:
    """Return what SpIEL-AG's replacement among `size` entries takes.

    In int64: positions of entries and of candidates, places to drop, places of the largest, new positions, where they
    came from, candidates there, places in one tensor, which are new, and these bounded. In fp32: values, both means,
    the moments made of them and their parts that are new, and three states that take the place of the old.
    """
    return (10 * INT64_BYTES + 10 * FP32_BYTES) * size


def replacing_together_bytes(size: int, most: int) -> int:
    """Return what it takes among all `size` entries as one, of which `most` lie in one tensor.

    While positions are exchanged nine of those in int64, four in fp32 and masks; while those of a tensor are written,
    80 bytes of each of all, and what a tensor's own take: places, moments and states.
    """
    return max(92 * size, 80 * size + (4 * INT64_BYTES + 3 * FP32_BYTES) * most)


def growing_bytes(size: int, left: int) -> int:
    """Return what SpIEL-MA's choice of entries to grow takes beside `size` trained ones, over twice as many products.

    Of each row, column, position, a factor, the column again and the other factor, 8 bytes each. Of the `left` entries
    of the weight before: what was grown, positions, where they came from and when.
    """
    return 6 * INT64_BYTES * 2 * size + (3 * INT64_BYTES + 2) * left


def context_bytes(on_cpu: bool) -> int:
    """Return what is taken before the first tensor: the process itself on the CPU, the CUDA context on a GPU."""
    return HOST_PROCESS_BYTES if on_cpu else CUDA_CONTEXT_BYTES


def workspace_bytes(on_cpu: bool, sm: int = 0, *, adapters: bool = False, bfloat16: bool = False) -> int:
    """Return what the matrix libraries, and on the CPU the heap, keep for themselves.

    Args:
        on_cpu: whether the run is there.
        sm: compute capability of a GPU, 89 for 8.9, 0: not known.
        adapters: whether adapters are trained beside the weights.
        bfloat16: whether the base is of that type.
    """
    if on_cpu:
        heap = CPU_ADAPTER_HEAP_BYTES if adapters else 0
        return CPU_WORKSPACE_BYTES + heap + (CPU_BF16_BYTES if bfloat16 else 0)
    return CUDA_SMALL_WORKSPACE_BYTES if 0 < sm < 90 else CUDA_WORKSPACE_BYTES


def reserved_bytes(allocated: int, transient: int, trained: int) -> int:
    """Return what the caching allocator takes from the device for `allocated` bytes of tensors.

    Blocks above 10 MiB are rounded up to 2 MiB, smaller ones are cut from segments of 20 or 2 MiB, so that what comes
    and goes leaves gaps that a later tensor of another size does not fill, also between what is trained. Shares
    measured by replaying the allocator over 222 traces: ten families in 15 settings each, and models of 7, 8 and 13
    billion parameters at 512 to 4096 tokens in six. On the large ones it is 2.2 percent off in the mean, from 11 too
    low (LoRA over NF4) to 6 too high; on the families, of few layers, 5.1, from 22 too low to 16 too high.
    """
    return _up(allocated + int(0.35 * transient + 0.08 * trained), SEGMENT_BYTES)


def minimum_bytes(allocated: int, saved: int, transient: int, trained: int) -> int:
    """Return the least limit on the allocator under which a step succeeds: it gives cached segments back first.

    Measured as for `reserved_bytes`, to 16 MiB: on the large models 1.8 percent off in the mean, from 7 too low to 5
    too high; on the families 4.7, from 19 to 12. `saved`: what is saved for the backward.
    """
    least = _up(allocated + int(0.04 * saved + 0.13 * transient + 0.09 * trained), SEGMENT_BYTES)
    return min(least, reserved_bytes(allocated, transient, trained))


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
